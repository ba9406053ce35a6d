"""``nqm neural bridge``: a run or a recipe in, tables and a page of pictures out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neural.batch_landscape import grouped
from neural.best_rate import POINTS, View, best_rates
from neural.bridge import EARLY, Plan, compare, foresee
from neural.chains import Training
from neural.config import RunConfig, describe
from neural.cost import Cost
from neural.curvature import CURVATURES, Landscape
from neural.drift import measure_drift
from neural.examples import rows
from neural.kinks import find_kinks
from neural.landscapes import landscape_of, settle
from neural.late_phase import Batch
from neural.local_model import Kept, LocalModel, fingerprint, measure
from neural.making import make_model
from neural.prediction import edge
from neural.recipe import load_recipe
from neural.reopen import reopen
from neural.smoothing import Smoothing, measure_smoothing
from neural.spectrum import density
from neural.task import Place, Task, open_task
from neural.verdict import verdict
from nqm import __version__, declare
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.limits import check_size
from nqm.table import finished, read_table, replacing, write_table

if TYPE_CHECKING:
    import pandas as pd

#: Learning rates by default, times the largest curvature: eightfold.
RATES = (0.0625, 0.125, 0.25, 0.5)
#: No whole number of a bridge is more: counts stay exact, and indices fit.
LARGEST = 10**12


@dataclass(frozen=True)
class BridgeConfig:
    """What is measured, predicted and trained.

    Attributes
    ----------
    select : str
        Weights of the landscape; the others stay as they are.
    examples : int, optional
        Of the training set; all by default.
    weight_decay : float, optional
        That of the run by default.
    curvature : {"hessian", "ggn"}
        All of it, or the Gauss-Newton part: never negative, and cheap for a few weights of many.
    group : int, optional
        Examples that BatchNorm sees together, as in training (`neural.batch_landscape`); batch
        sizes then count such groups. Evaluation mode by default.
    settle : int
        Iterations towards the minimum near by, before anything is measured.
    settle_lr : float, optional
        By gradient descent at this rate, not by L-BFGS (`neural.landscapes.settle`).
    pairs : int, optional
        Stiffest directions one by one; None for all of few weights.
    draws, products : int
        Draws of the noise, and Hessian products for each (`neural.local_model.measure`).
    samples : int
        Random displacements for the drift (`neural.drift.measure_drift`) and for kinks
        (`neural.kinks`) at the scatter of each training.
    smooth : int
        Random displacements for averages over the scatter (`neural.smoothing`); 0 for none, and
        for no kinks.
    rates : tuple of float
        Learning rates, times the largest curvature. The first batch size goes with each.
    batch_sizes : tuple of int
        The last but one of the rates goes with each.
    steps : int
    momentum : float
    sampling : {"with replacement", "shuffled"}
    train : bool
        False to predict only.
    test_examples : int, optional
        Of the test set, whose loss is looked at after training; all by default.
    """

    select: str = "all"
    examples: int | None = 2000
    weight_decay: float | None = None
    curvature: str = "hessian"
    group: int | None = None
    settle: int = 0
    settle_lr: float | None = None
    pairs: int | None = 50
    draws: int = 6
    products: int = 30
    samples: int = 32
    smooth: int = 2
    rates: tuple[float, ...] = RATES
    batch_sizes: tuple[int, ...] = (32,)
    steps: int = 1000
    momentum: float = 0.0
    sampling: str = "with replacement"
    train: bool = True
    test_examples: int | None = 2000

    def __post_init__(self) -> None:
        check_word("curvature", self.curvature, CURVATURES)
        least = {"examples": 2, "group": 2, "settle": 0, "pairs": 1, "draws": 1, "products": 1}
        least |= {"samples": 2, "smooth": 0, "test_examples": 1}
        for name, minimum in (least | {"steps": 1}).items():
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum)
                check_number(name, getattr(self, name), high=LARGEST)
        if self.settle_lr is not None:
            check_number("settle_lr", self.settle_lr, low=0.0, closed_low=False)
        check_number("momentum", self.momentum, low=0.0, high=1.0, closed_high=False)
        stable = 2.0 * (1.0 + self.momentum) / (1.0 - self.momentum)
        for rate in self.rates:
            if not 0.0 < rate < stable:
                raise NQMError(
                    f"rates must lie in (0, {stable:.4g}), below the edge of stability; got {rate}"
                )
        self.trainings(1.0)  # which checks what they have

    def reference(self, largest: float) -> float:
        """The effective learning rate at which what is measured once is measured."""
        return self.rates[max(len(self.rates) - 2, 0)] / largest

    def trainings(self, largest: float) -> list[Training]:
        """Every rate at the first batch size, every batch size at one rate."""
        lrs = [rate * (1.0 - self.momentum) / largest for rate in self.rates]
        middle = lrs[max(len(lrs) - 2, 0)]
        cells = [(lr, self.batch_sizes[0]) for lr in lrs]
        cells += [(middle, size) for size in self.batch_sizes[1:]]
        return [
            Training(float(lr), size, self.steps, self.momentum, self.sampling)
            for lr, size in cells
        ]


@dataclass(frozen=True)
class Opened:
    """A network to look at: its run, model and data."""

    run: RunConfig
    model: nn.Module
    task: Task


def open_target(
    target: str, place: Place, scale: str = "full", overrides: Sequence[str] = ()
) -> Opened:
    """The single model of a finished run, or of a recipe's first arm with its checkpoint.

    Parameters
    ----------
    target : str
        Folder of a finished run, or a recipe's name or file.
    place : Place
    scale : str
    overrides : sequence of str
        Of a recipe, e.g. ``model.checkpoint=FILE``.
    """
    if Path(target).is_dir():
        opened = reopen(target, place)
        return Opened(opened.run, opened.model, opened.task)
    recipe = load_recipe(target, scale, overrides)
    run = next(iter(recipe.arms.values()))
    if run.model.checkpoint is None:
        raise NQMError(
            f"recipe {target} starts from random weights; give the folder of a finished run, or "
            "--set model.checkpoint=FILE"
        )
    task = open_task(run, place)
    return Opened(run, make_model(run.model, task, root=place.root), task)


@dataclass(frozen=True)
class Bridge:
    """All that was found.

    Attributes
    ----------
    local : LocalModel
    table, course : DataFrame
        `neural.bridge.compare` of every training; measured columns are NaN if none was trained.
    best : DataFrame
        `neural.best_rate.best_rates`.
    cost : DataFrame
        Columns stage, seconds, epochs.
    spectrum : DataFrame
        Columns curvature, count, noise_variance, kind (pair or bulk).
    words : list of str
        The verdict.
    """

    local: LocalModel
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
    place: Place,
    out: Path,
    *,
    told: Callable[[str, float], None] | None = None,
) -> Bridge:
    """Measure, predict, train, compare; every stage is kept in `out` and not done again.

    Parameters
    ----------
    opened : Opened
    config : BridgeConfig
    plan : Plan
    place : Place
    out : Path
        Takes ``bridge.parquet``, ``course.parquet``, ``best_rate.parquet``, ``cost.parquet``,
        ``spectrum.parquet``, ``problem.parquet`` (which `nqm` reads), ``verdict.md`` and, in
        ``kept/``, what each stage found.
    told : callable, optional
        Told a stage's name and the share of it that is done.
    """
    stated = {"run": describe(opened.run), "bridge": asdict(config), "plan": asdict(plan)}
    if config.group is not None and plan.late_phase is not None:
        raise NQMError("late_phase trains in evaluation mode; drop group")
    key = declare.key(stated)
    stamp = {"key": key, "version": __version__, "configuration": stated}
    kept = out / "kept"
    report = told or (lambda stage, share: None)
    table = finished(out / "bridge.parquet", key, __version__)  # refuses another's
    landscape = landscape_of(
        opened.run, opened.model, place, select=config.select, examples=config.examples,
        weight_decay=config.weight_decay, curvature=config.curvature, group=config.group,
    )  # fmt: skip
    for training in config.trainings(1.0):
        training.check(landscape.examples)
        _check_sizes(landscape, training, config, plan)
    landscape = _settled(landscape, config, kept, report)
    epoch = len(opened.task.stream) * opened.run.data.batch_size
    share = landscape.examples * (config.group or 1) / epoch
    cost = Cost(landscape, share, kept, key)
    with cost("curvature and noise"):
        local = _measure(landscape, config, kept, plan.seed, report)
    local.problem_table().pipe(lambda t: write_table(out / "problem.parquet", t, stamp))
    spectrum = _spectrum(landscape, local, config, kept, plan.seed)
    write_table(out / "spectrum.parquet", spectrum, stamp)
    if table is None:
        found = _compare_all(landscape, local, opened.task, config, plan, kept, cost, report)
        for name, one in found.items():
            write_table(out / f"{name}.parquet", one, stamp)
        table = found["bridge"]
    course, best, spent = (
        read_table(out / f"{name}.parquet") for name in ("course", "best_rate", "cost")
    )
    words = verdict(table, local, best, spent)
    with replacing(out / "verdict.md") as stream:
        stream.write(("\n".join(f"- {line}" for line in words) + "\n").encode())
    return Bridge(local, table, course, best, spent, spectrum, words)


def _check_sizes(
    landscape: Landscape, training: Training, config: BridgeConfig, plan: Plan
) -> None:
    """Raise NQMError if something would not fit into memory, before anything is measured."""
    weights, numbers = landscape.size, landscape.weights.element_size()
    tensors, _ = rows(landscape.batches[0])
    example = sum(one[0].numel() * one.element_size() for one in tensors)
    chains = plan.chains if config.train else 0
    batch = training.batch_size
    kept = chains * (min(plan.looks, training.steps) + EARLY + 3)
    check_size(f"chains = {plan.chains} of {weights} weights", kept * weights, numbers)
    check_size(f"batch_size = {batch} of {chains} chains", chains * batch * (example + 8), 1)
    pairs = weights if config.pairs is None else min(config.pairs, weights)
    what = f"all {weights} pairs" if config.pairs is None else f"pairs = {pairs}"
    check_size(f"{what} of {weights} weights", pairs * weights, 8, "ask for fewer pairs")
    products = min(config.products, weights)
    check_size(f"products = {products} of {weights} weights", products * weights, 8)


def _settled(
    landscape: Landscape,
    config: BridgeConfig,
    kept: Path,
    report: Callable[[str, float], None],
) -> Landscape:
    """The landscape at the minimum near by, if asked for."""
    if not config.settle:
        return landscape
    report("settle", 0.0)
    found = Kept(kept, fingerprint(landscape))(
        f"settled{config.settle}-{config.settle_lr}",
        lambda: _weights(settle(landscape, config.settle, config.settle_lr)),
    )
    return landscape.at(torch.from_numpy(found["weights"]).to(landscape.weights))


def _compare_all(
    landscape: Landscape,
    local: LocalModel,
    task: Task,
    config: BridgeConfig,
    plan: Plan,
    kept: Path,
    cost: Cost,
    report: Callable[[str, float], None],
) -> dict[str, pd.DataFrame]:
    """Tables of all trainings by name; the last, `bridge`, tells that all are there."""
    import pandas as pd

    outcomes, views = [], []
    trainings = config.trainings(local.largest)
    with cost("averages over the scatter"):
        smoothing = _smoothing(landscape, local, config, kept, plan.seed, report)
    test = None
    if config.train:
        test = held_out_loss(landscape, task, config.test_examples, config.group)
    for i, training in enumerate(trainings):
        with cost("third derivatives"):
            view = _view(landscape, local, smoothing, training, config, kept, plan.seed, report)
        views.append(view)
        if not config.train:
            outcomes.append(foresee(local, view.drift, training, plan, view.smoothing))
            continue
        total = training.steps * plan.chains
        progress = _progress(report, f"train {i + 1} of {len(trainings)}", total)
        with cost("training"):
            both = compare(
                landscape, local, view.drift, training, plan, smoothing=view.smoothing, test=test,
                folder=kept, progress=progress,
            )  # fmt: skip
        outcomes.append(both)
    table, course = (
        pd.concat([getattr(one, name) for one in outcomes], ignore_index=True)
        for name in ("table", "course")
    )
    report("best rates", 0.0)
    progress = _progress(report, "best rates", POINTS + 8.0 * len(plan.members))
    best = best_rates(table, local, views, count=plan.looks, progress=progress)
    return {"course": course, "best_rate": best, "cost": cost.table(), "bridge": table}


def _measure(
    landscape: Landscape,
    config: BridgeConfig,
    kept: Path,
    seed: int,
    report: Callable[[str, float], None],
) -> LocalModel:
    # ARPACK takes two to four products for a pair.
    expected = 3.0 * (config.pairs or 0) + config.products * (config.draws + 1)
    return measure(
        landscape, config.pairs, draws=config.draws, products=config.products, seed=seed,
        folder=kept, progress=_progress(report, "curvature and noise", expected),
    )  # fmt: skip


def _smoothing(
    landscape: Landscape,
    local: LocalModel,
    config: BridgeConfig,
    kept: Path,
    seed: int,
    report: Callable[[str, float], None],
) -> Smoothing | None:
    if not config.smooth:
        return None
    rate, size = config.reference(local.largest), config.batch_sizes[0]
    ends = 2.0 * config.smooth + 4.0 * config.samples
    expected = ends + (0 if local.complete else 2 * config.products)
    progress = _progress(report, "averages over the scatter", expected)
    drift = measure_drift(
        landscape, local, rate, size, config.steps, momentum=config.momentum,
        samples=config.samples, products=config.products, seed=seed, folder=kept, progress=progress,
    )  # fmt: skip
    smoothing = measure_smoothing(
        landscape, local, rate, size, config.steps, drift=drift, momentum=config.momentum,
        samples=config.smooth, seed=seed, folder=kept, progress=progress,
    )  # fmt: skip
    return replace(smoothing, kinks=find_kinks(drift, smoothing))


def _view(
    landscape: Landscape,
    local: LocalModel,
    smoothing: Smoothing | None,
    training: Training,
    config: BridgeConfig,
    kept: Path,
    seed: int,
    report: Callable[[str, float], None],
) -> View:
    """Drift and kinks at a training's own scatter."""
    rate, size = training.lr / (1.0 - training.momentum), training.batch_size
    expected = 4.0 * config.samples + (0 if local.complete else 2 * config.products)
    seen = local if smoothing is None else smoothing.at(rate, size)
    if training.lr >= edge(seen, training):  # nothing will be predicted
        seen = local
    drift = measure_drift(
        landscape, seen, rate, size, training.steps, momentum=training.momentum,
        samples=config.samples, products=config.products, seed=seed, folder=kept,
        progress=_progress(report, "third derivatives", expected),
    )  # fmt: skip
    if smoothing is None:
        return View(drift)
    smoothing = replace(smoothing, kinks=find_kinks(drift, smoothing))
    return View(smoothing.hold(drift), smoothing)


def _progress(
    report: Callable[[str, float], None], stage: str, expected: float
) -> Callable[[int], None]:
    """Counts what is done of a stage, and tells its share."""
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        report(stage, min(done / expected, 0.99))

    return progress


def _weights(landscape: Landscape) -> dict[str, Any]:
    return {"weights": landscape.weights.cpu().numpy()}


def held_out_loss(
    landscape: Landscape, task: Task, examples: int | None, group: int | None = None
) -> Callable[[Tensor], float]:
    """Mean cross-entropy on so much of the test set, as a function of the landscape's weights.

    Of a text, windows of full length: a symbol of a shorter one would count for more.
    """
    batches: list[Batch] = []
    left = examples
    for x, y in task.test():
        if batches and y.shape[1:] != batches[0][1].shape[1:]:
            continue
        x, y = x[:left], y[:left]
        batches.append((x.to(landscape.weights.dtype) if x.is_floating_point() else x, y))
        left = None if left is None else left - len(x)
        if left == 0:
            break
    return landscape.on(batches if group is None else grouped(batches, group)).loss


def _spectrum(
    landscape: Landscape, local: LocalModel, config: BridgeConfig, kept: Path, seed: int
) -> pd.DataFrame:
    """Every node of curvature with its count and noise, for the picture."""
    import pandas as pd

    pairs = local.pairs
    columns = {
        "curvature": pairs.values,
        "count": np.ones(len(pairs.values)),
        "noise_variance": np.diag(local.noise),
    }
    parts = [pd.DataFrame(columns).assign(kind="pair")]
    if not local.complete:
        stage = Kept(kept, f"{fingerprint(landscape)}-{seed}")
        found = stage(
            f"density-{len(pairs.values)}",
            lambda: vars(density(landscape, pairs, probes=2, steps=config.products, seed=seed)),
        )
        bulk = pd.DataFrame({"curvature": found["values"], "count": found["counts"]})
        parts.append(bulk.assign(kind="bulk"))
        h, v, _ = local.points()
        rest = slice(len(pairs.values), None)
        noise = pd.DataFrame({"curvature": h[rest], "noise_variance": v[rest]})
        parts.append(noise[noise["noise_variance"] > 0].assign(kind="bulk noise"))
    return pd.concat(parts, ignore_index=True)
