"""Replacements of torch's fused kernels in plain operations, for higher derivatives.

Torch's fused kernels have a first backward derivative only. Hessian products and forward
derivatives through attention, recurrent layers and weight normalisation end in an error; on a GPU
recurrent layers have no gradient in evaluation mode. Other kernels are silently wrong: layer and
instance normalisation lose terms of third derivatives, and PReLU mixes up the derivatives of single
examples (torch 2.13). The same functions in plain operations have derivatives of all orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nqm.errors import NQMError

#: One time step: (input's contribution to the gates, states, weights) -> new states; the first of
#: them is the output.
Step = Callable[[Tensor, tuple[Tensor, ...], Sequence[Tensor]], tuple[Tensor, ...]]


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Run torch's fused functions in plain operations inside the block.

    Yields
    ------
    None
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), _Instead(_PLAIN):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def through_detach() -> TorchFunctionMode:
    """Make ``detach`` keep derivatives inside the block.

    If a derivative differs from the one outside the block, the model detaches a tensor that
    matters.

    Returns
    -------
    TorchFunctionMode
        To be used in a ``with`` statement.
    """
    return _Instead(dict.fromkeys(_DETACH, torch.clone))


class _Instead(TorchFunctionMode):
    """Replace some of torch's functions inside a ``with`` block."""

    def __init__(self, functions: dict[Any, Callable[..., Any]]):
        super().__init__()
        self.functions = functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.functions.get(func, func)(*args, **(kwargs or {}))


# --- recurrent layers: one step of each kind, as torch.nn documents it ---------------------


def _lstm_step(
    gates: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    hidden, cell = states
    enter, forget, new, out = (gates + _linear(hidden, weights)).chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    hidden = out.sigmoid() * cell.tanh()
    if len(weights) in (3, 5):  # the last of the weights is a projection
        hidden = functional.linear(hidden, weights[-1])
    return hidden, cell


def _gru_step(
    gates: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    (hidden,) = states
    reset, update, new = gates.chunk(3, -1)
    reset_h, update_h, new_h = _linear(hidden, weights).chunk(3, -1)
    update = (update + update_h).sigmoid()
    new = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (new + update * (hidden - new),)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    def step(
        gates: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        return (activation(gates + _linear(states[0], weights)),)

    return step


def _linear(hidden: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """W_hh h + b_hh; weights are W_ih, W_hh and, if there are biases, b_ih, b_hh."""
    return functional.linear(hidden, weights[1], weights[3] if len(weights) > 3 else None)


def _layers(step: Step, states_of: int) -> Callable[..., Any]:
    """Replace `torch.lstm` (two states) or `torch.gru`, `torch.rnn_tanh`, ... (one state)."""

    def layers(  # noqa: PLR0913 - the arguments of torch
        x: Tensor,
        start: Any,
        weights: Sequence[Tensor],
        biases: bool,
        count: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: Any = None,
    ) -> tuple[Tensor, ...]:
        if not isinstance(biases, bool):  # (data, batch_sizes, states, weights, ...)
            raise NQMError(
                "a packed sequence in a recurrent layer has no second derivatives here; give the "
                "padded tensor, and leave padded positions out of the loss"
            )
        starts = (start,) if isinstance(start, Tensor) else tuple(start)
        directions = 2 if bidirectional else 1
        own = len(weights) // (count * directions)
        x = x.transpose(0, 1) if batch_first else x
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(count):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                layer_weights = weights[index * own : (index + 1) * own]
                states = tuple(state[index] for state in starts)
                output, states = _along(step, x, states, layer_weights, backwards=direction == 1)
                outputs.append(output)
                ends.append(states)
            x = torch.cat(outputs, -1)
            if dropout and layer < count - 1:
                x = functional.dropout(x, dropout, training)
        x = x.transpose(0, 1) if batch_first else x
        return x, *(torch.stack([end[i] for end in ends]) for i in range(states_of))

    return layers


def _along(
    step: Step, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Tensor], *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Outputs (L, B, hidden) of one layer in one direction, and its last states."""
    gates = functional.linear(x, weights[0], weights[2] if len(weights) > 3 else None)
    outputs = []
    for gate in reversed(gates.unbind()) if backwards else gates.unbind():
        states = step(gate, states, weights)
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if backwards else outputs), states


def _cell(step: Step) -> Callable[..., Any]:
    """Replace `torch.lstm_cell`, `torch.gru_cell`, ..."""

    def cell(x: Tensor, start: Any, *weights: Tensor | None) -> Any:
        present = [weight for weight in weights if weight is not None]
        gates = functional.linear(x, present[0], present[2] if len(present) > 3 else None)
        single = isinstance(start, Tensor)
        states = step(gates, (start,) if single else tuple(start), present)
        return states[0] if single else states

    return cell


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _rnn_step(torch.tanh),
    "rnn_relu": _rnn_step(torch.relu),
}


# --- embeddings, normalisation and activations ---------------------------------------------------


def _embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; the row of `padding_idx` has no gradient, as in torch."""
    if max_norm is not None or scale_grad_by_freq:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return functional.embedding(indices, weight, *options)
    rows = torch.embedding(weight, indices)
    if padding_idx is None:
        return rows
    padded = indices == (padding_idx if padding_idx >= 0 else padding_idx + len(weight))
    return torch.where(padded[..., None], rows.detach(), rows)


def _standard(x: Tensor, over: Sequence[int], eps: float) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over some axes."""
    variance, mean = torch.var_mean(x, tuple(over), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = _standard(x, range(x.ndim - len(shape), x.ndim), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _instance_norm(  # noqa: PLR0913 - the arguments of torch
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return torch.batch_norm(
            x, weight, bias, running_mean, running_var, False, momentum, eps, False
        )
    y = _standard(x, range(2, x.ndim), eps)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _group_norm(x: Tensor, groups: int, *options: Any, **named: Any) -> Tensor:
    """Torch's forward derivative of it takes a view, which channels-last images do not have."""
    return functional.group_norm(x.contiguous(), groups, *options, **named)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    over = [axis for axis in range(v.ndim) if axis != dim % v.ndim] if dim != -1 else None
    return v * (g / v.square().sum(over, keepdim=True).sqrt())


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    shared = weight.numel() == 1
    slope = weight.view(()) if shared else weight.view(-1, *(1,) * (x.ndim - 2))
    return torch.where(x > 0, x, slope * x)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


_PLAIN: dict[Any, Callable[..., Any]] = {
    getattr(torch, name): _layers(step, 2 if name == "lstm" else 1) for name, step in _STEPS.items()
}
_PLAIN |= {getattr(torch, f"{name}_cell"): _cell(step) for name, step in _STEPS.items()}
_PLAIN |= {
    functional.embedding: _embedding,
    torch.layer_norm: _layer_norm,
    functional.layer_norm: _layer_norm,
    torch.instance_norm: _instance_norm,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
    torch._weight_norm: _weight_norm,
    torch.prelu: _prelu,
    functional.prelu: _prelu,
    functional.glu: _glu,
}

_DETACH = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
