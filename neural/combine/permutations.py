"""Which hidden units of a network may change places, read from its forward pass.

The forward pass is traced by `torch.fx` and followed with a number for every channel instead of its
values. A layer makes new channels; an addition says that two channels are one unit; a zero-padded
shortcut adds nothing to the channels it pads. Two units are exchangeable if every layer and every
addition treats them alike.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase

from neural.late_phase.duplicate import duplicate
from neural.late_phase.ready import check_ready
from nqm.errors import NQMError

Ints = NDArray[np.int64]

CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
#: Normalisation with one scale, shift, mean and variance for each channel -> ranks of its input.
CHANNEL_NORMS: dict[type, tuple[int | None, ...]] = {
    nn.BatchNorm1d: (None, 2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,),
    nn.InstanceNorm1d: (3,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (5,),
}  # fmt: skip
#: Act on every channel alike and keep zeros.
KEEPS_ZERO = (
    "clone", "contiguous", "detach", "double", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "float", "relu", "relu_", "to",
)  # fmt: skip
#: Act on every channel alike.
ACTS_ALIKE = (
    "abs", "alpha_dropout", "celu", "celu_", "clamp", "clamp_", "cos", "elu", "elu_", "erf", "exp",
    "feature_alpha_dropout", "gelu", "hardsigmoid", "hardswish", "hardtanh", "hardtanh_",
    "leaky_relu", "leaky_relu_", "log_softmax", "logsigmoid", "mish", "neg", "pow", "relu6", "selu",
    "selu_", "sigmoid", "sigmoid_", "silu", "sin", "softmax", "softplus", "softsign", "sqrt",
    "square", "tanh", "tanh_", "tanhshrink",
)  # fmt: skip
KEEPS_ZERO_MODULES = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.ReLU,
)  # fmt: skip
ACTS_ALIKE_MODULES = (
    nn.AlphaDropout, nn.CELU, nn.ELU, nn.FeatureAlphaDropout, nn.GELU, nn.Hardsigmoid, nn.Hardswish,
    nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.LogSoftmax, nn.Mish, nn.ReLU6, nn.SELU, nn.SiLU,
    nn.Sigmoid, nn.Softmax, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
POOLS = {
    f"{kind}_pool{rank - 2}d": rank
    for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for rank in (3, 4, 5)
}  # fmt: skip
POOL_MODULES: dict[type, int] = {
    getattr(nn, f"{kind}Pool{rank - 2}d"): rank
    for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax") for rank in (3, 4, 5)
}  # fmt: skip
#: Every layer that is understood, of these types exactly: a subclass may do something else.
KNOWN: tuple[type, ...] = (
    *CONVOLUTIONS, *CHANNEL_NORMS, *KEEPS_ZERO_MODULES, *ACTS_ALIKE_MODULES, *POOL_MODULES,
    nn.Flatten, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.PReLU, nn.RMSNorm,
)  # fmt: skip
UNKNOWN = "is not a layer whose units can be permuted here"
SUMS = ("add", "sub", "iadd", "add_", "isub", "sub_")
PRODUCTS = ("mul", "truediv", "div", "imul", "mul_", "itruediv", "div_")
REDUCTIONS = ("mean", "sum", "amax", "amin")
OTHERS = ("flatten", "getattr", "getitem", "pad", "reshape", "size", "view")
#: A channel that is zero at every position.
ZERO = -1


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor of the state dict, along which units are laid out.

    Attributes
    ----------
    tensor : str
        Name in the state dict.
    axis : int
        Which axis.
    units : ndarray of int, shape (channels,)
        Unit of every channel.
    block : int
        Consecutive entries of the axis that belong to one channel: above 1 after a feature map was
        flattened.
    reads : str, optional
        Path of the layer if the axis is that of its input.
    """

    tensor: str
    axis: int
    units: Ints
    block: int = 1
    reads: str | None = None


@dataclass(frozen=True)
class Permutations:
    """All permutations of hidden units that leave the function of a network as it is.

    A permutation is an array `source` of shape (size,): unit u takes the place, and so all weights,
    of unit ``source[u]``.

    Attributes
    ----------
    size : int
        Units, those that may not move included.
    groups : tuple of ndarray, each of shape (cells, units of a cell)
        Units that may change places: any within a cell, and whole cells. Only a GroupNorm makes
        more than one cell. In the order of the forward pass.
    axes : tuple of Axis
    """

    size: int
    groups: tuple[Ints, ...]
    axes: tuple[Axis, ...]

    def identity(self) -> Ints:
        """Permutation that changes nothing.

        Returns
        -------
        ndarray of int, shape (size,)
        """
        return np.arange(self.size)

    def random(self, seed: int) -> Ints:
        """Permutation drawn uniformly from all that leave the function as it is.

        Parameters
        ----------
        seed : int

        Returns
        -------
        ndarray of int, shape (size,)
        """
        rng = np.random.default_rng(seed)
        source = self.identity()
        for group in self.groups:
            source[group] = rng.permuted(group, axis=1)[rng.permutation(len(group))]
        return source

    def apply(
        self, state: Mapping[str, Tensor], source: Ints, *, fixed: Axis | None = None
    ) -> dict[str, Tensor]:
        """State dict of the network with permuted units.

        Parameters
        ----------
        state : mapping of str to Tensor
            Any part of a state dict; it does not change.
        source : ndarray of int, shape (size,)
            The permutation.
        fixed : Axis, optional
            Is left as it is.

        Returns
        -------
        dict of str to Tensor
            Bit for bit the numbers of `state`; what does not move is the same tensor.
        """
        moved = dict(state)
        for axis in self.axes:
            if axis is not fixed and axis.tensor in moved:
                tensor, index = moved[axis.tensor], self._index(axis, source)
                if index is not None:
                    order = torch.from_numpy(index).to(tensor.device)
                    moved[axis.tensor] = tensor.index_select(axis.axis, order)
        return moved

    def _index(self, axis: Axis, source: Ints) -> Ints | None:
        """Entries of an axis in their new order, or None if they stay."""
        wanted = source[axis.units]
        if (wanted == axis.units).all():
            return None
        place = np.full(self.size, -1)
        place[axis.units] = np.arange(len(axis.units))
        # A unit that has several channels never moves, and `place` holds only one of them.
        order = np.where(wanted == axis.units, np.arange(len(wanted)), place[wanted])
        spread: Ints = (order[:, None] * axis.block + np.arange(axis.block)).ravel()
        return spread


def permutations_of(model: nn.Module) -> Permutations:
    """Find which hidden units of a network may change places.

    Parameters
    ----------
    model : Module
        Linear layers, convolutions (full or depthwise), normalisation, activations, pooling,
        flattening, sums and products of feature maps, and zero-padded shortcuts. Its inputs are
        batches: a linear layer followed by BatchNorm1d or GroupNorm is taken to see rows
        (N, features). It does not change.

    Returns
    -------
    Permutations

    Raises
    ------
    NQMError
        If the forward pass holds anything else, or cannot be traced. A wrong permutation would be
        silent, so what is not known is refused.
    """
    if type(model) in KNOWN:  # one layer by itself: there is nothing hidden
        return Permutations(0, (), ())
    return _Reader(model).read(traced(model, "align"))


def traced(model: nn.Module, what: str) -> fx.Graph:
    """The forward pass of a model in evaluation mode, with layers of ``torch.nn`` as they are.

    Parameters
    ----------
    model : Module
        It does not change.
    what : str
        Name of the caller, for messages.

    Returns
    -------
    Graph

    Raises
    ------
    NQMError
        If it cannot be traced, or a weight is used in ways that the trace does not show.
    """
    check_ready(model, what)
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise _refusal(what, path, module, "has hooks, which may change weights")
    owner: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in owner:
            raise NQMError(
                f"{what}: {owner[id(tensor)]} and {name} are one tensor; weights that are used "
                "twice cannot change for both uses; do without"
            )
        owner[id(tensor)] = name
    tracer = _Tracer()
    optional = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not parameter.empty
    }
    # Tracing runs the model's own code, which may store what is no tensor: so on a copy.
    copy = duplicate(model).eval()
    try:
        return tracer.trace(copy, concrete_args=optional or None)
    except Exception as error:  # whatever that code raises on values that can do less than tensors
        for path, module in model.named_modules():
            if not any(module.children()) and _is_torch(module) and type(module) not in KNOWN:
                raise _refusal(what, path, module, UNKNOWN) from error
        path = tracer.path
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise _refusal(
            what, path, model.get_submodule(path), f"cannot be traced by torch.fx ({reason})"
        ) from error


def check_state(what: str, model: nn.Module, state: Mapping[str, Tensor], whose: str) -> None:
    """Check that a state dict is one of a model.

    Parameters
    ----------
    what : str
        Name of the caller, for the message.
    model : Module
    state : mapping of str to Tensor
    whose : str
        What the state dict is of, for the message.

    Raises
    ------
    NQMError
        If names or shapes differ.
    """
    own = model.state_dict()
    for name in [*own, *state]:
        shapes = [
            "nothing" if name not in one
            else tuple(one[name].shape) if isinstance(one[name], Tensor)
            else type(one[name]).__name__
            for one in (own, state)
        ]  # fmt: skip
        if shapes[0] != shapes[1]:
            raise NQMError(
                f"{what}: {name!r} of {whose} does not fit the model: expected {shapes[0]}, got "
                f"{shapes[1]}"
            )


def is_parameter(model: nn.Module, path: str) -> bool:
    """Whether a tensor of a model is a parameter, and not a buffer.

    Parameters
    ----------
    model : Module
    path : str
        Name of the tensor in the state dict.

    Returns
    -------
    bool
    """
    owner, _, name = path.rpartition(".")
    return name in model.get_submodule(owner)._parameters


def _refusal(what: str, path: str, module: nn.Module, why: str) -> NQMError:
    where = f"{path} ({type(module).__name__})" if path else type(module).__name__
    return NQMError(f"{what}: {where} {why}; do without, or treat such a model yourself")


class _Tracer(fx.Tracer):
    """Remembers in which module the trace is, to name it if it fails."""

    path = ""

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        before, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = before  # after an error it stays at the innermost module
        return result


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn")


def function_names() -> dict[Any, str]:
    """Names of torch's functions and Python's operators in a trace.

    Returns
    -------
    dict
        Function -> its name here; those that are not known are left out.
    """
    names = (*KEEPS_ZERO, *ACTS_ALIKE, *POOLS, *SUMS, *PRODUCTS, *REDUCTIONS, *OTHERS)
    found: dict[Any, str] = {getattr: "getattr"}
    for library in (operator, torch, functional):
        found |= {getattr(library, name): name for name in names if hasattr(library, name)}
    return found


@dataclass(frozen=True)
class _Channels:
    """What is known of a hidden activation: the unit of every channel, and where channels lie.

    `rank` counts its axes. From 3 on channels are axis 1; else, and where it is not known (None),
    the last axis. If `flat`, each channel is a stretch of consecutive entries of the last axis.
    """

    units: Ints
    rank: int | None = None
    flat: bool = False

    @property
    def first(self) -> bool:
        """Whether channels are axis 1, before the positions."""
        return self.rank is not None and self.rank > 2


class _Fixed:
    """What does not depend on the order of hidden units: inputs, buffers, sizes."""


_FIXED, _BATCH = _Fixed(), _Fixed()


@dataclass(frozen=True)
class _Shape:
    of: Any


class _Refused(Exception):  # noqa: N818 - becomes an NQMError that names the module
    pass


class _Reader:
    """Follows a traced forward pass with a number for every channel."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.functions = function_names()
        self.parent: list[int] = []
        self.layer: list[int] = []  # which layer made it, or a number of its own if it is fixed
        self.layers = 0
        self.pinned: list[int] = []
        self.sums: list[tuple[Ints, Ints]] = []
        self.norms: list[tuple[Ints, int]] = []
        self.axes: list[Axis] = []
        self.called: set[str] = set()
        self.before_layers: set[fx.Node] = set()

    def read(self, graph: fx.Graph) -> Permutations:
        """Walk through the graph and group the units."""
        values: dict[fx.Node, Any] = {}
        self.before_layers = self._before_layers(graph)
        for node in graph.nodes:
            args, kwargs = fx.node.map_aggregate(
                (node.args, dict(node.kwargs)),
                lambda one: values[one] if isinstance(one, fx.Node) else one,
            )
            try:
                values[node] = self._value(node, args, kwargs)
            except _Refused as refused:
                if node.op in ("call_function", "call_method") and node not in self.before_layers:
                    # Outputs stay in their order, whatever is done with them in the end.
                    self._pin(_activations((args, kwargs)))
                    values[node] = _FIXED
                    continue
                path = (
                    node.target
                    if node.op == "call_module"
                    else next(reversed(node.meta.get("nn_module_stack", {"": None})))
                )
                module = self.model.get_submodule(str(path))
                raise _refusal("align", str(path), module, str(refused)) from None
        return self._grouped()

    # Units

    def _new(self, channels: int, *, pinned: bool = False) -> Ints:
        first = len(self.parent)
        units = np.arange(first, first + channels)
        self.parent += units.tolist()
        self.layer += [self.layers] * channels
        self.layers += 1
        if pinned:
            self.pinned += units.tolist()
        return units

    def _pin(self, activations: list[_Channels]) -> None:
        for one in activations:
            self.pinned += one.units[one.units != ZERO].tolist()

    def _before_layers(self, graph: fx.Graph) -> set[fx.Node]:
        """Nodes whose values reach a layer with weights."""
        found: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            for user in node.users:
                layer = user.op == "call_module" and bool(
                    self.model.get_submodule(str(user.target)).state_dict()
                )
                if layer or user in found:
                    found.add(node)
        return found

    def _root(self, unit: int) -> int:
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def _settled(self, x: _Channels) -> _Channels:
        """Channels of zeros become units that stay in place."""
        zero = x.units == ZERO
        if not zero.any():
            return x
        units = x.units.copy()
        units[zero] = self._new(int(zero.sum()), pinned=True)
        return replace(x, units=units)

    def _tied(self, x: _Channels, y: _Channels) -> _Channels:
        """Channels of a sum or product of two activations."""
        alike = x.rank == y.rank if x.first or y.first else True
        if not alike or len(x.units) != len(y.units):
            raise _Refused("combines activations of two shapes")
        both = (x.units != ZERO) & (y.units != ZERO)
        for one, other in zip(x.units[both], y.units[both], strict=True):
            low, high = sorted((self._root(int(one)), self._root(int(other))))
            self.parent[high] = low
        self.sums.append((x.units, y.units))
        units = np.where(x.units == ZERO, y.units, x.units)
        return _Channels(units, x.rank or y.rank, x.flat and y.flat)

    # Nodes

    def _value(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return _FIXED
        if node.op == "get_attr":
            if is_parameter(self.model, str(node.target)):
                path, _, name = str(node.target).rpartition(".")
                # One that scales or shifts the outputs, like a temperature, is no layer.
                value = self.model.get_submodule(path)._parameters[name]
                if node not in self.before_layers and value is not None and value.ndim < 2:
                    return _FIXED
                raise _Refused(f"uses its parameter {name!r} outside of a layer that is known")
            return _FIXED
        if node.op == "output":
            self._pin(_activations(args))
            return None
        if node.op == "call_module":
            return self._module(str(node.target), args, kwargs)
        return self._function(node, args, kwargs)

    def _module(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.model.get_submodule(path)
        kind = type(module)
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], _Channels | _Fixed):
            raise _Refused("is not known with such inputs")
        (x,) = inputs
        if next(iter(module.state_dict()), None) is not None:
            if path in self.called:
                raise _Refused("is used twice; its weights cannot be permuted for both uses")
            self.called.add(path)
        if isinstance(module, nn.Linear) and kind is nn.Linear:
            return self._linear(path, module, x)
        if kind in CONVOLUTIONS:
            return self._convolution(path, module, x)
        if kind not in KNOWN:
            raise _Refused(UNKNOWN)
        if isinstance(x, _Fixed):
            return _FIXED
        if isinstance(module, nn.Flatten):
            return _flattened(x, module.start_dim, module.end_dim)
        if kind in POOL_MODULES:
            if getattr(module, "return_indices", False):
                raise _Refused("returns indices, which is not known")
            return _pooled(x, POOL_MODULES[kind])
        if kind in KEEPS_ZERO_MODULES:
            return x
        x = self._settled(x)
        if isinstance(module, _NormBase):
            self._channel_norm(path, module, x)
        elif isinstance(module, nn.GroupNorm):
            self._group_norm(path, module, x)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            self._layer_norm(path, module, x)
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            self._enter(path, ("weight",), x.units, _block(x, module.num_parameters))
        return x

    def _enter(self, path: str, names: tuple[str, ...], units: Ints, block: int = 1) -> None:
        """Enter axis 0 of those tensors of a module that it has."""
        module = self.model.get_submodule(path)
        for name in names:
            if getattr(module, name, None) is not None:
                self.axes.append(Axis(f"{path}.{name}", 0, units, block))

    def _linear(self, path: str, module: nn.Linear, x: _Channels | _Fixed) -> _Channels:
        rank = None
        if isinstance(x, _Channels):
            if x.first:
                raise _Refused("acts on positions of a feature map, not on its channels")
            x, rank = self._settled(x), x.rank
            block = _block(x, module.in_features)
            self.axes.append(Axis(f"{path}.weight", 1, x.units, block, path))
        units = self._new(module.out_features)
        self._enter(path, ("weight", "bias"), units)
        return _Channels(units, rank)

    def _convolution(self, path: str, module: Any, x: _Channels | _Fixed) -> _Channels:
        rank = CONVOLUTIONS[type(module)]
        full = module.groups == 1
        depthwise = module.groups == module.in_channels == module.out_channels
        if not full and not depthwise:
            raise _Refused(f"has groups={module.groups}: only full and depthwise are known")
        if isinstance(x, _Channels):
            if x.rank != rank or len(x.units) != module.in_channels:
                raise _Refused("does not act on the channels of a feature map")
            x = self._settled(x)
            if full:
                self.axes.append(Axis(f"{path}.weight", 1, x.units, 1, path))
            else:
                self._enter(path, ("weight", "bias"), x.units)
                return x
        # Each channel of a depthwise convolution of the input is that of one input.
        units = self._new(module.out_channels, pinned=not full)
        self._enter(path, ("weight", "bias"), units)
        return _Channels(units, rank)

    def _channel_norm(self, path: str, module: _NormBase, x: _Channels) -> None:
        if x.rank not in CHANNEL_NORMS[type(module)]:
            raise _Refused("does not normalise the channels")
        names = ("weight", "bias", "running_mean", "running_var")
        self._enter(path, names, x.units, _block(x, module.num_features))

    def _group_norm(self, path: str, module: nn.GroupNorm, x: _Channels) -> None:
        block = _block(x, module.num_channels)
        if module.num_groups > 1:
            if block > 1:
                raise _Refused("has groups of flattened positions, which is not known")
            self.norms.append((x.units, module.num_groups))
        self._enter(path, ("weight", "bias"), x.units, block)

    def _layer_norm(self, path: str, module: nn.LayerNorm | nn.RMSNorm, x: _Channels) -> None:
        shape = tuple(module.normalized_shape)
        if x.first:
            whole = len(shape) + 1 == x.rank and shape[0] == len(x.units)
            block = 1
        else:
            whole, block = len(shape) == 1, _block(x, shape[-1])
        if not whole:
            raise _Refused(f"normalises axes of sizes {shape}, not all channels together")
        self._enter(path, ("weight", "bias"), x.units, block)

    def _function(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = node.op == "call_method"
        name = str(node.target) if method else self.functions.get(node.target, "")
        if name in ("size", "getattr") and args and isinstance(args[0], _Channels | _Fixed):
            if name == "size" and len(args) + len(kwargs) > 1:
                return _dimension(args[0], [*args, *kwargs.values()][1])
            if name == "size" or args[1] == "shape":
                return _Shape(args[0])
            if args[1] in ("device", "dtype"):
                return _FIXED
        if name == "getitem" and isinstance(args[0], _Shape):
            return _dimension(args[0].of, args[1])
        inputs = _activations((args, kwargs))
        if not inputs:
            if _holds((args, kwargs), _Fixed | _Shape):
                return _FIXED
            if callable(node.target):
                return node.target(*args, **kwargs)
            raise _Refused(f"calls {name or node.target}, which is not known")
        x = inputs[0]
        if name in SUMS or name in PRODUCTS:
            return self._binary(name, args, inputs)
        if len(inputs) == 1 and args and args[0] is x:
            if name in KEEPS_ZERO:
                return x
            if name in ACTS_ALIKE and not _holds((args[1:], kwargs), _Fixed | _Shape):
                return self._settled(x)
            if name in POOLS and kwargs.get("return_indices") in (None, False):
                return _pooled(x, POOLS[name])
            rest = args[1:]
            if name == "flatten":
                named = dict(zip(("start_dim", "end_dim"), rest, strict=False)) | kwargs
                return _flattened(x, named.get("start_dim", 0), named.get("end_dim", -1))
            if name in ("view", "reshape") and not kwargs:
                return _reshaped(x, rest[0] if len(rest) == 1 else rest)
            if name in REDUCTIONS:
                named = dict(zip(("dim", "keepdim"), rest, strict=False)) | kwargs
                return _reduced(x, **named)
            if name == "pad":
                named = dict(zip(("pad", "mode", "value"), rest, strict=False)) | kwargs
                return self._padded(x, **named)
            if name == "getitem":
                return _sliced(x, rest[0])
        shown = name or getattr(node.target, "__name__", str(node.target))
        raise _Refused(f"calls {shown}, which is not known here")

    def _binary(self, name: str, args: tuple[Any, ...], inputs: list[_Channels]) -> _Channels:
        if name in PRODUCTS:
            inputs = [self._settled(one) for one in inputs]
        if len(args) != 2:
            raise _Refused(f"calls {name} with other than two values")
        if len(inputs) == 2:
            in_place = name.endswith("_") or name.startswith("i")
            if in_place and any((one.units == ZERO).any() for one in inputs):
                raise _Refused("adds to a padded activation in place, which is not known")
            return self._tied(*inputs)
        number = args[1] if isinstance(args[0], _Channels) else args[0]
        if not isinstance(number, int | float):
            raise _Refused(
                f"calls {name} of an activation and of what is neither that nor a number"
            )
        return inputs[0] if name in PRODUCTS else self._settled(inputs[0])

    def _padded(
        self, x: _Channels, pad: Any, mode: str = "constant", value: float | None = None
    ) -> _Channels:
        pads = list(pad) if isinstance(pad, list | tuple) else []
        if not x.first or x.rank is None or not pads or not all(type(one) is int for one in pads):
            raise _Refused("pads in a way that is not known")
        # Pairs begin with the last axis; the batch would be the pair after the channels.
        at = 2 * (x.rank - 2)
        before, after = pads[at : at + 2] or (0, 0)
        if any(pads[at + 2 :]) or min(before, after) < 0:
            raise _Refused("crops channels or pads the batch, which is not known")
        if before or after:
            if mode != "constant" or value:
                raise _Refused("pads channels with something else than zeros")
            sides = [np.full(size, ZERO) for size in (before, after)]
            return replace(x, units=np.concatenate([sides[0], x.units, sides[1]]))
        return x if mode == "constant" and not value else self._settled(x)

    # Groups

    def _grouped(self) -> Permutations:
        """Sort units by what happens to them: those with equal histories are exchangeable."""
        root = np.array([self._root(unit) for unit in range(len(self.parent))], dtype=np.int64)

        def classes(units: Ints) -> Ints:
            return np.where(units == ZERO, ZERO, root[units])

        axes = [replace(axis, units=classes(axis.units)) for axis in self.axes]
        pinned = set(root[self.pinned].tolist())
        history: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for unit, layer in enumerate(self.layer):
            history[int(root[unit])].append((layer,))
        for unit, happened in history.items():
            if max(Counter(happened).values()) > 1:  # two channels of one layer became one unit
                pinned.add(unit)
        for k, pair in enumerate(self.sums):
            x, y = map(classes, pair)
            for one, other in zip(x.tolist(), y.tolist(), strict=True):
                kind = (self.layers + k, int(one == ZERO), int(other == ZERO))
                for unit in {one, other} - {ZERO}:
                    history[unit].append(kind)
        for units in [axis.units for axis in axes] + [
            classes(x) for pair in self.sums for x in pair
        ]:
            values, counts = np.unique(units[units != ZERO], return_counts=True)
            pinned.update(values[counts > 1].tolist())
        blocks: dict[tuple[int, int], set[int]] = {}
        labels: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for k, (units, groups) in enumerate(self.norms):
            for block, members in enumerate(classes(units).reshape(groups, -1).tolist()):
                blocks[k, block] = set(members)
                for unit in members:
                    labels[unit].append((k, block))
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
        for unit in sorted(history):
            if unit not in pinned:
                alike[tuple(sorted(history[unit]))].append(unit)
        groups_found: list[Ints] = []
        for units_alike in alike.values():
            groups_found += _cells(units_alike, labels, blocks)
        moving = sorted((g for g in groups_found if g.size > 1), key=lambda g: int(g.min()))
        return Permutations(len(root), tuple(moving), tuple(axes))


def _cells(
    units: list[int],
    labels: Mapping[int, list[tuple[int, int]]],
    blocks: Mapping[tuple[int, int], set[int]],
) -> list[Ints]:
    """Split exchangeable units by the groups of GroupNorm layers.

    Units of one normalisation group stay together. Whole groups change places if each is a group
    of every such layer; parts of groups stay where they are.
    """
    cells: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for unit in units:
        cells[tuple(sorted(labels.get(unit, [])))].append(unit)
    whole = [c for key, c in cells.items() if key and all(blocks[one] == set(c) for one in key)]
    parts = [c for c in cells.values() if c not in whole]
    # Groups of one layer have one size, and units that are alike meet the same layers.
    found = [np.array(whole)] if whole else []
    return found + [np.array([part]) for part in parts]


def _holds(tree: Any, kinds: Any) -> bool:
    found = []
    fx.node.map_aggregate(tree, lambda one: found.append(isinstance(one, kinds)))
    return any(found)


def _activations(tree: Any) -> list[_Channels]:
    """Hidden activations in nested arguments, in order."""
    found: list[_Channels] = []
    fx.node.map_aggregate(
        tree, lambda one: found.append(one) if isinstance(one, _Channels) else None
    )
    return found


def _block(x: _Channels, features: int) -> int:
    """Consecutive features of one channel."""
    block, rest = divmod(features, len(x.units))
    if rest or block < 1 or (block > 1 and not x.flat):
        raise _Refused(f"has {features} inputs for {len(x.units)} channels")
    return block


def _dimension(x: Any, axis: Any) -> Any:
    """A size of an activation, where it is known."""
    if not isinstance(axis, int):
        raise _Refused("uses several sizes of an activation at once")
    if axis == 0 or (isinstance(x, _Channels) and x.rank is not None and axis == -x.rank):
        return _BATCH
    if isinstance(x, _Channels) and not x.flat:
        rank = x.rank
        if axis == (1 if x.first or rank == 2 else -1) or (rank is not None and axis == 1 - rank):
            return len(x.units)
    return _FIXED


def _pooled(x: _Channels, rank: int) -> _Channels:
    if x.rank != rank:
        raise _Refused("does not pool over positions")
    return x


def _flattened(x: _Channels, start: int, end: int) -> _Channels:
    if x.rank is None or x.rank == 2:
        if start in (1, -1) and end in (-1, 1):
            return x
    elif end in (-1, x.rank - 1):
        if start in (1, 1 - x.rank):
            return replace(x, rank=2, flat=True)
        if start in (2, 2 - x.rank):
            return replace(x, rank=3)
    raise _Refused(f"flattens axes {start} to {end}, which is not known")


def _reshaped(x: _Channels, shape: Any) -> _Channels:
    """``view(len(x), -1)``: no entry leaves its example, so it is the same as to flatten."""
    if isinstance(shape, list | tuple) and len(shape) == 2 and shape[0] is _BATCH:
        return _flattened(x, 1, -1)
    raise _Refused("reshapes in a way that is not known; torch.flatten(x, 1) is")


def _reduced(x: _Channels, dim: Any = None, keepdim: bool = False) -> _Channels:
    dims = [dim] if isinstance(dim, int) else dim
    if x.rank is None or not isinstance(dims, list | tuple):
        raise _Refused("reduces over axes that are not known to be positions")
    axes = {axis % x.rank for axis in dims}
    if not axes or min(axes) < 2:
        raise _Refused("reduces over channels or over the batch")
    return x if keepdim else replace(x, rank=x.rank - len(axes))


def _sliced(x: _Channels, where: Any) -> _Channels:
    parts = where if isinstance(where, tuple) else (where,)
    if not x.first or not all(isinstance(one, slice) for one in parts):
        raise _Refused("takes entries of an activation in a way that is not known")
    if len(parts) > 1 and parts[1] != slice(None):
        raise _Refused("takes some of the channels, which is not known")
    return x
