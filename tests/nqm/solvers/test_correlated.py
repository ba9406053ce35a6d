"""Directions that are correlated: the loss's distribution against dense covariances and draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import solve_discrete_lyapunov

import nqm
from nqm import (
    EMA,
    SGD,
    SWA,
    Adam,
    Cosine,
    Cyclic,
    Ensemble,
    HeavyBall,
    LatePhase,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    Program,
    SampledSGD,
    WeightDecay,
)
from nqm.distribution import LossDistribution
from nqm.problems import correlation
from nqm.solvers import correlated
from tests.tolerances import IDENTITY, JUMP, SIGMAS, agree, agree_each, within_error

LR = 0.1


def rank_two(d: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A Hessian with eigenvalues 1 .. 1/d and a noise of rank two in another basis."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0]
    factor = rng.standard_normal((d, 2))
    return basis @ np.diag(1.0 / np.arange(1, d + 1)) @ basis.T, factor @ factor.T


def small() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    roots = [rng.standard_normal((4, k)) for k in (4, 2, 3)]
    names = ("hessian", "noise_covariance", "initial_covariance")
    return {name: root @ root.T / 4 for name, root in zip(names, roots, strict=True)}


def dense_sd(h: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Var 1/2 x'Hx = 1/2 tr (HS)^2 + m'H S H m."""
    pushed, spread = h @ mean, h @ covariance
    return float(np.sqrt(0.5 * np.trace(spread @ spread) + pushed @ covariance @ pushed))


def shares(samples: np.ndarray, law, levels=(0.05, 0.5, 0.95)) -> None:
    """Frequencies of losses below exact quantiles, in binomial standard errors."""
    for level in levels:
        share = np.mean(samples <= law.quantile(level))
        assert abs(share - level) < SIGMAS * np.sqrt(level * (1 - level) / samples.size)


def test_rank_two_noise_at_the_steady_state():
    h, c = rank_two()
    problem = Problem.from_matrices(h, c)
    sigma = solve_discrete_lyapunov(np.eye(20) - LR * h, LR**2 * c)
    steady = nqm.steady(problem, Phase(SGD(), LR, 1))
    law = steady.distribution
    agree_each(law.mean, 0.5 * np.trace(h @ sigma), 1e-10)
    agree_each(law.sd, dense_sd(h, np.zeros(20), sigma), 1e-10)
    draws = np.random.default_rng(0).multivariate_normal(np.zeros(20), sigma, 40_000)
    shares(0.5 * np.einsum("ri,ij,rj->r", draws, h, draws), law)
    # The diagonal alone says something else altogether.
    alone = nqm.steady(problem.replace(noise_correlation=None), Phase(SGD(), LR, 1))
    agree_each(alone.loss, steady.loss, IDENTITY)
    assert law.sd > 1.5 * alone.distribution.sd
    assert law.quantile(0.95) > 1.2 * alone.distribution.quantile(0.95)
    # A long run ends there.
    run = nqm.solve(problem, nqm.constant(SGD(), LR, 20_000), [20_000])
    agree(run.loss_sd, [law.sd], JUMP)
    agree_each(run.quantiles((0.1, 0.9))[0], [law.quantile(0.1), law.quantile(0.9)], 1e-8)


def test_heavy_ball_from_a_correlated_start():
    """Mean and covariance stepped in the original basis."""
    matrices = small()
    h, c, start = matrices.values()
    mu, mean = 0.7, np.array([1.0, -2.0, 0.5, 0.0])
    eye, zero = np.eye(4), np.zeros((4, 4))
    a = np.block([[eye - LR * h, -LR * mu * eye], [h, mu * eye]])
    push = np.vstack([-LR * eye, eye])
    m, s = np.concatenate([mean, np.zeros(4)]), np.block([[start, zero], [zero, zero]])
    program = nqm.constant(HeavyBall(mu), LR, 20, batch_size=2)
    result = nqm.solve(Problem.from_matrices(**matrices, initial_mean=mean), program, range(21))
    for t in range(21):
        agree_each(result.loss_sd[t], dense_sd(h, m[:4], s[:4, :4]), 1e-10)
        m, s = a @ m, a @ s @ a.T + push @ c @ push.T / 2


def test_phases_and_schedules_against_dense_steps():
    """Cosine, then cyclic rates with another batch size, at records inside and between cycles."""
    h, c, s = small().values()
    problem = Problem.from_matrices(h, c, initial_covariance=s)
    cosine, cyclic = Cosine(0.3, 0.01, 15), Cyclic(0.3, 0.05, 4)
    phases = Phase(SGD(), cosine, 15, batch_size=2), Phase(SGD(), cyclic, 40, batch_size=5)
    at = [0, 3, 15, 16, 30, 47, 55]
    found = nqm.solve(problem, Program(phases), at).loss_sd
    expected = []
    for t in range(56):
        if t in at:
            expected.append(dense_sd(h, np.zeros(4), s))
        lr, size = (cosine, 2) if t < 15 else (cyclic, 5)
        rate = float(lr(np.array([t if t < 15 else t - 15]))[0])
        a = np.eye(4) - rate * h
        s = a @ s @ a.T + rate**2 * c / size
    agree_each(found, expected, 1e-10)


def test_late_phase_is_sgd_at_the_summed_rate_with_a_kth_of_the_noise():
    h, c = rank_two(8)
    problem = Problem.from_matrices(h, c)
    late = nqm.steady(problem, Phase(LatePhase(5, 0.2), LR, 1, member_lr=LR))
    sigma = solve_discrete_lyapunov(np.eye(8) - 2 * LR * h, (2 * LR) ** 2 * c / 5)
    agree_each(late.distribution.sd, dense_sd(h, np.zeros(8), sigma), 1e-10)


METHODS = [
    HeavyBall(0.8),
    EMA(HeavyBall(0.5), 0.9),
    SWA(SGD(), every=3),
    Ensemble(3),
    LatePhase(3, minibatch=0.5, spread=0.2, directions=[0, 2], gamma="mean"),
    nqm.ScheduleFree(),
    WeightDecay(SGD(), 0.3, toward="start"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_against_their_own_runs(method):
    """Exact quantiles against literal draws, which know no covariance of two directions."""
    problem = Problem.from_matrices(**small(), initial_mean=[1.0, 0.0, -1.0, 0.5])
    program = nqm.constant(method, 0.2, 30, batch_size=3)
    exact = nqm.solve(problem, program, [7, 30])
    walked = nqm.solve(problem, program, [7, 30], jump=False)
    agree_each(exact.loss_sd, walked.loss_sd, JUMP)
    drawn = nqm.sample(problem, program, [7, 30], replicas=6000, seed=2)
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(6000))
    for losses, law in zip(drawn.samples, exact.distributions(), strict=True):
        shares(losses, law)


def test_normals_drawn_have_the_covariance():
    """One step from the minimum: x = -lr e, so E x x' = lr^2 C by the loss's quantiles."""
    h, c = rank_two(5)
    problem = Problem.from_matrices(h, c, initial_covariance=np.zeros((5, 5)))
    root = problem.noise_correlation.root
    assert root.shape == (5, 2)
    assert np.array_equal(root, np.tril(root))
    agree(root @ root.T, problem.noise_correlation.matrix, 1e-12)
    basis = np.linalg.eigh(h)[1]
    turned = basis[:, ::-1].T @ c @ basis[:, ::-1]
    sd = np.sqrt(np.diag(turned))
    agree(np.abs(problem.noise_correlation.matrix), np.abs(turned / np.outer(sd, sd)), 1e-10)
    noise = problem.noise_correlation.covariance(sd**2)
    law = LossDistribution(problem, np.zeros(5), LR**2 * noise)
    # Two chi-squares: of the eigenvalues of C^1/2 H C^1/2.
    first, second = np.sort(np.linalg.eigvals(h @ c).real)[:-3:-1] * LR**2 / 2
    draws = stats.chi2(1).rvs((2, 20_000), random_state=0)
    shares(first * draws[0] + second * draws[1], law)
    for method in (SGD(), SampledSGD()):
        lone = nqm.constant(method, LR, 1)
        shares(nqm.sample(problem, lone, [1], replicas=5000).samples[0], law)


def test_multiplicative_members_see_the_correlation():
    """Little noise: the loss varies as the first order says, which the diagonal would get wrong."""
    problem = Problem.from_matrices(
        small()["hessian"], 1e-4 * small()["noise_covariance"],
        initial_covariance=np.zeros((4, 4)), minimum=[1.0, -1.0, 0.5, 2.0],
    )  # fmt: skip
    for coupling in ("elementwise", "scalar"):
        method = MultiplicativeLatePhase(2, coupling=coupling, gamma="mean")
        program = nqm.constant(method, 0.05, 40)
        first = nqm.solve(problem, program, [40])
        alone = nqm.solve(problem.replace(noise_correlation=None), program, [40])
        drawn = nqm.sample(problem, program, [40], replicas=4000)
        assert not np.isclose(alone.loss_sd[0], first.loss_sd[0], rtol=0.1)
        agree(drawn.loss_sd, first.loss_sd, 0.1)  # an estimated deviation, and a first order
        within_error(drawn.loss, first.loss, first.loss_sd / np.sqrt(4000) + 0.003 * first.loss)


def test_adam_and_its_control_variate_see_the_correlation():
    problem = Problem.from_matrices(**small())
    program = nqm.constant(Adam(), 0.05, 20)
    plain = nqm.sample(problem, program, [20], replicas=4000)
    helped = nqm.sample(problem, program, [20], replicas=4000, seed=1, control=True)
    assert helped.speed_up[0] > 1.2
    within_error(helped.loss, plain.loss, np.hypot(helped.stderr, plain.stderr))


def test_commuting_matrices_and_independent_fields_have_no_correlation():
    h, c = rank_two(4)
    for noise in (h, h @ h, np.eye(4)):
        assert not Problem.from_matrices(h, noise).correlated
    assert Problem.from_matrices(h, c).correlated
    assert not Problem([1.0, 2.0], 1.0).correlated


def test_fields_of_a_correlated_problem():
    problem = Problem.from_matrices(**small())
    plain = problem.replace(noise_correlation=None)
    assert len({problem.key(), plain.key(), problem.replace(initial_correlation=None).key()}) == 3
    again = problem.replace(noise_correlation=problem.noise_correlation.matrix)
    assert again.key() == problem.key()
    # Preconditioning changes units, not correlations, nor the loss.
    p = np.array([0.5, 1.0, 2.0, 3.0])
    program = nqm.constant(nqm.SGD(), 0.1, 12)
    turned = nqm.solve(problem.precondition(p), program, [12])
    q = np.sqrt(p)
    h = np.diag(problem.curvature * p)
    a = np.eye(4) - 0.1 * h
    start = problem.initial_correlation.covariance(problem.initial_variance) / np.outer(q, q)
    noise = problem.noise_correlation.covariance(problem.noise_variance) * np.outer(q, q)
    for _ in range(12):
        start = a @ start @ a.T + 0.01 * noise
    agree_each(turned.loss_sd[0], dense_sd(h, np.zeros(4), start), 1e-10)


def test_least_squares_data_correlate_directions():
    """Var of the loss after one step from a known start: lr^2 times the examples' own gradients."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 3))
    y = x @ [1.0, 0.0, -1.0] + rng.standard_normal(50) * (0.2 + x[:, 0] ** 2)
    problem = Problem.from_linear_regression(x, y)
    h, best = x.T @ x / 50, np.linalg.lstsq(x, y, rcond=None)[0]
    gradients = x * (x @ best - y)[:, None]
    c = gradients.T @ gradients / 50
    found = nqm.solve(problem, nqm.constant(SGD(), LR, 1, batch_size=4), [1])
    mean = (np.eye(3) - LR * h) @ -best
    agree_each(found.loss_sd[0], dense_sd(h, mean, LR**2 * c / 4), 1e-9)


def test_a_table_holds_correlations(tmp_path):
    import pandas as pd

    from nqm.problems.spectra import read_problem

    problem = Problem.from_matrices(**small())
    names = ("curvature", "noise_variance", "initial_mean", "initial_variance")
    table = {name: getattr(problem, name) for name in names}
    for name in ("noise_correlation", "initial_correlation"):
        table |= {f"{name}.{i}": getattr(problem, name).matrix[:, i] for i in range(4)}
    path = tmp_path / "problem.parquet"
    pd.DataFrame(table).to_parquet(path)
    read = read_problem(path)
    assert read.key() == problem.key()
    del table["noise_correlation.2"]
    pd.DataFrame(table).to_parquet(path)
    with pytest.raises(NQMError, match=r"noise_correlation needs the columns .*got 3"):
        read_problem(path)


def test_what_is_too_dear_is_said_and_not_guessed(monkeypatch):
    problem = Problem.from_matrices(*rank_two(6))
    result = nqm.solve(problem, nqm.constant(HeavyBall(), 0.1, 50), [0, 50])
    monkeypatch.setattr(correlated, "NUMBERS", 143)
    assert np.isnan(result.loss_sd).all()
    assert np.isfinite(result.loss).all()
    with pytest.raises(NQMError, match="the limit is 1e"):
        result.quantiles()
    monkeypatch.undo()
    # Walked one by one: 10^9 steps of 36 pairs.
    ageing = nqm.constant(nqm.ScheduleFree(), 0.1, 10**9)
    with pytest.raises(NQMError, match="multiplications"):
        correlated.check_cost(problem, ageing)


REFUSED = {
    "multiplicity": (lambda p: p.replace(multiplicity=2.0), "multiplicity 1"),
    "binned": (lambda p: p.binned(2), "binned: directions are correlated"),
    "shape": (lambda p: p.replace(noise_correlation=np.eye(3)), r"shape \(4, 4\)"),
    "size": (lambda p: Problem([1.0], 1.0, noise_correlation=p.noise_correlation), "directions"),
    "diagonal": (lambda p: p.replace(noise_correlation=2 * np.eye(4)), "ones on its diagonal"),
    "indefinite": (lambda p: p.replace(noise_correlation=2 * np.ones((4, 4)) - np.eye(4)),
                   "positive semi-definite"),
    "asymmetric": (lambda p: p.replace(initial_correlation=np.eye(4) + np.eye(4, k=1) / 2),
                   "symmetric"),
    "nan": (lambda p: p.replace(noise_correlation=np.full((4, 4), np.nan)), "finite"),
    "words": (lambda p: p.replace(noise_correlation="full"), "numbers"),
    "float32": (lambda p: nqm.sample(p, nqm.constant(SGD(), 0.1, 3), precision="float32"),
                "use 'float64'"),
    "heavy tails": (lambda p: nqm.sample(p, nqm.constant(SampledSGD(dof=4.0), 0.1, 3)), "dof"),
    "variances alone": (lambda p: LossDistribution(p, np.zeros(4), np.ones(4)), "covariance"),
    "soup": (lambda p: nqm.Soup.of_runs(p, [nqm.constant(SGD(), 0.1, 3)]).sample_greedy(10),
             "independently"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_correlated_directions_cannot_do(case):
    act, message = REFUSED[case]
    with pytest.raises(NQMError, match=message):
        act(Problem.from_matrices(**small()))


def test_a_steady_state_pulled_to_a_correlated_start():
    problem = Problem.from_matrices(**small(), initial_mean=[1.0, 0.0, 2.0, 0.0])
    method = WeightDecay(SGD(), 0.3, toward="start")
    law = nqm.steady(problem, Phase(method, 0.2, 1)).distribution
    run = nqm.solve(problem, nqm.constant(method, 0.2, 2000), [2000])
    agree_each(law.sd, run.loss_sd[0], JUMP)
    agree_each(law.quantile(0.9), run.quantiles((0.9,))[0, 0], 1e-8)


def test_an_uncorrelated_correlation_changes_no_number():
    """The identity is what independent directions have: same moments by the other way."""
    plain = Problem([1.0, 0.3, 0.02], [0.5, 2.0, 0.1], initial_mean=[1.0, -2.0, 0.5])
    stated = plain.replace(noise_correlation=np.eye(3))
    program = nqm.constant(HeavyBall(0.5), 0.3, 9)
    one, other = (nqm.solve(p, program, [0, 4, 9]) for p in (plain, stated))
    agree_each(one.loss_sd, other.loss_sd, IDENTITY)
    agree_each(one.quantiles(), other.quantiles(), 1e-9)
    assert isinstance(stated.noise_correlation, correlation.Correlation)
