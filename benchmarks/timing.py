"""Best of several timings: the least disturbed one, on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_of(function: Callable[[], object], repeats: int = 3) -> float:
    """Time a function several times and return the least time.

    Parameters
    ----------
    function : callable
        Function without arguments; its result is thrown away.
    repeats : int
        Number of calls; at least 1.

    Returns
    -------
    float
        Least wall-clock time of one call, in seconds.
    """
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
