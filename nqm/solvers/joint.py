"""The weights of one or several programs at several times, as one Gaussian Markov chain.

Between two recorded steps the state of a direction moves by z' = A z + b + noise of covariance Q.
Programs that are driven by the same minibatches have one stacked state, whose Q holds the
covariance of their noise. A stretch of equal steps is one power of its transition, so that the cost
of a chain does not depend on the number of steps, and a draw needs normals at the records only.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm, Mode
from nqm.errors import NQMError
from nqm.limits import check_memory, check_walk
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Program, goes_on, resumes
from nqm.solvers.moments import (
    Law,
    Map,
    check_own_starts,
    check_size,
    distinct_steps,
    law_of,
    power,
    then,
)
from nqm.transition import embedding, origins, readout, resumption

#: Most entries of the transitions of steps that are composed at once.
CHUNK = 4_000_000
#: Eigenvalue of a correlation matrix that is rounding.
ROUNDING = 1e-13


@dataclass(frozen=True)
class Link:
    """z' = matrix z + shift + noise, from one time of a chain to the next.

    Attributes
    ----------
    matrix, noise : ndarray, shape (d, n', n) and (d, n', n')
        A, and the covariance Q of the noise.
    shift : ndarray, shape (d, n')
    row : int or None
        Record at the end of the link, if there is one.
    readouts : ndarray, shape (programs, n')
        Evaluated weights of each program there, as forms of the state.
    """

    matrix: FloatArray
    noise: FloatArray
    shift: FloatArray
    row: int | None
    readouts: FloatArray


@dataclass(frozen=True)
class Chain:
    """Programs with one joint law: the start, as a link from nothing, and the links from there."""

    links: tuple[Link, ...]

    def states(self) -> list[tuple[FloatArray, FloatArray]]:
        """Mean (d, n) and covariance (d, n, n) after each link."""
        d = len(self.links[0].shift)
        mean, covariance = np.zeros((d, 0)), np.zeros((d, 0, 0))
        found = []
        for link in self.links:
            a = link.matrix
            mean = np.einsum("dij,dj->di", a, mean) + link.shift
            covariance = a @ covariance @ a.swapaxes(1, 2) + link.noise
            found.append((mean, covariance))
        return found

    @cached_property
    def roots(self) -> list[FloatArray]:
        """Roots of the covariance of each link's noise."""
        return [scaled_root(link.noise) for link in self.links]

    def draw(self, rng: np.random.Generator, replicas: int) -> Iterator[tuple[int, FloatArray]]:
        """Draw the weights at the records, each once in order.

        Parameters
        ----------
        rng : Generator
        replicas : int

        Yields
        ------
        row : int
        weights : ndarray, shape (programs, d, replicas)
        """
        d = len(self.links[0].shift)
        z = np.zeros((d, 0, replicas))
        for link, root in zip(self.links, self.roots, strict=True):
            normals = rng.standard_normal((d, root.shape[2], replicas))
            z = link.matrix @ z + link.shift[:, :, None] + root @ normals
            if link.row is not None:
                yield link.row, np.einsum("pn,dnr->pdr", link.readouts, z)


def scaled_root(covariance: FloatArray) -> FloatArray:
    """Find F with F F' = covariance, good in coordinates of any scale.

    Parameters
    ----------
    covariance : ndarray, shape (d, n, n)

    Returns
    -------
    ndarray, shape (d, n, k)
        Without columns that are 0 in all directions.
    """
    if not covariance.any():
        return np.zeros((*covariance.shape[:2], 0))
    scale = np.sqrt(np.einsum("dii->di", covariance))
    unit = np.where(scale > 0.0, scale, 1.0)
    values, vectors = np.linalg.eigh(covariance / (unit[:, :, None] * unit[:, None, :]))
    values = np.where(values > ROUNDING, values, 0.0)  # of few steps, fewer noises than coordinates
    root = scale[:, :, None] * vectors * np.sqrt(values)[:, None, :]
    return np.asarray(root[:, :, root.any(axis=(0, 1))])


class _Side:
    """One program on its way: its phase, the position there, and the age of its method."""

    def __init__(self, problem: Problem, program: Program):
        self.problem = problem
        self.laws = [law_of(phase, problem) for phase in program.phases]
        self.index, self.position, self.age = 0, 0, 0

    @property
    def law(self) -> Law:
        return self.laws[self.index]

    @property
    def mode(self) -> Mode:
        """The mean model."""
        return self.law.algorithm.modes()[0]

    @property
    def size(self) -> int:
        return len(self.mode.algorithm.coordinates)

    @property
    def ended(self) -> bool:
        """Whether no step is left in this phase."""
        return self.position >= self.law.phase.steps

    def ahead(self) -> tuple[int, int, int | None]:
        """First step of the stretch of the phase, steps that are left of it, and its period."""
        for start, stop, period in self.law.phase.segments():
            if self.position < stop:
                return start, stop - self.position, period
        return 0, 0, 1

    def readout(self) -> FloatArray:
        return readout(self.mode.algorithm, self.age + self.position)

    def start(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Shares of the problem's start and of fresh normals in the state, and its fixed part."""
        draws, normals = embedding(self.mode.algorithm)
        return draws, normals, self._origin()

    def _origin(self, known: Sequence[str] = ()) -> FloatArray:
        return np.outer(-self.problem.minimum, origins(self.mode.algorithm, known))

    def steps(self, count: int) -> tuple[tuple[FloatArray, ...], NDArray[np.int64]]:
        """Distinct A, its low part, C, D and noise share of the next steps; the kind of each."""
        first, algorithm, law = self.position, self.mode.algorithm, self.law

        def step(settings: FloatArray, t: Any) -> tuple[FloatArray, ...]:
            found, share = law.transition(self.problem, self.mode, settings, t, exact=True)
            return found.matrix, found.low, found.noise, found.own, share[:, 0]

        settings = law.phase.settings(first, first + count)
        residue = law.algorithm.time.reduced(self.age + np.arange(first, first + count))
        arrays, kind = distinct_steps(algorithm, settings, residue, step)
        return arrays, np.asarray(kind, dtype=np.int64)

    def next_phase(self) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """Enter the next phase: lift (n', n), fresh normals (d, n', k) and shift (d, n')."""
        if not self.ended or self.index + 1 == len(self.laws):
            return None
        old, age = self.law, self.age + self.position
        old_mode = self.mode.algorithm
        self.index, self.position = self.index + 1, 0
        kept = goes_on(old.phase, self.law.phase)
        d, algorithm = self.problem.directions, self.mode.algorithm
        if kept and old.algorithm.coordinates == self.law.algorithm.coordinates:
            self.age = age
            return np.eye(self.size), np.zeros((d, self.size, 0)), np.zeros((d, self.size))
        if not kept:
            check_own_starts(self.law.algorithm)
        self.age = 0
        if resumes(old.phase, self.law.phase):
            lift, normals = resumption(old_mode, algorithm, age)
            place = self._origin(old_mode.coordinates)
        else:
            draws, normals = embedding(algorithm)
            lift, place = np.outer(draws[:, 0], readout(old_mode, age)), self._origin()
        return lift, self.fresh(normals), place

    def fresh(self, normals: FloatArray) -> FloatArray:
        """Fresh normals (d, n, k) by direction: none where members are not replicated."""
        mask = self.law.algorithm.member_mask(self.problem)
        scale = np.ones(self.problem.directions) if mask is None else mask
        return np.asarray(scale[:, None, None] * normals)


def chain(problem: Problem, programs: Sequence[Program], wanted: Sequence[int]) -> Chain:
    """Build the joint law of programs that start together and see the same minibatches.

    Parameters
    ----------
    problem : Problem
        With independent directions.
    programs : sequence of Program
        Linear methods. One that has ended keeps its weights.
    wanted : sequence of int
        Steps to record, rising.

    Returns
    -------
    Chain

    Raises
    ------
    NQMError
        If methods draw different numbers of minibatches in a step, or if it would take too much
        memory or time.
    """
    sides = [_Side(problem, program) for program in programs]
    largest = sum(_width(side) for side in sides)
    held = 3.0 * problem.directions * float(largest) ** 2
    for side in sides:
        for index, law in enumerate(side.laws):
            check_size(f"phase.{index}", problem, law, law.phase.steps, len(wanted), jump=True)
    phases = sum(len(program.phases) for program in programs)
    check_memory("the number of steps in record.at", len(wanted), held * (len(wanted) + phases))
    links, done = [_started(problem, sides, wanted)], 0
    known: dict[Any, Map] = {}  # records are often equally far apart
    while done < wanted[-1]:
        links += _handed_over(sides)
        stretches = [None if side.ended else side.ahead() for side in sides]
        row = bisect_right(wanted, done)
        length = min([wanted[row] - done, *(one[1] for one in stretches if one)])
        periods = [one[2] for one in stretches if one]
        period = None if None in periods else math.lcm(*(p for p in periods if p))
        key = (
            length,
            *((side.index, one and one[0]) for side, one in zip(sides, stretches, strict=True)),
        )
        moved = known.get(key) if period == 1 else None
        if moved is None:
            moved = _moved(problem, sides, length, period)
            known = {key: moved}
        done += length
        for side in sides:
            side.position += 0 if side.ended else length
        recorded = row if done == wanted[row] else None
        links.append(_link(sides, moved.matrix, moved.noise, None, recorded))
    return Chain(tuple(links))


def _width(side: _Side) -> int:
    """Coordinates of the largest phase of a program."""
    return max(len(law.algorithm.modes()[0].algorithm.coordinates) for law in side.laws)


def _blocks(sides: Sequence[_Side]) -> list[slice]:
    ends = np.cumsum([0, *(side.size for side in sides)])
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _link(
    sides: Sequence[_Side],
    matrix: FloatArray,
    noise: FloatArray,
    shift: FloatArray | None,
    row: int | None,
) -> Link:
    place = np.zeros(matrix.shape[:2]) if shift is None else shift
    read = np.zeros((len(sides), matrix.shape[1]))
    for p, (side, block) in enumerate(zip(sides, _blocks(sides), strict=True)):
        read[p, block] = side.readout()
    return Link(matrix, noise, place, row, read)


def _started(problem: Problem, sides: Sequence[_Side], wanted: Sequence[int]) -> Link:
    """The start as a link from an empty state; its draws are the same for all programs."""
    starts, blocks = [side.start() for side in sides], _blocks(sides)
    d, n = problem.directions, blocks[-1].stop
    shift, noise = np.zeros((d, n)), np.zeros((d, n, n))
    shared = np.zeros((n, max(draws.shape[1] for draws, _, _ in starts)))
    for side, block, (draws, normals, place) in zip(sides, blocks, starts, strict=True):
        shared[block, : draws.shape[1]] = draws
        own = side.fresh(normals)
        noise[:, block, block] = own @ own.swapaxes(1, 2)
        shift[:, block] = place
    shift += np.outer(problem.initial_mean, shared.sum(axis=1))
    noise += problem.initial_variance[:, None, None] * (shared @ shared.T)
    row = 0 if wanted[0] == 0 else None
    return _link(sides, np.zeros((d, n, 0)), noise, shift, row)


def _handed_over(sides: Sequence[_Side]) -> list[Link]:
    """A link for each time that programs enter their next phase."""
    links: list[Link] = []
    while True:
        before = _blocks(sides)
        entered = [side.next_phase() for side in sides]
        if not any(entered):
            return links
        after, d = _blocks(sides), sides[0].problem.directions
        matrix = np.zeros((d, after[-1].stop, before[-1].stop))
        noise, shift = np.zeros((d, after[-1].stop, after[-1].stop)), np.zeros(matrix.shape[:2])
        for new, old, one in zip(after, before, entered, strict=True):
            if one is None:
                matrix[:, new, old] = np.eye(new.stop - new.start)
                continue
            lift, normals, place = one
            matrix[:, new, old], shift[:, new] = lift, place
            noise[:, new, new] = normals @ normals.swapaxes(1, 2)
        links.append(_link(sides, matrix, noise, shift, None))


def _moved(problem: Problem, sides: Sequence[_Side], length: int, period: int | None) -> Map:
    """Transition of the next `length` steps, in stretches that have this common period."""
    if period is None or length < 2 * period:
        return _walked(problem, sides, 0, length)
    cycle = _walked(problem, sides, 0, period)
    many = power(cycle, length // period, exact=True)
    rest = length % period
    return many if not rest else _then(many, _walked(problem, sides, 0, rest))


def _then(first: Map, second: Map) -> Map:
    found = then(first, second)
    assert found is not None
    return found


def _walked(problem: Problem, sides: Sequence[_Side], begin: int, length: int) -> Map:
    """Transition of steps that differ."""
    n = _blocks(sides)[-1].stop
    check_walk("phase.steps", length, "their rates do not repeat soon enough to be jumped")
    chunk = max(1, CHUNK // (problem.directions * n * n))
    whole: Map | None = None
    for first in range(begin, begin + length, chunk):
        count = min(chunk, begin + length - first)
        positions = [side.position for side in sides]
        for side in sides:
            side.position += 0 if side.ended else first
        whole = then(whole, _folded(*_stacked(problem, sides, count)))
        for side, position in zip(sides, positions, strict=True):
            side.position = position
    assert whole is not None
    return whole


def _stacked(problem: Problem, sides: Sequence[_Side], count: int) -> tuple[Map, NDArray[np.int64]]:
    """Distinct transitions (s, d, n, n) of the stacked state, and the kind of each step."""
    blocks, d = _blocks(sides), problem.directions
    found = [None if side.ended else side.steps(count) for side in sides]
    kinds = [np.zeros(count, dtype=np.int64) if one is None else one[1] for one in found]
    rows, kind = np.unique(np.stack(kinds, axis=1), axis=0, return_inverse=True)
    n = blocks[-1].stop
    matrix, noise, low = np.zeros((3, len(rows), d, n, n))
    moving: list[tuple[slice, FloatArray, FloatArray]] = []
    for p, (block, one) in enumerate(zip(blocks, found, strict=True)):
        if one is None:
            matrix[:, :, block, block] = np.eye(block.stop - block.start)
            continue
        a, a_low, c, own, share = (part[rows[:, p]] for part in one[0])
        matrix[:, :, block, block], low[:, :, block, block] = a, a_low
        if own.shape[-1]:
            noise[:, :, block, block] += own @ own.swapaxes(-1, -2)
        for other, push, part in [*moving, (block, c, share)]:
            if push.shape[-1] != c.shape[-1]:
                raise NQMError(
                    "streams = 'common': the methods draw different numbers of minibatches in a "
                    f"step ({push.shape[-1]} and {c.shape[-1]}); use streams = 'own'"
                )
            # The smaller minibatch is among the examples of the larger one.
            variance = np.minimum(part, share)[:, None] * problem.noise_variance
            cross = (push @ c.swapaxes(-1, -2)) * variance[..., None, None]
            noise[:, :, other, block] += cross
            if other != block:
                noise[:, :, block, other] += cross.swapaxes(-1, -2)
        moving.append((block, c, share))
    return Map(matrix, noise, low), kind.reshape(-1)


def _folded(steps: Map, kind: NDArray[np.int64]) -> Map:
    """Compose steps pair by pair, each distinct pair once."""
    d, n = steps.matrix.shape[1:3]
    while kind.size > 1:
        if kind.size % 2:  # pad by a step that does nothing
            idle = np.broadcast_to(np.eye(n), (1, d, n, n)), *np.zeros((2, 1, d, n, n))
            steps = Map(*(np.concatenate(both) for both in zip(steps, idle, strict=True)))
            kind = np.append(kind, len(steps.matrix) - 1)
        pairs, kind = np.unique(kind.reshape(-1, 2), axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        early, late = (
            Map(*(np.ascontiguousarray(part[side]).reshape(-1, n, n) for part in steps))
            for side in pairs.T
        )
        steps = Map(*(part.reshape(-1, d, n, n) for part in _then(early, late)))
    return Map(*(np.ascontiguousarray(part[kind[0]]) for part in steps))


def linear_only(where: str, programs: Sequence[Program]) -> None:
    """Refuse programs whose weights are not Gaussian.

    Parameters
    ----------
    where : str
        Name of the function, for the message.
    programs : sequence of Program

    Raises
    ------
    NQMError
        If a method is not linear.
    """
    for program in programs:
        for phase in program.phases:
            if not isinstance(phase.algorithm, Algorithm):
                raise NQMError(
                    f"{where} needs linear methods, whose weights are Gaussian; got "
                    f"{type(phase.algorithm).__name__}: use nqm.sample with one seed"
                )
