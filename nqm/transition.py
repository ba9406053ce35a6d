"""From a literal `update` to its transition, by running it on unit vectors.

One step of a linear algorithm is z' = A z + C e with z the state of one direction and e standard
minibatch noise (one entry per minibatch used). Steps compose as affine maps of the second moment,
(A2 A1, A2 Q1 A2' + Q2) with Q = C C' Var e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nqm.algorithms.base import Algorithm, State, Value
from nqm.problem import FloatArray


@dataclass(frozen=True)
class Transition:
    """One step for every direction.

    Attributes
    ----------
    matrix : ndarray, shape (..., n, n)
        A; the leading axes are those of curvature and learning rate.
    noise : ndarray, shape (..., n, m)
        C, one column per minibatch drawn.
    """

    matrix: FloatArray
    noise: FloatArray


class _UnitGradient:
    """Gradient of linear forms: multiplies by h and adds a fresh unit vector per minibatch."""

    def __init__(self, curvature: Any, first: int, size: int, axes: int):
        self.curvature, self.next, self.size, self.axes = curvature, first, size, axes
        self.shared: dict[int, int] = {}

    def __call__(self, x: Value, batch: int | None = None) -> Value:
        if batch is not None and batch in self.shared:
            column = self.shared[batch]
        else:
            column, self.next = self.next, self.next + 1
            if batch is not None:
                self.shared[batch] = column
        unit = np.zeros((self.size, *(1 for _ in range(self.axes))))
        if column < self.size:
            unit[column] = 1.0
        return self.curvature * x + unit


def _zero_rates(algorithm: Algorithm) -> Any:
    return 0.0 if algorithm.rate_count == 1 else (0.0, 0.0)


def minibatches(algorithm: Algorithm) -> int:
    """Minibatches one step of the literal algorithm draws; examples = this times batch size."""
    gradient = _UnitGradient(0.0, 0, 0, 0)
    algorithm.update((0.0,) * len(algorithm.coordinates), gradient, _zero_rates(algorithm), 0)
    return gradient.next


def extract(algorithm: Algorithm, curvature: ArrayLike, lr: Any, t: int = 0) -> Transition:
    """Transition of step t.

    Parameters
    ----------
    algorithm : Algorithm
    curvature : array_like
        h, any shape that broadcasts with `lr`.
    lr : array_like, or a pair of them
        Learning rate(s), as many as ``algorithm.rate_count``.
    t : int
        Step within the phase; only its remainder modulo ``algorithm.period`` matters.
    """
    n, m = len(algorithm.coordinates), minibatches(algorithm)
    h = np.asarray(curvature, dtype=np.float64)
    rates = tuple(np.asarray(r, dtype=np.float64) for r in (lr if isinstance(lr, tuple) else (lr,)))
    shape = np.broadcast_shapes(h.shape, *(rate.shape for rate in rates))
    # The axis of coefficients goes first, so that arithmetic runs along the long axes.
    unit = np.eye(n, n + m).reshape(n, n + m, *(1 for _ in shape))
    gradient = _UnitGradient(h, n, n + m, len(shape))
    new = algorithm.update(tuple(unit), gradient, rates if len(rates) > 1 else rates[0], t)
    rows = np.zeros((*shape, n, n + m))
    for i, form in enumerate(new):
        if not np.isscalar(form):  # a plain 0.0 is the zero form
            rows[..., i, :] = np.moveaxis(np.broadcast_to(form, (n + m, *shape)), 0, -1)
    return Transition(np.ascontiguousarray(rows[..., :n]), np.ascontiguousarray(rows[..., n:]))


def embedding(algorithm: Algorithm) -> tuple[FloatArray, FloatArray]:
    """How a phase starts: matrices (draws, normals) of shapes (n, number of draws / normals)."""

    def run(draws: int, normals: int) -> tuple[State, int, int]:
        used = [0, 0]
        size = draws + normals

        def source(kind: int, offset: int, limit: int) -> Callable[[], FloatArray]:
            def take() -> FloatArray:
                unit = np.zeros(size)
                if used[kind] < limit:
                    unit[offset + used[kind]] = 1.0
                used[kind] += 1
                return unit

            return take

        state = algorithm.embed(source(0, 0, draws), source(1, draws, normals))
        return state, used[0], used[1]

    _, draws, normals = run(0, 0)
    state, _, _ = run(draws, normals)
    rows = np.array([np.broadcast_to(form, draws + normals) for form in state])
    return rows[:, :draws], rows[:, draws:]


def resumption(old: Algorithm, new: Algorithm, age: int) -> tuple[FloatArray, FloatArray]:
    """How `new` goes on from `old` after `age` steps: start = lift @ state + normals @ noise.

    Returns
    -------
    lift : ndarray, shape (n new, n old)
    normals : ndarray, shape (n new, number of fresh normals)
    """
    n = len(old.coordinates)
    size = n + embedding(new)[1].shape[1]
    units = np.eye(size)
    evaluated = readout(old, age) @ units[:n]
    fresh = iter(units[n:])
    known = dict(zip(old.coordinates, units, strict=False))
    state = new.resume(known, lambda: evaluated, lambda: next(fresh))
    rows = np.array([np.broadcast_to(form, size) for form in state])
    return rows[:, :n], rows[:, n:]


def readout(algorithm: Algorithm, t: int) -> FloatArray:
    """Coefficients of the evaluated weights on the state after t steps, shape (n,)."""
    n = len(algorithm.coordinates)
    return np.asarray(algorithm.weights(tuple(np.eye(n)), t), dtype=np.float64)


def member_readout(algorithm: Algorithm, t: int) -> FloatArray:
    """Coefficients of every member's weights after t steps, shape (K, n); K = 0 without members."""
    n = len(algorithm.coordinates)
    rows = algorithm.member_weights(tuple(np.eye(n)), t)
    return np.array(rows, dtype=np.float64).reshape(len(rows), n)


def noise_moment(transition: Transition, noise_variance: ArrayLike) -> FloatArray:
    """Q = C C' Var e, shape (..., n, n)."""
    c = transition.noise
    covariance = np.einsum("...ij,...kj->...ik", c, c)
    return np.asarray(covariance * np.asarray(noise_variance)[..., None, None])


def spectral_radius(matrix: FloatArray) -> FloatArray:
    """Largest modulus of an eigenvalue, for matrices of shape (..., n, n)."""
    if matrix.shape[-1] == 1:
        return np.asarray(np.abs(matrix[..., 0, 0]))
    finite = np.asarray(np.isfinite(matrix).all(axis=(-2, -1)))
    safe = np.where(finite[..., None, None], matrix, 0.0)
    return np.where(finite, np.abs(np.linalg.eigvals(safe)).max(axis=-1), np.inf)
