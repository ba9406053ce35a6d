"""Training from a checkpoint on the measured data, with which predictions are compared.

Independent runs of SGD train the risk's weights with minibatches drawn from its examples, in
evaluation mode and without augmentation, on the loss whose curvature and noise were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad

from neural.bridge.config import Training
from neural.curvature.examples import EachRow, joined
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import LatePhase

FloatArray = NDArray[np.float64]
#: Shown every step 1, 2, ... and the weights after it (`neural.bridge.iterate_averages.Running`).
Seen = Callable[[int, Tensor], None]
#: Runs of a model of fewer weights than this step together; convolutions would lose by it.
TOGETHER = 5000


def train_runs(
    risk: EmpiricalRisk,
    training: Training,
    runs: int,
    at: Sequence[int],
    *,
    seed: int = 0,
    seen: Seen | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train independent runs from the checkpoint.

    Parameters
    ----------
    risk : EmpiricalRisk
    training : Training
    runs : int
    at : sequence of int
        Steps after which weights are yielded, increasing.
    seed : int
        Run c draws its minibatches from (seed, c).
    seen : callable, optional
        Called after every step with its number and the weights, shape (runs, p).
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Yields
    ------
    step : int
    weights : Tensor, shape (runs, p)
    """
    risk.check()
    tensors, make = joined(risk.batches)
    weights = risk.weights.repeat(runs, 1)
    buffers = torch.zeros_like(weights)
    draws = [minibatches(risk.examples, training, (seed, c)) for c in range(runs)]
    slope = EachRow(grad(lambda w, *batch: risk.mean_loss(w, make(batch))))
    slope.together = sum(p.numel() for p in risk.model.parameters()) < TOGETHER

    def slopes(weights: Tensor) -> Tensor:
        index = torch.stack([next(draw) for draw in draws]).to(tensors[-1].device)
        found: Tensor
        with torch.no_grad():  # or the model's other weights would keep every step's graph
            found = slope(weights, *(tensor[index] for tensor in tensors))
        return found.add_(weights, alpha=risk.weight_decay)

    done = 0
    for stop in at:
        with risk.evaluating():
            for step in range(done + 1, stop + 1):
                # Once all have diverged they stay; the loss of such weights is told as infinite.
                if bool(weights.isfinite().all(1).any()):
                    moved = slopes(weights)
                    if training.momentum:
                        moved = buffers.mul_(training.momentum).add_(moved)
                    weights = weights - training.lr * moved
                    if progress is not None:
                        progress(runs)
                if seen is not None:
                    seen(step, weights)
        done = stop
        yield stop, weights.detach().clone()


def minibatches(examples: int, training: Training, key: tuple[int, int]) -> Iterator[Tensor]:
    """Indices of minibatches, without end.

    Parameters
    ----------
    examples : int
        N.
    training : Training
        Gives batch size and sampling.
    key : (int, int)
        Seed, and number of the run.

    Yields
    ------
    Tensor of int64, shape (B,)

    Raises
    ------
    NQMError
        If epochs are shuffled and the batch size does not divide N.
    """
    generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
    size = training.batch_size
    training.check(examples)
    if training.sampling != "shuffled":
        while True:
            yield torch.randint(examples, (size,), generator=generator)
    while True:
        yield from torch.randperm(examples, generator=generator).view(-1, size)


def train_late_phase(
    risk: EmpiricalRisk,
    training: Training,
    members: int,
    select: str,
    at: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train late-phase members on a shared base, by `LatePhase` and `torch.optim.SGD`.

    Parameters
    ----------
    risk : EmpiricalRisk
        Its weights are those that are trained.
    training : Training
    members : int
        K; a step draws K minibatches.
    select : str
        The replicated weights.
    at : sequence of int
        Cycles after which weights are yielded, increasing.
    seed : int
        Member k draws its minibatches from (seed, k).
    progress : callable, optional
        Called with the number of minibatches done since the last call.

    Yields
    ------
    step : int
    weights : Tensor, shape (p,)
        Weights of the averaged model.
    """
    model = duplicate(risk.model).eval()
    held = [model.get_parameter(name) for name in risk.shapes]
    # A risk may stand elsewhere than its model.
    nn.utils.vector_to_parameters(risk.weights.clone(), held)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in held))
    base = torch.optim.SGD(held, training.lr, training.momentum, weight_decay=risk.weight_decay)
    late = LatePhase(model, members, select, gamma="mean", seed=seed).eval()
    own = late.optimizer_like(base)
    tensors, make = joined(risk.batches)
    draws = [minibatches(risk.examples, training, (seed, k)) for k in range(members)]

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return risk.example_loss(output, targets).mean()

    done = 0
    for stop in at:
        for _ in range(stop - done):
            index = [next(draw) for draw in draws]
            late.step([make([one[i] for one in tensors]) for i in index], loss, base, own)
            if progress is not None:
                progress(members)
        done = stop
        state = late.averaged().state_dict()
        yield stop, torch.cat([state[name].flatten() for name in risk.shapes]).detach()


def noise_free(
    risk: EmpiricalRisk, training: Training, at: Sequence[int], *, seen: Seen | None = None
) -> FloatArray:
    """Losses of full-batch gradient descent from the checkpoint.

    Parameters
    ----------
    risk : EmpiricalRisk
    training : Training
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
    loss: Callable[[Tensor], float], snapshots: Sequence[Tensor], members: int
) -> FloatArray:
    """Loss of the mean weights of every `members` runs.

    Parameters
    ----------
    loss : callable
        Loss of a weight vector.
    snapshots : sequence of Tensor, shape (runs, p)
        One for each time.
    members : int
        K. Runs that do not fill a group are not used.

    Returns
    -------
    ndarray, shape (groups, times)
        Infinite where the weights have diverged.
    """
    groups = len(snapshots[0]) // members
    means = [[w[g * members : (g + 1) * members].mean(0) for w in snapshots] for g in range(groups)]
    return np.nan_to_num([[loss(mean) for mean in row] for row in means], nan=np.inf, posinf=np.inf)
