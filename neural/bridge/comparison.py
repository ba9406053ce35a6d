"""Predicted and measured losses of a training, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import Plan, Training
from neural.bridge.control_variate import ControlVariate, measure_control_variate
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.iterate_averages import Running, TimeAverage
from neural.bridge.prediction import predict_each, predict_loss
from neural.bridge.sgd_chains import group_losses, noise_free, train_late_phase, train_runs
from neural.curvature.cache import Cache
from neural.curvature.gradient_noise import trace
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
#: The noise-free path is trained, not predicted, where descent is more than this of the excess.
STILL = 0.01
#: The weights themselves, beside averages of them over time.
ITERATE = "iterate"
MEASURED = ["measured", "error", "gain", "gain_error", "plain", "plain_error", "test"]
COLUMNS = [
    "way", "lr", "momentum", "batch_size", "sampling", "steps", "members", "weights", "predicted",
    "measured", "error", "predicted_rise", "measured_rise", "ratio", "ratio_error", "descent",
    "predicted_gain", "gain", "gain_error", "noise_free", "cross", "floor", "excess",
    "curvature_change_part", "effective_runs", "nonsmooth_excess", "log2_slope", "noise_growth",
    "kink_fraction", "noise_change_on_path", "plain", "plain_error", "test",
]  # fmt: skip
COURSE = [
    "way", "lr", "momentum", "batch_size", "sampling", "steps", "members", "step", "predicted",
    "measured", "error",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Losses of a training, measured or predicted or both.

    Attributes
    ----------
    table : DataFrame
        A row for every K and kind of weights: the iterate, with its loss averaged over the recorded
        steps of the second half, and averages over time, evaluated after the last step.
    course : DataFrame
        A row for every K and recorded step of the iterate; steps of the first half are recorded for
        the smallest and the largest K only.
    """

    table: pd.DataFrame
    course: pd.DataFrame


def measure_training(
    risk: EmpiricalRisk,
    training: Training,
    plan: Plan,
    *,
    control: ControlVariate | None = None,
    test: Callable[[Tensor], float] | None = None,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Train from the checkpoint, average the weights, and measure their losses.

    Parameters
    ----------
    risk : EmpiricalRisk
    training : Training
    plan : Plan
    control : ControlVariate, optional
        Control variate of this training, subtracted from the measured losses; the table has the
        values with and without it.
    test : callable, optional
        Test loss of a weight vector; evaluated once, after the last step. Its value at the
        checkpoint is part of the cache key.
    cache : Cache, optional
        Stores the result.
    progress : callable, optional
        Called with the number of minibatches done.

    Returns
    -------
    Outcome
        Columns members, weights (members, step), measured, error: the change of the training loss
        from the checkpoint's, averaged over groups (and recorded steps), and its standard error
        over groups. The table also has gain, gain_error: the mean loss of a group's single runs
        less the loss of their mean weights; plain, plain_error: the measured change without the
        control variate; and test, the mean test loss.
    """
    at, late = training.course_steps(plan.records), training.record_steps(plan.records)
    ends = {min(plan.members), max(plan.members)}
    start = risk.loss()

    def losses(k: int, snapshots: dict[str, list[Tensor]], groups_of: int) -> dict[str, Any]:
        found = {}
        for weights, held in snapshots.items():
            part = held if weights != ITERATE or k in ends else held[-len(late) :]
            found[f"{weights}{k}"] = group_losses(risk.loss, part, groups_of) - start
            if test is not None:
                found[f"test-{weights}{k}"] = group_losses(test, held[-1:], groups_of)
        return found

    def independent() -> dict[str, Any]:
        averages = Running(plan.averages(training), risk.weights.repeat(plan.runs, 1))
        held = train_runs(
            risk, training, plan.runs, at, seed=plan.seed, seen=averages, progress=progress
        )
        snapshots = {ITERATE: [w for _, w in held]}
        snapshots |= {name: [mean] for name, mean in averages.values.items()}
        found = [losses(k, snapshots, k) for k in plan.members]
        return {name: array for one in found for name, array in one.items()}

    def run(k: int, seed: int) -> Iterator[tuple[int, Tensor]]:
        select = plan.late_phase or "all"
        return train_late_phase(risk, training, k, select, at, seed=seed, progress=progress)

    def members() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k in plan.members:
            runs = [torch.stack([w for _, w in run(k, seed)]) for seed in _runs(plan, k)]
            found |= losses(k, {ITERATE: list(torch.stack(runs, 1))}, 1)
        return found

    known = (cache or Cache()).of(risk)(
        "training",
        independent if plan.late_phase is None else members,
        training=training,
        plan=plan,
        test=None if test is None else f"{test(risk.weights):.6g}",
    )
    return _tabulate(known, training, plan, control)


def _tabulate(
    known: dict[str, Any], training: Training, plan: Plan, control: ControlVariate | None
) -> Outcome:
    """Means and standard errors over groups of runs (or over late-phase runs)."""
    import pandas as pd

    at, count = training.course_steps(plan.records), len(training.record_steps(plan.records))
    averages = plan.averages(training)
    columns = {ITERATE: slice(0, len(at))}
    columns |= {one.name: slice(i, i + 1) for i, one in enumerate(averages, len(at))}
    off = {} if control is None else _controls(control, plan, [*at, *averages])
    rows, course = [], []
    for weights, part in columns.items():
        held = {k: known[f"{weights}{k}"] for k in plan.members}
        if off:
            held = {k: plain - off[k][:, part][:, -plain.shape[1] :] for k, plain in held.items()}
        for k, found in held.items():
            plain = known[f"{weights}{k}"]
            scores = known.get(f"test-{weights}{k}")
            rows.append(
                (
                    k,
                    weights,
                    *_mean(found[:, -count:].mean(1)),
                    *_gain(held.get(1), found, k, count),
                    *_mean(plain[:, -count:].mean(1)),
                    np.nan if scores is None else float(scores.mean()),
                )
            )
            if weights == ITERATE:
                steps = at[-found.shape[1] :]
                course += [(k, t, *_mean(one)) for t, one in zip(steps, found.T, strict=True)]
    return Outcome(
        pd.DataFrame(rows, columns=["members", "weights", *MEASURED]),
        pd.DataFrame(course, columns=["members", "step", "measured", "error"]),
    )


def _keys(plan: Plan, members: int) -> tuple[tuple[int, int], ...]:
    """Seeds of the minibatches of every run, or of every member of every late-phase run."""
    if plan.late_phase is None:
        return tuple((plan.seed, run) for run in range(plan.runs))
    return tuple((seed, k) for seed in _runs(plan, members) for k in range(members))


def _runs(plan: Plan, members: int) -> list[int]:
    """Seeds of the late-phase runs with K members; at least two runs."""
    return [1000 * plan.seed + group for group in range(max(plan.runs // members, 2))]


def _controls(
    control: ControlVariate, plan: Plan, when: list[int | TimeAverage]
) -> dict[int, FloatArray]:
    """The control variate of every K, shape (groups, times)."""
    keys = {k: _keys(plan, k) for k in plan.members}
    z = {one: control.responses(one, when) for one in set(keys.values())}
    return {k: control.of(z[one], when, k) for k, one in keys.items()}


def _gain(
    single: FloatArray | None, mean: FloatArray, members: int, late: int
) -> tuple[float, float]:
    """Loss of a group's single runs less that of their mean; NaN for late-phase members."""
    if single is None or members == 1:
        return np.nan, np.nan
    own = single[: len(mean) * members].reshape(len(mean), members, -1).mean(1)
    return _mean((own[:, -late:] - mean[:, -late:]).mean(1))


def _mean(each: FloatArray) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is NaN."""
    error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan
    return float(each.mean()), error


def predict_training(gaussian: WeightGaussian, plan: Plan) -> Outcome:
    """Predicted losses of one training, in the form of `compare_training`.

    Parameters
    ----------
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    plan : Plan

    Returns
    -------
    Outcome
        The measured columns are NaN.
    """
    import pandas as pd

    training = gaussian.training
    seen = {ITERATE: predict_loss(gaussian, training.record_steps(plan.records))}
    for average in plan.averages(training):
        seen[average.name] = predict_loss(gaussian, [average])
    stated = {"way": plan.way} | asdict(training)
    trust = {"noise_growth": gaussian.noise_growth, "kink_fraction": gaussian.kink_fraction}
    rows = [
        stated
        | asdict(found)
        | {"members": k, "weights": weights, "noise_free": found.descent}
        | {"predicted": found.change(k), "predicted_rise": found.rise(k)}
        | {"predicted_gain": found.rise(1) - found.rise(k)}
        | trust
        for weights, found in seen.items()
        for k in plan.members
    ]
    at = training.course_steps(plan.records)
    each = predict_each(gaussian, at)
    course = [
        stated | {"members": k, "step": step, "predicted": found.change(k)}
        for k in plan.members
        for step, found in zip(at, each, strict=True)
    ]
    return Outcome(
        pd.DataFrame(rows).reindex(columns=COLUMNS), pd.DataFrame(course).reindex(columns=COURSE)
    )


def compare_training(
    risk: EmpiricalRisk,
    gaussian: WeightGaussian,
    plan: Plan,
    *,
    test: Callable[[Tensor], float] | None = None,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Predict and measure one training.

    Parameters
    ----------
    risk : EmpiricalRisk
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    plan : Plan
    test : callable, optional
        Test loss of a weight vector.
    cache : Cache, optional
        Stores the measured losses.
    progress : callable, optional
        Called with the number of minibatches done.

    Returns
    -------
    Outcome
        Columns of the table: the training; members, weights; predicted and measured change of the
        loss from the checkpoint's, and its standard error; the part due to noise, predicted and
        measured (``predicted_rise``, ``measured_rise``), and their ratio; the loss of a single run
        less that of the mean (``predicted_gain``, ``gain``); the terms of the prediction
        (`Prediction`); the relative increase of the noise by scatter (``noise_growth``); the
        curvature added by kinks (``kink_fraction``); the relative change of the noise at the end of
        the noise-free path (``noise_change_on_path``, NaN where that path is not trained); the test
        loss. The course has the predicted and measured change at every recorded step.
    """
    training, local = gaussian.training, gaussian.checkpoint
    both = predict_training(gaussian, plan)
    control = measure_control_variate(risk, local, training, cache)
    real = measure_training(
        risk, training, plan, control=control, test=test, cache=cache, progress=progress
    )
    table = both.table
    table[MEASURED] = real.table[MEASURED]
    parts = table.drop_duplicates("weights").set_index("weights")
    # For averages over shuffled epochs there is no prediction.
    scatter = parts["excess"].fillna(np.inf)
    if not (parts["descent"].abs() <= STILL * scatter / max(plan.members)).all():
        calm = (cache or Cache()).of(risk)(
            "noise_free_path",
            lambda: _noise_free(risk, local, training, plan),
            lr=training.lr,
            momentum=training.momentum,
            steps=training.steps,
            records=plan.records,
            averages=plan.averages(training),
        )
        table["noise_free"] = [float(calm[name]) for name in table["weights"]]
        table["noise_change_on_path"] = float(calm["noise_change"])
    table["measured_rise"] = table["measured"] - table["noise_free"]
    table["ratio"] = table["measured_rise"] / table["predicted_rise"]
    table["ratio_error"] = table["error"] / table["predicted_rise"].abs()
    names = ["measured", "error"]
    course = both.course.drop(columns=names).merge(real.course, on=["members", "step"])
    return Outcome(table, course[COURSE])


def _noise_free(
    risk: EmpiricalRisk, local: LocalQuadratic, training: Training, plan: Plan
) -> dict[str, Any]:
    """Change of the loss without noise for every kind of weights, and change of the noise."""
    averages = Running(plan.averages(training), risk.weights)
    end = risk.weights

    def seen(step: int, weights: Tensor) -> None:
        nonlocal end
        averages(step, weights)
        end = weights

    losses = noise_free(risk, training, training.record_steps(plan.records), seen=seen)
    found = {name: np.array(risk.loss(mean)) for name, mean in averages.values.items()}
    found[ITERATE] = np.array(losses.mean())
    change = {name: loss - local.loss for name, loss in found.items()}
    population = 1.0 - 1.0 / risk.examples  # as the local model has it
    noise = population * trace(risk.at(end))
    return change | {"noise_change": np.array(noise / local.noise_trace - 1.0)}


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Concatenate the tables of several trainings.

    Parameters
    ----------
    outcomes : sequence of Outcome
        At least one.

    Returns
    -------
    Outcome
    """
    import pandas as pd

    return Outcome(
        pd.concat([one.table for one in outcomes], ignore_index=True),
        pd.concat([one.course for one in outcomes], ignore_index=True),
    )
