"""Exact loss after a million steps, many learning rates at once, against a NumPy loop.

Work: 10^4 directions (harmonic spectrum, C = H) x 100 learning rates x 10^6 steps, SGD and heavy
ball. Peer: the textbook second-moment recursion, vectorised over directions and rates in NumPy,
timed over 10^3 steps and extrapolated to 10^6.
"""

from __future__ import annotations

import numpy as np

from benchmarks.timing import best_of
from nqm import SGD, HeavyBall, Problem
from nqm.problems.quadratic import FloatArray
from nqm.problems.spectra import harmonic
from nqm.solvers.scan import scan

DIRECTIONS, RATES, STEPS, TIMED = 10_000, 100, 1_000_000, 1_000
BATCH, MOMENTUM = 64, 0.9


def numpy_sgd(h: FloatArray, lr: FloatArray, steps: int) -> FloatArray:
    """Compute the loss of SGD by s' = (1 - lr h)^2 s + lr^2 v / B, in place.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures; the noise of one example is C = H.
    lr : ndarray, shape (rates,)
        Learning rates.
    steps : int

    Returns
    -------
    ndarray, shape (rates,)
        Expected loss after the last step.
    """
    r2, q = (1 - lr[:, None] * h) ** 2, lr[:, None] ** 2 * h / BATCH
    s = np.ones_like(r2)
    for _ in range(steps):
        s *= r2
        s += q
    return 0.5 * s @ h


def numpy_heavy_ball(h: FloatArray, lr: FloatArray, steps: int) -> FloatArray:
    """Compute the loss of heavy ball by the second moments of iterate and buffer.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures; the noise of one example is C = H.
    lr : ndarray, shape (rates,)
        Learning rates.
    steps : int

    Returns
    -------
    ndarray, shape (rates,)
        Expected loss after the last step.
    """
    rate = lr[:, None]
    a = 1 - rate * h
    xx, xb, bb = np.ones_like(a), np.zeros_like(a), np.zeros_like(a)
    v = h / BATCH
    for _ in range(steps):
        # b' = mu b + h x + e;  x' = x - lr b' = a x - lr mu b - lr e
        new_bb = MOMENTUM**2 * bb + 2 * MOMENTUM * h * xb + h * h * xx + v
        new_xb = a * h * xx + MOMENTUM * (a - rate * h) * xb - rate * MOMENTUM**2 * bb - rate * v
        xx = a * a * xx - 2 * a * rate * MOMENTUM * xb + rate**2 * (MOMENTUM**2 * bb + v)
        xb, bb = new_xb, new_bb
    return 0.5 * xx @ h


def main() -> None:
    h = harmonic(DIRECTIONS)
    problem = Problem(h, h)
    lr = np.geomspace(1e-3, 1.5, RATES)
    print(f"exact loss: {DIRECTIONS} directions x {RATES} rates x {STEPS:.0e} steps")
    for algorithm, loop in ((SGD(), numpy_sgd), (HeavyBall(MOMENTUM), numpy_heavy_ball)):
        ours = scan(problem, algorithm, lr, TIMED, batch_size=BATCH).loss  # also compiles
        error = np.max(np.abs(ours / loop(h, lr, TIMED) - 1))
        jump = best_of(lambda a=algorithm: scan(problem, a, lr, STEPS, batch_size=BATCH))
        walk = best_of(lambda f=loop: f(h, lr, TIMED), repeats=1) * STEPS / TIMED
        name = type(algorithm).__name__
        print(
            f"  {name:10s} nqm.scan {jump:7.3f} s | NumPy loop {walk:9.0f} s (extrapolated from "
            f"{TIMED}) | ratio {walk / jump:9.0f} | agreement at {TIMED} steps {error:.1e}"
        )


if __name__ == "__main__":
    main()
