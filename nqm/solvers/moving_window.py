"""Averages of the latest snapshots (LAWA) at constant rates, at a cost independent of the window.

The mean of the last w snapshots after t steps is the mean of all snapshots that SWA would take if
it started w snapshots ago. Each record is therefore a run of the inner method, then of SWA: of a
state of one running sum in place of w snapshots, whose equal steps are computed by powers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nqm.algorithms.averaging import LAWA, SWA
from nqm.algorithms.base import Algorithm
from nqm.algorithms.time_dependence import TimeDependence
from nqm.problems.quadratic import Problem
from nqm.program import Phase, Program
from nqm.result import Trajectory, runaway

#: Windows up to this are cheaper as they are.
SHORT = 12


def fits(problem: Problem, program: Program) -> bool:
    """Tell whether `solve` applies: a long window in the last phase, at constant rates.

    Parameters
    ----------
    problem : Problem
        Problem of d directions.
    program : Program
        Phases.

    Returns
    -------
    bool
        False also if an earlier phase has snapshots that the last one would continue.
    """
    algorithm = program.phases[-1].algorithm
    if not isinstance(algorithm, LAWA) or not is_long(problem, program.phases[-1]):
        return False
    if len(program.phases) == 1:
        return True
    old = program.phases[-2].algorithm
    taken = {*algorithm.kept, *SWA(algorithm.inner, algorithm.every).kept}
    return isinstance(old, Algorithm) and not taken & set(old.coordinates)


def is_long(problem: Problem, phase: Phase) -> bool:
    """Tell whether a phase has a long window at constant rates.

    Parameters
    ----------
    problem : Problem
        Problem of d directions.
    phase : Phase

    Returns
    -------
    bool
    """
    algorithm = phase.algorithm
    if not isinstance(algorithm, LAWA) or algorithm.window <= SHORT or problem.correlated:
        return False
    return phase.constant and algorithm.inner.time == TimeDependence()


def solve(
    problem: Problem,
    program: Program,
    wanted: list[int],
    plain: Callable[[Program, list[int]], Trajectory],
) -> Trajectory:
    """Compute the exact expected loss at the recorded steps.

    Parameters
    ----------
    problem : Problem
        Problem of d directions.
    program : Program
        Phases, for which `fits`.
    wanted : list of int
        Steps to record, rising and distinct.
    plain : callable
        Takes a program without such a window, and steps; returns what `nqm.solve` does.

    Returns
    -------
    Trajectory
        As `nqm.solve` returns it.
    """
    *before, last = program.phases
    algorithm = last.algorithm
    assert isinstance(algorithm, LAWA)
    every, window, offset = algorithm.every, algorithm.window, program.steps - last.steps
    mean = SWA(algorithm.inner, every)

    def run(skipped: int, steps: int, at: list[int]) -> Trajectory:
        phases: list[Phase] = list(before)
        if skipped:
            phases.append(replace(last, algorithm=algorithm.inner, steps=skipped))
        averaged = replace(last, algorithm=mean, steps=steps)
        phases.append(replace(averaged, restart=False) if skipped else averaged)
        return plain(Program(tuple(phases)), at)

    filling = [step for step in wanted if step - offset < (window + 1) * every]
    parts = [run(0, last.steps, filling)] if filling else []
    for step in wanted[len(filling) :]:
        skipped = ((step - offset) // every - window) * every
        parts.append(run(skipped, step - offset - skipped, [step]))
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (
            *("steps", "loss", "bias", "variance", "member_loss", "stated_sd"),
            *("stderr", "member_stderr", "weight_mean", "weight_variance", "unstable"),
        )
    }
    return replace(
        parts[-1], examples=program.examples(wanted), runaway=runaway(problem, program), **columns
    )
