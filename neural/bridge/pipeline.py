"""``nqm neural bridge``: a run or a recipe in, tables and a page of pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neural.bridge.api import (
    Measured,
    compare,
    measure,
    measure_checkpoint,
    predict,
)
from neural.bridge.best_lr import POINTS, best_lrs
from neural.bridge.config import EARLY, BridgeConfig, Plan, Training
from neural.bridge.from_run import risk_of_run
from neural.bridge.timing import cost_table
from neural.bridge.verdict import verdict
from neural.curvature.cache import Cache
from neural.curvature.examples import rows
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.minimise import minimise
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import grouped
from neural.curvature.spectrum import density
from neural.late_phase.members import Batch
from neural.late_phase.select import select
from neural.training.build import make_model
from neural.training.config import RunConfig, describe, run_key
from neural.training.load_run import reopen
from neural.training.recipe import load_recipe
from neural.training.task import Runtime, Task, open_task
from nqm import __version__
from nqm.errors import NQMError
from nqm.keys import differing
from nqm.limits import check_size
from nqm.progress import Progress, counted
from nqm.runs import toml
from nqm.table import Stamp, finished, read_table, replacing, write_table

if TYPE_CHECKING:
    import pandas as pd

#: Tables of a bridge's file and what they describe; any other key is the recipe's.
SECTIONS: dict[str, type] = {"bridge": BridgeConfig, "plan": Plan}
#: Tables of results by the name of their file; the last tells that all are there.
TABLES = ("spectrum", "course", "best_lr", "cost", "bridge")


def load_config(
    path: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[BridgeConfig, Plan]:
    """The settings of a bridge, from a TOML file and overrides.

    Parameters
    ----------
    path : Path, optional
        With tables ``[bridge]`` (see `BridgeConfig`) and ``[plan]`` (see `Plan`); their defaults
        without.
    overrides : sequence of str
        As ``bridge.examples=600`` or ``plan.members=[1,4]``; applied last.

    Returns
    -------
    config : BridgeConfig
    plan : Plan

    Raises
    ------
    NQMError
        Naming the dotted key at fault.
    """
    mapping: dict[str, Any] = {} if path is None else toml.load(path)
    toml.override(mapping, overrides)
    names = {name: tuple(toml.signature(cls)[0]) for name, cls in SECTIONS.items()}
    toml.check_sections(mapping, names)
    toml.known_keys("", mapping, tuple(SECTIONS))
    tables = {name: dict(toml.table_at(name, mapping.get(name, {}))) for name in SECTIONS}
    if "late_phase" in tables["plan"]:  # of which a single one is no member
        tables["plan"].setdefault("members", list(Plan.members[1:]))
    config, plan = (toml.call(kind, tables[name], name) for name, kind in SECTIONS.items())
    return config, plan


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the bridge's own tables, and the others, which are the recipe's.

    Parameters
    ----------
    overrides : sequence of str
        As ``key=value``.

    Returns
    -------
    own, others : list of str
    """
    own = [one for one in overrides if one.partition(".")[0].strip() in SECTIONS]
    return own, [one for one in overrides if one not in own]


@dataclass(frozen=True)
class Opened:
    """A network to look at: its run, model and data."""

    run: RunConfig
    model: nn.Module
    task: Task


def open_target(
    target: str, runtime: Runtime, scale: str = "full", overrides: Sequence[str] = ()
) -> Opened:
    """The single model of a finished run, or of a recipe's first arm with its checkpoint.

    Parameters
    ----------
    target : str
        Folder of a finished run, or a recipe's name or file.
    runtime : Runtime
    scale : str
    overrides : sequence of str
        Of a recipe, e.g. ``model.checkpoint=FILE``.

    Returns
    -------
    Opened

    Raises
    ------
    NQMError
        If there is no such run or recipe, if the recipe has no checkpoint, or if a finished run is
        to be changed.
    """
    if Path(target).is_dir():
        if overrides:
            name = overrides[0].partition("=")[0]
            raise NQMError(
                f"{name} cannot be changed, {target} is a finished run; settings that can be are "
                f"those of {' and '.join(SECTIONS)}, such as bridge.steps"
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
    """All that was found.

    Attributes
    ----------
    local : LocalQuadratic
    table, course : DataFrame
        As `neural.bridge.api.compare` makes them; measured columns are NaN if nothing was
        trained.
    best : DataFrame
        As `neural.bridge.best_lr.best_lrs` makes it.
    cost : DataFrame
        Columns stage, seconds, epochs.
    spectrum : DataFrame
        Columns curvature, count, noise_variance, kind (pair or bulk).
    words : list of str
        The verdict.
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
    progress: Progress | None = None,
) -> Bridge:
    """Measure, predict, train, compare; every stage is kept in `out` and not done again.

    Parameters
    ----------
    opened : Opened
    config : BridgeConfig
    plan : Plan
    runtime : Runtime
    out : Path
        Takes ``bridge.parquet``, ``course.parquet``, ``best_lr.parquet``, ``cost.parquet``,
        ``spectrum.parquet``, ``problem.parquet`` (which `nqm` reads), ``verdict.md`` and, in
        ``kept/``, what each stage found.
    progress : callable, optional
        Told a stage's name and the share of it that is done.

    Returns
    -------
    Bridge

    Raises
    ------
    NQMError
        If the settings do not fit the network or its data, or `out` holds another bridge.
    """
    if config.batchnorm_group is not None and plan.late_phase is not None:
        raise NQMError("late_phase trains in evaluation mode; drop batchnorm_group")
    stamp = _stamp(opened.run, config, plan)
    known = finished(out / "bridge.parquet", stamp)  # refuses another's
    cache = Cache(out / "kept")
    risk = _risk(opened, config, plan, runtime, cache, progress)
    local = measure_checkpoint(risk, config, seed=plan.seed, cache=cache, progress=progress)
    if known is None:
        write_table(out / "problem.parquet", local.problem_table(), stamp.metadata())
        # Which reads the first stage from its file.
        measured = measure(risk, config, seed=plan.seed, cache=cache, progress=progress)
        for name, table in _tables(measured, opened, config, plan, progress).items():
            write_table(out / f"{name}.parquet", table, stamp.metadata())
    found = {name: read_table(out / f"{name}.parquet") for name in TABLES}
    words = verdict(found["bridge"], local, found["best_lr"], found["cost"])
    with replacing(out / "verdict.md") as stream:
        stream.write(("\n".join(f"- {line}" for line in words) + "\n").encode())
    return Bridge(
        local, found["bridge"], found["course"], found["best_lr"], found["cost"],
        found["spectrum"], words,
    )  # fmt: skip


def _stamp(run: RunConfig, config: BridgeConfig, plan: Plan) -> Stamp:
    """What the tables of a bridge carry; its key is made of what differs from the defaults."""
    key = toml.key({"run": run_key(run), "bridge": differing(config), "plan": differing(plan)})
    stated = {"run": describe(run), "bridge": asdict(config), "plan": asdict(plan)}
    return Stamp(key, __version__, stated)


def _tables(
    measured: Measured, opened: Opened, config: BridgeConfig, plan: Plan, progress: Progress | None
) -> dict[str, pd.DataFrame]:
    """All tables by name, in the order in which they are written."""
    risk, gaussians = measured.risk, measured.gaussians
    task = opened.task
    if config.train:
        test = held_out_loss(risk, task, config.test_examples, config.batchnorm_group)
        outcome = compare(measured, plan, test=test, progress=progress)
    else:
        outcome = predict(measured, plan)
    tried = counted(progress, "best learning rates", POINTS + 8.0 * len(plan.members))
    best = best_lrs(outcome.table, gaussians, records=plan.records, progress=tried)
    epoch = len(task.stream) * opened.run.data.batch_size
    share = risk.examples * (config.batchnorm_group or 1) / epoch
    found = {
        "spectrum": _spectrum(measured, config, plan.seed),
        "course": outcome.course,
        "best_lr": best,
        "cost": cost_table(risk, share, measured.cache.log),
        "bridge": outcome.table,
    }
    return {name: found[name] for name in TABLES}


def _check_sizes(risk: EmpiricalRisk, training: Training, config: BridgeConfig, plan: Plan) -> None:
    """Raise NQMError if something would not fit into memory, before anything is measured."""
    weights, numbers = risk.size, risk.weights.element_size()
    tensors, _ = rows(risk.batches[0])
    example = sum(one[0].numel() * one.element_size() for one in tensors)
    runs = plan.runs if config.train else 0
    batch = training.batch_size
    kept = runs * (min(plan.records, training.steps) + EARLY + 3)
    check_size(f"runs = {plan.runs} of {weights} weights", kept * weights, numbers)
    check_size(f"batch_size = {batch} of {runs} runs", runs * batch * (example + 8), 1)
    pairs = min(config.eigenpairs or weights, weights)
    what = f"eigenpairs = {pairs}" if config.eigenpairs else f"all {weights} eigenpairs"
    check_size(f"{what} of {weights} weights", pairs * weights, 8, "ask for fewer eigenpairs")
    products = min(config.lanczos_steps, weights)
    check_size(f"lanczos_steps = {products} of {weights} weights", products * weights, 8)


def _risk(
    opened: Opened,
    config: BridgeConfig,
    plan: Plan,
    runtime: Runtime,
    cache: Cache,
    progress: Progress | None,
) -> EmpiricalRisk:
    """The network's loss on its training data, at the minimum near by if asked for."""
    risk = risk_of_run(
        opened.run, opened.model, runtime, select=config.select, examples=config.examples or None,
        weight_decay=config.weight_decay, curvature=config.curvature,
        group=config.batchnorm_group,
    )  # fmt: skip
    if plan.late_phase is not None:
        try:
            select(opened.model, plan.late_phase)
        except NQMError as error:
            raise NQMError(f"plan.late_phase: {error}") from None
    for training in config.trainings(1.0):
        training.check(risk.examples)
        _check_sizes(risk, training, config, plan)
    if not config.minimise:
        return risk
    if progress is not None:
        progress("minimise", 0.0)

    def minimised() -> dict[str, Any]:
        there = minimise(risk, config.minimise, config.minimise_lr)
        return {"weights": there.weights.cpu().numpy()}

    found = cache.of(risk)(
        "minimised", minimised, iterations=config.minimise, lr=config.minimise_lr
    )
    return risk.at(torch.from_numpy(found["weights"]).to(risk.weights))


def held_out_loss(
    risk: EmpiricalRisk, task: Task, examples: int = 0, group: int | None = None
) -> Callable[[Tensor], float]:
    """Mean cross-entropy on so many test examples (0: all), as a function of the weights.

    Of a text, windows of full length: a symbol of a shorter one would count for more.
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
    return risk.on(batches if group is None else grouped(batches, group)).loss


def _spectrum(measured: Measured, config: BridgeConfig, seed: int) -> pd.DataFrame:
    """Every node of curvature with its count and noise, for the picture."""
    import pandas as pd

    risk, local = measured.risk, measured.local
    pairs = local.pairs
    columns = {
        "curvature": pairs.values,
        "count": np.ones(len(pairs.values)),
        "noise_variance": np.diag(local.noise),
    }
    parts = [pd.DataFrame(columns).assign(kind="pair")]
    if not local.complete:
        steps = config.lanczos_steps
        found = measured.cache.of(risk, seed=seed)(
            "density", lambda: vars(density(risk, pairs, probes=2, steps=steps, seed=seed)),
            local=local.key(), lanczos_steps=steps,
        )  # fmt: skip
        bulk = pd.DataFrame({"curvature": found["values"], "count": found["counts"]})
        parts.append(bulk.assign(kind="bulk"))
        h, v, _ = local.points()
        rest = slice(len(pairs.values), None)
        noise = pd.DataFrame({"curvature": h[rest], "noise_variance": v[rest]})
        parts.append(noise[noise["noise_variance"] > 0].assign(kind="bulk noise"))
    return pd.concat(parts, ignore_index=True)
