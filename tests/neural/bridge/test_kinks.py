"""Kinks of a loss, where their density is known, and a smooth loss, which has none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from neural.bridge import drift
from neural.bridge.config import Training
from neural.bridge.drift import Drift, measure_drift, passes_at_displacements, slopes_at
from neural.bridge.kinks import find_kinks
from neural.bridge.measure_smoothing import measure_descent, measure_smoothing
from neural.bridge.prediction import Prediction
from neural.bridge.scatter import covariance
from neural.bridge.smoothing import Kinks, Smoothing
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from tests.tiny_risks import Plain, scatter, tanh_risk

CURVATURE, JUMP, SPREAD = (4.0, 2.0, 1.0), (0.3, 0.5, 0.2), 3.0
LR, SIZE, STEPS = 0.1, 4, 100
TRAINING = Training(LR, SIZE, STEPS)


@pytest.fixture(autouse=True)
def all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of many examples would have a kink where weights scatter."""
    monkeypatch.setattr(drift, "SAMPLE", 10**6)


def kinked(
    curvature: tuple[float, ...] = CURVATURE,
    *,
    at_checkpoint: bool = False,
    denser: bool = False,
    slope: float = 0.0,
) -> EmpiricalRisk:
    """Example n has the loss 1/2 w' H w + sum_i J_i |w_i - x_ni|, x normal around the checkpoint.

    Scatter meets 2 J_i p(0) of kinks for a length, p the density of x_i, wherever it is narrow
    beside `SPREAD`; the second derivatives at a point are H. Or nearly all at the checkpoint; or
    x a product of two uniform numbers, of density log(1 / |x|) / 2.
    """
    rng = np.random.default_rng(1)
    shape = (300 if at_checkpoint else 10_000, 3)  # a density takes many
    drawn = rng.random(shape) * rng.random(shape) if denser else rng.standard_normal(shape)
    x = (1e-6 if at_checkpoint else SPREAD) * torch.from_numpy(np.concatenate([drawn, -drawn]))
    h, jump = torch.tensor(curvature).double(), torch.tensor(JUMP).double()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        off, w = output.unbind(1)
        return (0.5 * h * w**2 + slope * w + jump * off.abs()).sum(1)

    zero = torch.zeros(3, dtype=torch.double)
    targets = torch.zeros(len(x), dtype=torch.long)
    return EmpiricalRisk(Plain(zero[:1].clone(), zero[1:].clone()), [(x, targets)], loss=loss)


def smoothed(risk: EmpiricalRisk, eigenpairs: int | None) -> Smoothing:
    local = measure_local(risk, eigenpairs, noise_samples=2, lanczos_steps=2)
    return measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=1)


def slopes(risk: EmpiricalRisk, smoothing: Smoothing) -> Drift:
    given = smoothing.local, smoothing.training
    return measure_drift(risk, *given, displacements=60, lanczos_steps=2)


@pytest.mark.parametrize("pairs", [None, 2])
def test_kinks_are_counted(pairs: int | None) -> None:
    risk = kinked()
    smoothing = smoothed(risk, pairs)
    assert np.abs(smoothing.width.curvature).max() < 1e-9, "second derivatives do not see them"
    found = find_kinks(slopes(risk, smoothing), smoothing)
    density = 1.0 / (SPREAD * np.sqrt(2.0 * np.pi))
    added = 2.0 * np.array(JUMP) * density
    # 20,000 of them: 2,660 p(0) d in a width d of 0.05, some four percent at one end alone.
    kept = slice(None) if pairs is None else slice(0, pairs)
    np.testing.assert_allclose(found.pairs, added[kept], rtol=0.1)
    if pairs is None:
        assert found.rest == 0.0, "no pair is flat, and there is nothing else"
    else:
        assert found.rest == pytest.approx(added[2], rel=0.1)
    assert (found.cost_ratio, found.log2_slope) == pytest.approx((1.0, 0.0), abs=0.1), (
        "the same at any width"
    )
    # Seen by the scatter, the curvature has them, whatever its size; the smooth part has not.
    seen = replace(smoothing, kinks=found)
    assert smoothing.kink_fraction() == 0.0
    assert seen.kink_fraction() == pytest.approx(found.pairs.sum() / sum(CURVATURE[kept]), rel=1e-6)
    for rate in (LR, 0.3 * LR):
        local = seen.seen_by(replace(TRAINING, lr=rate))
        expected = np.array(CURVATURE)[kept] + found.pairs
        np.testing.assert_allclose(local.pairs.values, expected, rtol=1e-9)
        for draw, before in zip(local.draws, smoothing.local.draws, strict=True):
            np.testing.assert_allclose(draw.values, before.values + found.rest, rtol=1e-9)
    assert seen.excess_parts(TRAINING, [STEPS], seen.seen_by(TRAINING))[0][0] == pytest.approx(
        0.0, abs=1e-12
    )


def test_flat_directions_share_one_value() -> None:
    risk = kinked((4.0, 0.02, 0.01))
    smoothing = smoothed(risk, None)
    found = find_kinks(slopes(risk, smoothing), smoothing)
    added = 2.0 * np.array(JUMP) / (SPREAD * np.sqrt(2.0 * np.pi))
    size = np.diag(covariance(smoothing.local, TRAINING))
    shared = (added * size)[1:].sum() / size[1:].sum()
    np.testing.assert_allclose(found.pairs, [added[0], shared, shared], rtol=0.15)
    assert found.pairs[1] == found.pairs[2] == found.rest


def test_a_smooth_loss_has_none() -> None:
    risk, training = tanh_risk(quick=False), Training(0.02, SIZE, 30)
    smoothing = measure_smoothing(
        risk, measure_descent(risk, measure_local(risk, None), training), displacements=8
    )
    found = find_kinks(slopes(risk, smoothing), smoothing)
    whole = np.abs(smoothing.local.pairs.values).sum()
    assert abs(found.pairs.sum()) < 0.01 * whole
    seen = replace(smoothing, kinks=found)
    excess = 0.5 * smoothing.local.pairs.values @ np.diag(covariance(smoothing.local, training))
    cost = seen.excess_parts(training, [30], seen.seen_by(training))[0][1] * (
        found.cost_ratio + found.log2_slope
    )
    assert cost < 0.01 * excess, "members do not make up for it"


def test_a_scatter_that_knows_of_kinks_finds_the_same() -> None:
    risk = kinked()
    smoothing = smoothed(risk, 2)
    found = find_kinks(slopes(risk, smoothing), smoothing)
    seen = replace(smoothing, kinks=found)
    local = seen.seen_by(TRAINING)
    again = find_kinks(measure_drift(risk, local, TRAINING, displacements=60), seen)
    np.testing.assert_allclose(again.pairs, found.pairs, rtol=0.05)
    assert again.rest == pytest.approx(found.rest, rel=0.05)


@pytest.mark.parametrize("lr", [LR, pytest.param(0.1 * LR, marks=pytest.mark.slow)])
def test_a_kink_at_the_checkpoint_weighs_more_the_narrower_the_scatter(lr: float) -> None:
    """J |w| along a direction of scatter s: J E|d| d / s^2 = J sqrt(2 / pi) / s."""
    risk = kinked(at_checkpoint=True)
    local, training = measure_local(risk, None), replace(TRAINING, lr=lr)
    smoothing = measure_smoothing(risk, measure_descent(risk, local, training), displacements=1)
    found = find_kinks(measure_drift(risk, local, training, displacements=400), smoothing)
    size = np.sqrt(np.diag(covariance(local, training)))
    # Of 400 |d| the mean is known to 0.76 / 20, and so is the mean of their squares.
    expected = np.array(JUMP) * np.sqrt(2.0 / np.pi) / size
    np.testing.assert_allclose(found.pairs, expected, rtol=0.15)
    # Twice E J |d| over E J |d|; and of half the displacement, over its square, twice as much.
    assert (found.cost_ratio, found.log2_slope) == pytest.approx((2.0, 2.0), abs=0.01)


def test_a_mean_beside_a_kink_meets_less_of_it() -> None:
    """J |w| around a mean m: E[J sign(m + d) d] / s^2 = 2 J p(m), p the density of d."""
    risk = kinked(at_checkpoint=True)
    local = measure_local(risk, None)
    smoothing = measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=1)
    measured = measure_drift(risk, local, TRAINING, displacements=2)
    size = np.sqrt(np.diag(covariance(local, TRAINING)))
    beside = np.array([0.5, 1.0, 1.5])
    moved = local.pairs.vectors @ (beside * size)
    told: list[int] = []
    beside_it = slopes_at(risk, measured, moved, displacements=2000, progress=told.append)
    assert sum(told) == passes_at_displacements(2000, risk.examples)
    found = find_kinks(replace(measured, slopes=beside_it), smoothing, mean_part=1.0)
    expected = 2.0 * np.array(JUMP) * np.exp(-0.5 * beside**2) / (size * np.sqrt(2.0 * np.pi))
    # One d adds J |d| or nothing: its standard deviation is about the mean, that of the sum 3 %.
    np.testing.assert_allclose(found.pairs, expected, rtol=0.15)


def test_kinks_that_descent_leads_off_are_not_met() -> None:
    risk = kinked(at_checkpoint=True, slope=3.0)
    local = measure_local(risk, None)
    smoothing = measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=1)
    found = find_kinks(measure_drift(risk, local, TRAINING, displacements=60), smoothing)
    assert np.abs(found.pairs).max() < 1e-6


@pytest.mark.parametrize("pairs", [None, 2])
def test_what_kinks_cost_is_half_their_curvature_with_the_scatter(pairs: int | None) -> None:
    risk = kinked()
    smoothing = smoothed(risk, pairs)
    assert smoothing.excess_parts(TRAINING, [STEPS], smoothing.seen_by(TRAINING))[0][1] == 0.0
    kinks = Kinks(np.array([0.1, 0.2, 0.3][:pairs]), 0.3)
    seen = replace(smoothing, kinks=kinks)
    h = np.array(CURVATURE) + np.array([0.1, 0.2, 0.3])
    c = np.cov(torch.cat(list(risk.example_gradients())).numpy(), rowvar=False, ddof=0)
    expected = 0.5 * np.trace(np.diag([0.1, 0.2, 0.3]) @ scatter(np.diag(h), c, LR, SIZE, STEPS))
    # Examples are drawn: their noise is not quite along the axes, that of the rest not quite known.
    assert seen.excess_parts(TRAINING, [STEPS], seen.seen_by(TRAINING))[0][1] == pytest.approx(
        expected, rel=1e-3
    )


def test_kinks_that_are_denser_the_nearer() -> None:
    """Of density log(X / |x|) / X they add J (log(X / s) + (gamma + log 2) / 2) / X at width s."""
    risk = kinked(denser=True)
    local = measure_local(risk, None)
    smoothing = measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=1)
    found = find_kinks(measure_drift(risk, local, TRAINING, displacements=60), smoothing)
    size = np.sqrt(np.diag(covariance(local, TRAINING)))
    near = np.log(SPREAD / size) + 0.5 * (np.euler_gamma + np.log(2.0))
    added = np.array(JUMP) * near / SPREAD
    np.testing.assert_allclose(found.pairs, added, rtol=0.15)
    # dL / dS = 1/2 H(S); both relative to all that kinks add, along all directions.
    log2_slope = np.log(2.0) / SPREAD * (np.array(JUMP) @ size**2) / (added @ size**2)
    assert found.log2_slope == pytest.approx(log2_slope, rel=0.25)
    assert found.cost_ratio == pytest.approx(1.0 + log2_slope / (2.0 * np.log(2.0)), abs=0.05)


@pytest.mark.parametrize("members", [1, 4, 16])
@pytest.mark.parametrize("effective_runs", [1.0, 7.0])
def test_the_cost_of_kinks_is_the_integral_of_their_curvature(
    members: int, effective_runs: float
) -> None:
    """It is 1/2 H(S) dS, with H(S) = h + k + b log2(1 / w) at w of the width of one run."""
    h, k, b, size = 2.0, 0.3, 0.2, 0.1

    def curvature(s: float) -> float:
        return h + k - 0.5 * b * np.log2(s / size**2)

    runs = members * effective_runs
    expected = 0.5 * quad(curvature, 0.0, size**2 / runs)[0]
    part = 0.5 * k * size**2 / effective_runs
    cost_ratio, log2_slope = 1.0 + b / k / (2.0 * np.log(2.0)), b / k
    excess = 0.5 * (h + k) * size**2 / effective_runs
    found = Prediction(
        0.0, 0.0, 0.0, excess, 0.0, effective_runs, part * (cost_ratio - 1.0), part * log2_slope
    )
    assert found.rise(members) == pytest.approx(expected, rel=1e-7)
    spread = replace(found, nonsmooth_excess=0.0, log2_slope=0.0)
    assert spread.rise(members) == pytest.approx(excess / members, rel=1e-12)


def test_kinks_of_nothing_change_nothing() -> None:
    smoothing = smoothed(tanh_risk(), 4)
    none = Kinks(np.zeros(4), 0.0, 1.5, 0.5)
    assert smoothing.kinks == Kinks.none()
    seen = replace(smoothing, kinks=none).seen_by(TRAINING)
    before = smoothing.seen_by(TRAINING)
    np.testing.assert_array_equal(seen.pairs.values, before.pairs.values)
    np.testing.assert_array_equal(seen.draws[0].values, before.draws[0].values)
