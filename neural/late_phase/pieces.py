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

#: (inputs, targets) of a piece -> number of items that its loss is a mean of, e.g. of symbols.
LossWeight = Callable[[Any, Any], Any]
#: Shapes and settings of minibatches -> row axes of the model's output.
Known = dict[Any, tuple[Rows, ...]]

#: Largest relative difference between a minibatch's loss and the mean of the losses of its pieces.
LOSS_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}


def mean_over_rows(inputs: Any, targets: Any) -> int:
    """Weight of a piece if the loss is known to be a mean over the rows of a minibatch.

    `backward_in_pieces` then does not compare the losses: reading them would wait for the GPU after
    every minibatch.

    Parameters
    ----------
    inputs, targets
        Of a piece; the rows of `targets` are counted.

    Returns
    -------
    int
        Number of rows.
    """
    return len(targets)


def backward_in_pieces(
    model: nn.Module,
    batch: tuple[Any, Any],
    count: int,
    loss_fn: Callable[[Any, Any], Tensor],
    run: Callable[[tuple[Any, ...], dict[str, Any], Callable[[Any], Tensor]], Tensor],
    known: Known,
    loss_weight: LossWeight | None = None,
) -> Tensor:
    """Accumulate the gradients of a minibatch's loss, piece by piece.

    Parameters
    ----------
    model : Module
        The model that `run` runs.
    batch : (inputs, targets)
        The minibatch.
    count : int
        Number of pieces, at least 1.
    loss_fn : callable
        ``loss_fn(output, targets)`` returns a mean over rows, or over the items that `loss_weight`
        counts.
    run : callable
        ``run(args, kwargs, learn)`` runs the model, possibly with other weights in it, and returns
        the result of `learn` for its output.
    known : dict
        Results of earlier checks; new ones are added.
    loss_weight : callable, optional
        ``loss_weight(inputs, targets)`` returns the number of items that the loss of a piece is a
        mean of; by default its number of rows. With `mean_over_rows` the loss is not checked.

    Returns
    -------
    Tensor, shape ()
        Loss of the minibatch, detached.

    Raises
    ------
    NQMError
        If the loss of the pieces is not that of the minibatch: rows that are not along the first
        axis, a model that mixes rows, a loss that is no mean over rows. The gradients are then
        wrong.
    """
    if count == 1:
        args, kwargs = arguments(batch[0])
        return run(args, kwargs, _learner(loss_fn, batch[1], 1.0, [], None))
    try:
        pieces = list(_cut(batch, count))
        key = _key(model, batch, count)
        if key not in known:
            known[key] = _find(model, batch, pieces)
    except UnclearRowsError as error:
        raise NQMError(f"micro_batches: {error}; set micro_batches to 1") from None
    if None in known[key] and loss_weight is None:
        raise NQMError(
            "micro_batches: the model's output holds a tensor without rows, e.g. a loss; "
            "give loss_weight, or set micro_batches to 1"
        )
    counts = [float(loss_weight(*piece)) if loss_weight else size for size, piece in pieces]
    total = sum(counts) or 1.0
    shares = [own / total for own in counts]
    outputs: list[Any] = []
    losses = []
    checked = None not in known[key] and loss_weight is not mean_over_rows
    for share, (_, (inputs, targets)) in zip(shares, pieces, strict=True):
        last = checked and len(outputs) == len(pieces) - 1
        arguments_of_check = (shares, pieces, known[key], batch[1], loss_fn)
        check = partial(_check_loss, *arguments_of_check) if last else None
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
        # In float32 at least, so that the check of the loss is accurate.
        leaves = [_at_least_float32(x.detach()) if isinstance(x, Tensor) else x for x in leaves]
        outputs.append(pytree.tree_unflatten(leaves, form))
        if check is not None:
            check(outputs)
        return loss.detach()

    return learn


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _cut(batch: tuple[Any, Any], count: int) -> Iterator[tuple[int, tuple[Any, Any]]]:
    """Yield the number of rows of each piece, and the piece.

    Tensors with the minibatch's rows are split; targets also if they have several entries per row,
    e.g. one for each symbol of a text.
    """
    inputs, targets = batch
    args, kwargs = arguments(inputs)
    model_arguments = kwargs or args
    total = axes.count((model_arguments, targets))
    sizes = [len(chunk) for chunk in torch.arange(total).chunk(count)]
    trees = []
    for tree, several in ((model_arguments, False), (targets, True)):
        leaves, form = axes.flatten(tree)
        where = [_rows_of(leaf, total, several) for leaf in leaves]
        if tree is model_arguments and not any(where):
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
    model: nn.Module, batch: tuple[Any, Any], pieces: list[tuple[int, tuple[Any, Any]]]
) -> tuple[Rows, ...]:
    """Row axes of the model's output; the outputs of the pieces must be those of the minibatch."""
    if len(pieces) == 1:
        return ()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for size in axes.DISPLACEMENTS:
        copy = duplicate(model)
        axes.displace_model_(copy, size)
        for layer in copy.modules():
            if isinstance(layer, _BatchNorm):  # it uses the statistics of a piece, as documented
                vars(layer)["forward"] = _identity
        with axes.without_chance(device):
            whole = _run(copy, batch[0], "the whole minibatch")
            few = [_run(copy, inputs, "a piece of a minibatch") for _, (inputs, _) in pieces]
        where = _joined_rows(few, whole, pieces)
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
    few: list[list[Any]], whole: list[Any], pieces: list[tuple[int, tuple[Any, Any]]]
) -> tuple[Rows, ...]:
    n, m = pieces[0][0], sum(size for size, _ in pieces)
    return axes.find(axes.shapes(few[0]), axes.shapes(whole), n, m, "the model's output")


def _identity(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def _check_loss(
    shares: list[float],
    pieces: list[tuple[int, tuple[Any, Any]]],
    where: tuple[Rows, ...],
    targets: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: list[Any],
) -> None:
    """Raise NQMError unless the loss of the joined outputs is the mean of the pieces' losses."""
    if len(outputs) == 1:
        return
    pairs = zip(outputs, pieces, strict=True)
    losses = [loss_fn(output, own) for output, (_, (_, own)) in pairs]
    flat = [axes.flatten(output) for output in outputs]
    whole = pytree.tree_unflatten(axes.join([leaves for leaves, _ in flat], where), flat[0][1])
    expected = float(loss_fn(whole, targets))
    terms = [share * float(loss) for share, loss in zip(shares, losses, strict=True)]
    size = sum(abs(term) for term in terms) + abs(expected)
    if abs(sum(terms) - expected) > LOSS_TOLERANCES.get(losses[0].dtype, 3e-2) * size:
        raise NQMError(
            f"micro_batches: loss_fn is no mean over rows ({sum(terms):.6g} over the pieces, "
            f"{expected:.6g} of the minibatch), e.g. as it ignores some; give "
            "loss_weight, e.g. lambda x, y: (y != -100).sum(), or set micro_batches to 1"
        )
