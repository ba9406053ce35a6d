"""Tensors that have a shape and a device and no numbers, and what is done with them on a GPU.

Inside `gpu()` tensors are torch's fake tensors: one that is on the wrong device raises an error, as
on a GPU. `Meter` sees every operation and counts what a GPU would wait for or launch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import stand_in  # noqa: F401 - before torch
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer as optimizers
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
aten: Any = torch.ops.aten
#: Operations with results whose shape depends on numbers: the host waits for them.
SHAPED_BY_NUMBERS = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default,
    aten.unique_consecutive.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
    aten.equal.default, aten.is_nonzero.default,
}  # fmt: skip
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip
NO_KERNEL = {aten.detach.default, aten.detach_.default, aten.alias.default}
#: Composite operations that derivatives, or kernels of their own, keep whole.
WHOLE = {aten.dropout.default, aten.detach.default}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Meter(TorchDispatchMode):
    """Counts for tensors on the GPU.

    Attributes
    ----------
    waits : Counter
        What makes the host wait: numbers that are read, copies to and from the host.
    kernels : Counter
        Launched kernels by name.
    layouts : Counter
        Convolutions with images or weights that are not channels-last.
    live, peak : int
        Bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.layouts: Counter[str] = Counter()
        self.live = self.peak = 0
        self._stored: set[int] = set()

    def clear(self) -> None:
        """Forget the counts, but not what is in memory."""
        for counts in (self.waits, self.kernels, self.layouts):
            counts.clear()

    @property
    def launched(self) -> int:
        """Number of kernels."""
        return sum(self.kernels.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func not in WHOLE and func.has_kernel_for_dispatch_key(
            COMPOSITE
        ):  # fmt: skip
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is aten._local_scalar_dense.default:
            if on_gpu(given[0]):
                self.waits["a number is read"] += 1
            kind = given[0].dtype  # the value itself is unknown: 1 of its type
            return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1
        self._note(func, args, kwargs, given)
        if func is aten.equal.default:
            return True
        if func is aten.index.Tensor and _is_mask(args[1][0]):  # as if it were true everywhere
            return args[0].reshape(-1, *args[0].shape[args[1][0].ndim :])
        if func is aten._cudnn_rnn_backward.default:  # torch has no shapes for it
            x, weights, _, _, hidden, cell = args[:6]
            if not args[16]:
                raise RuntimeError("cudnn RNN backward can only be called in training mode")
            like = torch.empty_like
            return like(x), like(hidden), like(cell), [like(weight) for weight in weights]
        result = func(*args, **kwargs)
        self._store(result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        target = kwargs.get("device")
        if not any(map(on_gpu, given)) and (target is None or torch.device(target).type != "cuda"):
            return
        if func in SHAPED_BY_NUMBERS:
            self.waits[f"{func.__name__}: a shape is read"] += 1
        if func is aten._to_copy.default and target is not None:
            self._copied(given[0].device, torch.device(target), given[0])
        if func is aten.copy_.default:
            self._copied(args[1].device, args[0].device, args[1])
        for index in args[1] if func in INDEXING else ():
            if _is_mask(index):
                self.waits["a mask is an index"] += 1
            if isinstance(index, Tensor) and not on_gpu(index):
                self.waits["an index is on the host"] += 1
        if func is aten.convolution.default and args[0].ndim == 4:
            for what, tensor in zip(("images", "weights"), args[:2], strict=True):
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    self.layouts[f"{what} {tuple(tensor.shape)}"] += 1
        if not func.is_view and func not in NO_KERNEL and not str(func).startswith("prim."):
            self.kernels[str(func)] += 1

    def _copied(self, source: torch.device, target: torch.device, what: Tensor) -> None:
        if source.type != target.type:
            self.waits[f"copy {source.type} -> {target.type} {tuple(what.shape)}"] += 1

    def _store(self, result: Any) -> None:
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor) or not on_gpu(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._stored:
                self._stored.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._stored.discard(key)
        self.live -= size


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


@contextmanager
def gpu(meter: Meter | None = None) -> Iterator[Meter]:
    """Fake tensors inside the block, also on a GPU that is not there; `meter` sees what they do."""
    meter = meter or Meter()
    apply, numpy, set_rng = nn.Module._apply, Tensor.numpy, torch.set_rng_state
    moved: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def apply_by_replacing(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        # Torch swaps the numbers of a parameter in place, which a fake tensor does not allow.
        own = dict(self._parameters)
        self._parameters.update(dict.fromkeys(own))
        apply(self, fn, recurse)
        for name, old in own.items():
            if old is not None and id(old) not in moved:
                with torch.no_grad():
                    new = fn(old)
                moved[id(old)] = (old, old if new is old else nn.Parameter(new, old.requires_grad))
            self._parameters[name] = None if old is None else moved[id(old)][1]
        return self

    def to_numpy(self: Tensor, **kwargs: Any) -> Any:
        if not isinstance(self, FakeTensor):
            return numpy(self, **kwargs)
        if on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            new = self.detach().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(new, self.requires_grad) if is_parameter else new
        return memo[id(self)]

    def set_host_rng(state: Tensor) -> None:
        if not isinstance(state, FakeTensor) or on_gpu(state):
            set_rng(state)

    def get_rng(device: Any = "cuda") -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_gpu_rng(state: Tensor, device: Any = "cuda") -> None:
        if on_gpu(state):
            raise TypeError("RNG state must be a torch.ByteTensor")

    with (
        mock.patch.object(nn.Module, "_apply", apply_by_replacing),
        mock.patch.object(Tensor, "numpy", to_numpy),
        mock.patch.object(Tensor, "__deepcopy__", deepcopy),
        mock.patch.object(nn.Parameter, "__deepcopy__", deepcopy),
        mock.patch.object(FakeTensor, "__deepcopy__", deepcopy, create=True),
        mock.patch.object(torch, "set_rng_state", set_host_rng),
        mock.patch.object(torch.cuda, "get_rng_state", get_rng),
        mock.patch.object(torch.cuda, "set_rng_state", set_gpu_rng),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        # Optimizers take their multi-tensor kernels for tensors of these types only.
        mock.patch.object(optimizers, "_foreach_supported_types",
                          [*optimizers._foreach_supported_types, FakeTensor]),
        FakeTensorMode(allow_non_fake_inputs=True),
        meter,
    ):  # fmt: skip
        yield meter
