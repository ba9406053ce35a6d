"""The bridge in three calls: measure a network, predict trainings, compare with real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import numpy as np

from neural.bridge.adam import check_decay, preconditioned
from neural.bridge.comparison import (
    Outcome,
    compare_training,
    joined,
    measure_training,
    predict_training,
    training_work,
)
from neural.bridge.config import ADAPTIVE, BridgeConfig, Plan, Training
from neural.bridge.control_variate import measure_control_variate
from neural.bridge.drift import descent, passes_at_displacements
from neural.bridge.gaussian import (
    WeightGaussian,
    gradients_and_products,
    measure_averages,
    measure_gaussian,
    rounds_to_come,
    work_of_balance,
)
from neural.bridge.held_out import HeldOut, TestLoss, evaluations, measure_held_out
from neural.bridge.kinks import KINKED
from neural.bridge.measure_smoothing import averaging_work, half_of, measure_descent
from neural.bridge.noise_free_path import NoiseFreePath, farthest, measure_path
from neural.bridge.prediction import expected_excess
from neural.bridge.scatter import largest_stable_lr
from neural.bridge.shared_base import SharedBaseQuadratic, mean_model, member_mask, risk_of_mean
from neural.bridge.smoothing import Smoothing
from neural.curvature.cache import Cache
from neural.curvature.checks import check_data
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import leading_products
from nqm.errors import NQMError
from nqm.progress import Progress, counted, limited

#: If noise-free descent changes the loss by less than this fraction of the excess of the mean of
#: the most runs, it is that on the quadratic; else it is trained.
STILL = 0.01


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
        What is measured each for itself: every K of late-phase members, every batch size of Adam
        if there are several; else empty.
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
        if plan.late_phase is None and self.gaussians[0].members is None:
            return [(part, plan) for part in self.parts or (self,)]
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
        If the loss cannot be measured (`EmpiricalRisk.check`), if epochs are shuffled and a batch
        size does not divide the number of examples, or no learning rate is stable where noise-free
        descent ends (`stable_descent`).
    """
    config, cache = config or BridgeConfig(), cache or Cache()
    for training in config.trainings(1.0):
        training.check_noisy(risk.examples)
    check_plan(config, plan)
    plan = plan or Plan()
    options: Options = {"config": config, "seed": seed, "cache": cache, "progress": progress}
    checkpoint = None if plan.late_phase is None else measure_checkpoint(risk, **options)
    parts = []
    for own_plan, own_options in parts_of(plan, **options):
        own, local = _part(risk, own_plan, **own_options)
        parts.append(Measured(own, local, _gaussians(own, local, plan, **own_options), cache))
    if checkpoint is None:
        risk, checkpoint = parts[0].risk, parts[0].local
        if len(parts) == 1:
            return parts[0]
    every = tuple(gaussian for part in parts for gaussian in part.gaussians)
    return Measured(risk, checkpoint, every, cache, tuple(parts))


def check_plan(config: BridgeConfig, plan: Plan | None) -> None:
    """Check that the plan's trainings are predicted for the configuration's optimizer.

    Parameters
    ----------
    config : BridgeConfig
    plan : Plan, optional

    Raises
    ------
    NQMError
        If late-phase members are to be trained with Adam.
    """
    if config.optimizer in ADAPTIVE and plan is not None and plan.late_phase is not None:
        raise NQMError(
            f"optimizer = '{config.optimizer}' is predicted for independent runs; drop late_phase"
        )


#: How the stages of the noise-free paths end, which begin with their rates.
WITHOUT_NOISE = "without noise"
#: Gives the noise-free path of a training, or None: that on the quadratic is meant.
PathOf = Callable[[Training], NoiseFreePath | None]


class Options(TypedDict):
    """What `measure` passes on to its stages."""

    config: BridgeConfig
    seed: int
    cache: Cache
    progress: Progress | None


def parts_of(plan: Plan, **options: Unpack[Options]) -> list[tuple[Plan, Options]]:
    """Plans and options of what is measured each for itself.

    With late-phase members it is every K. The coordinates of Adam depend on the batch size, and so
    it is every batch size there; else the whole bridge.
    """
    if plan.late_phase is not None:
        return [(replace(plan, members=(k,)), options) for k in plan.members]
    return [(plan, {**options, "config": own}) for own in options["config"].in_own_coordinates()]


def of_members(
    risk: EmpiricalRisk, plan: Plan, members: int, **options: Unpack[Options]
) -> tuple[EmpiricalRisk, SharedBaseQuadratic]:
    """Loss and local model of the mean of late-phase members on a shared base."""
    mask = member_mask(risk, plan.late_phase or "all")
    own = risk_of_mean(risk, mask, members, plan.gamma, plan.member_lr_ratio)
    held = own if bool(mask.all()) else own.rescaled(mask.to(own.weights))
    of_mean, apart = (measure_checkpoint(of, **options) for of in (own, held))
    return own, SharedBaseQuadratic.of(of_mean, apart, members)


def descends(local: LocalQuadratic, trainings: Sequence[Training], plan: Plan) -> bool:
    """Whether noise-free descent changes the loss noticeably (`STILL`), by the quadratic."""
    of_mean = mean_model(local)
    problem = of_mean.problem().replace(initial_mean=0.0)
    for training in trainings:
        if training.lr >= largest_stable_lr(of_mean, training):
            continue
        excess = expected_excess(problem, training, local.examples, [training.steps])[0]
        change = abs(descent(of_mean, training, training.steps))
        if not change <= STILL * excess / max(plan.members):
            return True
    return False


def path_finder(
    risk: EmpiricalRisk, local: LocalQuadratic, plan: Plan, **options: Unpack[Options]
) -> PathOf:
    """Function that trains the noise-free path of a learning rate when it is first asked for.

    There is none if no training of the configuration descends, or if the path diverges.
    """
    descending = descends(local, options["config"].trainings(local.largest), plan)
    found: dict[float, NoiseFreePath | None] = {}

    def path_of(training: Training) -> NoiseFreePath | None:
        if descending and training.lr not in found:
            stage = f"lr = {training.lr:.3g}, {WITHOUT_NOISE}"
            done = counted(options["progress"], stage, float(training.steps))
            path = measure_path(risk, training, plan, cache=options["cache"], progress=done)
            found[training.lr] = path if bool(np.isfinite(path.ends).all()) else None
        return found.get(training.lr)

    return path_of


def stable_descent(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    path_of: PathOf,
    done: Callable[[int], None] | None = None,
    **options: Unpack[Options],
) -> Smoothing:
    """Measure the change along descent for the reference training, if it is stable where this ends.

    Beyond the edge of stability the weights have no Gaussian to average over. The next lower of the
    learning rates that is stable then takes its place.

    Raises
    ------
    NQMError
        If no learning rate is stable there.
    """
    trainings = options["config"].trainings(local.largest)
    reference = options["config"].reference(local.largest)
    longest, sharpest = path_of(farthest(trainings)), local.largest
    for lr in sorted({training.lr for training in trainings}, key=lambda x: (x > reference.lr, -x)):
        training = replace(reference, lr=lr)
        path = path_of(training)
        still = measure_descent(
            risk,
            local,
            training,
            path=path,
            far=longest or path,
            seed=options["seed"],
            cache=options["cache"],
            progress=done,
        )
        there = still.at_descent(training)
        if lr < largest_stable_lr(there, training):
            return still
        sharpest = max(sharpest, there.largest)
    raise NQMError(
        f"no learning rate is stable where noise-free descent ends: from the checkpoint to there "
        f"the largest curvature grows from {local.largest:.3g} to {sharpest:.3g}; lower "
        "bridge.lr_times_sharpness, or set bridge.minimise = 300"
    )


def averages_of(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    path_of: PathOf = lambda training: None,
    **options: Unpack[Options],
) -> Smoothing | None:
    """Curvature and noise averaged over the weights of one training (see `stable_descent`).

    With 0 `averaging_displacements` it is checked that some training is stable, unless none
    descends.
    """
    config = options["config"]
    longest = path_of(farthest(config.trainings(local.largest)))
    if not config.averaging_displacements and longest is None:
        return None
    places = 1 if longest is None else len(longest.knots)
    places += path_of(config.reference(local.largest)) is not longest  # the end of its own descent
    stage, work = "end of descent", float(averaging_work(risk, local, 0, knots=places))
    if config.averaging_displacements:
        stage = "averages"
        work = _work(local, config) + _averaging_work(risk, local, config, places)
    done = counted(options["progress"], stage, work)
    still = stable_descent(risk, local, path_of, done, **options)
    return measure_averages(
        risk,
        still,
        displacements=config.displacements,
        averaging_displacements=config.averaging_displacements,
        lanczos_steps=config.lanczos_steps,
        seed=options["seed"],
        cache=options["cache"],
        progress=done,
    )


def gaussian_of(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    averages: Smoothing | None,
    done: Callable[[int], None] | None = None,
    path: NoiseFreePath | None = None,
    **options: Unpack[Options],
) -> WeightGaussian:
    """Gaussian of the weights of one training; `done` takes counts of gradients and products."""
    config = options["config"]
    return measure_gaussian(
        risk,
        local,
        training,
        averages,
        path=path,
        displacements=config.displacements,
        averaging_displacements=config.averaging_displacements,
        lanczos_steps=config.lanczos_steps,
        seed=options["seed"],
        cache=options["cache"],
        progress=done,
    )


def _work_of_gaussian(
    risk: EmpiricalRisk,
    local: LocalQuadratic,
    training: Training,
    averages: Smoothing | None,
    config: BridgeConfig,
) -> float:
    """Most work of one Gaussian: where noise grows much, everything is measured again."""
    once, rounds = _work(local, config), rounds_to_come(averages, training)
    if averages is not None and averages.kink_fraction() > KINKED:  # they are measured twice
        once += passes_at_displacements(config.displacements, risk.examples)
    if not rounds:
        return once
    balance = work_of_balance(local, config.displacements, config.lanczos_steps)
    again = once + _averaging_work(risk, local, config) + balance
    return once + balance + rounds * again


def _averaging_work(
    risk: EmpiricalRisk, local: LocalQuadratic, config: BridgeConfig, knots: int = 1
) -> int:
    noises = half_of(config.displacements)
    return averaging_work(risk, local, config.averaging_displacements, noises, knots)


def _gaussians(
    risk: EmpiricalRisk, local: LocalQuadratic, plan: Plan, **options: Unpack[Options]
) -> tuple[WeightGaussian, ...]:
    """Gaussian of the weights of every training."""
    config = options["config"]
    trainings = config.trainings(local.largest)
    path_of = path_finder(risk, local, plan, **options)
    paths = [path_of(training) for training in trainings]
    averages = averages_of(risk, local, path_of, **options)
    if options["progress"] is not None:  # with all eigenpairs the next lines take a while
        options["progress"]("third derivatives", 0.0)
    works = [int(_work_of_gaussian(risk, local, each, averages, config)) for each in trainings]
    third = counted(options["progress"], "third derivatives", float(sum(works)))

    def gaussian(training: Training, path: NoiseFreePath | None, work: int) -> WeightGaussian:
        told = limited(third, work)
        found = gaussian_of(risk, local, training, averages, told, path, **options)
        told(work)
        return found

    return tuple(map(gaussian, trainings, paths, works))


def _work(local: LocalQuadratic, config: BridgeConfig) -> float:
    """Work of one measurement of the drift."""
    return float(gradients_and_products(local, config.displacements, config.lanczos_steps))


def measure_checkpoint(
    risk: EmpiricalRisk,
    config: BridgeConfig,
    *,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> LocalQuadratic:
    """Measure slope, curvature and noise at the checkpoint: the first stage of `measure`.

    Those of Adam are measured in its coordinates (`neural.bridge.adam.preconditioned`).

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
        If the loss has no positive curvature, or its gradient no noise: nothing can be predicted.
    """
    if not config.eigenpairs or config.eigenpairs >= risk.size:
        work = float(risk.matrix_work)
    else:
        starts = config.noise_samples + 1
        work = float(leading_products(config.eigenpairs) + config.lanczos_steps * starts)
    local = measure_local(
        risk,
        config.eigenpairs or None,
        noise_samples=config.noise_samples,
        lanczos_steps=config.lanczos_steps,
        seed=seed,
        cache=cache,
        progress=counted(progress, "curvature and noise", work),
    )
    if not local.largest > 0.0:
        raise NQMError(
            f"the largest curvature of the loss is {local.largest:.3g}, and learning rates are "
            "relative to it; give a loss that is curved along the selected weights, e.g. by "
            "weight_decay"
        )
    if not local.noise_trace > 0.0:
        raise NQMError(
            "all examples have the same gradient, so that minibatches make no noise to predict; "
            "check the loss and the data"
        )
    return local


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
    """The test loss in the coordinates of the measured risk, if the model takes its data."""
    risk = measured.risk
    if isinstance(test, EmpiricalRisk):
        check_data(test)
    elif test is not None and not callable(test):
        raise NQMError(
            "test must be an EmpiricalRisk, e.g. risk.on(batches), or a function of the weights; "
            f"got a {type(test).__name__}"
        )
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
            stage = f"train {len(outcomes) + 1} of {count}"
            work = training_work(gaussian.training, its_plan, part.risk, its_test)
            if progress is not None:  # also where the training is in the cache, and only tabulated
                progress(stage, 0.0)
            outcomes.append(
                compare_training(
                    part.risk,
                    gaussian,
                    its_plan,
                    test=its_test,
                    held_out=own,
                    cache=part.cache,
                    progress=counted(progress, stage, work),
                )
            )
    return joined(outcomes)


def store_part(risk: EmpiricalRisk, plan: Plan, part: int, **options: Unpack[Options]) -> None:
    """Measure what all trainings of a part share, so that its results are in the cache.

    Parameters
    ----------
    risk, plan
        See `measure`.
    part : int
        Index in `parts_of`.
    **options
        See `Options`.
    """
    own_plan, options = parts_of(plan, **options)[part]
    own, local = _part(risk, own_plan, **options)
    averages_of(own, local, path_finder(own, local, plan, **options), **options)


def store_training(
    risk: EmpiricalRisk,
    plan: Plan,
    part: int,
    index: int,
    *,
    test: TestLoss | None,
    train: bool,
    **options: Unpack[Options],
) -> None:
    """Do all of one training that `measure`, `predict` and `compare` keep in the cache.

    Parameters
    ----------
    risk, plan
        See `compare`.
    part : int
        See `store_part`, which comes before.
    index : int
        Index of the training in those of the part's configuration.
    test : EmpiricalRisk or callable, optional
        See `compare`.
    train : bool
        Whether to train, or to predict only.
    **options
        See `Options`.
    """
    its_plan, options = parts_of(plan, **options)[part]
    own, local = _part(risk, its_plan, **options)
    config = options["config"]
    training = config.trainings(local.largest)[index]
    path_of = path_finder(own, local, plan, **options)
    path, averages = path_of(training), averages_of(own, local, path_of, **options)
    third = counted(
        options["progress"],
        "third derivatives",
        _work_of_gaussian(own, local, training, averages, config),
    )
    gaussian = gaussian_of(own, local, training, averages, third, path, **options)
    measured = Measured(own, local, (gaussian,), options["cache"])
    its_test = _in_frame(test, measured)
    _held_out(measured, its_plan, its_test, options["progress"])
    if not train:
        return
    measure_control_variate(own, local, training, options["cache"])
    measure_training(
        own,
        training,
        its_plan,
        test=its_test,
        cache=options["cache"],
        progress=counted(
            options["progress"], "train", training_work(training, its_plan, own, its_test)
        ),
    )


def _part(
    risk: EmpiricalRisk, plan: Plan, **options: Unpack[Options]
) -> tuple[EmpiricalRisk, LocalQuadratic]:
    """Loss and local model of independent runs, or of the mean of late-phase members."""
    if plan.late_phase is None:
        risk = preconditioned(risk, options["config"], options["cache"])
        local = measure_checkpoint(risk, **options)
        check_decay(risk, options["config"].trainings(local.largest))
        return risk, local
    (members,) = plan.members
    return of_members(risk, plan, members, **options)
