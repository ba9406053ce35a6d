"""Training from a checkpoint on the measured data; predictions are compared with its losses.

Independent runs of SGD train the risk's weights with minibatches of its examples, in evaluation
mode and without augmentation: on the very loss whose curvature and noise were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad
from torch.nn.modules.conv import _ConvNd as _Convolution

from neural.bridge.adam import AdamRuns
from neural.bridge.config import ADAPTIVE, SHUFFLED, Training
from neural.curvature.examples import EachRow, joined
from neural.curvature.memory import fitting
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import LatePhase
from nqm.gamma import base_scale

FloatArray = NDArray[np.float64]
#: Called with the number of a step, from 1, and the weights after it
#: (`neural.bridge.iterate_averages.Running`).
Seen = Callable[[int, Tensor], None]
#: Models of fewer weights run together by `vmap`, which saves torch's calls. Larger ones only
#: without convolutions: with weights of each run these cost up to three times as much together.
SMALL = 5000
#: Largest number of weights of all runs together: beyond it, moving them costs more than the calls.
STACKED = 2**21
#: Fewer runs than this cost less one after the other.
FEW = 4


def train_runs(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    training: Training,
    runs: int,
    at: Sequence[int],
    *,
    seed: int = 0,
    lrs: Sequence[float] | None = None,
    draws: Sequence[Iterator[Tensor]] | None = None,
    stopped: Collection[int] = (),
    seen: Seen | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train independent runs from the checkpoint, by SGD, heavy ball, Adam or AdamW.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss; training starts at its weights.
    training : Training
        Learning rate, batch size, momentum and sampling.
    runs : int
        Number of independent runs.
    at : sequence of int
        Steps after which weights are yielded, increasing.
    seed : int
        Run c draws its minibatches with the key (seed, c).
    lrs : sequence of float, optional
        Learning rate of every run of SGD or heavy ball; by default that of the training.
    draws : sequence of iterator of Tensor, optional
        Indices of the minibatches of every run, in place of those of the seed.
    stopped : collection of int
        Numbers of the runs that take no more steps, whose weights are NaN from then on; a set may
        grow whenever weights are yielded.
    seen : callable, optional
        Called after every step with its number and the weights, shape (runs, p).
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Yields
    ------
    step : int
        Number of steps done.
    weights : Tensor, shape (runs, p)
        Weights after that step.
    """
    risk.check()
    tensors, make = joined(risk.batches)
    weights = risk.weights.repeat(runs, 1)
    buffers = torch.zeros_like(weights)
    adam = AdamRuns(risk, training, weights) if training.optimizer in ADAPTIVE else None
    if draws is None:
        draws = [minibatches(risk.examples, training, (seed, c)) for c in range(runs)]
    each_lr = training.lr if lrs is None else torch.tensor(lrs)[:, None].to(weights)
    together = runs_together(risk, training.batch_size, runs)
    slope = _each_slope(lambda w, batch: risk.mean_loss(w, make(batch)))
    if together >= FEW:
        slope = EachRow(grad(lambda w, *batch: risk.mean_loss(w, make(batch))))

    def slopes(weights: Tensor, alive: Tensor) -> Tensor:
        chosen = torch.split(alive.nonzero()[:, 0], together)
        gradients = torch.full_like(weights, torch.nan)
        # Without no_grad, the model's other weights would keep the graph of every step.
        with torch.no_grad():
            for part in chosen:
                index = torch.stack([next(draws[run]) for run in part.tolist()])
                index = index.to(tensors[-1].device)
                gradients[part] = slope(weights[part], *(tensor[index] for tensor in tensors))
        return gradients.add_(risk.decay_gradient(weights))

    done = 0
    for stop in at:
        goes_on = torch.tensor([run not in stopped for run in range(runs)], device=weights.device)
        with risk.evaluating():
            for step in range(done + 1, stop + 1):
                # A run that has diverged takes no more steps; its losses are infinite.
                alive = weights.isfinite().all(1) & goes_on
                if bool(alive.any()):
                    moved = slopes(weights, alive)
                    if adam is not None:
                        weights = adam.step(moved)
                    else:
                        if training.momentum:
                            moved = buffers.mul_(training.momentum).add_(moved)
                        weights = weights - each_lr * moved
                    if progress is not None:
                        progress(runs)
                if seen is not None:
                    seen(step, weights)
        done = stop
        yield stop, weights.detach().clone()


def runs_together(risk: EmpiricalRisk, batch_size: int, runs: int) -> int:
    """How many runs take their steps together, by what a step was measured to cost.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    batch_size : int
        Examples of a minibatch.
    runs : int
        Number of runs.

    Returns
    -------
    int
        From 1 to `runs`, as many as memory allows; results are the same up to rounding.
    """
    large = sum(p.numel() for p in risk.model.parameters()) >= SMALL
    if large and any(isinstance(module, _Convolution) for module in risk.model.modules()):
        return 1
    weights = 4.0 * risk.size * risk.weights.element_size()
    fit = fitting(batch_size * risk.example_bytes() + weights, runs)
    return min(fit, max(1, STACKED // risk.size))


def _each_slope(loss: Callable[[Tensor, list[Tensor]], Tensor]) -> Callable[..., Tensor]:
    """Slopes of every run one after the other, with less overhead than by `torch.func`."""

    def slopes(weights: Tensor, *batches: Tensor) -> Tensor:
        found = []
        for w, *batch in zip(weights, *batches, strict=True):
            with torch.enable_grad():
                w = w.detach().requires_grad_()
                found += torch.autograd.grad(loss(w, batch), w)
        return torch.stack(found)

    return slopes


def minibatches(examples: int, training: Training, key: tuple[int, int]) -> Iterator[Tensor]:
    """Draw the indices of minibatches, without end.

    Parameters
    ----------
    examples : int
        Number of examples, N.
    training : Training
        Gives batch size and sampling.
    key : (int, int)
        Seed of all runs, and number of the run.

    Yields
    ------
    Tensor of int64, shape (B,)
        Indices of the examples, from 0.

    Raises
    ------
    NQMError
        If epochs are shuffled and the batch size does not divide N.
    """
    generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
    size = training.batch_size
    training.check(examples)
    if training.sampling != SHUFFLED:
        while True:
            yield torch.randint(examples, (size,), generator=generator)
    while True:
        yield from torch.randperm(examples, generator=generator).view(-1, size)


def train_late_phase(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    training: Training,
    members: int,
    select: str,
    at: Sequence[int],
    *,
    gamma: str | float = "mean",
    member_lr_ratio: float = 1.0,
    seed: int = 0,
    seen: Seen | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train late-phase members on a shared base, by `LatePhase` and `torch.optim.SGD`.

    All weights train the loss of the risk: the base's weight decay is multiplied by gamma K, like
    the gradients that it takes.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss; its weights are trained, from their values on.
    training : Training
        Learning rate, batch size, momentum and sampling.
    members : int
        Number of members, K; a base step draws K minibatches.
    select : str
        Weights that are replicated (see `neural.late_phase.select.select`).
    at : sequence of int
        Base steps after which weights are yielded, increasing.
    gamma : {"sum", "mean"} or float
        Scale of the base gradient, which is summed over members.
    member_lr_ratio : float
        Learning rate of the members over that of the base.
    seed : int
        Member k draws its minibatches with the key (seed, k).
    seen : callable, optional
        Called after every step with its number and the weights of the averaged model, shape (p,).
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Yields
    ------
    step : int
        Number of base steps done.
    weights : Tensor, shape (p,)
        Weights of the averaged model after that step, in the risk's coordinates.
    """
    model = duplicate(risk.model).eval()
    trained = [model.get_parameter(name) for name in risk.shapes]
    # The weights of a risk may differ from those of its model (`EmpiricalRisk.at`).
    nn.utils.vector_to_parameters(risk.model_weights(risk.weights).clone(), trained)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in trained))
    late = LatePhase(model, members, select, gamma=gamma, seed=seed).eval()

    def optimizer(
        weights: Mapping[str, Tensor], ratio: float, decay_ratio: float
    ) -> torch.optim.SGD:
        decay = risk.weight_decay * decay_ratio
        groups = [
            {"params": [weight], "weight_decay": 0.0 if name in risk.undecayed else decay}
            for name, weight in weights.items()
        ]
        return torch.optim.SGD(groups, training.lr * ratio, training.momentum)

    shared = dict(zip(risk.shapes, trained, strict=True))
    own_weights = dict(zip(late.selection.parameters, late.member_parameters(), strict=True))
    base = optimizer(shared, 1.0, base_scale(gamma, members) * members)
    own = optimizer(own_weights, member_lr_ratio, 1.0)
    tensors, make = joined(risk.batches)
    draws = [minibatches(risk.examples, training, (seed, k)) for k in range(members)]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return risk.example_loss(output, targets).mean()

    def averaged() -> Tensor:
        # The coordinates of `LatePhase.averaged`, which multiplies rank-1 factors into the weights.
        stacked = zip(late.selection.parameters, late.member_parameters(), strict=True)
        own_means = {name: value.detach().mean(0) for name, value in stacked}
        means = [
            own_means[name] if name in own_means else model.get_parameter(name).detach()
            for name in risk.shapes
        ]
        return risk.coordinates(torch.cat([mean.flatten() for mean in means]))

    for step in range(1, max(at, default=0) + 1):
        index = [next(draw) for draw in draws]
        batches = [make([tensor[i] for tensor in tensors]) for i in index]
        late.step(batches, loss, base, own)
        if seen is not None:
            seen(step, averaged())
        if progress is not None:
            progress(members)
        if step in at:
            yield step, averaged()


def noise_free(
    risk: EmpiricalRisk, training: Training, at: Sequence[int], *, seen: Seen | None = None
) -> FloatArray:
    """Record losses of full-batch gradient descent from the checkpoint.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss; descent starts at its weights.
    training : Training
        Gives learning rate and momentum.
    at : sequence of int
        Steps after which the loss is recorded, increasing.
    seen : callable, optional
        Called after every step with its number and the weights, shape (p,).

    Returns
    -------
    ndarray, shape (times,)
    """
    weights = risk.weights
    buffer = torch.zeros_like(weights)
    losses = []
    done = 0
    for stop in at:
        for step in range(done + 1, stop + 1):
            buffer = training.momentum * buffer + risk.gradient(weights)
            weights = weights - training.lr * buffer
            if seen is not None:
                seen(step, weights)
        done = stop
        losses.append(risk.loss(weights))
    return np.array(losses)


def group_losses(
    loss: Callable[[Tensor], float],
    snapshots: Sequence[Tensor],
    members: int,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Compute the loss of the mean weights of groups of K runs.

    Parameters
    ----------
    loss : callable
        Maps a weight vector of shape (p,) to its loss.
    snapshots : sequence of Tensor, shape (runs, p)
        Weights of all runs, one tensor for each time.
    members : int
        Number of runs in a group, K. Runs that do not fill a group are not used.
    progress : callable, optional
        Called with 1 after every loss.

    Returns
    -------
    ndarray, shape (groups, times)
        Infinite where the weights have diverged.
    """
    groups = len(snapshots[0]) // members
    losses = np.empty((groups, len(snapshots)))
    for group, time in np.ndindex(losses.shape):
        runs = snapshots[time][group * members : (group + 1) * members]
        losses[group, time] = loss(runs.mean(0))
        if progress is not None:
            progress(1)
    return np.nan_to_num(losses, nan=np.inf, posinf=np.inf)
