"""The push of the noise on the mean weights, where third derivatives are known exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neural.bridge.config import Training
from neural.bridge.drift import Drift, Slopes, descended, descent, measure_drift
from neural.bridge.response import response
from neural.bridge.scatter import noise_age
from neural.curvature.cache import Cache
from neural.curvature.lanczos import LanczosNodes
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Eigenpairs
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, Plain, quadratic, scatter, slide
from tests.tolerances import IDENTITY, JUMP, agree, within_error

CURVATURE = (3.0, 1.0, 0.4, 0.2, 0.05)
LR, SIZE, STEPS = 0.2, 8, 12
TRAINING = Training(LR, SIZE, STEPS)


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl(CURVATURE, away=0.1, examples=60, cubic=1.0)


def noise(bowl: Bowl) -> np.ndarray:
    return np.cov(torch.cat(list(bowl.risk.example_gradients())).numpy(), rowvar=False, ddof=0)


def force(drift: Drift, half: int) -> np.ndarray:
    """One of the two measured forces, put together again."""
    along = drift.local.pairs.vectors @ drift.force_top[half]
    return np.asarray(along + drift.force_rest[half].apply(np.ones_like))


def test_the_bowl_is_what_it_says(bowl: Bowl) -> None:
    w = bowl.risk.weights.numpy()
    agree(bowl.risk.gradient(), bowl.gradient(), IDENTITY)
    curvature = bowl.hessian + np.einsum("ijk,k->ij", bowl.third, w)
    agree(bowl.risk.hessian(), curvature, IDENTITY)
    agree(noise(bowl), bowl.noise, JUMP)


def test_the_force_is_half_the_third_derivatives_with_the_scatter(
    bowl: Bowl, monkeypatch: pytest.MonkeyPatch
) -> None:
    h, count = bowl.risk.hessian().numpy(), 1000
    local = measure_local(bowl.risk, None)

    def quicker(w: Tensor) -> tuple[float, Tensor]:  # the same slope; losses are not looked at
        return 0.0, bowl.gradient(w)

    monkeypatch.setattr(bowl.risk, "loss_and_gradient", quicker)
    drift = measure_drift(bowl.risk, local, TRAINING, displacements=count)
    covariance = scatter(h, noise(bowl), LR, SIZE, STEPS)
    expected = 0.5 * np.einsum("ijk,jk->i", bowl.third, covariance)
    # Of a normal d, Var(d' A d) = 2 tr(A S A S); here A is half of a slice of T.
    turned = 0.5 * bowl.third @ covariance
    error = np.sqrt(2.0 * np.einsum("ijk,ikj->i", turned, turned) / (count / 2))
    for half in (0, 1):
        within_error(force(drift, half), expected, error)
    assert (np.abs(expected) > 5.0 * error).any()
    assert not np.array_equal(drift.force_top[0], drift.force_top[1])


@pytest.mark.parametrize("eigenpairs", [None, 2])
@pytest.mark.parametrize(("lr", "size", "steps"), [(LR, SIZE, STEPS), (0.5, 2, 3), (0.05, 8, 40)])
def test_the_mean_moves_as_gradient_descent_with_a_force_that_begins_later(
    bowl: Bowl, eigenpairs: int | None, lr: float, size: int, steps: int
) -> None:
    g, h = bowl.risk.gradient().numpy(), bowl.risk.hessian().numpy()
    local = measure_local(bowl.risk, eigenpairs, noise_samples=4)
    drift = measure_drift(bowl.risk, local, TRAINING, displacements=6)
    training, scale = Training(lr, size, steps), (lr / size) / (LR / SIZE)
    later = steps - round(noise_age(local, training))
    pushed = [slide(scale * force(drift, half), h, lr, later) for half in (0, 1)]
    assert drift.floor(training, steps) == pytest.approx(0.5 * pushed[0] @ h @ pushed[1], rel=1e-8)
    # m is linear in slope and force: what both together do, less what each does.
    still, mean = slide(g, h, lr, steps), 0.5 * (pushed[0] + pushed[1])
    together = quadratic(g, h, still + mean) - quadratic(g, h, still)
    expected = together - 0.5 * mean @ h @ mean
    assert drift.cross(training, steps) == pytest.approx(expected, rel=1e-8)
    agree(drift.displacement(training), mean, 1e-7)


def test_the_halves_share_no_draw(bowl: Bowl) -> None:
    """Else the product of the two would keep the bias of a square."""
    local = measure_local(bowl.risk, 2, noise_samples=2)
    whole = measure_drift(bowl.risk, local, TRAINING, displacements=8)
    top = float(np.trace(local.noise))
    sizes = [float(draw.amplitudes @ draw.amplitudes) for draw in local.draws]
    empty = replace(local.draws[0], amplitudes=0.0 * local.draws[0].amplitudes)
    for half in (0, 1):
        # Without the other half's draw, and with as much less of noise, nothing changes for it.
        draws = (local.draws[0], empty) if half == 0 else (empty, local.draws[1])
        left = (local.noise_trace - top) * sizes[half] / sum(sizes)
        cut = replace(local, draws=draws, noise_trace=top + left)
        found = measure_drift(bowl.risk, cut, TRAINING, displacements=8)
        agree(force(found, half), force(whole, half), 1e-9)
        assert not np.allclose(force(found, 1 - half), force(whole, 1 - half), rtol=1e-3)


def test_a_kink_at_the_checkpoint_pushes_nothing() -> None:
    """Of |w + 1e-9| the slope is 1 at the checkpoint, and on the average over any scatter 0."""

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        off, w = output.unbind(1)
        return (0.5 * w**2 + 0.3 * (off - 1e-9).abs()).sum(1)

    x = torch.zeros(8, 3, dtype=torch.double)
    model = Plain(x[0, :1].clone(), x[0, 1:].clone())
    risk = EmpiricalRisk(model, [(x, torch.zeros(8, dtype=torch.long))], loss=loss)
    assert risk.gradient().abs().min() == pytest.approx(0.3)
    pairs = Eigenpairs(np.ones(3), np.eye(3), np.zeros(3))
    rest = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((3, 0)))
    local = LocalQuadratic(0.0, pairs, np.eye(3), np.zeros(3), rest, (), 3.0, 8)
    drift = measure_drift(risk, local, TRAINING, displacements=4)
    assert max(np.abs(force(drift, half)).max() for half in (0, 1)) < 1e-12


def test_a_quadratic_has_no_drift() -> None:
    risk = Bowl(CURVATURE, away=0.3).risk
    training = replace(TRAINING, steps=500)
    drift = measure_drift(risk, measure_local(risk, 2), training)
    assert abs(drift.floor(training, 500)) < 1e-25
    assert abs(drift.cross(training, 500)) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_the_age_of_the_noise_is_the_mean_over_a_literal_scatter(momentum: float) -> None:
    h, v, steps, lr = np.array([2.0, 0.3, 1e-9]), np.array([0.5, 1.0, 1e8]), 40, 0.1
    pairs = Eigenpairs(h, np.eye(3), np.zeros(3))
    empty = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((3, 0)))
    local = LocalQuadratic(0.0, pairs, np.diag(v), np.zeros(3), empty, (), float(v.sum()), 9)
    before, now, loss = np.zeros(3), np.full(3, lr), [0.0]
    for _ in range(steps):
        loss.append(loss[-1] + h * v @ now**2)
        before, now = now, (1.0 + momentum - lr * h) * now - momentum * before
    expected = np.sum(1.0 - np.array(loss[:-1]) / loss[-1])
    training = Training(lr, SIZE, steps, momentum)
    assert noise_age(local, training) == pytest.approx(expected, rel=1e-9)
    assert noise_age(local, replace(training, lr=50.0, steps=5000)) == 0.0  # unstable


def test_the_mean_moves_as_the_scatter_builds_up() -> None:
    """Beside the mean's own recursion with the force 1/2 tr(H S(s)) after s steps."""
    h, training = np.array([2.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001]), Training(0.3, SIZE, 100)
    empty = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((8, 0)))
    pairs = Eigenpairs(h, np.eye(8), np.zeros(8))
    local = LocalQuadratic(0.0, pairs, np.diag(h), np.zeros(8), empty, (), float(h.sum()), 9)
    mean, variance, shrink = np.zeros(8), np.zeros(8), 1.0 - training.lr * h
    for _ in range(training.steps):
        mean = shrink * mean - training.lr * 0.5 * h @ variance
        variance = shrink**2 * variance + training.lr**2 / SIZE * h
    final = np.full(8, 0.5 * h @ variance)
    slopes = Slopes(np.zeros((0, 8)), np.zeros((0, 8)), np.zeros(3), np.zeros(2))
    drift = Drift(local, training, (final, final), (empty, empty), slopes)
    error = np.linalg.norm(drift.displacement(training) - mean)
    assert error < 0.02 * np.linalg.norm(mean)
    at_once = -response(training, 100)(h) * final
    assert np.linalg.norm(at_once - mean) > 3.0 * error


@pytest.mark.parametrize("eigenpairs", [None, 2])
def test_where_descent_ends(bowl: Bowl, eigenpairs: int | None) -> None:
    g, h = bowl.risk.gradient().numpy(), bowl.risk.hessian().numpy()
    local = measure_local(bowl.risk, eigenpairs)
    agree(descended(local, TRAINING), slide(g, h, LR, STEPS), 1e-7)
    # A quadratic that is bent downwards falls for ever, a loss does not.
    downwards = replace(local, pairs=replace(local.pairs, values=-local.pairs.values))
    along = local.pairs.vectors.T @ descended(downwards, TRAINING)
    agree(along, -LR * STEPS * local.slope, 1e-9)
    # Far beyond what plain descent stands, as for heavy ball's effective rates, it has settled.
    steep = 3.0 / local.pairs.values.min()
    along = local.pairs.vectors.T @ descended(local, Training(steep, SIZE, 5000))
    agree(along, -local.slope / local.pairs.values, 1e-9)


@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_descent_at_every_curvature(lr: float) -> None:
    """Flat, nearly flat, bent down, reached in one step, jumped over, and unstable."""
    u = np.array([2.2, 1.7, 1.0, 0.3, 1e-6, 1e-12, 1e-15, 0.0, -1e-13, -0.1])
    pairs = Eigenpairs(u / lr, np.eye(len(u)), np.zeros(len(u)))
    empty = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((len(u), 0)))
    for one, h in enumerate(pairs.values):
        g = 2.0 * np.eye(len(u))[one]
        local = LocalQuadratic(0.0, pairs, np.eye(len(u)), g, empty, (), float(len(u)), 9)
        for steps in (1, 2, 5, 30):
            expected = quadratic(
                g, np.diag(pairs.values), slide(g, np.diag(pairs.values), lr, steps)
            )
            # 1 - (1 - u)^t loses digits at small u.
            assert descent(local, Training(lr, SIZE, steps), steps) == pytest.approx(
                expected, rel=1e-7
            ), (h, steps)


def test_the_measurement_is_kept(bowl: Bowl, tmp_path: Path) -> None:
    local = measure_local(bowl.risk, 2)
    told: list[int] = []

    def drift(**changes: Any) -> Drift:
        return measure_drift(
            bowl.risk, local, replace(TRAINING, **changes), displacements=4,
            cache=Cache(tmp_path), progress=told.append,
        )  # fmt: skip

    first = drift()
    assert sum(told) == 4 * 4 + 2 * 3 * 2, "four gradients, three products of twice their work"
    told.clear()
    again = drift()
    assert not told
    for half in (0, 1):
        agree(force(again, half), force(first, half), IDENTITY)
    for changes in ({"lr": 0.1}, {"batch_size": 4}, {"steps": 13}, {"momentum": 0.1}):
        drift(**changes)
        assert sum(told) == 4 * 4 + 2 * 3 * 2, "four gradients, three products of twice their work"
        told.clear()


def test_two_displacements_are_needed(bowl: Bowl) -> None:
    local = measure_local(bowl.risk, None)
    with pytest.raises(NQMError, match="displacements must be an integer >= 2; got 1"):
        measure_drift(bowl.risk, local, TRAINING, displacements=1)
