"""Modules on the features of a frozen trunk, with a head that all share, and their training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neural.combine.members import State
from neural.late_phase.reparametrize import add_lora, fold, parametrized
from nqm.errors import NQMError, check_integer, check_number, check_word

KINDS = ("bottleneck", "lora")


class Bottleneck(nn.Module):
    """An adapter: ``x + up(relu(down(x)))``; with ``up = 0``, as at its start, no module at all.

    Houlsby et al. 2019; Pfeiffer et al. 2021.

    Parameters
    ----------
    width : int
        Entries of a feature vector.
    rank : int
        Width of the bottleneck.
    """

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the adapter.

        Parameters
        ----------
        x : Tensor, shape (..., d)

        Returns
        -------
        Tensor, shape (..., d)
        """
        made: Tensor = x + self.up(torch.relu(self.down(x)))
        return made


class ModuleNet(nn.Module):
    """Features to logits: a module, then the shared head.

    Parameters
    ----------
    width : int
        Entries of a feature vector.
    classes : int
    kind : {"bottleneck", "lora"}
        ``lora`` is a square matrix, at first the identity, to which training adds an update of low
        rank. Members hold the matrix itself: a mean of factors would not be the mean of updates.
    rank : int
        Of the bottleneck or of the update.
    """

    def __init__(self, width: int, classes: int, kind: str = "bottleneck", rank: int = 32):
        super().__init__()
        check_word("ModuleNet.kind", kind, KINDS)
        for name, value in (("width", width), ("classes", classes), ("rank", rank)):
            check_integer(f"ModuleNet.{name}", value, 1)
        self.kind, self.rank = kind, rank
        if kind == "bottleneck":
            self.module: nn.Module = Bottleneck(width, rank)
        else:
            self.module = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.module.weight)
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Parameters
        ----------
        x : Tensor, shape (B, d)
            Features of the trunk.

        Returns
        -------
        Tensor, shape (B, C)
        """
        made: Tensor = self.head(self.module(x))
        return made


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels, in memory.

    Attributes
    ----------
    inputs : Tensor, shape (n, d)
        Features; of a language model the symbols of n windows, int64.
    labels : Tensor of int64, shape (n,) or (n, d)
        Classes; of a language model the symbol after each.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Examples."""
        return len(self.labels)


@dataclass(frozen=True)
class FitConfig:
    """Training with Adam, stopped early.

    Attributes
    ----------
    lr : float
    epochs : int
        At most.
    patience : int
        Epochs without a lower held-out loss after which training stops.
    batch_size : int
    weight_decay : float
        Decoupled (AdamW).
    """

    lr: float = 1e-3
    epochs: int = 30
    patience: int = 3
    batch_size: int = 32
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_number("FitConfig.lr", self.lr, low=0.0, closed_low=False)
        check_number("FitConfig.weight_decay", self.weight_decay, low=0.0)
        for name in ("epochs", "patience", "batch_size"):
            check_integer(f"FitConfig.{name}", getattr(self, name), 1)


def train_head(net: ModuleNet, train: Examples, held_out: Examples, config: FitConfig,
               generator: torch.Generator) -> tuple[State, float]:  # fmt: skip
    """Train the head alone, the module as it is; see `train_module`."""
    made = copy.deepcopy(net)
    return _trained(made, made.head.parameters(), train, held_out, config, generator)


def train_module(net: ModuleNet, train: Examples, held_out: Examples, config: FitConfig,
                 generator: torch.Generator) -> tuple[State, float]:  # fmt: skip
    """Train the module alone, under a frozen head.

    Parameters
    ----------
    net : ModuleNet
        The start; it is not changed.
    train, held_out : Examples
        Of the module's domain. What is kept is the epoch of the lowest held-out loss, or the start.
    config : FitConfig
    generator : Generator
        Of the order of examples, and of LoRA's start.

    Returns
    -------
    state : dict of str to Tensor
        State dict of a `ModuleNet` of the same sizes.
    epochs : float
        Epochs up to the one that is kept.

    Raises
    ------
    NQMError
        If training diverges, or there are no examples.
    """
    if net.kind == "lora":
        return train_lora(net, net.rank, "module.weight", train, held_out, config, generator)
    made = copy.deepcopy(net)
    return _trained(made, made.module.parameters(), train, held_out, config, generator)


def train_lora(net: nn.Module, rank: int, where: str, train: Examples, held_out: Examples,
               config: FitConfig, generator: torch.Generator) -> tuple[State, float]:  # fmt: skip
    """Train updates of low rank alone, under frozen weights; see `train_module`.

    Parameters
    ----------
    net : Module
        The start, which returns logits of shape (B, ..., C); it is not changed.
    rank : int
    where : str
        Glob over the names of the weights that get an update (`neural.late_phase.add_lora`).
    train, held_out : Examples
    config : FitConfig
    generator : Generator

    Returns
    -------
    state : dict of str to Tensor
        With the updates added to the weights.
    epochs : float

    Raises
    ------
    NQMError
        If no weight matches, training diverges, or there are no examples.
    """
    made = copy.deepcopy(net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed() & 0xFFFFFFFF)
        add_lora(made, rank, where=where)
    chosen = [p for _, _, _, update in parametrized(made) for p in update.parameters()]
    return _trained(made, chosen, train, held_out, config, generator)


def train_weights(net: nn.Module, names: Iterable[str], train: Examples, held_out: Examples,
                  config: FitConfig,
                  generator: torch.Generator) -> tuple[State, float]:  # fmt: skip
    """Train some weights with BatchNorm in training mode; see `train_module`.

    Parameters
    ----------
    net : Module
        The start; it is not changed.
    names : iterable of str
        Of the parameters that are trained; running statistics follow the data in any case.
    train, held_out : Examples
    config : FitConfig
    generator : Generator

    Returns
    -------
    state : dict of str to Tensor
    epochs : float

    Raises
    ------
    NQMError
        If training diverges, or there are no examples.
    """
    made = copy.deepcopy(net)
    chosen = [made.get_parameter(name) for name in names]
    return _trained(made, chosen, train, held_out, config, generator, statistics=True)


def _trained(net: nn.Module, chosen: Iterable[nn.Parameter], train: Examples,
             held_out: Examples, config: FitConfig, generator: torch.Generator, *,
             statistics: bool = False) -> tuple[State, float]:  # fmt: skip
    if not len(train) or not len(held_out):
        raise NQMError("a module needs examples to train on, and others to stop by; got none")
    net.requires_grad_(False)
    parameters = [p.requires_grad_(True) for p in chosen]
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)

    def loss() -> float:
        net.eval()
        with torch.no_grad():
            return float(_loss(net, held_out.inputs, held_out.labels))

    best, kept, when = loss(), copy.deepcopy(net.state_dict()), 0
    for epoch in range(1, config.epochs + 1):
        net.train(statistics)
        order = torch.randperm(len(train), generator=generator)
        for index in torch.split(order, config.batch_size):
            optimizer.zero_grad()
            torch.autograd.backward(_loss(net, train.inputs[index], train.labels[index]))
            optimizer.step()
        reached = loss()
        if not reached < float("inf"):
            raise NQMError(f"training a module diverged in epoch {epoch}; lower the learning rate")
        if reached < best:
            best, kept, when = reached, copy.deepcopy(net.state_dict()), epoch
        elif epoch - when >= config.patience:
            break
    net.load_state_dict(kept)
    folded = fold(net).state_dict()
    return {name: value.detach().clone() for name, value in folded.items()}, float(when)


def _loss(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of all labels."""
    return cross_entropy(net(inputs).flatten(0, -2), labels.flatten())
