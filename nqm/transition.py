"""Transition matrices of a literal `update`, extracted by applying it to unit vectors.

One step of a linear algorithm is z' = A z + C e with z the state of one direction and e standard
minibatch noise (one entry per minibatch used), plus D n if the method draws normals n itself.
Steps compose as affine maps of the second moment, (A2 A1, A2 Q1 A2' + Q2) with
Q = C C' Var e + D D'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from nqm.algorithms.base import Algorithm, State, Value
from nqm.double_double import DoubleDouble
from nqm.limits import check_memory
from nqm.problems.quadratic import FloatArray
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class Transition:
    """Coefficients of one step for every direction.

    Attributes
    ----------
    matrix : ndarray, shape (..., n, n)
        A; the leading axes are those of curvature and learning rate.
    noise : ndarray, shape (..., n, m)
        C, one column per minibatch drawn.
    own : ndarray, shape (..., n, r)
        D, one column per normal that the method draws itself (rounding), independent of batch size.
    low : ndarray, shape (..., n, n)
        Part of A below the precision of a double if it was extracted as exact; else 0.
    """

    matrix: FloatArray
    noise: FloatArray
    own: FloatArray
    low: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


class _Tally:
    """Gradient that counts the minibatches and normals drawn, and returns 0."""

    def __init__(self) -> None:
        self.minibatches, self.examples, self.normals = 0, 0.0, 0
        self.named: set[int] = set()

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        if batch not in self.named:
            self.minibatches, self.examples = self.minibatches + 1, self.examples + size
            if batch is not None:
                self.named.add(batch)
        return 0.0

    def normal(self) -> Value:
        self.normals += 1
        return 0.0


class UnitGradient:
    """Gradient of linear forms: h times the form, plus a new unit vector for each minibatch."""

    def __init__(
        self, curvature: Any, size: int, first: int, first_normal: int, axes: int, as_form: Any
    ):
        self.curvature, self.size, self.axes, self.as_form = curvature, size, axes, as_form
        self.next, self.next_normal = first, first_normal
        self.shared: dict[int, int] = {}

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        """Compute the gradient at a linear form; see `Gradient`."""
        if batch is not None and batch in self.shared:
            column = self.shared[batch]
        else:
            column, self.next = self.next, self.next + 1
            if batch is not None:
                self.shared[batch] = column
        return self.curvature * x + self._unit(column, 1.0 / math.sqrt(size))

    def normal(self) -> Value:
        """Return the unit vector of a fresh normal."""
        column, self.next_normal = self.next_normal, self.next_normal + 1
        return self._unit(column)

    def _unit(self, column: int, size: float = 1.0) -> Value:
        unit = np.zeros((self.size, *(1 for _ in range(self.axes))))
        unit[column] = size
        return self.as_form(unit)


def count_draws(algorithm: Algorithm) -> _Tally:
    """Count what one step of the literal algorithm draws.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.

    Returns
    -------
    _Tally
        Its `minibatches`, their `examples` in batch sizes, and the method's own `normals`.
    """
    tally = _Tally()
    rates: Any = 0.0 if algorithm.rate_count == 1 else (0.0, 0.0)
    algorithm.update((0.0,) * len(algorithm.coordinates), tally, rates, 0)
    return tally


@functools.lru_cache(maxsize=256)
def minibatches(algorithm: Algorithm) -> float:
    """Count the minibatches that one step of the literal algorithm draws.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.

    Returns
    -------
    float
        Examples of one step over the batch size: a whole number unless members share a part of
        their examples.
    """
    return count_draws(algorithm).examples


def minibatch_count(algorithm: Algorithm) -> int:
    """Count the columns of a transition's noise: minibatches of any size that one step draws.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.

    Returns
    -------
    int
        Number m of columns.
    """
    return count_draws(algorithm).minibatches


def extract(
    algorithm: Algorithm, curvature: ArrayLike, lr: Any, t: Any = 0, *, exact: bool = False
) -> Transition:
    """Extract the transition of step t by applying `update` to unit vectors.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.
    curvature : array_like
        Eigenvalues h of the Hessian, of any shape that broadcasts with `lr`.
    lr : array_like, or a pair of them
        Learning rate(s), as many as ``algorithm.rate_count``.
    t : int or array_like
        Step within the phase; only its remainder modulo ``algorithm.time.period`` matters, unless
        `update` never repeats. An array, which broadcasts with `curvature` and `lr`, is for methods
        whose `update` never repeats and has period 1.
    exact : bool
        Use twice double precision (`nqm.double_double`), for a matrix to be raised to a power.

    Returns
    -------
    Transition
        Leading axes of its arrays are the common shape of `curvature`, `lr` and `t`.
    """
    tally = count_draws(algorithm)
    n, m, r = len(algorithm.coordinates), tally.minibatches, tally.normals
    h = np.asarray(curvature, dtype=np.float64)
    rates = tuple(np.asarray(r, dtype=np.float64) for r in (lr if isinstance(lr, tuple) else (lr,)))
    shape = np.broadcast_shapes(h.shape, *(rate.shape for rate in rates), np.shape(t))
    # The axis of coefficients goes first, so that arithmetic runs along the long axes.
    unit = np.eye(n, n + m + r).reshape(n, n + m + r, *(1 for _ in shape))
    as_form = DoubleDouble if exact else np.asarray
    gradient = UnitGradient(h, n + m + r, n, n + m, len(shape), as_form)
    forms = tuple(as_form(form) for form in unit)
    new = algorithm.update(forms, gradient, rates if len(rates) > 1 else rates[0], t)
    rows, low = np.zeros((2, *shape, n, n + m + r))
    for i, form in enumerate(new):
        if isinstance(form, DoubleDouble):
            rows[..., i, :], low[..., i, :] = (
                np.moveaxis(np.broadcast_to(part, (n + m + r, *shape)), 0, -1)
                for part in (form.high, form.low)
            )
        elif not np.isscalar(form):  # a plain 0.0 is the zero form
            rows[..., i, :] = np.moveaxis(np.broadcast_to(form, (n + m + r, *shape)), 0, -1)
    parts = (*np.split(rows, [n, n + m], axis=-1), low[..., :n])
    return Transition(*(np.ascontiguousarray(part) for part in parts))


@functools.lru_cache(maxsize=256)
def embedding(algorithm: Algorithm) -> tuple[FloatArray, FloatArray]:
    """Extract the start of a phase from plain weights: draws @ starts + normals @ noise.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of the phase.

    Returns
    -------
    draws : ndarray, shape (n, number of draws)
        Share of each independent draw of the start in each coordinate.
    normals : ndarray, shape (n, number of normals)
        Share of each fresh standard normal.

    Raises
    ------
    NQMError
        If the method draws more starts than fit into memory.
    """

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
    name = f"the number of own starts of {type(algorithm).__name__}"
    check_memory(name, draws, 2.0 * draws * max(draws, len(algorithm.coordinates)))
    state, _, _ = run(draws, normals)
    rows = np.array([np.broadcast_to(form, draws + normals) for form in state])
    rows.flags.writeable = False  # one array for all that ask
    return rows[:, :draws], rows[:, draws:]


def resumption(old: Algorithm, new: Algorithm, age: int) -> tuple[FloatArray, FloatArray]:
    """Extract the start of a phase that keeps coordinates: lift @ state + normals @ noise.

    Parameters
    ----------
    old, new : Algorithm
        Methods of the phase before and of the phase that starts.
    age : int
        Steps that `old` has done.

    Returns
    -------
    lift : ndarray, shape (n new, n old)
        Coefficients of the old state.
    normals : ndarray, shape (n new, number of fresh normals)
        Coefficients of each fresh standard normal.
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


def origins(algorithm: Algorithm, known: Container[str] = ()) -> FloatArray:
    """Mark the coordinates that start at the origin of weight space, -w* in our coordinates.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of the phase.
    known : container of str
        Names of coordinates that are kept from an earlier phase.

    Returns
    -------
    ndarray, shape (n,)
        1 at the origin, else 0.
    """
    at = algorithm.constants
    begun = [at.get(n) == "origin" and n not in known for n in algorithm.coordinates]
    return np.array(begun, dtype=np.float64)


def readout(algorithm: Algorithm, t: int) -> FloatArray:
    """Extract the evaluated weights after t steps as a linear form of the state.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.
    t : int
        Steps done.

    Returns
    -------
    ndarray, shape (n,)
        Coefficient of each coordinate.
    """
    n = len(algorithm.coordinates)
    return np.asarray(algorithm.weights(tuple(np.eye(n)), t), dtype=np.float64)


def member_readout(algorithm: Algorithm, t: int) -> FloatArray:
    """Extract each member's weights after t steps as a linear form of the state.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method.
    t : int
        Steps done.

    Returns
    -------
    ndarray, shape (K, n)
        Coefficients of each member; K = 0 without members.
    """
    n = len(algorithm.coordinates)
    rows = algorithm.member_weights(tuple(np.eye(n)), t)
    return np.array(rows, dtype=np.float64).reshape(len(rows), n)


def noise_moment(transition: Transition, noise_variance: ArrayLike) -> FloatArray:
    """Compute the second moment of the noise of one step: Q = C C' Var e + D D'.

    Parameters
    ----------
    transition : Transition
        Gives C and D.
    noise_variance : array_like, shape (...)
        Var e of one minibatch's gradient, by direction.

    Returns
    -------
    ndarray, shape (..., n, n)
        Q.
    """
    c, d = transition.noise, transition.own
    covariance = np.einsum("...ij,...kj->...ik", c, c)
    moment = np.asarray(covariance * np.asarray(noise_variance)[..., None, None])
    return moment + np.einsum("...ij,...kj->...ik", d, d) if d.shape[-1] else moment


def spectral_radius(matrix: FloatArray) -> FloatArray:
    """Compute the largest modulus of an eigenvalue.

    Parameters
    ----------
    matrix : ndarray, shape (..., n, n)
        Any square matrices.

    Returns
    -------
    ndarray, shape (...)
        Infinite for a matrix with infinite or NaN entries.
    """
    if matrix.shape[-1] == 1:
        return np.asarray(np.abs(matrix[..., 0, 0]))
    finite = np.asarray(np.isfinite(matrix).all(axis=(-2, -1)))
    safe = np.where(finite[..., None, None], matrix, 0.0)
    return np.where(finite, np.abs(np.linalg.eigvals(safe)).max(axis=-1), np.inf)
