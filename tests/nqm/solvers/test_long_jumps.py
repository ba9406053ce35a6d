"""Up to 2^53 steps at once, against the same products in 60 decimal digits."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

import nqm
from nqm import EMA, SGD, SWA, HeavyBall, LatePhase, Lookahead, Phase, Problem, WeightDecay
from nqm.double_double import DoubleDouble
from tests.tolerances import JUMP, agree_each

CURVATURE, NOISE, START = 0.7, 0.2, 1.3
ONE = Problem([CURVATURE], [NOISE], initial_mean=START, initial_variance=0.0, minimum=2.0)
Matrix = Any  # an array of Decimals
#: Transitions (A, C) of one cycle, readout, start per unit of the start.
Chain = tuple[list[tuple[Matrix, Matrix]], Matrix, Matrix]


def exact(rows: Any) -> Matrix:
    """Doubles as the decimals they are."""
    return np.vectorize(lambda x: Decimal(x), otypes=[object])(np.asarray(rows, dtype=object))


def sgd(lr: float) -> Chain:
    u = Decimal(lr) * Decimal(CURVATURE)
    return [(exact([[1 - u]]), exact([[-Decimal(lr)]]))], exact([1]), exact([1])


def heavy_ball(lr: float, momentum: float) -> Chain:
    """B' = m b + h x, x' = x - lr b'."""
    m, r, h = Decimal(momentum), Decimal(lr), Decimal(CURVATURE)
    step = exact([[1 - r * h, -r * m], [h, m]]), exact([[-r], [1]])
    return [step], exact([1, 0]), exact([1, 0])


def ema(lr: float, beta: float) -> Chain:
    b, r, h = Decimal(beta), Decimal(lr), Decimal(CURVATURE)
    step = exact([[1 - r * h, 0], [(1 - b) * (1 - r * h), b]]), exact([[-r], [-(1 - b) * r]])
    return [step], exact([0, 1]), exact([1, 1])


def lookahead(lr: float, k: int, alpha: float) -> Chain:
    r, h, a = Decimal(lr), Decimal(CURVATURE), Decimal(alpha)
    fast = exact([[1 - r * h, 0], [0, 1]]), exact([[-r], [0]])
    meet = exact([[a, 1 - a], [a, 1 - a]])
    return [fast] * (k - 1) + [(meet @ fast[0], meet @ fast[1])], exact([0, 1]), exact([1, 1])


CASES: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "sgd": (SGD(), sgd, ()),
    "heavy ball": (HeavyBall(0.9), heavy_ball, (0.9,)),
    "heavier": (HeavyBall(0.999), heavy_ball, (0.999,)),
    "ema": (EMA(decay=0.999), ema, (0.999,)),
    "long ema": (EMA(decay=1.0 - 1e-10), ema, (1.0 - 1e-10,)),
    "lookahead": (Lookahead(SGD(), 7, 0.3), lookahead, (7, 0.3)),
}


def losses(name: str, lr: float, steps: int) -> tuple[float, float]:
    """Bias and variance by repeated squaring."""
    _, chain, options = CASES[name]
    with localcontext() as context:
        context.prec = 60
        cycle, read, start = chain(lr, *options)
        size = len(read)
        moves = [(a, c @ c.T * Decimal(NOISE)) for a, c in cycle]

        def then(one: Any, two: Any) -> Any:
            return two[0] @ one[0], two[0] @ one[1] @ two[0].T + two[1]

        zero = np.zeros((size, size), dtype=int)
        whole = exact((zero + np.eye(size, dtype=int)).tolist()), exact(zero.tolist())
        square = moves[0]
        for move in moves[1:]:
            square = then(square, move)
        count, rest = divmod(steps, len(moves))
        while count:
            whole = then(whole, square) if count & 1 else whole
            square, count = then(square, square), count >> 1
        for move in moves[:rest]:
            whole = then(whole, move)
        half = Decimal(CURVATURE) / 2
        bias = half * (read @ whole[0] @ start * Decimal(START)) ** 2
        return float(bias), float(half * (read @ whole[1] @ read))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [10**6, 10**12 + 3, 10**16, 2**53])
def test_jumps_are_exact_however_long(name: str, steps: int) -> None:
    """Where the loss has fallen by a third, to almost nothing, and to the floor."""
    algorithm = CASES[name][0]
    for u in (0.3 / steps, 20.0 / steps, steps**-0.5):
        lr = u / CURVATURE
        bias, variance = losses(name, lr, steps)
        found = nqm.solve(ONE, Phase(algorithm, lr, steps), [steps])
        agree_each(found.variance, [variance], JUMP)
        if bias > 1e-290:  # below that doubles run out of digits
            agree_each(found.bias, [bias], JUMP)
        scanned = nqm.scan(ONE, algorithm, lr, steps)
        agree_each(scanned.loss, [bias + variance], JUMP)


@pytest.mark.parametrize("u", [1e-3, 1e-8, 1e-13])
def test_steady_states_at_slow_rates(u: float) -> None:
    """The floor of SGD and of heavy ball, and the pull of weight decay."""
    lr = u / CURVATURE
    floor = lr * NOISE / (2.0 * (2.0 - lr * CURVATURE))
    agree_each(nqm.steady(ONE, Phase(SGD(), lr, 1)).loss, floor, JUMP)
    # E x^2 = lr v (1 + m) / (h (1 - m) (2 (1 + m) - lr h)), the fixed point of the moments.
    heavy = lr * NOISE * 1.9 / (2.0 * 0.1 * (2.0 * 1.9 - lr * CURVATURE))
    agree_each(nqm.steady(ONE, Phase(HeavyBall(0.9), lr, 1)).loss, heavy, JUMP)
    settled = nqm.steady(ONE, Phase(WeightDecay(SGD(), 0.3), lr, 1)).weight_mean
    agree_each(settled, [-2.0 * 0.3 / (CURVATURE + 0.3)], JUMP)


def test_correlated_directions_at_slow_rates() -> None:
    """SGD: E x_i x_j = lr c_ij / (h_i + h_j - lr h_i h_j), which the loss's sd sees."""
    h, lr, c = np.array([1.0, 0.5]), 1e-13, 0.15
    problem = Problem.from_matrices(np.diag(h), [[0.2, c], [c, 0.3]], initial_mean=0.0)
    moment = lr * np.array([[0.2, c], [c, 0.3]]) / (h[:, None] + h - lr * h[:, None] * h)
    weighted = np.diag(h) @ moment
    expected = np.sqrt(0.5 * np.trace(weighted @ weighted))
    found = nqm.solve(problem, Phase(SGD(), lr, 10**16), [10**16])
    agree_each(found.loss_sd, [expected], JUMP)


def test_many_snapshots_and_members() -> None:
    """SWA far beyond the memory of the run: v / (h^2 n); late phases: SGD at lambda = 2 lr."""
    steps = 10**15
    found = nqm.solve(ONE, Phase(SWA(), 1e-3, steps), [steps])
    agree_each(found.variance, [0.5 * NOISE / (CURVATURE * steps)], JUMP)
    members = nqm.solve(ONE, Phase(LatePhase(10, gamma="mean"), 1e-13, 10**12), [10**12])
    left = START * np.exp(10**12 * np.log1p(-2e-13 * CURVATURE))
    agree_each(members.bias, [0.5 * CURVATURE * left**2], JUMP)


def test_what_powers_of_one_double_cannot_hold_is_refused() -> None:
    scalar = nqm.MultiplicativeLatePhase(2, coupling="scalar", gamma="mean")
    with pytest.raises(nqm.NQMError, match="loses digits beyond 1e"):
        nqm.solve(ONE, Phase(scalar, 1e-9, 10**9))
    with pytest.raises(nqm.NQMError, match=r"search\.horizon must be at most 1e"):
        nqm.search(ONE, SGD(), [0.1, 0.2], [1.0], 0.1, horizon=10**10)


def test_two_doubles_hold_what_one_rounds_away() -> None:
    """Sums, differences and products of arrays and numbers, from either side."""
    tiny, one = DoubleDouble(np.array([2.0**-80, 2.0**-90])), np.array([1.0, 2.0])
    for value in (one + tiny, tiny + one, 1.0 * (tiny + one), one - (-tiny), -(-one - tiny)):
        np.testing.assert_array_equal(value.high, one)
        np.testing.assert_array_equal(value.low, tiny.high)
    third = DoubleDouble(1.0 / 3.0)
    error = 1.0 - 3.0 * third  # a third's own rounding: 1 - 3 fl(1/3) = 2^-54
    assert (float(error.high), float(error.low)) == (2.0**-54, 0.0)
    square = (1.0 + third) * (1.0 - third) + third * third  # 1 but for an error of 1e-32
    assert float(square.high) == 1.0
    assert abs(float(square.low)) < 2.0**-104
