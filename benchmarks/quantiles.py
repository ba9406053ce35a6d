"""Exact quantiles of the loss at many records, and the time of one.

Work: heavy ball, 10^3 directions (harmonic spectrum, C = H), about 100 records x 3 levels; the
distribution of the loss is inverted anew for each record.
"""

from __future__ import annotations

import os
import time

from benchmarks.timing import best_of
from nqm import HeavyBall, Problem, constant, solve
from nqm.problems.spectra import harmonic

LEVELS = (0.05, 0.5, 0.95)


def main() -> None:
    h = harmonic(1000)
    result = solve(Problem(h, h), constant(HeavyBall(0.9), 0.1, 1000, batch_size=8))
    count = len(result.steps) * len(LEVELS)
    result.quantiles((0.5,))  # compiles
    took = best_of(lambda: result.quantiles(LEVELS), clock=time.process_time)
    print(
        f"quantiles: {len(result.steps)} records x {len(LEVELS)} levels x 1000 directions in "
        f"{took:.3g} s of the processor, {1e3 * took / count:.3g} ms each "
        f"(load average {os.getloadavg()[0]:.1f})"
    )


if __name__ == "__main__":
    main()
