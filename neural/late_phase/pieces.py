"""A minibatch run in pieces, one after another, to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from neural.late_phase import rows as axes
from neural.late_phase.duplicate import duplicate
from neural.late_phase.rows import Rows, UnclearRowsError, arguments
from nqm.errors import NQMError

#: (inputs, targets) of a piece -> what its loss is a mean over, e.g. the number of its symbols.
LossWeight = Callable[[Any, Any], Any]
#: Shapes and settings of minibatches whose rows are known -> where they are in the output.
Known = dict[Any, tuple[Rows, ...]]

#: How far a minibatch's loss may lie from the mean of its pieces', relative to it.
LOSS_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def backward_in_pieces(
    model: nn.Module,
    batch: tuple[Any, Any],
    count: int,
    loss_fn: Callable[[Any, Any], Tensor],
    run: Callable[[tuple[Any, ...], dict[str, Any], Callable[[Any], Tensor]], Tensor],
    known: Known,
    loss_weight: LossWeight | None = None,
) -> Tensor:
    """Add up the gradients of a minibatch's loss, piece by piece.

    Parameters
    ----------
    model : Module
        What is run; with other weights in place it may be.
    batch : (inputs, targets)
    count : int
        Pieces.
    loss_fn : callable
        A mean over rows, or over what `loss_weight` counts.
    run : callable
        ``run(args, kwargs, learn)`` runs the model and returns what `learn` makes of its output.
    known : dict
        What has been found out before; is added to.
    loss_weight : callable, optional
        What a piece's loss is a mean over; its rows by default.

    Returns
    -------
    Tensor, shape ()
        The minibatch's loss, detached.

    Raises
    ------
    NQMError
        Where the pieces do not make up the whole: rows of the minibatch that are not along the
        first axis, a model that mixes them, a loss that is no mean over them. Gradients are to be
        thrown away then.
    """
    if count == 1:
        args, kwargs = arguments(batch[0])
        return run(args, kwargs, _learner(loss_fn, batch[1], 1.0, [], None))
    try:
        parts = list(_cut(batch, count))
        key = _key(model, batch, count)
        if key not in known:
            known[key] = _find(model, batch, parts)
    except UnclearRowsError as error:
        raise NQMError(f"micro_batches: {error}; set micro_batches to 1") from None
    if None in known[key] and loss_weight is None:
        raise NQMError(
            "micro_batches: the model's output holds a tensor without rows, as a loss of its own; "
            "give loss_weight, or set micro_batches to 1"
        )
    counts = [float(loss_weight(*part)) if loss_weight else size for size, part in parts]
    total = sum(counts) or 1.0
    shares = [own / total for own in counts]
    outputs: list[Any] = []
    losses = []
    for share, (_, (inputs, targets)) in zip(shares, parts, strict=True):
        last = len(outputs) == len(parts) - 1 and None not in known[key]
        check = partial(_check_loss, shares, parts, known[key], batch[1], loss_fn) if last else None
        losses.append(run(*arguments(inputs), _learner(loss_fn, targets, share, outputs, check)))
    return torch.stack(losses).sum()


def _learner(
    loss_fn: Callable[[Any, Any], Tensor],
    targets: Any,
    share: float,
    outputs: list[Any],
    check: Callable[[list[Any]], None] | None,
) -> Callable[[Any], Tensor]:
    def learn(output: Any) -> Tensor:
        loss = share * loss_fn(output, targets)
        with torch.autocast(loss.device.type, enabled=False):
            torch.autograd.backward(loss)
        leaves, form = axes.flatten(output)
        # Sharp also where the model runs in a low precision.
        leaves = [_sharp(x.detach()) if isinstance(x, Tensor) else x for x in leaves]
        outputs.append(pytree.tree_unflatten(leaves, form))
        if check is not None:
            check(outputs)
        return loss.detach()

    return learn


def _sharp(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _cut(batch: tuple[Any, Any], count: int) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Rows of each piece, and the piece: tensors with the minibatch's rows are cut.

    Of targets also those with several entries per row, as of a text's symbols in one row.
    """
    inputs, targets = batch
    args, kwargs = arguments(inputs)
    given = kwargs or args
    total = axes.count((given, targets))
    sizes = [len(part) for part in torch.arange(total).chunk(count)]
    trees = []
    for tree, several in ((given, False), (targets, True)):
        leaves, form = axes.flatten(tree)
        where = [_rows_of(leaf, total, several) for leaf in leaves]
        if tree is given and not any(where):
            raise UnclearRowsError("the inputs hold no tensor with rows")
        trees.append([pytree.tree_unflatten(p, form) for p in axes.split(leaves, where, sizes)])
    yield from zip(sizes, zip(*trees, strict=True), strict=True)


def _rows_of(leaf: Any, total: int, several: bool) -> Rows:
    if not isinstance(leaf, Tensor) or not leaf.ndim or not len(leaf):
        return None
    each, rest = divmod(len(leaf), total)
    return None if rest or (each > 1 and not several) else (0, each)


def _key(model: nn.Module, batch: tuple[Any, Any], count: int) -> Any:
    leaves, form = axes.flatten(arguments(batch[0]))
    kinds = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves)
    return kinds, str(form), count, tuple(module.training for module in model.modules())


def _find(
    model: nn.Module, batch: tuple[Any, Any], parts: list[tuple[int, tuple[Any, Any]]]
) -> tuple[Rows, ...]:
    """Where the rows of the model's output are; the pieces' outputs must be those of the whole."""
    if len(parts) == 1:
        return ()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for size in axes.DISPLACEMENTS:
        copy = duplicate(model)
        axes.displace_model_(copy, size)
        for layer in copy.modules():
            if isinstance(layer, _BatchNorm):  # sees a piece at a time, as is documented
                vars(layer)["forward"] = _as_it_is
        with axes.without_chance(device):
            whole = _run(copy, batch[0], "the whole minibatch")
            few = [_run(copy, inputs, "a piece of a minibatch") for _, (inputs, _) in parts]
        where = _joined_rows(few, whole, parts)
        if axes.mostly_finite(whole):
            break
    tolerance = axes.precision(model, whole, device)
    for rows, leaf, joined in zip(where, whole, axes.join(few, where), strict=True):
        if rows is not None and not axes.alike(joined, leaf, tolerance):
            raise UnclearRowsError("the pieces' outputs are not those of the whole minibatch")
    return where


def _run(model: nn.Module, inputs: Any, what: str) -> list[Any]:
    args, kwargs = arguments(inputs)
    try:
        return axes.flatten(model(*args, **kwargs))[0]
    except Exception as error:
        raise UnclearRowsError(axes.reason(what, error)) from None


def _joined_rows(
    few: list[list[Any]], whole: list[Any], parts: list[tuple[int, tuple[Any, Any]]]
) -> tuple[Rows, ...]:
    n, m = parts[0][0], sum(size for size, _ in parts)
    return axes.find(axes.shapes(few[0]), axes.shapes(whole), n, m, "the model's output")


def _as_it_is(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _check_loss(
    shares: list[float],
    parts: list[tuple[int, tuple[Any, Any]]],
    where: tuple[Rows, ...],
    targets: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: list[Any],
) -> None:
    """The minibatch's loss, from the outputs of its pieces, must be the mean of theirs."""
    if len(outputs) == 1:
        return
    pairs = zip(outputs, parts, strict=True)
    losses = [loss_fn(output, own) for output, (_, (_, own)) in pairs]
    flat = [axes.flatten(one) for one in outputs]
    whole = pytree.tree_unflatten(axes.join([leaves for leaves, _ in flat], where), flat[0][1])
    expected = float(loss_fn(whole, targets))
    terms = [share * float(loss) for share, loss in zip(shares, losses, strict=True)]
    size = sum(abs(term) for term in terms) + abs(expected)
    if abs(sum(terms) - expected) > LOSS_TOLERANCES.get(losses[0].dtype, 3e-2) * size:
        raise NQMError(
            f"micro_batches: loss_fn is no mean over rows ({sum(terms):.6g} over the pieces, "
            f"{expected:.6g} of the minibatch), as one that ignores some is not; give "
            "loss_weight, e.g. lambda x, y: (y != -100).sum(), or set micro_batches to 1"
        )
