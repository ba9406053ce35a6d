"""A scheduled sweep of heavy-ball late-phase weights, against JAX on one thread in one run.

Work: 8 ensemble sizes K x 8 rates, 300 steps of a cosine schedule, 1000 directions (harmonic,
C = H), the losses of the mean model and of the average member at the end. Peer: the same
second-moment recursion written for it in JAX, `jit` of `lax.map` over cells of `lax.scan` over
steps, in float64; once with the momentum of the base and that of the members, and once with one of
them, as both are equal here, which `nqm.solve` finds out. Rounds of both alternate, and the ratio
of each is taken, because the machine may be busy.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import itertools
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np

from benchmarks.timing import paired
from nqm import HeavyBall, LatePhase, Phase, Problem, Program, solve
from nqm.problems.quadratic import FloatArray
from nqm.problems.spectra import harmonic
from nqm.schedule import Constant, Cosine
from nqm.solvers.many_rates import solve_rates

DIRECTIONS, STEPS, BATCH, MOMENTUM, MEMBER_LR = 1000, 300, 8, 0.9, 0.01
MEMBERS = (1, 2, 3, 4, 6, 8, 12, 16)
RATES = tuple(np.linspace(0.1, 0.8, 8))


def ours(h: FloatArray) -> FloatArray:
    """Compute all cells by `nqm.solve`.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures.

    Returns
    -------
    ndarray, shape (cells, 2)
        Loss of the mean model and of the average member.
    """
    problem, losses = Problem(h, h), []
    for members, lr in itertools.product(MEMBERS, RATES):
        late = LatePhase(members, gamma="mean", inner=HeavyBall(MOMENTUM))
        phase = Phase(late, Cosine(lr, lr / 10, STEPS), STEPS, BATCH, member_lr=MEMBER_LR)
        result = solve(problem, phase, [STEPS])
        losses.append((result.loss[0], result.member_loss[0]))
    return np.array(losses)


def together(h: FloatArray) -> FloatArray:
    """Compute as `ours`, the rates of each ensemble size in one call, as a sweep does.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures.

    Returns
    -------
    ndarray, shape (cells, 2)
        As of `ours`.
    """
    losses = []
    rates = [Cosine(lr, lr / 10, STEPS) for lr in RATES], [Constant(MEMBER_LR)] * len(RATES)
    for members in MEMBERS:
        late = LatePhase(members, gamma="mean", inner=HeavyBall(MOMENTUM))
        phase = Phase(late, rates[0][0], STEPS, BATCH, member_lr=MEMBER_LR)
        found = solve_rates(Problem(h, h), Program((phase,)), [rates], [STEPS])
        losses.append(np.stack([found.loss[:, 0], found.member_loss[:, 0]], axis=1))
    return np.concatenate(losses)


def matrix_by_matrix(h: FloatArray) -> FloatArray:
    """Compute as `ours`, by matrices that are extracted for every step, as for any method.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures.

    Returns
    -------
    ndarray, shape (cells, 2)
        As of `ours`.
    """
    with mock.patch("nqm.solvers.moments.walk", return_value=None):
        return ours(h)


def jax_cells(h: FloatArray, *, tied: bool = False) -> Callable[[], FloatArray] | None:
    """Compile the same in JAX.

    The mean model w = theta + mean phi and both buffers, and a deviation with its buffer.

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures.
    tied : bool
        One buffer of the mean model in place of two, which are equal as gamma K = 1.

    Returns
    -------
    callable, or None
        Returns what `ours` does; None if JAX is not installed.
    """
    try:
        import jax
    except ImportError:
        return None
    jax.config.update("jax_enable_x64", True)
    jnp, mu = jax.numpy, MOMENTUM
    curvature = jnp.asarray(h)

    def moved(a: list[list[object]], s: tuple[object, ...], q: list[object]) -> tuple[object, ...]:
        """Packed S -> A S A' + v b b', with b the column q."""
        n = len(a)
        full = [
            [s[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(n)] for i in range(n)
        ]
        half = [[sum(a[i][k] * full[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
        return tuple(
            sum(half[i][k] * a[j][k] for k in range(n)) + q[i] * q[j] * q[n]
            for i in range(n)
            for j in range(i + 1)
        )

    def cell(setting: tuple[object, object]) -> object:
        members, peak = setting
        v = curvature / BATCH

        def step(state: tuple[object, ...], lr: object) -> tuple[tuple[object, ...], None]:
            mean, apart = state
            push = lr + MEMBER_LR  # gamma K = 1
            a = [
                [1.0 - push * curvature, -lr * mu, -MEMBER_LR * mu],
                [curvature, mu, 0.0],
                [curvature, 0.0, mu],
            ]
            q = [-push, 1.0, 1.0, v / members]
            if tied:
                a, q = [[a[0][0], -push * mu], [curvature, mu]], [-push, 1.0, v / members]
            mean = moved(a, mean, q)
            b = [[1.0 - MEMBER_LR * curvature, -MEMBER_LR * mu], [curvature, mu]]
            apart = moved(b, apart, [-MEMBER_LR, 1.0, v * (1.0 - 1.0 / members)])
            return (mean, apart), None

        share = jnp.minimum(jnp.arange(STEPS) / STEPS, 1.0)
        rates = peak / 10 + (peak - peak / 10) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        zero = jnp.zeros_like(curvature)
        start = (zero + 1.0, *(zero,) * (2 if tied else 5)), (zero,) * 3
        (mean, apart), _ = jax.lax.scan(step, start, rates)
        loss = 0.5 * curvature @ mean[0]
        return jnp.stack([loss, loss + 0.5 * curvature @ apart[0]])

    grid = np.array(list(itertools.product(MEMBERS, RATES)), dtype=float)
    compiled = jax.jit(lambda k, lr: jax.lax.map(cell, (k, lr)))
    return lambda: np.asarray(compiled(grid[:, 0], grid[:, 1]))


def main() -> None:
    h = harmonic(DIRECTIONS)
    cells = len(MEMBERS) * len(RATES)
    ours(h)  # compiles
    mine, extracted, ratio = paired(lambda: ours(h), lambda: matrix_by_matrix(h), 2)
    print(
        f"scheduled sweep, {cells} cells, processor time: nqm.solve {cells / mine:.4g} cells/s | "
        f"with matrices extracted for every step {cells / extracted:.4g} cells/s | "
        f"{ratio:.3g} times as fast"
    )
    for peer, name in (
        (jax_cells(h), "JAX"),
        (jax_cells(h, tied=True), "JAX with one momentum"),
    ):
        if peer is None:
            print("JAX: not installed (pip install jax, into an environment of its own)")
            return
        error = np.max(np.abs(ours(h) / peer() - 1))  # also compiles
        for way, function in (("nqm.solve", ours), ("rates in one call", together)):
            mine, theirs, ratio = paired(partial(function, h), peer, 9)
            print(
                f"  {way} {cells / mine:.4g} cells/s | {name} {cells / theirs:.4g} cells/s | nqm "
                f"{ratio:.3g} times as fast (median of rounds) | agreement {error:.1e}"
            )


if __name__ == "__main__":
    main()
