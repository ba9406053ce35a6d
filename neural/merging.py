"""Members' weights made into one model's: plain means, and the two means that are not plain."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from neural.duplicate import duplicate
from neural.reparametrize import fold, parametrized

#: Name in the model -> values of all members, (K, ...).
Stacked = Mapping[str, Tensor]


def means(stacked: Stacked) -> dict[str, Tensor]:
    """Mean over members; of a counter the largest, and where one is not finite the first's."""
    mean: dict[str, Tensor] = {}
    for name, value in stacked.items():
        if value.is_floating_point() or value.is_complex():
            finite = value.isfinite().all(0)
            mean[name] = torch.where(finite, value.mean(0), value[0])
        else:
            mean[name] = value.max(0).values
    return mean


def with_weights(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy of a model with some weights and buffers set, and no parametrization of ours."""
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
    """Mean over members of every weight that has rank-1 factors or a low-rank update."""
    touched = {f"{path}.{name}" if path else name for path, _, name, _ in parametrized(model)}
    members = len(next(iter(weights.values())))
    total: dict[str, Tensor] = {}
    for k in range(members):
        member = with_weights(model, {name: value[k] for name, value in weights.items()})
        for name in touched:
            value = member.get_parameter(name).detach() / members
            total[name] = total[name] + value if name in total else value
    return total
