"""Best of several timings: the least disturbed one, on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def best_of(
    function: Callable[[], object],
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time a function several times and return the least time.

    Parameters
    ----------
    function : callable
        Function without arguments; its result is thrown away.
    repeats : int
        Number of calls; at least 1.
    clock : callable
        Wall-clock time by default.

    Returns
    -------
    float
        Least time of one call, in seconds.
    """
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def paired(
    first: Callable[[], object], second: Callable[[], object], rounds: int = 5
) -> tuple[float, float, float]:
    """Take the processor time of two functions in turn, so that what else runs disturbs both.

    Parameters
    ----------
    first, second : callable
        Functions without arguments; their results are thrown away.
    rounds : int
        Calls of each; at least 1.

    Returns
    -------
    first, second : float
        Least processor time of one call of each, in seconds: that of all threads together.
    ratio : float
        Median over rounds of the time of `second` over that of `first`.
    """
    clock = time.process_time
    pairs = [(best_of(first, 1, clock), best_of(second, 1, clock)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in pairs)
    return min(a for a, _ in pairs), min(b for _, b in pairs), ratio
