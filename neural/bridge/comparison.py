"""Predicted and measured losses of a training in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.control_variate import ControlVariate, measure_control_variate
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.held_out import HeldOut, TestLoss, loss_of, measure_held_out
from neural.bridge.iterate_averages import Running, TimeAverage
from neural.bridge.prediction import predict_each, predict_loss
from neural.bridge.sgd_chains import group_losses, train_late_phase, train_runs
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk
from nqm.progress import times

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]
#: Work of the gradient of an example's loss in a minibatch, in losses among all examples; about.
GRADIENT = 2
#: In place of values that are not measured.
UNKNOWN = np.full((1, 1), np.nan)
MEASURED = [
    "measured",
    "error",
    "gain",
    "gain_error",
    "plain",
    "plain_error",
    "test_loss",
    "test_error",
    "test_gain",
    "test_gain_error",
    "test_accuracy",
    "test_accuracy_error",
]
COLUMNS = [
    "way",
    "lr",
    "momentum",
    "batch_size",
    "sampling",
    "steps",
    "members",
    "weights",
    "predicted",
    "measured",
    "error",
    "predicted_rise",
    "measured_rise",
    "ratio",
    "ratio_error",
    "descent",
    "predicted_gain",
    "gain",
    "gain_error",
    "noise_free",
    "cross",
    "floor",
    "excess",
    "curvature_change_part",
    "effective_runs",
    "nonsmooth_excess",
    "log2_slope",
    "noise_growth",
    "kink_fraction",
    "noise_change_on_path",
    "plain",
    "plain_error",
    "predicted_test_loss",
    "predicted_test_error",
    "test_loss",
    "test_error",
    "predicted_test_gain",
    "predicted_test_gain_error",
    "test_gain",
    "test_gain_error",
    "predicted_test_accuracy",
    "test_accuracy",
    "test_accuracy_error",
]
COURSE = [
    "way",
    "lr",
    "momentum",
    "batch_size",
    "sampling",
    "steps",
    "members",
    "step",
    "predicted",
    "measured",
    "error",
]


@dataclass(frozen=True)
class Outcome:
    """Tables of losses of one or more trainings, measured or predicted or both.

    Attributes
    ----------
    table : DataFrame
        A row for every K and kind of weights: the iterate, with its loss averaged over the recorded
        steps of the second half, and averages over time, evaluated after the last step.
    course : DataFrame
        A row for every K and recorded step of the iterate. In the first half, losses are measured
        for the smallest and the largest K only.
    """

    table: pd.DataFrame
    course: pd.DataFrame


def measure_training(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    training: Training,
    plan: Plan,
    *,
    control: ControlVariate | None = None,
    held_out: Mapping[str, HeldOut] | None = None,
    test: TestLoss | None = None,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Train from the checkpoint, average the weights, and measure their losses.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss; training starts at its weights.
    training : Training
        The training.
    plan : Plan
        Number of runs, group sizes, and which averages are evaluated.
    control : ControlVariate, optional
        Control variate of this training, subtracted from the measured losses where their variance
        falls by it; the table has the values with and without it.
    held_out : mapping of str to HeldOut, optional
        The test loss over the Gaussian of the weights. With it the control variate is subtracted
        from measured test losses as well.
    test : EmpiricalRisk or callable, optional
        Test loss, a risk or a function of a weight vector of shape (p,); computed once, after the
        last step. Its value at the checkpoint is part of the cache key.
    cache : Cache, optional
        Stores the result.
    progress : callable, optional
        Called with the work done since the last call (`training_work`).

    Returns
    -------
    Outcome
        Columns members, weights (members, step), measured, error: the change of the training loss
        from the checkpoint's, averaged over groups (and recorded steps), and its standard error
        over groups. The table also has gain, gain_error: the mean loss of a group's single runs
        less the loss of their mean weights; plain, plain_error: the measured change without the
        control variate; test_loss, test_error: the mean test loss; and test_gain, test_gain_error:
        the mean test loss of a group's single runs, of their last weights, less that of the row.
    """
    at = training.course_steps(plan.records)
    start = risk.loss()
    test_loss = None if test is None else loss_of(test)
    margins = isinstance(test, EmpiricalRisk) and test.loss_and_margins(test.weights)[1] is not None
    of_gradient = times(progress, GRADIENT * training.batch_size)
    of_loss = times(progress, risk.examples)
    of_test = times(progress, _examples(test))

    def tested(snapshots: list[Tensor], groups_of: int) -> Iterator[tuple[str, FloatArray]]:
        """Test loss of the last weights; with one label for each example, the accuracy as well."""
        if test_loss is None:
            return
        if not (margins and isinstance(test, EmpiricalRisk)):
            yield "test", group_losses(test_loss, snapshots[-1:], groups_of, of_test)
            return
        right: list[float] = []

        def loss(w: Tensor) -> float:
            value, margin = test.loss_and_margins(w)
            assert margin is not None
            right.append(float((margin > 0.0).double().mean()))
            return value

        yield "test", group_losses(loss, snapshots[-1:], groups_of, of_test)
        yield "accuracy", np.array(right)[:, None]

    def losses(k: int, snapshots: dict[str, list[Tensor]], groups_of: int) -> dict[str, Any]:
        arrays = {}
        for weights, taken in snapshots.items():
            chosen = taken[-len(_recorded(training, plan, k)) :]  # of an average there is one
            arrays[f"{weights}{k}"] = group_losses(risk.loss, chosen, groups_of, of_loss) - start
            arrays |= {f"{what}-{weights}{k}": of for what, of in tested(taken, groups_of)}
        return arrays

    def independent() -> dict[str, Any]:
        averages = Running(plan.averages(training), risk.weights.repeat(plan.runs, 1))
        trained = train_runs(
            risk, training, plan.runs, at, seed=plan.seed, seen=averages, progress=of_gradient
        )
        snapshots = {ITERATE: [w for _, w in trained]}
        snapshots |= {name: [mean] for name, mean in averages.values.items()}
        arrays: dict[str, Any] = {}
        for k in plan.members:
            arrays |= losses(k, snapshots, k)
        return arrays

    def run(k: int, seed: int) -> dict[str, Tensor]:
        averages = Running(plan.averages(training), risk.weights)
        trained = train_late_phase(
            risk,
            training,
            k,
            plan.late_phase or "all",
            at,
            gamma=plan.gamma,
            member_lr_ratio=plan.member_lr_ratio,
            seed=seed,
            seen=averages,
            progress=of_gradient,
        )
        iterates = torch.stack([w for _, w in trained])
        return {ITERATE: iterates} | {name: w[None] for name, w in averages.values.items()}

    def members() -> dict[str, Any]:
        arrays: dict[str, Any] = {}
        for k in plan.members:
            runs = [run(k, seed) for seed in _runs(plan, k)]
            snapshots = {
                name: list(torch.stack([each[name] for each in runs], 1)) for name in runs[0]
            }
            arrays |= losses(k, snapshots, 1)
        return arrays

    known = (cache or Cache()).of(risk)(
        "training",
        independent if plan.late_phase is None else members,
        training=training,
        plan=plan,
        test=None if test_loss is None else f"{test_loss(risk.weights):.6g}",
        accuracy=margins or None,
        averages=plan.averages(training) if plan.late_phase else None,
    )
    return _tabulate(known, training, plan, control, held_out or {})


@np.errstate(invalid="ignore", over="ignore")  # Losses of diverged runs are huge or infinite.
def _tabulate(
    known: dict[str, Any],
    training: Training,
    plan: Plan,
    control: ControlVariate | None,
    held_out: Mapping[str, HeldOut],
) -> Outcome:
    """Means and standard errors over groups of runs (or over late-phase runs)."""
    import pandas as pd

    at, count = training.course_steps(plan.records), len(training.record_steps(plan.records))
    averages = plan.averages(training)
    columns = {ITERATE: slice(0, len(at))}
    columns |= {average.name: slice(i, i + 1) for i, average in enumerate(averages, len(at))}
    controls: dict[int, FloatArray] = {}
    if control is not None:
        keys = {k: _keys(plan, k) for k in plan.members}
        when: list[int | TimeAverage] = [*at, *averages]
        z = {own: control.responses(own, when) for own in set(keys.values())}
        controls = {k: control.of(z[own], when, k) for k, own in keys.items()}
        known = dict(known)
        for weights, i in zip(columns, range(len(at) - 1, len(when)), strict=True):
            names = {k: name for k in plan.members if (name := f"test-{weights}{k}") in known}
            if weights in held_out:
                known |= _calmed(
                    {name: known[name] for name in names.values()},
                    {
                        name: control.of_test(z[keys[k]][i], when[i], k, held_out[weights])[:, None]
                        for k, name in names.items()
                    },
                )
    rows, course = [], []
    for weights, part in columns.items():
        losses = {k: known[f"{weights}{k}"] for k in plan.members}
        if controls:
            losses = _calmed(losses, {k: variate[:, part] for k, variate in controls.items()})
        for k, groups in losses.items():
            plain = known[f"{weights}{k}"]
            gain = (np.nan, np.nan) if k == 1 else _gain(losses.get(1), groups, k, count)
            rows.append(
                (
                    k,
                    weights,
                    *_mean(groups[:, -count:].mean(1)),
                    *gain,
                    *_mean(plain[:, -count:].mean(1)),
                    *_test(known, weights, k),
                    *_mean(known.get(f"accuracy-{weights}{k}", UNKNOWN)[:, 0]),
                )
            )
            if weights == ITERATE:
                steps = at[-groups.shape[1] :]
                course += [(k, t, *_mean(each)) for t, each in zip(steps, groups.T, strict=True)]
    return Outcome(
        pd.DataFrame(rows, columns=["members", "weights", *MEASURED]),
        pd.DataFrame(course, columns=["members", "step", "measured", "error"]),
    )


def _calmed(
    losses: dict[Any, FloatArray], variates: dict[Any, FloatArray]
) -> dict[Any, FloatArray]:
    """Losses less their control variates, if that lowers the variance over groups.

    Where runs leave the range of the quadratic, its losses grow beyond all bounds and those of
    the network do not, and subtracting them would add that noise. All K share one decision, that
    of the most groups, so that differences between them stay fair.
    """
    less = {k: plain - variates[k][:, -plain.shape[1] :] for k, plain in losses.items()}
    if not losses:
        return less
    most = max(losses, key=lambda k: len(losses[k]))
    calms = less[most].mean(1).std() <= losses[most].mean(1).std()
    return less if calms else losses


def _keys(plan: Plan, members: int) -> tuple[tuple[int, int], ...]:
    """Seeds of the minibatches of every run, or of every member of every late-phase run."""
    if plan.late_phase is None:
        return tuple((plan.seed, run) for run in range(plan.runs))
    return tuple((seed, k) for seed in _runs(plan, members) for k in range(members))


def _runs(plan: Plan, members: int) -> list[int]:
    """Seeds of the late-phase runs with K members; at least two runs."""
    return [1000 * plan.seed + group for group in range(max(plan.runs // members, 2))]


def minibatches_of(plan: Plan) -> int:
    """Number of minibatches of one step of all runs.

    Parameters
    ----------
    plan : Plan

    Returns
    -------
    int
    """
    if plan.late_phase is None:
        return plan.runs
    return sum(k * len(_runs(plan, k)) for k in plan.members)


def training_work(
    training: Training, plan: Plan, risk: EmpiricalRisk, test: TestLoss | None = None
) -> int:
    """Work that `measure_training` reports, for a progress bar.

    Parameters
    ----------
    training, plan, risk, test
        See `measure_training`.

    Returns
    -------
    int
        In losses of one example: those of the gradients, and those of all mean weights.
    """
    averages = len(plan.averages(training))
    work = GRADIENT * training.batch_size * training.steps * minibatches_of(plan)
    for k in plan.members:
        groups = plan.runs // k if plan.late_phase is None else len(_runs(plan, k))
        losses = (len(_recorded(training, plan, k)) + averages) * risk.examples
        work += groups * (losses + (1 + averages) * _examples(test))
    return work


def _recorded(training: Training, plan: Plan, members: int) -> Sequence[int]:
    """Steps after which the loss of the mean of K runs is measured."""
    ends = {min(plan.members), max(plan.members)}
    steps = training.course_steps if members in ends else training.record_steps
    return steps(plan.records)


def _examples(test: TestLoss | None) -> int:
    """Number of test examples; of a function that is given, unknown, 0."""
    return test.examples if isinstance(test, EmpiricalRisk) else 0


def _test(known: dict[str, Any], weights: str, members: int) -> tuple[float, float, float, float]:
    """Test loss and gain with their errors; NaN where there is none."""
    scores, single = known.get(f"test-{weights}{members}"), known.get(f"test-{ITERATE}1")
    if scores is None:
        return np.nan, np.nan, np.nan, np.nan
    if weights == ITERATE and members == 1:
        return *_mean(scores[:, 0]), np.nan, np.nan
    return *_mean(scores[:, 0]), *_gain(single, scores, members, 1)


def _gain(
    single: FloatArray | None, mean: FloatArray, members: int, late: int
) -> tuple[float, float]:
    """Loss of a group's single runs minus that of their mean; NaN for late-phase members."""
    if single is None:
        return np.nan, np.nan
    own = single[: len(mean) * members].reshape(len(mean), members, -1).mean(1)
    return _mean((own[:, -late:] - mean[:, -late:]).mean(1))


def _mean(each: FloatArray) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is NaN."""
    error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else np.nan
    return float(each.mean()), error


def predict_training(
    gaussian: WeightGaussian, plan: Plan, held_out: Mapping[str, HeldOut] | None = None
) -> Outcome:
    """Predict the losses of one training, as a table with the columns of `compare_training`.

    Parameters
    ----------
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    plan : Plan
        Group sizes, recorded steps, and which averages are predicted.
    held_out : mapping of str to HeldOut, optional
        Result of `neural.bridge.held_out.measure_held_out`; without it no test loss is predicted.

    Returns
    -------
    Outcome
        The measured columns are NaN.
    """
    import pandas as pd

    training = gaussian.training
    predictions = {ITERATE: predict_loss(gaussian, training.record_steps(plan.records))}
    for average in plan.averages(training):
        predictions[average.name] = predict_loss(gaussian, [average])
    settings = {"way": plan.way} | asdict(training)
    runs = plan.late_phase is None
    validity = {"noise_growth": gaussian.noise_growth, "kink_fraction": gaussian.kink_fraction}
    if gaussian.path is not None:
        change = gaussian.path.noise_trace / gaussian.checkpoint.noise_trace - 1.0
        validity["noise_change_on_path"] = change
    rows = [
        settings
        | asdict(prediction)
        | {"members": k, "weights": weights, "noise_free": prediction.descent}
        | {"predicted": prediction.change(k), "predicted_rise": prediction.rise(k)}
        | {"predicted_gain": prediction.rise(1) - prediction.rise(k) if runs else np.nan}
        | validity
        | _predicted_test(held_out or {}, weights, k, plan)
        for weights, prediction in predictions.items()
        for k in plan.members
    ]
    at = training.course_steps(plan.records)
    each = predict_each(gaussian, at)
    course = [
        settings | {"members": k, "step": step, "predicted": prediction.change(k)}
        for k in plan.members
        for step, prediction in zip(at, each, strict=True)
    ]
    return Outcome(
        pd.DataFrame(rows).reindex(columns=COLUMNS), pd.DataFrame(course).reindex(columns=COURSE)
    )


def _predicted_test(
    held_out: Mapping[str, HeldOut], weights: str, members: int, plan: Plan
) -> dict[str, float]:
    """Predicted test loss and gain, with the columns of the table."""
    if weights not in held_out:
        return {}
    own, single = held_out[weights], held_out[ITERATE]
    loss, error = own.loss(members)
    found = {"predicted_test_loss": loss, "predicted_test_error": error}
    found["predicted_test_accuracy"] = own.accuracy(members)
    if plan.late_phase is None and (weights, members) != (ITERATE, 1):
        gain, error = own.gain(members, single)
        found |= {"predicted_test_gain": gain, "predicted_test_gain_error": error}
    return found


def compare_training(
    risk: EmpiricalRisk,
    gaussian: WeightGaussian,
    plan: Plan,
    *,
    test: TestLoss | None = None,
    held_out: Mapping[str, HeldOut] | None = None,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Predict and measure one training.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    plan, test
        See `measure_training`.
    held_out : mapping of str to HeldOut, optional
        Test loss over the Gaussian; measured here by default.
    cache, progress
        See `measure_training`.

    Returns
    -------
    Outcome
        Columns of the table: the fields of the training; members, weights; predicted and measured
        change of the loss from the checkpoint's, and its standard error; the change due to noise,
        predicted and measured (``predicted_rise``, ``measured_rise``), and their ratio; the loss of
        a single run minus that of the mean (``predicted_gain``, ``gain``); the terms of the
        prediction (see `neural.bridge.prediction.Prediction`); the relative increase of the noise
        by scatter (``noise_growth``); the curvature added by kinks (``kink_fraction``); the
        relative change of the noise at the end of the noise-free path (``noise_change_on_path``,
        NaN where that path is not trained); the test loss and what averaging saves of it, predicted
        and measured, with standard errors (``predicted_test_loss``, ``predicted_test_error``,
        ``test_loss``, ``test_error``, ``predicted_test_gain``, ``test_gain``, ...; see
        `neural.bridge.held_out`); the accuracy on test examples (``predicted_test_accuracy``,
        ``test_accuracy``, ``test_accuracy_error``), NaN unless each example has one label.
        The course has the predicted and measured change at every recorded step.
    """
    training, local = gaussian.training, gaussian.checkpoint
    if held_out is None and test is not None:
        held_out = measure_held_out(test, risk, gaussian, plan, cache=cache)
    predicted = predict_training(gaussian, plan, held_out)
    control = measure_control_variate(risk, local, training, cache)
    measured = measure_training(
        risk,
        training,
        plan,
        control=control,
        held_out=held_out,
        test=test,
        cache=cache,
        progress=progress,
    )
    table = predicted.table
    table[MEASURED] = measured.table[MEASURED]
    table["measured_rise"] = table["measured"] - table["noise_free"]
    table["ratio"] = table["measured_rise"] / table["predicted_rise"]
    table["ratio_error"] = table["error"] / table["predicted_rise"].abs()
    names = ["measured", "error"]
    course = predicted.course.drop(columns=names).merge(measured.course, on=["members", "step"])
    return Outcome(table, course[COURSE])


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Concatenate the tables of several trainings.

    Parameters
    ----------
    outcomes : sequence of Outcome
        At least one.

    Returns
    -------
    Outcome
        Rows of all trainings, in their order.
    """
    import pandas as pd

    return Outcome(
        pd.concat([outcome.table for outcome in outcomes], ignore_index=True),
        pd.concat([outcome.course for outcome in outcomes], ignore_index=True),
    )
