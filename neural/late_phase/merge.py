"""Members' weights made into one model's: plain means, and the two means that are not plain."""

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
    """Mean over members of each tensor.

    For whole numbers (counters) the largest value is taken; where a member's value is not finite,
    that of member 0.

    Parameters
    ----------
    stacked : Stacked
        Name -> tensor of shape (K, ...).

    Returns
    -------
    dict of str to Tensor
        Name -> tensor of shape (...).
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
    """Copy a model, set some weights and buffers, and fold our parametrizations.

    Parameters
    ----------
    model : Module
        It does not change.
    state : mapping
        Name -> new value.

    Returns
    -------
    Module
    """
    model = duplicate(model)
    for name, value in state.items():
        path, _, own = name.rpartition(".")
        getattr(model.get_submodule(path), own).copy_(value)
    model.zero_grad(set_to_none=True)
    return fold(model)


def mean_affine(model: nn.Module, weights: Stacked, statistics: Stacked) -> dict[str, Tensor]:
    """Mean of the members' BatchNorm outputs in evaluation mode, as one layer.

    Each member's layer is an affine map, and so is their mean. It is put into scale and shift on
    top of the mean statistics; where a layer has none, into the statistics themselves.

    Parameters
    ----------
    model : Module
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
            # Where the scale is 0 the shift is, too.
            state[f"{prefix}running_mean"] = (-shift / scale).nan_to_num(0.0)
        else:
            state[f"{prefix}bias"] = shift + scale * mean.mean(0)
    return state


def mean_products(model: nn.Module, weights: Stacked) -> dict[str, Tensor]:
    """Mean over members of every weight that has rank-1 factors or a low-rank update.

    Parameters
    ----------
    model : Module
    weights : Stacked
        Name -> members' weights, shape (K, ...).

    Returns
    -------
    dict of str to Tensor
        Name of the folded weight -> its mean.
    """
    touched = {f"{path}.{name}" if path else name for path, _, name, _ in parametrized(model)}
    members = len(next(iter(weights.values())))
    total: dict[str, Tensor] = {}
    for k in range(members):
        member = with_weights(model, {name: value[k] for name, value in weights.items()})
        for name in touched:
            value = member.get_parameter(name).detach() / members
            total[name] = total[name] + value if name in total else value
    return total


def check_factors(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to average factors of another library silently.

    The mean of B A is not the mean of B times the mean of A. For factors of peft (``lora_A``,
    ``lora_B``) the caller must choose.

    Parameters
    ----------
    model : Module
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
            "not the mean update; say rank1='factors' if it is what you want, or merge the updates "
            "of late.member(k) first"
        )


def singular_vectors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors of spectral normalisation that belong to given weights.

    Training finds them by power iteration, a step in every forward pass, and keeps them in buffers;
    those of members' weights are not those of the mean weight.

    Parameters
    ----------
    model : Module
    state : mapping
        New values of parameters; vectors of other weights are left alone.

    Returns
    -------
    dict
        Buffer name -> value.
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
