"""Exact loss after a million steps, many learning rates at once, against NumPy and JAX.

Work: 10^4 directions (harmonic spectrum, C = H) x 100 learning rates x 10^6 steps, SGD and heavy
ball. Peers: for SGD the closed form (1 - lr h)^(2 T) in NumPy and in JAX; for heavy ball the second
moments by repeated squaring in JAX, one rate after the other. Both keep one double, so that the
rounding of 1 - lr h is multiplied by T. And the textbook second-moment recursion in NumPy, timed
over 10^2 steps and extrapolated. Rounds alternate, on one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

from collections.abc import Callable

import numpy as np

from benchmarks.timing import best_of, paired
from nqm import SGD, HeavyBall, Problem
from nqm.algorithms.base import Algorithm
from nqm.problems.quadratic import FloatArray
from nqm.problems.spectra import harmonic
from nqm.solvers.scan import scan

DIRECTIONS, RATES, STEPS, TIMED = 10_000, 100, 1_000_000, 100
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


def numpy_closed_form(h: FloatArray, lr: FloatArray, steps: int) -> FloatArray:
    """Compute the loss of SGD by its closed form.

    Parameters
    ----------
    h, lr, steps
        See `numpy_sgd`.

    Returns
    -------
    ndarray, shape (rates,)
        Expected loss after the last step.
    """
    r2 = (1 - lr[:, None] * h) ** 2
    power = r2**steps
    return 0.5 * (power + lr[:, None] ** 2 * h / BATCH * (1 - power) / (1 - r2)) @ h


def jax_peers(h: FloatArray, lr: FloatArray, steps: int) -> dict[str, Callable[[], FloatArray]]:
    """Compile the closed form of SGD and repeated squaring of heavy ball in JAX.

    Parameters
    ----------
    h, lr, steps
        See `numpy_sgd`.

    Returns
    -------
    dict of str to callable
        By name of the method; empty if JAX is not installed.
    """
    try:
        import jax
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    jnp, mu, curvature, rates = jax.numpy, MOMENTUM, jax.numpy.asarray(h), jax.numpy.asarray(lr)

    def closed(lr: object) -> object:
        r2 = (1.0 - lr[:, None] * curvature) ** 2
        power = jnp.exp(steps * jnp.log(r2))
        return 0.5 * (power + lr[:, None] ** 2 * curvature / BATCH * (1 - power) / (1 - r2)) @ h

    def times(x: tuple[object, ...], y: tuple[object, ...]) -> tuple[object, ...]:
        (a, b, c, d), (e, f, g, i) = x, y
        return a * e + b * g, a * f + b * i, c * e + d * g, c * f + d * i

    def moved(x: tuple[object, ...], s: tuple[object, ...]) -> tuple[object, ...]:
        (a, b, c, d), (p, q, r) = x, s
        u, v, w, y = a * p + b * q, a * q + b * r, c * p + d * q, c * q + d * r
        return u * a + v * b, u * c + v * d, w * c + y * d

    def squared(lr: object) -> object:
        one, zero, v = jnp.ones_like(curvature), jnp.zeros_like(curvature), curvature / BATCH
        step = one - lr * curvature, -lr * mu * one, curvature, mu * one
        noise = lr * lr * v, -lr * v, v
        whole, summed, left = (one, zero, zero, one), (zero, zero, zero), steps
        while left:
            if left & 1:
                summed = tuple(x + y for x, y in zip(moved(step, summed), noise, strict=True))
                whole = times(step, whole)
            left >>= 1
            if left:
                noise = tuple(x + y for x, y in zip(moved(step, noise), noise, strict=True))
                step = times(step, step)
        return 0.5 * curvature @ (whole[0] ** 2 + summed[0])

    sgd, heavy = jax.jit(closed), jax.jit(lambda lr: jax.lax.map(squared, lr))
    return {
        "SGD": lambda: np.asarray(sgd(rates)),
        "HeavyBall": lambda: np.asarray(heavy(rates)),
    }


def main() -> None:
    h = harmonic(DIRECTIONS)
    problem = Problem(h, h)
    lr = np.geomspace(1e-3, 1.5, RATES)
    compiled = jax_peers(h, lr, STEPS)
    print(f"exact loss: {DIRECTIONS} directions x {RATES} rates x {STEPS:.0e} steps")
    if not compiled:
        print("JAX: not installed (pip install jax, into an environment of its own)")
    for algorithm, loop in ((SGD(), numpy_sgd), (HeavyBall(MOMENTUM), numpy_heavy_ball)):
        ours = scan(problem, algorithm, lr, TIMED, batch_size=BATCH).loss  # also compiles
        error = np.max(np.abs(ours / loop(h, lr, TIMED) - 1))

        def jump(algorithm: Algorithm = algorithm) -> FloatArray:
            return scan(problem, algorithm, lr, STEPS, batch_size=BATCH).loss

        found, name = jump(), type(algorithm).__name__
        walk = best_of(lambda f=loop: f(h, lr, TIMED), repeats=1) * STEPS / TIMED
        print(
            f"  {name:10s} nqm.scan {best_of(jump):7.4f} s | NumPy loop {walk:9.0f} s "
            f"(extrapolated from {TIMED}), agreement at {TIMED} steps {error:.1e}"
        )
        peers = {"JAX": compiled[name]} if compiled else {}
        if name == "SGD":
            peers["NumPy closed form"] = lambda: numpy_closed_form(h, lr, STEPS)
        for peer, function in peers.items():
            apart = np.max(np.abs(function() / found - 1))
            mine, theirs, ratio = paired(jump, function, 9)
            print(
                f"    processor time: nqm.scan {mine:.4g} s | {peer} {theirs:.4g} s | nqm "
                f"{ratio:.3g} times as fast (median of rounds) | apart {apart:.1e}"
            )


if __name__ == "__main__":
    main()
