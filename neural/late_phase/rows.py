"""Determine by running a model which axis of which tensor has the rows of a minibatch.

Shapes are not sufficient: a table of eight positions has the shape of eight rows. Therefore a copy
of the model runs on two numbers of rows, and the row axis is the one whose length grows with them.
Outputs at displaced weights then show whether the model mixes rows.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neural.batches import arguments as arguments

#: Row axis of a tensor, and number of entries along it per row; None if it has no rows.
Rows = tuple[int, int] | None
#: Shapes of a tree's leaves; None for a leaf that is no tensor.
Shapes = tuple[tuple[int, ...] | None, ...]

#: Types of values that can be compared by `==` and are the same for all rows.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

#: Largest relative difference between two computations of one output.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 3e-4,
    torch.complex64: 3e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

#: Sizes of the displacement of weights, relative to the weights; the second is used if outputs are
#: not finite with the first.
DISPLACEMENTS = (0.5, 0.05)


class UnclearRowsError(Exception):
    """The rows of minibatches cannot be distinguished; the message says where."""


def count(tree: Any) -> int:
    """Number of rows of a minibatch: the length of its first tensor.

    Parameters
    ----------
    tree : object
        Nested tuples, lists and dicts of tensors.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    UnclearRowsError
        If there is no tensor with an axis.
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
        Tensors and other values.

    Returns
    -------
    Shapes
        One for each leaf; None for a leaf that is no tensor.
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
        The two numbers of rows.
    what : str
        Name of the leaves, for the message.

    Returns
    -------
    tuple of Rows
        One for each leaf.

    Raises
    ------
    UnclearRowsError
        If the shape of a leaf changes other than by one axis in proportion to the rows.
    """
    if len(few) != len(many):
        raise UnclearRowsError(f"{what} changes its structure with the number of rows")
    where: list[Rows] = []
    for a, b in zip(few, many, strict=True):
        if a == b:
            where.append(None)
            continue
        if a is None or b is None or len(a) != len(b):
            raise UnclearRowsError(f"{what} changes its structure with the number of rows")
        axes = [axis for axis in range(len(a)) if a[axis] != b[axis]]
        axis = axes[0]
        if len(axes) > 1 or a[axis] % n or a[axis] * m != b[axis] * n:
            raise UnclearRowsError(f"{what} has shape {a} on {n} rows and {b} on {m}")
        where.append((axis, a[axis] // n))
    return tuple(where)


def split(leaves: Sequence[Any], rows: Sequence[Rows], sizes: Sequence[int]) -> list[list[Any]]:
    """Split leaves along their row axes.

    Parameters
    ----------
    leaves : sequence of object
        Tensors and other values.
    rows : sequence of Rows
        Row axis of each leaf; a leaf without rows is repeated in every piece.
    sizes : sequence of int
        Number of rows of each piece.

    Returns
    -------
    list of list of object
        One list of leaves for each piece.
    """
    cut: list[Sequence[Any]] = []
    for leaf, where in zip(leaves, rows, strict=True):
        if where is None:
            cut.append([leaf] * len(sizes))
        else:
            axis, each = where
            cut.append(torch.split(leaf, [each * size for size in sizes], axis))
    return [[pieces[k] for pieces in cut] for k in range(len(sizes))]


def join(parts: Sequence[Sequence[Any]], rows: Sequence[Rows]) -> list[Any]:
    """Join the leaves of several pieces along their row axes; the inverse of `split`.

    Parameters
    ----------
    parts : sequence of sequence of object
        Leaves of each piece.
    rows : sequence of Rows
        Row axis of each leaf; a leaf without rows is taken from the first piece.

    Returns
    -------
    list of object
        The joined leaves.
    """
    return [
        leaves[0] if where is None else torch.cat(leaves, where[0])
        for leaves, where in zip(zip(*parts, strict=True), rows, strict=True)
    ]


# --- two runs compared ---------------------------------------------------------------------------


@contextmanager
def without_chance(device: torch.device) -> Iterator[WithoutChance]:
    """Run the block without random draws: dropout keeps all values, other draws are constants.

    Gradients are not computed, compiled code runs uncompiled, and random states are restored.

    Parameters
    ----------
    device : torch.device
        Device of the model.

    Yields
    ------
    WithoutChance
        Counts how often numbers are read from tensors.
    """
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(uncompiled())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # e.g. a model's warning that there are no gradients
        yield stack.enter_context(WithoutChance())


def uncompiled() -> AbstractContextManager[Any]:
    """Make compiled code run as written, so that replaced layers are called.

    Returns
    -------
    AbstractContextManager
        To be used in a ``with`` statement.
    """
    # Importing the compiler takes seconds; if it is not imported, nothing is compiled.
    compiles = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


class WithoutChance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Replace random draws by constants; `reads` counts conditions like ``if x.sum() > 0``."""

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
            changed = [0.0 if k in {named[r] for r in rates} else x for k, x in enumerate(args)]
            return func(*changed, **kwargs | dict.fromkeys(rates & kwargs.keys(), 0.0))
        drawn = func(*args, **kwargs)
        if not isinstance(drawn, Tensor):
            return drawn
        if name == "randperm":
            return torch.arange(len(drawn), dtype=drawn.dtype, device=drawn.device)
        constant = 1.0 if "bernoulli" in name else 0.5 if drawn.is_floating_point() else 0
        return drawn.fill_(constant)


def displace_(tensor: Tensor, size: float, generator: torch.Generator) -> None:
    """Add random numbers to weights, so that no weight is zero and no two are equal.

    Parameters
    ----------
    tensor : Tensor
        The weights; changed in place. Integers are not changed.
    size : float
        Size of the displacement, relative to the root mean square of the weights, or to half of
        that of usual initial weights if this is larger.
    generator : Generator
        Source of the random numbers, on the CPU.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    fan_in = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 0
    usual = fan_in**-0.5 if fan_in else 0.4
    rms = float(tensor.detach().abs().double().square().mean().sqrt())
    scale = size * max(rms if math.isfinite(rms) else 0.0, 0.5 * usual)
    dtype = torch.complex64 if tensor.is_complex() else torch.float32
    normal = torch.randn(tensor.shape, generator=generator, dtype=dtype)
    with torch.no_grad():
        tensor.add_((scale * normal).to(tensor))


def displace_model_(model: nn.Module, size: float) -> None:
    """Displace all parameters, with the same random numbers at every call (see `displace_`).

    Parameters
    ----------
    model : Module
        The model; changed in place.
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
        The model; the types of its parameters determine the result.
    leaves : iterable of object
        Further tensors whose types do, e.g. outputs.
    device : torch.device
        Device of the computation.

    Returns
    -------
    float
        A tolerance for `alike`.
    """
    # On a GPU, float32 may be computed in TF32, and by other kernels for more rows.
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
    """Tell whether two leaves are equal up to rounding.

    Parameters
    ----------
    one, other : object
        Tensors, or other values.
    tolerance : float
        Largest relative difference of tensors, in the Euclidean norm.

    Returns
    -------
    bool
        False also if they differ in type or shape, or in which numbers are not finite.
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
    """Tell whether more than half of the numbers of each real tensor are finite.

    Parameters
    ----------
    leaves : iterable of object
        Tensors; other values are ignored.

    Returns
    -------
    bool
        True if there is no tensor.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return all(x.isfinite().double().mean() > 0.5 for x in tensors if x.numel())


def reason(what: str, error: Exception) -> str:
    """Describe an error of a model in one line.

    Parameters
    ----------
    what : str
        The input on which the model was run.
    error : Exception
        The error that it raised.

    Returns
    -------
    str
        One line.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return f"the model does not run on {what} ({text:.100})"


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """List the leaves of a nested container, and describe its structure.

    Parameters
    ----------
    tree : object
        Nested tuples, lists and dicts.

    Returns
    -------
    (list of object, object)
        Leaves, and the structure for `torch.utils._pytree.tree_unflatten`.
    """
    leaves, form = pytree.tree_flatten(tree)
    return leaves, form
