"""K members' minibatches in one forward pass.

Inside a cycle the shared weights are constant, so their layers may run on all K minibatches at
once. Only layers that own member weights, and those that mix the rows of a batch (BatchNorm), have
to tell the minibatches apart: they run slice by slice, each slice with its member's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from nqm.errors import NQMError


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a batch's inputs stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def pieces(batch: Any, count: int) -> Iterator[tuple[float, Any]]:
    """Share of the rows, and the piece, of a batch cut into at most `count` pieces."""
    if count == 1:
        yield 1.0, batch
        return
    inputs, targets = batch
    tree = (arguments(inputs), targets)
    total = _rows_in(tree)
    sizes = [len(part) for part in torch.arange(total).chunk(count)]
    for size, ((args, kwargs), part) in zip(sizes, _split(tree, sizes, 0), strict=True):
        yield size / total, (kwargs or args, part)


def forward(
    model: nn.Module, rows: Sequence[Mapping[str, Tensor]], inputs: Sequence[Any]
) -> list[Any]:
    """Outputs of every member on its own inputs.

    Parameters
    ----------
    model : Module
    rows : sequence of K mappings
        Parameter or buffer name -> member k's value. Buffers are updated in place.
    inputs : sequence of K inputs
        Equal in structure; their tensors have the minibatch along their first axis.

    Returns
    -------
    list of K outputs
    """
    if len(inputs) != len(rows):
        raise NQMError(f"fused needs one minibatch per member, {len(rows)}; got {len(inputs)}")
    given = [arguments(one) for one in inputs]
    sizes = [_rows_in(one) for one in given]
    args, kwargs = _concatenate(given, 0)
    with _slice_by_slice(model, rows, sizes):
        output = model(*args, **kwargs)
    _check_rows(output, sum(sizes), 0, "the model's output")
    return _split(output, sizes, 0)


@contextmanager
def _slice_by_slice(
    model: nn.Module, rows: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]
) -> Iterator[None]:
    """Make the layers concerned run once per slice, until the block is left."""
    owners = _owners(model, rows[0].keys())
    canonical = {id(p): name for name, p in model.named_parameters()}
    own_forward = {path: module.forward for path, module in owners.items()}
    had = {path for path, module in owners.items() if "forward" in vars(module)}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode it would go around the layers of a transformer block.
        torch.backends.mha.set_fastpath_enabled(False)
        for path, module in owners.items():
            local = _local(path, module, canonical)
            own = [{n: row[known] for n, known in local.items() if known in row} for row in rows]
            module.forward = _Sliced(module, own_forward[path], own, sizes)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for path, module in owners.items():
            if path in had:
                module.forward = own_forward[path]
            else:
                del module.forward


def _local(path: str, module: nn.Module, canonical: Mapping[int, str]) -> dict[str, str]:
    """Name of each parameter and buffer inside `module` -> its name in the model.

    A tied weight goes by one name in the model, wherever it is used.
    """
    prefix = f"{path}." if path else ""
    parameters = module.named_parameters(remove_duplicate=False)
    names = {name: canonical[id(p)] for name, p in parameters}
    return names | {name: prefix + name for name, _ in module.named_buffers()}


def _owners(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Outermost modules that hold member weights themselves, or mix the rows of a batch."""
    replicated = {id(p) for name, p in model.named_parameters() if name in names}
    replicated |= {id(b) for name, b in model.named_buffers() if name in names}
    owners: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in owners):
            continue
        if _mixes_rows(module) or any(id(one) in replicated for one in _own_tensors(module)):
            owners[path] = module
    return owners


def _mixes_rows(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that the module itself computes with."""
    # Attention reads its output layer's weight without calling that layer.
    yield from module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    yield from module.buffers(recurse=False)
    if parametrize.is_parametrized(module):
        # A parametrized weight is computed by the layer it belongs to.
        yield from module.get_submodule("parametrizations").parameters()


#: Layers with two results, and with arguments that differ in where the minibatch is.
_PAIRED = (nn.RNNBase, nn.MultiheadAttention)


class _Sliced:
    """A layer's forward pass, slice by slice."""

    def __init__(
        self,
        module: nn.Module,
        own_forward: Callable[..., Any],
        rows: Sequence[Mapping[str, Tensor]],
        sizes: Sequence[int],
    ):
        # Not called through `module(...)`: its hooks run once, around all slices.
        self.direct = _Direct(module, own_forward)
        self.rows = [{f"module.{name}": value for name, value in row.items()} for row in rows]
        self.sizes = sizes
        self.axis = 1 if getattr(module, "batch_first", True) is False else 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.direct.module
        _check_rows((args, kwargs), sum(self.sizes), self.axis, type(module).__name__)
        outputs = [
            functional_call(self.direct, row, part_args, part_kwargs)
            for row, (part_args, part_kwargs) in zip(
                self.rows, self._cut(args, kwargs), strict=True
            )
        ]
        if not isinstance(module, _PAIRED):
            return _concatenate(outputs, self.axis)
        # A recurrent layer's state has its minibatch along axis 1, attention weights along 0.
        second = 1 if isinstance(module, nn.RNNBase) else 0
        firsts, seconds = zip(*outputs, strict=True)
        return _concatenate(firsts, self.axis), _concatenate(seconds, second)

    def _cut(self, args: Any, kwargs: Any) -> list[Any]:
        """Arguments of every slice."""
        if not isinstance(self.direct.module, _PAIRED):
            return _split((args, kwargs), self.sizes, self.axis)
        given = signature(self.direct.own_forward).bind(*args, **kwargs).arguments
        cut = {}
        for name, value in given.items():
            axis = {"hx": 1, "key_padding_mask": 0, "attn_mask": 0}.get(name, self.axis)
            common = name == "attn_mask" and isinstance(value, Tensor) and value.ndim == 2
            cut[name] = [value] * len(self.sizes) if common else _split(value, self.sizes, axis)
        return [((), {name: one[k] for name, one in cut.items()}) for k in range(len(self.sizes))]


class _Direct(nn.Module):
    def __init__(self, module: nn.Module, own_forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.own_forward = own_forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.own_forward(*args, **kwargs)


def _concatenate(trees: Sequence[Any], axis: int) -> Any:
    return _map(lambda *pieces: torch.cat(pieces, axis), *trees)


def _check_rows(tree: Any, total: int, axis: int, what: str) -> None:
    """Whether the minibatches can be told apart: else members would silently share them."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] % total == 0:
            return
    raise NQMError(
        f"fused: no tensor of {what} has the {total} rows of the minibatches along axis {axis}; "
        "set fused to False"
    )


def _split(tree: Any, sizes: Sequence[int], axis: int) -> list[Any]:
    """One tree per member: tensors with a multiple of all rows along `axis` are cut."""
    total = sum(sizes)
    leaves, spec = pytree.tree_flatten(tree)
    cut: list[Sequence[Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] % total == 0:
            # Windows or positions folded into the rows stay behind their own row.
            factor = leaf.shape[axis] // total
            cut.append(torch.split(leaf, [factor * size for size in sizes], axis))
        else:
            cut.append([leaf] * len(sizes))
    return [pytree.tree_unflatten([one[k] for one in cut], spec) for k in range(len(sizes))]


def _map(function: Callable[..., Any], *trees: Any) -> Any:
    """Join trees of equal structure tensor by tensor; other leaves are taken from the first."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    leaves = [
        function(*one) if isinstance(one[0], Tensor) else one[0]
        for one in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _rows_in(inputs: Any) -> int:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise NQMError("fused needs minibatches that hold a tensor with rows")
