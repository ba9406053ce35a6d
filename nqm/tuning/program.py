"""Tuning one phase of a program, with ranges chosen for it."""

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
    """Constant learning rate (and momentum) of one phase with the least final loss.

    Parameters
    ----------
    problem : Problem
    program : Program
    index : int
        Which phase; -1 is the last. Its ``member_lr``, where stated, stays as it is.
    momentum : bool
        Search the momentum of the phase's optimizer as well.
    progress : callable
        Told of each setting tried.
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
    """One row: the constant rate at which a one-phase program first reaches `target` soonest.

    Raises
    ------
    NQMError
        If no rate reaches it within the program's steps.
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
