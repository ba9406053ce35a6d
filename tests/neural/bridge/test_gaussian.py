"""The Gaussian of the weights in one training, against recursions with whole matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from neural.bridge.config import Training
from neural.bridge.drift import descended, measure_drift, slopes_at
from neural.bridge.gaussian import (
    WeightGaussian,
    gradients_and_products,
    measure_averages,
    measure_gaussian,
    nearest_gaussians,
)
from neural.bridge.kinks import KINKED, find_kinks
from neural.bridge.measure_smoothing import measure_descent, measure_smoothing
from neural.bridge.prediction import predict_loss
from neural.bridge.scatter import (
    covariance,
    displacements,
    largest_stable_lr,
    matched_normals,
    noise_age,
    rest_trace,
)
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from tests.tiny_risks import Bowl, scatter, slide, tanh_risk
from tests.tolerances import agree, within_error

TRAINING = Training(0.2, 4, 12)


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl((2.0, 0.7, 0.2), away=0.1, examples=60, cubic=0.3)


@pytest.fixture(scope="module")
def plain(bowl: Bowl) -> WeightGaussian:
    """With curvature and noise of the checkpoint."""
    local = measure_local(bowl.risk, None)
    return measure_gaussian(bowl.risk, local, TRAINING, displacements=6)


def dense(bowl: Bowl) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H, C and the slope."""
    gradients = torch.cat(list(bowl.risk.example_gradients())).numpy()
    h, g = bowl.risk.hessian().numpy(), bowl.risk.gradient().numpy()
    return h, np.cov(gradients, rowvar=False, ddof=0), g


def along(gaussian: WeightGaussian) -> np.ndarray:
    """The covariance in the coordinates of the weights."""
    v = gaussian.local.pairs.vectors
    return np.asarray(v @ gaussian.covariance @ v.T)


OTHERS = [
    TRAINING, replace(TRAINING, lr=0.5), replace(TRAINING, batch_size=32),
    replace(TRAINING, steps=3), Training(0.01, 2, 40),
]  # fmt: skip


@pytest.mark.parametrize("training", OTHERS, ids=str)
def test_mean_and_covariance_are_those_of_the_recursions(
    bowl: Bowl, plain: WeightGaussian, training: Training
) -> None:
    """The mean slides down slope and force, which goes as lr / B; noise adds up step by step."""
    h, c, g = dense(bowl)
    found = plain.scaled_to(training)
    assert found.training == training
    given = training.lr, training.batch_size, training.steps
    agree(along(found), scatter(h, c, *given), 1e-9)
    v, drift = plain.local.pairs.vectors, plain.drift
    force = 0.5 * v @ (drift.force_top[0] + drift.force_top[1])
    scale = (training.lr / training.batch_size) / (TRAINING.lr / TRAINING.batch_size)
    later = training.steps - round(noise_age(plain.local, training))
    pushed = slide(scale * force, h, training.lr, later)
    agree(found.mean, slide(g, h, training.lr, training.steps) + pushed, 1e-8)


def test_the_force_is_that_of_the_own_covariance(bowl: Bowl) -> None:
    """Of a cubic loss, 1/2 T:S of the covariance of the displacements that were drawn."""
    local = measure_local(bowl.risk, None)
    found = measure_gaussian(bowl.risk, local, TRAINING, displacements=4)
    rng, drawn = np.random.default_rng([0, 3]), displacements(local, TRAINING)
    halves = [matched_normals(local, TRAINING, rng, 2) for _ in range(2)]
    for half, normals in enumerate(halves):
        moved = [drawn(rng, None, normal) for normal in normals]
        mean = np.mean([np.outer(d, d) for d in moved], axis=0)
        expected = 0.5 * np.einsum("ijk,jk->i", bowl.third, mean)
        at_descent = local.pairs.vectors @ found.drift.force_top[half]
        agree(at_descent, expected, 1e-8)


def test_heavy_ball_has_a_mean_at_its_effective_rate(bowl: Bowl, plain: WeightGaussian) -> None:
    """Over long times: where slope and force are balanced."""
    h, _, g = dense(bowl)
    settled = plain.scaled_to(Training(0.02, 4, 4000, momentum=0.9))
    v, drift = plain.local.pairs.vectors, plain.drift
    force = 0.5 * v @ (drift.force_top[0] + drift.force_top[1])  # lr / B is the same
    agree(settled.mean, np.linalg.solve(h, -(g + force)), 1e-8)


def test_what_is_not_measured_is_nan(plain: WeightGaussian) -> None:
    assert np.isnan([plain.noise_growth, plain.kink_fraction]).all()
    assert plain.smoothing is None
    assert plain.local is plain.checkpoint


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_is_stable_below_the_edge(plain: WeightGaussian, momentum: float) -> None:
    """That is lr h < 2 (1 + momentum) of the stiffest direction."""
    edge = 2.0 * (1.0 + momentum) / plain.checkpoint.largest
    for part, stable in ((0.999, True), (1.001, False)):
        training = replace(TRAINING, lr=part * edge, momentum=momentum)
        assert plain.scaled_to(training).stable is stable
        assert largest_stable_lr(plain.checkpoint, training) == pytest.approx(edge, rel=1e-6)


@pytest.mark.parametrize(("eigenpairs", "kinked"), [(None, True), (4, False)])
def test_with_averages_it_is_their_drift_and_kinks_together(
    eigenpairs: int | None, kinked: bool
) -> None:
    risk, lanczos = tanh_risk(), {"lanczos_steps": 6}
    settings = lanczos | {"displacements": 4}
    local = measure_local(risk, eigenpairs, noise_samples=2, **lanczos)
    reference, training = Training(0.1, 4, 20), Training(0.2, 8, 20)
    still = measure_descent(risk, local, reference)
    averages = measure_averages(risk, still, averaging_displacements=1, **settings)
    assert averages is not None
    drift = measure_drift(risk, still.at_descent(reference), reference, **settings)
    expected = measure_smoothing(risk, still, drift=drift, displacements=1, noise_displacements=2)
    agree(averages.width.curvature, expected.width.curvature, 1e-9)
    agree(averages.mean.noise, expected.mean.noise, 1e-9)
    agree(averages.kinks.pairs, find_kinks(drift, expected).pairs, 1e-9)

    found = measure_gaussian(risk, local, training, averages, **settings)
    own = measure_drift(risk, averages.seen_by(training), training, **settings)
    smoothing = replace(averages, kinks=find_kinks(own, averages))
    if kinked:  # to this few displacements
        assert smoothing.kink_fraction() > KINKED
        at = descended(local, training) + smoothing.along_mean_path(own).displacement(training)
        again = replace(own, slopes=slopes_at(risk, own, at, displacements=4))
        smoothing = replace(averages, kinks=find_kinks(again, averages, mean_part=1.0))
    assert found.checkpoint is local
    assert found.smoothing is not None
    agree(found.smoothing.kinks.pairs, smoothing.kinks.pairs, 1e-9)
    assert found.noise_growth == pytest.approx(averages.noise_growth(training), rel=1e-12)
    assert found.kink_fraction == pytest.approx(smoothing.kink_fraction(), rel=1e-9)
    seen = smoothing.seen_by(training)
    agree(found.local.pairs.values, seen.pairs.values, 1e-9)
    agree(
        along(found), seen.pairs.vectors @ covariance(seen, training) @ seen.pairs.vectors.T, 1e-9
    )
    assert rest_trace(found.local, training) == pytest.approx(rest_trace(seen, training), rel=1e-9)
    moved = smoothing.along_mean_path(own).displacement(training)
    agree(found.mean, descended(local, training) + moved, 1e-9)
    # Scaled, it keeps what was measured, and takes the scales of the other training.
    other = replace(training, batch_size=16)
    half = found.scaled_to(other)
    assert half.drift is found.drift
    assert half.noise_growth == pytest.approx(averages.noise_growth(other), rel=1e-12)
    back = half.scaled_to(training)
    agree(back.mean, found.mean, 1e-12)
    agree(along(back), along(found), 1e-12)


def test_no_averages_if_there_is_no_displacement() -> None:
    risk = tanh_risk()
    local = measure_local(risk, None)
    still = measure_descent(risk, local, TRAINING)
    assert measure_averages(risk, still, averaging_displacements=0) is None


@pytest.mark.parametrize("eigenpairs", [None, 4])
def test_progress_is_told_of_all_there_is_to_do(eigenpairs: int | None) -> None:
    risk, told = tanh_risk(), list[int]()
    local = measure_local(risk, eigenpairs, noise_samples=1, lanczos_steps=3)
    settings = {"displacements": 5, "lanczos_steps": 3}
    measure_gaussian(risk, local, TRAINING, progress=told.append, **settings)
    assert sum(told) == gradients_and_products(local, *settings.values())


def test_between_two_trainings_both_count_by_the_logarithm_of_the_rate(
    plain: WeightGaussian,
) -> None:
    given = [
        replace(plain, training=replace(TRAINING, lr=lr), smoothing=None) for lr in (0.8, 0.1, 0.2)
    ]
    for lr, expected in (
        (0.02, {0.1: 1.0}),
        (0.1, {0.1: 1.0}),
        (0.1 * 2**0.25, {0.1: 0.75, 0.2: 0.25}),
        (0.2, {0.2: 1.0}),
        (0.4, {0.2: 0.5, 0.8: 0.5}),
        (0.8, {0.8: 1.0}),
        (0.9, {0.8: 1.0}),
    ):
        wanted = replace(TRAINING, lr=lr, steps=7)
        # Whose measurement it is can be told by the drift.
        marked = [
            replace(one, drift=replace(one.drift, training=one.training)) for one in given
        ]  # fmt: skip
        found = nearest_gaussians(marked, wanted)
        assert {one.drift.training.lr: weight for weight, one in found} == pytest.approx(expected)
        assert all(one.training == wanted for _, one in found)
        assert sum(weight for weight, _ in found) == pytest.approx(1.0, rel=1e-12)
    # Rates of heavy ball count by what they amount to.
    slow = replace(TRAINING, lr=0.04, momentum=0.9)
    assert {one.drift.training.lr: weight for weight, one in nearest_gaussians(marked, slow)} == (
        pytest.approx({0.2: 0.5, 0.8: 0.5})
    )


def test_matched_normals_have_exact_moments_where_the_loss_is() -> None:
    """Along half as many directions; those of the mean and of members' distance apart."""
    bowl = Bowl([3.0, 1.0, 0.5, 0.2, 0.1, 0.05])
    local, rng = measure_local(bowl.risk, None), np.random.default_rng(1)
    root = scipy.linalg.sqrtm(covariance(local, TRAINING))
    form = root @ np.diag(local.pairs.values) @ root
    top = np.linalg.eigh(form)[1][:, -3:]
    normals = matched_normals(local, TRAINING, rng, 6)
    agree((normals @ top).T @ (normals @ top) / 6, np.eye(3), 1e-9)
    assert np.abs((normals @ top).T @ (normals - normals @ top @ top.T)).max() < 1e-9
    many = [matched_normals(local, TRAINING, rng, 6) for _ in range(2000)]
    moments = np.array([each.T @ each / 6 for each in many])
    error = moments.std(axis=0, ddof=1) / np.sqrt(len(moments)) + 1e-9
    within_error(moments.mean(axis=0), np.eye(6), error)
    few = matched_normals(local, TRAINING, np.random.default_rng(4), 1)
    drawn = local.pairs.vectors.T @ np.random.default_rng(4).standard_normal(6)
    agree(few[0], drawn, 1e-12)


class LeastSquares:
    """Examples 1/2 (a_n' w - y_n)^2 around their minimum; noise grows with the square of w."""

    def __init__(self) -> None:
        rng = np.random.default_rng(2)
        a = rng.standard_normal((300, 3)) * np.array([1.0, 0.7, 0.4])
        self.inputs = a
        y = a @ np.ones(3) + rng.standard_normal(300)
        minimum = np.linalg.lstsq(a, y, rcond=None)[0]
        self.rest = y - a @ minimum
        rows = torch.from_numpy(np.column_stack([a, self.rest]))
        model = Linear(torch.zeros(3, dtype=torch.double))
        batches = [(rows, torch.zeros(300, dtype=torch.long))]
        self.risk = EmpiricalRisk(model, batches, loss=lambda out, _: 0.5 * out[:, 0] ** 2)

    def excess(self, training: Training) -> float:
        """1/2 tr(H S) by the exact recursion of S = E w w', for minibatches with replacement."""
        a, lr, size = self.inputs, training.lr, training.batch_size
        hessian = a.T @ a / len(a)
        c = (a * self.rest[:, None] ** 2).T @ a / len(a)
        spread = np.zeros((3, 3))
        for _ in range(training.steps):
            squares = np.einsum("ni,ij,nj->n", a, spread, a)
            own = (a * squares[:, None]).T @ a / len(a)
            mean = hessian @ spread @ hessian
            spread = spread - lr * (hessian @ spread + spread @ hessian)
            spread = spread + lr**2 * (mean + (own - mean + c) / size)
        return 0.5 * float(np.trace(hessian @ spread))


class Linear(nn.Module):
    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows[:, :-1] @ self.weights - rows[:, -1])[:, None]


@pytest.mark.parametrize("lr", [0.25, 0.35])
def test_the_next_order_of_the_noise_is_nearer_to_the_exact_loss(lr: float) -> None:
    """Of least squares, whose covariance is known exactly; the first order is off by its square."""
    problem = LeastSquares()
    local = measure_local(problem.risk, None)
    training = Training(lr, 2, 300)
    still = measure_descent(problem.risk, local, replace(training, batch_size=32))
    averages = measure_averages(problem.risk, still, displacements=16)
    exact, errors = problem.excess(training), []
    for count in (0, 1):
        found = measure_gaussian(
            problem.risk, local, training, averages, displacements=16, averaging_displacements=count
        )
        errors.append(predict_loss(found, [training.steps]).rise() / exact - 1.0)
    growth = found.noise_growth
    assert growth > 0.2
    assert -(growth**2) < errors[0] < -0.5 * growth**2
    assert abs(errors[1]) < 0.3 * growth**3


def test_where_the_scatter_has_no_bound_averages_do_not_settle() -> None:
    """Least squares below the edge of the mean weights, but beyond that of their covariance."""
    problem = LeastSquares()
    local = measure_local(problem.risk, None)
    training = Training(0.6, 1, 300)
    assert problem.excess(training) > 1e6
    still = measure_descent(problem.risk, local, training)
    averages = measure_averages(problem.risk, still, displacements=16)
    first, found = (
        measure_gaussian(
            problem.risk, local, training, averages, displacements=16, averaging_displacements=count
        )
        for count in (0, 1)
    )
    assert first.stable
    assert first.settles
    assert 0.4 < first.noise_growth < 2.0
    assert found.noise_growth == np.inf
    assert predict_loss(found, [300]) == predict_loss(first, [300])


def test_small_growth_is_not_measured_anew() -> None:
    problem = LeastSquares()
    local = measure_local(problem.risk, None)
    training = Training(0.2, 64, 300)
    still = measure_descent(problem.risk, local, training)
    averages = measure_averages(problem.risk, still, displacements=4)
    found = measure_gaussian(
        problem.risk, local, training, averages, displacements=4, averaging_displacements=1
    )
    assert found.smoothing is not None
    assert 0.0 < found.noise_growth < 0.1
    assert found.smoothing.width is averages.width
