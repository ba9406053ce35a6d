"""Curvature and noise averaged over the scatter, where the averages are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_landscapes import Bowl, tanh_landscape
from tolerances import agree

from neural.local_model import measure
from neural.smoothing import measure_smoothing
from nqm.errors import NQMError

LR, SIZE, STEPS = 0.2, 4.0, 50


@pytest.mark.parametrize("pairs", [None, 5])
def test_averages_are_those_of_the_ends(pairs: int | None) -> None:
    landscape = tanh_landscape()
    local = measure(landscape, pairs, draws=2, products=10)
    found = measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=3)
    rng = np.random.default_rng([0, 4])  # the same displacements
    v, curvature, noise, traces = local.pairs.vectors, [], [], []
    for _ in range(3):
        moved = torch.from_numpy(local.displacement(rng, LR, SIZE, STEPS))
        for w in (landscape.weights + moved, landscape.weights - moved):
            there = landscape.at(w)
            gradients = torch.cat(list(there.example_gradients())).numpy()
            c = np.cov(gradients, rowvar=False, ddof=0)
            curvature.append(v.T @ there.hessian().numpy() @ v)
            noise.append(v.T @ c @ v)
            traces.append(np.trace(c))
    agree(found.curvature + np.diag(local.pairs.values), np.mean(curvature, axis=0), 1e-8)
    agree(found.noise + local.noise, np.mean(noise, axis=0), 1e-8)
    assert found.trace + local.noise_trace == pytest.approx(np.mean(traces), rel=1e-9)
    expected = np.mean(traces) / local.noise_trace - 1.0
    assert found.growth(LR, SIZE) == pytest.approx(expected, rel=1e-9)
    assert found.growth(LR, 2.0 * SIZE) == pytest.approx(0.5 * expected, rel=1e-9)
    # Seen at the same scatter the local model is that of the averages.
    seen = found.at(LR, SIZE)
    agree(np.sort(seen.pairs.values), np.linalg.eigvalsh(np.mean(curvature, axis=0)), 1e-8)
    assert seen.noise_trace == pytest.approx(np.mean(traces), rel=1e-9)
    # The slope is the same vector in the turned basis; half the batch is twice the change.
    agree(seen.pairs.vectors @ seen.slope, v @ local.slope, 1e-9)
    twice = found.at(LR, SIZE / 2.0).pairs.values.sum() - local.pairs.values.sum()
    assert twice == pytest.approx(2.0 * np.trace(found.curvature), rel=1e-9)


def test_the_share_is_half_the_change_with_the_scatter() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, None)
    found = measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=2)
    seen = found.at(LR, SIZE)
    np.testing.assert_array_equal(found.width, found.curvature)
    whole = seen.pairs.vectors @ seen.scatter(LR, SIZE, STEPS) @ seen.pairs.vectors.T
    change = local.pairs.vectors @ found.curvature @ local.pairs.vectors.T
    expected = 0.5 * np.trace(change @ whole)
    assert found.share(LR, SIZE, STEPS) == pytest.approx(expected, rel=1e-8)


def test_the_mean_of_the_scatter_counts_as_well() -> None:
    """With third derivatives and no fourth the mean curvature is that at the mean."""
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.3)
    local, mean = measure(bowl.landscape, None), np.array([0.3, -0.2, 0.1])
    found = measure_smoothing(bowl.landscape, local, LR, SIZE, STEPS, mean=mean, samples=2)
    v = local.pairs.vectors
    agree(found.curvature, v.T @ (bowl.third @ mean) @ v, 1e-9)
    assert np.abs(found.width).max() < 1e-9
    assert found.share(LR, SIZE, STEPS) == pytest.approx(0.0, abs=1e-9)
    there = bowl.landscape.at(bowl.landscape.weights + torch.from_numpy(mean))
    gradients = torch.cat(list(there.example_gradients())).numpy()
    moved = measure_smoothing(bowl.landscape, local, 1e-9, SIZE, STEPS, mean=mean, samples=1)
    agree(moved.noise + local.noise, v.T @ np.cov(gradients, rowvar=False, ddof=0) @ v, 1e-5)


def test_nothing_to_average_over_is_refused() -> None:
    landscape = tanh_landscape()
    with pytest.raises(NQMError, match="samples must be"):
        measure_smoothing(landscape, measure(landscape, None), LR, SIZE, STEPS, samples=0)


def test_a_change_that_is_too_large_turns_nothing_downwards() -> None:
    landscape = tanh_landscape()
    local = measure(landscape, 5)
    assert local.pairs.values.min() > 0.0
    found = measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=1)
    downwards = replace(found, curvature=-np.diag(local.pairs.values))
    assert (downwards.at(LR, SIZE / 3.0).pairs.values == 0.0).all()
    agree(downwards.at(LR, 2.0 * SIZE).pairs.values, 0.5 * local.pairs.values, 1e-12)
