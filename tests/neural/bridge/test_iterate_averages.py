"""Averages over time: literal loops, and training on an exact quadratic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neural.bridge.comparison import compare_training
from neural.bridge.config import Plan, Training
from neural.bridge.iterate_averages import ExponentialMean, Running, TailMean, TimeAverage
from neural.bridge.prediction import predict_loss
from neural.bridge.response import response
from neural.bridge.sgd_chains import noise_free, train_runs
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, gaussian_of, quadratic, slide, tanh_risk
from tests.tolerances import IDENTITY, agree, within_error

#: One step, an odd number, and many.
AVERAGES = [
    average
    for steps in (1, 7, 60)
    for average in (
        TailMean(steps), ExponentialMean(steps, 0.9), ExponentialMean(steps, 0.5),
        ExponentialMean(steps, 0.0),
    )
]  # fmt: skip


def counts(average: TimeAverage) -> np.ndarray:
    """Weights of t = 0 ... T in the average, as its definition has them."""
    steps = average.steps
    if isinstance(average, TailMean):
        half = steps // 2
        return np.array([float(t > half) for t in range(steps + 1)]) / (steps - half)
    assert isinstance(average, ExponentialMean)
    beta, weights = average.decay, np.eye(1, steps + 1)[0]
    for t in range(1, steps + 1):
        weights = beta * weights + (1.0 - beta) * np.eye(1, steps + 1, t)[0]
    return weights


@pytest.mark.parametrize("average", AVERAGES, ids=str)
def test_an_average_is_its_weights(average: TimeAverage) -> None:
    weights = counts(average)
    assert weights.sum() == pytest.approx(1.0, rel=IDENTITY)
    agree(average.weights(), weights[1:], IDENTITY)
    path = torch.randn(average.steps + 1, 3, dtype=torch.double)
    running = Running([average], path[0])
    for step, w in enumerate(path[1:], 1):
        running(step, w)
    agree(running.values[average.name], weights @ path.numpy(), IDENTITY)


@pytest.mark.parametrize("when", [1, 60, *AVERAGES], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_response_is_that_of_a_literal_loop(when: int | TimeAverage, momentum: float) -> None:
    # Unstable without momentum, jumped over, in one step, ever flatter, and bent down.
    h, lr = np.array([2.6, 2.0, 1.2, 0.1, 1e-3, 1e-9, 1e-15, 0.0, -0.1]), 0.8
    steps = when if isinstance(when, int) else when.steps
    path, buffer = [np.zeros(len(h))], np.zeros(len(h))
    for _ in range(steps):
        buffer = momentum * buffer + 1.0 - h * path[-1]
        path.append(path[-1] + lr * buffer)
    expected = path[-1] if isinstance(when, int) else counts(when) @ path
    agree(response(Training(lr, 8, steps, momentum), when)(h), expected, 1e-11)


def test_the_response_after_very_many_steps() -> None:
    """In closed form: the force is balanced, or still pushes a flat direction."""
    h, steps = np.array([1.0, 0.1, 1e-13, 0.0]), 10**9
    # Heavy ball lags behind its effective rate by momentum / (1 - momentum) steps.
    for momentum, lag in ((0.0, 0.0), (0.9, 9.0)):
        lr = 0.5 * (1.0 - momentum)
        flat = 0.5 * (steps - lag) * (1.0 - 0.25 * h[2] * steps)
        found = response(Training(lr, 8, steps, momentum), steps)(h)
        agree(found, [1.0, 10.0, flat, 0.5 * (steps - lag)], 1e-7)


def test_runs_and_the_noise_free_path_are_averaged_as_they_run() -> None:
    risk, training = tanh_risk(), Training(0.1, 8, 9, 0.5)
    averages = TailMean(9), ExponentialMean(9, 0.7)
    start = risk.weights.repeat(3, 1)
    running, steps = Running(averages, start), range(1, 10)
    path = [start] + [w for _, w in train_runs(risk, training, 3, steps, seen=running)]
    calm, seen = Running(averages, risk.weights), {0: risk.weights}
    noise_free(risk, training, (9,), seen=calm)
    noise_free(risk, training, (4, 9), seen=seen.__setitem__)
    assert list(seen) == list(range(10))
    for average in averages:
        mean = np.tensordot(counts(average), torch.stack(path).numpy(), 1)
        agree(running.values[average.name], mean, 1e-11)
        mean = counts(average) @ torch.stack(list(seen.values())).numpy()
        agree(calm.values[average.name], mean, 1e-11)


def test_averages_of_runs_that_diverged_have_no_finite_loss() -> None:
    risk, averages = Bowl([2.0, 0.5]).risk, (TailMean(400), ExponentialMean(400))
    running = Running(averages, risk.weights.repeat(2, 1))
    list(train_runs(risk, Training(100.0, 4, 400), 2, (400,), seen=running))
    assert not any(bool(mean.isfinite().any()) for mean in running.values.values())


@pytest.mark.parametrize("average", [TailMean(20), ExponentialMean(20, 0.8)], ids=str)
def test_a_prediction_is_the_literal_response_to_every_draw(average: TimeAverage) -> None:
    """The noise of step s is in w_t by (1 - lr H)^(t - s), and in the average by their mean."""
    bowl, lr, size = Bowl((2.0, 0.7, 0.2), away=0.5), 0.3, 4
    h, g = bowl.hessian, bowl.risk.gradient().numpy()
    gaussian = gaussian_of(bowl, Training(lr, size, 20))
    found = predict_loss(gaussian, [average])
    shrink, weights, covariance = np.eye(3) - lr * h, counts(average), np.zeros((3, 3))
    for s in range(1, 21):
        answer = sum(weights[t] * np.linalg.matrix_power(shrink, t - s) for t in range(s, 21))
        covariance += lr**2 / size * answer @ bowl.noise @ answer.T
    assert found.excess == pytest.approx(0.5 * np.trace(h @ covariance), rel=1e-9)
    centre = sum(weights[t] * slide(g, h, lr, t) for t in range(21))
    assert found.descent == pytest.approx(quadratic(g, h, centre), rel=1e-9)
    iterate = predict_loss(gaussian, [20])
    assert found.effective_runs == pytest.approx(iterate.excess / found.excess, rel=1e-12)


@pytest.mark.parametrize(
    ("training", "late_phase"),
    [
        (Training(0.3, 4, 40), None),
        (Training(0.06, 4, 80, momentum=0.8), None),
        (Training(0.3, 4, 75, sampling="shuffled"), None),
        (Training(0.06, 4, 80, 0.8, "shuffled"), None),
        (Training(0.3, 4, 40), "name:first"),
    ],
    ids=["plain", "momentum", "shuffled", "shuffled with momentum", "members"],
)
def test_training_does_what_is_predicted_of_averages(
    training: Training, late_phase: str | None
) -> None:
    bowl = Bowl((2.0, 0.7, 0.2), away=0.5)
    members, runs = ((1, 4), 256) if late_phase is None else ((2, 3), 60)
    plan = Plan(members, runs, 1, late_phase=late_phase, decay=0.9)
    table = compare_training(bowl.risk, gaussian_of(bowl, training), plan).table
    assert list(table["weights"]) == ["iterate"] * 2 + ["swa"] * 2 + ["ema"] * 2
    within_error(table["plain"], table["predicted"], table["plain_error"])
    agree(table["measured"], table["predicted"], 1e-9)  # less the control variate
    # Else it would tell little.
    assert (table["plain_error"] < 0.3 * table["predicted_rise"]).all()
    assert (table["effective_runs"][2:] > 2.0).all()


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(NQMError, match="decay must lie in"):
        ExponentialMean(10, 1.0)
