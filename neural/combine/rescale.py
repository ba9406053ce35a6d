"""Rescale the hidden units of an averaged network to the activity of the networks it was made of.

Averaged units vary less than those that were averaged, the more so the less they agree, and in a
deep network the loss of variance multiplies from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from neural.combine.permutations import (
    CONVOLUTIONS,
    KNOWN,
    OTHERS,
    POOL_MODULES,
    POOLS,
    PRODUCTS,
    REDUCTIONS,
    SUMS,
    check_state,
    function_names,
    is_parameter,
    traced,
)
from neural.evaluate.predict import Batches, evaluating
from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.duplicate import duplicate
from nqm.errors import NQMError, check_number

__all__ = ["rescale"]

State = Mapping[str, Tensor]
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _NormBase)
#: Modules and functions that pass a pre-activation on; the rest is a nonlinearity.
PASSES_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Identity, nn.LogSoftmax,
    nn.Softmax, *POOL_MODULES,
)  # fmt: skip
PASSES = {
    *SUMS, *PRODUCTS, *POOLS, *REDUCTIONS, *OTHERS, "contiguous", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "log_softmax", "softmax",
}  # fmt: skip
#: A standard deviation below this share of the mean is rounding.
ROUNDING = 1e-7


def rescale(
    model: nn.Module,
    states: Iterable[State],
    weights: Sequence[float],
    merged: State,
    batches: Batches,
) -> nn.Module:
    """Give every hidden unit of an average the interpolated mean and deviation of its members.

    In a network with BatchNorm its statistics are computed anew, which does the same. In any other
    the pre-activation of every channel gets mean ``sum_k w_k mean_k`` and standard deviation
    ``sum_k w_k sd_k`` over the data, layer after layer from the input, by the scale and shift of
    the last layer before the nonlinearity: a normalisation, or else a linear layer or convolution.
    Where a pre-activation is a sum, as in residual networks, its terms are rescaled. The output
    layer stays as it is.

    Parameters
    ----------
    model : Module
        The architecture; its own weights do not matter, and it does not change.
    states : iterable of mapping
        State dicts of the members, aligned if need be; each is used once.
    weights : sequence of float, shape (K,)
        Of the members: not negative, sum 1.
    merged : mapping of str to Tensor
        State dict of the average.
    batches : iterable of (inputs, targets)
        Training data, read once for each member and each layer: a list or a loader. Targets are
        not used.

    Returns
    -------
    Module
        The same architecture, so that its state dict loads into `model`; in the modes of `model`.

    Raises
    ------
    NQMError
        If weights or data do not fit, if the forward pass cannot be traced, or if a layer that
        must be rescaled has no scale and shift: there is nothing to fold them into.

    References
    ----------
    Jordan, Sedghi, Saukh, Entezari & Neyshabur (2022). REPAIR: renormalizing permuted activations
    for interpolation repair. arXiv 2211.08403.
    """
    shares = _checked(weights)
    if isinstance(batches, Iterator):
        raise NQMError(
            "rescale: batches are read several times, so they must be a list or a loader; got an "
            "iterator; use list(batches)"
        )
    check_state("rescale", model, merged, "the average")
    result = duplicate(model)
    result.load_state_dict(dict(merged), strict=True)
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        recompute_statistics(result, batches)
        return result
    paths = _targets(model)
    means, deviations = _interpolated(model, paths, states, shares, batches)
    with evaluating(result):
        for path in paths:
            found = _statistics(result, [path], batches)[path]
            _fold(result.get_submodule(path), found, (means[path], deviations[path]))
    return result


def _checked(weights: Sequence[float]) -> list[float]:
    for k, weight in enumerate(weights):
        check_number(f"rescale: weights[{k}]", float(weight), low=0)
    shares = [float(weight) for weight in weights]
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise NQMError(f"rescale: weights must sum to 1; got {sum(shares):g}")
    return shares


def _interpolated(
    model: nn.Module,
    paths: list[str],
    states: Iterable[State],
    shares: list[float],
    batches: Batches,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted means over the members of means and standard deviations."""
    member = duplicate(model)
    means: dict[str, Any] = dict.fromkeys(paths, 0.0)
    deviations: dict[str, Any] = dict.fromkeys(paths, 0.0)
    count = 0
    for count, state in enumerate(states, 1):
        if count > len(shares):
            break
        check_state("rescale", model, state, f"member {count - 1}")
        member.load_state_dict(dict(state), strict=True)
        with evaluating(member):
            for path, (mean, deviation) in _statistics(member, paths, batches).items():
                means[path] = means[path] + shares[count - 1] * mean
                deviations[path] = deviations[path] + shares[count - 1] * deviation
    if count != len(shares):
        raise NQMError(f"rescale: there are {len(shares)} weights for another number of states")
    return means, deviations


def _targets(model: nn.Module) -> list[str]:
    """Paths of the layers to rescale, in the order of the forward pass."""
    found: list[str] = []
    if type(model) in KNOWN:  # one layer by itself: there is nothing hidden
        return found
    for node in traced(model, "rescale").nodes:
        path = str(node.target)
        if node.op == "get_attr" and is_parameter(model, path):
            raise NQMError(f"rescale: {path} is used outside of a layer that is known; do without")
        if node.op != "call_module":
            continue
        module = model.get_submodule(path)
        if type(module) not in KNOWN and next(module.parameters(), None) is not None:
            raise NQMError(
                f"rescale: {path} ({type(module).__name__}) is not a layer that can be rescaled "
                "here; do without"
            )
        norm = isinstance(module, NORMS)
        if not norm and type(module) is not nn.Linear and type(module) not in CONVOLUTIONS:
            continue
        # A layer before a normalisation is not rescaled: the normalisation is.
        if not _reached(model, node) & {"nonlinearity", "layer"}:
            continue
        if path in found:
            raise NQMError(f"rescale: {path} is used twice, with activations of its own each time")
        if getattr(module, "weight", None) is None or getattr(module, "bias", None) is None:
            raise NQMError(
                f"rescale: {path} ({type(module).__name__}) has no weight and bias to take up the "
                "scale and shift; give it a bias or a normalisation, or do without"
            )
        found.append(path)
    return found


def _reached(model: nn.Module, node: fx.Node) -> set[str]:
    """What reads the output of a node: output, norm, layer or nonlinearity."""
    kinds: set[str] = set()
    names = function_names()
    waiting, seen = list(node.users), set(node.users)
    while waiting:
        user = waiting.pop()
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = str(user.target) if user.op == "call_method" else names.get(user.target, "")
        if name in ("size", "getattr"):  # sizes do not depend on activations
            continue
        if user.op == "output":
            kinds.add("output")
        elif isinstance(module, NORMS):
            kinds.add("norm")
        elif module is not None and (type(module) is nn.Linear or type(module) in CONVOLUTIONS):
            kinds.add("layer")
        elif isinstance(module, PASSES_MODULES) or (module is None and name in PASSES):
            fresh = [one for one in user.users if one not in seen]
            waiting += fresh
            seen.update(fresh)
        else:
            kinds.add("nonlinearity")
    return kinds


class _Enough(Exception):  # noqa: N818 - ends a forward pass whose rest is not needed
    pass


class _Moments:
    """Running mean and standard deviation of every channel, in double precision."""

    def __init__(self) -> None:
        self.rows = 0

    def update(self, rows: Tensor) -> None:
        """Take in values of shape (rows, channels)."""
        rows = rows.detach().double()
        if not self.rows:
            # Sums of squares about a typical value lose no digits to a large mean.
            self.origin = rows.mean(0)
            self.total = torch.zeros_like(self.origin)
            self.squares = torch.zeros_like(self.origin)
        rows = rows - self.origin
        self.rows += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.square().sum(0)

    def read(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each of shape (channels,)."""
        mean = self.total / self.rows
        variance = self.squares / self.rows - mean.square()
        return self.origin + mean, variance.clamp(min=0).sqrt()


def _statistics(
    model: nn.Module, paths: list[str], batches: Batches
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the output of every layer, by channel."""
    moments = {path: _Moments() for path in paths}
    if not paths:
        return {}

    def remember(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            at = 1 if _channels_first(module) else -1
            moments[path].update(output.movedim(at, -1).reshape(-1, output.shape[at]))
            if path == paths[-1]:
                raise _Enough

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(remember(path)) for path in paths]
    device = next(model.parameters()).device
    try:
        for x, _ in batches:
            with suppress(_Enough):
                model(x.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if not moments[paths[0]].rows:
        raise NQMError("rescale: there is no batch")
    return {path: one.read() for path, one in moments.items()}


def _channels_first(module: nn.Module) -> bool:
    """Whether channels are axis 1 of the output, not the last one."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return len(module.normalized_shape) > 1
    return not isinstance(module, nn.Linear)


@torch.no_grad()
def _fold(module: Any, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    """Change scale and shift so that the mean and deviation become those that are wanted."""
    mean, deviation = found
    alive = deviation > ROUNDING * mean.abs()
    scale = torch.where(alive, wanted[1] / deviation, 1.0)

    def by_channel(value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * (like.ndim - 1))

    weight, bias = module.weight, module.bias
    weight.copy_(weight.double() * by_channel(scale, weight))
    b, m, s = bias.double(), by_channel(mean, bias), by_channel(scale, bias)
    # s (b - m) + wanted, in a form that gives b back bit for bit if nothing is to change.
    bias.copy_(b + (by_channel(wanted[0], bias) - m) + (s - 1) * (b - m))
