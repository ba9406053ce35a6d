"""The landscape of a run: its loss on a fixed part of its training data, augmentation off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
    landscape = kind(model.eval(), data, select, weight_decay=decay, curvature=curvature)
    landscape.check()
    return landscape


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
        symbols = None if examples is None else min(examples, len(data.train)) * length
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

    L-BFGS compares losses, so it cannot tell weights apart once their losses differ by rounding
    alone: that is at about the square root of the precision. Newton steps, by conjugate gradients
    on Hessian products, go on from there until the gradient is rounding, too.

    Parameters
    ----------
    landscape : Landscape
    iterations : int
        Of L-BFGS at most, and Hessian products of the Newton steps at most. If they do not suffice,
        or if there is no minimum near by (a loss that falls without end), the gradient of what is
        returned tells so.
    lr : float, optional
        L-BFGS and Newton by default. With a learning rate, so many steps of gradient descent with
        momentum 0.9 on a cosine to zero, which promises no accuracy: while it lasts no curvature
        above 3.8 / lr is stable, whereas a line search follows a valley into ever steeper places
        (behind a normalisation layer weight decay makes curvature grow as one over the squared
        weights).

    Raises
    ------
    NQMError
        If `lr` is not positive, or so high that the loss diverges; if the loss is not finite.
    """
    if lr is not None:
        return landscape.at(_descended(landscape, iterations, lr))
    start = landscape.loss()
    if not math.isfinite(start):
        raise NQMError(f"minimise: the loss at the checkpoint is {start}; start from another one")
    weights = landscape.weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=30,
        tolerance_grad=0.0,
        tolerance_change=torch.finfo(weights.dtype).eps * abs(start),
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, weights.grad = landscape.loss_and_gradient(weights.detach())
        return loss

    find: Callable[[Callable[[], float]], Any] = optimizer.step
    find(closure)
    return landscape.at(_newton(landscape, weights.detach(), iterations))


def _descended(landscape: Landscape, iterations: int, lr: float) -> Tensor:
    """Weights after gradient descent with momentum on a cosine."""
    check_number("minimise_lr", lr, low=0.0, closed_low=False)
    weights = landscape.weights.clone()
    velocity = torch.zeros_like(weights)
    for step in range(iterations):
        velocity = SETTLING_MOMENTUM * velocity + landscape.gradient(weights)
        weights -= 0.5 * lr * (1.0 + math.cos(math.pi * step / iterations)) * velocity
    if not math.isfinite(landscape.loss(weights)):
        raise NQMError(f"minimise_lr {lr:g} diverges; take a lower one")
    return weights


def _newton(landscape: Landscape, weights: Tensor, products: int) -> Tensor:
    """Weights after Newton steps, as long as each at least halves the gradient.

    A step that raises the loss by more than rounding is not taken: the gradient also vanishes at
    saddles.
    """
    loss, slope = landscape.loss_and_gradient(weights)
    rounding = 100.0 * torch.finfo(weights.dtype).eps
    while products > 0 and float(slope.norm()) > 0.0:
        step, used = _newton_step(landscape.at(weights), slope, products)
        products -= used
        next_loss, next_slope = landscape.loss_and_gradient(weights + step)
        halved = float(next_slope.norm()) <= 0.5 * float(slope.norm())
        if not halved or next_loss > loss + rounding * abs(loss):
            break
        weights, loss, slope = weights + step, next_loss, next_slope
    return weights


def _newton_step(landscape: Landscape, slope: Tensor, products: int) -> tuple[Tensor, int]:
    """Solve H d = -slope by conjugate gradients (Nocedal & Wright 2006, algorithm 7.1).

    Ends at a residual of a thousandth of the slope, after so many products, or before a direction
    of negative curvature.

    Returns
    -------
    step : Tensor, shape (p,)
    used : int
        Hessian products.
    """
    step = torch.zeros_like(slope)
    residual, direction = -slope, -slope
    size = float(residual @ residual)
    goal = 1e-6 * size
    for used in range(1, products + 1):
        product = landscape.hessian_product(direction)
        bend = float(direction @ product)
        if bend <= 0.0:
            return step, used
        length = size / bend
        step = step + length * direction
        residual = residual - length * product
        before, size = size, float(residual @ residual)
        if size <= goal:
            return step, used
        direction = residual + (size / before) * direction
    return step, products
