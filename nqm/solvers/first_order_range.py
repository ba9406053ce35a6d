"""How far the first order of multiplicative late-phase weights is off: an estimate, not a bound.

About theta phi = w* the mean model descends at the rate lambda = a + K b with a = member_lr
theta^2 and b = gamma lr phi^2, and a member's deviation at the rate a. The first order keeps these
rates. In truth they are a y and K b / y, y = (theta / phi) / (theta0 / phi0), and change because

- noise drifts log y: with Q = theta^2 / (gamma lr) - sum phi_k^2 / member_lr, dQ / dlog y = w*^2
  (1 / b + K / a), and E Delta Q is known at quasi-steady noise
  (`nqm.solvers.multiplicative_long_run`);
- a start off the minimum by x sets out with theta = (w* + x) / factor, and descent keeps Q:
  a y^2 - (a (1 + x / w*)^2 - K b) y - K b = 0. Its loss decays at another rate, and it arrives at
  another floor;
- members that are apart, by D = Var phi_k / phi^2, push the mean model off: (phi^2 + D phi^2) theta
  = w* phi is where theta would settle;
- mean squares of the noise are not small beside w*^2.

Starts are followed at Gauss-Hermite nodes. The tests compare the estimate with the moment closure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, goes_on
from nqm.solvers.closure_elementwise import start_nodes

#: Settings that are looked at between two records where they change.
LOOKS = 16
#: Relative error due to noise, per unit of its mean square beside w*^2 (fitted to the closure).
NOISE = 0.5
#: Relative change of y by which the slope of a loss is measured.
NUDGE = 0.05


def first_order_errors(
    problem: Problem, program: Program, wanted: Sequence[int], second: FloatArray
) -> FloatArray:
    """Estimate the relative error of a first-order result at each record.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    program : Program
        Linear phases and phases of multiplicative late-phase weights, one factor per direction.
    wanted : sequence of int
        Recorded steps, rising.
    second : ndarray, shape (records, d)
        First-order second moments of the evaluated weights.

    Returns
    -------
    ndarray, shape (records,)
        Of the mean model's or the average member's loss, whichever is larger; 0 before the
        members, infinite where they are unstable. A later phase has the error that it begins with.
    """
    errors = np.zeros(len(wanted))
    members: _Members | None = None
    position, inherited = 0, 0.0
    for index, phase in enumerate(program.phases):
        algorithm, end = phase.algorithm, position + phase.steps
        here = [i for i, step in enumerate(wanted) if position < step <= end]
        if not isinstance(algorithm, MultiplicativeLatePhase):
            members = None
            errors[here] = inherited
        elif members is None or not goes_on(program.phases[index - 1], phase):
            members = _Members.start(problem, algorithm, *_weights(problem, program, index))
        if isinstance(algorithm, MultiplicativeLatePhase) and members is not None:
            now = position
            for place in here:
                for settings, steps in _looks(phase, now - position, wanted[place] - position):
                    members.advance(settings, steps)
                now = wanted[place]
                errors[place] = max(members.error(second[place]), inherited)
            for settings, steps in _looks(phase, now - position, end - position):
                members.advance(settings, steps)
        inherited = float(errors[here].max(initial=inherited))
        position = end
    return errors


def _weights(problem: Problem, program: Program, index: int) -> tuple[FloatArray, FloatArray]:
    """Mean and variance of the weights at the start of a phase."""
    from nqm.solvers.moments import solve  # which is built on this module

    if index == 0:
        return problem.initial_mean, problem.initial_variance
    before = Program(program.phases[:index])
    found = solve(problem, before, [before.steps])
    assert found.weight_mean is not None
    assert found.weight_variance is not None
    return found.weight_mean[0], found.weight_variance[0]


def _looks(phase: Phase, start: int, stop: int) -> Iterator[tuple[FloatArray, float]]:
    """Settings (3,) that stand for the steps [start, stop), and how many each stands for."""
    count = min(stop - start, 1 if phase.constant else LOOKS)
    edges = np.linspace(start, stop, count + 1) if count > 0 else np.zeros(1)
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        middle = int(0.5 * (low + high))
        yield phase.settings(middle, middle + 1)[0], high - low


def _minimum(problem: Problem) -> FloatArray:
    """W*, and 1 where there is no curvature and its value has no effect."""
    return np.where(problem.curvature > 0.0, problem.minimum, 1.0)


def arrival(a: FloatArray, kb: FloatArray, along: FloatArray, across: FloatArray) -> FloatArray:
    """Find y at which descent arrives: the root > 0 of a y^2 - (a along - kb across) y - kb = 0.

    Parameters
    ----------
    a, kb : ndarray
        Rates of the first order.
    along, across : ndarray
        Squares of base weights and of members' factors at the start, relative to those at the
        minimum.

    Returns
    -------
    ndarray
        1 where both rates are 0.
    """
    q = a * along - kb * across
    root = np.sqrt(q**2 + 4.0 * a * kb)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(q > 0.0, (q + root) / (2.0 * a), 2.0 * kb / (root - q))
    return np.where(np.isfinite(y) & (y > 0.0), y, 1.0)


@dataclass(frozen=True)
class _Sums:
    """What has been summed over the steps since the members' start.

    Attributes
    ----------
    first, last, own : ndarray, shape (starts, d)
        log (1 - rate h)^2 at the mean model's first rate, at its last one, and at a member's own.
    kept, kept_own : ndarray, shape (d,)
        The same of the first order: of the mean model and of a member's deviation.
    drift : ndarray, shape (d,)
        Change of log y due to noise.
    """

    first: FloatArray
    last: FloatArray
    own: FloatArray
    kept: FloatArray
    kept_own: FloatArray
    drift: FloatArray


class _Members:
    """Estimates since the members' start, for one factor per direction.

    `share` (starts, 1) are probabilities of the starts, `along` is (1 + x / w*)^2 and `across` the
    mean of phi_k^2 / factor^2, `square` the square of the mean model's first displacement. `apart`
    is D, `pushed` the displacement that it causes in units of w*, and `mean` the one of the start.
    """

    def __init__(
        self,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        share: FloatArray,
        along: FloatArray,
        across: FloatArray,
        square: FloatArray,
        mean: FloatArray,
    ):
        self.problem, self.algorithm, self.share = problem, algorithm, share
        self.along, self.across, self.square = along, across, square
        zeros, flat = np.zeros_like(along), np.zeros(problem.directions)
        self.sums = _Sums(zeros, zeros, zeros, flat, flat, flat)
        self.apart = flat + algorithm.spread * (1.0 - 1.0 / algorithm.members)
        self.pushed, self.mean = flat, np.abs(mean)
        self.settings = np.ones(3)

    @classmethod
    def start(
        cls,
        problem: Problem,
        algorithm: MultiplicativeLatePhase,
        mean: FloatArray,
        variance: FloatArray,
    ) -> _Members:
        """Begin with weights of given mean and variance, (d,)."""
        w, spread, k = _minimum(problem), algorithm.spread, algorithm.members
        share, x, offset = start_nodes(bool(np.any(variance > 0.0)), spread > 0.0)
        theta = 1.0 + (mean + np.sqrt(variance) * x) / w
        phi = 1.0 + np.sqrt(spread / k) * offset + 0.0 * theta
        square, across = w**2 * (theta * phi - 1.0) ** 2, phi**2 + spread * (1.0 - 1.0 / k)
        return cls(problem, algorithm, share[:, None], theta**2, across, square, mean)

    def rates(self, settings: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A and K b of the first order, (d,)."""
        lr, member_lr, _ = settings
        algorithm, square = self.algorithm, _minimum(self.problem) ** 2
        kb = algorithm.members * algorithm.base_scale * lr * algorithm.factor**2
        return member_lr * square / algorithm.factor**2, np.full_like(square, kb)

    def advance(self, settings: FloatArray, steps: float) -> None:
        """Take `steps` steps at (lr, member_lr, batch size)."""
        h, k, w_square = self.problem.curvature, self.algorithm.members, _minimum(self.problem) ** 2
        v = self.problem.noise_variance / settings[2]
        a, kb = self.rates(settings)
        y = arrival(a, kb, self.along, self.across)
        p, q = 1.0 - (a + kb) * h, (1.0 - a * h) ** 2

        def fall(rate: FloatArray) -> FloatArray:
            return np.asarray(2.0 * steps * np.log(np.abs(1.0 - rate * h)))

        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            g_mean = 2.0 * v / (k * (2.0 - (a + kb) * h))
            g_member = g_mean + 2.0 * v * (1.0 - 1.0 / k) / (2.0 - a * h)
            slide = a * kb / ((a + kb) * w_square) * (kb * g_mean - a * g_member)
            before = self.sums
            self.sums = _Sums(
                before.first + fall(a * self.along + kb * self.across),
                before.last + fall(a * y + kb / y),
                before.own + fall(a * y),
                before.kept + fall(a + kb),
                before.kept_own + fall(a),
                before.drift + steps * np.where(a * kb > 0.0, slide, 0.0),
            )
            settled = np.where(h > 0.0, a * v * (1.0 - 1.0 / k) / (2.0 - a * h), 0.0)
            settled = settled / np.where(h > 0.0, h * w_square, 1.0)
            many_p, many_q = p ** round(steps), q**steps
            driven = np.where(p == q, steps * many_p / p, (many_q - many_p) / (q - p))
            held = np.where(p == 1.0, steps, (1.0 - many_p) / (1.0 - p))
            push = settled * held + (self.apart - settled) * driven
            self.pushed = many_p * self.pushed - kb * h * np.where(kb * h > 0.0, push, 0.0)
            self.apart = settled + (self.apart - settled) * many_q
            self.mean = np.abs(many_p) * self.mean
        self.settings = settings

    def error(self, second: FloatArray) -> float:
        """Estimated relative error, for first-order second moments (d,) of the mean model."""
        with np.errstate(all="ignore"):
            return self._error(second)

    def _error(self, second: FloatArray) -> float:
        k, weight, sums = self.algorithm.members, self.problem.weight, self.sums
        w_square = _minimum(self.problem) ** 2
        own_start = w_square * self.algorithm.spread * (1.0 - 1.0 / k)
        kept = self._over_starts(self.square) * np.exp(sums.kept)
        kept_own = own_start * np.exp(sums.kept_own)
        noise, noise_own = second - kept, w_square * self.apart - kept_own
        near = NOISE * (np.maximum(noise, 0.0) + noise_own) / w_square
        first, last = (
            np.abs(self._over_starts(self.square * np.exp(log)) - kept)
            for log in (sums.first, sums.last)
        )
        pushed = np.sqrt(w_square) * np.abs(self.pushed)
        start = np.maximum(first, last) + pushed**2 + 2.0 * pushed * self.mean
        own = np.abs(own_start * self._over_starts(np.exp(sums.own)) - kept_own)
        moved, moved_own = self._moved_floors()
        change = weight @ (start + np.maximum(noise, 0.0) * (moved + near))
        member_change = change + weight @ (own + noise_own * (moved_own + near))
        loss, member_loss = weight @ second, weight @ (second + w_square * self.apart)
        if loss <= 0.0:
            return 0.0 if change == 0.0 else np.inf
        found = max(change / loss, member_change / member_loss)
        return float(found) if np.isfinite(found) else np.inf

    def _over_starts(self, values: FloatArray) -> FloatArray:
        return np.asarray(np.sum(self.share * values, axis=0))

    def _moved_floors(self) -> Iterator[FloatArray]:
        """Relative changes of the floor of the mean model and of a member's deviation, (d,)."""
        h, (a, kb) = self.problem.curvature, self.rates(self.settings)
        starts = arrival(a, kb, self.along, self.across)
        drifted = np.exp(np.clip(self.sums.drift, -3.0, 3.0))
        for rate in (lambda y: a * y + kb / y, lambda y: a * y):

            def floor(y: FloatArray, rate=rate) -> FloatArray:  # type: ignore[no-untyped-def]
                return np.asarray(rate(y) / (2.0 - rate(y) * h))

            one = floor(np.ones(1))
            start = np.abs(self._over_starts(floor(starts)) / one - 1.0)
            yield np.where(one > 0.0, start + np.abs(floor(drifted) / one - 1.0), 0.0)
