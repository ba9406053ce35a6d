"""The problem: its conversions against dense linear algebra, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

import nqm
from nqm import SGD, Adam, HeavyBall, LatePhase, MultiplicativeLatePhase, NQMError, Problem
from nqm.problems.quadrature import condense
from nqm.problems.spectra import harmonic
from nqm.runs.config import Run
from tests import literal
from tests.tolerances import IDENTITY, agree, agree_each


def random_covariance(rng: np.random.Generator, size: int) -> np.ndarray:
    root = rng.standard_normal((size, size))
    return root @ root.T / size


@pytest.fixture
def matrices() -> dict[str, np.ndarray]:
    """Hessian, noise and start that share no eigenvectors."""
    rng = np.random.default_rng(0)
    h, c, start = (random_covariance(rng, 4) for _ in range(3))
    assert np.abs(h @ c - c @ h).max() > 0.05  # they do not commute
    return {"hessian": h, "noise_covariance": c, "initial_covariance": start}


@pytest.mark.parametrize("lr", [0.05, 0.4])
def test_dense_matrices_steady_state(matrices, lr):
    """SGD in the original basis: Sigma = A Sigma A' + lr^2 C / B, loss 1/2 tr(H Sigma)."""
    h, c = matrices["hessian"], matrices["noise_covariance"]
    sigma = solve_discrete_lyapunov(np.eye(4) - lr * h, lr**2 * c / 3)
    phase = nqm.constant(SGD(), lr, 1, batch_size=3).phases[0]
    found = nqm.steady(Problem.from_matrices(h, c), phase)
    agree_each(found.loss, 0.5 * np.trace(h @ sigma), 1e-11)


def test_dense_matrices_transient(matrices):
    """Mean and covariance stepped in the original basis, with heavy ball."""
    h, c, start = matrices.values()
    lr, mu, mean = 0.2, 0.7, np.array([1.0, -2.0, 0.5, 0.0])
    eye, zero = np.eye(4), np.zeros((4, 4))
    a = np.block([[eye - lr * h, -lr * mu * eye], [h, mu * eye]])
    push = np.vstack([-lr * eye, eye])
    m, s = np.concatenate([mean, np.zeros(4)]), np.block([[start, zero], [zero, zero]])
    quiet = s
    problem = Problem.from_matrices(h, c, initial_mean=mean, initial_covariance=start)
    result = nqm.solve(problem, nqm.constant(HeavyBall(mu), lr, 20, batch_size=2), range(21))
    for t in range(21):
        second = s[:4, :4] + np.outer(m[:4], m[:4])
        agree_each(result.loss[t], 0.5 * np.trace(h @ second), 1e-11)
        still = quiet[:4, :4] + np.outer(m[:4], m[:4])
        agree_each(result.bias[t], 0.5 * np.trace(h @ still), 1e-11)
        m, s, quiet = a @ m, a @ s @ a.T + push @ c @ push.T / 2, a @ quiet @ a.T


def test_dense_matrices_keep_norms_and_order(matrices):
    h, c, start = matrices.values()
    minimum = np.array([3.0, 1.0, -1.0, 2.0])
    problem = Problem.from_matrices(h, c, initial_covariance=start, minimum=minimum)
    agree_each(problem.curvature, np.linalg.eigvalsh(h)[::-1], 1e-12)
    agree_each(problem.noise_variance.sum(), np.trace(c), IDENTITY)
    agree_each(problem.initial_variance.sum(), np.trace(start), IDENTITY)
    agree_each(np.sum(problem.minimum**2), np.sum(minimum**2), IDENTITY)
    assert np.all(Problem.from_matrices(h, c).initial_variance == pytest.approx(1.0))


def test_noise_on_the_minimum():
    """L = 1/2 h (x + e)^2, e ~ N(0, s2): gradient noise h e, so v = h^2 s2; constant h s2 / 2."""
    h, s2 = np.array([1.0, 0.25]), np.array([0.5, 8.0])
    problem = Problem.from_minimum_noise(h, s2, initial_mean=1.0, multiplicity=[1.0, 3.0])
    agree_each(problem.noise_variance, [0.5, 0.5], IDENTITY)
    assert problem.irreducible_loss == pytest.approx(0.5 * (0.5 + 3 * 0.25 * 8.0), rel=IDENTITY)
    assert np.array_equal(problem.initial_mean, [1.0, 1.0])
    # Monte Carlo of the noisy loss itself: its gradient h (x + e) has that variance about h x.
    e = np.sqrt(s2) * np.random.default_rng(0).standard_normal((200_000, 2))
    error = np.sqrt(2 / 200_000)  # of a variance, relative
    assert np.all(np.abs((h * e).var(axis=0) / problem.noise_variance - 1) < 4.5 * error)


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    """Correlated features with heteroscedastic residuals, one column empty and one a copy."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 3))
    y = x @ [1.0, -1.0, 0.5] + rng.standard_normal(60) * (1 + np.abs(x[:, 0]))
    return np.column_stack([x, np.zeros(60), x[:, 0]]), y


def test_linear_regression_is_measured_directly(data):
    x, y = data
    start = np.array([0.5, 0.0, -1.0, 2.0, 0.0])
    problem = Problem.from_linear_regression(x, y, start=start)
    hessian = x.T @ x / 60
    best = np.linalg.lstsq(x, y, rcond=None)[0]
    residual = y - x @ best
    assert problem.directions == 3  # the empty column and the copy cannot change the loss
    eigenvalues, basis = np.linalg.eigh(hessian)
    agree_each(problem.curvature, eigenvalues[:-4:-1], 1e-11)
    gradients = -x * residual[:, None]  # of each example at the minimum
    assert np.abs(gradients.mean(axis=0)).max() < 1e-12
    covariance = gradients.T @ gradients / 60
    expected = np.einsum("ij,ik,kj->j", basis, covariance, basis)[:-4:-1]
    agree_each(problem.noise_variance, expected, 1e-10)
    total = 0.5 * np.mean((x @ start - y) ** 2)
    assert problem.initial_loss + problem.irreducible_loss == pytest.approx(total, rel=1e-12)
    assert problem.irreducible_loss == pytest.approx(0.5 * np.mean(residual**2), rel=1e-12)


def test_linear_regression_full_batch_descent(data):
    """Gradient descent on the data themselves follows the noiseless problem step by step."""
    x, y = data
    problem = Problem.from_linear_regression(x, y).replace(noise_variance=0.0)
    lr = 0.5 / problem.curvature.max()
    result = nqm.solve(problem, nqm.constant(SGD(), lr, 30), range(31))
    w = np.zeros(5)
    for t in range(31):
        loss = 0.5 * np.mean((x @ w - y) ** 2) - problem.irreducible_loss
        assert result.loss[t] == pytest.approx(loss, rel=1e-10)
        w = w - lr * x.T @ (x @ w - y) / 60


@pytest.mark.parametrize(
    "algorithm", [SGD(), HeavyBall(0.8), LatePhase(3, spread=0.0, gamma="mean")]
)
def test_preconditioning_leaves_losses(algorithm, problem):
    """The change y = x / sqrt(p) turns SGD with gradients p g into plain SGD on (p h, p v)."""
    p = np.array([0.5, 2.0, 30.0])
    changed = problem.precondition(p)
    assert changed.initial_loss == pytest.approx(problem.initial_loss, rel=IDENTITY)
    moved = problem.replace(minimum=[1.0, -2.0, 0.5]).precondition(p)
    agree_each(moved.minimum * np.sqrt(p), [1.0, -2.0, 0.5], IDENTITY)  # a position, as x is
    if isinstance(algorithm, SGD):
        # Independently: x' = x - lr p (h x + e) is SGD with (p h, p^2 v) in x itself.
        h, v = problem.curvature, problem.noise_variance
        s0 = problem.initial_mean**2 + problem.initial_variance
        moment = literal.sgd_moment(p * h, p**2 * v, 0.3, 1, s0, 17)
        result = nqm.solve(changed, nqm.constant(algorithm, 0.3, 17), [17])
        agree_each(result.loss, [0.5 * h @ moment], IDENTITY)
    twice = changed.precondition(1 / p)
    a = nqm.solve(twice, nqm.constant(algorithm, 0.1, 9))
    b = nqm.solve(problem, nqm.constant(algorithm, 0.1, 9))
    agree_each(a.loss, b.loss, 1e-11)


vectors = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*(
        st.lists(values, min_size=n, max_size=n)
        for values in (st.one_of(st.just(0.0), st.floats(1e-6, 10)), st.floats(0, 10),
                       st.floats(0.1, 100), st.floats(-3, 3), st.floats(0, 3))
    ))
)  # fmt: skip


@given(vectors, st.integers(1, 12))
def test_binning_keeps_traces_and_initial_loss(fields, bins):
    problem = Problem(*fields)
    merged = problem.binned(bins)
    assert merged.directions <= min(problem.directions, bins + 1)  # flat directions stay apart
    for name in ("curvature", "noise_variance"):
        before = problem.multiplicity @ getattr(problem, name)
        agree(merged.multiplicity @ getattr(merged, name), before, 1e-11)
    agree(merged.multiplicity.sum(), problem.multiplicity.sum(), IDENTITY)
    agree(merged.initial_loss, problem.initial_loss, 1e-11)
    assert np.count_nonzero(merged.curvature == 0) == np.any(problem.curvature == 0)


def test_binned_curves_approach_the_curve():
    """The loss of harmonic curvature in 100 bins, to a quarter per cent of the closed form."""
    h = 1.0 / np.arange(1, 2001)
    problem = Problem(h, h, initial_mean=0.0)
    for steps in (10, 100, 1000, 10_000):
        exact = 0.5 * h @ literal.sgd_moment(h, h, 0.5, 16, 1.0, steps)
        result = nqm.solve(problem.binned(100), nqm.constant(SGD(), 0.5, steps, batch_size=16))
        assert result.loss[-1] == pytest.approx(exact, rel=2.5e-3)


def test_expanded_writes_every_direction_out():
    problem = Problem([1.0, 0.1], [2.0, 3.0], [2.0, 3.0], [1.0, -1.0], 0.5, 4.0)
    whole = problem.expanded()
    assert whole.curvature.tolist() == [1.0, 1.0, 0.1, 0.1, 0.1]
    assert whole.initial_mean.tolist() == [1.0, 1.0, -1.0, -1.0, -1.0]
    assert whole.multiplicity.tolist() == [1.0] * 5
    a = nqm.solve(problem, nqm.constant(SGD(), 0.1, 9))
    b = nqm.solve(whole, nqm.constant(SGD(), 0.1, 9))
    for name in ("loss", "bias", "loss_sd"):
        agree_each(getattr(a, name), getattr(b, name), IDENTITY)
    with pytest.raises(NQMError, match="multiplicity"):
        problem.replace(multiplicity=1.5).expanded()


LINEAR = nqm.constant(SGD(), 0.1, 3)


def nodes() -> dict[str, Problem]:
    """Problems whose entries stand for directions that they do not hold."""
    h = harmonic(100)
    moved = Problem(h, h, initial_mean=1.0, initial_variance=0.0)
    condensed = condense(moved)
    return {
        "condensed": condensed,
        "a mean in bins": moved.binned(20),
        "preconditioned": condensed.precondition(np.full(condensed.directions, 0.5)),
        "condensed in bins": condense(Problem(h, h)).binned(5),
    }


@pytest.mark.parametrize("name", nodes())
def test_nodes_have_expected_losses_and_no_distribution(name):
    """Whatever needs more than a sum over the entries is refused."""
    problem = nodes()[name]
    assert problem.expected_losses_only
    exact, drawn = nqm.solve(problem, LINEAR), nqm.sample(problem, LINEAR, replicas=4)
    for result in (exact, drawn):
        assert np.isfinite(result.loss).all()
        assert np.isnan(result.loss_sd).all()
        assert result.table()["loss_sd"].isna().all()
        with pytest.raises(NQMError, match=r"^quantiles|LossDistribution: the entries .* nodes"):
            result.quantiles((0.5,))
    soup = nqm.Soup.of_runs(problem, [LINEAR, LINEAR])
    forbidden = {
        "LossDistribution": lambda: nqm.steady(problem, LINEAR.phases[0]).distribution,
        "record.quantiles": lambda: Run(problem, LINEAR, quantiles=(0.5,)),
        "sample_greedy": lambda: soup.sample_greedy(100),
        "Adam": lambda: nqm.sample(problem, nqm.constant(Adam(), 0.1, 3), replicas=2),
        "late_phase_multiplicative": lambda: nqm.solve(
            problem, nqm.constant(MultiplicativeLatePhase(2), 0.1, 3)
        ),
    }
    for where, call in forbidden.items():
        with pytest.raises(NQMError, match=rf"^{where}: the entries of this problem are quad"):
            call()


def test_bins_without_a_mean_keep_the_distribution():
    h = harmonic(100)
    assert not Problem(h, h).binned(20).expected_losses_only


def test_key_tells_problems_apart(problem):
    assert problem.key() == problem.replace().key()
    assert problem.key() == Problem(
        problem.curvature.tolist(), problem.noise_variance, np.ones(3), problem.initial_mean,
        problem.initial_variance, [0.0, 0.0, 0.0],
    ).key()  # fmt: skip
    changes = [
        {name: getattr(problem, name) + np.array([0.0, 0.0, 1e-15])}
        for name in ("curvature", "initial_mean", "initial_variance", "minimum")
    ]
    changes += [{"multiplicity": 2.0}, {"irreducible_loss": 1.0}, {"noise_variance": 1.0}]
    changes += [{"expected_losses_only": True}]
    keys = {problem.replace(**change).key() for change in changes}
    assert len(keys | {problem.key()}) == len(changes) + 1


def test_fields_broadcast_and_are_read_only():
    problem = Problem([1.0, 0.5], 2)
    assert problem.noise_variance.tolist() == [2.0, 2.0]
    assert problem.noise_variance.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        problem.curvature[0] = 3.0
    source = np.array([1.0, 2.0])
    kept = Problem(source, 1.0)
    source[0] = -5.0
    assert kept.curvature.tolist() == [1.0, 2.0]
    assert Problem(3.0, 1.0).curvature.tolist() == [3.0]


BAD = {
    "negative curvature": (lambda: Problem([1.0, -0.1], 1.0), "curvature.*-0.1.*index 1"),
    "negative noise": (lambda: Problem([1.0, 1.0], [0.0, -1.0]), "noise_variance"),
    "negative variance": (lambda: Problem([1.0], 1.0, initial_variance=-1.0), "initial_variance"),
    "nan curvature": (lambda: Problem([np.nan], 1.0), "curvature.*nan"),
    "nan noise": (lambda: Problem([1.0], np.nan), "noise_variance.*nan"),
    "infinite mean": (lambda: Problem([1.0], 1.0, initial_mean=np.inf), "initial_mean.*inf"),
    "nan minimum": (lambda: Problem([1.0], 1.0, minimum=np.nan), "minimum"),
    "lengths": (lambda: Problem([1.0, 2.0], [1.0, 2.0, 3.0]), "noise_variance has 3.*has 2"),
    "empty": (lambda: Problem([], 1.0), "curvature.*at least one"),
    "matrix": (lambda: Problem([[1.0, 2.0]], 1.0), "curvature.*one-dimensional"),
    "words": (lambda: Problem("steep", 1.0), "curvature.*numbers"),
    "ragged": (lambda: Problem([1.0], [[1.0], [1.0, 2.0]]), "noise_variance.*numbers"),
    "multiplicity 0": (lambda: Problem([1.0], 1.0, 0.0), "multiplicity"),
    "constant": (lambda: Problem([1.0], 1.0, irreducible_loss=-1.0), "irreducible_loss"),
    "constant nan": (lambda: Problem([1.0], 1.0, irreducible_loss=np.nan), "irreducible_loss"),
    "constant words": (lambda: Problem([1.0], 1.0, irreducible_loss="x"), "irreducible_loss"),
    "p 0": (lambda: Problem([1.0], 1.0).precondition(0.0), "p must be > 0"),
    "p length": (lambda: Problem([1.0], 1.0).precondition([1.0, 1.0]), "p has 2"),
    "bins 0": (lambda: Problem([1.0], 1.0).binned(0), "bins"),
    "bins 1.5": (lambda: Problem([1.0], 1.0).binned(1.5), "bins"),
    "minimum noise": (lambda: Problem.from_minimum_noise([1.0], -1.0), "minimum_variance"),
    "not square": (lambda: Problem.from_matrices(np.ones((2, 3)), np.eye(2)), "hessian.*square"),
    "not symmetric": (
        lambda: Problem.from_matrices([[1.0, 1.0], [0.0, 1.0]], np.eye(2)), "hessian.*symmetric"),
    "indefinite": (lambda: Problem.from_matrices(np.diag([1.0, -1.0]), np.eye(2)),
                   "hessian.*semi-definite"),
    "hessian nan": (lambda: Problem.from_matrices(np.diag([1.0, np.nan]), np.eye(2)),
                    "hessian.*finite"),
    "noise indefinite": (lambda: Problem.from_matrices(np.eye(2), [[1.0, 2.0], [2.0, 1.0]]),
                         "noise_covariance.*semi-definite"),
    "noise shape": (lambda: Problem.from_matrices(np.eye(2), np.eye(3)), "noise_covariance"),
    "start shape": (
        lambda: Problem.from_matrices(np.eye(2), np.eye(2), initial_covariance=np.eye(3)),
        "initial_covariance"),
    "start indefinite": (
        lambda: Problem.from_matrices(np.eye(2), np.eye(2), initial_covariance=-np.eye(2)),
        "initial_covariance"),
    "mean length": (lambda: Problem.from_matrices(np.eye(2), np.eye(2), initial_mean=[1, 2, 3]),
                    "initial_mean"),
    "minimum length": (lambda: Problem.from_matrices(np.eye(2), np.eye(2), minimum=[1, 2, 3]),
                       "minimum"),
    "data shapes": (lambda: Problem.from_linear_regression(np.ones((3, 2)), np.ones(2)),
                    r"features \(N, p\)"),
    "data nan": (lambda: Problem.from_linear_regression([[np.nan]], [1.0]), "features.*finite"),
    "data empty": (lambda: Problem.from_linear_regression(np.ones((0, 2)), np.ones(0)), "features"),
    "data flat": (lambda: Problem.from_linear_regression(np.zeros((3, 2)), np.ones(3)), "features"),
    "data start": (
        lambda: Problem.from_linear_regression(np.eye(3), np.ones(3), start=[1.0, 2.0]), "start"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_field(name):
    build, words = BAD[name]
    with pytest.raises(NQMError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)
