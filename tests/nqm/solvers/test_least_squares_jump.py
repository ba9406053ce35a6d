"""Powers of the coupled map of one-pass least squares: against steps, and 60 decimal digits."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
from scipy.special import gamma

import nqm
from nqm import (
    EMA,
    SGD,
    Cyclic,
    HeavyBall,
    LatePhase,
    NQMError,
    Phase,
    Program,
    WeightDecay,
    constant,
)
from nqm.problems import spectra
from nqm.problems.least_squares import LeastSquares, power_law
from nqm.solvers.least_squares import moments
from nqm.solvers.least_squares.moments import solve
from tests.nqm.solvers.test_least_squares import PROBLEM, PROGRAMS
from tests.tolerances import IDENTITY, JUMP, agree_each

MORE = {
    "cyclic rates": Program((Phase(HeavyBall(0.5), Cyclic(0.2, 0.05, 5), 33, 2),)),
    "decay of heavy ball": Program((Phase(WeightDecay(HeavyBall(0.5), 0.3), 0.1, 30),)),
    "late, one direction at its own rate": constant(
        LatePhase(3, directions=(0,), spread=1.0, gamma="mean", minibatch=0.5), 0.1, 30
    ),
}


@pytest.mark.parametrize("name", PROGRAMS | MORE)
def test_powers_are_steps(name, monkeypatch):
    program = (PROGRAMS | MORE)[name]
    at = [0, 1, 4, program.steps // 2 + 3, program.steps]
    stepped = solve(PROBLEM, program, at, jump=False)
    monkeypatch.setattr(moments, "pays", lambda *_: True)
    jumped = solve(PROBLEM, program, at)
    for part in ("loss", "bias", "variance", "member_loss"):
        agree_each(getattr(jumped, part), getattr(stepped, part), JUMP)


def in_decimals(problem: LeastSquares, lr: float, momentum: float, batch: int, steps: int) -> Any:
    """Bias and variance of heavy ball: the matrix of (E u^2, E u b, E b^2, 1), repeatedly squared.

    b' = m b + g, u' = u - lr b', and g = h u + e with Var e = (h^2 E u^2 + h (2 L + s2)) / B.
    """
    d = problem.directions
    h = [Decimal(x) for x in problem.curvature]
    a, m, size, s2 = Decimal(lr), Decimal(momentum), Decimal(batch), Decimal(problem.label_noise)
    step = np.full((3 * d + 1, 3 * d + 1), Decimal(0), dtype=object)
    step[-1, -1] = Decimal(1)
    for i in range(d):
        uu, ub, bb = 3 * i, 3 * i + 1, 3 * i + 2
        r, k = 1 - a * h[i], -a * m  # u' = r u + k b - a e,  b' = h u + m b + e
        noise = {uu: h[i] * h[i] / size, 3 * d: h[i] * s2 / size}
        for j in range(d):
            noise[3 * j] = noise.get(3 * j, Decimal(0)) + h[i] * h[j] / size
        rows = (
            (uu, {uu: r * r, ub: 2 * r * k, bb: k * k}, a * a),
            (ub, {uu: r * h[i], ub: r * m + k * h[i], bb: k * m}, -a),
            (bb, {uu: h[i] * h[i], ub: 2 * h[i] * m, bb: m * m}, Decimal(1)),
        )
        for row, entries, share in rows:
            for column, value in entries.items():
                step[row, column] += value
            for column, value in noise.items():
                step[row, column] += share * value
    whole: Any = None
    power = step
    for bit in range(steps.bit_length()):
        if steps >> bit & 1:
            whole = power if whole is None else power @ whole
        power = power @ power
    begin = np.full(3 * d + 1, Decimal(0), dtype=object)
    begin[0 : 3 * d : 3] = [
        Decimal(x) ** 2 + Decimal(v)
        for x, v in zip(problem.initial_mean, problem.initial_variance, strict=True)
    ]
    one = np.full(3 * d + 1, Decimal(0), dtype=object)
    one[-1] = Decimal(1)
    out = []
    for state in (begin, one):
        ended = whole @ state
        out.append(float(sum(h[i] * ended[3 * i] for i in range(d)) / 2))
    return out


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("steps", [1000, 10**6 + 1, 10**9])
def test_sixty_digits(momentum, steps):
    # The flattest direction has moved by about a third after 10^9 steps.
    problem = LeastSquares([1.0, 1e-3, 1e-9], 0.5, [1.0, -2.0, 3.0], 0.2)
    lr = 0.3 * (1.0 - momentum)
    program = constant(HeavyBall(momentum) if momentum else SGD(), lr, steps, batch_size=2)
    found = solve(problem, program, [steps])
    with localcontext() as context:
        context.prec = 60
        bias, variance = in_decimals(problem, lr, momentum, 2, steps)
    agree_each(found.bias, [bias], JUMP)
    agree_each(found.variance, [variance], JUMP)


def test_start_is_forgotten_to_the_last_digit():
    """Without noisy labels the loss falls to 1e-78 of the start, and its digits still hold."""
    problem = LeastSquares([1.0, 0.5], 0.0, [1.0, 1.0], 0.0)
    found = solve(problem, constant(SGD(), 0.3, 500, batch_size=2), [500])
    with localcontext() as context:
        context.prec = 60
        bias, _ = in_decimals(problem, 0.3, 0.0, 2, 500)
    assert bias < 1e-50
    agree_each(found.loss, [bias], JUMP)


def test_long_run_of_many_directions_is_told_what_to_do():
    program = Program((Phase(SGD(), nqm.Cosine(0.1, 0.0, 10**10), 10**10),))
    with pytest.raises(NQMError, match=r"phase.steps = 1e\+10 .* do not repeat"):
        solve(power_law(10), program)


def test_steps_to_a_target_beyond_what_steps_could_reach():
    """Source-limited law of SGD without noise: L(t) ~ Gamma(p) / (4 alpha) (2 lr t)^-p."""
    problem, lr, alpha, beta = nqm.condense(power_law(10**4)), 0.1, 1.0, 1.0
    p = (2 * alpha + 2 * beta - 1) / (2 * alpha)
    target = 1e-8
    found = nqm.steps_to_target(problem, Phase(SGD(), lr, 10**9, batch_size=1e12), target)
    expected = (gamma(p) / (4 * alpha) / target) ** (1 / p) / (2 * lr)
    assert found.step == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "algorithm", [SGD(), HeavyBall(0.9), EMA(SGD(), 0.99), LatePhase(4, gamma="mean")]
)
def test_condensed_losses_are_those_of_every_direction(algorithm):
    rng = np.random.default_rng(1)
    h = spectra.power_law(2000, exponent=1.5)
    problem = LeastSquares(h, 0.1, rng.normal(size=2000), 0.1, rng.integers(1, 4, 2000))
    small = nqm.condense(problem)
    assert small.directions < 400
    agree_each(small.initial_loss, problem.initial_loss, IDENTITY)
    program = constant(algorithm, 0.05, 3000, batch_size=4)
    whole, few = (solve(p, program, [1, 100, 3000]) for p in (problem, small))
    for part in ("bias", "variance", "member_loss"):
        agree_each(getattr(few, part), getattr(whole, part), JUMP)
    settled = [nqm.steady(p, program.phases[0]).loss for p in (problem, small)]
    agree_each([settled[1]], [settled[0]], JUMP)
