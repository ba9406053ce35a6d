"""One step of a linear method as polynomials in its rates and the curvature.

A step's matrix A and noise factors C, D (`nqm.transition`) are polynomials in (lr, member_lr, h)
for every method whose `update` only adds and multiplies. Their coefficients do not depend on the
problem or the schedule, so that they are extracted once: by the literal `update` on polynomials.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm
from nqm.double_double import DoubleDouble
from nqm.problems.quadratic import FloatArray
from nqm.solvers._kernels.polynomial_steps import tabulate
from nqm.transition import UnitGradient, count_draws
from nqm.words import short_html, short_repr

#: Highest power of a rate or of h in one step, and most different products of powers.
DEGREE, TERMS = 2, 12
#: Most coordinates of a chain whose steps are polynomials, and of one that keeps every entry.
COORDINATES, SHORT = 128, 3
#: Most different steps of one period, and the longest period that is searched for ties.
KINDS, PERIOD = 256, 10_000

#: Powers of (lr, member_lr, h).
Powers = tuple[int, int, int]


class NotPolynomialError(TypeError):
    """The update of a method does more than add and multiply, or its degree is too high."""


class _Polynomial:
    """Polynomial in (lr, member_lr, h); its coefficients are numbers or linear forms."""

    __array_ufunc__ = None  # so that NumPy calls our operators for an array on the left
    __hash__ = None  # type: ignore[assignment]  # `==` has no answer before the rates are known

    def __init__(self, terms: dict[Powers, Any]):
        self.terms = terms

    def __add__(self, other: Any) -> _Polynomial:
        added = other.terms if isinstance(other, _Polynomial) else {(0, 0, 0): other}
        total = dict(self.terms)
        for powers, value in added.items():
            total[powers] = total[powers] + value if powers in total else value
        return _Polynomial(total)

    __radd__ = __add__

    def __neg__(self) -> _Polynomial:
        return _Polynomial({powers: -value for powers, value in self.terms.items()})

    def __sub__(self, other: Any) -> _Polynomial:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> _Polynomial:
        return self.__neg__().__add__(other)

    def __mul__(self, other: Any) -> _Polynomial:
        if not isinstance(other, _Polynomial):
            return _Polynomial({powers: value * other for powers, value in self.terms.items()})
        total = _Polynomial({})
        for (a, b, c), x in self.terms.items():
            for (i, j, k), y in other.terms.items():
                powers = a + i, b + j, c + k
                if max(powers) > DEGREE:
                    raise NotPolynomialError(f"a power above {DEGREE}")
                total = total + _Polynomial({powers: x * y})
        return total

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> _Polynomial:
        if isinstance(other, _Polynomial):
            raise NotPolynomialError("a quotient of polynomials")
        return _Polynomial({powers: value / other for powers, value in self.terms.items()})

    def _refuse(self, *_: object) -> Any:
        raise NotPolynomialError("a decision about rates or curvatures")

    __bool__ = __eq__ = __ne__ = _refuse  # Python would answer these by identity


@dataclass(frozen=True)
class StepPolynomial:
    """Coefficients of A, C and D of the steps at some times.

    Attributes
    ----------
    powers : ndarray of int, shape (k, 3)
        Powers of (lr, member_lr, h) of each term.
    row, column : ndarray of int, shape (e,)
        Place in A of each entry that is not always 0, row by row; of a short state of all.
    matrix : ndarray, shape (times, k, e)
        Coefficients of these entries.
    driven : ndarray of int, shape (w,)
        Coordinates that noise drives.
    noise, own : ndarray, shape (times, k, w, m) and (times, k, w, r)
        Coefficients of their rows of C and D; those of terms with h are 0.
    """

    powers: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    matrix: FloatArray
    driven: NDArray[np.int64]
    noise: FloatArray
    own: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    def dense(self, coordinates: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coefficients of whole matrices.

        Parameters
        ----------
        coordinates : int
            n, the number of coordinates.

        Returns
        -------
        matrix, noise, own : ndarray, shape (times, k, n, n), (times, k, n, m), (times, k, n, r)
            Those of A, C and D.
        """
        times, terms = self.matrix.shape[:2]
        matrix = np.zeros((times, terms, coordinates, coordinates))
        matrix[:, :, self.row, self.column] = self.matrix
        noise = np.zeros((times, terms, coordinates, self.noise.shape[3]))
        own = np.zeros((times, terms, coordinates, self.own.shape[3]))
        noise[:, :, self.driven], own[:, :, self.driven] = self.noise, self.own
        return matrix, noise, own

    @classmethod
    def of(
        cls, powers: NDArray[np.int64], matrix: FloatArray, noise: FloatArray, own: FloatArray
    ) -> StepPolynomial:
        """Keep the entries that are not 0 in all terms, or up to `SHORT` coordinates all.

        Parameters
        ----------
        powers, matrix, noise, own : ndarray
            Powers of each term, and coefficients as `dense` returns them.

        Returns
        -------
        StepPolynomial
            The same polynomials.
        """
        short = matrix.shape[3] <= SHORT
        row, column = np.nonzero(matrix.any(axis=(0, 1)) | short)
        driven = np.flatnonzero(noise.any(axis=(0, 1, 3)) | own.any(axis=(0, 1, 3)) | short)
        entries = np.ascontiguousarray(matrix[:, :, row, column])
        return cls(powers, row, column, entries, driven, noise[:, :, driven], own[:, :, driven])

    def without(self, tied: Ties) -> StepPolynomial:
        """Polynomials of the coordinates that are kept.

        Parameters
        ----------
        tied : Ties
            Of the n coordinates.

        Returns
        -------
        StepPolynomial
            `self` if all are kept.
        """
        if tied.kept.size == tied.factor.size:
            return self
        matrix, noise, own = (part[:, :, tied.kept] for part in self.dense(tied.factor.size))
        return self.of(self.powers, matrix @ tied.whole, noise, own)


@dataclass(frozen=True)
class Ties:
    """Coordinates of a chain that are multiples of others at all times.

    The base's and the members' momentum of late-phase weights are moved alike, by gradients that
    differ by a factor. If both begin at 0, one of them tells the other.

    Attributes
    ----------
    kept : ndarray of int, shape (m,)
        Coordinates of which the others are multiples, rising.
    source : ndarray of int, shape (n,)
        Of which one of `kept` each coordinate is a multiple, and
    factor : ndarray, shape (n,)
        by which factor; 1 for those that are kept.
    """

    kept: NDArray[np.int64]
    source: NDArray[np.int64]
    factor: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def whole(self) -> FloatArray:
        """The state as a linear form of what is kept, (n, m)."""
        rows = np.zeros((self.factor.size, self.kept.size))
        rows[np.arange(self.factor.size), self.source] = self.factor
        return rows


@functools.lru_cache(maxsize=256)
def ties(algorithm: Algorithm, still: tuple[int, ...]) -> Ties:
    """Find coordinates that are multiples of others at all times, whatever the rates.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of a single chain.
    still : tuple of int
        Coordinates that are 0 at its first step; only these are looked at.

    Returns
    -------
    Ties
        Every coordinate is kept if nothing is known of the method's steps.
    """
    kept = np.arange(len(algorithm.coordinates))
    source, factor = kept.copy(), np.ones(kept.size)
    time, polynomial = algorithm.time, None
    if len(still) > 1 and not time.update_never_repeats and time.period <= PERIOD:
        polynomial = step_polynomial(algorithm, np.unique(time.reduced(np.arange(time.period))))
    if polynomial is not None:
        matrix, noise, own = polynomial.dense(kept.size)
        drawn, left = np.concatenate([noise, own], axis=3), list(still)
        while pair := _tied_pair(matrix, drawn, left):
            tied, to, times = pair
            matrix[..., to] += times * matrix[..., tied]
            matrix[..., tied] = 0.0
            left.remove(tied)
            factor[source == tied] *= times
            source[source == tied] = to
            kept = kept[kept != tied]
    return Ties(kept, np.searchsorted(kept, source), factor)


def _tied_pair(
    matrix: FloatArray, drawn: FloatArray, still: Sequence[int]
) -> tuple[int, int, float] | None:
    """Coordinates i, j and c with z_i = c z_j at all times, to the last bit of all coefficients."""
    for i, j in itertools.permutations(still, 2):
        others = np.delete(matrix, [i, j], axis=3)
        own, to = (
            np.concatenate([others[:, :, k], drawn[:, :, k]], axis=2).reshape(-1) for k in (i, j)
        )
        used = np.flatnonzero(to)
        factor = float(own[used[0]] / to[used[0]]) if used.size else 0.0
        left = matrix[..., i, j] + factor * matrix[..., i, i]
        right = factor * (matrix[..., j, j] + factor * matrix[..., j, i])
        if factor and (own == factor * to).all() and (left == right).all():
            return i, j, factor
    return None


def step_polynomial(
    algorithm: Algorithm, times: NDArray[np.int64], still: tuple[int, ...] = ()
) -> StepPolynomial | None:
    """Extract the polynomials of the steps at several times.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of a single chain.
    times : ndarray of int, shape (T,)
        As `TimeDependence.reduced` returns them, distinct.
    still : tuple of int
        As in `ties`: the polynomials are those of the coordinates that it keeps.

    Returns
    -------
    StepPolynomial or None
        None if the steps are not such polynomials: the method divides by its rate or decides by it,
        the noise of one step is itself multiplied by h, or the degree or the number of coordinates
        is too high.
    """
    if len(algorithm.coordinates) > COORDINATES:
        return None
    if algorithm.time.update_never_repeats:
        parts = [_extracted(algorithm, times)] if algorithm.time.period == 1 else None
        return _joined(parts)
    return _same(algorithm, tuple(times.tolist()), still) if times.size <= KINDS else None


@functools.lru_cache(maxsize=256)
def _same(
    algorithm: Algorithm, times: tuple[int, ...], still: tuple[int, ...]
) -> StepPolynomial | None:
    """As `step_polynomial`, kept from one call to the next."""
    found = _joined([_extracted(algorithm, np.array([t]), t) for t in times])
    return found if found is None else found.without(ties(algorithm, still))


#: Coefficients by product of powers, each of shape (T or 1, n, n + m + r), and m.
_Terms = tuple[dict[Powers, FloatArray], int]


def exact_matrix(algorithm: Algorithm) -> tuple[NDArray[np.int64], FloatArray] | None:
    """Extract the matrix A of one step as polynomials with coefficients of two doubles.

    Parameters
    ----------
    algorithm : Algorithm
        Linear method of a single chain, whose steps are all the same.

    Returns
    -------
    powers : ndarray of int, shape (k, 3)
        Powers of (lr, member_lr, h) of each term.
    matrix : ndarray, shape (2, k, n, n)
        Coefficients, and their parts below the precision of a double.
        None in place of both as for `step_polynomial`.
    """
    n = len(algorithm.coordinates)
    new = _updated(algorithm, 0, DoubleDouble)
    if new is None:
        return None
    terms: dict[Powers, FloatArray] = {}
    for i, form in enumerate(new):
        for powers, value in form.terms.items() if isinstance(form, _Polynomial) else ():
            whole = value if isinstance(value, DoubleDouble) else DoubleDouble(value)
            rows = terms.setdefault(powers, np.zeros((2, n, n)))
            for part, number in zip(rows, (whole.high, whole.low), strict=True):
                part[i] = np.broadcast_to(number, (len(number), 1) if np.ndim(number) else (n, 1))[
                    :n, 0
                ]
    keys = sorted(terms)
    if not keys or len(keys) > TERMS:
        return None
    return np.array(keys, dtype=np.int64), np.stack([terms[key] for key in keys], axis=1)


def _updated(algorithm: Algorithm, t: Any, as_value: Callable[[FloatArray], Any]) -> Any:
    """New state after one `update` on polynomials; None if it is none."""
    drawn = count_draws(algorithm)
    n, m, r = len(algorithm.coordinates), drawn.minibatches, drawn.normals
    size = n + m + r

    def as_form(unit: FloatArray) -> _Polynomial:
        return _Polynomial({(0, 0, 0): as_value(unit)})

    gradient = UnitGradient(_Polynomial({(0, 0, 1): 1.0}), size, n, n + m, 1, as_form)
    rates = [_Polynomial({(1, 0, 0): 1.0}), _Polynomial({(0, 1, 0): 1.0})][: algorithm.rate_count]
    forms = tuple(as_form(form) for form in np.eye(n, size).reshape(n, size, 1))
    lr: Any = tuple(rates) if algorithm.rate_count == 2 else rates[0]
    try:
        return algorithm.update(forms, gradient, lr, t)
    except TypeError:  # also of a function of NumPy or of math on a rate
        return None


def _extracted(
    algorithm: Algorithm, times: NDArray[np.int64], t: int | None = None
) -> _Terms | None:
    """Run `update` on polynomials; `t` in place of an array of times for most methods."""
    drawn = count_draws(algorithm)
    n, m, r = len(algorithm.coordinates), drawn.minibatches, drawn.normals
    size = n + m + r
    new = _updated(algorithm, times if t is None else t, np.asarray)
    if new is None:
        return None
    terms: dict[Powers, FloatArray] = {}
    for i, form in enumerate(new):
        # A plain number is the zero form.
        for powers, value in form.terms.items() if isinstance(form, _Polynomial) else ():
            rows = terms.setdefault(powers, np.zeros((times.size, n, size)))
            rows[:, i, :] = np.broadcast_to(value, (size, times.size)).T
    return terms, m


def _joined(found: list[_Terms | None] | None) -> StepPolynomial | None:
    """One array over all times, of the entries that are not 0 in all of them."""
    parts = [part for part in found or [None] if part is not None]
    if found is None or len(parts) < len(found):
        return None
    powers = sorted({key for terms, _ in parts for key, value in terms.items() if value.any()})
    if not powers or len(powers) > TERMS:
        return None
    zero = np.zeros_like(next(iter(parts[0][0].values())))
    # (times, k, n, n + m + r)
    whole = np.concatenate(
        [np.stack([terms.get(key, zero) for key in powers], axis=1) for terms, _ in parts]
    )
    n, m = whole.shape[2], parts[0][1]
    for power, term in zip(powers, np.moveaxis(whole[..., n:], 1, 0), strict=True):
        if power[2] and term.any():
            return None  # noise that is multiplied by h
    abc = np.split(whole, [n, n + m], axis=3)
    return StepPolynomial.of(np.array(powers, dtype=np.int64), *abc)


@dataclass(frozen=True)
class StepTable:
    """Steps at given rates, still as polynomials in h: arrays for the kernel.

    Attributes
    ----------
    matrix : ndarray, shape (g, T, 3, e)
        Coefficients of 1, h, h^2 of each entry of A.
    fixed : ndarray of bool, shape (e,)
        Whether an entry is the same in all T steps.
    first : ndarray of int, shape (n + 1,)
        Index of the first entry of each row of A.
    column : ndarray of int, shape (e,)
        Column of each entry.
    driven : ndarray of int, shape (p, 2)
        Pairs of coordinates (i, j <= i) to whose covariance noise adds.
    drive, own : ndarray, shape (g, T, p)
        What a unit of gradient-noise variance, and the method's own noise, add to each pair.
    """

    matrix: FloatArray
    fixed: NDArray[np.bool_]
    first: NDArray[np.int64]
    column: NDArray[np.int64]
    driven: NDArray[np.int64]
    drive: FloatArray
    own: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


@functools.cache
def lower(n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of a packed symmetric matrix.

    Parameters
    ----------
    n : int
        Number of rows.

    Returns
    -------
    row, column : ndarray of int, shape (n (n + 1) / 2,)
        Every (i, j <= i), in order.
    """
    return np.tril_indices(n)


def step_table(
    polynomial: StepPolynomial, kind: NDArray[np.int64], rates: FloatArray, coordinates: int
) -> StepTable:
    """Evaluate the polynomials at the rates of every step.

    Parameters
    ----------
    polynomial : StepPolynomial
        Coefficients at some times.
    kind : ndarray of int, shape (T,)
        Which of these times each step has.
    rates : ndarray, shape (g, T, 2)
        lr and member_lr of each step (any number for a method without the second), in each of g
        groups of directions.
    coordinates : int
        n, the number of coordinates.

    Returns
    -------
    StepTable
        Arrays over the groups and the T steps.
    """
    entries = polynomial.row.size
    i, j = lower(polynomial.driven.size)
    matrix = np.zeros((*rates.shape[:2], 3, entries))
    drive, own = np.zeros((2, *rates.shape[:2], i.size))
    fixed = np.ones(entries, dtype=bool)
    tabulate(
        polynomial.powers,
        polynomial.matrix,
        polynomial.noise,
        polynomial.own,
        kind,
        rates,
        matrix,
        drive,
        own,
        fixed,
    )
    return StepTable(
        matrix=matrix,
        fixed=fixed,
        first=np.searchsorted(polynomial.row, np.arange(coordinates + 1)),
        column=polynomial.column,
        driven=np.stack([polynomial.driven[i], polynomial.driven[j]], axis=1),
        drive=drive,
        own=own,
    )
