"""Merge the members' weights into those of one model, by means of weights, outputs or products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from neural.late_phase.duplicate import duplicate
from neural.late_phase.reparametrize import fold, parametrized
from nqm.errors import NQMError

#: Name in the model -> values of all members, (K, ...).
Stacked = Mapping[str, Tensor]


def means(stacked: Stacked) -> dict[str, Tensor]:
    """Compute the mean over members of each tensor.

    Parameters
    ----------
    stacked : Stacked
        Name -> tensor of shape (K, ...).

    Returns
    -------
    dict of str to Tensor
        Name -> tensor of shape (...). Of integers (counters) it is the maximum over members; where
        a member's value is not finite, it is the value of member 0.
    """
    mean: dict[str, Tensor] = {}
    for name, value in stacked.items():
        if value.is_floating_point() or value.is_complex():
            finite = value.isfinite().all(0)
            mean[name] = torch.where(finite, value.mean(0), value[0])
        else:
            mean[name] = value.max(0).values
    return mean


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model, set some weights and buffers, and fold rank-1 and low-rank factors.

    Parameters
    ----------
    model : Module
        The model; it is not changed.
    state : mapping of str to Tensor
        New value by name of a parameter or buffer.

    Returns
    -------
    Module
        The copy.
    """
    model = duplicate(model)
    for name, value in state.items():
        path, _, own = name.rpartition(".")
        getattr(model.get_submodule(path), own).copy_(value)
    model.zero_grad(set_to_none=True)
    return fold(model)


def mean_affine(model: nn.Module, weights: Stacked, statistics: Stacked) -> dict[str, Tensor]:
    """Compute BatchNorm layers whose outputs are the mean of the members' in evaluation mode.

    Each member's layer is an affine map, and so is the mean. Together with the mean statistics it
    determines scale and shift; if a layer has no scale or shift, it determines the statistics.

    Parameters
    ----------
    model : Module
        The model.
    weights : Stacked
        Name -> members' weights, shape (K, ...).
    statistics : Stacked
        Name -> members' running statistics, shape (K, ...).

    Returns
    -------
    dict of str to Tensor
        Name -> value for the averaged layer.
    """
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if not isinstance(module, _BatchNorm) or f"{prefix}running_var" not in statistics:
            continue
        mean, var = (statistics[f"{prefix}running_{n}"] for n in ("mean", "var"))
        gamma: Tensor | None = weights.get(f"{prefix}weight", module.weight)
        beta: Tensor | None = weights.get(f"{prefix}bias", module.bias)
        each = torch.rsqrt(var + module.eps) * (1.0 if gamma is None else gamma)
        scale = each.mean(0)
        shift = ((0.0 if beta is None else beta) - each * mean).mean(0)
        if gamma is None:
            state[f"{prefix}running_var"] = scale**-2 - module.eps
        else:
            state[f"{prefix}weight"] = scale * torch.sqrt(var.mean(0) + module.eps)
        if beta is None:
            # If the scale is 0, so is the shift.
            state[f"{prefix}running_mean"] = (-shift / scale).nan_to_num(0.0)
        else:
            state[f"{prefix}bias"] = shift + scale * mean.mean(0)
    return state


def mean_products(model: nn.Module, weights: Stacked) -> dict[str, Tensor]:
    """Compute the mean over members of every weight with rank-1 factors or a low-rank update.

    Parameters
    ----------
    model : Module
        The model.
    weights : Stacked
        Name -> members' weights, shape (K, ...).

    Returns
    -------
    dict of str to Tensor
        Mean by name of the folded weight.
    """
    names = {f"{path}.{name}" if path else name for path, _, name, _ in parametrized(model)}
    members = len(next(iter(weights.values())))
    total: dict[str, Tensor] = {}
    for k in range(members):
        member = with_weights(model, {name: value[k] for name, value in weights.items()})
        for name in names:
            value = member.get_parameter(name).detach() / members
            total[name] = total[name] + value if name in total else value
    return total


def check_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Check that no replicated weight is a low-rank factor of another library.

    The mean of B A is not the mean of B times the mean of A. For factors of peft (``lora_A``,
    ``lora_B``) the caller must choose.

    Parameters
    ----------
    model : Module
        The model.
    names : iterable of str
        Names of the replicated weights.

    Raises
    ------
    NQMError
        If a name is that of a factor of peft.
    """
    foreign = [name for name in names if ".lora_A." in name or ".lora_B." in name]
    if foreign:
        raise NQMError(
            f"averaged: {foreign[0]} is a factor of an update, and the product of mean factors is "
            "not the mean update; set rank1='factors' to average factors, or merge the updates "
            "of late.member(k) first"
        )


def singular_vectors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute the singular vectors that spectral normalisation needs for new weights.

    Training approximates them by power iteration, one step in every forward pass, and stores them
    in buffers. The vectors of the members' weights are not those of their mean.

    Parameters
    ----------
    model : Module
        The model.
    state : mapping of str to Tensor
        New values of parameters; vectors of other weights are not computed.

    Returns
    -------
    dict of str to Tensor
        Value by name of the buffer.
    """
    vectors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _SpectralNorm) and hasattr(module, "_u"):
            # Its path is LAYER.parametrizations.WEIGHT.NUMBER, beside LAYER...WEIGHT.original.
            weight, u, v = f"{path.rpartition('.')[0]}.original", f"{prefix}_u", f"{prefix}_v"
            if weight in state:
                matrix = module._reshape_weight_to_matrix(state[weight])
                vectors |= dict(zip((u, v), _leading(matrix), strict=True))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm) and f"{prefix}{hook.name}_orig" in state:
                matrix = hook.reshape_weight_to_matrix(state[f"{prefix}{hook.name}_orig"])
                names = (f"{prefix}{hook.name}_u", f"{prefix}{hook.name}_v")
                vectors |= dict(zip(names, _leading(matrix), strict=True))
    return vectors


def _leading(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vector of the largest singular value."""
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, 0].to(matrix), right[0].to(matrix)
