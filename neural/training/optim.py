"""Optimizers and their rates, from a run's configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from neural.late_phase.select import select
from neural.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Optimizer of all trainable weights.

    Weights that `no_decay` selects form a group of their own. The entry ``decays`` of a group is
    False for that group and True otherwise.

    Parameters
    ----------
    model : Module
    config : TrainConfig

    Returns
    -------
    Optimizer
    """
    spared = set(select(model, config.no_decay).parameters) if config.no_decay else set()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = {
        "params": [p for name, p in trainable if name not in spared],
        "weight_decay": config.weight_decay,
        "decays": True,
    }
    plain = {
        "params": [p for name, p in trainable if name in spared],
        "weight_decay": 0.0,
        "decays": False,
    }
    groups = [group for group in (decayed, plain) if group["params"]]
    lr = float(config.lr(0))
    if config.optimizer == "sgd":
        nesterov = config.nesterov and config.momentum > 0.0
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov)
    betas = (config.betas[0], config.betas[1])
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=betas)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group.

    Parameters
    ----------
    optimizer : Optimizer
        Changes in place.
    lr : float
    """
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_rows(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Clip each member's gradient, over all its weights, to a norm of its own.

    Parameters
    ----------
    parameters : iterable of Parameter
        Stacked, (K, ...); gradients are changed in place.
    norm : float
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    total = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads]).sum(0).sqrt()
    factor = (norm / (total + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))
