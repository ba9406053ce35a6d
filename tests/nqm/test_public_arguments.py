"""What the public functions make of problems and programs of every type."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nqm
import nqm.tuning.program
from nqm import SGD, Adam, LeastSquares, NQMError, Phase, Problem, Program
from nqm.problems.spectra import harmonic
from tests.tolerances import IDENTITY, agree

PHASE = Phase(SGD(), 0.1, 8)
ADDITIVE = Problem(harmonic(4), 0.1)
COUPLED = LeastSquares(harmonic(4), 0.1)

#: A valid value of every parameter that has no default.
GIVEN: dict[str, Any] = {
    "problem": ADDITIVE, "problems": ADDITIVE, "program": Program((PHASE,)), "phase": PHASE,
    "algorithm": SGD(), "algorithms": SGD(), "target": 0.9, "lr": [0.1, 0.2], "steps": 8,
    "make_program": lambda lr, *momentum: nqm.constant(SGD(), lr, 8), "low": 0.01, "high": 0.3,
    "batch_sizes": [1, 2, 4, 8], "pieces": 2, "examples": 16,
    "programs": [Program((PHASE,))], "cycle": Program((PHASE,)), "batch_size": 1.0,
    "lengths": [2, 3, 3], "index": 0, "members": 2,
    "clients": [(ADDITIVE, Program((PHASE,)))],
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(nqm, name)
    for name in (
        "solve", "sample", "steady", "scan", "search", "shuffled_steady", "stability_edge",
        "best_lr", "best_lr_and_momentum", "critical_batch_size", "fewest_steps",
        "steps_to_target", "condense", "balance_point", "best_batches", "best_late_phase",
        "best_piecewise",
    )
} | {
    "of_runs": nqm.Soup.of_runs,
    "of_snapshots": nqm.Soup.of_snapshots,
    "of_star": nqm.Soup.of_star,
    "of_clients": lambda problem, clients: nqm.Soup.of_clients(problem, clients),
    "fewest_steps_piecewise": nqm.tuning.fewest_steps_piecewise,
    "piecewise_loss": nqm.tuning.piecewise_loss,
    "best_phase_lr": nqm.tuning.program.best_phase_lr,
    "fastest_phase_lr": nqm.tuning.program.fastest_phase_lr,
}  # fmt: skip
#: Functions that know least squares; all others must say that they do not.
KNOW_COUPLED = {
    "solve", "sample", "steady", "stability_edge", "best_lr", "best_lr_and_momentum",
    "critical_batch_size", "fewest_steps", "steps_to_target", "best_phase_lr", "fastest_phase_lr",
    "condense", "best_piecewise",
}  # fmt: skip
NONSENSE = (None, "x", 3, np.nan, [], [SGD()], {}, Adam(), SGD(), PHASE, ADDITIVE, lambda lr: lr)


def _arguments(name: str) -> dict[str, Any]:
    needed = [
        parameter.name
        for parameter in inspect.signature(FUNCTIONS[name]).parameters.values()
        if parameter.default is parameter.empty
    ]
    given = {needed_name: GIVEN[needed_name] for needed_name in needed}
    if name == "best_lr_and_momentum":
        given |= {"momenta": (0.0, 0.9), "points": 3}
    if name == "critical_batch_size":
        given |= {"points": 3, "target": 0.5, "batch_sizes": [1, 4, 16]}
    if name == "balance_point":
        given |= {"lr": 0.1, "algorithm": nqm.MultiplicativeLatePhase(2, gamma="mean")}
        given["problem"] = ADDITIVE.replace(minimum=1.0)
    return given


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nonsense_is_one_line_that_is_no_traceback(name: str) -> None:
    given = _arguments(name)
    for parameter in set(given) & {"problem", "problems", "program", "phase", "algorithm", "lr",
                                   "target", "batch_sizes", "programs", "clients"}:  # fmt: skip
        for value in NONSENSE:
            said = ""
            try:
                FUNCTIONS[name](**(given | {parameter: value}))
            except NQMError as error:
                said = str(error)
            assert "\n" not in said
            assert len(said) < 400


@pytest.mark.parametrize("name", FUNCTIONS)
def test_least_squares_is_solved_or_refused_by_name(name: str) -> None:
    given = _arguments(name)
    given["problems" if "problems" in given else "problem"] = COUPLED
    if name in KNOW_COUPLED:
        FUNCTIONS[name](**given)
    else:
        with pytest.raises(NQMError, match="LeastSquares has solve, sample, steady"):
            FUNCTIONS[name](**given)


def test_edge_of_least_squares_is_its_own() -> None:
    # SGD's second moments settle while sum_i h_i w_i < 1, w_i = lr / (B (2 - lr h_i (1 + 1/B))):
    # the root of that sum, by bisection.
    problem = LeastSquares(harmonic(100), 0.1)
    for batch_size in (1, 4):

        def bred(lr: float, size: int = batch_size) -> float:
            h = problem.curvature
            return float(np.sum(h * lr / (size * (2.0 - lr * h * (1.0 + 1.0 / size)))))

        low, high = 0.0, 2.0 / (1.0 + 1.0 / batch_size)
        for _ in range(80):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if bred(middle) < 1.0 else (low, middle)
        edge = nqm.stability_edge(problem, SGD(), batch_size=batch_size)
        agree(edge, low, 1e-10)  # the bisection of the edge stops at 1e-12
        assert edge < nqm.stability_edge(problem.additive(), SGD())


def test_steps_to_target_of_least_squares_are_those_of_its_path() -> None:
    problem = LeastSquares(harmonic(20), 0.01, initial_mean=1.0, initial_variance=0.0)
    phase = Phase(SGD(), 0.1, 400)
    path = nqm.solve(problem, phase, range(401)).loss
    target = 0.3 * path[0]
    found = nqm.steps_to_target(problem, phase, target)
    assert found.step == np.flatnonzero(path <= target)[0]
    assert found.status == "reached"
    agree(found.floor, nqm.steady(problem, phase).loss, IDENTITY)
    last = nqm.steps_to_target(problem, phase, target, crossing="last")
    assert last.step == np.flatnonzero(path > target)[-1] + 1


def test_a_phase_and_a_list_of_phases_are_programs() -> None:
    expected = nqm.solve(ADDITIVE, Program((PHASE, PHASE)), [16]).loss
    agree(nqm.solve(ADDITIVE, [PHASE, PHASE], [16]).loss, expected, 0.0)
    agree(nqm.solve(ADDITIVE, PHASE, [8]).loss, nqm.solve(ADDITIVE, Program((PHASE,)), [8]).loss, 0)
    with pytest.raises(NQMError, match=r"solve.program must be a Program.*Phase\(algorithm, lr"):
        nqm.solve(ADDITIVE, SGD())  # type: ignore[arg-type]
    with pytest.raises(NQMError, match=r"program.phases\[1\] must be a Phase; got 'x'"):
        Program((PHASE, "x"))  # type: ignore[arg-type]
    with pytest.raises(NQMError, match=r"steady.phase must be a Phase; .*: give one of its phases"):
        nqm.steady(ADDITIVE, Program((PHASE,)))  # type: ignore[call-overload]
