"""Which axis of which tensor holds the rows of a minibatch, found out by running the model.

Shapes alone cannot tell: a table of eight positions looks like eight rows. So a copy of the model
is run on two numbers of rows: the axis that grows with them, and no other, holds them. Whether
rows stay apart inside the model is then seen by its outputs, at weights where they would differ.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: The axis that holds the rows, and entries along it per row; None where there are no rows.
Rows = tuple[int, int] | None
#: Shapes of the tensors among a tree's leaves, None for another leaf.
Shapes = tuple[tuple[int, ...] | None, ...]

#: Values that may be told apart by `==`, and are the same for all rows.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

#: How far two computations of one output may lie apart, relative to its size.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 3e-4,
    torch.complex64: 3e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

#: Sizes of the displacement at which rows are told apart, relative to the weights; the second where
#: the first gives no finite output.
DISPLACEMENTS = (0.5, 0.05)


class UnclearRowsError(Exception):
    """Rows cannot be told apart; the message says where."""


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for which a batch's inputs stand.

    Parameters
    ----------
    inputs : object
        A mapping gives keyword arguments, a tuple or list positional ones, anything else one.

    Returns
    -------
    (tuple of object, dict of str to object)
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def count(tree: Any) -> int:
    """Number of rows of a minibatch: the length of its first tensor.

    Parameters
    ----------
    tree : object
        Nested tuples, lists and dicts of tensors.

    Returns
    -------
    int
    """
    leaves, _ = flatten(tree)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise UnclearRowsError("the minibatch holds no tensor with rows")


def shapes(leaves: Iterable[Any]) -> Shapes:
    """Shape of each leaf.

    Parameters
    ----------
    leaves : iterable of object

    Returns
    -------
    Shapes
        None for a leaf that is no tensor.
    """
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves)


def find(few: Shapes, many: Shapes, n: int, m: int, what: str) -> tuple[Rows, ...]:
    """Find the row axis of each leaf from its shapes on n rows and on m > n rows.

    Parameters
    ----------
    few : Shapes
        Shapes on n rows.
    many : Shapes
        Shapes on m rows.
    n, m : int
    what : str
        Name of the leaves, for the message.

    Returns
    -------
    tuple of Rows

    Raises
    ------
    UnclearRowsError
        Where shapes change in another way than one axis growing with the rows.
    """
    if len(few) != len(many):
        raise UnclearRowsError(f"{what} changes its form with the number of rows")
    found: list[Rows] = []
    for a, b in zip(few, many, strict=True):
        if a == b:
            found.append(None)
            continue
        if a is None or b is None or len(a) != len(b):
            raise UnclearRowsError(f"{what} changes its form with the number of rows")
        axes = [axis for axis in range(len(a)) if a[axis] != b[axis]]
        axis = axes[0]
        if len(axes) > 1 or a[axis] % n or a[axis] * m != b[axis] * n:
            raise UnclearRowsError(f"{what} has shape {a} on {n} rows and {b} on {m}")
        found.append((axis, a[axis] // n))
    return tuple(found)


def split(leaves: Sequence[Any], rows: Sequence[Rows], sizes: Sequence[int]) -> list[list[Any]]:
    """Cut leaves along their row axes; a leaf without rows is repeated in every part.

    Parameters
    ----------
    leaves : sequence of object
    rows : sequence of Rows
        Row axis of each leaf.
    sizes : sequence of int
        Rows of each part.

    Returns
    -------
    list of list of object
        One list of leaves per part.
    """
    cut: list[Sequence[Any]] = []
    for leaf, where in zip(leaves, rows, strict=True):
        if where is None:
            cut.append([leaf] * len(sizes))
        else:
            axis, each = where
            cut.append(torch.split(leaf, [each * size for size in sizes], axis))
    return [[one[k] for one in cut] for k in range(len(sizes))]


def join(parts: Sequence[Sequence[Any]], rows: Sequence[Rows]) -> list[Any]:
    """Join the leaves of several parts along their row axes.

    Parameters
    ----------
    parts : sequence of sequence of object
        Leaves of each part.
    rows : sequence of Rows
        Row axis of each leaf; a leaf without rows is taken from the first part.

    Returns
    -------
    list of object
    """
    return [
        leaves[0] if where is None else torch.cat(leaves, where[0])
        for leaves, where in zip(zip(*parts, strict=True), rows, strict=True)
    ]


# --- two runs compared ---------------------------------------------------------------------------


@contextmanager
def without_chance(device: torch.device) -> Iterator[WithoutChance]:
    """Context without random draws: dropout keeps all values, other draws are constants.

    No gradients are taken, compiled code runs uncompiled, and random states are restored.

    Parameters
    ----------
    device : torch.device

    Yields
    ------
    WithoutChance
        Counts how often numbers are read out of tensors.
    """
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncompiled())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # a model's own, as that no gradient is taken
        yield stack.enter_context(WithoutChance())


def uncompiled() -> AbstractContextManager[Any]:
    """Context in which compiled code runs as written, so that replaced layers are called.

    Returns
    -------
    AbstractContextManager
    """
    # Importing the compiler takes seconds; without it nothing is compiled.
    compiles = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


class WithoutChance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations in which nothing is drawn; `reads` counts ``if x.sum() > 0`` and the like."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        named = {a.name: k for k, a in enumerate(func._schema.arguments)}
        name = func._schema.name.rpartition("::")[2]
        if name in ("native_dropout", "_fused_dropout"):
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        rates = named.keys() & {"dropout", "dropout_p"}
        if rates:
            given = [0.0 if k in {named[r] for r in rates} else x for k, x in enumerate(args)]
            return func(*given, **kwargs | dict.fromkeys(rates & kwargs.keys(), 0.0))
        drawn = func(*args, **kwargs)
        if not isinstance(drawn, Tensor):
            return drawn
        if name == "randperm":
            return torch.arange(len(drawn), dtype=drawn.dtype, device=drawn.device)
        constant = 1.0 if "bernoulli" in name else 0.5 if drawn.is_floating_point() else 0
        return drawn.fill_(constant)


def displace_(tensor: Tensor, size: float, generator: torch.Generator) -> None:
    """Move weights to where nothing holds by chance: no zeros, no two that agree.

    Parameters
    ----------
    tensor : Tensor
        Changed in place; whole numbers are left alone.
    size : float
        Relative to the root mean square, or to that of an ordinary start if it is larger.
    generator : Generator
        On the CPU.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    into = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 0
    usual = into**-0.5 if into else 0.4
    rms = float(tensor.detach().abs().double().square().mean().sqrt())
    scale = size * max(rms if math.isfinite(rms) else 0.0, 0.5 * usual)
    dtype = torch.complex64 if tensor.is_complex() else torch.float32
    normal = torch.randn(tensor.shape, generator=generator, dtype=dtype)
    with torch.no_grad():
        tensor.add_((scale * normal).to(tensor))


def displace_model_(model: nn.Module, size: float) -> None:
    """Displace all parameters, with the same draws at every call (see `displace_`).

    Parameters
    ----------
    model : Module
        Changes in place.
    size : float
        Relative size of the displacement.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        displace_(parameter, size, generator)


def precision(model: nn.Module, leaves: Iterable[Any], device: torch.device) -> float:
    """Largest relative difference that rounding can cause between two computations of an output.

    Parameters
    ----------
    model : Module
    leaves : iterable of object
        Inputs; their types count as those of the parameters do.
    device : torch.device

    Returns
    -------
    float
    """
    # On a GPU float32 may be computed with the digits of TF32, by other kernels for more rows.
    least = {"highest": 0.0 if device.type == "cpu" else 1e-2, "high": 1e-2, "medium": 5e-2}
    tensors = [*model.parameters(), *(x for x in leaves if isinstance(x, Tensor))]
    dtypes = {x.dtype for x in tensors} & TOLERANCES.keys()
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    if dtypes <= {torch.float64, torch.complex128}:
        return TOLERANCES[torch.float64]
    coarse = least[torch.get_float32_matmul_precision()]
    return max(coarse, *(TOLERANCES[dtype] for dtype in dtypes))


def alike(one: Any, other: Any, tolerance: float) -> bool:
    """True if two leaves agree.

    Parameters
    ----------
    one, other : object
    tolerance : float
        Largest relative difference of tensors.

    Returns
    -------
    bool
    """
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(isinstance(one, PLAIN) and isinstance(other, PLAIN) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one[~finite].nan_to_num(7.0), other[~finite].nan_to_num(7.0)):
        return False
    wide = torch.complex128 if one.is_complex() else torch.float64
    a, b = one[finite].to(wide), other[finite].to(wide)
    return bool((a - b).norm() <= tolerance * b.norm() + 1e-12)


def mostly_finite(leaves: Iterable[Any]) -> bool:
    """True if more than half of the numbers of each tensor are finite.

    Parameters
    ----------
    leaves : iterable of object

    Returns
    -------
    bool
    """
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return all(x.isfinite().double().mean() > 0.5 for x in tensors if x.numel())


def reason(what: str, error: Exception) -> str:
    """Describe an error of a model in one line.

    Parameters
    ----------
    what : str
        What the model was run on.
    error : Exception

    Returns
    -------
    str
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return f"the model does not run on {what} ({text:.100})"


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves of a nested container, and its structure.

    Parameters
    ----------
    tree : object

    Returns
    -------
    (list of object, object)
    """
    leaves, form = pytree.tree_flatten(tree)
    return leaves, form
