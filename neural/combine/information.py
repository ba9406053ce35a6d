"""What data say about a model's weights: Fisher information, and the inputs of its layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from neural.curvature.example_losses import ExampleLoss, cross_entropy
from neural.curvature.risk import EmpiricalRisk
from neural.evaluate.predict import evaluating
from neural.late_phase.members import Batch
from nqm.errors import NQMError

#: Examples in one batch of second derivatives, which hold about 5 MB for each image in a ResNet-20.
BATCH = 128


def first_examples(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The first examples of some batches.

    Parameters
    ----------
    batches : iterable of (inputs, targets)
        Inputs are one tensor.
    count : int
        Examples at most.

    Returns
    -------
    list of (inputs, targets)

    Raises
    ------
    NQMError
        If there is no example.
    """
    taken: list[Batch] = []
    left = count
    for inputs, targets in batches:
        taken.append((inputs[:left], targets[:left]))
        left -= len(taken[-1][1])
        if left <= 0:
            break
    if not taken:
        raise NQMError("there is no batch to take examples from")
    return taken


def spread_examples(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Examples taken at equal distances from all batches, which may be sorted by class.

    Parameters
    ----------
    batches : iterable of (inputs, targets)
        Inputs are one tensor.
    count : int
        Examples at most.

    Returns
    -------
    list of (inputs, targets)
        Of at most `BATCH` examples each.

    Raises
    ------
    NQMError
        If there is no example.
    """
    held = list(batches)
    total = sum(len(targets) for _, targets in held)
    if not total:
        raise NQMError("there is no batch to take examples from")
    wanted = torch.linspace(0, total - 1, min(count, total)).round().long()
    taken, low = [], 0
    for inputs, targets in held:
        inside = wanted[(wanted >= low) & (wanted < low + len(targets))] - low
        low += len(targets)
        for rows in torch.split(inside.to(targets.device), BATCH):
            if len(rows):
                taken.append((inputs[rows], targets[rows]))
    return taken


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Batch],
    examples: int,
    *,
    seed: int = 0,
    loss: ExampleLoss = cross_entropy,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: mean square of each example's gradient.

    Under cross-entropy labels are drawn from the model's own predictions, which makes the mean the
    Fisher information; the labels of the data would make it the "empirical Fisher". Under any other
    loss the targets are used as they are.

    Parameters
    ----------
    model : Module
    batches : iterable of (inputs, targets)
    examples : int
        How many are taken.
    seed : int
        Of the labels.
    loss : callable
        One loss for each example, shape (B,).

    Returns
    -------
    dict of str to Tensor of float64
        By name of the parameter.
    """
    some = first_examples(batches, examples)
    if loss is cross_entropy:
        generator = torch.Generator().manual_seed(seed)
        some = [(x, _drawn(model, x, generator).to(y.device)) for x, y in some]
    risk = EmpiricalRisk(model, some, loss=loss)
    total = torch.zeros(risk.size, dtype=torch.float64)
    for gradients in risk.example_gradients():
        total += gradients.double().square().sum(0).cpu()
    parts = torch.split(total / risk.examples, [s.numel() for s in risk.shapes.values()])
    return {n: p.view(shape) for (n, shape), p in zip(risk.shapes.items(), parts, strict=True)}


def _drawn(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from a model's predictions."""
    with evaluating(model):
        probs = model(inputs).double().softmax(-1).cpu()
    flat = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
    return flat.view(probs.shape[:-1])


def input_grams(model: nn.Module, batches: Iterable[Batch], examples: int) -> dict[str, Tensor]:
    """X'X of the inputs of every linear layer and of every convolution, as one sees patches.

    Parameters
    ----------
    model : Module
    batches : iterable of (inputs, targets)
    examples : int
        How many are taken.

    Returns
    -------
    dict of str to Tensor of float64, shape (inputs, inputs)
        By name of the layer's weight. Convolutions in groups have none.
    """
    grams: dict[str, Tensor] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    hooks = []

    def watch(layer: nn.Linear | nn.Conv2d, name: str) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, args[0]).double()
            gram = (rows.T @ rows).cpu()
            grams[name] = grams[name] + gram if name in grams else gram

        hooks.append(layer.register_forward_pre_hook(before))

    for layer in model.modules():
        if isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
        ):
            watch(layer, names[id(layer.weight)])
    try:
        with evaluating(model):
            for inputs, _ in first_examples(batches, examples):
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def _rows(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight with, one row for each output position."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    padding = layer.padding if not isinstance(layer.padding, str) else None
    if padding is None:
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "same":
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            inputs = nn.functional.pad(inputs, sides)
        padding = (0, 0)
    patches = nn.functional.unfold(
        inputs,
        layer.kernel_size,
        layer.dilation,
        padding,
        layer.stride,
    )
    return patches.transpose(1, 2).flatten(0, 1)
