"""Curvature and noise averaged over the weights of a training, where the averages are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from neural.bridge.config import Training
from neural.bridge.drift import descended, measure_drift
from neural.bridge.measure_smoothing import measure_descent, measure_smoothing
from neural.bridge.scatter import covariance, displacements, matched_normals
from neural.bridge.smoothing import Change, Kinks, Smoothing
from neural.curvature.local_quadratic import measure_local
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import agree

LR, SIZE, STEPS = 0.2, 4, 50
TRAINING = Training(LR, SIZE, STEPS)
SLOW = replace(TRAINING, lr=0.02)


@pytest.mark.parametrize("eigenpairs", [None, 5])
def test_averages_are_those_of_the_ends(eigenpairs: int | None) -> None:
    risk, training = tanh_risk(quick=False), SLOW
    local = measure_local(risk, eigenpairs, noise_samples=2, lanczos_steps=10)
    found = measure_smoothing(
        risk, measure_descent(risk, local, training), displacements=2, noise_displacements=3
    )
    there = found.at_descent(training)  # the scatter that displacements have
    rng, draw = np.random.default_rng([0, 4]), displacements(there, training)  # the same
    normals = matched_normals(there, training, rng, 3)
    calm = risk.weights + torch.from_numpy(descended(local, training))
    v, curvature, noise, traces = local.pairs.vectors, [], [], []
    drawn = [torch.from_numpy(draw(rng, None, normal)) for normal in normals]
    for moved in (0.0 * drawn[0], *drawn, *(-one for one in drawn)):
        place = risk.at(calm + moved)
        gradients = torch.cat(list(place.example_gradients())).numpy()
        c = np.cov(gradients, rowvar=False, ddof=0)
        curvature.append(v.T @ place.hessian().numpy() @ v)
        noise.append(v.T @ c @ v)
        traces.append(np.trace(c))
    del curvature[6], curvature[3]  # curvature is measured at two of the three
    end, noise_end, trace_end = curvature.pop(0), noise.pop(0), traces.pop(0)
    agree(found.descent[-1].curvature + np.diag(local.pairs.values), end, 1e-8)
    agree(found.descent[-1].noise + local.noise, noise_end, 1e-8)
    assert found.descent[-1].trace + local.noise_trace == pytest.approx(trace_end, rel=1e-9)
    agree(found.width.curvature + end, np.mean(curvature, axis=0), 1e-8)
    agree(found.width.noise + noise_end, np.mean(noise, axis=0), 1e-8)
    assert found.width.trace + trace_end == pytest.approx(np.mean(traces), rel=1e-9)
    assert all(np.abs(part).max() == 0.0 for part in vars(found.mean).values())
    expected = np.mean(traces) / trace_end - 1.0
    assert found.noise_growth(training) == pytest.approx(expected, rel=1e-9)
    assert found.noise_growth(replace(training, batch_size=2 * SIZE)) == pytest.approx(
        0.5 * expected, rel=1e-9
    )
    # Seen at the same scatter the local model is that of the averages.
    seen = found.seen_by(training)
    agree(np.sort(seen.pairs.values), np.linalg.eigvalsh(np.mean(curvature, axis=0)), 1e-8)
    assert seen.noise_trace == pytest.approx(np.mean(traces), rel=1e-9)
    # The slope is the same vector in the turned basis; half the batch is twice the change.
    agree(seen.pairs.vectors @ seen.slope, v @ local.slope, 1e-9)
    twice = found.seen_by(replace(training, batch_size=SIZE // 2)).pairs.values.sum() - np.trace(
        end
    )
    assert twice == pytest.approx(2.0 * np.trace(found.width.curvature), rel=1e-9)


def test_where_descent_ends_counts_as_well() -> None:
    """With third derivatives and no fourth curvature is linear in the weights."""
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.03, away=0.5)
    local = measure_local(bowl.risk, None)
    found = measure_smoothing(
        bowl.risk, measure_descent(bowl.risk, local, TRAINING), displacements=1
    )
    end, h = descended(local, TRAINING), bowl.risk.hessian().numpy()
    seen = found.seen_by(TRAINING).pairs.values
    agree(np.sort(seen), np.linalg.eigvalsh(h + bowl.third @ end), 1e-9)
    # At a lower rate descent has not come as far, whatever the batch size.
    lower = descended(local, replace(TRAINING, lr=0.1 * LR))
    part = float(end @ lower / (end @ end))
    assert 0.1 < part < 0.9
    seen = found.seen_by(Training(0.1 * LR, 9 * SIZE, STEPS)).pairs.values
    agree(np.sort(seen), np.linalg.eigvalsh(h + part * bowl.third @ end), 1e-9)


def test_the_curvature_change_part_is_half_the_change_with_the_covariance() -> None:
    risk = tanh_risk()
    local = measure_local(risk, None)
    found = measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=2)
    seen = found.seen_by(TRAINING)
    whole = seen.pairs.vectors @ covariance(seen, TRAINING) @ seen.pairs.vectors.T
    change = local.pairs.vectors @ found.width.curvature @ local.pairs.vectors.T
    expected = 0.5 * np.trace(change @ whole)
    assert found.excess_parts(TRAINING, [STEPS], seen)[0][0] == pytest.approx(expected, rel=1e-8)


def test_the_mean_of_the_scatter_counts_as_well() -> None:
    """With third derivatives and no fourth the mean curvature is that at the mean."""
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.3)
    local = measure_local(bowl.risk, None)
    drift = measure_drift(bowl.risk, local, TRAINING, displacements=40)
    found = measure_smoothing(
        bowl.risk, measure_descent(bowl.risk, local, TRAINING), drift=drift, displacements=2
    )
    v, mean = local.pairs.vectors, drift.displacement(TRAINING)
    agree(found.mean.curvature, v.T @ (bowl.third @ mean) @ v, 1e-9)
    assert np.abs(found.width.curvature).max() < 1e-9
    seen = found.seen_by(TRAINING)
    assert found.excess_parts(TRAINING, [STEPS], seen)[0][0] == pytest.approx(0.0, abs=1e-9)
    assert seen.pairs.values.sum() == pytest.approx(
        2.9 + np.einsum("iik,k->", bowl.third, mean), rel=1e-9
    )
    assert found.noise_growth(TRAINING) == pytest.approx(0.0, abs=1e-9), (
        "noise is the same everywhere"
    )


@pytest.mark.parametrize("rest", [0.0, 0.4])
def test_what_holds_the_mean_and_what_it_costs_are_exact_of_a_cubic(rest: float) -> None:
    """Where the force f has put the mean m, slope(m) = -f, and the floor is the loss there."""
    bowl, steps = Bowl((2.0, 0.7, 0.2), cubic=0.3), 4000
    training = replace(TRAINING, steps=steps)
    local = measure_local(bowl.risk, None)
    v, mean = local.pairs.vectors, np.array([0.1, -0.2, 0.3])
    start = bowl.risk.weights
    there = start + torch.from_numpy(mean)
    kinked = rest * np.eye(3)  # a curvature that no second derivative sees
    force = -v.T @ (bowl.risk.gradient(there).numpy() + kinked @ mean)
    drift = measure_drift(bowl.risk, local, training, displacements=2)
    drift = replace(drift, force_top=(force, force))
    still = Change(np.zeros((3, 3)), np.zeros((3, 3)), 0.0)
    moved = replace(still, curvature=v.T @ (bowl.third @ mean) @ v)
    kinks = Kinks(np.full(3, rest), rest) if rest else Kinks.none()
    smoothing = Smoothing(local, training, still, moved, (still,), drift, kinks)
    held = smoothing.along_mean_path(drift)
    agree(held.displacement(training), mean, 1e-9)
    rise = bowl.risk.loss(there) - bowl.risk.loss() + 0.5 * mean @ kinked @ mean
    assert held.floor(training, steps) == pytest.approx(rise, rel=1e-9)
    assert drift.floor(training, steps) != pytest.approx(rise, rel=0.02)
    # Elsewhere the force is scaled, and the curvature that it was measured with stays.
    half = held.floor(replace(training, batch_size=2 * SIZE), steps)
    assert half == pytest.approx(rise / 4.0, rel=1e-9)


def test_the_rest_of_the_force_is_held_by_kinks_as_well() -> None:
    risk = tanh_risk()
    local = measure_local(risk, 2, noise_samples=2, lanczos_steps=3)
    drift = measure_drift(risk, local, SLOW, displacements=2, lanczos_steps=3)
    still = Change(np.zeros((2, 2)), np.zeros((2, 2)), 0.0)
    kinks = Kinks(np.array([0.1, 0.2]), 0.3)
    smoothing = Smoothing(local, SLOW, still, still, (still,), drift, kinks)
    held = smoothing.along_mean_path(drift)
    for half, before in zip(held.force_rest, drift.force_rest, strict=True):
        agree(half.values, before.values + 0.3, 1e-12)
    stiffer = local.pairs.values + np.array([0.1, 0.2])
    agree(np.sort(held.local.pairs.values), np.sort(stiffer), 1e-12)


def test_noise_at_the_mean_of_the_scatter() -> None:
    risk = tanh_risk()
    local = measure_local(risk, None)
    drift = measure_drift(risk, local, SLOW, displacements=4)
    found = measure_smoothing(
        risk, measure_descent(risk, local, SLOW), drift=drift, displacements=1
    )
    v, mean = local.pairs.vectors, torch.from_numpy(drift.displacement(SLOW))
    end = risk.weights + torch.from_numpy(descended(local, SLOW))
    there = risk.at(end + mean)
    c = np.cov(torch.cat(list(there.example_gradients())).numpy(), rowvar=False, ddof=0)
    agree(found.mean.noise + found.descent[-1].noise + local.noise, v.T @ c @ v, 1e-9)
    calm = found.descent[-1].trace + local.noise_trace
    assert found.mean.trace + calm == pytest.approx(np.trace(c), rel=1e-9)
    whole = found.seen_by(SLOW).noise_trace / calm - 1.0
    assert found.noise_growth(SLOW) == pytest.approx(whole, rel=1e-9)


def test_a_scatter_that_has_not_settled_is_scaled_by_its_size() -> None:
    bowl = Bowl((2.0, 0.7, 0.2), cubic=0.3)
    local = measure_local(bowl.risk, None)
    drift = measure_drift(bowl.risk, local, TRAINING, displacements=6)
    found = measure_smoothing(
        bowl.risk, measure_descent(bowl.risk, local, TRAINING), drift=drift, displacements=1
    )

    def scales(lr: float, size: int = SIZE) -> tuple[float, float]:
        training = Training(lr, size, STEPS)
        return found.width_scale(training), found.mean_scale(training)

    assert scales(LR) == pytest.approx((1.0, 1.0), rel=1e-12)
    assert scales(LR, 4 * SIZE) == pytest.approx((0.25, 0.25), rel=1e-12)
    # So few steps at a low rate: noise adds up as lr^2 t, and its push as lr^3 t^2 / 2 and less.
    wide, far = scales(1e-3 * LR)
    there, here = (covariance(local, replace(TRAINING, lr=lr)) for lr in (LR, 1e-3 * LR))
    assert wide == pytest.approx((here * there).sum() / (there**2).sum(), rel=1e-9)
    assert wide < 1e-4
    assert far < 1e-4
    wide, far = scales(100.0)  # beyond the edge of stability
    assert wide == pytest.approx(500.0)
    assert abs(far) <= 500.0


def test_nothing_to_average_over_is_refused() -> None:
    risk = tanh_risk()
    with pytest.raises(NQMError, match="averaging_displacements must be"):
        measure_smoothing(
            risk, measure_descent(risk, measure_local(risk, None), TRAINING), displacements=0
        )


def test_a_change_that_is_too_large_turns_nothing_downwards() -> None:
    risk = tanh_risk()
    local = measure_local(risk, 5)
    assert local.pairs.values.min() > 0.0
    found = measure_smoothing(risk, measure_descent(risk, local, TRAINING), displacements=1)
    downwards = replace(found, width=replace(found.width, curvature=-np.diag(local.pairs.values)))
    assert (downwards.seen_by(replace(TRAINING, batch_size=1)).pairs.values == 0.0).all()
    agree(
        downwards.seen_by(replace(TRAINING, batch_size=2 * SIZE)).pairs.values,
        0.5 * local.pairs.values,
        1e-12,
    )
