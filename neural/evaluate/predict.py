"""Run a model over batches: logits of it, of members, or of dropout draws; or loss and accuracy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neural.batches import Adapter, Batch, arguments, map_tensors, pairs
from neural.evaluate.metrics import IGNORED, correct, refuse_probabilities
from neural.evaluate.precision import full_float32
from nqm.errors import NQMError, check_integer

#: Pairs (inputs, labels). Logits of shape (B, ..., C) and labels (B, ...) are flattened to
#: (N, C) and (N,), so a language model's positions count as examples. Inputs may be a dict or tuple
#: of arguments; `batch` makes pairs of minibatches of other forms.
Batches = Iterable[Any]
Device = torch.device | str | None


class MemberForward(Protocol):
    """Module or callable that computes the logits of one member."""

    def __call__(self, x: Any, /, *, member: int) -> Any:
        """Compute the logits of one member.

        Parameters
        ----------
        x : Tensor, shape (B, ...)
            Inputs.
        member : int
            Number of the member, k in 0 ... K - 1.

        Returns
        -------
        Tensor, shape (B, ..., C)
            Logits.
        """
        ...


class Score(NamedTuple):
    """Mean loss and accuracy over all labels other than -100.

    Attributes
    ----------
    loss : float
        Mean cross-entropy, in nats.
    accuracy : float
        Fraction of correct predictions, in [0, 1].
    """

    loss: float
    accuracy: float


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Switch to eval mode without autograd inside the block; restore every module's mode after it.

    Float32 is computed in full (see `full_float32`).

    Torch's inference mode is not used: a tensor that a model stores in one pass for the next, like
    rotary angles, could not be used in training afterwards.

    Parameters
    ----------
    model : Module or any object
        An object that is not a module is not changed.

    Yields
    ------
    None
    """
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad(), full_float32():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict(
    model: nn.Module, batches: Batches, device: Device = None, *, batch: Adapter | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the logits of all batches in eval mode, and collect the labels.

    Parameters
    ----------
    model : Module
        Maps inputs to logits (B, ..., C), or to an object or dict with ``logits``.
    batches : iterable of (inputs, labels)
        Labels have shape (B, ...); logits and labels are flattened to (N, C) and (N,). Inputs are
        one tensor, or a dict or tuple of arguments.
    device : device, optional
        Device that inputs are moved to; by default that of the model's first parameter.
    batch : callable, optional
        Makes a pair (inputs, labels) of a batch as `batches` yields it.

    Returns
    -------
    logits : Tensor of float32, shape (N, C), on the CPU
    labels : Tensor of int64, shape (N,), on the CPU

    Raises
    ------
    NQMError
        If there is no batch, or logits and labels do not fit.
    """
    with evaluating(model):
        given = pairs("predict", batches, batch)
        logits, labels = _collect(lambda x: [_logits(model, x)], given, _device(model, device))
    return logits[0], labels


def predict_members(
    forward_k: MemberForward,
    members: int,
    batches: Batches,
    device: Device = None,
    *,
    batch: Adapter | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the logits of every member; each batch is loaded once.

    Parameters
    ----------
    forward_k : callable
        ``forward_k(x, member=k)`` returns logits (B, ..., C). A module is run in eval mode.
    members : int
        Number of members, K.
    batches, device, batch
        See `predict`.

    Returns
    -------
    logits : Tensor of float32, shape (K, N, C), on the CPU
    labels : Tensor of int64, shape (N,), on the CPU

    Raises
    ------
    NQMError
        If `members` is below 1, there is no batch, or logits and labels do not fit.
    """
    check_integer("predict_members: members", members, 1)
    with evaluating(forward_k):
        return _collect(
            lambda x: [_logits(forward_k, x, member=k) for k in range(members)],
            pairs("predict_members", batches, batch),
            _device(forward_k, device),
        )


def ensemble_log_probs(member_logits: Tensor) -> Tensor:
    """Compute the logarithm of the members' mean probability.

    Parameters
    ----------
    member_logits : Tensor, shape (K, N, C)
        Logits or log-probabilities.

    Returns
    -------
    Tensor of float64, shape (N, C)
        Log-probabilities.

    Raises
    ------
    NQMError
        If the shape does not fit, or probabilities are given.
    """
    if member_logits.ndim != 3 or not len(member_logits):
        raise NQMError(
            "ensemble_log_probs: expected logits (K, N, C) with K >= 1; got shape "
            f"{tuple(member_logits.shape)}"
        )
    refuse_probabilities("ensemble_log_probs", member_logits)
    log_probs = member_logits.double().log_softmax(-1)
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mc_dropout(
    model: nn.Module,
    batches: Batches,
    samples: int,
    seed: int = 0,
    device: Device = None,
    *,
    batch: Adapter | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute logits under random dropout masks (Gal & Ghahramani 2016).

    Dropout layers draw masks; all other layers, e.g. BatchNorm, stay in eval mode. The mean
    prediction is given by `ensemble_log_probs`.

    Parameters
    ----------
    model : Module
        Model with at least one ``torch.nn`` dropout layer.
    batches
        See `predict`.
    samples : int
        Number of masks for each batch, at least 1.
    seed : int
        Seed of the masks; the global random state is not changed.
    device, batch
        See `predict`.

    Returns
    -------
    logits : Tensor of float32, shape (samples, N, C), on the CPU
    labels : Tensor of int64, shape (N,), on the CPU

    Raises
    ------
    NQMError
        If the model has no dropout layer, `samples` is below 1, there is no batch, or logits and
        labels do not fit.
    """
    check_integer("mc_dropout: samples", samples, 1)
    dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    if not dropouts:
        raise NQMError(
            "mc_dropout: the model has no dropout layer, so all samples would be equal; "
            "build it with dropout, or use predict"
        )
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in dropouts:
            module.training = True
        return _collect(
            lambda x: [_logits(model, x) for _ in range(samples)],
            pairs("mc_dropout", batches, batch),
            _device(model, device),
        )


def score(
    model: nn.Module, batches: Batches, device: Device = None, *, batch: Adapter | None = None
) -> Score:
    """Compute mean loss and accuracy in eval mode, without storing logits.

    Parameters
    ----------
    model, batches, device, batch
        See `predict`.

    Returns
    -------
    Score

    Raises
    ------
    NQMError
        If there is no batch, every label is -100, or logits and labels do not fit.
    """
    target = _device(model, device)
    with evaluating(model):
        given = pairs("score", batches, batch)
        moved = ((_moved(x, target), _moved(y, target)) for x, y in given)
        return _scored("score", ((_logits(model, x), y) for x, y in moved))


def score_text(model: nn.Module, batches: Batches, *, batch: Adapter | None = None) -> Score:
    """Compute `score` of a language model; a recurrent one keeps its state between windows.

    Parameters
    ----------
    model : Module
        A recurrent model takes ``(symbols, state, return_state=True)``. Any other model starts
        every window without a state.
    batches : iterable of (symbols, next symbols)
        Each row continues the same row of the previous batch if both have the same number of rows
        (see `neural.data.evaluation_windows`).
    batch : callable, optional
        Makes a pair (symbols, next symbols) of a batch as `batches` yields it.

    Returns
    -------
    Score

    Raises
    ------
    NQMError
        See `score`.
    """
    if "return_state" not in inspect.signature(model.forward).parameters:
        return score(model, batches, batch=batch)

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        state: Any = None
        rows = 0
        for x, y in pairs("score_text", batches, batch):
            state = state if len(x) == rows else None
            rows = len(x)
            output, state = model(x, state, return_state=True)
            yield output, y

    with evaluating(model):
        return _scored("score_text", outputs())


def _scored(who: str, outputs: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Compute the score of pairs (logits, labels), one after the other."""
    loss, hits, count = 0.0, 0, 0
    empty = True
    for logits, labels in (_flat(*pair) for pair in outputs):
        _check_labels(who, labels, logits.shape[1])
        loss += float(
            nn.functional.cross_entropy(
                logits.double(), labels, reduction="sum", ignore_index=IGNORED
            )
        )
        hits += int(correct(logits, labels).sum())
        count += int((labels != IGNORED).sum())
        empty = False
    if empty:
        raise NQMError(f"{who}: there is no batch; an iterator is empty after its first use")
    if not count:
        raise NQMError(f"{who}: every label is {IGNORED}, so that no example is left")
    return Score(loss / count, hits / count)


def _check_labels(who: str, labels: Tensor, classes: int) -> None:
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if len(wrong):
        raise NQMError(
            f"{who}: labels must lie in 0..{classes - 1}, or be {IGNORED} for an example that is "
            f"left out; got {int(wrong[0])}"
        )


def _device(model: object, device: Device) -> torch.device:
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def _moved(tree: Any, device: torch.device) -> Any:
    return map_tensors(lambda x: x.to(device), tree)


def _logits(forward: Callable[..., Any], inputs: Any, **options: Any) -> Tensor:
    """Logits of a model that returns them, or returns an object or dict that holds them."""
    args, kwargs = arguments(inputs)
    output = forward(*args, **kwargs, **options)
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise NQMError(
            "predict: the model must return a tensor of logits, or an object or dict with logits; "
            f"got a {type(output).__name__}"
        )
    return output


def _flat(logits: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(labels, Tensor):
        raise NQMError(f"predict: labels must be a tensor; got a {type(labels).__name__}")
    if logits.shape[:-1] != labels.shape:
        raise NQMError(
            "predict: expected logits (B, ..., C) and labels (B, ...); got shapes "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()


def _collect(
    forwards: Callable[[Any], list[Tensor]], batches: Iterator[Batch], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Stack the outputs of all forwards: logits (K, N, C) in float32 and labels (N,)."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for x, y in batches:
        outputs = [
            _flat(out.float().cpu(), _moved(y, torch.device("cpu")))
            for out in forwards(_moved(x, device))
        ]
        logits.append(torch.stack([out for out, _ in outputs]))
        labels.append(outputs[0][1])
    if not labels:
        raise NQMError("predict: there is no batch; an iterator is empty after its first use")
    return torch.cat(logits, 1), torch.cat(labels)
