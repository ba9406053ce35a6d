"""Short trainings at rates for which the theory gives no reliable prediction.

At a bold rate a network leaves its quadratic: it may diverge, or come back from single steps that
are unstable. Theory of first order cannot tell, and a few short runs can. Half of them draw
their minibatches as a training does, and show what noise adds to the loss. The other half meet now
and then a minibatch with several copies of an example of large gradient. A whole training meets
some such minibatches, and a short run would most likely meet none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import comb

import torch
from torch import Tensor

from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.iterate_averages import Running
from neural.bridge.sgd_chains import minibatches, train_runs
from neural.curvature.risk import EmpiricalRisk

#: A probe has one in so many of the steps of the training to come.
PART = 8
#: Examples of largest gradient that are drawn several times, and steps from one such draw to the
#: next.
STIFF, EVERY = 8, 4
#: A run has left the minimum near by if its loss is more than so many times the checkpoint's.
LEFT = 2.0


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
        of their mean weights; of the runs without hard minibatches.
    """

    training: Training
    runs: int
    left: int
    losses: dict[str, tuple[float, float]]


def probe(
    risk: EmpiricalRisk,
    trainings: Sequence[Training],
    plan: Plan,
    runs: int,
    progress: Callable[[int], None] | None = None,
) -> list[Probe]:
    """Train a few short runs at each of several learning rates, all of them together.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    trainings : sequence of Training
        The trainings to come, which differ in their rates alone; at least one.
    plan : Plan
        Averages over time, the largest number of members, and the seed.
    runs : int
        Number of runs at each rate, an even number of at least 4.
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Returns
    -------
    list of Probe
        One for each training.
    """
    short = [replace(each, steps=probe_steps(each)) for each in trainings]
    count, steps, plain = len(short), short[0].steps, runs // 2
    norms = torch.cat([each.norm(dim=1) for each in risk.example_gradients()])
    stiff = norms.topk(min(STIFF, risk.examples)).indices.cpu()
    copies = _copies(risk.examples, trainings[0], max(plan.members))

    def minibatches_of(run: int) -> Iterator[Tensor]:
        own = minibatches(risk.examples, short[0], (plan.seed, run))
        return own if run < plain else _hard(own, stiff, copies)

    averages = Running(plan.averages(short[0]), risk.weights.repeat(count * runs, 1))
    trained = train_runs(
        risk,
        short[0],
        count * runs,
        [steps],
        lrs=[each.lr for each in short for _ in range(runs)],
        draws=[minibatches_of(run) for _ in short for run in range(runs)],
        seen=averages,
        progress=progress,
    )
    ((_, last),) = trained
    taken = {ITERATE: last, **averages.values}
    start = risk.loss()
    highest = start + (LEFT - 1.0) * abs(start)
    found = []
    for i, training in enumerate(short):
        each = {name: weights[i * runs : (i + 1) * runs] for name, weights in taken.items()}
        ends = [risk.loss(w) for w in each[ITERATE]]
        losses = {}
        for name, weights in each.items():
            single = ends[:plain] if name == ITERATE else [risk.loss(w) for w in weights[:plain]]
            losses[name] = sum(single) / plain, risk.loss(weights[:plain].mean(0))
        found.append(Probe(training, runs, sum(not end <= highest for end in ends), losses))
    return found


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
