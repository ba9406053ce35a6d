"""Slope, curvature and noise at a checkpoint, against dense matrices and literal recursions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from neural.bridge.config import Training
from neural.bridge.drift import descent
from neural.bridge.scatter import covariance, displacements
from neural.curvature.cache import Cache, fingerprint
from neural.curvature.lanczos import LanczosNodes
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Eigenpairs, leading_products
from nqm import SGD, SWA, Phase, Program, best_average, information_bound, solve
from nqm.errors import NQMError
from nqm.problems.spectra import read_problem
from tests.tiny_risks import Bowl, quadratic, scatter, slide, tanh_risk
from tests.tolerances import IDENTITY, JUMP, agree, within_error

#: The rest of a partial model is exact in the polynomials of SGD up to so many steps.
LANCZOS_STEPS = 12
PAIRS = 16


def dense(risk: EmpiricalRisk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H, C and the slope."""
    gradients = torch.cat(list(risk.example_gradients())).numpy()
    noise = np.cov(gradients, rowvar=False, ddof=0)
    return risk.hessian().numpy(), noise, risk.gradient().numpy()


def without_negative(h: np.ndarray) -> np.ndarray:
    """H with its negative curvature, which it must have, set to zero."""
    values, vectors = np.linalg.eigh(h)
    assert values[0] < 0.0
    return np.asarray(vectors * np.maximum(values, 0.0) @ vectors.T)


def partial(risk: EmpiricalRisk, noise_samples: int = 3, seed: int = 0) -> LocalQuadratic:
    """With so many pairs that Lanczos exhausts the space: they are exact."""
    assert leading_products(PAIRS) >= risk.size
    return measure_local(
        risk, PAIRS, noise_samples=noise_samples, lanczos_steps=LANCZOS_STEPS, seed=seed
    )


def test_flat_pairs_need_not_be_exact() -> None:
    """With few products the noise's loss has an error of the square of the residuals."""
    risk = tanh_risk(weight_decay=0.5)
    h, c, _ = dense(risk)
    lr, steps = 0.3, 8
    whole = 0.5 * np.trace(h @ scatter(h, c, lr, 8, steps))
    local = measure_local(risk, 8, noise_samples=40, lanczos_steps=20)
    residuals = local.pairs.residuals
    products = h @ local.pairs.vectors - local.pairs.vectors * local.pairs.values
    np.testing.assert_allclose(np.linalg.norm(products, axis=0), residuals, rtol=1e-6, atol=1e-13)
    problem = local.problem().replace(initial_mean=0.0)
    found = solve(problem, Program((Phase(SGD(), lr, steps, batch_size=8),)), at=(steps,)).loss[0]
    assert found == pytest.approx(whole, rel=0.03)  # of the draws of the noise


@pytest.mark.parametrize("complete", [True, False])
def test_nodes_have_the_traces(complete: bool) -> None:
    risk = tanh_risk()
    h, c, g = dense(risk)
    local = measure_local(risk, None) if complete else partial(risk)
    assert local.loss == risk.loss()
    assert local.examples == 40
    assert local.largest == pytest.approx(np.linalg.eigvalsh(h)[-1], rel=1e-9)
    v = local.pairs.vectors
    agree(local.noise, v.T @ c @ v, 1e-9)
    agree(local.slope, v.T @ g, 1e-9)
    assert len(local.draws) == (0 if complete else 3)
    values, variance, squared = local.points()
    assert variance.sum() == pytest.approx(np.trace(c), rel=1e-10)
    assert squared.sum() == pytest.approx(g @ g, rel=1e-10)
    assert squared @ values == pytest.approx(g @ h @ g, rel=1e-9)


def test_a_complete_model_gives_the_excess_of_the_whole_covariance() -> None:
    risk = tanh_risk(weight_decay=0.5)
    h, c, _ = dense(risk)
    assert np.linalg.eigvalsh(h)[0] > 0
    lr, batch_size, at = 0.3, 8, (1, 5, 40)
    problem = measure_local(risk, None).problem().replace(initial_mean=0.0)
    phase = Phase(SGD(), lr, at[-1], batch_size=batch_size)
    found = solve(problem, Program((phase,)), at=at).loss
    expected = [0.5 * np.trace(h @ scatter(h, c, lr, batch_size, t)) for t in at]
    agree(found, expected, JUMP)


def test_the_problem_starts_where_the_checkpoint_is() -> None:
    risk = tanh_risk(weight_decay=0.5)
    h, _, g = dense(risk)
    # At the minimum of the quadratic the loss is less by this much.
    expected = 0.5 * g @ np.linalg.solve(h, g)
    for local in (
        measure_local(risk, None),
        measure_local(risk, 4, lanczos_steps=39),
    ):
        assert local.problem().initial_loss == pytest.approx(expected, rel=1e-7)


def test_a_partial_model_gives_it_on_average() -> None:
    risk = tanh_risk(weight_decay=0.5)
    h, c, _ = dense(risk)
    lr, batch_size, steps = 0.3, 8, LANCZOS_STEPS
    local = partial(risk, noise_samples=40)
    apart = np.eye(risk.size) - local.pairs.vectors @ local.pairs.vectors.T
    rest = apart @ c @ apart
    sizes = np.array([draw.amplitudes @ draw.amplitudes for draw in local.draws])
    spread = np.sqrt(len(sizes))
    within_error(sizes.mean(), np.trace(rest), sizes.std(ddof=1) / spread)
    # Draw by draw, before they are scaled to the trace that is known.
    values = np.array([draw.values for draw in local.draws])
    squares = np.array([draw.amplitudes**2 for draw in local.draws])
    ages = sum((1.0 - lr * values) ** (2 * t) for t in range(steps))
    each = 0.5 * lr**2 / batch_size * (values * ages * squares).sum(1)
    expected = 0.5 * np.trace(h @ scatter(h, rest, lr, batch_size, steps))
    within_error(each.mean(), expected, each.std(ddof=1) / spread)
    # And together, with the stiffest directions, which are exact.
    phase = Phase(SGD(), lr, steps, batch_size=batch_size)
    problem = local.problem().replace(initial_mean=0.0)
    found = float(solve(problem, Program((phase,)), at=(steps,)).loss[0])
    whole = 0.5 * np.trace(h @ scatter(h, c, lr, batch_size, steps))
    top = whole - expected
    # What scaling to the trace leaves is the scatter of the ratio.
    error = (each / expected - sizes / np.trace(rest)).std(ddof=1) / spread
    within_error(found, top + expected, error * expected)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("lr", [0.2, 1.1])
def test_descent_is_gradient_descent_on_the_quadratic(complete: bool, lr: float) -> None:
    risk = tanh_risk()
    h, _, g = dense(risk)
    values = np.linalg.eigvalsh(h)
    assert values[0] < 0 < values[-1]
    local = measure_local(risk, None) if complete else partial(risk)
    for steps in (1, 7, LANCZOS_STEPS):
        expected = quadratic(g, h, slide(g, h, lr, steps))
        assert descent(local, Training(lr, 1, steps), steps) == pytest.approx(expected, rel=1e-8)


def test_displacements_scatter_as_the_weights_of_sgd_do() -> None:
    risk = tanh_risk()
    h, c, _ = dense(risk)
    local = measure_local(risk, None)
    lr, batch_size, steps, count = 0.4, 4, 20, 3000
    rng = np.random.default_rng(1)
    training = Training(lr, batch_size, steps)
    drawn = np.array([displacements(local, training)(rng) for _ in range(count)])
    expected = scatter(without_negative(h), c, lr, batch_size, steps)
    # The mean is known to be 0; of normal numbers Var(x y) = Var x Var y + Cov(x, y)^2.
    size = np.diag(expected)
    error = np.sqrt((np.outer(size, size) + expected**2) / count)
    within_error(drawn.T @ drawn / count, expected, error)
    within_error(drawn.mean(0), np.zeros(risk.size), np.sqrt(size / count))


@pytest.mark.parametrize("steps", [1, 2, 30, 1200])
def test_heavy_ball_scatters_as_its_own_steps_say(steps: int) -> None:
    """Weights and buffer of every direction, their joint covariance step by step."""
    risk = tanh_risk()
    h, c, _ = dense(risk)
    h = without_negative(h)
    lr, beta, batch_size = 0.3, 0.9, 4
    own, one, none = (1.0 - beta) * lr, np.eye(len(h)), np.zeros_like(h)
    step = np.block([[one - own * h, -own * beta * one], [h, beta * one]])
    noise = np.block([[own**2 * c, -own * c], [-own * c, c]]) / batch_size
    joint = np.block([[none, none], [none, none]])
    for _ in range(steps):
        joint = step @ joint @ step.T + noise
    expected = joint[: len(h), : len(h)]
    local = measure_local(risk, None)
    training = Training(own, batch_size, steps, beta)
    found = covariance(local, training)
    v = local.pairs.vectors
    agree(v @ found @ v.T, expected, 1e-9)
    cut = partial(risk)
    rng = np.random.default_rng(0)
    moved = [displacements(cut, training)(rng, 0) for _ in range(2)]
    left = [m - cut.pairs.vectors @ (cut.pairs.vectors.T @ m) for m in moved]
    agree(left[0], left[1], 1e-12)
    draw = cut.draws[0]
    along = (draw.vectors.T @ left[0]) ** 2
    only = replace(local, pairs=replace(local.pairs, values=draw.values), noise=np.eye(len(along)))
    ages = np.diag(covariance(only, training))
    agree(along, cut.draw_scale * draw.amplitudes**2 * ages, 1e-9)


def test_the_rest_of_a_displacement_has_its_trace() -> None:
    risk = tanh_risk(weight_decay=0.5)  # without negative curvature, so that Lanczos is exact
    local = partial(risk)
    lr, batch_size, steps = 0.4, 4, 6
    v = local.pairs.vectors
    rng = np.random.default_rng(2)
    training = Training(lr, batch_size, steps)
    moved = np.array([displacements(local, training)(rng) for _ in range(200)])
    rest = moved - moved @ v @ v.T
    kinds = np.unique(np.round((rest**2).sum(1), 12))
    assert len(kinds) == len(local.draws)
    h, c, _ = dense(risk)
    left = np.trace(c) - np.trace(v.T @ c @ v)
    found = sum(d.amplitudes @ d.amplitudes for d in local.draws) / len(local.draws)
    expected = []
    for draw in local.draws:
        u = draw.vectors @ draw.amplitudes
        expected.append(left / found * np.trace(scatter(h, np.outer(u, u), lr, batch_size, steps)))
    agree(kinds, np.sort(expected), 1e-8)


def test_negative_curvature_is_told_and_left_out(tmp_path: Path) -> None:
    pairs = Eigenpairs(np.array([2.0, 1.0]), np.eye(4)[:, :2], np.zeros(2))
    vectors = np.eye(4)[:, 2:]
    draw = LanczosNodes(np.array([-1.0, 0.5]), np.array([3.0, 1.0]), vectors)
    slope = LanczosNodes(np.array([-2.0, 0.5]), np.array([1.0, 2.0]), vectors)
    # Noise 1 + 3 and squared slope 4 + 1 along the pairs; the draw stands for 10 more.
    noise = np.array([[1.0, 0.7], [0.7, 3.0]])
    local = LocalQuadratic(1.0, pairs, noise, np.array([2.0, 1.0]), slope, (draw,), 14.0, 100)
    assert local.draw_scale == pytest.approx(1.0, rel=IDENTITY)
    agree(local.negative_share(), [9.0 / 14.0, 1.0 / 10.0], IDENTITY)
    problem = local.problem()
    agree(problem.curvature, [2.0, 1.0, 0.5, 0.5], IDENTITY)
    agree(problem.noise_variance, [1.0, 3.0, 1.0, 0.0], IDENTITY)
    agree(problem.initial_mean, [1.0, 1.0, 0.0, 4.0], IDENTITY)
    # One node of a draw stands for many directions, so that only expected losses are known.
    path = tmp_path / "problem.parquet"
    local.problem_table().to_parquet(path)
    for nodes in (problem, read_problem(path)):
        assert nodes.expected_losses_only
        assert np.isnan(solve(nodes, Program((Phase(SGD(), 0.1, 3),))).loss_sd).all()
    twice = replace(local, noise_trace=24.0)
    assert twice.draw_scale == pytest.approx(2.0, rel=IDENTITY)


# --- what is kept --------------------------------------------------------------------------------


def same(one: LocalQuadratic, other: LocalQuadratic) -> None:
    for a, b in zip(one.points(), other.points(), strict=True):
        agree(a, b, JUMP)
    agree(one.noise, other.noise, JUMP)
    agree(one.pairs.vectors, other.pairs.vectors, JUMP)


def refuse(*args: Any) -> NoReturn:
    raise AssertionError("computed again")


@pytest.mark.parametrize("eigenpairs", [None, 3])
def test_stages_are_kept(tmp_path: Path, eigenpairs: int | None) -> None:
    risk = tanh_risk()
    first = measure_local(risk, eigenpairs, noise_samples=2, lanczos_steps=5, cache=Cache(tmp_path))
    again = tanh_risk()
    for name in ("hessian_product", "hessian", "example_gradients", "weighted_gradient"):
        setattr(again, name, refuse)
    same(
        first,
        measure_local(again, eigenpairs, noise_samples=2, lanczos_steps=5, cache=Cache(tmp_path)),
    )


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    class InterruptionError(Exception):
        pass

    risk, done = tanh_risk(), []

    def stop(count: int) -> None:
        done.append(count)
        if list(tmp_path.glob("eigenpairs-*.npz")):
            raise InterruptionError

    with pytest.raises(InterruptionError):
        measure_local(
            risk, 3, noise_samples=4, lanczos_steps=5, cache=Cache(tmp_path), progress=stop
        )
    left: list[int] = []
    resumed = measure_local(
        risk, 3, noise_samples=4, lanczos_steps=5, cache=Cache(tmp_path), progress=left.append
    )
    assert sum(left) == 5 * 5  # for the gradient and the draws
    same(resumed, measure_local(risk, 3, noise_samples=4, lanczos_steps=5))


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    risk = tanh_risk()
    measure_local(risk, None, cache=Cache(tmp_path))
    path = next(tmp_path.glob("eigenpairs-*.npz"))
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "foreign": b"text", "empty": b""}[damage])
    with pytest.raises(NQMError, match="remove it, and run again") as told:
        measure_local(risk, None, cache=Cache(tmp_path))
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value)
    path.unlink()
    measure_local(risk, None, cache=Cache(tmp_path))


def test_the_key_is_the_content() -> None:
    key = fingerprint(tanh_risk())
    assert fingerprint(tanh_risk()) == key
    risk = tanh_risk()
    moved = risk.weights.clone()
    moved[0] += 1e-9
    others = [fingerprint(risk.at(moved)), fingerprint(tanh_risk(weight_decay=0.02))]
    x, y = risk.batches[1]
    for changed in ((x + 1e-9, y), (x, (y + 1) % 3)):
        batches = [risk.batches[0], changed]
        others.append(fingerprint(EmpiricalRisk(risk.model, batches, weight_decay=0.01)))
    others.append(fingerprint(EmpiricalRisk(risk.model, risk.batches, "head")))
    others.append(fingerprint(Bowl([1.0, 2.0]).risk))
    assert len({key, *others}) == 1 + len(others)


def test_what_cannot_be_measured_is_refused() -> None:
    risk = tanh_risk()
    x, y = risk.batches[0]
    with pytest.raises(NQMError, match="at least two examples"):
        measure_local(EmpiricalRisk(risk.model, [(x[:1], y[:1])]), None)
    with pytest.raises(NQMError, match="noise_samples must be an integer >= 1; got 0"):
        measure_local(risk, 3, noise_samples=0)
    with pytest.raises(NQMError, match="lanczos_steps must be an integer >= 1; got 0"):
        measure_local(risk, 3, lanczos_steps=0)


def test_a_complete_model_knows_how_the_loss_varies(tmp_path: Path) -> None:
    """Var of the loss after a few steps of SGD on the quadratic: 1/2 tr (HS)^2 + g'Sg."""
    risk = tanh_risk(weight_decay=0.5)
    h, c, g = dense(risk)
    local = measure_local(risk, None)
    lr, steps = 0.3, 5
    a = np.eye(len(h)) - lr * h
    s, mean = np.zeros_like(h), np.linalg.solve(h, g)
    for _ in range(steps):
        s, mean = a @ s @ a.T + lr**2 * c / 8, a @ mean
    pushed = h @ mean
    sd = np.sqrt(0.5 * np.trace(h @ s @ h @ s) + pushed @ s @ pushed)
    program = Program((Phase(SGD(), lr, steps, batch_size=8),))
    path = tmp_path / "problem.parquet"
    local.problem_table().to_parquet(path)
    for problem in (local.problem(), read_problem(path)):
        assert not problem.expected_losses_only
        agree(solve(problem, program, [steps]).loss_sd, [sd], 1e-9)


def test_the_tools_of_the_theory_take_a_measured_network(tmp_path: Path) -> None:
    """Bound 1/2 sum h / (1/s + T h^2 B / v), s = (g/h)^2; no average of a run is below it."""
    risk = tanh_risk(weight_decay=0.5)
    h, c, g = dense(risk)
    values, vectors = np.linalg.eigh(h)
    start, noise = (vectors.T @ g / values) ** 2, np.diag(vectors.T @ c @ vectors)
    expected = 0.5 * np.sum(values / (1.0 / start + 60 * 8 * values**2 / noise))
    path = tmp_path / "problem.parquet"
    measure_local(risk, None).problem_table().to_parquet(path)
    problem = read_problem(path)
    bound = information_bound(problem, 8, 60, methods="linear")
    agree(bound, expected, 1e-6)
    run = Phase(SGD(), 0.3, 60, batch_size=8)
    best = best_average(problem, run, nonnegative=True)
    swa = Program((replace(run, steps=30), replace(run, algorithm=SWA(SGD()), steps=30)))
    assert bound < best.loss < solve(problem, swa, at=[60]).loss[-1]
    assert best.loss < best.last_loss
