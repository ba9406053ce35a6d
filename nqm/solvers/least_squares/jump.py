"""Many equal cycles of one-pass least squares at once, by repeated squaring.

One number 2 L couples all directions, so the map of all packed moments is a dense matrix: diagonal
blocks and a term of rank one for each mode. Its powers of 2 take one product of matrices each; then
10^9 steps cost some thirty of them, and each record that many products with a vector.

A slow direction's diagonal entry is 1 - 2 lr h + ...; its rounding alone is an error of 1e-16 in
each step. So a power I + E is stored with the diagonal of E apart: (I + E)^2 = I + 2 E + E^2 keeps
the relative accuracy of a small E, and entries far from 1 are squared as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nqm.limits import memory_limit
from nqm.problems.quadratic import FloatArray
from nqm.solvers.least_squares.packed import Coupled

#: Multiplications of a product of matrices in the time of one elsewhere.
DENSE = 8.0
#: Smaller entries are 0: subnormal numbers slow every product down.
TINY = 1e-290


class Power(NamedTuple):
    """A square matrix whose diagonal is near 1, or several of them.

    Attributes
    ----------
    off : ndarray, shape (..., n, n)
        Entries off the diagonal; 0 on it.
    excess : ndarray, shape (..., n)
        Diagonal - 1, to the last digit where it is small.
    diagonal : ndarray, shape (..., n)
        Diagonal, to the last digit where it is small.
    """

    off: FloatArray
    excess: FloatArray
    diagonal: FloatArray

    @classmethod
    def of(cls, matrix: FloatArray, excess: FloatArray) -> Power:
        """Split a matrix whose diagonal is 1 + `excess`.

        Parameters
        ----------
        matrix : ndarray, shape (..., n, n)
            Its diagonal is used where it is far from 1.
        excess : ndarray, shape (..., n)
            Diagonal - 1.

        Returns
        -------
        Power
            The matrix.
        """
        diagonal = np.diagonal(matrix, axis1=-2, axis2=-1)
        return cls(matrix * (1.0 - np.eye(matrix.shape[-1])), *_two_forms(excess, diagonal))

    def then(self, last: Power) -> Power:
        """Multiply from the left: this map first, then `last`.

        Parameters
        ----------
        last : Power
            Map applied afterwards.

        Returns
        -------
        Power
            ``last @ self``.
        """
        off = last.off @ self.off
        around = np.diagonal(off, axis1=-2, axis2=-1).copy()
        off += last.diagonal[..., :, None] * self.off
        off += last.off * self.diagonal[..., None, :]
        np.einsum("...ii->...i", off)[...] = 0.0
        off[np.abs(off) < TINY] = 0.0
        excess = self.excess + last.excess + self.excess * last.excess + around
        return Power(off, *_two_forms(excess, self.diagonal * last.diagonal + around))

    def __matmul__(self, x: FloatArray) -> FloatArray:
        """Apply the map to vectors, shape (..., n, columns)."""
        return np.asarray(self.off @ x + self.diagonal[..., None] * x)


def _two_forms(excess: FloatArray, diagonal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Diagonal - 1 and diagonal, each from the one of the two that holds its digits."""
    near = np.abs(excess) < 0.5
    diagonal = np.where(near, 1.0 + excess, diagonal)
    diagonal[np.abs(diagonal) < TINY] = 0.0
    return np.where(near, excess, diagonal - 1.0), diagonal


class Powers:
    """Powers of 2 of a map, computed when they are first needed."""

    def __init__(self, step: Power):
        self._powers = [step]

    def apply(self, count: int, x: FloatArray) -> FloatArray:
        """Apply the map `count` times.

        Parameters
        ----------
        count : int
            Number of times, >= 0.
        x : ndarray, shape (..., n, columns)
            Vectors.

        Returns
        -------
        ndarray, shape (..., n, columns)
            The image of `x`.
        """
        for bit in range(count.bit_length()):
            if bit == len(self._powers):
                self._powers.append(self._powers[-1].then(self._powers[-1]))
            if count >> bit & 1:
                x = self._powers[bit] @ x
        return x


def pays(coupled: Coupled, steps: int, period: int) -> bool:
    """Whether powers of a cycle's map are cheaper than steps, and fit in memory.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.
    steps, period : int
        Steps to take, and those of one cycle.

    Returns
    -------
    bool
        Decided by counts of multiplications, so it is the same on any machine with the memory.
    """
    size = state_size(coupled)
    cycles = steps // period
    products = math.log2(max(cycles, 1)) + period
    if products * size**3 / DENSE >= cycles * period * step_cost(coupled):
        return False
    held = (math.log2(cycles) + 4.0) * size**2 + 3.0 * period * coupled.entries
    return 8.0 * held < memory_limit()


def step_cost(coupled: Coupled) -> float:
    """Multiplications of one step, with 20 000 for overhead.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.

    Returns
    -------
    float
        To order of magnitude.
    """
    return 20_000.0 + coupled.entries


def state_size(coupled: Coupled) -> int:
    """Number of packed moments of all directions, and the 1 that noise multiplies.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.

    Returns
    -------
    int
        Size of the dense map.
    """
    return int(coupled.packed[-1].stop * coupled.problem.directions) + 1


class Jump:
    """Whole cycles of one stretch of a phase on which steps repeat.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.
    start, period : int
        First step of the stretch, where every cycle begins, and steps of one cycle.
    age : int
        Steps of the method before the phase.
    """

    def __init__(self, coupled: Coupled, start: int, period: int, age: int):
        self.start, self.period = start, period
        steps, kind = coupled.steps(start, start + period, age)
        moment_excess, mean_excess = coupled.excess(start, start + period, age)
        labels = np.zeros(len(coupled.modes))
        labels[0] = coupled.problem.label_noise
        moments: Power | None = None
        means: Power | None = None
        for k in kind:
            dense = _dense(steps.moment[k], steps.gain[k], steps.sight[k], labels, steps.own[k])
            around = np.einsum("mnd,mnd->nd", steps.gain[k], steps.sight[k])
            excess = np.append((moment_excess[k] + around).ravel(), 0.0)
            one = Power.of(dense, excess)
            moments = one if moments is None else moments.then(one)
            matrix = np.moveaxis(steps.matrix[k], -1, 0)
            mean = Power.of(np.ascontiguousarray(matrix), mean_excess[k].T)
            means = mean if means is None else means.then(mean)
        assert moments is not None
        assert means is not None
        self._moments, self._means = Powers(moments), Powers(means)

    def moments(self, cycles: int, moment: FloatArray) -> FloatArray:
        """Move the packed moments through whole cycles.

        Parameters
        ----------
        cycles : int
            Number of cycles.
        moment : ndarray, shape (2, N, d)
            Moments due to the start, and to noise.

        Returns
        -------
        ndarray, shape (2, N, d)
            Moments after them.
        """
        state = np.vstack([moment.reshape(2, -1).T, [0.0, 1.0]])
        moved = self._moments.apply(cycles, state)
        return np.ascontiguousarray(moved[:-1].T).reshape(moment.shape)

    def means(self, cycles: int, mean: FloatArray) -> FloatArray:
        """Move the means through whole cycles.

        Parameters
        ----------
        cycles : int
            Number of cycles.
        mean : ndarray, shape (n, d)
            Means of all coordinates.

        Returns
        -------
        ndarray, shape (n, d)
            Means after them.
        """
        return np.ascontiguousarray(self._means.apply(cycles, mean.T[..., None])[..., 0].T)


def _dense(
    moment: FloatArray, gain: FloatArray, sight: FloatArray, labels: FloatArray, own: FloatArray
) -> FloatArray:
    """Matrix of all packed moments of all directions, and of the constant 1."""
    size, _, d = moment.shape
    modes = len(labels)
    full = np.zeros((size * d + 1, size * d + 1))
    flat = full[:-1, :-1]
    np.matmul(gain.reshape(modes, -1).T, sight.reshape(modes, -1), out=flat)
    place = np.arange(d)
    for i in range(size):
        for j in range(size):
            flat[i * d + place, j * d + place] += moment[i, j]
    full[:-1, -1] = labels @ gain.reshape(modes, -1) + own.ravel()
    full[-1, -1] = 1.0
    return full
