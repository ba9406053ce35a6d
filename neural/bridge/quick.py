"""What advice needs, measured in a few passes over the data, without a training.

Advice compares expected losses, which differ by factors where the terms of a prediction err by per
cents. It needs the largest curvature, the distributions of noise and slope over curvature, and how
noise and curvature change over the weights of one training; all other trainings scale that one.
Slope and noise are those of all examples, for a minimum of the loss of some examples is none of
the loss of all. Curvature may come from fewer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from neural.bridge.adam import preconditioned
from neural.bridge.api import (
    Options,
    averages_of,
    check_descent,
    descent_fault,
    gaussian_of,
    measure_checkpoint,
)
from neural.bridge.comparison import joined, predict_training
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.gaussian import WeightGaussian
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk, is_cross_entropy
from nqm.errors import NQMError
from nqm.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

#: Settings of `BridgeConfig` by which advice differs from a bridge.
SETTINGS = (
    "bridge.eigenpairs=4",
    "bridge.noise_samples=2",
    "bridge.lanczos_steps=8",
    "bridge.displacements=4",
    "bridge.averaging_displacements=1",
    "bridge.lr_times_sharpness=[0.03125,0.0625,0.125,0.25,0.5,1.0]",
    "bridge.train=false",
)
#: Batches of examples of which the curvature is measured.
BATCHES = 1


def measure_for_advice(
    risk: EmpiricalRisk, config: BridgeConfig, plan: Plan, progress: Progress | None = None
) -> pd.DataFrame:
    """Predict all trainings of a configuration from one measurement in the middle of their rates.

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
        The table of `neural.bridge.api.predict`, with the predicted change of the noise on the
        noise-free path. Trainings whose descent leaves the quadratic are left out.

    Raises
    ------
    NQMError
        If the plan has late-phase members, the loss cannot be measured, or the checkpoint is too
        far from a minimum.
    """
    if plan.late_phase is not None:
        raise NQMError(
            "plan.late_phase: advice is for independent runs; leave it out, or measure a bridge"
        )
    risk = preconditioned(risk, config).with_curvature_of(BATCHES)
    rates = sorted(config.lr_times_sharpness)
    middle = replace(config, lr_times_sharpness=(rates[len(rates) // 2],))
    options = Options(config=middle, seed=plan.seed, cache=Cache(), progress=progress)
    local = measure_checkpoint(risk, **options)
    check_descent(risk, local, config.trainings(local.largest))
    reference, averages = middle.reference(local.largest), averages_of(risk, local, **options)
    if averages is None or averages.drift is None:
        gaussian = gaussian_of(risk, local, reference, None, **options)
    else:  # its force serves again, where a bridge measures one with the averaged curvature
        drift = averages.along_mean_path(averages.drift)
        gaussian = WeightGaussian(reference, local, drift, averages)
    outcomes = []
    for training in config.trainings(local.largest):
        scaled = gaussian.scaled_to(training)
        if any(descent_fault(risk, model, training) for model in (local, scaled.local)):
            continue
        outcome = predict_training(scaled, plan)
        if averages is not None:
            change = averages.descent_scale(training) * averages.descent.trace
            outcome.table["noise_change_on_path"] = change / local.noise_trace
        outcomes.append(outcome)
    table = joined(outcomes).table if outcomes else None
    if table is not None and is_cross_entropy(risk.example_loss):
        table = table[table["predicted"] > -risk.loss()]  # a cross-entropy is never negative
    if table is None or table.empty:
        raise NQMError(
            "the checkpoint is too far from a minimum: with curvature averaged over the weights, "
            "the loss is predicted to fall further than it can; set bridge.minimise = 300"
        )
    return table.reset_index(drop=True)
