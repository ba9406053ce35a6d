"""Monte Carlo: the literal algorithm on many replicas, with standard errors.

Replicas run in fixed blocks, each with a random generator of its own, so the result is bitwise the
same for any number of workers. A block stores its own state only; no array of
(replicas x directions x steps) exists.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.sampled import Sampled
from nqm.errors import NQMError, check_integer
from nqm.limits import check_memory, check_walk
from nqm.problems.least_squares import LeastSquares, any_problem
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program, goes_on, resumes
from nqm.result import Trajectory
from nqm.solvers._kernels import fast_normals
from nqm.solvers._kernels.linear_samples import sample_linear
from nqm.solvers._kernels.multiplicative_samples import (
    evaluate_multiplicative,
    sample_multiplicative,
)
from nqm.solvers._kernels.normals import fill_normals, streams
from nqm.solvers._kernels.optimizer_samples import sample_optimizer
from nqm.solvers.control_variates import Start, Twin, adjust, peak
from nqm.solvers.moments import check_own_starts
from nqm.transition import (
    embedding,
    extract,
    member_readout,
    minibatch_count,
    origins,
    readout,
    resumption,
)

#: Replicas of one block, which advance together.
BLOCK = fast_normals.LANES
#: Most transition entries prepared at once (16 MB).
CHUNK = 2_000_000


def sample(  # noqa: PLR0913 - options, by keyword
    problem: Problem | LeastSquares,
    program: Program | Phase | Sequence[Phase],
    at: Sequence[int] | None = None,
    *,
    replicas: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    precision: str = "float64",
    control: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Trajectory:
    """Estimate the expected loss at the recorded steps by Monte Carlo.

    Parameters
    ----------
    problem : Problem or LeastSquares
        A direction of multiplicity m is simulated once and counted m times: the mean is unbiased
        and its standard error is that of this (larger) scatter. Use `Problem.expanded` for the
        distribution of the loss. Least squares is sampled example by example, in float64, on one
        thread.
    program : Program, Phase or sequence of Phase
        Phases that are run from the problem's start.
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.
    replicas : int
        Independent runs, >= 2 (>= 3 with `control`).
    seed : int
        Seed of all draws, >= 0; the same seed gives the same numbers for any number of workers.
    workers : int, optional
        Threads; all processors by default.
    precision : {"float64", "float32"}
        Precision of the normals; everything else is float64 in both cases. "float32" is for linear
        algorithms, several times as fast, and draws no normal beyond 6.66
        (`nqm.solvers._kernels.fast_normals`).
    control : bool
        Adjust the mean losses of a method that is not linear by a control variate: a linear twin
        with the same noise, whose expected loss is exact (`nqm.solvers.control_variates`). The
        result's `speed_up` is the factor by which more replicas would be needed without it. Linear
        phases can come before such a method, not after; factors must be elementwise.
    progress : callable, optional
        Called with the number of replicas finished since the last call.

    Returns
    -------
    Trajectory
        Mean losses with standard errors, of kind "sample".

    Raises
    ------
    NQMError
        If an argument is out of range, an option does not fit the program, or it would take too
        much memory or time.
    """
    check_integer("replicas", replicas, 3 if control else 2)
    check_integer("seed", seed, 0)
    check_integer("workers", 1 if workers is None else workers, 1)
    fast_normals.check_precision(precision)
    program = as_program("sample.program", program)
    problem = any_problem("sample", problem)
    if isinstance(problem, LeastSquares):
        return _least_squares(problem, program, at, replicas, seed, precision, control, progress)
    wanted = program.recorded(at)
    _check_sizes(problem, program, len(wanted), replicas, 3 if control else 2)
    start = Start.of(problem, program, wanted) if control else None
    plan = _Plan(problem, program, wanted, fast=precision == "float32", start=start)
    sizes = [min(BLOCK, replicas - i) for i in range(0, replicas, BLOCK)]
    seeds = np.random.SeedSequence(seed).spawn(len(sizes))
    loss = np.empty((len(wanted), replicas))
    member_loss = np.empty((len(wanted), replicas))
    twin_loss = np.empty((len(wanted), replicas if control else 0))
    expected = np.empty(len(wanted))

    def run(index: int) -> int:
        first = index * BLOCK
        with np.errstate(over="ignore", invalid="ignore"):  # of this thread; see `status`
            part, members, twin = plan.run(_Draws(seeds[index], problem, plan.fast), sizes[index])
        loss[:, first : first + sizes[index]] = part
        member_loss[:, first : first + sizes[index]] = members
        if control:
            twin_loss[:, first : first + sizes[index]] = twin.loss
            expected[...] = twin.expected  # the same in every block
        return sizes[index]

    threads = min(workers or os.cpu_count() or 1, len(sizes))
    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(run, range(len(sizes))):
            if progress is not None:
                progress(done)
    result = Trajectory.of_samples(problem, program, wanted, loss, member_loss)
    if not control:
        return result
    with np.errstate(over="ignore", invalid="ignore"):
        mean, error = adjust(loss, twin_loss, expected)
        member_mean, member_error = adjust(member_loss, twin_loss, expected)
    return replace(
        result,
        loss=mean,
        stderr=error,
        member_loss=member_mean,
        member_stderr=member_error,
        controlled=True,
    )


def _check_sizes(
    problem: Problem, program: Program, records: int, replicas: int, copies: int
) -> None:
    """Raise NQMError if a run would take too much memory or time."""
    check_memory("replicas", replicas, float(copies) * records * replicas)
    stepped = "phase.0.steps" if len(program.phases) == 1 else "the sum of all phases' steps"
    check_walk(stepped, program.steps, "Monte Carlo takes each of them")
    for index, phase in enumerate(program.phases):
        algorithm = phase.algorithm
        chains, state = float(algorithm.member_count), 1.0
        reads = 0.0  # every record reads every member off the state
        if isinstance(algorithm, Algorithm):
            state = float(len(algorithm.coordinates))
            reads = records * chains * state
        check_memory(
            f"phase.{index}: the members of {type(algorithm).__name__}",
            algorithm.member_count,
            3.0 * BLOCK * problem.directions * (state + chains) + reads,
        )
        if isinstance(algorithm, Sampled | MultiplicativeLatePhase):
            check_memory(f"phase.{index}.steps", phase.steps, phase.steps)


def _least_squares(  # noqa: PLR0913
    problem: LeastSquares,
    program: Program,
    at: Sequence[int] | None,
    replicas: int,
    seed: int,
    precision: str,
    control: bool,
    progress: Callable[[int], None] | None,
) -> Trajectory:
    """`sample` for least squares, which has a sampler of its own."""
    if precision != "float64" or control:
        name = "control" if control else "precision"
        raise NQMError(f"sample.{name}: least squares is sampled literally, in float64; drop it")
    from nqm.solvers.least_squares import sample as least_squares_sample

    result = least_squares_sample.sample(problem, program, at, replicas=replicas, seed=seed)
    if progress is not None:
        progress(replicas)
    return result


class _Plan:
    """Work that is the same for every block: checked phases and recorded steps."""

    def __init__(
        self,
        problem: Problem,
        program: Program,
        wanted: list[int],
        *,
        fast: bool,
        start: Start | None,
    ):
        self.problem, self.program, self.wanted, self.fast = problem, program, wanted, fast
        self.start, self.root = start, _root(problem)
        if fast and self.root.size:
            raise NQMError(
                "precision 'float32' draws each direction independently, but the directions of "
                "this problem are correlated; use 'float64'"
            )
        self.linear: dict[int, _Linear] = {}
        for index, phase in enumerate(program.phases):
            if isinstance(phase.algorithm, Algorithm):
                phase.algorithm.check(problem)
                self.linear[index] = _Linear(phase.algorithm, problem)
                if index:
                    self._check(index, phase.algorithm)
            elif fast:
                name = type(phase.algorithm).__name__
                raise NQMError(
                    f"precision 'float32' is for linear algorithms; phase.{index} is {name}; "
                    "use 'float64'"
                )
            elif isinstance(phase.algorithm, MultiplicativeLatePhase):
                phase.algorithm.check(problem)
            elif not isinstance(phase.algorithm, Sampled):
                raise NQMError(f"no sampler for {type(phase.algorithm).__name__}")
            else:
                phase.algorithm.check(problem)

    def _check(self, index: int, algorithm: Algorithm) -> None:
        if not self._goes_on(index):
            check_own_starts(algorithm)

    def _goes_on(self, index: int) -> bool:
        return index > 0 and goes_on(*self.program.phases[index - 1 : index + 1])

    def run(self, draws: _Draws, replicas: int) -> tuple[FloatArray, FloatArray, Twin]:
        """Losses (records, replicas) of one block, mean model and average member, and its twins."""
        problem, rng = self.problem, draws.rng
        loss = np.empty((len(self.wanted), replicas))
        member_loss = np.empty_like(loss)
        mean, sd = problem.initial_mean[:, None], np.sqrt(problem.initial_variance)[:, None]

        def draw() -> FloatArray:
            begun = _normals(rng, (problem.directions, replicas))
            start = problem.initial_correlation
            if start is not None:
                begun = start.root @ begun[: start.root.shape[1]]
            begun *= sd
            begun += mean
            return begun

        def plain() -> FloatArray:
            """Weights (replicas, d) at the start of a phase that is not linear."""
            return np.ascontiguousarray((draw() if weights is None else weights).T)

        offset, age = 0, 0
        state: FloatArray | None = None
        weights: FloatArray | None = None
        factors: tuple[FloatArray, FloatArray] | None = None
        buffers: tuple[FloatArray, FloatArray] | None = None
        start = self.start
        twin = Twin.of(problem, start, len(self.wanted), replicas)
        for index, phase in enumerate(self.program.phases):
            last = offset + phase.steps
            rows = [
                (row, step - offset)
                for row, step in enumerate(self.wanted)
                if (offset < step or (index == 0 and step == 0)) and step <= last
            ]
            if isinstance(phase.algorithm, MultiplicativeLatePhase):
                begun = plain()
                self._meet(twin, index, begun)
                if factors is None or not self._goes_on(index):
                    factors = self._factors(rng, phase.algorithm, begun)
                    twin.begin_factors(problem, phase.algorithm, factors[1])
                theta, phi = factors
                self._multiplicative(rng, phase, theta, phi, twin, rows, loss, member_loss)
                weights, state = (theta * phi.mean(axis=1) - problem.minimum).T, None
            elif isinstance(phase.algorithm, Sampled):
                begun = plain()
                self._meet(twin, index, begun)
                if buffers is None or not self._goes_on(index):
                    buffers, age = (np.zeros_like(begun), np.zeros_like(begun)), 0
                    twin.begin_optimizer()
                self._optimizer(rng, phase, age, begun, buffers, twin, rows, loss)
                member_loss[[row for row, _ in rows]] = loss[[row for row, _ in rows]]
                age, state, factors, weights = age + phase.steps, None, None, begun.T
            else:
                linear = self.linear[index]
                state, age = self._enter(rng, index, state, weights, age, draw)
                linear.advance(draws, problem, phase, state, age, rows, loss, member_loss)
                age += phase.steps
                factors = None
                if index + 1 < len(self.program.phases):
                    weights = np.tensordot(readout(linear.algorithm, age), state, 1)
                if start is not None:  # in linear phases the twin is the run itself
                    here = [row for row, _ in rows]
                    twin.loss[here] = loss[here]
            offset = last
        return loss, member_loss, twin

    def _meet(self, twin: Twin, index: int, weights: FloatArray) -> None:
        """Start the twin at the first phase that is not linear."""
        if self.start is not None and index == self.start.index:
            twin.delta[...] = weights - self.start.mean

    def _enter(
        self,
        rng: np.random.Generator,
        index: int,
        state: FloatArray | None,
        weights: FloatArray | None,
        age: int,
        draw: Callable[[], FloatArray],
    ) -> tuple[FloatArray, int]:
        """State (n, d, replicas) at the start of a linear phase, and its age."""
        new = self.linear[index].algorithm
        if index and state is not None and self._goes_on(index):
            old = self.linear[index - 1].algorithm
            if old.coordinates == new.coordinates:
                return state, age
        if index and state is not None:
            old = self.linear[index - 1].algorithm
            if resumes(*self.program.phases[index - 1 : index + 1]):
                lift, normals = resumption(old, new, age)
                return self._begun(rng, index, list(state), lift, normals, old.coordinates), 0
        draws, normals = embedding(new)
        sources = [draw() if weights is None else weights for _ in range(draws.shape[1])]
        return self._begun(rng, index, sources, draws, normals), 0

    def _begun(
        self,
        rng: np.random.Generator,
        index: int,
        sources: Sequence[FloatArray],
        lift: FloatArray,
        normals: FloatArray,
        known: Sequence[str] = (),
    ) -> FloatArray:
        """Compute lift @ sources + normals @ fresh noise for every replica and direction.

        Coordinates that begin at the origin of weight space, but for the `known` ones, are -w*.
        """
        linear = self.linear[index]
        start = _combined(lift, sources)
        if normals.shape[1]:
            fresh = [_normals(rng, start.shape[1:]) for _ in range(normals.shape[1])]
            noise = _combined(normals, fresh)
            start += noise if linear.mask is None else linear.mask[:, None] * noise
        for j in np.flatnonzero(origins(linear.algorithm, known)):
            start[j] -= self.problem.minimum[:, None]
        return start

    def _factors(
        self, rng: np.random.Generator, algorithm: MultiplicativeLatePhase, start: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Base weights (replicas, d) and members' factors (replicas, K, d or 1) at the start."""
        theta = np.ascontiguousarray((self.problem.minimum + start) / algorithm.factor)
        wide = 1 if algorithm.scalar else self.problem.directions
        phi = np.full((len(start), algorithm.members, wide), float(algorithm.factor))
        if algorithm.spread:
            phi *= 1.0 + np.sqrt(algorithm.spread) * rng.standard_normal(phi.shape)
        return theta, phi

    def _optimizer(  # noqa: PLR0913
        self,
        rng: np.random.Generator,
        phase: Phase,
        age: int,
        x: FloatArray,
        buffers: tuple[FloatArray, FloatArray],
        twin: Twin,
        rows: list[tuple[int, int]],
        loss: FloatArray,
    ) -> None:
        """Run a compiled rule that is not linear; weights and buffers in place."""
        algorithm, problem = phase.algorithm, self.problem
        assert isinstance(algorithm, Sampled)
        record = np.full(phase.steps, -1, dtype=np.int64)
        for row, step in rows:
            if step:
                record[step - 1] = row
            else:
                loss[row] = x**2 @ problem.weight
                twin.record(row, problem)
        generator = _take(rng)
        chunk = max(1, CHUNK // problem.directions)
        for first in range(0, phase.steps, chunk):
            until = min(first + chunk, phase.steps)
            settings = phase.settings(first, until)
            sample_optimizer(
                generator,
                *algorithm.rule,
                algorithm.tail,
                algorithm.pitch,
                age + first,
                problem.curvature,
                problem.minimum,
                np.sqrt(problem.noise_variance / settings[:, [1]]),
                settings[:, 0].copy(),
                problem.multiplicity,
                x,
                *buffers,
                record[first:until],
                loss,
                *twin.arrays,
                peak(algorithm),
                self.root,
            )
        _give_back(rng, generator)

    def _multiplicative(  # noqa: PLR0913
        self,
        rng: np.random.Generator,
        phase: Phase,
        theta: FloatArray,
        phi: FloatArray,
        twin: Twin,
        rows: list[tuple[int, int]],
        loss: FloatArray,
        member_loss: FloatArray,
    ) -> None:
        """Run the compiled multiplicative step; theta and phi in place."""
        algorithm, problem = phase.algorithm, self.problem
        assert isinstance(algorithm, MultiplicativeLatePhase)
        scalar = algorithm.scalar
        minimum = problem.minimum
        record = np.full(phase.steps, -1, dtype=np.int64)
        for row, step in rows:
            if step:
                record[step - 1] = row
            else:
                evaluate_multiplicative(
                    theta, phi, minimum, scalar, problem.weight, loss[row], member_loss[row]
                )
                twin.record(row, problem)
        generator = _take(rng)
        chunk = max(1, CHUNK // problem.directions)
        for first in range(0, phase.steps, chunk):
            until = min(first + chunk, phase.steps)
            settings = phase.settings(first, until)
            sample_multiplicative(
                generator,
                problem.curvature,
                minimum,
                np.sqrt(problem.noise_variance / settings[:, [2]]),
                algorithm.base_scale * settings[:, 0],
                settings[:, 1].copy(),
                scalar,
                theta,
                phi,
                record[first:until],
                problem.weight,
                loss,
                member_loss,
                *twin.arrays,
                self.root,
            )
        _give_back(rng, generator)


def _normals(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """`rng.standard_normal(shape)`, in compiled code."""
    generator, out = _take(rng), np.empty(math.prod(shape))
    fill_normals(generator, out)
    _give_back(rng, generator)
    return out.reshape(shape)


def _combined(matrix: FloatArray, sources: Sequence[FloatArray]) -> FloatArray:
    """Compute matrix @ sources; most entries are 0 or 1."""
    total = np.zeros((len(matrix), *sources[0].shape))
    for j, s in zip(*np.nonzero(matrix), strict=True):
        total[j] += sources[s] if matrix[j, s] == 1.0 else matrix[j, s] * sources[s]
    return total


def _root(problem: Problem) -> FloatArray:
    """Root (d, r) of the noise's correlation matrix; r = 0 if directions are independent."""
    correlation = problem.noise_correlation
    return np.empty((problem.directions, 0)) if correlation is None else correlation.root


def _take(rng: np.random.Generator) -> Any:
    """SFC64 state (4,) for the kernels, which draw the same stream without calls to NumPy."""
    return rng.bit_generator.state["state"]["state"].copy()


def _give_back(rng: np.random.Generator, generator: Any) -> None:
    state = dict(rng.bit_generator.state)
    state["state"] = {"state": generator}
    rng.bit_generator.state = state


class _Draws:
    """Random generators of one block.

    Steps of linear phases draw from `streams` (d, 4), in single precision from `lanes` (4, BLOCK);
    all else from `rng`.
    """

    def __init__(self, seed: np.random.SeedSequence, problem: Problem, fast: bool):
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.streams = np.empty((0, 4), np.uint64) if fast else streams(seed, problem.directions)
        self.lanes = fast_normals.lanes(seed)[:, : BLOCK if fast else 0]


class _Linear:
    """A linear algorithm prepared for the sampling kernel (its transition is sparse)."""

    def __init__(self, algorithm: Algorithm, problem: Problem):
        self.algorithm = algorithm
        self.mask = algorithm.member_mask(problem)
        self.root, self.minibatches = _root(problem), minibatch_count(algorithm)
        self.cache: dict[bytes, Any] = {}
        self.last: tuple[Any, tuple[list[int], tuple[Any, ...]]] = None, ([], ())

    def advance(  # noqa: PLR0913 - options, by keyword
        self,
        draws: _Draws,
        problem: Problem,
        phase: Phase,
        state: FloatArray,
        age: int,
        rows: list[tuple[int, int]],
        loss: FloatArray,
        member_loss: FloatArray,
    ) -> None:
        """Take all steps of the phase, in place."""
        algorithm = self.algorithm
        targets = {step: row for row, step in rows}
        if 0 in targets:
            row = targets[0]
            loss[row] = problem.weight @ np.tensordot(readout(algorithm, age), state, 1) ** 2
            member_loss[row] = loss[row]
            if algorithm.member_count:
                members = np.tensordot(member_readout(algorithm, age), state, 1)
                member_loss[row] = problem.weight @ (members**2).mean(axis=0)
        n, replicas = len(algorithm.coordinates), state.shape[2]
        across = state  # rows of a short block are padded
        if replicas < BLOCK:
            across = np.zeros((n, problem.directions, BLOCK))
            across[:, :, :replicas] = state
        chunk = min(CHUNK // (problem.directions * (n + 1)), 4096)
        chunk = max(BLOCK, chunk - chunk % BLOCK)  # whole tiles: float32 draws tile by tile
        for first in range(0, phase.steps, chunk):
            until = min(first + chunk, phase.steps)
            here, prepared = self._prepared(problem, phase, first, until, age, targets)
            part = np.zeros((max(len(here), 1), BLOCK))
            member_part = np.zeros_like(part)
            sample_linear(
                draws.streams,
                draws.lanes,
                *prepared,
                problem.weight,
                replicas,
                across,
                part,
                member_part,
                self.root,
                self.minibatches,
            )
            for i, step in enumerate(here):
                losses = part[i], member_part[i] if algorithm.member_count else part[i]
                loss[targets[step]], member_loss[targets[step]] = (x[:replicas] for x in losses)
        if across is not state:
            state[...] = across[:, :, :replicas]

    def _prepared(
        self,
        problem: Problem,
        phase: Phase,
        first: int,
        until: int,
        age: int,
        targets: dict[int, int],
    ) -> tuple[list[int], tuple[Any, ...]]:
        """Recorded steps among [first, until), and these as `sample_linear` takes them.

        The same in every block, so the last answer is kept: most phases are a single chunk.
        """
        key, answer = self.last
        if key != (first, age):
            algorithm, n = self.algorithm, len(self.algorithm.coordinates)
            here = [step for step in sorted(targets) if first < step <= until]
            record = np.full(until - first, -1, dtype=np.int64)
            reads = np.zeros((max(len(here), 1), n))
            members = np.zeros((max(len(here), 1), algorithm.member_count, n))
            for i, step in enumerate(here):
                record[step - first - 1] = i
                reads[i] = readout(algorithm, age + step)
                members[i] = member_readout(algorithm, age + step)
            steps, kind = self._steps(problem, phase, first, until, age)
            answer = here, (*steps, kind, record, reads, members)
            self.last = (first, age), answer
        return answer

    def _steps(
        self, problem: Problem, phase: Phase, first: int, until: int, age: int
    ) -> tuple[tuple[Any, ...], NDArray[np.int64]]:
        """Kinds of steps as `sample_linear` takes them, and the kind of each step."""
        settings = phase.settings(first, until)
        residue = self.algorithm.time.reduced(age + np.arange(first, until))
        kinds, kind = np.unique(np.column_stack([settings, residue]), axis=0, return_inverse=True)
        key = kinds.tobytes()
        if key not in self.cache:
            pattern, forms = np.empty(len(kinds), dtype=np.int64), []
            blocks: list[tuple[NDArray[np.int64], FloatArray]] = []
            for chosen, t in self.algorithm.time.groups(kinds[:, -1]):
                pattern[chosen] = len(blocks)
                full = self._full(problem, kinds[chosen], t)
                forms.append(_pattern(full))
                blocks.append((chosen, full[:, :, forms[-1][0]]))
            width = max(block.shape[2] for _, block in blocks)
            values = np.zeros((problem.directions, len(kinds), width))
            for chosen, block in blocks:
                values[:, chosen, : block.shape[2]] = block.transpose(1, 0, 2)
            n = len(self.algorithm.coordinates)
            starts, column = (
                np.zeros((len(blocks), n + 1), int),
                np.zeros((len(blocks), width), int),
            )
            for g, (used, _) in enumerate(forms):
                starts[g, 1:] = np.cumsum(used.sum(axis=1))
                column[g, : starts[g, -1]] = np.nonzero(used)[1]
            same = np.array([form[1] for form in forms])
            noise_columns = forms[0][0].shape[1] - n
            self.cache = {key: (values, starts, column, same, pattern, noise_columns)}
        return self.cache[key], kind.reshape(-1).astype(np.int64)

    def _full(self, problem: Problem, kinds: FloatArray, t: Any) -> FloatArray:
        """[A | C sd(e) | D] of these kinds of steps, shape (kinds, d, n, n + m)."""
        lr: Any = kinds[:, [0]]
        if self.algorithm.rate_count == 2:
            lr = (lr, kinds[:, [1]] * (1.0 if self.mask is None else self.mask))
        step = extract(self.algorithm, problem.curvature[None, :], lr, t)
        sd = np.sqrt(problem.noise_variance / kinds[:, [-2]])
        return np.concatenate([step.matrix, step.noise * sd[..., None, None], step.own], axis=-1)


def _pattern(full: FloatArray) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Entries (n, n + m) that steps compute with, and `same` of `sample_linear`."""
    n = full.shape[2]
    used, same, seen = (full != 0.0).any(axis=(0, 1)), np.full(n, -1), dict[bytes, int]()
    for j in range(n):
        same[j] = seen.setdefault(full[:, :, j].tobytes(), j)
        (columns,) = np.nonzero(used[j])
        if same[j] != j:
            same[j] += n
        elif len(columns) == 1 and columns[0] < n and (full[:, :, j, columns[0]] == 1.0).all():
            same[j] = columns[0]
        else:
            same[j] = -1
    used[same >= 0] = False
    return used, same
