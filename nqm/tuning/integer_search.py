"""Search for the whole number of least loss, from a coarse grid to a fine one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Size of the first grid, and number of parts into which a gap beside the best is divided.
POINTS, PARTS = 25, 7


def search_numbers(loss: Callable[[int], float], low: int, high: int) -> dict[int, float]:
    """Evaluate a loss at whole numbers until the best one and its two neighbours are known.

    Starts with a geometric grid of [low, high]; then divides the gaps on both sides of the best
    number, again and again, until both its neighbours have been evaluated.

    Parameters
    ----------
    loss : callable
        Loss at a whole number; with several local minima only one of them may be found.
    low, high : int
        Ends of the range, 1 <= low <= high.

    Returns
    -------
    dict of int to float
        Loss of every number that was evaluated.
    """
    grid = np.unique(np.rint(np.geomspace(low, high, POINTS)).astype(np.int64)).tolist()
    losses = {number: loss(number) for number in grid}
    while True:
        known = sorted(losses)
        best = known.index(min(losses, key=lambda number: losses[number]))
        left, right = known[max(best - 1, 0)], known[min(best + 1, len(known) - 1)]
        cuts = [np.linspace(end, known[best], PARTS + 1) for end in (left, right)]
        new = set(np.rint(cuts).astype(np.int64).flat) - losses.keys()
        if not new:
            return losses
        losses |= {int(number): loss(int(number)) for number in sorted(new)}
