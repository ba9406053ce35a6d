"""Range of the first order of multiplicative weights: against the closure and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest

from nqm import SGD, MultiplicativeLatePhase, Phase, Problem, moment_closure, sample, solve
from nqm.schedule import Cosine
from tests.tolerances import agree_each

NEAR = {"noise_variance": 1e-4, "initial_variance": 1e-5}


def result(late, lr, steps, *, curvature=1.0, member_lr=None, **problem):
    problem = Problem([curvature], **({"minimum": 1.0, "initial_variance": 0.0} | problem))
    phase = Phase(late, lr, steps, member_lr=member_lr)
    return problem, phase, solve(problem, phase, [steps])


@pytest.mark.parametrize("coupling", ["elementwise", "scalar"])
@pytest.mark.parametrize(
    ("late", "steps", "changes", "inside"),
    [
        ({}, 300, NEAR, True),
        ({}, 300, {"noise_variance": 0.2}, False),  # drift by noise
        ({}, 10, {"noise_variance": 1e-6, "initial_variance": 0.3}, False),
        ({}, 15, {"noise_variance": 1e-6, "initial_mean": 0.3}, False),
        ({"spread": 0.01, "gamma": "sum"}, 20, {"noise_variance": 1e-5}, False),  # members push
        ({"spread": 1e-6}, 20, NEAR, True),
        ({"factor": 0.5}, 300, {"noise_variance": 0.1}, False),
    ],
)
def test_it_tells_errors_of_five_per_cent(coupling, late, steps, changes, inside):
    method = MultiplicativeLatePhase(4, **{"gamma": "mean", "coupling": coupling, **late})
    problem, phase, first = result(method, 0.1, steps, **changes)
    drawn = sample(problem, phase, [steps], replicas=4000, seed=1)
    off = (
        abs(first.loss[0] / drawn.loss[0] - 1),
        abs(first.member_loss[0] / drawn.member_loss[0] - 1),
    )
    scatter = drawn.stderr[0] / drawn.loss[0]
    assert (max(off) < 0.05 + 3 * scatter) if inside else (max(off) > 0.05 + scatter)
    assert first.in_range[0] == inside
    assert drawn.in_range.all()


def test_it_is_hardly_ever_sure_of_a_wrong_loss():
    """Random settings over five decades of noise; the closure stands for the truth."""
    rng = np.random.default_rng(3)
    wrong = sure = good = 0
    for _ in range(60):
        late = MultiplicativeLatePhase(
            int(rng.choice([1, 2, 4, 16])), gamma=str(rng.choice(["mean", "sum"])),
            factor=float(rng.choice([0.5, 1.0, 2.0])),
            spread=float(rng.choice([0.0, 10 ** rng.uniform(-4, -1)])),
        )  # fmt: skip
        own = late.members * late.base_scale * late.factor**2
        ratio, rate, steps = 10 ** rng.uniform(-1, 1), 10 ** rng.uniform(-2, 0.1), 20
        lr = rate / (ratio / late.factor**2 + own)
        problem, phase, first = result(
            late, lr, steps * int(10 ** rng.uniform(0, 1)), member_lr=ratio * lr,
            noise_variance=10 ** rng.uniform(-5, 0),
            initial_mean=rng.choice([0.0, 10 ** rng.uniform(-3, -0.5)]),
            initial_variance=rng.choice([0.0, 10 ** rng.uniform(-4, -0.5)]),
        )  # fmt: skip
        closed = moment_closure(problem, phase, [phase.steps])
        off = max(
            abs(closed.loss / first.loss - 1), abs(closed.member_loss / first.member_loss - 1)
        )
        wrong += bool(first.in_range[0] and off[0] > 0.08)
        sure, good = sure + first.in_range[0], good + (off[0] < 0.05)
    assert wrong == 0
    assert sure > 0.75 * good > 20


def test_it_counts_from_the_members_start_and_follows_schedules():
    """SGD reaches a neighbourhood of the minimum first; its own records are exact."""
    problem = Problem([1.0, 0.5], 1e-4, minimum=1.0)
    late = MultiplicativeLatePhase(4, gamma="mean")
    phases = [Phase(SGD(), 0.3, 60), Phase(late, Cosine(0.1, 0.01, 50), 50)]
    both = solve(problem, phases, [0, 30, 60, 70, 110])
    assert both.in_range.all()
    closed = moment_closure(problem, phases, [70, 110])
    agree_each(both.loss[3:], closed.loss, 0.05)
    at_once = solve(problem, phases[1], [0, 10, 50])
    assert at_once.in_range.tolist() == [True, False, False]
    after = solve(problem, [phases[1], Phase(SGD(), 0.1, 5)], [50, 55])
    assert after.in_range.tolist() == [False, False]


def test_a_diverging_first_order_is_out_of_range():
    for coupling in ("elementwise", "scalar"):
        late = MultiplicativeLatePhase(2, coupling=coupling)
        _, _, first = result(late, 3.0, 60, noise_variance=0.1)
        assert not first.in_range[0]


def test_flat_directions_have_no_effect():
    late = MultiplicativeLatePhase(4, gamma="mean")
    phase = Phase(late, 0.1, 300)
    flat = Problem([1.0, 0.0], 1e-4, minimum=[1.0, 0.0], initial_variance=[1e-5, 1.0])
    assert solve(flat, phase, [300]).in_range[0]
