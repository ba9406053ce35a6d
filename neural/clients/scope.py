"""Weight scope alignment: a penalty on the mean and spread of each layer's weights.

Xu, Li, Gan, Zhan 2024, arXiv 2408.12237. A scope is a tensor (mean, standard deviation), the latter
by the biased estimate and at least `FLOOR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

#: Smallest standard deviation of a layer: the divergence grows beyond all bounds at 0.
FLOOR = 1e-8


def layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the weights that have a scope: trainable ones with more than one dimension.

    Parameters
    ----------
    model : Module

    Returns
    -------
    dict of str to Parameter
    """
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1}


def scope_of(weight: Tensor) -> Tensor:
    """Compute mean and standard deviation of a layer's weights.

    Parameters
    ----------
    weight : Tensor

    Returns
    -------
    Tensor, shape (2,)
    """
    # The clamp is before the root, whose derivative at 0 is infinite.
    sd = weight.var(correction=0).clamp(min=FLOOR**2).sqrt()
    return torch.stack([weight.mean(), sd])


def divergence(scope: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the Gaussian of a scope from that of its target.

    log(s~ / s) + (s^2 + (mu - mu~)^2) / (2 s~^2) - 1/2.

    Parameters
    ----------
    scope, target : Tensor, shape (2,)
        (mu, s) and (mu~, s~).

    Returns
    -------
    Tensor, shape ()
        In nats; 0 at the target.
    """
    (mean, sd), (mean0, sd0) = scope, target
    ratio = (sd.square() + (mean - mean0).square()) / (2 * sd0.square())
    nats: Tensor = (sd0 / sd).log() + ratio - 0.5
    return nats


def divergence_gradient(weight: Tensor, target: Tensor) -> Tensor:
    """Compute the gradient of a layer's divergence from its target in the layer's weights.

    ((mu - mu~) / s~^2 + (w - mu) (1 / s~^2 - 1 / s^2)) / p for p weights w.

    Parameters
    ----------
    weight : Tensor
    target : Tensor, shape (2,)

    Returns
    -------
    Tensor
        The same shape as `weight`.
    """
    mean, sd = scope_of(weight)
    pull = (mean - target[0]) / target[1].square()
    # At the floor the standard deviation is held, and its derivative is 0.
    stretch = torch.where(sd > FLOOR, target[1].pow(-2) - sd.pow(-2), 0.0)
    gradient: Tensor = (pull + (weight - mean) * stretch) / weight.numel()
    return gradient


def fused(scopes: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Average the clients' scopes: means, and variances.

    Parameters
    ----------
    scopes : sequence of mapping of str to Tensor
        One mapping for each client.
    shares : sequence of float
        Weights of the clients, which sum to one.

    Returns
    -------
    dict of str to Tensor
    """
    made = {}
    for name in scopes[0]:
        each = torch.stack([scope[name] for scope in scopes])
        weights = torch.tensor(shares, dtype=each.dtype, device=each.device)
        mean, variance = weights @ each[:, 0], weights @ each[:, 1].square()
        made[name] = torch.stack([mean, variance.sqrt()])
    return made


def rescaled(weight: Tensor, target: Tensor) -> Tensor:
    """Shift and scale a layer's weights to a scope.

    Parameters
    ----------
    weight : Tensor
    target : Tensor, shape (2,)

    Returns
    -------
    Tensor
        The same shape. A layer of equal weights is only shifted.
    """
    mean, sd = scope_of(weight)
    moved: Tensor = target[0] + (weight - mean) * (target[1] / sd)
    return moved
