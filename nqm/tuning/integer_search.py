"""The whole number of least loss, looked for on a coarse grid first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Numbers of the first grid, and into how many parts a gap beside the best is then cut.
POINTS, PARTS = 25, 7


def search_numbers(loss: Callable[[int], float], low: int, high: int) -> dict[int, float]:
    """Losses of the whole numbers looked at, the best one's neighbours among them.

    A geometric grid of [low, high], low >= 1; then, again and again, the gaps on both sides of the
    best are cut into parts, until both its neighbours have been looked at.
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
