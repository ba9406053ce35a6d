"""Learning rates up to which training is stable."""

from __future__ import annotations

from typing import Any

import numpy as np

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_number
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase
from nqm.solvers.moments import Map, compose_span
from nqm.transition import extract, spectral_radius


def stability_edge(
    problem: Problem | LeastSquares,
    algorithm: Algorithm,
    *,
    batch_size: float = 1,
    member_lr_ratio: float = 1.0,
) -> float:
    """Compute the smallest constant learning rate at which some direction is not stable.

    All linear methods depend on lr and h through lr * h, so the edge is that of the largest
    curvature. SGD: 2 / h; heavy ball: 2 (1 + momentum) / h; late-phase: lambda h = 2 for the mean
    model or member_lr h = 2 for the members, whichever comes first.

    Parameters
    ----------
    problem : Problem or LeastSquares
        In least squares the noise grows with the weights' distance from the minimum, so that a
        small batch lowers the edge (`nqm.tuning.stability_least_squares.stability_edge`).
    algorithm : Algorithm
        Linear method.
    batch_size : float
        Examples of one minibatch, > 0; has an effect in least squares only.
    member_lr_ratio : float
        member_lr / lr of late-phase weights, > 0.

    Returns
    -------
    float
        Learning rate; ``inf`` if no rate up to 1e4 / h is unstable.

    Raises
    ------
    NQMError
        If the method is not linear, does not fit the problem, or an argument is out of range.
    """
    check_number("stability_edge.member_lr_ratio", member_lr_ratio, low=0.0, closed_low=False)
    check_number("stability_edge.batch_size", batch_size, low=0.0, closed_low=False)
    if not isinstance(algorithm, Algorithm):
        raise NQMError(
            f"stability_edge.algorithm must be a linear algorithm; got {type(algorithm).__name__}"
        )
    problem = any_problem("stability_edge", problem)
    if isinstance(problem, LeastSquares):
        from nqm.tuning import stability_least_squares  # which builds on this module

        return stability_least_squares.stability_edge(
            problem, algorithm, batch_size, member_lr_ratio=member_lr_ratio
        )
    algorithm.check(problem)
    mask = algorithm.member_mask(problem)
    if mask is None:
        return _edge(algorithm, float(problem.curvature.max()), member_lr_ratio)
    # Members of their own in some directions only: elsewhere the member rate is none.
    groups = [(mask > 0, member_lr_ratio), (mask == 0, 0.0)]
    return min(
        _edge(algorithm, float(problem.curvature[chosen].max(initial=0.0)), ratio)
        for chosen, ratio in groups
    )


def _edge(algorithm: Algorithm, highest: float, member_lr_ratio: float) -> float:
    """`stability_edge` of directions whose largest curvature is `highest`."""
    if highest == 0.0:
        return float("inf")

    h = np.array([highest])

    def radius(u: FloatArray) -> FloatArray:
        worst = np.zeros(u.shape)
        for mode in algorithm.modes():
            chain = mode.algorithm
            lr = u / highest
            rates = (lr, member_lr_ratio * lr) if chain.rate_count == 2 else lr
            times = chain.time.one_cycle()

            def step(t: int, chain: Algorithm = chain, rates: Any = rates) -> Map:
                found = extract(chain, h, rates, t)
                return Map(found.matrix, np.zeros_like(found.matrix), found.low)

            whole = compose_span(step, chain.time, times.start, times.stop)
            worst = np.maximum(worst, spectral_radius(whole.matrix))
        return worst

    def unstable(u: FloatArray) -> FloatArray:
        return np.asarray(radius(u) > 1.0 + 1e-9)

    grid = np.geomspace(1e-6, 1e4, 4001)
    bad = np.flatnonzero(unstable(grid))
    if bad.size == 0:
        return float("inf")
    if bad[0] == 0:
        return 0.0
    low, high = grid[bad[0] - 1], grid[bad[0]]
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if unstable(np.array([middle]))[0] else (middle, high)
    return float(0.5 * (low + high) / highest)


def searched_edge(problem: Problem | LeastSquares, phase: Phase) -> float:
    """Upper end of the learning rates that a search over one phase tries.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Its largest curvature sets the edge.
    phase : Phase
        Phase to tune. With `member_lr` stated only `lr` varies, so the edge is that of the base
        weights.

    Returns
    -------
    float
        Stability edge of `lr`.

    Raises
    ------
    NQMError
        If the method is not linear, or its edge is 0 or infinite.
    """
    if not isinstance(phase.algorithm, Algorithm):
        name = type(phase.algorithm).__name__
        raise NQMError(f"{name} has no exact moments to search with; sweep phase.lr instead")
    # With member_lr stated only lr varies: the edge of the base weights alone bounds it.
    ratio = 1.0 if phase.member_lr is None else 1e-9
    batch_size = 1.0
    if isinstance(problem, LeastSquares):  # the largest batch leaves the widest range to search
        batch_size = float(phase.settings(0, 1)[0, -1])
    edge = stability_edge(problem, phase.algorithm, batch_size=batch_size, member_lr_ratio=ratio)
    if not 0 < edge < np.inf:
        raise NQMError(f"no learning rate to search: the stability edge is {edge:g}")
    return edge
