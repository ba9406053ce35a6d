"""Short trainings at rates for which the theory gives no reliable prediction.

At a bold rate a network leaves its quadratic: it may diverge, or come back from single steps that
are unstable. Theory of first order cannot tell, and a few short runs can. Most of them draw
their minibatches as a training does, and show what noise adds to the loss. The others meet now
and then a minibatch with several copies of an example of large gradient. A whole training meets
some such minibatches, and a short run would most likely meet none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb, isfinite, log, nan

import torch
from torch import Tensor

from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.iterate_averages import Running
from neural.bridge.sgd_chains import minibatches, train_runs
from neural.curvature.risk import EmpiricalRisk

#: A probe has one in so many of the steps of the training to come.
PART = 8
#: One in so many of the runs, and at least one, meets hard minibatches.
HARD = 4
#: Examples of largest gradient that are drawn several times, and steps from one such draw to the
#: next.
STIFF, EVERY = 8, 4
#: The runs are looked at after these parts of their steps as well: half, and before.
EARLY = (4, 2)
#: A run has left the minimum near by if its loss is more than so many times the checkpoint's.
LEFT = 2.0
#: In place of an excess that short runs show to be 0 or less.
TINY = 1e-12


@dataclass(frozen=True)
class Probe:
    """What short runs at one learning rate show.

    Attributes
    ----------
    training : Training
        The short training.
    runs : int
        Number of runs, those with hard minibatches included.
    left : int
        Number of runs that left the minimum.
    losses : dict of str to (float, float)
        For the last weights and each average over time: the mean loss of single runs, and the loss
        of their mean weights; of the runs without hard minibatches. Empty if a run left.
    early : (float, float)
        The same of the last weights after half of the steps.
    """

    training: Training
    runs: int
    left: int
    losses: dict[str, tuple[float, float]]
    early: tuple[float, float] = (nan, nan)

    @property
    def plain(self) -> int:
        """Number of runs without hard minibatches."""
        return _plain(self.runs)

    def excess(self, weights: str) -> float:
        """What noise adds to the loss of a single run, as the runs differ from their mean.

        Parameters
        ----------
        weights : str
            The last weights, or an average over time.

        Returns
        -------
        float
            At least `TINY`.
        """
        return _excess(self.losses[weights], self.plain)

    @property
    def growth(self) -> float:
        """Exponent a of the excess, which grows as steps^a; in [0, 1].

        It is 0 where the scatter of the weights is at rest, and 1 where it still grows freely.
        """
        before = _excess(self.early, self.plain)
        steps = self.training.steps
        if steps < 2 or not isfinite(before):
            return 0.0
        power = log(self.excess(ITERATE) / before) / log(steps / (steps // 2))
        return min(max(power, 0.0), 1.0)


def probe(
    risk: EmpiricalRisk,
    trainings: Sequence[Training],
    plan: Plan,
    runs: int,
    stiff: Tensor,
    progress: Callable[[int], None] | None = None,
) -> list[Probe]:
    """Train a few short runs at each of several learning rates, all of them together.

    Where all runs at a rate have left the minimum, they take no more steps.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    trainings : sequence of Training
        The trainings to come, which differ in their rates alone; at least one.
    plan : Plan
        Averages over time, the largest number of members, and the seed.
    runs : int
        Number of runs at each rate, at least 3.
    stiff : Tensor of int64
        Numbers of the examples that hard minibatches hold (`stiffest`).
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Returns
    -------
    list of Probe
        One for each training.
    """
    short = [replace(each, steps=probe_steps(each)) for each in trainings]
    count, steps, plain = len(short), short[0].steps, _plain(runs)
    copies = _copies(risk.examples, trainings[0], max(plan.members))

    def minibatches_of(run: int) -> Iterator[Tensor]:
        own = minibatches(risk.examples, short[0], (plan.seed, run))
        return own if run < plain else _hard(own, stiff, copies)

    averages = Running(plan.averages(short[0]), risk.weights.repeat(count * runs, 1))
    looks = sorted({*(steps // part for part in EARLY if steps >= part), steps})
    start = risk.loss()
    highest = start + (LEFT - 1.0) * abs(start)
    early: list[tuple[float, float]] = [(nan, nan)] * count
    left, stopped = [0] * count, set[int]()

    def of_plain(weights: Tensor, singles: Sequence[float]) -> tuple[float, float]:
        return sum(singles[:plain]) / plain, risk.loss(weights[:plain].mean(0))

    for step, last in train_runs(
        risk,
        short[0],
        count * runs,
        looks,
        lrs=[each.lr for each in short for _ in range(runs)],
        draws=[minibatches_of(run) for _ in short for run in range(runs)],
        stopped=stopped,
        seen=averages,
        progress=progress,
    ):
        weights = torch.split(last, runs)
        going = [i for i in range(count) if left[i] < runs]
        ends = {i: [risk.loss(w) for w in weights[i]] for i in going}
        for i in going:
            left[i] = sum(not end <= highest for end in ends[i])
            if left[i] == runs:
                stopped.update(range(i * runs, (i + 1) * runs))
        if all(left):
            break
        if step == steps // 2:
            for i in going:
                early[i] = of_plain(weights[i], ends[i])
    taken = {name: torch.split(each, runs) for name, each in averages.values.items()}
    found = []
    for i, training in enumerate(short):
        losses = {}
        if not left[i]:
            losses = {ITERATE: of_plain(weights[i], ends[i])}
            for name, each in taken.items():
                losses[name] = of_plain(each[i], [risk.loss(w) for w in each[i][:plain]])
        found.append(Probe(training, runs, left[i], losses, early[i]))
    return found


def stiffest(risk: EmpiricalRisk) -> Tensor:
    """Examples of largest gradient.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.

    Returns
    -------
    Tensor of int64, shape (STIFF,)
        Their numbers, from 0; fewer if there are fewer examples.
    """
    norms = torch.cat([each.norm(dim=1) for each in risk.example_gradients()])
    return norms.topk(min(STIFF, risk.examples)).indices.cpu()


def _plain(runs: int) -> int:
    """Number of runs that draw ordinary minibatches."""
    return runs - max(runs // HARD, 1)


def _excess(losses: tuple[float, float], runs: int) -> float:
    single, mean = losses
    return max((single - mean) * runs / (runs - 1), TINY)


def probe_steps(training: Training) -> int:
    """Number of steps of a probe of a training.

    Parameters
    ----------
    training : Training

    Returns
    -------
    int
        At least 1.
    """
    return max(training.steps // PART, 1)


def _copies(examples: int, training: Training, members: int) -> int:
    """Most copies of a stiff example in one minibatch of all runs that are to be expected."""
    size, share = training.batch_size, 1.0 / examples
    draws, copies = STIFF * members * training.steps, 1
    while copies < size:
        more = comb(size, copies + 1) * share ** (copies + 1)
        if draws * more < 1.0:
            break
        copies += 1
    return copies


def _hard(draws: Iterator[Tensor], stiff: Tensor, copies: int) -> Iterator[Tensor]:
    """Minibatches of which every so many have several copies of one of the stiff examples."""
    for step, index in enumerate(draws):
        turn, rest = divmod(step, EVERY)
        if rest == EVERY // 2:
            index = index.clone()
            index[:copies] = stiff[turn % len(stiff)]
        yield index
