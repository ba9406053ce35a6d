"""Start and number of late-phase members at equal data: brute force, the exact solver, sampling."""

from __future__ import annotations

import numpy as np
import pytest

import nqm
from nqm import SGD, LatePhase, NQMError, Phase, Problem, Program
from nqm.problems.spectra import harmonic
from nqm.tuning import best_late_phase
from nqm.tuning.late_phase import late_program
from tests import literal
from tests.tolerances import IDENTITY, JUMP, agree_each, within_error


@pytest.fixture
def problem() -> Problem:
    h = harmonic(20)
    return Problem(h, 3.0 * h, initial_mean=0.5)


def test_rows_are_the_algorithm_at_equal_data(problem):
    found = best_late_phase(problem, 243, (1, 2, 5), batch_size=3, lr=0.3, late_lr=0.2)
    assert set(found.table["members"]) == {1, 2, 5}
    for row in found.table.itertuples():
        late = Phase(LatePhase(row.members, gamma="mean"), 0.1, row.late_steps, 3, member_lr=0.1)
        before = Phase(SGD(), 0.3, row.start, 3)
        run = nqm.solve(problem, Program((before, late)), [row.start + row.late_steps])
        agree_each(row.loss, run.loss[0], JUMP)
        assert run.examples[0] == row.examples == 243


def test_best_of_all_by_brute_force(problem):
    counts = (1, 2, 3, 4, 7)
    found = best_late_phase(problem, 60, counts, lr=0.5, late_lr=0.5)
    losses = {}
    for k in counts:
        for late in range(1, 60 // k + 1):
            program = late_program(k, 60 - k * late, late, 0.5, 0.5, 1.0)
            losses[k, 60 - k * late] = nqm.solve(problem, program, [program.steps]).loss[0]
    best = min(losses, key=lambda key: losses[key])
    assert (found.members, found.start) == best
    assert found.members > 1  # at this rate, too large for the end
    agree_each(found.loss, losses[best], JUMP)
    low, high = int(found.flat["start"].low), int(found.flat["start"].high)
    rows = [t for k, t in losses if k == found.members and low <= t <= high]
    assert all(losses[found.members, t] <= 1.01 * found.loss for t in rows)
    least = {k: min(loss for (c, _), loss in losses.items() if c == k) for k in counts}
    near = {k for k in counts if least[k] <= 1.01 * found.loss}
    assert {int(found.flat["members"].low), int(found.flat["members"].high)} <= near


def test_one_member_at_the_same_rate_is_plain_sgd(problem):
    found = best_late_phase(problem, 100, (1,), lr=0.3, late_lr=0.3)
    plain = nqm.solve(problem, nqm.constant(SGD(), 0.3, 100), [100]).loss[0]
    agree_each(found.table["loss"], np.full(len(found.table), plain), 1e-10)
    agree_each(found.member_loss, plain, JUMP)
    assert found.late_steps == found.program.phases[-1].steps


def test_free_rates_are_the_best_of_a_grid(problem):
    found = best_late_phase(problem, 200, (1, 3))
    start = problem.initial_mean**2 + problem.initial_variance
    h, v = problem.curvature, problem.noise_variance
    grid = np.geomspace(0.005, 1.9, 60)
    for k in (1, 3):
        rows = found.table[found.table["members"] == k]
        row = rows.loc[rows["loss"].idxmin()]
        losses = []
        for lr in grid:
            s = literal.sgd_moment(h, v, lr, 1.0, start, row["start"])
            late = [literal.sgd_moment(h, v, x, k, s, row["late_steps"]) for x in grid]
            losses.append(np.array(late) @ problem.weight)
        least = np.min(losses)
        assert 0.99 * least < row["loss"] <= least
    # Free rates do all that members can: at equal data the best number is one.
    assert found.members == 1
    assert "late_lr" in found.flat
    for name, rate in (("lr", found.lr), ("late_lr", found.late_lr)):
        flat = found.flat[name]
        assert flat.low < rate < flat.high
        for end in (float(flat.low), float(flat.high)):
            rates = {"lr": found.lr, "late_lr": found.late_lr} | {name: end}
            program = late_program(1, found.start, found.late_steps, **rates, batch_size=1.0)
            risen = nqm.solve(problem, program, [program.steps]).loss[0]
            agree_each(risen, 1.01 * found.loss, 1e-6)


@pytest.mark.parametrize("stated", [{"lr": 0.5}, {"late_lr": 0.05}])
def test_one_rate_stated(problem, stated):
    found = best_late_phase(problem, 100, (1, 4), **stated)
    name, rate = next(iter(stated.items()))
    agree_each(getattr(found, name), rate, IDENTITY)
    agree_each(found.table[name], np.full(len(found.table), rate), IDENTITY)
    both = best_late_phase(problem, 100, (1, 4))
    fixed = best_late_phase(problem, 100, (1, 4), lr=0.5, late_lr=0.05)
    assert both.loss < found.loss < fixed.loss


def test_sampled_runs_agree(problem):
    found = best_late_phase(problem, 120, (4,), lr=0.5, late_lr=0.5)
    drawn = nqm.sample(problem, found.program, [found.program.steps], replicas=3000, seed=1)
    within_error(drawn.loss, [found.loss], drawn.stderr)
    within_error(drawn.member_loss, [found.member_loss], drawn.member_stderr)


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        ((10, (1, 11)), {}, "do not pay for one cycle of 11"),
        ((10, ()), {}, "at least one number"),
        ((10, (0,)), {}, "members must be an integer"),
        ((0.5, (1,)), {}, "examples"),
        ((10, (1,)), {"batch_size": 0.0}, "batch_size"),
        ((10, (1,)), {"lr": 0.0}, "best_late_phase.lr"),
        ((10, (1,)), {"late_lr": -1.0}, "late_lr"),
    ],
)
def test_misuse_is_an_error(arguments, changes, words, problem):
    with pytest.raises(NQMError, match=words):
        best_late_phase(problem, *arguments, **changes)
