"""The landscape of a run: its loss on a fixed part of its training data, augmentation off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from neural.averaging import recompute_statistics
from neural.batch_landscape import BatchLandscape, grouped
from neural.config import RunConfig
from neural.curvature import Landscape
from neural.data import TextData, evaluation_batches, evaluation_windows, load
from neural.data.images import ImageData
from neural.late_phase import Batch
from neural.task import Place
from nqm.errors import NQMError, check_integer, check_number

#: Weights up to which derivatives are taken in double precision.
DOUBLE = 5000
#: Heavy ball is stable while lr h < 2 (1 + momentum): hence the 3.8 / lr of `settle`.
SETTLING_MOMENTUM = 0.9


def landscape_of(
    run: RunConfig,
    model: nn.Module,
    place: Place,
    *,
    select: str | Iterable[str] = "all",
    examples: int | None = None,
    weight_decay: float | None = None,
    curvature: str = "hessian",
    group: int | None = None,
    batch_size: int = 512,
) -> Landscape:
    """Training loss of a run's model.

    BatchNorm statistics are taken anew on the landscape's own data; derivatives are those of
    evaluation mode, unless groups of examples have their own statistics.

    Parameters
    ----------
    run : RunConfig
    model : Module
        Changed in place: statistics, precision.
    place : Place
    select : str or iterable of str
        Which weights; see `neural.select.select`.
    examples : int, optional
        As evenly over the classes as can be, the same for every seed; all by default. Of a text,
        windows of the run's length.
    weight_decay : float, optional
        That of the run by default.
    curvature : {"hessian", "ggn"}
        See `Landscape`.
    group : int, optional
        Examples that BatchNorm sees together, as in training: a `BatchLandscape`, whose examples
        are such groups.
    batch_size : int
        Examples in work at once.
    """
    dtype = torch.float64 if sum(p.numel() for p in model.parameters()) <= DOUBLE else torch.float32
    batches = [
        (x.to(dtype) if x.is_floating_point() else x, y)
        for x, y in training_batches(run, place, examples, batch_size)
    ]
    model.to(place.device, dtype)
    recompute_statistics(model, batches)
    decay = run.train.weight_decay if weight_decay is None else weight_decay
    kind = Landscape if group is None else BatchLandscape
    data = batches if group is None else grouped(batches, group)
    return kind(model.eval(), data, select, weight_decay=decay, curvature=curvature)


def training_batches(
    run: RunConfig, place: Place, examples: int | None, batch_size: int
) -> list[Batch]:
    """The first so many training examples, in a fixed order."""
    if examples is not None:
        check_integer("examples", examples, 2)
    data = load(run.data.name, place.root)
    if isinstance(data, TextData):
        data = data.compact()
        length = run.data.length
        symbols = None if examples is None else examples * length
        text = data.train[: run.data.train_examples][:symbols]
        windows = len(text) // length
        seen, following = next(
            evaluation_windows(text[: windows * length], windows, length, place.device)
        )
        parts = (torch.split(both, batch_size) for both in (seen, following))
        return list(zip(*parts, strict=True))
    if not isinstance(data, ImageData) or data.train is None:
        raise NQMError(
            f"data.name {run.data.name!r} does not fit into memory as a landscape's data; choose a "
            "set of small images or a text"
        )
    train = data.train
    if run.data.train_examples is not None:
        train = train.subset(run.data.train_examples)
    if examples is not None and examples < len(train):
        train = train.subset(examples)
    mean, std = run.data.mean or data.mean, run.data.std or data.std
    return list(evaluation_batches(train, batch_size, mean, std, place.device))


def settle(landscape: Landscape, iterations: int = 500, lr: float | None = None) -> Landscape:
    """The same landscape at a minimum near by, found from the checkpoint with all examples.

    Parameters
    ----------
    landscape : Landscape
    iterations : int
        At most.
    lr : float, optional
        L-BFGS by default, to the last digit. With a learning rate, gradient descent with momentum
        0.9 on a cosine to zero: while it lasts no curvature above 3.8 / lr is stable, whereas a
        line search follows a valley into ever steeper places (behind a normalisation layer weight
        decay makes curvature grow as one over the squared weights).

    Raises
    ------
    NQMError
        If `lr` is not positive, or so high that the loss diverges.
    """
    weights = landscape.weights.clone()
    if lr is not None:
        check_number("settle_lr", lr, low=0.0, closed_low=False)
        velocity = torch.zeros_like(weights)
        for step in range(iterations):
            velocity = SETTLING_MOMENTUM * velocity + landscape.gradient(weights)
            weights -= 0.5 * lr * (1.0 + math.cos(math.pi * step / iterations)) * velocity
        if not math.isfinite(landscape.loss(weights)):
            raise NQMError(f"settle_lr {lr:g} diverges; take a lower one")
        return landscape.at(weights)
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=30,
        tolerance_grad=1e-7 if weights.dtype == torch.float32 else 1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        here = weights.detach()
        weights.grad = landscape.gradient(here)
        return landscape.loss(here)

    find: Callable[[Callable[[], float]], Any] = optimizer.step
    find(closure)
    return landscape.at(weights.detach())
