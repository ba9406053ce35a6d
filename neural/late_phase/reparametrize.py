"""Rank-1 factors and low-rank updates of a layer's weights.

Both are registered with `torch.nn.utils.parametrize`, so that the model's code, its optimizers and
the original `Parameter` objects do not change. `fold` replaces them by plain weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from neural.late_phase.ready import check_ready
from nqm.errors import NQMError, check_integer


class RankOne(nn.Module):
    """Elementwise product W (s r^T) with a factor `s` over outputs and `r` over inputs.

    Wen et al. 2020 (BatchEnsemble); as late-phase weights von Oswald et al. 2021. The output of a
    linear layer is then ``((x r) W) s``. Both factors are 1 at first.

    Parameters
    ----------
    weight : Tensor, shape (out, in, ...)
        The weight W; it gives the shapes, type and device of the factors.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        out, into = weight.shape[:2]
        self.s = nn.Parameter(torch.ones(out, dtype=weight.dtype, device=weight.device))
        self.r = nn.Parameter(torch.ones(into, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Multiply a weight by s r^T, elementwise.

        Parameters
        ----------
        weight : Tensor, shape (out, in, ...)
            The weight W.

        Returns
        -------
        Tensor, shape (out, in, ...)
        """
        tail = (1,) * (weight.ndim - 2)
        return weight * self.s.view(-1, 1, *tail) * self.r.view(1, -1, *tail)


class LowRank(nn.Module):
    """Low-rank update W + alpha / rank B A (Hu et al. 2022, LoRA); A is random, B zero at first.

    Parameters
    ----------
    weight : Tensor, shape (out, in, ...)
        The weight W; it gives the shapes, type and device of the factors.
    rank : int
        Number of rows of A and of columns of B.
    alpha : float
        Scale of the update, times `rank`.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        flat = weight.detach().flatten(1)
        self.scale = alpha / rank
        self.A = nn.Parameter(flat.new_empty(rank, flat.shape[1]))
        self.B = nn.Parameter(flat.new_zeros(flat.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the low-rank update alpha / rank B A to a weight.

        Parameters
        ----------
        weight : Tensor, shape (out, in, ...)
            The weight W.

        Returns
        -------
        Tensor, shape (out, in, ...)
        """
        return weight + self.scale * (self.B @ self.A).view_as(weight)


class _Made(Protocol):
    def __call__(self, weight: Tensor) -> nn.Module: ...


def add_rank1(model: nn.Module, where: str = "*") -> list[str]:
    """Add rank-1 factors, all 1, to the weights of Linear, convolution and recurrent layers.

    The output of the model does not change. If the factors are to be trained from the start, call
    this before the optimizer is made.

    Parameters
    ----------
    model : Module
        The model; changed in place.
    where : str
        Glob over weight names, e.g. ``"lstm.*"``; all by default.

    Returns
    -------
    list of str
        Names of the weights that got factors.

    Raises
    ------
    NQMError
        If no weight matches.
    """
    return _add(model, where, RankOne)


def add_lora(
    model: nn.Module, rank: int = 4, alpha: float | None = None, where: str = "*"
) -> list[str]:
    """Add low-rank updates, zero at first, to the weights of Linear, conv and recurrent layers.

    Parameters
    ----------
    model : Module
        The model; changed in place.
    rank : int
        Rank of the updates, at least 1.
    alpha : float, optional
        The update is scaled by alpha / rank; `rank` by default.
    where : str
        Glob over weight names; all by default.

    Returns
    -------
    list of str
        Names of the weights that got an update.

    Raises
    ------
    NQMError
        If no weight matches, or `rank` is below 1.
    """
    check_integer("rank", rank, 1)
    return _add(model, where, partial(LowRank, rank=rank, alpha=float(alpha or rank)))


def _add(model: nn.Module, where: str, make: _Made) -> list[str]:
    check_ready(model, "add_lora" if isinstance(make, partial) else "add_rank1")
    matches = [
        (path, module, name)
        for path, module in model.named_modules()
        for name in _weights(module)
        if fnmatchcase(f"{path}.{name}" if path else name, where)
    ]
    if not matches:
        raise NQMError(
            f"{where!r} matches no weight of a Linear, convolution or recurrent layer of "
            f"{type(model).__name__}"
        )
    for _, module, name in matches:
        parametrize.register_parametrization(module, name, make(getattr(module, name)))
    for module in {module for _, module, _ in matches}:
        if isinstance(module, nn.RNNBase):
            _let_copy(module)
        _let_pickle(module)
    return [f"{path}.{name}" if path else name for path, _, name in matches]


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a separate class.

    The weight is a property of its class, which a deep copy shares: without a separate class,
    removing it from the copy would remove it from the original, too.
    """
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _let_copy(layer: nn.RNNBase) -> None:
    """Make it possible to copy a recurrent layer after a forward pass.

    The layer stores the weights computed for that pass, whose autograd history cannot be copied.
    """
    own_class = cast(Any, type(layer))  # parametrization has made a separate class
    deepcopy = own_class.__deepcopy__

    def refreshed_deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            self._init_flat_weights()
        return deepcopy(self, memo)

    own_class.__deepcopy__ = refreshed_deepcopy


def _let_pickle(layer: nn.Module) -> None:
    """Make it possible to pickle a layer: its class is made again when it is read."""
    own_class = cast(Any, type(layer))
    own_class.__reduce_ex__ = _reduced
    own_class.__setstate__ = _restore


def _reduced(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    names = list(cast(nn.ModuleDict, layer.parametrizations))
    state = {**vars(layer)}
    for name in ("_flat_weights", "_flat_weight_refs"):  # computed entries of recurrent layers
        state.pop(name, None)
    return _parametrized_layer, (type(layer).__bases__[0], names), state


def _restore(layer: nn.Module, state: dict[str, Any]) -> None:
    nn.Module.__setstate__(layer, state)  # type: ignore[no-untyped-call]
    if isinstance(layer, nn.RNNBase):
        with torch.no_grad():
            layer._init_flat_weights()


def _parametrized_layer(plain: type[nn.Module], names: list[str]) -> nn.Module:
    """Make an empty layer whose class computes its weights."""
    layer = plain.__new__(plain)
    nn.Module.__init__(layer)
    parametrize._inject_new_class(layer)
    for name in names:
        parametrize._inject_property(layer, name)
    _let_pickle(layer)
    return layer


def _weights(module: nn.Module) -> list[str]:
    if isinstance(module, nn.Linear | _ConvNd):
        return ["weight"]
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return []


def parametrized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Iterate over the weights that have a `RankOne` or `LowRank`.

    Parameters
    ----------
    model : Module
        The model.

    Yields
    ------
    (str, Module, str, Module)
        Path of the layer, the layer, name of its weight, and the parametrization.
    """
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            for name, chain in cast(nn.ModuleDict, module.parametrizations).items():
                for parametrization in cast(nn.ModuleList, chain):
                    if isinstance(parametrization, RankOne | LowRank):
                        yield path, module, name, parametrization


def fold(model: nn.Module) -> nn.Module:
    """Replace weights with rank-1 factors or low-rank updates by plain ones of the same value.

    A frozen weight with trainable factors becomes trainable. A weight that another layer has, too
    (an embedding tied to an output layer), becomes a separate weight, with a warning, because the
    other layer has no factors.

    Parameters
    ----------
    model : Module
        The model; changed in place. Weights with other parametrizations do not change.

    Returns
    -------
    Module
        `model`.
    """
    with torch.no_grad():
        for path, module, name, _ in list(parametrized(model)):
            if parametrize.is_parametrized(module, name):
                _fold_one(model, path, module, name)
    return model


def _fold_one(model: nn.Module, path: str, module: nn.Module, name: str) -> None:
    chain = cast(nn.ModuleDict, module.parametrizations)[name]
    trainable = any(p.requires_grad for p in chain.parameters())
    _own_class(module)
    if len(_holders(model, chain)) > 1:
        value = getattr(module, name).detach().clone()
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(value))
        own = f"{path}.{name}" if path else name
        warnings.warn(
            f"fold: {own} is tied to another layer's weight; folded it is a separate weight, and "
            "a model that ties them must not load it",
            stacklevel=4,
        )
    else:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    getattr(module, name).requires_grad_(trainable)


def _holders(model: nn.Module, chain: nn.Module) -> list[nn.Module]:
    """Modules that hold the original weight of a parametrization, itself included."""
    original = chain._parameters.get("original")
    return [
        module
        for module in model.modules()
        if original is not None and any(p is original for p in module._parameters.values())
    ]
