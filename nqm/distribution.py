"""The distribution of the loss over runs, without simulation.

With Gaussian weights the loss is a weighted sum of non-central chi-squares. With
``spread_i = h_i s_i / 2``, ``place_i = h_i mean_i^2 / 2`` and multiplicities n_i its cumulant
generating function is

    K(t) = sum_i n_i (-log(1 - 2 spread_i t) / 2 + place_i t / (1 - 2 spread_i t)).

A tail probability is the inverse Laplace integral of exp(K(t) - t x) / |t| along a contour that
crosses the real axis at the saddle point of this integrand and follows its steepest descent, so
that it neither oscillates nor cancels (Rice 1980, "Distribution of quadratic forms in normal random
variables -- evaluation by numerical integration", SIAM J. Sci. Stat. Comput. 1). Gauss rules of two
orders on each side of a polygon tell the error, and sides are halved until they agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from scipy.optimize import brentq

from nqm.errors import NQMError
from nqm.problems.quadratic import FloatArray, Problem
from nqm.result import check_level
from nqm.solvers._kernels.loss_law import (
    LARGEST_U,
    NODES,
    cumulant_slope,
    cumulants,
    cumulants_around,
)

#: Relative agreement of two orders of the rule that is asked for. The higher order is far better.
AGREEMENT = 1e-9
#: How far, over the width of its saddle, a contour's rule is as good as where it was made.
NEAR = 0.1
#: Logarithm of a tail that is below all that quantiles ask for.
SURELY = -60.0
#: Logarithm of the relative size of the part that is neglected at the end of a contour.
LOST = -36.0
#: Most sides of a contour, and most halvings of one.
SIDES, HALVINGS = 1000, 12
#: Terms of the series of directions with small |2 spread t|, exact to 1e-16.
TERMS = 30
#: Most complex numbers held at once.
CHUNK = 1_000_000


def _gauss(points: int) -> tuple[FloatArray, FloatArray]:
    """Gauss-Legendre rule on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return nodes, weights


_NODES = np.concatenate([_gauss(10)[0], _gauss(6)[0]])
_FINE = np.concatenate([_gauss(10)[1], np.zeros(6)])
_COARSE = np.concatenate([np.zeros(10), _gauss(6)[1]])


@dataclass(frozen=True)
class _Sum:
    """The part of the loss that varies, in units of its standard deviation.

    Attributes
    ----------
    count, spread, place : ndarray
        n, h s / 2 > 0 and h mean^2 / 2 by direction.
    mean : float
    """

    count: FloatArray
    spread: FloatArray
    place: FloatArray
    mean: float

    @classmethod
    def of(cls, count: FloatArray, spread: FloatArray, place: FloatArray) -> _Sum:
        """Sort directions, the largest spread first."""
        order = np.argsort(-spread, kind="stable")
        return cls(count[order], spread[order], place[order], float(count @ (spread + place)))

    @property
    def edge(self) -> float:
        """First singularity of the generating function."""
        return float(0.5 / self.spread[0])

    def guess(self, level: float) -> float:
        """Quantile, less the mean, of a chi-square of equal skewness by Wilson & Hilferty."""
        third = self.count @ (self.spread**2 * (8.0 * self.spread + 24.0 * self.place))
        degrees = 8.0 / max(float(third) ** 2, 1e-12)
        root = math.sqrt(2.0 / 9.0 / degrees)
        cube = max(1.0 - root * root + root * NormalDist().inv_cdf(level), 0.0) ** 3
        return math.sqrt(0.5 * degrees) * (cube - 1.0)

    @cached_property
    def series(self) -> FloatArray:
        """Power series in t of the sum over the directions from each on, (terms, d + 1)."""
        doubled, total = 2.0 * self.spread, np.zeros((TERMS + 1, self.spread.size + 1))
        power = self.count.copy()  # n (2 spread)^(k - 1)
        for k in range(1, TERMS + 1):
            added = power * self.place
            power = power * doubled
            total[k, :-1] = np.cumsum((added + power * (0.5 / k))[::-1])[::-1]
        return total

    def slope(self, t: float, centred: bool) -> float:
        """K'(t), less the mean if `centred`."""
        return float(cumulant_slope(self.count, self.spread, self.place, t, centred))

    def _beyond(self, largest: float) -> bool:
        """Whether t is too large for the compiled code, which takes squares of numbers like it."""
        return not 2.0 * self.spread[0] * largest < LARGEST_U

    def around(self, t: complex, centred: bool = False) -> tuple[float, complex, complex, float]:
        """Re K(t), K'(t) (less the mean's part if `centred`), K''(t), way to a singularity."""
        t = complex(t)
        if not self._beyond(abs(t)):
            out = np.empty(7)
            cumulants_around(self.count, self.spread, self.place, t.real, t.imag, out)
            value, mean = (out[5], self.mean) if centred else (out[0], 0.0)
            return value, complex(out[1] - mean, out[2]), complex(out[3], out[4]), out[6]
        r = 1.0 / (1.0 - 2.0 * self.spread * t)
        s, p = self.spread * r, self.place * r
        value, slope = 0.5 * np.log(r) + t * p, s + p * r
        mean = self.mean if centred else 0.0
        second = 2.0 * s * (s + 2.0 * p * r)
        room = float(np.min(0.5 / np.abs(s)))
        total = self.count @ np.stack([value, slope, second], axis=1)
        return float((total[0] - mean * t).real), total[1] - mean, total[2], room

    def generating(self, t: FloatArray, centred: bool) -> FloatArray:
        """K(t) of complex t, shape (k,), less mean t if `centred`."""
        if self._beyond(float(np.abs(t).max())):
            total = np.zeros(t.size, dtype=complex)
            rows = max(1, CHUNK // self.spread.size)
            for first in range(0, t.size, rows):
                total[first : first + rows] = self._each(t[first : first + rows, None], centred)
            return total
        nodes = NODES
        padded = np.full(-(-t.size // nodes) * nodes, t[-1])
        padded[: t.size] = t
        parts = np.empty((2, padded.size))
        x, y = padded.real.copy(), padded.imag.copy()
        directions = self.count, self.spread, self.place
        cumulants(*directions, self.series, centred, x, y, *parts)
        return np.asarray(parts[0] + 1j * parts[1])[: t.size]

    def _each(self, t: FloatArray, centred: bool) -> FloatArray:
        """`generating` of few t, shape (k, 1), summed over directions one by one."""
        u = 2.0 * self.spread * t
        # The logarithm of a complex number by real functions, which are faster and as accurate.
        size = 0.5 * np.log1p(u.real * (u.real - 2.0) + u.imag * u.imag)
        log = size + 1j * np.arctan2(-u.imag, 1.0 - u.real)
        pushed = t / (1.0 - u)
        if centred:
            return np.asarray((-0.5 * (log + u) + self.place * u * pushed) @ self.count)
        return np.asarray((-0.5 * log + self.place * pushed) @ self.count)


class LossDistribution:
    """Distribution of the loss for Gaussian weights.

    Parameters
    ----------
    problem : Problem
    mean : ndarray, shape (d,)
        Mean displacement of the weights in each direction.
    variance : ndarray, shape (d,) or (d, d)
        Variances of independent directions, or the covariance of correlated ones (multiplicity 1).

    Attributes
    ----------
    mean, sd : float
        Mean and standard deviation of the loss.
    offset : float
        Least possible loss: the sum over directions whose weights have no variance.

    Raises
    ------
    NQMError
        If the problem correlates its directions and `variance` holds no covariance, or has
        `expected_losses_only`.
    """

    def __init__(self, problem: Problem, mean: FloatArray, variance: FloatArray):
        problem.check_distribution("LossDistribution")
        with np.errstate(under="ignore"):
            count, place, spread = _principal(problem, np.asarray(mean), np.asarray(variance))
        moving = spread > 0.0
        #: Least loss: of what does not vary.
        self.offset = float(count[~moving] @ place[~moving])
        count, spread, place = count[moving], spread[moving], place[moving]
        varying = float(count @ (spread + place))
        self.mean = self.offset + varying
        # Scaled, as squares of tiny losses would underflow.
        scale = float(np.max(spread + place, initial=0.0)) or 1.0
        s, p = spread / scale, place / scale
        self.sd = scale * math.sqrt(float(count @ (2.0 * s * s + 4.0 * s * p)))
        unit = self.sd or 1.0
        self._sum = _Sum.of(count, spread / unit, place / unit)

    @property
    def parts(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Counts n, spreads h s / 2 > 0 and places h mean^2 / 2 of the chi-squares, (k,)."""
        return self._sum.count, self._sum.spread * self.sd, self._sum.place * self.sd

    def cdf(self, loss: float) -> float:
        """Probability that the loss is at most `loss`.

        The relative error is at most 1e-9, of the probability or of its complement.

        Parameters
        ----------
        loss : float

        Returns
        -------
        float
            Probability; NaN if `loss` is NaN.

        Raises
        ------
        NQMError
            If this accuracy is not reached.
        """
        if math.isnan(loss) or not self.sd:
            return math.nan if math.isnan(loss) else float(loss >= self.offset)
        if loss <= self.offset:
            return 0.0
        x = (loss - self.offset) / self.sd
        centred = x > 0.5 * self._sum.mean
        y = (loss - self.mean) / self.sd if centred else x
        if math.isinf(y):
            return 1.0
        upper = centred and y > 0.0
        share = math.exp(self._log_tail(y, centred, upper))
        return 1.0 - share if upper else share

    def _log_tail(self, y: float, centred: bool, upper: bool) -> float:
        """Logarithm of the probability beyond y (in sd, less the mean if `centred`)."""
        t = _saddle(self._sum, y, centred, upper)
        bound = self._sum.around(t, centred)[0] - t * y
        if bound < math.log(np.finfo(float).tiny):
            return -math.inf  # by Chernoff's bound
        return _contour(self._sum, y, centred, t).at(y)[0]

    def quantile(self, level: float) -> float:
        """Quantile of the loss: the loss below which a share `level` of runs lies.

        `cdf` at the quantile agrees with `level` to a relative 1e-9, of `level` or of 1 - level,
        whichever is smaller. The rounding of the loss limits this where mean / sd is above 1e6.

        Parameters
        ----------
        level : float
            Probability, 1e-12 <= level <= 1 - 1e-12.

        Returns
        -------
        float
            Loss.

        Raises
        ------
        NQMError
            If `level` is out of range, or if this accuracy is not reached.
        """
        check_level("quantile.level", level)
        form = self._sum
        if not self.sd:
            return self.offset
        upper = level > 0.5
        goal = math.log1p(-level) if upper else math.log(level)
        middle = 0.5 * form.mean
        # P(loss < mean - y sd) <= exp(-y^2 / 2), so that most levels need no look so far left.
        log_level = math.log(level)
        left = -0.5 * middle * middle > log_level
        if left and self._log_tail(middle, False, False) > log_level:
            return self.offset + self.sd * _solve(form, log_level, middle, False, False)
        y = max(form.guess(level), -middle)
        return self.mean + self.sd * _solve(form, goal, y, True, upper)


def loss_quantile(problem: Problem, mean: FloatArray, variance: FloatArray, level: float) -> float:
    """Quantile of the loss for Gaussian weights with these moments.

    Parameters
    ----------
    problem, mean, variance
        See `LossDistribution`.
    level : float
        Probability, 1e-12 <= level <= 1 - 1e-12.

    Returns
    -------
    float
        Loss.

    Raises
    ------
    NQMError
        As `LossDistribution` and `LossDistribution.quantile`.
    """
    return LossDistribution(problem, mean, variance).quantile(level)


def _principal(
    problem: Problem, mean: FloatArray, variance: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Counts, places and spreads of the independent parts of the loss."""
    half = 0.5 * problem.curvature
    curved = half > 0.0  # flat directions diffuse without end, or are not known
    mean, half = mean[curved], half[curved]
    if variance.ndim == 1:
        if problem.correlated:
            raise NQMError(
                "LossDistribution: directions of this problem are correlated; give the covariance "
                f"of its weights, shape ({problem.directions}, {problem.directions})"
            )
        return problem.multiplicity[curved], half * mean**2, half * variance[curved]
    if np.any(problem.multiplicity != 1.0):
        raise NQMError("LossDistribution: a covariance needs multiplicity 1; use variances")
    root = np.sqrt(half)
    spread, axes = np.linalg.eigh(root[:, None] * variance[np.ix_(curved, curved)] * root)
    # Along an axis that rounding alone has given a spread the loss does not vary.
    spread[spread < len(spread) * np.finfo(float).eps * spread.max(initial=0.0)] = 0.0
    return np.ones(len(spread)), (axes.T @ (root * mean)) ** 2, spread


# --- inversion --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contour:
    """Quadrature of a tail and its density along a contour that is made for the loss `y`.

    Attributes
    ----------
    y : float
        Less the mean if the contour is `centred`.
    scale : float
        Logarithm of the integrand where the contour crosses the real axis, at `t`.
    width : float
        Of the integrand there; 1 / width is how far from `y` the rule holds.
    exponent, away, tail, density : ndarray of complex, shape (k,)
        Of the integrands tail * exp(exponent) and density * exp(exponent) at t + away.
    """

    y: float
    t: float
    scale: float
    width: float
    exponent: FloatArray
    away: FloatArray
    tail: FloatArray
    density: FloatArray

    def at(self, y: float) -> tuple[float, float]:
        """Logarithm of the tail at y, and the size of its derivative."""
        gap = y - self.y
        values = np.exp(self.exponent - self.away * gap)
        tail, density = float((self.tail @ values).real), float((self.density @ values).real)
        if not (tail > 0.0 and density > 0.0):
            return math.nan, math.nan
        return self.scale - self.t * gap + math.log(tail), density / tail


def _solve(form: _Sum, goal: float, y: float, centred: bool, upper: bool) -> float:
    """Where the tail's logarithm is `goal`, by bracketed Newton steps from y.

    Near zero (not `centred`) they are steps in log y: the tail's logarithm is all but linear in
    it. On each contour Newton is run to its end, so that one or two contours are enough.
    """
    if not centred:
        low, high = 0.0, y
    elif upper:  # the median is within one standard deviation of the mean
        low, high = max(-1.0, -0.5 * form.mean), math.inf
    else:  # P(loss < mean - y sd) <= exp(-y^2 / 2)
        low, high = max(-math.sqrt(-2.0 * goal), -0.5 * form.mean), 1.0
    sign = -1.0 if upper else 1.0

    def step(gap: float, slope: float, y: float) -> float:
        if centred:
            return y - sign * gap / slope
        return y * math.exp(min(max(-gap / (slope * y), -50.0), 50.0))

    for _ in range(100):
        t = _saddle(form, y, centred, upper)
        bound = form.around(t, centred)[0] - t * y
        if bound < SURELY:  # Chernoff's bound: no need to know it better
            gap, new = bound - goal, step(bound - goal, abs(t), y)
        else:
            contour = _contour(form, y, centred, t)
            here, slope = contour.at(y)
            gap, new = here - goal, step(here - goal, slope, y)
            for _ in range(30):
                near = centred or 0.5 * y < new < 2.0 * y
                if not (near and abs(new - y) * contour.width < 1.0):
                    break
                here, slope = contour.at(new)
                after = step(here - goal, slope, new)
                if not abs(after - new) > 1e-15 * abs(new):
                    if abs(new - y) * contour.width < NEAR and low <= new <= high:
                        return new
                    break
                new = after
        low, high = (y, high) if (gap < 0.0) != upper else (low, y)
        if abs(gap) < 1e-9 or high - low <= 1e-15 * abs(y):
            return new if low <= new <= high else y
        if not centred and high < 1e-290:
            return 0.0  # of so few degrees of freedom that it is zero to double precision
        if not low < new < high:
            new = _between(low, high, y, centred)
        y = new
    raise NQMError(f"quantile: no loss found at log probability {goal:g}; use Monte Carlo")


def _between(low: float, high: float, y: float, centred: bool) -> float:
    """Where to look when Newton leaves the bracket."""
    if not math.isfinite(high):
        return 2.0 * abs(y) + 1.0
    if centred or low == 0.0:
        return 0.5 * (low + high)
    return math.sqrt(low * high)


def _contour(form: _Sum, y: float, centred: bool, t: float) -> _Contour:
    """Rule for the tail at y, less the mean if `centred`, on the contour down from its saddle t.

    Raises
    ------
    NQMError
        If two orders of the rule do not come to agree.
    """
    start = float(form.generating(np.array([t + 0j]), centred).real[0])
    corners, width = _descend(form, y, centred, t, start)
    begin, end = corners[:-1], corners[1:]
    parts, total = [], np.zeros(2)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(HALVINGS):
            away = 0.5 * (begin + end)[:, None] + 0.5 * (end - begin)[:, None] * _NODES
            exponent = form.generating(t + away.ravel(), centred).reshape(away.shape)
            exponent -= start + away * y
            # dt / (2 pi i), twice: the other half of the contour is the mirror image of this.
            pace = 0.5 * (end - begin)[:, None] / (1j * math.pi)
            factor = np.stack([pace / (1.0 + away / t) / abs(t), pace + 0.0 * away])
            values = (factor * np.exp(exponent)).real
            fine, coarse = values @ _FINE, values @ _COARSE
            size = np.abs(total + fine.sum(axis=1))
            close = np.abs(fine - coarse) <= 0.1 * AGREEMENT * size[:, None]
            good = close.all(axis=0)
            total = total + fine[:, good].sum(axis=1)
            kept = exponent[good], away[good], *(factor[:, good] * _FINE)
            parts.append(np.stack(kept).reshape(4, -1)[:, np.tile(_FINE != 0.0, int(good.sum()))])
            begin, end = begin[~good], end[~good]
            if not begin.size:
                exponents, aways, tail, density = np.concatenate(parts, axis=1)
                return _Contour(y, t, start - t * y, width, exponents, aways, tail, density)
            middle = 0.5 * (begin + end)
            begin, end = np.concatenate([begin, middle]), np.concatenate([middle, end])
    raise NQMError(
        f"the loss's distribution is not known to {AGREEMENT:g} at {y:g} sd "
        f"{'from its mean' if centred else 'from its least value'}; use Monte Carlo"
    )


def _saddle(form: _Sum, y: float, centred: bool, upper: bool) -> float:
    """Where exp(K(t) - t y) / |t| is least on the positive or the negative axis, roughly."""

    def at(v: float) -> float:
        return form.edge / (1.0 + math.exp(-v)) if upper else -math.exp(v)

    def rise(v: float) -> float:
        t = at(v)
        return t * (form.slope(t, centred) - y) - 1.0

    v = -math.log(form.edge) if upper else 0.0  # about one over the standard deviation
    inner, outer = v - 1.0, v + 1.0
    while rise(inner) > 0.0:
        inner -= 2.0
    while rise(outer) < 0.0:
        outer += 2.0
    return at(float(brentq(rise, inner, outer, xtol=0.02, rtol=0.02)))


def _descend(
    form: _Sum, y: float, centred: bool, t: float, start: float
) -> tuple[FloatArray, float]:
    """Corners of a polygon down from the saddle, less t, and the saddle's width.

    Its sides follow the steepest descent of the integrand, and are short beside the distance to
    every singularity. It may go astray a little, as any contour gives the same integral.
    """
    _, _, second, room = form.around(t)
    width = float(abs(second + t**-2) ** -0.5)
    corners = [0j, 1j * min(1.2 * width, 0.4 * room, 0.4 * abs(t))]
    while len(corners) < SIDES:
        away = corners[-1]
        z = t + away
        value, slope, second, room = form.around(z, centred)
        slope, second = slope - y - 1.0 / z, second + z**-2
        level = value - start - (away * y).real - math.log(abs(z / t))
        if level - math.log(abs(slope) * width) < LOST:
            break
        way = -slope.conjugate() / abs(slope)
        side = min(2.0 / abs(slope), 1.2 * abs(second) ** -0.5, 0.4 * room, 0.4 * abs(z))
        corners.append(away + side * way)
    return np.array(corners), width
