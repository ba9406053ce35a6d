"""``nqm neural bridge``: from a run or a recipe to tables, a verdict and a page of figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from neural.bridge.adam import decoupled, preconditioned
from neural.bridge.api import (
    Measured,
    check_plan,
    compare,
    measure,
    measure_checkpoint,
    predict,
)
from neural.bridge.best_lr import POINTS, best_lrs
from neural.bridge.comparison import Outcome
from neural.bridge.config import ADAMW, EARLY, BridgeConfig, Plan, Training
from neural.bridge.from_run import risk_of_run
from neural.bridge.shared_base import member_mask
from neural.bridge.timing import cost_table
from neural.bridge.verdict import verdict
from neural.bridge.workers import Bridged, fill_cache
from neural.curvature.cache import Cache
from neural.curvature.examples import rows
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.minimise import minimise
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import grouped
from neural.curvature.spectrum import density
from neural.late_phase.members import Batch
from neural.late_phase.reparametrize import RankOne, add_rank1
from neural.training.build import make_model
from neural.training.config import RunConfig, describe, run_key
from neural.training.load_run import reopen
from neural.training.recipe import load_recipe
from neural.training.task import Runtime, Task, open_task
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.keys import differing
from nqm.limits import check_size
from nqm.progress import Progress, counted
from nqm.runs import toml
from nqm.table import Stamp, finished, read_table, replacing, write_table

if TYPE_CHECKING:
    import pandas as pd

#: Table of a settings file -> class of its settings; any other key belongs to the recipe.
SECTIONS: dict[str, type] = {"bridge": BridgeConfig, "plan": Plan}
#: Minimisations with AdamW, each with the weight decay at the minimum before it.
DECOUPLED = 3
#: Number of matrices in memory at the same time where the whole matrix is measured.
MATRICES = 16
#: Random vectors for the density of the spectrum, which is for the figure alone.
PROBES = 2
#: Names of the files of results in the order of writing: if the last exists, all do.
TABLES = ("spectrum", "course", "best_lr", "cost", "bridge")


def load_config(
    path: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[BridgeConfig, Plan]:
    """Read the settings of a bridge from a TOML file and overrides.

    Parameters
    ----------
    path : Path, optional
        File with tables ``[bridge]`` (see `BridgeConfig`) and ``[plan]`` (see `Plan`). Without it
        all fields have their defaults.
    overrides : sequence of str
        E.g. ``bridge.examples=600`` or ``plan.members=[1,4]``; applied last.

    Returns
    -------
    config : BridgeConfig
    plan : Plan

    Raises
    ------
    NQMError
        If the file cannot be read, or a key or value is wrong; the message names the dotted key.
    """
    mapping: dict[str, Any] = {} if path is None else toml.load(path)
    toml.override(mapping, overrides)
    names = {name: tuple(toml.signature(cls)[0]) for name, cls in SECTIONS.items()}
    toml.check_sections(mapping, names)
    toml.known_keys("", mapping, tuple(SECTIONS))
    tables = {name: dict(toml.table_at(name, mapping.get(name, {}))) for name in SECTIONS}
    if "late_phase" in tables["plan"]:  # which needs two members at least
        tables["plan"].setdefault("members", list(Plan.members[1:]))
    config, plan = (toml.call(kind, tables[name], name) for name, kind in SECTIONS.items())
    return config, plan


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the bridge's own tables and those of the recipe.

    Parameters
    ----------
    overrides : sequence of str
        Overrides of the form ``key=value``.

    Returns
    -------
    own, others : list of str
        Overrides of the bridge's settings, and of the recipe.
    """
    own = [item for item in overrides if item.partition(".")[0].strip() in SECTIONS]
    return own, [item for item in overrides if item not in own]


@dataclass(frozen=True)
class Opened:
    """A network to be measured, and its data.

    Attributes
    ----------
    run : RunConfig
        Configuration of the run, or of the recipe's first arm.
    model : Module
        The network with the weights of the checkpoint.
    task : Task
        Data and loss of the run.
    """

    run: RunConfig
    model: nn.Module
    task: Task


def open_target(
    target: str, runtime: Runtime, scale: str = "full", overrides: Sequence[str] = ()
) -> Opened:
    """Load the single model of a finished run, or of the first arm of a recipe with a checkpoint.

    Parameters
    ----------
    target : str
        Folder of a finished run, or a recipe's name or file.
    runtime : Runtime
        Device and folder of data files.
    scale : str
        Scale of the recipe, e.g. ``"smoke"``; not used for a run.
    overrides : sequence of str
        Overrides of the recipe, e.g. ``model.checkpoint=FILE``.

    Returns
    -------
    Opened

    Raises
    ------
    NQMError
        If there is no such run or recipe, if the recipe has no checkpoint, or if a finished run is
        given with overrides.
    """
    if Path(target).is_dir():
        if overrides:
            name = overrides[0].partition("=")[0]
            raise NQMError(
                f"{name} cannot be changed: {target} is a finished run; change settings of "
                f"{' and '.join(SECTIONS)} only, e.g. bridge.steps"
            )
        opened = reopen(target, runtime)
        return Opened(opened.run, opened.model, opened.task)
    recipe = load_recipe(target, scale, overrides)
    run = next(iter(recipe.arms.values()))
    if run.model.checkpoint is None:
        raise NQMError(
            f"recipe {target} starts from random weights; give the folder of a finished run, or "
            "--set model.checkpoint=FILE"
        )
    task = open_task(run, runtime)
    return Opened(run, make_model(run.model, task, root=runtime.root), task)


@dataclass(frozen=True)
class Bridge:
    """All results of a bridge.

    Attributes
    ----------
    local : LocalQuadratic
        Slope, curvature and noise at the checkpoint.
    table, course : DataFrame
        Losses, made by `neural.bridge.api.compare`; measured columns are NaN if nothing was
        trained.
    best : DataFrame
        Best learning rates, made by `neural.bridge.best_lr.best_lrs`.
    cost : DataFrame
        Computing time, made by `neural.bridge.timing.cost_table`.
    spectrum : DataFrame
        Columns curvature, count, noise_variance, kind (pair, bulk or bulk noise).
    words : list of str
        Sentences of `neural.bridge.verdict.verdict`.
    """

    local: LocalQuadratic
    table: pd.DataFrame
    course: pd.DataFrame
    best: pd.DataFrame
    cost: pd.DataFrame
    spectrum: pd.DataFrame
    words: list[str]


def run_bridge(
    opened: Opened,
    config: BridgeConfig,
    plan: Plan,
    runtime: Runtime,
    out: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Bridge:
    """Measure, predict, train and compare; every stage is stored in `out` and not computed again.

    Parameters
    ----------
    opened : Opened
        The network, from `open_target`.
    config : BridgeConfig
        What is measured, and which trainings are predicted.
    plan : Plan
        How many runs are trained, and which averages are evaluated.
    runtime : Runtime
        Device and folder of data files.
    out : Path
        Folder for ``bridge.parquet``, ``course.parquet``, ``best_lr.parquet``, ``cost.parquet``,
        ``spectrum.parquet``, ``problem.parquet`` (which `nqm` reads), ``verdict.md`` and, in
        ``kept/``, the result of each stage.
    workers : int
        Number of processes that do the trainings, and what is measured for each of them. The
        results are the same for any number if torch has the same number of threads in each
        process: they share those of this one.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.

    Returns
    -------
    Bridge
        The results, as read from the files.

    Raises
    ------
    NQMError
        If the settings do not fit the network or its data, or `out` holds another bridge.
    """
    if config.batchnorm_group is not None and plan.late_phase is not None:
        raise NQMError(
            "late_phase trains in evaluation mode; drop batchnorm_group, or drop late_phase"
        )
    check_plan(config, plan)
    stamp = _stamp(opened.run, config, plan)
    # Raises NQMError if the file holds results of other settings.
    known = finished(out / "bridge.parquet", stamp)
    cache = Cache(out / "kept")
    risk = measured_risk(opened, config, plan, runtime, cache, progress)
    local = measure_checkpoint(
        preconditioned(risk, config, cache), config, seed=plan.seed, cache=cache, progress=progress
    )
    if known is None:
        write_table(out / "problem.parquet", local.problem_table(), stamp.metadata())
        test = held_out_risk(risk, opened.task, config.test_examples, config.batchnorm_group)
        if workers > 1:
            bridged = Bridged(risk, test, config, plan, out / "kept")
            fill_cache(bridged, workers, runtime.device, progress)
        # It reads the result of `measure_checkpoint` from its file.
        measured = measure(risk, config, plan=plan, seed=plan.seed, cache=cache, progress=progress)
        found = compare if config.train else predict
        outcome = found(measured, plan, test=test, progress=progress)
        for name, table in _tables(measured, outcome, opened, config, plan, progress).items():
            write_table(out / f"{name}.parquet", table, stamp.metadata())
    tables = {name: read_table(out / f"{name}.parquet") for name in TABLES}
    words = verdict(tables["bridge"], local, tables["best_lr"], tables["cost"])
    with replacing(out / "verdict.md") as stream:
        stream.write(("\n".join(f"- {line}" for line in words) + "\n").encode())
    return Bridge(
        local,
        tables["bridge"],
        tables["course"],
        tables["best_lr"],
        tables["cost"],
        tables["spectrum"],
        words,
    )


def steps_of(opened: Opened, epochs: float, batch_size: int) -> int:
    """Number of optimizer steps of some passes over the run's training data.

    Parameters
    ----------
    opened : Opened
        The network, from `open_target`.
    epochs : float
        Passes over the training data, above 0.
    batch_size : int
        Examples of one minibatch (for a text, windows).

    Returns
    -------
    int
        At least 1.
    """
    examples = len(opened.task.stream) * opened.run.data.batch_size
    return max(round(epochs * examples / batch_size), 1)


def _stamp(run: RunConfig, config: BridgeConfig, plan: Plan) -> Stamp:
    """Metadata of the tables of a bridge; its key depends on what differs from the defaults."""
    key = keys.key({"run": run_key(run), "bridge": differing(config), "plan": differing(plan)})
    settings = {"run": describe(run), "bridge": asdict(config), "plan": asdict(plan)}
    return Stamp(key, __version__, settings)


def _tables(
    measured: Measured,
    outcome: Outcome,
    opened: Opened,
    config: BridgeConfig,
    plan: Plan,
    progress: Progress | None,
) -> dict[str, pd.DataFrame]:
    """All tables by name, in the order in which they are written."""
    risk, gaussians = measured.risk, measured.gaussians
    grids = 1 if plan.late_phase is None else len(plan.members)
    work = grids * POINTS + 8.0 * len(plan.members)
    search = counted(progress, "best learning rates", work)
    best = best_lrs(outcome.table, gaussians, records=plan.records, progress=search)
    epoch = len(opened.task.stream) * opened.run.data.batch_size
    share = risk.examples * (config.batchnorm_group or 1) / epoch
    tables = {
        "spectrum": _spectrum(measured, config, plan.seed, progress),
        "course": outcome.course,
        "best_lr": best,
        "cost": cost_table(risk, share, measured.cache.log),
        "bridge": outcome.table,
    }
    return {name: tables[name] for name in TABLES}


def _check_sizes(risk: EmpiricalRisk, training: Training, config: BridgeConfig, plan: Plan) -> None:
    """Raise NQMError, before anything is measured, if the arrays would not fit into memory."""
    weights, numbers = risk.size, risk.weights.element_size()
    tensors, _ = rows(risk.batches[0])
    example = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
    runs = plan.runs if config.train else 0
    batch = training.batch_size
    snapshots = runs * (min(plan.records, training.steps) + EARLY + 3)
    check_size(f"runs = {plan.runs} of {weights} weights", snapshots * weights, numbers)
    check_size(f"batch_size = {batch} of {runs} runs", runs * batch * (example + 8), 1)
    pairs = min(config.eigenpairs or weights, weights)
    what = f"eigenpairs = {pairs}" if config.eigenpairs else f"all {weights} eigenpairs"
    check_size(f"{what} of {weights} weights", pairs * weights, 8, "ask for fewer eigenpairs")
    if pairs == weights:  # curvature, noise, their changes, and room to diagonalise them
        fix = "ask for eigenpairs"
        check_size(f"matrices of all {weights} weights", MATRICES * weights**2, 8, fix)
    products = min(config.lanczos_steps, weights)
    check_size(f"lanczos_steps = {products} of {weights} weights", products * weights, 8)


def measured_risk(
    opened: Opened,
    config: BridgeConfig,
    plan: Plan,
    runtime: Runtime,
    cache: Cache,
    progress: Progress | None = None,
) -> EmpiricalRisk:
    """Make the network's loss on its training data, at a minimum near by if `minimise` is set.

    Parameters
    ----------
    opened, config, plan, runtime
        See `run_bridge`.
    cache : Cache
        Stores the minimum.
    progress : callable, optional
        See `run_bridge`.

    Returns
    -------
    EmpiricalRisk
        The loss that `run_bridge` and `neural.bridge.quick.measure_for_advice` measure.

    Raises
    ------
    NQMError
        If the settings do not fit the network or its data.
    """
    _add_factors(opened, f"{config.select}+{plan.late_phase or ''}")
    risk = risk_of_run(
        opened.run,
        opened.model,
        runtime,
        select=config.select,
        examples=config.examples or None,
        weight_decay=config.weight_decay,
        curvature=config.curvature,
        group=config.batchnorm_group,
    )
    if plan.late_phase is not None:
        try:
            member_mask(risk, plan.late_phase)
        except NQMError as error:
            raise NQMError(f"plan.late_phase: {error}") from None
    for training in config.trainings(1.0):
        training.check_noisy(risk.examples)
        _check_sizes(risk, training, config, plan)
    if not config.minimise:
        return risk
    if progress is not None:
        progress("minimise", 0.0)
    # AdamW's decay depends on its second moments, and these on the minimum.
    rounds = DECOUPLED if config.optimizer == ADAMW else 1
    steps = rounds * config.minimise * (2.0 if config.minimise_lr is None else 1.0)
    told = counted(progress, "minimise", steps)

    def minimised() -> dict[str, Any]:
        minimum = risk
        for _ in range(rounds):
            own = decoupled(minimum, config)
            found = minimise(own, config.minimise, config.minimise_lr, progress=told)
            minimum = risk.at(found.weights)
        return {"weights": minimum.weights.cpu().numpy()}

    decay = {} if config.optimizer != ADAMW else {"decoupled": (config.batch_sizes[0], config.eps)}
    stored = cache.of(risk)(
        "minimised", minimised, iterations=config.minimise, lr=config.minimise_lr, **decay
    )
    return risk.at(torch.from_numpy(stored["weights"]).to(risk.weights))


def _add_factors(opened: Opened, selected: str) -> None:
    """Give a finished run's model its rank-1 factors again, if they are selected.

    The factors of the training were multiplied into the saved weights. New ones, all 1, describe
    the same model.
    """
    where, model = opened.run.model.rank1, opened.model
    terms = [term.strip() for term in selected.split("+")]
    if where is None or "rank1" not in terms:
        return
    if not any(isinstance(module, RankOne) for module in model.modules()):
        add_rank1(model, where)


def held_out_risk(
    risk: EmpiricalRisk, task: Task, examples: int = 0, group: int | None = None
) -> EmpiricalRisk:
    """Make the mean cross-entropy on test examples, as a function of the risk's weights.

    For a text, only windows of full length are used: the mean over windows would give a symbol of a
    shorter one a larger weight.

    Parameters
    ----------
    risk : EmpiricalRisk
        Gives the model and its selected weights.
    task : Task
        Gives the test data.
    examples : int
        Number of test examples; 0 for all.
    group : int, optional
        Number of examples that share BatchNorm statistics.

    Returns
    -------
    EmpiricalRisk
        Test loss in nats, without weight decay.
    """
    batches: list[Batch] = []
    left = examples or None
    for x, y in task.test():
        if batches and y.shape[1:] != batches[0][1].shape[1:]:
            continue
        x, y = x[:left], y[:left]
        batches.append((x.to(risk.weights.dtype) if x.is_floating_point() else x, y))
        left = None if left is None else left - len(x)
        if left == 0:
            break
    return risk.on(batches if group is None else grouped(batches, group))


def _spectrum(
    measured: Measured, config: BridgeConfig, seed: int, progress: Progress | None
) -> pd.DataFrame:
    """Curvature nodes with their count and noise variance, for the figure."""
    import pandas as pd

    risk, local = measured.risk, measured.local
    pairs = local.pairs
    columns = {
        "curvature": pairs.values,
        "count": np.ones(len(pairs.values)),
        "noise_variance": np.diag(local.noise),
    }
    frames = [pd.DataFrame(columns).assign(kind="pair")]
    if not local.complete:
        steps = config.lanczos_steps
        done = counted(progress, "density", float(PROBES * steps))
        nodes = measured.cache.of(risk, seed=seed)(
            "density",
            lambda: vars(
                density(risk, pairs, probes=PROBES, steps=steps, seed=seed, progress=done)
            ),
            local=local.key(),
            lanczos_steps=steps,
        )
        bulk = pd.DataFrame({"curvature": nodes["values"], "count": nodes["counts"]})
        frames.append(bulk.assign(kind="bulk"))
        h, v, _ = local.points()
        rest = slice(len(pairs.values), None)
        noise = pd.DataFrame({"curvature": h[rest], "noise_variance": v[rest]})
        frames.append(noise[noise["noise_variance"] > 0].assign(kind="bulk noise"))
    return pd.concat(frames, ignore_index=True)
