"""Search for the best constant or peak rate (and momentum) of one phase of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nqm.errors import NQMError, check_integer
from nqm.limits import check_memory
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, as_program
from nqm.schedule import Constant, Schedule, Segment
from nqm.tuning.constant_lr import Best, best_lr, best_lr_and_momentum
from nqm.tuning.stability import searched_edge
from nqm.tuning.steps_to_target import fewest_steps

#: Least rate searched, in units of the largest stable one.
SLOWEST = 1e-5
#: Largest momentum searched.
HEAVIEST = 0.999
#: Highest peak of a schedule, in units of the largest stable constant rate: a few steps beyond that
#: may pay.
HIGHEST_PEAK = 10.0


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule times a factor."""

    of: Schedule
    factor: float

    def __call__(self, step: ArrayLike) -> FloatArray:
        """Value at a step."""
        return np.asarray(self.factor * self.of(step))

    @property
    def least(self) -> float:
        """A lower bound of the values."""
        return self.factor * self.of.least

    def segments(self, steps: int) -> Iterator[Segment]:
        """Those of the schedule itself."""
        return self.of.segments(steps)


def best_phase_lr(
    problem: Problem | LeastSquares,
    program: Program,
    index: int,
    *,
    momentum: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Best:
    """Find the learning rate (and momentum) of one phase of least final loss.

    A scheduled rate keeps its shape and is multiplied by a factor. The range is 1e-5 to 0.999 of
    the stability edge; for the peak of a schedule up to 10 times the edge, since some steps beyond
    it may pay.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is minimised.
    program : Program
        All phases are run.
    index : int
        Position of the phase to tune; -1 is the last. A stated ``member_lr`` is not changed.
    momentum : bool
        Search the momentum of the phase's optimizer as well, from 0 to 0.999.
    progress : callable
        Called with 1 before each setting is evaluated.

    Returns
    -------
    Best
        Best rate (the peak of a schedule) and momentum, its loss, and all evaluated settings.

    Raises
    ------
    NQMError
        If there is no such phase, its method is not linear or has no
        momentum to search, or every rate diverges.
    """
    program = as_program("best_phase_lr.program", program)
    phase = _phase(program, index)

    def changed(lr: float, algorithm: Any) -> Program:
        progress(1)
        phases = list(program.phases)
        rate = lr if peak is None else Scaled(schedule, lr / peak)
        phases[index] = replace(phase, lr=rate, algorithm=algorithm)
        return Program(tuple(phases))

    schedule: Any = phase.lr
    peak = None if isinstance(schedule, Constant) else _peak(phase)
    share = 0.999 if peak is None else HIGHEST_PEAK
    if not momentum:
        high = searched_edge(problem, phase)
        return best_lr(
            problem, lambda lr: changed(lr, phase.algorithm), SLOWEST * high, share * high
        )
    ends = [replace(phase, algorithm=_with_momentum(phase.algorithm, m)) for m in (0.0, HEAVIEST)]
    high = max(searched_edge(problem, end) for end in ends)
    return best_lr_and_momentum(
        problem,
        lambda lr, m: changed(lr, _with_momentum(phase.algorithm, m)),
        SLOWEST * high,
        share * high,
    )


def fastest_phase_lr(
    problem: Problem | LeastSquares,
    program: Program,
    target: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Find the constant rate at which a one-phase program reaches `target` in the fewest steps.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss must reach the target.
    program : Program
        One phase at a constant rate; its `steps` are the largest number considered.
    target : float
        Expected loss to reach, > 0.
    progress : callable, optional
        Called with 1 after each rate is evaluated.

    Returns
    -------
    DataFrame
        One row with columns lr, step, examples, loss, status.

    Raises
    ------
    NQMError
        If the program has several phases, or no rate reaches the target within its steps.
    """
    program = as_program("fastest_phase_lr.program", program)
    if len(program.phases) != 1:
        raise NQMError(f"a target needs a program of one phase; got {len(program.phases)}")
    phase = _phase(program, 0)
    if not isinstance(phase.lr, Constant):
        name = type(phase.lr).__name__
        raise NQMError(f"a target needs a constant rate but phase.lr is {name}; give a number")
    lr, found = fewest_steps(problem, phase, target, progress=progress)
    row = {"lr": lr, "step": int(found.step), "examples": found.examples, "loss": found.loss}
    return pd.DataFrame([row | {"status": str(found.status)}])


def _phase(program: Program, index: int) -> Phase:
    count = len(program.phases)
    check_integer("phase", index, -count)
    if not -count <= index < count:
        raise NQMError(f"phase must lie in 0..{count - 1}, or -1 for the last; got {index}")
    return program.phases[index]


def _peak(phase: Phase) -> float:
    """Largest learning rate of a phase."""
    if phase.steps == 0:
        raise NQMError("tuning searches the peak of phase.lr, and the phase has no steps")
    check_memory("phase.steps", phase.steps, 4.0 * phase.steps)
    peak = float(phase.settings(0, phase.steps)[:, 0].max())
    if peak == 0.0:
        raise NQMError("tuning searches the peak of phase.lr, which is 0 in all steps of the phase")
    return peak


def _with_momentum(algorithm: Any, momentum: float) -> Any:
    names = {field.name for field in fields(algorithm)}
    if "momentum" in names:
        return replace(algorithm, momentum=momentum)
    if "inner" in names:
        return replace(algorithm, inner=_with_momentum(algorithm.inner, momentum))
    raise NQMError(f"{type(algorithm).__name__} has no momentum; use heavy_ball or nesterov")
