"""Refuse networks and losses whose derivatives would be wrong, before anything is measured.

Each check is made on two examples and costs a few gradients of them; that the loss is finite is
checked on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from neural.curvature.example_losses import check_labels, is_cross_entropy
from neural.curvature.examples import MakeBatch, rows
from neural.curvature.plain_kernels import through_detach
from neural.evaluate.metrics import IGNORED
from neural.late_phase.members import Batch
from neural.late_phase.rows import arguments
from nqm.errors import NQMError
from nqm.runs.interrupts import let_through

if TYPE_CHECKING:
    from neural.curvature.risk import EmpiricalRisk

#: Relative displacements of the weights at which a continuous loss changes hardly.
JUMPS = (1e-4, 1e-5)


def check_risk(risk: EmpiricalRisk) -> None:
    """Check that a risk is finite and, on its first two examples, that it can be measured.

    Parameters
    ----------
    risk : EmpiricalRisk

    Raises
    ------
    NQMError
        If the model does not take the data; if a weight or the loss is not finite; if in evaluation
        mode the model is random, changes its state or its inputs, or lets an example's output
        depend on other examples; if its gradient is not the derivative of its loss, e.g. because it
        detaches a tensor, or its loss jumps; or if torch cannot compute its second derivatives.
    """
    name = type(risk.model).__name__
    _check_weights_finite(risk, name)
    small, few, make = _first_examples(risk, name)
    first = _checked_losses(small, few, name)
    _check_loss_finite(risk, name)
    _check_apart(small, few, make, first, name)
    try:
        _check_derivatives(small, name)
    except RuntimeError as error:
        let_through(error)
        raise no_derivative(name, error) from error


def check_data(risk: EmpiricalRisk) -> None:
    """Check that a risk's model takes its data, by a forward pass of two examples.

    Parameters
    ----------
    risk : EmpiricalRisk

    Raises
    ------
    NQMError
        If model or loss raise an error, or there is no logit for a label.
    """
    name = type(risk.model).__name__
    small, few, _ = _first_examples(risk, name)
    _of_first(small, lambda batch: small.example_losses(small.weights, batch), few, name)


def _first_examples(
    risk: EmpiricalRisk, name: str
) -> tuple[EmpiricalRisk, list[Tensor], MakeBatch]:
    """The loss of two examples, their tensors, and the function that makes a batch of them."""
    tensors, make = rows(risk.batches[0])
    few = [tensor[:2].clone() for tensor in tensors]
    if is_cross_entropy(risk.example_loss):
        logits = _logits(risk.of_examples(make(few)), few, name)
        if logits is not None:
            check_labels((labels for _, labels in risk.batches), logits.shape[-1])
            # Where the model is sure of the right labels, the gradient is lost in rounding.
            few[-1] = torch.where(few[-1] == IGNORED, few[-1], logits.argmin(-1).to(few[-1]))
    return risk.of_examples(make(few)), few, make


def check_model(model: Any) -> None:
    """Check that a risk's model is a module with Python code.

    Parameters
    ----------
    model : object

    Raises
    ------
    NQMError
        If it is no module, or a TorchScript program, of which plain kernels cannot take the place.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise NQMError("model is a TorchScript program; give the torch.nn.Module of its code")
    if not isinstance(model, nn.Module):
        raise NQMError(f"model must be a torch.nn.Module; got a {type(model).__name__}")


def check_weights(weights: dict[str, nn.Parameter]) -> None:
    """Check that all selected weights have values, are float32 or float64, and on one device.

    Parameters
    ----------
    weights : dict of str to Parameter

    Raises
    ------
    NQMError
        If they are not.
    """
    first = next(iter(weights))
    for name, weight in weights.items():
        if weight.is_meta:
            raise NQMError(
                f"weight {name!r} has no values (device 'meta'); load the model's weights first"
            )
        if weight.dtype not in (torch.float32, torch.float64):
            raise NQMError(
                f"weight {name!r} is {weight.dtype}; a risk takes float32 or float64: convert "
                "the model and its data, or select other weights"
            )
        if (weight.dtype, weight.device) != (weights[first].dtype, weights[first].device):
            raise NQMError(
                f"weights {first!r} and {name!r} differ in precision or device; give the model one"
            )


def check_output(output: Any, name: str) -> None:
    """Check that cross-entropy gets logits.

    Parameters
    ----------
    output : object
        The model's output.
    name : str
        Name of the model's class, for the message.

    Raises
    ------
    NQMError
        If it is no tensor.
    """
    if not isinstance(output, Tensor):
        raise NQMError(
            f"{name} gives a {type(output).__name__}, not logits; wrap it in a module that returns "
            "the logits, or pass a loss(output, targets) of your own"
        )


def one_tensor(output: Any) -> Tensor:
    """The output of a model for the Gauss-Newton matrix.

    Parameters
    ----------
    output : object
        The model's output.

    Returns
    -------
    Tensor

    Raises
    ------
    NQMError
        If it is no tensor.
    """
    if isinstance(output, Tensor):
        return output
    raise NQMError(
        f"the Gauss-Newton matrix needs one tensor as output; got a {type(output).__name__}; wrap "
        "the model in a module that returns the logits"
    )


def no_derivative(name: str, error: Exception) -> NQMError:
    """The message for a layer that torch cannot differentiate twice.

    Parameters
    ----------
    name : str
        Name of the model's class.
    error : Exception
        The error of torch.

    Returns
    -------
    NQMError
    """
    return NQMError(
        f"{name} has a layer whose second derivatives torch cannot compute: {_words(error, 200)}"
    )


def slope_along(f: Callable[[Tensor], Tensor], w: Tensor, v: Tensor) -> Tensor:
    """Derivative of a function along a direction, by forward differentiation.

    Parameters
    ----------
    f : callable
        Function of a weight vector of shape (p,).
    w, v : Tensor, shape (p,)
        Weights and direction.

    Returns
    -------
    Tensor
        Of the shape of the function's value.
    """
    slope: Tensor = jvp(f, (w,), (v,))[1]
    return slope


def _checked_losses(small: EmpiricalRisk, few: list[Tensor], name: str) -> Tensor:
    """Losses of the first examples, if neither state, nor inputs, nor chance change them."""
    state = dict(small.model.named_buffers()) | dict(small.model.named_parameters())
    state |= {f"inputs {i}": tensor for i, tensor in enumerate(few)}
    versions = {n: tensor._version for n, tensor in state.items()}

    def twice(batch: Batch) -> Tensor:
        # Within one block, so that attributes of the model are not restored between the two.
        return torch.stack([small.example_losses(small.weights, batch) for _ in range(2)])

    first: Tensor
    first, second = _of_first(small, twice, few, name)
    again, _ = _of_first(small, twice, few, name)
    changed = [n for n, tensor in state.items() if tensor._version != versions[n]]
    if any(n.startswith("inputs ") for n in changed):
        raise NQMError(
            f"{name} changes its inputs in place, and with them the data; let its forward compute "
            "new tensors (x = x / 2 in place of x /= 2)"
        )
    if changed:
        raise NQMError(
            f"{name} changes its {changed[0]!r} in evaluation mode, so that its loss is no "
            "function of the weights alone"
        )
    if not _close(again, first):
        raise NQMError(
            f"{name} is random in evaluation mode, so that its loss has no derivatives; switch "
            "its noise or dropout off there, e.g. by F.dropout(x, p, training=self.training)"
        )
    if not _close(second, first):
        raise NQMError(
            f"{name} gives another output when it is called again, so that its loss is no function "
            "of the weights alone; let no attribute change in evaluation mode"
        )
    return first


def _of_first(
    small: EmpiricalRisk, term: Callable[[Batch], Tensor], few: list[Tensor], name: str
) -> Tensor:
    """A term of the first examples; an error of the model or loss is told in one line."""
    try:
        return next(small.over_batches(term))
    except NQMError:
        raise
    except Exception as error:  # of the model's own code, which raises what it likes
        raise _fails(name, few, error) from error


def check_forward(model: nn.Module, batch: Batch) -> None:
    """Check that a model takes the data, by a forward pass of two examples in evaluation mode.

    Parameters
    ----------
    model : Module
        On the device of the data.
    batch : (inputs, targets)

    Raises
    ------
    NQMError
        If it raises an error.
    """
    tensors, make = rows(batch)
    few, training = [tensor[:2].clone() for tensor in tensors], model.training
    args, kwargs = arguments(make(few)[0])
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except Exception as error:
        raise _fails(type(model).__name__, few, error) from error
    finally:
        model.train(training)


def _fails(name: str, few: list[Tensor], error: Exception) -> NQMError:
    """An error of the model or loss in one line, with the data that it got."""
    let_through(error)
    given = [f"{str(t.dtype)[6:]} {tuple(t.shape[1:])}" for t in few]
    return NQMError(
        f"{name} fails on the first examples (inputs {', '.join(given[:-1])}; targets {given[-1]}, "
        f"each): {type(error).__name__}: {_words(error, 150)}"
    )


def _logits(small: EmpiricalRisk, few: list[Tensor], name: str) -> Tensor | None:
    """Logits of the first examples; None if there is not one vector of them for each label."""
    outputs: list[Any] = []

    def term(batch: Batch) -> Tensor:
        outputs.append(small.output(small.weights, batch[0]))
        return few[-1]

    _of_first(small, term, few, name)
    output = outputs[0]
    fits = isinstance(output, Tensor) and output.shape[:-1] == few[-1].shape
    return torch.as_tensor(output) if fits else None


def _check_weights_finite(risk: EmpiricalRisk, name: str) -> None:
    """Refuse a network that has diverged. A buffer may be infinite, as a mask is."""
    own = risk.named(risk.weights)
    for key, tensor in (dict(risk.model.named_parameters()) | own).items():
        if not bool(tensor.isfinite().all()):
            raise NQMError(
                f"{name}: {key} holds NaN or infinite numbers, as after a training that "
                "diverged; take an earlier checkpoint"
            )


def _check_loss_finite(risk: EmpiricalRisk, name: str) -> None:
    """Refuse data of which an example has no finite loss, and name the first such example."""
    if math.isfinite(loss := risk.loss()):
        return
    each = torch.cat(list(risk.over_batches(lambda b: risk.example_losses(risk.weights, b))))
    bad = (~each.isfinite()).nonzero().flatten().tolist()
    cause = "check the checkpoint and the data"
    if bad:
        at, found = bad[0], False
        for batch in risk.batches:
            tensors, _ = rows(batch)
            if at < len(tensors[-1]):
                found = any(bool(t[at].isnan().any()) for t in tensors if t.is_floating_point())
                break
            at -= len(tensors[-1])
        holds = "holds NaN" if found else "holds no NaN"
        cause = f"{len(bad)} have none that is finite; the first, number {bad[0]}, {holds}: {cause}"
    raise NQMError(f"{name}: its loss on the {risk.examples} measured examples is {loss}; {cause}")


def _check_apart(
    small: EmpiricalRisk, few: list[Tensor], make: MakeBatch, first: Tensor, name: str
) -> None:
    """Refuse a loss that is another one if an example is alone in its batch."""
    apart = [make([tensor[i : i + 1] for tensor in few]) for i in range(len(few[-1]))]

    def each(term: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat(list(small.over_batches(term, apart)))

    try:
        losses = each(lambda batch: small.example_losses(small.weights, batch))
    except ValueError as error:  # BatchNorm has no statistics of a single value
        raise _mixes(name, f" ({_words(error, 60)})") from None
    if _close(losses, first):
        return

    def output(batch: Batch) -> Tensor:
        found = small.output(small.weights, batch[0])
        return found if isinstance(found, Tensor) else losses.new_full((1,), torch.nan)

    whole, alone = torch.cat(list(small.over_batches(output))), each(output)
    if whole.shape == alone.shape and bool(torch.isfinite(whole).all()) and _close(alone, whole):
        raise NQMError(
            "loss: an example's loss depends on the others of its batch, and its output does not: "
            f"outputs of shape {tuple(whole.shape)} with targets of shape "
            f"{tuple(few[-1].shape)} may be broadcast; let loss give each example its own, e.g. by "
            "output.squeeze(1)"
        )
    raise _mixes(name, "")


def _check_derivatives(small: EmpiricalRisk, name: str) -> None:
    """Compare the gradient with forward differentiation, examples' gradients, and the loss."""
    w = small.weights
    v = torch.randn(small.size, generator=torch.Generator().manual_seed(0)).to(w)
    slope = small.gradient() - small.decay_gradient(w)

    def through(batch: Batch) -> Tensor:
        # Within the plain kernels' mode, so that a padding row, which they detach, stays constant.
        with through_detach():
            return slope_along(lambda w: small.example_losses(w, batch).mean(), w, v)

    along = next(small.over_batches(through))
    room = 1e-8 if w.dtype == torch.float64 else 1e-4
    if float((slope @ v - along).abs()) > room * float(slope.norm() * v.norm()):
        raise NQMError(
            f"{name}: its gradient is not the derivative of its loss (detach, no_grad, or a "
            "straight-through estimator); select weights that it does not concern, or change "
            "the model"
        )
    mean = torch.cat(list(small.example_gradients())).mean(0)
    if float((mean - slope).norm()) > 10.0 * room * float(slope.norm()):
        raise NQMError(f"{name}: torch's gradients of single examples are wrong; report it")
    bend = float(v @ small.curvature_product(v))
    if _jumps(small, v, float(small.gradient() @ v), bend):
        raise NQMError(
            f"{name}: its loss jumps when weights change by {JUMPS[-1]:g} of their size (rounding, "
            "int() or a threshold), and derivatives do not tell; select weights that it does not "
            "concern, or change the model"
        )


def _jumps(small: EmpiricalRisk, v: Tensor, slope: float, bend: float) -> bool:
    """Whether tiny displacements along v change the loss by more than its derivatives allow."""
    w = small.weights
    whole = small.model_weights(w)
    unit = float(whole.norm()) / max(float((small.model_weights(w + v) - whole).norm()), 1e-30)
    start = small.loss()

    def jumps(size: float) -> bool:
        first, second = size * slope, 0.5 * size**2 * bend
        room = abs(first) + abs(second) + 1e-4 * (1.0 + abs(start))
        changes = [small.loss(w + sign * size * v) - start for sign in (1.0, -1.0)]
        return not max(map(abs, changes)) <= 2.0 * room

    return all(jumps(size * unit) for size in JUMPS)


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether losses are equal up to rounding."""
    double = one.dtype == torch.float64
    return torch.allclose(
        one, other, rtol=1e-6 if double else 1e-3, atol=1e-10 if double else 1e-5, equal_nan=True
    )


def _mixes(name: str, reason: str) -> NQMError:
    return NQMError(
        f"{name}: an example's loss depends on the others of its batch{reason}, so that single "
        "examples have no gradients: BatchNorm needs running statistics or groups of a "
        "BatchNormRisk, and the batch must be the first axis"
    )


def _words(error: Exception, most: int) -> str:
    """The text of an error in one line."""
    return f"{' '.join(str(error).split()):.{most}}"
