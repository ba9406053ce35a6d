"""Covariances between directions, for noise that does not commute with the Hessian.

Two directions of a linear method have S_ij' = A_i S_ij A_j' + c_ij P_i P_j', with the transition of
each and the covariance c_ij of their noise, independently of all others. No expected loss depends
on them; the variance of the loss, 1/2 tr (H S)^2 + m' H S H m, and its quantiles do. There are
d (d - 1) / 2 pairs of n x n numbers, jumped by powers as `nqm.solvers.moments` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nqm.algorithms.base import Algorithm, Mode
from nqm.errors import NQMError
from nqm.problems.correlation import covariance
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, goes_on, resumes
from nqm.solvers._kernels.pairs import power_pairs, propagate_pairs
from nqm.solvers.moments import Law, Map, compose_steps, distinct_steps, law_of, power, whole_period
from nqm.transition import embedding, readout, resumption

#: Most numbers held for pairs (320 MB), and most multiplications spent on them (about a minute).
NUMBERS, WORK = 40_000_000, 5e10
#: Steps whose transitions are held at once.
CHUNK = 4096
#: Doublings after which any radius below 1 has reached its steady state.
DOUBLINGS = 62


def pair_covariances(
    problem: Problem, program: Program, wanted: Sequence[int]
) -> Iterator[FloatArray]:
    """Compute the covariances between directions of the evaluated weights, lazily.

    Parameters
    ----------
    problem : Problem
        With correlated noise or a correlated start.
    program : Program
        Phases of methods with exact or first-order moments.
    wanted : sequence of int
        Steps of the whole program at which they are needed, rising.

    Yields
    ------
    ndarray, shape (d, d)
        Covariance with a zero diagonal, one for each entry of `wanted`.

    Raises
    ------
    NQMError
        If it would take too much memory or time, or a method has no exact moments.
    """
    laws = check_cost(problem, program)
    mode = laws[0].algorithm.modes()[0]
    pairs = _Pairs(problem, laws[0], mode, _begin(mode, _start(problem)), 0)
    offset, pending = 0, list(wanted)
    with np.errstate(over="ignore", invalid="ignore"):
        for index, law in enumerate(laws):
            if index:
                pairs = pairs.handed_over(law)
            if index == 0 and pending and pending[0] == 0:
                pending.pop(0)
                yield pairs.weights(0)
            for start, stop, period in law.phase.segments():
                position = start
                while position < stop and pending:
                    inside = pending[0] <= offset + stop
                    target = pending[0] - offset if inside else stop
                    pairs.advance(position, target, start, period)
                    position = target
                    if inside:
                        pending.pop(0)
                        yield pairs.weights(position)
            offset += law.phase.steps
            pairs.age += law.phase.steps


def check_cost(problem: Problem, program: Program) -> list[Law]:
    """Reduce all phases to linear algorithms and check the cost of pairs of directions.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    program : Program
        Phases to check.

    Returns
    -------
    list of Law
        One for each phase.

    Raises
    ------
    NQMError
        If pairs would take too much memory or time, or a method has no exact moments.
    """
    laws = [law_of(phase, problem) for phase in program.phases]
    for law in laws:
        _check_cost(problem, law)
    return laws


def steady_pairs(problem: Problem, phase: Phase) -> FloatArray:
    """Compute the covariances between directions in the steady state of a stable phase.

    Parameters
    ----------
    problem : Problem
        With correlated noise or a correlated start.
    phase : Phase
        Constant or cyclic rates; its `steps` have no effect.

    Returns
    -------
    ndarray, shape (d, d)
        Covariance of the evaluated weights with a zero diagonal.

    Raises
    ------
    NQMError
        If it would take too much memory or time.
    """
    law = law_of(phase, problem)
    _check_cost(problem, law)
    mode = law.algorithm.modes()[0]
    pairs = _Pairs(problem, law, mode, _begin(mode, _start(problem)), 0)
    matrix, low, added = pairs.cycle(0, whole_period(phase))
    names = mode.algorithm.coordinates
    still = np.array([name in mode.algorithm.constants for name in names])
    curved = problem.curvature > 0
    a = np.where(curved[:, None, None], matrix, 0.0)  # flat directions cost nothing
    moving, moving_low = (
        np.ascontiguousarray(part[:, ~still][:, :, ~still])
        for part in (a, np.where(curved[:, None, None], low, 0.0))
    )
    cross = np.zeros((*added.shape[:2], *moving.shape[1:]))
    kicks = np.ascontiguousarray(added[:, :, ~still][:, :, :, ~still])
    power_pairs(_squares(moving, moving_low, DOUBLINGS + 1), 2**DOUBLINGS, kicks, cross)
    c = readout(mode.algorithm, 720_720 * mode.algorithm.time.period)
    pairs_of_weights = np.einsum("i,abij,j->ab", c[~still], cross, c[~still])
    if still.any():  # the points to which weights are pulled are themselves correlated
        settled = np.linalg.solve(
            (np.eye(len(moving[0])) - moving) - moving_low, a[:, ~still][:, :, still]
        )
        pull = settled.swapaxes(1, 2) @ c[~still] + c[still]
        fixed = pairs.cross[:, :, still][:, :, :, still]
        pairs_of_weights += np.einsum("ak,abkl,bl->ab", pull, fixed, pull)
    return _mirrored(np.where(np.outer(curved, curved), pairs_of_weights, 0.0))


def _start(problem: Problem) -> FloatArray:
    """Covariance (d, d) of the problem's start."""
    return covariance(problem.initial_correlation, problem.initial_variance)


def _begin(mode: Mode, start: FloatArray) -> FloatArray:
    """Pairs (d, d, n, n) at the start of a phase from weights of covariance `start`."""
    draws, _ = embedding(mode.algorithm)  # normals of its own are drawn for each direction alone
    return np.ascontiguousarray(start[:, :, None, None] * (draws @ draws.T))


def _mirrored(lower: FloatArray) -> FloatArray:
    """Symmetric matrix from the entries below the diagonal; the diagonal is 0."""
    below = np.tril(lower, -1)
    return np.asarray(below + below.T)


def _squares(matrix: FloatArray, low: FloatArray, count: int) -> FloatArray:
    """Powers 1, 2, 4, ... of A = matrix + low, (count, d, n, n), each good to a double."""
    powers = [Map(matrix, np.zeros_like(matrix), low)]
    for _ in range(count - 1):
        powers.append(power(powers[-1], 2, exact=True))
    return np.stack([each.matrix for each in powers])


def _check_cost(problem: Problem, law: Law) -> None:
    """Raise NQMError if pairs of directions would take too much memory or time."""
    d, n = problem.directions, len(law.algorithm.modes()[0].algorithm.coordinates)
    steps = 0.0
    for start, stop, period in law.phase.segments():
        steps += stop - start if period is None else min(stop - start, 2 * period + 128)
    numbers, work = float(d * n) ** 2, steps * d**2 * n**3
    if numbers > NUMBERS or work > WORK:
        need = f"{numbers:.1g} numbers" if numbers > NUMBERS else f"{work:.1g} multiplications"
        limit = NUMBERS if numbers > NUMBERS else WORK
        raise NQMError(
            f"the distribution of the loss needs {need} for the covariance of {d} correlated "
            f"directions; the limit is {limit:.0e}; use nqm.sample, or drop the correlation by "
            "problem.replace(noise_correlation=None, initial_correlation=None)"
        )


@dataclass
class _Pairs:
    """Covariances of the states of two directions, (d, d, n, n); held for i > j."""

    problem: Problem
    law: Law
    mode: Mode
    cross: FloatArray
    age: int

    @property
    def noise(self) -> FloatArray:
        """Covariance (d, d) of one example's gradient."""
        return covariance(self.problem.noise_correlation, self.problem.noise_variance)

    def weights(self, position: int) -> FloatArray:
        """Covariance (d, d) of the evaluated weights after `position` steps of the phase."""
        c = readout(self.mode.algorithm, self.age + position)
        return _mirrored(np.einsum("i,abij,j->ab", c, self.cross, c))

    def handed_over(self, law: Law) -> _Pairs:
        """Pairs at the start of the next phase, as in `nqm.solvers.moments.hand_over`."""
        mode, old, age = law.algorithm.modes()[0], self.mode.algorithm, self.age
        phases = self.law.phase, law.phase
        if goes_on(*phases) and self.law.algorithm.coordinates == law.algorithm.coordinates:
            return _Pairs(self.problem, law, mode, self.cross, age)
        if resumes(*phases):
            lift, _ = resumption(old, mode.algorithm, age)
            cross = np.einsum("ij,abjk,lk->abil", lift, self.cross, lift)
            return _Pairs(self.problem, law, mode, np.ascontiguousarray(cross), 0)
        return _Pairs(self.problem, law, mode, _begin(mode, self.weights(0)), 0)

    def advance(self, start: int, stop: int, origin: int, period: int | None) -> None:
        """Take steps [start, stop) of a stretch with period `period` from `origin`."""
        whole = 0
        if period is not None:
            boundary = start + (-(start - origin)) % period
            whole = max(0, stop - boundary) // period
        if period is None or whole < 2:
            self._walk(start, stop, self.cross)
            return
        self._walk(start, boundary, self.cross)
        matrix, low, added = self.cycle(origin, period)
        power_pairs(_squares(matrix, low, whole.bit_length()), whole, added, self.cross)
        self._walk(boundary + whole * period, stop, self.cross)

    def cycle(self, origin: int, period: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Transition (d, n, n) of one period in two doubles, and the pairs that its noise adds."""
        matrix, low, _, kind = self._steps(origin, origin + period)
        whole, _, whole_low = compose_steps(Map(matrix, np.zeros_like(matrix), low), kind)
        added = np.zeros_like(self.cross)
        self._walk(origin, origin + period, added)
        return whole, whole_low, added

    def _walk(self, start: int, stop: int, cross: FloatArray) -> None:
        noise = self.noise
        for first in range(start, stop, CHUNK):
            matrix, _, push, kind = self._steps(first, min(stop, first + CHUNK))
            propagate_pairs(matrix, push, kind, noise, cross)

    def _steps(self, start: int, stop: int) -> tuple[FloatArray, FloatArray, FloatArray, Any]:
        """Distinct A (in two doubles) and P of steps [start, stop), and the index of each step."""
        algorithm: Algorithm = self.mode.algorithm

        def step(settings: FloatArray, t: Any) -> tuple[FloatArray, ...]:
            found, share = self.law.transition(self.problem, self.mode, settings, t, exact=True)
            return found.matrix, found.low, found.noise * np.sqrt(share)[..., None, None]

        settings = self.law.phase.settings(start, stop)
        residue = self.law.algorithm.time.reduced(self.age + np.arange(start, stop))
        (matrix, low, push), kind = distinct_steps(algorithm, settings, residue, step)
        return matrix, low, push, kind
