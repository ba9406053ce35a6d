"""Curvature and noise averaged over the scatter, where the averages are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_landscapes import Bowl, tanh_landscape
from tolerances import agree

from neural.drift import descended, measure_drift
from neural.local_model import measure
from neural.smoothing import Change, Kinks, Smoothing, measure_smoothing
from nqm.errors import NQMError

LR, SIZE, STEPS = 0.2, 4.0, 50


@pytest.mark.parametrize("pairs", [None, 5])
def test_averages_are_those_of_the_ends(pairs: int | None) -> None:
    landscape, rate = tanh_landscape(quick=False), 0.02
    local = measure(landscape, pairs, draws=2, products=10)
    found = measure_smoothing(landscape, local, rate, SIZE, STEPS, samples=3)
    rng = np.random.default_rng([0, 4])  # the same displacements
    calm = landscape.weights + torch.from_numpy(descended(local, rate, STEPS))
    v, curvature, noise, traces = local.pairs.vectors, [], [], []
    drawn = [torch.from_numpy(local.displacement(rng, rate, SIZE, STEPS)) for _ in range(3)]
    for moved in (0.0 * drawn[0], *drawn, *(-one for one in drawn)):
        there = landscape.at(calm + moved)
        gradients = torch.cat(list(there.example_gradients())).numpy()
        c = np.cov(gradients, rowvar=False, ddof=0)
        curvature.append(v.T @ there.hessian().numpy() @ v)
        noise.append(v.T @ c @ v)
        traces.append(np.trace(c))
    end, noise_end, trace_end = curvature.pop(0), noise.pop(0), traces.pop(0)
    agree(found.descent.curvature + np.diag(local.pairs.values), end, 1e-8)
    agree(found.descent.noise + local.noise, noise_end, 1e-8)
    assert found.descent.trace + local.noise_trace == pytest.approx(trace_end, rel=1e-9)
    agree(found.width.curvature + end, np.mean(curvature, axis=0), 1e-8)
    agree(found.width.noise + noise_end, np.mean(noise, axis=0), 1e-8)
    assert found.width.trace + trace_end == pytest.approx(np.mean(traces), rel=1e-9)
    assert all(np.abs(part).max() == 0.0 for part in vars(found.mean).values())
    expected = np.mean(traces) / trace_end - 1.0
    assert found.growth(rate, SIZE) == pytest.approx(expected, rel=1e-9)
    assert found.growth(rate, 2.0 * SIZE) == pytest.approx(0.5 * expected, rel=1e-9)
    # Seen at the same scatter the local model is that of the averages.
    seen = found.at(rate, SIZE)
    agree(np.sort(seen.pairs.values), np.linalg.eigvalsh(np.mean(curvature, axis=0)), 1e-8)
    assert seen.noise_trace == pytest.approx(np.mean(traces), rel=1e-9)
    # The slope is the same vector in the turned basis; half the batch is twice the change.
    agree(seen.pairs.vectors @ seen.slope, v @ local.slope, 1e-9)
    twice = found.at(rate, SIZE / 2.0).pairs.values.sum() - np.trace(end)
    assert twice == pytest.approx(2.0 * np.trace(found.width.curvature), rel=1e-9)


def test_where_descent_ends_counts_as_well() -> None:
    """With third derivatives and no fourth curvature is linear in the weights."""
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.03, away=0.5)
    local = measure(bowl.landscape, None)
    found = measure_smoothing(bowl.landscape, local, LR, SIZE, STEPS, samples=1)
    end, h = descended(local, LR, STEPS), bowl.landscape.hessian().numpy()
    seen = found.at(LR, SIZE).pairs.values
    agree(np.sort(seen), np.linalg.eigvalsh(h + bowl.third @ end), 1e-9)
    # At a lower rate descent has not come as far, whatever the batch size.
    lower = descended(local, 0.1 * LR, STEPS)
    part = float(end @ lower / (end @ end))
    assert 0.1 < part < 0.9
    seen = found.at(0.1 * LR, 9.0 * SIZE).pairs.values
    agree(np.sort(seen), np.linalg.eigvalsh(h + part * bowl.third @ end), 1e-9)


def test_the_share_is_half_the_change_with_the_scatter() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, None)
    found = measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=2)
    seen = found.at(LR, SIZE)
    whole = seen.pairs.vectors @ seen.scatter(LR, SIZE, STEPS) @ seen.pairs.vectors.T
    change = local.pairs.vectors @ found.width.curvature @ local.pairs.vectors.T
    expected = 0.5 * np.trace(change @ whole)
    assert found.share(LR, SIZE, STEPS) == pytest.approx(expected, rel=1e-8)


def test_the_mean_of_the_scatter_counts_as_well() -> None:
    """With third derivatives and no fourth the mean curvature is that at the mean."""
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.3)
    local = measure(bowl.landscape, None)
    drift = measure_drift(bowl.landscape, local, LR, SIZE, STEPS, samples=40)
    found = measure_smoothing(bowl.landscape, local, LR, SIZE, STEPS, drift=drift, samples=2)
    v, mean = local.pairs.vectors, drift.moved(LR, SIZE, STEPS)
    agree(found.mean.curvature, v.T @ (bowl.third @ mean) @ v, 1e-9)
    assert np.abs(found.width.curvature).max() < 1e-9
    assert found.share(LR, SIZE, STEPS) == pytest.approx(0.0, abs=1e-9)
    seen = found.at(LR, SIZE).pairs.values.sum()
    assert seen == pytest.approx(2.9 + np.einsum("iik,k->", bowl.third, mean), rel=1e-9)
    assert found.growth(LR, SIZE) == pytest.approx(0.0, abs=1e-9), "noise is the same everywhere"


@pytest.mark.parametrize("rest", [0.0, 0.4])
def test_what_holds_the_mean_and_what_it_costs_are_exact_of_a_cubic(rest: float) -> None:
    """Where the force f has put the mean m, slope(m) = -f, and the floor is the loss there."""
    bowl, steps = Bowl((2.0, 0.7, 0.2), cubic=0.3), 4000
    local = measure(bowl.landscape, None)
    v, mean = local.pairs.vectors, np.array([0.1, -0.2, 0.3])
    start = bowl.landscape.weights
    there = start + torch.from_numpy(mean)
    kinked = rest * np.eye(3)  # a curvature that no second derivative sees
    force = -v.T @ (bowl.landscape.gradient(there).numpy() + kinked @ mean)
    drift = measure_drift(bowl.landscape, local, LR, SIZE, steps, samples=2)
    drift = replace(drift, top=(force, force))
    still = Change(np.zeros((3, 3)), np.zeros((3, 3)), 0.0)
    moved = replace(still, curvature=v.T @ (bowl.third @ mean) @ v)
    kinks = Kinks(np.full(3, rest), rest) if rest else Kinks.none()
    smoothing = Smoothing(local, LR, SIZE, steps, still, moved, still, drift, kinks)
    held = smoothing.hold(drift)
    agree(held.moved(LR, SIZE, steps), mean, 1e-9)
    rise = bowl.landscape.loss(there) - bowl.landscape.loss() + 0.5 * mean @ kinked @ mean
    assert held.floor(LR, SIZE, steps) == pytest.approx(rise, rel=1e-9)
    assert drift.floor(LR, SIZE, steps) != pytest.approx(rise, rel=0.02)
    # Elsewhere the force is scaled, and the curvature that it was measured with stays.
    half = held.floor(LR, 2.0 * SIZE, steps)
    assert half == pytest.approx(rise / 4.0, rel=1e-9)


def test_the_rest_of_the_force_is_held_by_kinks_as_well() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, 2, draws=2, products=3)
    drift = measure_drift(landscape, local, 0.02, SIZE, STEPS, samples=2, products=3)
    still = Change(np.zeros((2, 2)), np.zeros((2, 2)), 0.0)
    kinks = Kinks(np.array([0.1, 0.2]), 0.3)
    smoothing = Smoothing(local, 0.02, SIZE, STEPS, still, still, still, drift, kinks)
    held = smoothing.hold(drift)
    for half, before in zip(held.rest, drift.rest, strict=True):
        agree(half.values, before.values + 0.3, 1e-12)
    stiffer = local.pairs.values + np.array([0.1, 0.2])
    agree(np.sort(held.local.pairs.values), np.sort(stiffer), 1e-12)


def test_noise_at_the_mean_of_the_scatter() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, None)
    drift = measure_drift(landscape, local, 0.02, SIZE, STEPS, samples=4)
    found = measure_smoothing(landscape, local, 0.02, SIZE, STEPS, drift=drift, samples=1)
    v, mean = local.pairs.vectors, torch.from_numpy(drift.moved(0.02, SIZE, STEPS))
    end = landscape.weights + torch.from_numpy(descended(local, 0.02, STEPS))
    there = landscape.at(end + mean)
    c = np.cov(torch.cat(list(there.example_gradients())).numpy(), rowvar=False, ddof=0)
    agree(found.mean.noise + found.descent.noise + local.noise, v.T @ c @ v, 1e-9)
    calm = found.descent.trace + local.noise_trace
    assert found.mean.trace + calm == pytest.approx(np.trace(c), rel=1e-9)
    whole = found.at(0.02, SIZE).noise_trace / calm - 1.0
    assert found.growth(0.02, SIZE) == pytest.approx(whole, rel=1e-9)


def test_a_scatter_that_has_not_settled_is_scaled_by_its_size() -> None:
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.3)
    local = measure(bowl.landscape, None)
    drift = measure_drift(bowl.landscape, local, LR, SIZE, STEPS, samples=6)
    found = measure_smoothing(bowl.landscape, local, LR, SIZE, STEPS, drift=drift, samples=1)
    assert found.scales(LR, SIZE) == pytest.approx((1.0, 1.0), rel=1e-12)
    assert found.scales(LR, 4.0 * SIZE) == pytest.approx((0.25, 0.25), rel=1e-12)
    # So few steps at a low rate: noise adds up as lr^2 t, and its push as lr^3 t^2 / 2 and less.
    wide, far = found.scales(1e-3 * LR, SIZE)
    there, here = (local.scatter(lr, SIZE, STEPS) for lr in (LR, 1e-3 * LR))
    assert wide == pytest.approx((here * there).sum() / (there**2).sum(), rel=1e-9)
    assert wide < 1e-4
    assert far < 1e-4
    beyond = found.scales(100.0, SIZE)  # the edge of stability
    assert np.abs(beyond) == pytest.approx((500.0, 500.0))


def test_nothing_to_average_over_is_refused() -> None:
    landscape = tanh_landscape()
    with pytest.raises(NQMError, match="samples must be"):
        measure_smoothing(landscape, measure(landscape, None), LR, SIZE, STEPS, samples=0)


def test_a_change_that_is_too_large_turns_nothing_downwards() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, 5)
    assert local.pairs.values.min() > 0.0
    found = measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=1)
    downwards = replace(found, width=replace(found.width, curvature=-np.diag(local.pairs.values)))
    assert (downwards.at(LR, SIZE / 3.0).pairs.values == 0.0).all()
    agree(downwards.at(LR, 2.0 * SIZE).pairs.values, 0.5 * local.pairs.values, 1e-12)
