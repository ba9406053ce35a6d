"""Optimizers and learning rates of a run."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from neural.late_phase.select import select
from neural.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Make the optimizer of all trainable weights.

    Parameters
    ----------
    model : Module
        The model.
    config : TrainConfig
        Class and settings of the optimizer.

    Returns
    -------
    Optimizer
        Weights that `no_decay` selects form a group without weight decay. The entry ``decays`` is
        False in that group and True in the other.

    Raises
    ------
    NQMError
        If `no_decay` matches no weight.
    """
    without = set(select(model, config.no_decay).parameters) if config.no_decay else set()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = {
        "params": [p for name, p in trainable if name not in without],
        "weight_decay": config.weight_decay,
        "decays": True,
    }
    plain = {
        "params": [p for name, p in trainable if name in without],
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
        The optimizer; changed in place.
    lr : float
        The learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
