"""What advice needs, by short runs or by prediction alone.

By default it rests on short runs (`neural.bridge.short_runs`). The rest of this file predicts.

Advice compares expected losses of trainings from a checkpoint that may be far from a minimum. The
loss of a mean of many runs is that of noise-free descent, to leading order: descent is followed in
few gradients (`neural.bridge.descent_path`), for all learning rates at once, and its losses, those
of averages over time included, are evaluated and not predicted. What noise adds is predicted from
a measurement where the training at the middle of the rates ends: the largest curvatures, the
distribution of noise over curvature, and how noise and curvature change over the weights of that
training. For any other rate the noise is scaled by its trace at the end of that rate's descent.

Slope and noise are those of all examples, for a minimum of the loss of some examples is none of
the loss of all. Curvature may come from fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from neural.bridge.adam import preconditioned
from neural.bridge.advise import reliable
from neural.bridge.api import Options, averages_of, gaussian_of, measure_checkpoint
from neural.bridge.comparison import predict_training
from neural.bridge.config import ITERATE, BridgeConfig, Plan, Training
from neural.bridge.descent_path import DescentPath, follow_descent, path_work
from neural.bridge.from_run import DOUBLE
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.prediction import Prediction
from neural.bridge.probe import probe_steps
from neural.bridge.short_runs import (
    DESCENT_ROOM,
    Row,
    ShortRuns,
    changes_of,
    given_up,
    table_of,
)
from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.examples import joined
from neural.curvature.lanczos import LanczosNodes, lanczos_nodes
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.memory import fitting
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import operator
from nqm.errors import NQMError, check_integer
from nqm.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

#: Settings by which advice differs from a bridge. The Gauss-Newton matrix has no negative
#: curvature, along which noise and the drift would grow without bound; descent does not use it.
SETTINGS = (
    "bridge.curvature='ggn'",
    "bridge.eigenpairs=4",
    "bridge.noise_samples=2",
    "bridge.lanczos_steps=8",
    "bridge.displacements=16",
    "bridge.averaging_displacements=1",
    "bridge.lr_times_sharpness=[0.03125,0.0625,0.125,0.25,0.5,1.0]",
    "bridge.train=false",
    "plan.records=1",
)
#: Batches of examples of which the curvature is measured.
BATCHES = 1
#: Hessian products for the largest curvature at the checkpoint, which is the unit of the rates.
PRODUCTS = 12
#: Products for the curvature of one example, which has few directions.
POWERS = 8
#: Short runs at a rate by default, and rates at which they are tried first.
PROBE_RUNS, TRIED_RATES = 4, 3


def measure_for_advice(
    risk: EmpiricalRisk,
    config: BridgeConfig,
    plan: Plan,
    progress: Progress | None = None,
    probe_runs: int = 0,
) -> pd.DataFrame:
    """Losses of all trainings of a configuration, by short runs or by prediction alone.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    config : BridgeConfig
        What is measured, and the trainings.
    plan : Plan
        Numbers of runs, averages over time, and the seed.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.
    probe_runs : int
        Short runs at a rate; 0 to predict only.

    Returns
    -------
    DataFrame
        The table of `neural.bridge.api.predict`, with ``descent`` the change of the loss itself
        along the path. Where descent alone decides, its loss is the only entry. With short runs,
        of those from which a row's noise is scaled it has their number, steps and learning rate,
        and how many left the minimum: ``probe_runs``, ``probe_steps``, ``probe_lr``,
        ``probe_left``. Without, ``noise_change_on_path`` is the change of the noise from where it
        was measured to where the training's descent ends, and trainings are left out that are
        unstable there, or on a minibatch that draws the stiffest example twice (lr times its
        curvature above B).

    Raises
    ------
    NQMError
        If the plan has late-phase members, the number of short runs is wrong, Adam has several
        batch sizes, the loss cannot be measured or has no positive curvature, or no training is
        predicted.
    """
    if plan.late_phase is not None:
        raise NQMError(
            "plan.late_phase: advice is for independent runs; leave it out, or measure a bridge"
        )
    if len(config.in_own_coordinates()) > 1:
        raise NQMError(
            f"batch_sizes must have one entry for advice with optimizer = '{config.optimizer}'; "
            "ask for one batch size at a time"
        )
    check_probe(probe_runs, config)
    risk = _few_calls(preconditioned(risk, config).with_curvature_of(BATCHES))
    start, sharpness = risk.loss(), _sharpness(risk, plan.seed)
    trainings = config.trainings(sharpness)
    rows: list[Row] = []
    if probe_runs:
        short = ShortRuns(risk, plan, sharpness, probe_runs, progress)
        for size in config.batch_sizes:
            rows += short.rows([each for each in trainings if each.batch_size == size])
    else:
        stiff = _stiffest_example(risk, plan.seed)
        calm = [each for each in trainings if each.effective_lr * stiff <= each.batch_size]
        if calm:
            longest = max(training.effective_lr * training.steps for training in calm)
            path = follow_descent(risk, longest, sharpness, progress=progress)
            rows = _predicted(risk, path, calm, config, plan, start, progress)
    table = table_of(risk, rows, start)
    if not np.isfinite(table["predicted"]).any():
        raise NQMError(
            "no training is predicted: every rate is unstable, on the mean or on a minibatch with "
            "the hardest examples; lower bridge.lr_times_sharpness, or raise the batch size"
        )
    by = ["lr", "batch_size", "weights", "members"]
    return table.sort_values(by).reset_index(drop=True)


def check_probe(runs: int, config: BridgeConfig | None = None) -> None:
    """Check the number of short runs at a rate.

    Parameters
    ----------
    runs : int
        See `measure_for_advice`.
    config : BridgeConfig, optional
        Gives the optimizer.

    Raises
    ------
    NQMError
        If it is below 3 and not 0, or the optimizer is another one than SGD.
    """
    check_integer("probe_runs", runs, 0)
    if runs and runs < 3:
        raise NQMError(
            f"probe_runs must be 0 or at least 3, one of them for hard minibatches; got {runs}"
        )
    if runs and config is not None and config.optimizer != "sgd":
        raise NQMError(
            f"probe_runs must be 0 with optimizer = {config.optimizer!r}: short runs are "
            "trained by SGD alone"
        )


def cost_in_runs(examples: int, config: BridgeConfig, probe_runs: int) -> tuple[float, float]:
    """Cost of advice by short runs, by the examples whose gradients it takes.

    Parameters
    ----------
    examples : int
        Number of training examples, N.
    config : BridgeConfig
        The trainings.
    probe_runs : int
        Number of short runs at a rate.

    Returns
    -------
    usual, most : float
        In whole runs of the training to come. Usually short runs are made at three rates, and
        descent is followed to half of the end of the highest one. At most, every lower rate is
        tried, or descent is followed twice as far, with `DESCENT_ROOM`.
    """
    training, given = config.reference(1.0), len(config.lr_times_sharpness)
    longest = max(config.lr_times_sharpness) * config.steps
    usual, most = (
        gradients * examples / (config.steps * training.batch_size)
        for gradients in (path_work(0.5 * longest, 1.0), DESCENT_ROOM * path_work(longest, 1.0))
    )
    rate = probe_runs * probe_steps(training) / config.steps
    first = min(given, TRIED_RATES - 1) + (given > 1)
    return usual + first * rate, most + max(first + 1, given) * rate


def _few_calls(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The risk in one batch if its model is small and memory allows."""
    small = sum(p.numel() for p in risk.model.parameters()) <= DOUBLE
    if small and fitting(risk.example_bytes(), risk.examples) == risk.examples:
        return risk.in_one_batch()
    return risk


def _predicted(
    risk: EmpiricalRisk,
    path: DescentPath,
    trainings: Sequence[Training],
    config: BridgeConfig,
    plan: Plan,
    start: float,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Rows of trainings by theory, with noise measured where the middle one ends.

    Noise only adds to the loss. Where descent alone ends above what another training is predicted
    to reach, the noise is not measured.
    """
    rows: list[dict[str, Any]] = []
    anchor: WeightGaussian | None = None
    best = math.inf
    for training in _from_the_middle(trainings):
        end = risk.at(path.mean(training, training.steps))
        if anchor is not None and (descent := end.loss() - start) > best:
            rows += given_up(training, plan, descent)
            continue
        anchor = anchor or _measured(end, config, plan, progress)
        scaled = anchor.scaled_to(training)
        if scaled.stable:
            trace = gradient_noise.trace(end)
            rows += _rows(risk, path, scaled, plan, start, trace)
            table = table_of(risk, rows, start)
            best = table.loc[reliable(table), "predicted"].min()
    return rows


def _sharpness(risk: EmpiricalRisk, seed: int) -> float:
    """Largest curvature at the checkpoint."""
    start = np.random.default_rng(seed).standard_normal(risk.size)
    nodes = lanczos_nodes(operator(risk), start, min(PRODUCTS, risk.size), np.zeros((risk.size, 0)))
    largest = float(nodes.values[-1])
    if not largest > 0.0:
        raise NQMError(
            f"the largest curvature at the checkpoint is {largest:.3g}, and rates are relative to "
            "it; train further first"
        )
    return largest


def _stiffest_example(risk: EmpiricalRisk, seed: int) -> float:
    """Largest curvature of the example of largest gradient, by the power method.

    A minibatch that draws it m times has m / B of it, which may be many times the mean curvature:
    the runs then diverge within a few steps although the rate is stable on the mean.
    """
    norms = torch.cat([each.norm(dim=1) for each in risk.example_gradients()])
    tensors, make = joined(risk.batches)
    index = norms.argmax().cpu()[None]
    alone = risk.on([make([tensor[index.to(tensor.device)] for tensor in tensors])])
    start = np.random.default_rng([seed, 6]).standard_normal(risk.size)
    product = torch.from_numpy(start).to(risk.weights)
    for _ in range(POWERS):
        product = alone.curvature_product(product / product.norm().clamp_min(1e-300))
    return max(float(product.norm()), 1e-300)


def _from_the_middle(trainings: Sequence[Training]) -> list[Training]:
    """Trainings by the distance of their rate from the middle one."""
    rates = sorted({training.lr for training in trainings})
    middle = math.log(rates[len(rates) // 2])
    return sorted(trainings, key=lambda training: abs(math.log(training.lr) - middle))


def _measured(
    end: EmpiricalRisk, config: BridgeConfig, plan: Plan, progress: Progress | None
) -> WeightGaussian:
    """Gaussian of the weights around the end of a descent, at the middle one of the rates."""
    rates = sorted(config.lr_times_sharpness)
    own = replace(config, lr_times_sharpness=(rates[len(rates) // 2],))
    options = Options(config=own, seed=plan.seed, cache=Cache(), progress=progress)
    local = _at_rest(measure_checkpoint(end, **options))
    reference, averages = own.reference(local.largest), averages_of(end, local, **options)
    if averages is None or averages.drift is None:
        return gaussian_of(end, local, reference, None, **options)
    # Its force serves again, where a bridge measures one with the averaged curvature.
    drift = averages.along_mean_path(averages.drift)
    return WeightGaussian(reference, local, drift, averages)


def _at_rest(local: LocalQuadratic) -> LocalQuadratic:
    """The local model without a slope: descent is followed on the loss itself."""
    size = len(local.pairs.vectors)
    none = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((size, 0)))
    return replace(local, slope=np.zeros_like(local.slope), gradient=none)


def _rows(
    risk: EmpiricalRisk,
    path: DescentPath,
    gaussian: WeightGaussian,
    plan: Plan,
    start: float,
    trace: float,
) -> list[dict[str, Any]]:
    """Rows of one training: predicted noise around evaluated descent."""
    training = gaussian.training
    growth = trace / gaussian.checkpoint.noise_trace
    averages = {average.name: average for average in plan.averages(training)}
    moved = {}
    times: dict[str, int | TimeAverage] = {ITERATE: training.steps, **averages}
    for weights, when in times.items():
        loss, slope = risk.loss_and_gradient(path.mean(training, when))
        push = gaussian.drift.displacement(training, when)
        moved[weights] = loss - start, float(slope.double().cpu().numpy() @ push)
    table = predict_training(gaussian, plan).table
    rows = [{str(name): entry for name, entry in row.items()} for row in table.to_dict("records")]
    for row in rows:
        there = Prediction(*(float(row[term.name]) for term in fields(Prediction)))
        descent, cross = moved[row["weights"]]
        own = replace(
            there,
            descent=descent,
            cross=cross * growth,
            floor=there.floor * growth**2,
            excess=there.excess * growth,
            curvature_change_part=there.curvature_change_part * growth**2,
            nonsmooth_excess=there.nonsmooth_excess * growth,
            log2_slope=there.log2_slope * growth,
        )
        row |= asdict(own) | {"noise_free": descent, "noise_change_on_path": growth - 1.0}
        row |= changes_of(own, int(row["members"]))
    return rows
