"""The test loss of averages, on quadratics where it can be written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neural.bridge.api import measure, predict
from neural.bridge.comparison import compare_training
from neural.bridge.config import BridgeConfig, Plan, Training
from neural.bridge.gaussian import WeightGaussian, measure_gaussian
from neural.bridge.held_out import HeldOut, evaluations, measure_held_out
from neural.bridge.iterate_averages import ExponentialMean, TailMean, TimeAverage
from neural.bridge.scatter import covariance, noise_sums
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from tests.tiny_risks import Bowl, Plain, scatter, slide
from tests.tolerances import IDENTITY, SIGMAS, agree, within_error

CURVATURE = (2.0, 0.7, 0.2)
TRAINING = Training(0.3, 4, 30)
PLAN = Plan((1, 2, 8), 64)
#: A curvature that shares no eigenvector with the training loss's, and another minimum.
OTHER = np.array([[1.5, 0.4, -0.3], [0.4, 2.0, 0.6], [-0.3, 0.6, 0.8]])
AWAY = np.array([0.8, -1.1, 0.3])


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl(CURVATURE, away=0.5)


def gaussian(bowl: Bowl, training: Training = TRAINING, displacements: int = 16) -> WeightGaussian:
    local = measure_local(bowl.risk, None)
    return measure_gaussian(bowl.risk, local, training, displacements=displacements)


def held_out(bowl: Bowl, curvature: np.ndarray) -> EmpiricalRisk:
    """1 + 1/2 (w - AWAY)' H (w - AWAY) of a single test example."""
    h, centre = torch.from_numpy(curvature), torch.from_numpy(AWAY[None])

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        off = output[:, 0]
        return 0.5 * ((off @ h) * off).sum(1) + 1.0

    model = Plain(bowl.risk.weights[:1].clone(), bowl.risk.weights[1:].clone())
    return EmpiricalRisk(model, [(centre, torch.zeros(1, dtype=torch.long))], loss=loss)


def moments(bowl: Bowl, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a weighted sum of w_0 ... w_T, by a walk of every step's noise."""
    lr, h = TRAINING.lr, bowl.hessian
    start = bowl.risk.weights.numpy()
    path = [start + slide(h @ start, h, lr, t) for t in range(len(weights))]
    total = np.zeros_like(h)
    for step in range(1, len(weights)):
        response, sum_of_responses = -lr * np.eye(len(h)), np.zeros_like(h)
        for weight in weights[step:]:
            sum_of_responses += weight * response
            response = response - lr * h @ response
        total += sum_of_responses @ bowl.noise @ sum_of_responses.T / TRAINING.batch_size
    return weights @ np.array(path), total


def kinds() -> dict[str, np.ndarray]:
    """Weights of w_0 ... w_T in what is evaluated."""
    steps = TRAINING.steps
    ema = np.eye(1, steps + 1)[0]
    for t in range(1, steps + 1):
        ema = 0.99 * ema + 0.01 * np.eye(1, steps + 1, t)[0]
    half = np.arange(steps + 1) > steps // 2
    return {"iterate": np.eye(1, steps + 1, steps)[0], "swa": half / half.sum(), "ema": ema}


def closed_form(bowl: Bowl, curvature: np.ndarray, weights: str, members: int) -> float:
    mean, spread = moments(bowl, kinds()[weights])
    off = mean - AWAY
    return float(1.0 + 0.5 * off @ curvature @ off + 0.5 * np.trace(curvature @ spread) / members)


# --- the covariance of an average over time ------------------------------------------------------


@pytest.mark.parametrize("average", [TailMean(7), ExponentialMean(9, 0.8), ExponentialMean(1)])
def test_weights_of_the_steps(average: TimeAverage) -> None:
    """What the average becomes, if all weights but those of one step are 0."""
    found = []
    for step in range(1, average.steps + 1):
        value = 0.0
        for t in range(1, average.steps + 1):
            value += average.share(t) * (float(t == step) - value)
        found.append(value)
    agree(average.weights(), found, IDENTITY)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("average", [TailMean(20), ExponentialMean(20, 0.9)])
def test_the_covariance_of_an_average_is_that_of_its_walk(
    bowl: Bowl, average: TimeAverage, momentum: float
) -> None:
    training = replace(TRAINING, steps=20, momentum=momentum, lr=0.3 * (1.0 - momentum))
    local = measure_local(bowl.risk, None)
    h, v = bowl.hessian, local.pairs.vectors
    weights = average.weights()
    expected = np.zeros_like(h)
    for step in range(20):
        w, buffer, response = np.zeros((2, 3, 3))[0], np.zeros((3, 3)), np.zeros((3, 3))
        for t in range(step, 20):
            buffer = momentum * buffer + h @ w + (np.eye(3) if t == step else 0.0)
            w = w - training.lr * buffer
            response += weights[t] * w
        expected += response @ bowl.noise @ response.T / training.batch_size
    agree(v @ covariance(local, training, average) @ v.T, expected, 1e-9)
    u = training.effective_lr * local.pairs.values
    ratio = covariance(local, training, average) / covariance(local, training)
    alone = noise_sums(u, training, 9, average) / noise_sums(u, training, 9)
    agree(np.diag(ratio), alone, 1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_an_average_of_the_last_step_is_the_iterate(
    bowl: Bowl, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural.bridge.scatter.BLOCK", 7)  # which does not divide the steps
    training = replace(TRAINING, steps=20, momentum=momentum, lr=0.3 * (1.0 - momentum))
    local, last = measure_local(bowl.risk, None), ExponentialMean(20, 0.0)
    agree(covariance(local, training, last), covariance(local, training), 1e-9)
    u = training.effective_lr * local.pairs.values
    agree(noise_sums(u, training, 9, last), noise_sums(u, training, 9), 1e-9)
    shuffled = replace(training, sampling="shuffled", batch_size=32)  # 8 of them are an epoch
    for one in (training, shuffled):  # what has cancelled at this very step, of shuffled epochs
        agree(covariance(local, one, 20), covariance(local, one, last), 1e-9)
        sums = [noise_sums(u, one, local.examples, when) for when in (20, last)]
        agree(*sums, 1e-9)
        agree(covariance(local, one, 8), covariance(local, replace(one, steps=8), 8), 1e-9)
    over_places, at_end = (covariance(local, shuffled, when)[-1, -1] for when in (None, 16))
    assert at_end < 0.8 * over_places  # along the flat direction most cancels in an epoch


# --- the prediction ------------------------------------------------------------------------------


def test_where_the_curvature_is_a_multiple_the_prediction_is_exact(bowl: Bowl) -> None:
    """All that displacements scatter is removed by the regression on the training loss."""
    curvature = 2.5 * bowl.hessian
    found = measure_held_out(held_out(bowl, curvature).loss, bowl.risk, gaussian(bowl), PLAN)
    assert set(found) == {"iterate", "swa", "ema"}
    for weights, own in found.items():
        assert own.curvature_ratio == pytest.approx(2.5, rel=1e-9)
        assert own.gradient is None
        for k in (1, 2, 3, 8):
            loss, error = own.loss(k)
            assert loss == pytest.approx(closed_form(bowl, curvature, weights, k), rel=1e-9)
            assert error < 1e-9
            gain, error = own.gain(k, found["iterate"])
            saved = closed_form(bowl, curvature, "iterate", 1) - loss
            assert gain == pytest.approx(saved, abs=1e-9)
            assert error < 1e-9


def test_any_other_curvature_is_within_the_error_that_is_told(bowl: Bowl) -> None:
    risk = held_out(bowl, OTHER)
    errors = []
    for seed in range(4):
        plan = replace(PLAN, seed=seed)
        found = measure_held_out(risk, bowl.risk, gaussian(bowl), plan)
        single = closed_form(bowl, OTHER, "iterate", 1)
        for weights, own in found.items():
            mean, _ = moments(bowl, kinds()[weights])
            assert own.gradient is not None
            agree(own.gradient, OTHER @ (mean - AWAY), 1e-9)
            for k in PLAN.members:
                loss, error = own.loss(k)
                expected = closed_form(bowl, OTHER, weights, k)
                errors.append((loss - expected) / error)
                if (weights, k) != ("iterate", 1):
                    gain, error = own.gain(k, found["iterate"])
                    errors.append((gain - (single - expected)) / error)
    assert np.abs(errors).max() < SIGMAS
    # Neither too small nor, by more than a factor, too large.
    assert 0.3 < np.sqrt(np.mean(np.square(errors))) < 2.0


def test_training_does_what_is_predicted(bowl: Bowl) -> None:
    risk, own = held_out(bowl, OTHER), gaussian(bowl, displacements=32)
    table = compare_training(bowl.risk, own, PLAN, test=risk).table
    expected = [
        closed_form(bowl, OTHER, weights, k)
        for weights, k in zip(table["weights"], table["members"], strict=True)
    ]
    within_error(table["test_loss"], expected, table["test_error"])
    within_error(table["predicted_test_loss"], expected, table["predicted_test_error"])
    saved = table[table["test_gain"].notna()]
    assert len(saved) == len(table) - 1
    gains = expected[0] - np.array(expected)[saved.index]
    within_error(saved["test_gain"], gains, saved["test_gain_error"])
    within_error(saved["predicted_test_gain"], gains, saved["predicted_test_gain_error"])
    # The optima differ, so that most of the scatter of plain test losses is along their slope.
    plain = compare_training(bowl.risk, own, PLAN, test=risk.loss).table
    assert (table["test_error"] < 0.2 * plain["test_error"]).all()
    within_error(plain["test_loss"], expected, plain["test_error"])


def test_of_shuffled_epochs_the_last_place_counts(bowl: Bowl) -> None:
    """Four minibatches in an epoch; after the sixth step most of the noise has not cancelled."""
    training = replace(TRAINING, batch_size=bowl.risk.examples // 4, steps=6, sampling="shuffled")
    own = gaussian(bowl, training, displacements=32)
    table = compare_training(bowl.risk, own, PLAN, test=held_out(bowl, OTHER)).table
    error = np.hypot(table["test_error"], table["predicted_test_error"])
    within_error(table["predicted_test_loss"], table["test_loss"], error)
    assert table["predicted_test_gain"].notna().sum() == len(table) - 1


def test_the_scatter_of_the_force_does_not_count_as_a_rise(bowl: Bowl) -> None:
    """L at the mean of two measurements is too high by a quarter of d'Hd / 2, d their distance."""
    one, other = np.array([0.3, -0.2, 0.9]), np.array([-0.4, 0.5, 0.2])

    def loss(w: np.ndarray) -> float:
        return float(0.5 * w @ OTHER @ w)

    centre = np.array([loss(0.5 * (one + other)), loss(one), loss(other)])
    found = HeldOut((1,), centre, np.zeros((2, 1)), np.zeros(2)).loss(1)
    # The product of the two: free of the bias of a square.
    assert found[0] == pytest.approx(0.5 * float(one @ OTHER @ other), rel=1e-12)
    assert found[1] == pytest.approx(0.5 * abs(centre[1] - centre[2]), rel=1e-12)


def test_between_evaluated_members_k_times_the_rise_is_linear_in_log_k() -> None:
    own = HeldOut((1, 4), np.zeros(3), np.array([[8.0, 1.0], [4.0, 2.0]]), np.zeros(2))
    agree(own.rises_at(2), [3.0, 3.0], IDENTITY)  # (8 + 4) / 2 / 2 and (4 + 8) / 2 / 2
    agree(own.rises_at(4), [1.0, 2.0], IDENTITY)


def test_where_the_covariance_is_not_known_nothing_is_predicted(bowl: Bowl) -> None:
    own = gaussian(bowl, replace(TRAINING, lr=1.01), 2)
    assert measure_held_out(held_out(bowl, OTHER), bowl.risk, own, PLAN) == {}
    table = compare_training(
        bowl.risk, own, replace(PLAN, members=(1, 2), runs=4), test=held_out(bowl, OTHER)
    ).table
    assert table["predicted_test_loss"].isna().all()
    assert table["test_loss"].notna().all()


def test_late_phase_members_have_a_test_loss_but_no_single_run(bowl: Bowl) -> None:
    plan = Plan((2, 4), 8, late_phase="all")
    training = replace(TRAINING, steps=10)
    own = gaussian(bowl, training)
    table = compare_training(bowl.risk, own, plan, test=held_out(bowl, OTHER)).table
    assert table[["predicted_test_loss", "test_loss"]].notna().all(axis=None)
    assert table[["predicted_test_gain", "test_gain"]].isna().all(axis=None)
    within_error(
        table["test_loss"],
        table["predicted_test_loss"],
        np.hypot(table["test_error"], table["predicted_test_error"]),
    )


def test_what_is_kept_is_not_evaluated_again(bowl: Bowl, tmp_path: Path) -> None:
    config = BridgeConfig(
        eigenpairs=0, displacements=4, averaging_displacements=0, lr_times_sharpness=(0.2, 0.4),
        batch_sizes=(4,), steps=10,
    )  # fmt: skip
    measured = measure(bowl.risk, config, cache=Cache(tmp_path))
    told: list[float] = []
    calls: list[Tensor] = []

    def test(w: Tensor) -> float:
        calls.append(w)
        return float(w.sum())

    plan = Plan((1, 2), 4)
    first = predict(measured, plan, test=test, progress=lambda stage, share: told.append(share))
    work = sum(evaluations(own, plan) for own in measured.gaussians)
    assert work == 2 * 2 * 3 * 4 * 2  # trainings, ends, kinds of weights, displacements, K
    assert len(calls) == work + 2 * (1 + 3 * 3)  # at the checkpoint, and at three means of each
    assert told[-1] == pytest.approx(0.99)
    calls.clear()
    again = predict(measured, plan, test=test)
    assert len(calls) == 2
    assert again.table.equals(first.table)
    assert first.table["predicted_test_loss"].notna().all()
    assert predict(measured, plan).table["predicted_test_loss"].isna().all()


def test_the_iterate_scatters_as_the_textbook_has_it(bowl: Bowl) -> None:
    """The walk of this file is the recursion of the covariance."""
    _, spread = moments(bowl, kinds()["iterate"])
    agree(spread, scatter(bowl.hessian, bowl.noise, 0.3, 4, 30), 1e-9)


def test_accuracy_is_that_of_gaussian_margins() -> None:
    """Drawn margins: one far right, one wrong, one unsure."""
    margins = np.array([[3.0, -0.4, 0.2], [-0.5, 0.3, 0.1], [0.04, 0.5, 0.25]])
    found = HeldOut((1,), np.zeros(3), np.zeros((2, 1)), np.zeros(2), margins=margins)
    rng, draws = np.random.default_rng(0), 40000
    for k in (1, 4):
        mean, sd = margins[0] + margins[1] / k, np.sqrt(margins[2] / k)
        right = (mean + sd * rng.standard_normal((draws, 3)) > 0.0).mean(1)
        within_error(found.accuracy(k), right.mean(), right.std() / np.sqrt(draws))
    sure = replace(found, margins=np.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]))
    assert sure.accuracy(1) == 0.5
    assert np.isnan(replace(found, margins=None).accuracy(1))


def test_margins_of_a_linear_net_have_the_moments_of_its_weights() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 2, dtype=torch.double), torch.randint(2, (60,))
    risk = EmpiricalRisk(nn.Linear(2, 2).double(), [(x, y)], weight_decay=0.1)
    training = Training(0.5, 4, 60)
    own = measure_gaussian(risk, measure_local(risk, None), training, displacements=32)
    plan = Plan((1, 2), 4)
    test = risk.on([(x[:20], y[:20])])
    found = measure_held_out(test, risk, own, plan)["iterate"]
    assert found.margins is not None
    # The margin is linear in the weights: a' w, with a the difference of two rows of inputs.
    loss, margins = test.loss_and_margins(risk.weights)
    assert margins is not None
    agree(loss, test.loss(), 1e-12)
    sign = np.where(y[:20] == 0, 1.0, -1.0)
    features = np.hstack([x[:20].numpy(), np.ones((20, 1))]) * sign[:, None]
    a = np.hstack([features[:, :2], -features[:, :2], features[:, 2:], -features[:, 2:]])
    agree(margins, a @ risk.weights.numpy(), 1e-12)
    agree(found.margins[0], a @ (risk.weights.numpy() + own.mean), 1e-9)
    assert np.abs(found.margins[1]).max() < IDENTITY
    turn = own.local.pairs.vectors
    variance = ((a @ turn) @ own.covariance * (a @ turn)).sum(1)
    # The mean of 32 squares of a Gaussian has the relative standard error 1/4.
    assert (np.abs(found.margins[2] / variance - 1.0) < 1.0).all()
    assert abs((found.margins[2] / variance).mean() - 1.0) < 0.5
    table = compare_training(risk, own, plan, test=test).table
    single = table[(table["weights"] == "iterate") & (table["members"] == 1)].iloc[0]
    assert abs(single["predicted_test_accuracy"] - single["test_accuracy"]) < 0.2
    assert 0.0 < single["test_accuracy"] < 1.0
