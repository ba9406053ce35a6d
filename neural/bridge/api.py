"""The bridge in three calls: measure a network, predict trainings, compare with real ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from neural.bridge.comparison import (
    Outcome,
    compare_training,
    joined,
    minibatches_of,
    predict_training,
)
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.gaussian import (
    WeightGaussian,
    gradients_and_products,
    measure_averages,
    measure_gaussian,
)
from neural.bridge.held_out import HeldOut, TestLoss, evaluations, measure_held_out
from neural.bridge.shared_base import SharedBaseQuadratic, member_mask, risk_of_mean
from neural.bridge.smoothing import averaging_work
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError
from nqm.progress import Progress, counted


@dataclass(frozen=True)
class Measured:
    """Result of `measure`: a network with the local model and a Gaussian for each training.

    Attributes
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    local : LocalQuadratic
        Slope, curvature and noise at the checkpoint.
    gaussians : tuple of WeightGaussian
        Gaussian of the weights, one for each training (and each K of late-phase members).
    parts : tuple of Measured
        Measurements for each K of late-phase members; empty for independent runs.
    cache : Cache
        Stores the results of the measurement, and those of `compare`.
    """

    risk: EmpiricalRisk
    local: LocalQuadratic
    gaussians: tuple[WeightGaussian, ...]
    cache: Cache = field(default_factory=Cache, repr=False)
    parts: tuple[Measured, ...] = field(default=(), repr=False)

    def of(self, plan: Plan) -> list[tuple[Measured, Plan]]:
        """The measurements that a plan needs, each with its part of the plan.

        Parameters
        ----------
        plan : Plan
            What is to be predicted.

        Returns
        -------
        list of (Measured, Plan)

        Raises
        ------
        NQMError
            If a plan of late-phase members was not given to `measure`.
        """
        if plan.late_phase is None and not self.parts:
            return [(self, plan)]
        by_members = {part.gaussians[0].members: part for part in self.parts}
        if plan.late_phase is None or not set(plan.members) <= set(by_members):
            raise NQMError(
                f"this was measured for late-phase members K = {sorted(by_members)}; "  # type: ignore[type-var]
                "give `measure` the same plan"
            )
        return [(by_members[k], replace(plan, members=(k,))) for k in plan.members]


def measure(
    risk: EmpiricalRisk,
    config: BridgeConfig | None = None,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure slope, curvature, noise and third derivatives for the trainings of a configuration.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    config : BridgeConfig, optional
        Settings; its learning rates are multiplied by the largest curvature, which is measured
        first. Fields that say how a risk is made from a run (`select` to `minimise_lr`,
        `test_examples`, `train`) are ignored.
    plan : Plan, optional
        With `late_phase`, its members are measured, in place of independent runs.
    seed : int
        Seed of all random draws.
    cache : Cache, optional
        Stores the result of every stage; nothing is stored by default.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.

    Returns
    -------
    Measured
        Input of `predict` and `compare`.

    Raises
    ------
    NQMError
        If epochs are shuffled and a batch size does not divide the number of examples, or the
        eigenpairs do not converge.
    """
    config, cache = config or BridgeConfig(), cache or Cache()
    for training in config.trainings(1.0):
        training.check(risk.examples)
    local = measure_checkpoint(risk, config, seed=seed, cache=cache, progress=progress)
    if plan is not None and plan.late_phase is not None:
        mask = member_mask(risk, plan.late_phase)
        parts = []
        for k in plan.members:
            own = risk_of_mean(risk, mask, k, plan.gamma, plan.member_lr_ratio)
            held = own if bool(mask.all()) else own.rescaled(mask.to(own.weights))
            of_mean, apart = (
                measure_checkpoint(of, config, seed=seed, cache=cache, progress=progress)
                for of in (own, held)
            )
            shared = SharedBaseQuadratic.of(of_mean, apart, k)
            gaussians = _gaussians(own, shared, config, seed, cache, progress)
            parts.append(Measured(own, shared, gaussians, cache))
        every = tuple(gaussian for part in parts for gaussian in part.gaussians)
        return Measured(risk, local, every, cache, tuple(parts))
    return Measured(risk, local, _gaussians(risk, local, config, seed, cache, progress), cache)


def _gaussians(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    config: BridgeConfig,
    seed: int,
    cache: Cache,
    progress: Progress | None,
) -> tuple[WeightGaussian, ...]:
    """Gaussian of the weights of every training."""
    settings: dict[str, Any] = {
        "displacements": config.displacements,
        "lanczos_steps": config.lanczos_steps,
        "seed": seed,
        "cache": cache,
    }
    work = float(gradients_and_products(local, config.displacements, config.lanczos_steps))
    averages = measure_averages(
        risk,
        local,
        config.reference(local.largest),
        averaging_displacements=config.averaging_displacements,
        progress=counted(
            progress,
            "averages",
            averaging_work(risk, local, config.averaging_displacements) + work,
        ),
        **settings,
    )
    trainings = config.trainings(local.largest)
    third = counted(progress, "third derivatives", work * len(trainings))
    return tuple(
        measure_gaussian(risk, local, training, averages, progress=third, **settings)
        for training in trainings
    )


def measure_checkpoint(
    risk: EmpiricalRisk,
    config: BridgeConfig,
    *,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> LocalQuadratic:
    """Measure slope, curvature and noise at the checkpoint: the first stage of `measure`.

    Parameters
    ----------
    risk, config, seed, cache, progress
        See `measure`.

    Returns
    -------
    LocalQuadratic

    Raises
    ------
    NQMError
        If the eigenpairs do not converge.
    """
    if not config.eigenpairs or config.eigenpairs >= risk.size:
        work = float(risk.matrix_work)
    else:  # ARPACK takes two to four products for a pair
        work = 3.0 * config.eigenpairs + config.lanczos_steps * (config.noise_samples + 1)
    return measure_local(
        risk,
        config.eigenpairs or None,
        noise_samples=config.noise_samples,
        lanczos_steps=config.lanczos_steps,
        seed=seed,
        cache=cache,
        progress=counted(progress, "curvature and noise", work),
    )


def predict(
    measured: Measured,
    plan: Plan | None = None,
    *,
    test: TestLoss | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Predict the losses of every training and average.

    Parameters
    ----------
    measured : Measured
        Result of `measure`.
    plan : Plan, optional
        Group sizes, and which averages of the runs are predicted.
    test : EmpiricalRisk or callable, optional
        Test loss, a risk or a function of a weight vector of shape (p,), which is predicted too.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.

    Returns
    -------
    Outcome
        The columns of `compare`; the measured ones are NaN.
    """
    plan = plan or Plan()
    outcomes = []
    for part, its_plan in measured.of(plan):
        held_out = _held_out(part, its_plan, _in_frame(test, part), progress)
        outcomes += [
            predict_training(gaussian, its_plan, own)
            for gaussian, own in zip(part.gaussians, held_out, strict=True)
        ]
    return joined(outcomes)


def _in_frame(test: TestLoss | None, measured: Measured) -> TestLoss | None:
    """The test loss in the coordinates of the measured risk."""
    risk = measured.risk
    if test is None or risk.frame is None:
        return test
    if isinstance(test, EmpiricalRisk):
        moved = copy.copy(test)
        moved.frame, moved.weights = risk.frame, risk.weights
        return moved
    return lambda w: test(risk.model_weights(w))


def _held_out(
    measured: Measured,
    plan: Plan,
    test: TestLoss | None,
    progress: Progress | None,
) -> list[dict[str, HeldOut]]:
    """The test loss over the Gaussian of every training; empty without a test loss."""
    gaussians = measured.gaussians
    if test is None:
        return [{} for _ in gaussians]
    work = sum(evaluations(gaussian, plan) for gaussian in gaussians)
    told = counted(progress, "test loss", float(work))
    return [
        measure_held_out(test, measured.risk, gaussian, plan, cache=measured.cache, progress=told)
        for gaussian in gaussians
    ]


def compare(
    measured: Measured,
    plan: Plan | None = None,
    *,
    test: TestLoss | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Train from the checkpoint, and tabulate measured and predicted losses.

    Parameters
    ----------
    measured : Measured
        Result of `measure`.
    plan : Plan, optional
        Number of runs, group sizes, and which averages of the runs are evaluated.
    test : EmpiricalRisk or callable, optional
        Test loss, a risk or a function of a weight vector of shape (p,): predicted, and measured
        after the last step.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.

    Returns
    -------
    Outcome
        Columns: see `neural.bridge.comparison.compare_training`.
    """
    plan = plan or Plan()
    count = len(measured.gaussians)
    outcomes: list[Outcome] = []
    for part, its_plan in measured.of(plan):
        its_test = _in_frame(test, part)
        held_out = _held_out(part, its_plan, its_test, progress)
        for gaussian, own in zip(part.gaussians, held_out, strict=True):
            total = float(gaussian.training.steps * minibatches_of(its_plan))
            stage = f"train {len(outcomes) + 1} of {count}"
            outcomes.append(
                compare_training(
                    part.risk,
                    gaussian,
                    its_plan,
                    test=its_test,
                    held_out=own,
                    cache=part.cache,
                    progress=counted(progress, stage, total),
                    path_progress=counted(
                        progress, f"{stage}, without noise", float(gaussian.training.steps)
                    ),
                )
            )
    return joined(outcomes)
