"""Learning rates up to which one-pass least squares is stable."""

from __future__ import annotations

import numpy as np

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_number
from nqm.problems.least_squares import LeastSquares
from nqm.program import Phase
from nqm.solvers.least_squares.moments import linear_law
from nqm.solvers.least_squares.packed import Coupled, cycle
from nqm.tuning.stability import stability_edge as additive_edge


def stability_edge(
    problem: LeastSquares,
    algorithm: Algorithm,
    batch_size: float = 1,
    *,
    member_lr_ratio: float = 1.0,
) -> float:
    """Compute the smallest constant learning rate at which the expected loss does not settle.

    With noise that does not depend on the state the edge is 2 / h for SGD. Here a small batch
    lowers it: second moments of one direction diverge unless lr h (1 + 1 / B) < 2 (SGD), and all
    directions together diverge unless kappa < 1 (`nqm.solvers.least_squares.packed.Cycle`).

    Parameters
    ----------
    problem : LeastSquares
        One-pass least-squares problem.
    algorithm : Algorithm
        Linear method whose steps repeat with some period.
    batch_size : float
        Examples of one minibatch, > 0.
    member_lr_ratio : float
        member_lr / lr of late-phase weights, > 0.

    Returns
    -------
    float
        Learning rate; ``inf`` if none is unstable.

    Raises
    ------
    NQMError
        If the steps of the method never repeat, or an argument is out of range.
    """
    check_number("stability_edge.batch_size", batch_size, low=0.0, closed_low=False)
    if isinstance(algorithm, Algorithm) and algorithm.time.update_never_repeats:
        raise NQMError(
            f"stability_edge needs a method whose steps repeat; {type(algorithm).__name__}'s do not"
        )
    highest = additive_edge(problem.additive(), algorithm, member_lr_ratio=member_lr_ratio)
    if not np.isfinite(highest):
        return highest

    def stable(lr: float) -> bool:
        member = member_lr_ratio * lr if algorithm.rate_count == 2 else None
        phase = Phase(algorithm, lr, algorithm.time.period, batch_size, member_lr=member)
        coupled = Coupled(problem, linear_law(phase, problem))
        return cycle(coupled, 0, algorithm.time.period, 0).stable

    low = 0.0
    for high in highest * np.geomspace(1e-6, 1.0, 61):
        if not stable(high):
            break
        low = high
    else:
        return highest
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if stable(middle) else (low, middle)
    return float(high)
