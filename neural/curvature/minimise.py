"""Minimise the training loss with all examples, before measuring at the minimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError, check_number

#: Heavy ball is stable while lr h < 2 (1 + momentum): hence the 3.8 / lr of `minimise`.
SETTLING_MOMENTUM = 0.9


def minimise(
    risk: EmpiricalRisk,
    iterations: int = 500,
    lr: float | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> EmpiricalRisk:
    """Find a minimum of the risk near the checkpoint, using all examples.

    L-BFGS compares losses, so it stops where losses differ by rounding errors only: the weights
    are then accurate to about the square root of the precision. Newton steps, by conjugate
    gradients on Hessian products, continue from there until the gradient is a rounding error, too.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss; the search starts at its weights.
    iterations : int
        Largest number of L-BFGS iterations, and of Hessian products of the Newton steps. If they do
        not suffice, or if there is no minimum nearby, the gradient of the result is not zero.
    lr : float, optional
        If a learning rate is given, take `iterations` steps of gradient descent with momentum 0.9
        instead of L-BFGS and Newton; the rate decreases from `lr` to zero by a cosine. The accuracy
        is unknown, but the curvature stays below about 3.8 / lr. A line search, in contrast,
        follows a valley to ever larger curvature (behind a normalisation layer weight decay makes
        curvature grow as one over the squared weights).

    progress : callable, optional
        Called with the number of gradients or products done since the last call: some `iterations`
        of gradient descent, at most about twice as many otherwise.

    Returns
    -------
    EmpiricalRisk
        The same function at the weights that were found.

    Raises
    ------
    NQMError
        If `lr` is not positive, or so high that the loss diverges; if the loss cannot be measured
        (`EmpiricalRisk.check`).
    """
    told = progress or (lambda count: None)
    risk.check()
    if lr is not None:
        return risk.at(_descended(risk, iterations, lr, told))
    start = risk.loss()
    weights = risk.weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=iterations,
        history_size=30,
        tolerance_grad=0.0,
        tolerance_change=torch.finfo(weights.dtype).eps * abs(start),
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, weights.grad = risk.loss_and_gradient(weights.detach())
        told(1)
        return loss

    step: Callable[[Callable[[], float]], Any] = optimizer.step
    step(closure)
    return risk.at(_newton(risk, weights.detach(), iterations, told))


def _descended(
    risk: EmpiricalRisk, iterations: int, lr: float, progress: Callable[[int], None]
) -> Tensor:
    """Weights after gradient descent with momentum, at a rate that decreases by a cosine."""
    check_number("minimise_lr", lr, low=0.0, closed_low=False)
    weights = risk.weights.clone()
    velocity = torch.zeros_like(weights)
    for step in range(iterations):
        velocity = SETTLING_MOMENTUM * velocity + risk.gradient(weights)
        weights -= 0.5 * lr * (1.0 + math.cos(math.pi * step / iterations)) * velocity
        progress(1)
    if not math.isfinite(risk.loss(weights)):
        raise NQMError(f"minimise_lr = {lr:g} diverges; use a lower learning rate")
    return weights


def _newton(
    risk: EmpiricalRisk, weights: Tensor, products: int, progress: Callable[[int], None]
) -> Tensor:
    """Weights after Newton steps, which stop when a step does not halve the gradient.

    A step that increases the loss by more than a rounding error is not taken: the gradient also
    vanishes at saddle points.
    """
    loss, slope = risk.loss_and_gradient(weights)
    rounding = 100.0 * torch.finfo(weights.dtype).eps
    while products > 0 and float(slope.norm()) > 0.0:
        step, used = _newton_step(risk.at(weights), slope, products)
        products -= used
        progress(used)
        next_loss, next_slope = risk.loss_and_gradient(weights + step)
        halved = float(next_slope.norm()) <= 0.5 * float(slope.norm())
        if not halved or next_loss > loss + rounding * abs(loss):
            break
        weights, loss, slope = weights + step, next_loss, next_slope
    return weights


def _newton_step(risk: EmpiricalRisk, slope: Tensor, products: int) -> tuple[Tensor, int]:
    """Solve H d = -slope by conjugate gradients (Nocedal & Wright 2006, algorithm 7.1).

    It ends when the residual is a thousandth of the slope, after `products` Hessian products, or
    before a direction of negative curvature.

    Returns
    -------
    step : Tensor, shape (p,)
        The solution d.
    used : int
        Number of Hessian products.
    """
    step = torch.zeros_like(slope)
    residual, direction = -slope, -slope
    size = float(residual @ residual)
    goal = 1e-6 * size
    for used in range(1, products + 1):
        product = risk.hessian_product(direction)
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
