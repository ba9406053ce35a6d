"""The best average of the iterates of one run, by the joint moments of its iterates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.linalg
from numpy.typing import NDArray
from scipy.optimize import nnls

from nqm.algorithms.base import Algorithm, Around, Draw, Gradient, Mode, Rate, State, Value
from nqm.algorithms.time_dependence import TimeDependence
from nqm.errors import NQMError, check_integer
from nqm.limits import check_memory, check_work
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program, goes_on, resumes
from nqm.solvers.moments import (
    Law,
    Map,
    Walker,
    at_start,
    check_own_starts,
    check_size,
    law_of,
    solve,
)
from nqm.transition import embedding, origins, readout, resumption
from nqm.tuning.information import program_bound
from nqm.words import short_html, short_repr

#: Share of the iterates' second moments that is added to them, in place of their rounding errors.
RIDGE = 1e-13


@dataclass(frozen=True)
class BestAverage:
    """Weights of iterates with the least expected loss; arrays of shape (blocks,).

    Attributes
    ----------
    first, last : ndarray of int
        First and last step of each block: its iterates have equal weights. Step 0 is the start.
    weights : ndarray
        Weight of each block's mean; they sum to 1.
    loss : float
        Expected loss of the average.
    last_loss : float
        Expected loss of the last iterate.
    bound : float
        Least loss that any linear method could reach with the same examples
        (`nqm.information_bound`); NaN if none is known.
    moment : ndarray, shape (blocks, blocks)
        M_st = 1/2 sum h E x_s x_t of the blocks' means, so that the loss is weights' M weights.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    weights: FloatArray
    loss: float
    last_loss: float
    bound: float
    moment: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def iterate_weights(self) -> FloatArray:
        """Weight of every iterate, the start first; they sum to 1."""
        length = self.last - self.first + 1
        return np.repeat(self.weights / length, length)

    def table(self) -> pd.DataFrame:
        """Tabulate the weights.

        Returns
        -------
        DataFrame
            One row for each block with columns first, last, weight.
        """
        return pd.DataFrame({"first": self.first, "last": self.last, "weight": self.weights})


def best_average(
    problem: Problem,
    program: Program | Phase | Sequence[Phase],
    *,
    nonnegative: bool = False,
    blocks: int = 400,
) -> BestAverage:
    """Find the average of a program's own iterates with the least expected loss.

    The iterates are the evaluated weights after every step, the start among them, and one set of
    weights holds for all directions. With M_st = 1/2 sum h E x_s x_t the loss of weights a that
    sum to 1 is a' M a, and the best are a ~ M^-1 1. With more steps than `blocks`, iterates within
    a block have equal weights; blocks are one step long at both ends of the run and grow
    geometrically towards its middle.

    Parameters
    ----------
    problem : Problem
        Expected losses are sums over its directions; `nqm.condense` shortens a long list of them.
    program : Program, Phase or sequence of Phase
        Linear methods.
    nonnegative : bool
        Among weights >= 0 only: a non-negative least-squares problem in a factor of M.
    blocks : int
        Largest number of blocks, >= 1 (and one more for each change of phase).

    Returns
    -------
    BestAverage
        Weights, their loss, and what it can be compared with.

    Raises
    ------
    NQMError
        If a method is not linear or does not fit the problem, if the run diverges, or if it would
        take too much memory or time.
    """
    problem = additive_only("best_average", problem)
    program = as_program("best_average.program", program)
    check_integer("best_average.blocks", blocks, 1)
    if not program.linear:
        raise NQMError(
            "best_average needs methods with exact moments, whose average is linear in them; use "
            "linear methods"
        )
    first, last, moment = iterate_moments(problem, program, blocks)
    weights = best_weights(moment, nonnegative=nonnegative)
    final = program_bound(problem, program, [program.steps])[0]
    return BestAverage(
        first,
        last,
        weights,
        float(weights @ moment @ weights),
        _last_loss(moment, last - first + 1, problem, program),
        float(final),
        moment,
    )


def best_weights(moment: FloatArray, *, nonnegative: bool = False) -> FloatArray:
    """Find weights a that sum to 1 with the least a' M a.

    Parameters
    ----------
    moment : ndarray, shape (n, n)
        M, symmetric and positive semi-definite.
    nonnegative : bool
        Among weights >= 0 only.

    Returns
    -------
    ndarray, shape (n,)
        The weights. A share `RIDGE` of each second moment is added, so that they do not amplify
        rounding errors of M.
    """
    scale = np.sqrt(np.diag(moment))
    if not np.isfinite(moment).all():
        raise NQMError("best_average: the run diverges; lower its rates")
    if (scale == 0.0).any():  # an iterate without any loss
        return np.asarray((scale == 0.0) / np.count_nonzero(scale == 0.0))
    scaled = moment / np.outer(scale, scale)
    ones = scale.min() / scale
    ridge = RIDGE * len(scale)
    factor = np.linalg.cholesky(scaled + ridge * np.eye(len(scale)))
    target = scipy.linalg.solve_triangular(factor, ones, lower=True)
    if nonnegative:
        u = nnls(factor.T, target, maxiter=30 * len(scale))[0]
    else:
        u = scipy.linalg.solve_triangular(factor, target, lower=True, trans="T")
    u = u / scale
    return np.asarray(u / u.sum())


def iterate_moments(
    problem: Problem, program: Program, blocks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
    """Compute the joint second moments of the means of blocks of iterates.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    program : Program
        Linear methods.
    blocks : int
        Largest number of blocks but for changes of phase.

    Returns
    -------
    first, last : ndarray of int, shape (n,)
        First and last step of each block; the first block is the start alone.
    moment : ndarray, shape (n, n)
        M_st = 1/2 sum h E x_s x_t of the blocks' means.
    """
    laws = [_summed(law_of(phase, problem)) for phase in program.phases]
    changes = np.cumsum([0, *(phase.steps for phase in program.phases)])
    edges = np.union1d(block_edges(program.steps, blocks), changes)
    n, d = len(edges), problem.directions
    largest = max(len(law.algorithm.coordinates) for law in laws)
    check_memory("best_average.blocks", n, 2.0 * n**2 + d * largest * (n + 4.0 * largest))
    check_work("best_average.blocks", n, float(n) ** 2 * d * largest**2, "in joint moments",
               "take fewer blocks, or nqm.condense(problem)")  # fmt: skip
    for index, law in enumerate(laws):
        check_size(f"phase.{index}", problem, law, law.phase.steps, n, jump=True)
    weight = problem.weight
    moment = np.zeros((n, n))
    mean, second = _begin(problem, laws[0])
    done = 1
    with np.errstate(over="ignore", invalid="ignore"):
        c = readout(laws[0].inner, 0)
        moment[0, 0] = weight @ np.einsum("i,dij,j->d", c, second, c)
        cross = np.zeros((d, second.shape[1], n))
        cross[:, :, 0], seen = second @ c, np.zeros((d, n))
        seen[:, 0] = mean @ c
        age = 0
        for index, law in enumerate(laws):
            if index:
                joint, goes = _next(
                    problem, laws[index - 1], law, age, _Joint(mean, second, cross, seen)
                )
                mean, second, cross, seen = joint
                age = age if goes else 0
            offset = int(changes[index])
            walker = Walker(problem, law, [], age)
            size = len(law.inner.coordinates)
            inside = edges[(edges > offset) & (edges <= changes[index + 1])]
            for start, stop, many in _cycles(walker, law, offset, inside):
                length = stop - start
                a, to_sum = many.matrix[:, :size, :size], many.matrix[:, size, :size] / length
                covered = np.zeros((d, size + 1, size + 1))
                covered[:, :size, :size] = second
                covered = many.matrix @ covered @ many.matrix.swapaxes(1, 2) + many.noise
                row = np.einsum("di,dis,d->s", to_sum, cross[:, :, :done], weight)
                moment[done, :done] = moment[:done, done] = row
                moment[done, done] = weight @ covered[:, size, size] / length**2
                cross[:, :, :done] = a @ cross[:, :, :done]
                cross[:, :, done] = covered[:, :size, size] / length
                seen[:, done] = np.einsum("di,di->d", to_sum, mean)
                mean, second = np.einsum("dij,dj->di", a, mean), covered[:, :size, :size]
                done += 1
            age += law.phase.steps
    first = np.concatenate([[0], edges[:-1] + 1])
    return first.astype(np.int64), edges.astype(np.int64), moment


def block_edges(steps: int, blocks: int) -> NDArray[np.int64]:
    """Choose the last steps of blocks of iterates, step 0 being a block of its own.

    Parameters
    ----------
    steps : int
        Steps of the run.
    blocks : int
        Largest number of blocks.

    Returns
    -------
    ndarray of int
        Rising from 0 to `steps`; lengths grow geometrically from one step at both ends.
    """
    if steps + 1 <= blocks:
        return np.arange(steps + 1)
    half = max((blocks - 1) // 2, 1)
    grown = np.geomspace(1.0, steps / 2.0 + 1.0, half + 1)
    left = np.unique(np.minimum(np.maximum(grown, np.arange(1, half + 2)), steps / 2.0 + 1.0) - 1.0)
    return np.unique(np.rint(np.concatenate([left, steps - left, [steps]])).astype(np.int64))


@dataclass(frozen=True)
class _Summed(Around):
    """A method and the running sum of its evaluated weights, as its last coordinate."""

    inner: Algorithm

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (*self.inner.coordinates, "sum of iterates")

    @property
    def time(self) -> TimeDependence:
        time = self.inner.time
        if not time.weights_never_repeat:
            return time
        # The readout is part of the update here. It takes one time, no array of them: hence a
        # period above 1.
        return replace(time, update_never_repeats=True, modulus=2 * time.modulus)

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        *moving, total = state
        new = self.inner.update(tuple(moving), gradient, lr, t)
        return (*new, total + self.inner.weights(new, t + 1))

    def resume(self, known: Mapping[str, Value], draw: Draw, normal: Draw) -> State:
        return (*self.inner.resume(known, draw, normal), 0.0)


@dataclass(frozen=True)
class _SummedLaw(Law):
    """A phase's mean model with the running sum of its weights."""

    mode: Mode
    whole: Algorithm

    @property
    def inner(self) -> Algorithm:
        """The mean model without the sum."""
        summed = self.algorithm
        assert isinstance(summed, _Summed)
        return summed.inner


def _summed(law: Law) -> _SummedLaw:
    mode = law.algorithm.modes()[0]
    summed = _Summed(mode.algorithm)
    return _SummedLaw(law.phase, summed, law.scales, replace(mode, algorithm=summed), law.algorithm)


class _Joint(NamedTuple):
    """Mean (d, n) and second moment (d, n, n) of the state, and its moments with past blocks.

    `cross` (d, n, blocks) is E z x_s of the state z and the mean x_s of each block, `seen`
    (d, blocks) is E x_s.
    """

    mean: FloatArray
    second: FloatArray
    cross: FloatArray
    seen: FloatArray


def _begin(problem: Problem, law: _SummedLaw) -> tuple[FloatArray, FloatArray]:
    """Mean (d, n) and second moment (d, n, n) of the state at the problem's start."""
    state = at_start(law.whole, problem)[0]
    mean = state.mean
    return mean, state.started + state.noisy + mean[:, :, None] * mean[:, None, :]


def _cycles(
    walker: Walker, law: _SummedLaw, offset: int, edges: NDArray[np.int64]
) -> Iterator[tuple[int, int, Map]]:
    """First step, last step plus 1 and transition of each block of a phase; the sum starts at 0."""
    time, start = law.algorithm.time, 0
    known: dict[tuple[int, bytes], Map] = {}
    repeats = time.distinct_periods == ()
    for edge in edges.tolist():
        stop = edge - offset
        key = (stop - start, law.phase.settings(start, start + 1).tobytes())
        still = repeats and law.phase.still(start, stop)
        many = known.get(key) if still else None
        if many is None:
            many = walker.cycle(law.mode, start, stop - start)
            if still:
                known[key] = many
        yield start, stop, many
        start = stop


def _next(
    problem: Problem, old: _SummedLaw, new: _SummedLaw, age: int, joint: _Joint
) -> tuple[_Joint, bool]:
    """Joint moments at the start of the next phase, and whether its method goes on."""
    mean, second, cross, seen = joint
    goes = goes_on(old.phase, new.phase)
    if goes and old.whole.coordinates == new.whole.coordinates:
        return joint, True
    if not goes:
        check_own_starts(new.whole)
    if resumes(old.phase, new.phase):
        lift, normals = resumption(old.inner, new.inner, age)
        origin = origins(new.inner, old.inner.coordinates)
    else:
        draws, normals = embedding(new.inner)
        lift = np.outer(draws[:, 0], readout(old.inner, age))
        origin = origins(new.inner)
    place = np.outer(-problem.minimum, origin)
    mask = new.whole.member_mask(problem)
    scale = np.ones(problem.directions) if mask is None else mask
    moved = mean @ lift.T
    mixed = moved[:, :, None] * place[:, None, :]
    second = (
        np.einsum("ij,djk,lk->dil", lift, second, lift)
        + mixed + mixed.swapaxes(1, 2) + place[:, :, None] * place[:, None, :]
        + scale[:, None, None] * (normals @ normals.T)
    )  # fmt: skip
    cross = np.einsum("ij,djs->dis", lift, cross) + place[:, :, None] * seen[:, None, :]
    return _Joint(moved + place, second, cross, seen), False


def _last_loss(
    moment: FloatArray, lengths: NDArray[np.int64], problem: Problem, program: Program
) -> float:
    """Loss of the last iterate, by the solver if its block has others."""
    if lengths[-1] == 1:
        return float(moment[-1, -1])
    return float(solve(problem, program, [program.steps]).loss[0])
