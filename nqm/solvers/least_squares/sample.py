"""Literal Monte Carlo of one-pass least squares: inputs and labels are drawn, example by example.

This module uses no moments and no transitions: the algorithm's own `update` runs on numbers, with
all its members, and every minibatch is a set of Gaussian inputs with noisy labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nqm.algorithms.base import Algorithm, State
from nqm.errors import NQMError, check_integer
from nqm.limits import check_memory, check_walk
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray
from nqm.program import Phase, Program, goes_on, resumes
from nqm.result import Trajectory
from nqm.solvers.moments import check_own_starts
from nqm.transition import origins


class _Examples:
    """Minibatch gradients of one step, for every replica."""

    def __init__(
        self, problem: LeastSquares, rng: np.random.Generator, batch_size: float, replicas: int
    ):
        self.problem, self.rng, self.batch_size = problem, rng, batch_size
        self.shape = (replicas, problem.directions)
        self.named: dict[int, tuple[FloatArray, FloatArray]] = {}

    def __call__(self, x: FloatArray, batch: int | None = None, size: float = 1.0) -> FloatArray:
        if batch is None:
            inputs, labels = self._draw(size)
        else:
            if batch not in self.named:
                self.named[batch] = self._draw(size)
            inputs, labels = self.named[batch]
        point = np.broadcast_to(x, self.shape)
        residual = np.einsum("rbd,rd->rb", inputs, point) - labels
        return np.asarray(np.einsum("rbd,rb->rd", inputs, residual) / inputs.shape[1])

    def normal(self) -> FloatArray:
        return self.rng.standard_normal(self.shape)

    def _draw(self, size: float) -> tuple[FloatArray, FloatArray]:
        count = round(self.batch_size * size)
        if abs(count - self.batch_size * size) > 1e-9 or count < 1:
            raise NQMError(
                "sampling least squares needs minibatches of whole examples; "
                f"got {self.batch_size * size:g}"
            )
        replicas, d = self.shape
        inputs = np.sqrt(self.problem.curvature) * self.rng.standard_normal((replicas, count, d))
        labels = np.sqrt(self.problem.label_noise) * self.rng.standard_normal((replicas, count))
        return inputs, labels


def sample(
    problem: LeastSquares,
    program: Program,
    at: Sequence[int] | None = None,
    *,
    replicas: int = 1000,
    seed: int = 0,
) -> Trajectory:
    """Estimate the expected loss by Monte Carlo, as a check of `solve` for few directions.

    Each step draws replicas * members * batch size * directions normals.

    Parameters
    ----------
    problem : LeastSquares
        With multiplicity 1, because an input has one entry per direction.
    program : Program
        Phases of linear methods with batch sizes of whole examples.
    at : sequence of int, optional
        Steps of the whole program to record; about 100 by default.
    replicas : int
        Independent runs, >= 2.
    seed : int
        Seed of all draws, >= 0.

    Returns
    -------
    Trajectory
        Mean losses with standard errors, of kind "sample".

    Raises
    ------
    NQMError
        If a direction has multiplicity > 1, a minibatch is not a whole number of examples, or it
        would take too much memory or time.
    """
    check_integer("replicas", replicas, 2)
    check_integer("seed", seed, 0)
    if np.any(problem.multiplicity != 1.0):
        raise NQMError("sampling least squares needs multiplicity 1; write equal directions out")
    wanted = program.recorded(at)
    check_memory("replicas", replicas, 2.0 * len(wanted) * replicas)
    check_walk("phase.steps", program.steps, "Monte Carlo takes each of them")
    for index, phase in enumerate(program.phases):
        sizes = phase.settings(0, min(phase.steps, 10**6))[:, -1]
        largest = float(sizes.max(initial=0.0))
        check_memory(
            f"phase.{index}.batch_size", largest, largest * replicas * (problem.directions + 1.0)
        )
        chains = max(phase.algorithm.member_count, 1)
        check_memory(
            f"phase.{index}: the members", chains, 3.0 * chains * replicas * problem.directions
        )
    rng = np.random.Generator(np.random.SFC64(seed))
    rows: list[tuple[FloatArray, FloatArray]] = []
    with np.errstate(over="ignore", invalid="ignore"):
        _run(problem, program, wanted, replicas, rng, rows)
    loss, member_loss = (np.array(part) for part in zip(*rows, strict=True))
    return Trajectory.of_samples(problem.additive(), program, wanted, loss, member_loss)


def _run(
    problem: LeastSquares,
    program: Program,
    wanted: list[int],
    replicas: int,
    rng: np.random.Generator,
    rows: list[tuple[FloatArray, FloatArray]],
) -> None:
    """Run all phases on all replicas; append (loss, member loss), (replicas,) each, per record."""
    shape = (replicas, problem.directions)

    def draw() -> FloatArray:
        spread = np.sqrt(problem.initial_variance)
        return problem.initial_mean + spread * rng.standard_normal(shape)

    def record(algorithm: Algorithm, state: State, age: int) -> None:
        members = algorithm.member_weights(state, age) or (algorithm.weights(state, age),)
        found = [
            0.5 * (w**2 @ problem.curvature) for w in (algorithm.weights(state, age), *members)
        ]
        rows.append((found[0], np.mean(found[1:], axis=0)))

    old: Phase | None = None
    state: State = ()
    age, done = 0, 0
    for phase in program.phases:
        algorithm = phase.algorithm
        if not isinstance(algorithm, Algorithm):
            name = type(algorithm).__name__
            raise NQMError(f"least squares needs a linear method; got {name}")
        state, age = _enter(problem, phase, old, state, age, draw, rng, shape)
        if old is None and wanted[0] == 0:
            record(algorithm, state, age)
        mask = algorithm.member_mask(problem.additive())
        for step, (*rates, batch_size) in enumerate(phase.settings(0, phase.steps)):
            lr: Any = rates[0]
            if len(rates) == 2:
                lr = (rates[0], rates[1] * (1.0 if mask is None else mask))
            gradient = _Examples(problem, rng, batch_size, replicas)
            state = algorithm.update(state, gradient, lr, age + step)
            if done + step + 1 in wanted:
                record(algorithm, state, age + step + 1)
        old, age, done = phase, age + phase.steps, done + phase.steps


def _enter(  # noqa: PLR0913
    problem: LeastSquares,
    phase: Phase,
    old: Phase | None,
    state: State,
    age: int,
    draw: Any,
    rng: np.random.Generator,
    shape: tuple[int, int],
) -> tuple[State, int]:
    """State at the start of a phase, and its age (see `Phase`)."""
    algorithm = phase.algorithm
    assert isinstance(algorithm, Algorithm)
    mask = algorithm.member_mask(problem.additive())

    def normal() -> FloatArray:
        return rng.standard_normal(shape) * (1.0 if mask is None else mask)

    known: dict[str, Any] = {}
    source = draw
    if old is not None:
        assert isinstance(old.algorithm, Algorithm)
        before = old.algorithm
        if goes_on(old, phase):
            if before.coordinates == algorithm.coordinates:
                return state, age
        else:
            check_own_starts(algorithm)
        if resumes(old, phase):
            known = dict(zip(before.coordinates, state, strict=True))
        weights = before.weights(state, age)
        source = lambda: weights  # noqa: E731
    begun = algorithm.resume(known, source, normal) if known else algorithm.embed(source, normal)
    placed = [
        np.broadcast_to(-problem.minimum, shape) if at_origin else value
        for value, at_origin in zip(begun, origins(algorithm, known), strict=True)
    ]
    return tuple(placed), 0
