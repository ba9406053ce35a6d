"""Short runs at rates that theory cannot judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from neural.bridge.config import Plan, Training
from neural.bridge.probe import (
    EVERY,
    PART,
    STIFF,
    Probe,
    _copies,
    _hard,
    probe,
    probe_steps,
    stiffest,
)
from neural.bridge.sgd_chains import minibatches, train_runs
from tests.tiny_risks import Bowl, scatter, tanh_risk

CURVATURE = (2.0, 0.7, 0.2)


def test_the_noise_is_that_of_the_covariance() -> None:
    """The excess is half the trace of H S, of one run in four less."""
    bowl, runs = Bowl(CURVATURE), 200
    trainings = [Training(lr, 8, 15 * PART) for lr in (0.05, 0.3)]
    plan = Plan(members=(1,), runs=1, records=1)
    found = probe(bowl.risk, trainings, plan, runs, stiffest(bowl.risk))
    for training, short in zip(trainings, found, strict=True):
        assert short.training == replace(training, steps=15)
        assert (short.runs, short.plain, short.left) == (runs, 150, 0)
        single, mean = short.losses["iterate"]
        spread = scatter(bowl.hessian, bowl.noise, training.lr, 8, 15)
        # A form of three Gaussian numbers of these sizes scatters about as much as its mean.
        expected = 0.5 * float(np.trace(bowl.hessian @ spread))
        assert short.excess("iterate") == pytest.approx(expected, rel=5 / 150**0.5)
        assert short.excess("iterate") == pytest.approx((single - mean) * 150 / 149)
        assert set(short.losses) == {"iterate", "swa", "ema"}


def test_runs_at_several_rates_are_those_of_each_alone() -> None:
    risk, training = tanh_risk(), Training(0.1, 8, 4)
    lrs = [0.1, 0.1, 0.4]
    draws = [minibatches(risk.examples, training, (0, c)) for c in (0, 1, 0)]
    ((_, together),) = train_runs(risk, training, 3, [4], lrs=lrs, draws=draws)
    ((_, low),) = train_runs(risk, training, 2, [4])
    ((_, high),) = train_runs(risk, replace(training, lr=0.4), 1, [4])
    torch.testing.assert_close(together, torch.cat([low, high]))


def test_stopped_runs_take_no_more_steps() -> None:
    risk, training = tanh_risk(), Training(0.1, 8, 4)
    stopped: set[int] = set()
    taken: list[list[int]] = [[], [], []]

    def counted(run: int) -> Iterator[Tensor]:
        for index in minibatches(risk.examples, training, (0, run)):
            taken[run].append(run)
            yield index

    draws = [counted(run) for run in range(3)]
    for step, last in train_runs(risk, training, 3, [2, 4], draws=draws, stopped=stopped):
        assert bool(last.isfinite().all()) == (step == 2)
        stopped.add(1)
    assert [len(each) for each in taken] == [4, 2, 4]
    ((_, whole),) = train_runs(risk, training, 3, [4])
    assert last[1].isnan().all()
    torch.testing.assert_close(last[[0, 2]], whole[[0, 2]])


def test_hard_minibatches_hold_copies_of_one_example() -> None:
    drawn = [torch.full((5,), -1) for _ in range(4 * EVERY)]
    taken = list(islice(_hard(iter(drawn), torch.tensor([7, 9]), 2), len(drawn)))
    hard = [step for step, index in enumerate(taken) if (index >= 0).any()]
    assert hard == [EVERY // 2 + EVERY * i for i in range(4)]
    assert [taken[step].tolist() for step in hard[:2]] == [[7, 7, -1, -1, -1], [9, 9, -1, -1, -1]]
    assert all((index == -1).all() for index in drawn), "the draws themselves stay"


@pytest.mark.parametrize(
    ("examples", "size", "steps", "copies"),
    [(1347, 32, 1000, 2), (50000, 32, 1000, 1), (100, 32, 1000, 5), (4, 2, 10**6, 2)],
)
def test_copies_are_the_most_that_all_runs_should_meet(
    examples: int, size: int, steps: int, copies: int
) -> None:
    """Of one of eight examples, in a minibatch of eight runs."""
    assert _copies(examples, Training(0.1, size, steps), 8) == copies
    draws = STIFF * 8 * steps
    assert draws * binom.sf(copies - 1, size, 1.0 / examples) > 0.5
    assert draws * binom.sf(copies, size, 1.0 / examples) < 1.0


def test_runs_that_leave_are_counted() -> None:
    """The edge of stability is lr = 1; the loss of the checkpoint is that of the noise."""
    risk, plan = Bowl(CURVATURE, away=0.1).risk, Plan(members=(1,), runs=1, records=1)
    trainings = [Training(lr, 8, 400) for lr in (0.02, 1.4, 1e200)]
    calm, wild, infinite = probe(risk, trainings, plan, 4, stiffest(risk))
    assert (calm.left, wild.left, infinite.left) == (0, 4, 4)
    assert calm.losses
    assert not wild.losses
    told: list[int] = []
    (alone,) = probe(risk, trainings[2:], plan, 4, stiffest(risk), told.append)
    assert alone.left == 4
    assert not alone.losses
    assert sum(told) < 4 * probe_steps(trainings[2]), "runs that all left are stopped"
    assert probe_steps(Training(0.1, 8, 3)) == 1


@pytest.mark.parametrize(
    ("before", "after", "power"),
    [(0.5, 1.0, 1.0), (1.0, 1.0, 0.0), (0.1, 1.0, 1.0), (2.0, 1.0, 0.0), (0.5**0.5, 1.0, 0.5)],
)
def test_the_excess_grows_as_a_power_of_the_steps(
    before: float, after: float, power: float
) -> None:
    """Twice as much after twice the steps is diffusion, 1; the same is rest, 0."""
    short = Probe(Training(0.1, 8, 20), 4, 0, {"iterate": (after, 0.0)}, (before, 0.0))
    assert short.growth == pytest.approx(power)
    assert replace(short, training=Training(0.1, 8, 1)).growth == 0.0
