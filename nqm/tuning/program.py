"""Search for the best constant rate (and momentum) of one phase of a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pandas as pd

from nqm.errors import NQMError, check_integer
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import Problem
from nqm.program import Phase, Program, as_program
from nqm.schedule import Constant
from nqm.tuning.constant_lr import Best, best_lr, best_lr_and_momentum
from nqm.tuning.stability import searched_edge
from nqm.tuning.steps_to_target import fewest_steps

#: Least rate searched, in units of the largest stable one.
SLOWEST = 1e-5
#: Largest momentum searched.
HEAVIEST = 0.999


def best_phase_lr(
    problem: Problem | LeastSquares,
    program: Program,
    index: int,
    *,
    momentum: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Best:
    """Find the constant learning rate (and momentum) of one phase of least final loss.

    The range is 1e-5 to 0.999 of the stability edge.

    Parameters
    ----------
    problem : Problem or LeastSquares
        Problem whose exact expected loss is minimised.
    program : Program
        All phases are run; the chosen one needs a constant rate.
    index : int
        Position of the phase to tune; -1 is the last. A stated ``member_lr`` is not changed.
    momentum : bool
        Search the momentum of the phase's optimizer as well, from 0 to 0.999.
    progress : callable
        Called with 1 before each setting is evaluated.

    Returns
    -------
    Best
        Best rate (and momentum), its loss, and all evaluated settings.

    Raises
    ------
    NQMError
        If there is no such phase, its rate is not constant, its method is not linear or has no
        momentum to search, or every rate diverges.
    """
    program = as_program("best_phase_lr.program", program)
    phase = _phase(program, index)

    def changed(lr: float, algorithm: Any) -> Program:
        progress(1)
        phases = list(program.phases)
        phases[index] = replace(phase, lr=lr, algorithm=algorithm)
        return Program(tuple(phases))

    if not momentum:
        high = searched_edge(problem, phase)
        return best_lr(
            problem, lambda lr: changed(lr, phase.algorithm), SLOWEST * high, 0.999 * high
        )
    ends = [replace(phase, algorithm=_with_momentum(phase.algorithm, m)) for m in (0.0, HEAVIEST)]
    high = max(searched_edge(problem, end) for end in ends)
    return best_lr_and_momentum(
        problem,
        lambda lr, m: changed(lr, _with_momentum(phase.algorithm, m)),
        SLOWEST * high,
        0.999 * high,
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
    lr, found = fewest_steps(problem, _phase(program, 0), target, progress=progress)
    row = {"lr": lr, "step": int(found.step), "examples": found.examples, "loss": found.loss}
    return pd.DataFrame([row | {"status": str(found.status)}])


def _phase(program: Program, index: int) -> Phase:
    count = len(program.phases)
    check_integer("phase", index, -count)
    if not -count <= index < count:
        raise NQMError(f"phase must lie in 0..{count - 1}, or -1 for the last; got {index}")
    phase = program.phases[index]
    if not isinstance(phase.lr, Constant):
        name = type(phase.lr).__name__
        raise NQMError(f"tuning searches a constant rate but phase.lr is {name}; give a number")
    return phase


def _with_momentum(algorithm: Any, momentum: float) -> Any:
    names = {field.name for field in fields(algorithm)}
    if "momentum" in names:
        return replace(algorithm, momentum=momentum)
    if "inner" in names:
        return replace(algorithm, inner=_with_momentum(algorithm.inner, momentum))
    raise NQMError(f"{type(algorithm).__name__} has no momentum; use heavy_ball or nesterov")
