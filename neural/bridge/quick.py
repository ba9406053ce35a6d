"""What advice needs, measured in a few passes over the data, without a training.

Advice compares expected losses of trainings from a checkpoint that may be far from a minimum. The
loss of a mean of many runs is that of noise-free descent, to leading order: descent is followed in
few gradients (`neural.bridge.descent_path`), for all learning rates at once, and its losses, those
of averages over time included, are evaluated and not predicted. What noise adds is predicted from
a measurement where the training at the middle of the rates ends: the largest curvatures, the
distribution of noise over curvature, and how noise and curvature change over the weights of that
training. For any other rate the noise is scaled by its trace at the end of that rate's descent;
where the trace differs by more than `FEEDBACK`, everything is measured there anew.

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
from neural.bridge.api import Options, averages_of, gaussian_of, measure_checkpoint
from neural.bridge.comparison import predict_training
from neural.bridge.config import ITERATE, BridgeConfig, Plan, Training
from neural.bridge.descent_path import DescentPath, follow_descent, path_work
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.prediction import Prediction
from neural.bridge.verdict import FEEDBACK
from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.examples import joined
from neural.curvature.lanczos import LanczosNodes, lanczos_nodes
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk, is_cross_entropy
from neural.curvature.spectrum import operator
from nqm.errors import NQMError
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Settings by which advice differs from a bridge. The Gauss-Newton matrix has no negative
#: curvature, along which noise and the drift would grow without bound; descent does not use it.
SETTINGS = (
    "bridge.curvature='ggn'",
    "bridge.eigenpairs=4",
    "bridge.noise_samples=2",
    "bridge.lanczos_steps=8",
    "bridge.displacements=4",
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


def measure_for_advice(
    risk: EmpiricalRisk, config: BridgeConfig, plan: Plan, progress: Progress | None = None
) -> pd.DataFrame:
    """Predict all trainings of a configuration from the path of descent and one measurement.

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

    Returns
    -------
    DataFrame
        The table of `neural.bridge.api.predict`, with ``descent`` the change of the loss itself
        along the path, and ``noise_change_on_path`` the change of the noise from where it was
        measured to where the training's descent ends. Trainings that are not stable are left out:
        there, or on a minibatch that draws the stiffest example twice (lr times its curvature
        above B).

    Raises
    ------
    NQMError
        If the plan has late-phase members, the loss cannot be measured or has no positive
        curvature, or no training is predicted.
    """
    import pandas as pd

    if plan.late_phase is not None:
        raise NQMError(
            "plan.late_phase: advice is for independent runs; leave it out, or measure a bridge"
        )
    risk = preconditioned(risk, config).with_curvature_of(BATCHES)
    start, sharpness = risk.loss(), _sharpness(risk, plan.seed)
    trainings = config.trainings(sharpness)
    longest = max(training.effective_lr for training in trainings) * config.steps
    done = counted(progress, "descent", float(path_work(longest, sharpness)))
    path = follow_descent(risk, longest, sharpness, done)
    highest = config.batch_sizes[0] / _stiffest_example(risk, plan.seed)
    anchors: list[WeightGaussian] = []
    rows: list[dict[str, Any]] = []
    for training in _from_the_middle(trainings):
        if training.effective_lr > highest * training.batch_size / config.batch_sizes[0]:
            continue
        end = risk.at(path.mean(training, training.steps))
        trace = gradient_noise.trace(end)
        near = [g for g in anchors if abs(trace / g.checkpoint.noise_trace - 1.0) <= FEEDBACK]
        if not near:
            near = [_measured(end, config, plan, progress)]
            anchors += near
        scaled = near[-1].scaled_to(training)
        if scaled.stable:
            rows += _rows(risk, path, scaled, plan, start, trace)
    table = pd.DataFrame(rows)
    if rows and is_cross_entropy(risk.example_loss):
        table = table[table["predicted"] > -start]  # a cross-entropy is never negative
    if table.empty:
        raise NQMError(
            "no training is predicted: every rate is unstable, on the mean or on a minibatch with "
            "the stiffest example; lower bridge.lr_times_sharpness, or raise the batch size"
        )
    by = ["lr", "batch_size", "weights", "members"]
    return table.sort_values(by, ascending=[True, True, True, True]).reset_index(drop=True)


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
        k = int(row["members"])
        row |= asdict(own) | {"noise_free": descent, "noise_change_on_path": growth - 1.0}
        row |= {"predicted": own.change(k), "predicted_rise": own.rise(k)}
        row |= {"predicted_gain": own.rise(1) - own.rise(k)}
    return rows
