"""A trained network's loss as a function of some of its weights: slopes, curvature, noise.

Everything is a derivative of one function, the mean loss over fixed data, in the flat vector w of
the selected weights; the other weights, running statistics included, stay as they are. Derivatives
are taken in evaluation mode: in training mode BatchNorm makes the loss a function of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vmap

from neural.fused import arguments
from neural.ggn import ggn_matrix, ggn_product
from neural.late_phase import Batch
from neural.select import select as resolve
from nqm.errors import NQMError, check_number, check_word

#: (output, targets) -> one loss per example, shape (B,).
ExampleLoss = Callable[[Tensor, Tensor], Tensor]

#: What may be taken as the curvature: all of it, or the generalised Gauss-Newton part.
CURVATURES = ("hessian", "ggn")

#: Rows of a dense Hessian that are computed at once: memory goes with them.
HESSIAN_ROWS = 32
#: Numbers of examples' own gradients that are held at once.
GRADIENT_NUMBERS = 2**26


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example, shape (B,), nats; of a text's window the mean over symbols."""
    flat = nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view(len(targets), -1).mean(1)


class Landscape:
    """Mean loss over fixed data as a function of a flat vector of weights.

    Parameters
    ----------
    model : Module
        Left as it is; evaluated in evaluation mode.
    batches : sequence of (inputs, targets)
        The data, always in this order; one batch is in work at a time.
    select : str or iterable of str
        Which weights (see `neural.select.select`): ``"all"``, or the late-phase coordinates alone.
    loss : callable
        One loss per example.
    weight_decay : float
        Adds weight_decay / 2 |w|^2, which is part of the curvature and no noise.
    curvature : {"hessian", "ggn"}
        What `curvature_product` and `curvature_matrix` give, and with them all that asks for
        curvature: the Hessian, or the generalised Gauss-Newton matrix (`neural.ggn`), which has no
        negative eigenvalues where the loss is convex in the output.

    Attributes
    ----------
    size : int
        Weights p.
    examples : int
        N.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        select: str | Iterable[str] = "all",
        *,
        loss: ExampleLoss = cross_entropy,
        weight_decay: float = 0.0,
        curvature: str = "hessian",
    ):
        check_number("weight_decay", weight_decay, low=0.0)
        check_word("curvature", curvature, CURVATURES)
        if not batches:
            raise NQMError("a landscape needs data; got no batch")
        self.model, self.batches, self.example_loss = model, batches, loss
        self.weight_decay, self.curvature = weight_decay, curvature
        names = resolve(model, select).parameters
        self.shapes = {name: model.get_parameter(name).shape for name in names}
        self.weights = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        self.size = self.weights.numel()
        self.examples = sum(len(targets) for _, targets in batches)

    def at(self, weights: Tensor) -> Landscape:
        """The same function, with derivatives taken elsewhere."""
        moved = copy.copy(self)
        moved.weights = weights
        return moved

    def on(self, batches: Sequence[Batch]) -> Landscape:
        """The same model on other data, without weight decay: test loss, for one."""
        moved = copy.copy(self)
        moved.batches, moved.weight_decay = batches, 0.0
        moved.examples = sum(len(targets) for _, targets in batches)
        return moved

    # --- the function and its derivatives, of one batch ----------------------------------------

    def _output(self, w: Tensor, inputs: Any) -> Tensor:
        """The model's output at w, shape (B, ...)."""
        args, kwargs = arguments(inputs)
        output: Tensor = functional_call(self.model, self._named(w), args, kwargs)
        return output

    def _losses(self, w: Tensor, batch: Batch) -> Tensor:
        """Losses of a batch's examples at w, shape (B,)."""
        inputs, targets = batch
        return self.example_loss(self._output(w, inputs), targets)

    def _named(self, w: Tensor) -> dict[str, Tensor]:
        parts = torch.split(w, [shape.numel() for shape in self.shapes.values()])
        return {n: p.view(shape) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in evaluation mode, and afterwards as it was."""
        modes = {module: module.training for module in self.model.modules()}
        try:
            self.model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _over_batches(
        self, term: Callable[[Batch], Tensor], batches: Iterable[Batch] | None = None
    ) -> Iterator[Tensor]:
        """A term of every batch, in evaluation mode."""
        with self.evaluating():
            for batch in self.batches if batches is None else batches:
                with torch.no_grad():  # derivatives are those of torch.func alone
                    found = term(batch)
                yield found

    def _total(self, term: Callable[[Batch], Tensor]) -> Tensor:
        """Sum of a term over batches."""
        return reduce(torch.add, self._over_batches(term))

    def _mean(self, of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Sum over batches of a functional of the batch's share of the mean loss."""
        return self._total(lambda batch: of(lambda w: self._losses(w, batch).sum() / self.examples))

    def mean_loss(self, w: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a minibatch at w, without weight decay; the mode is the caller's."""
        return self._losses(w, batch).mean()

    # --- mean loss -------------------------------------------------------------------------------

    def loss(self, w: Tensor | None = None) -> float:
        """Mean loss, weight decay included."""
        at = self.weights if w is None else w
        return float(self._mean(lambda f: f(at))) + self._decay(at)

    def _decay(self, w: Tensor) -> float:
        """Weight decay's part of the loss."""
        return 0.5 * self.weight_decay * float(w.detach().double().square().sum())

    def gradient(self, w: Tensor | None = None) -> Tensor:
        """Slope of the mean loss, shape (p,)."""
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Tensor | None = None) -> tuple[float, Tensor]:
        """Both, for the price of the slope."""
        at = self.weights if w is None else w

        def both(f: Callable[[Tensor], Tensor]) -> Tensor:
            slope, value = grad_and_value(f)(at)
            return torch.cat((slope, value[None]))

        found = self._mean(both)
        return float(found[-1]) + self._decay(at), found[:-1] + self.weight_decay * at

    def weighted_gradient(self, weights: Tensor) -> Tensor:
        """Sum of the examples' own gradients, each times a weight; without weight decay, (p,).

        With weights of mean 0 and variance 1 / (N - 1) it is a draw of one example's noise.
        """
        parts = iter(torch.split(weights, [len(targets) for _, targets in self.batches]))

        def term(batch: Batch) -> Tensor:
            share = next(parts)
            slope: Tensor = grad(lambda w: share @ self._losses(w, batch))(self.weights)
            return slope

        return self._total(term)

    # --- curvature -------------------------------------------------------------------------------

    def curvature_product(self, v: Tensor) -> Tensor:
        """The curvature that was chosen, times v, shape (p,)."""
        return self.ggn_product(v) if self.curvature == "ggn" else self.hessian_product(v)

    def curvature_matrix(self) -> Tensor:
        """All of the curvature that was chosen, shape (p, p), for few weights."""
        return self.ggn() if self.curvature == "ggn" else self.hessian()

    def hessian_product(self, v: Tensor) -> Tensor:
        """H v at the weights, shape (p,): a forward derivative of the gradient."""
        data: Tensor = self._mean(lambda f: _slope(grad(f), self.weights, v))
        return data + self.weight_decay * v

    def hessian(self) -> Tensor:
        """All of H, shape (p, p), for few weights."""
        units = torch.eye(self.size).to(self.weights)
        h = torch.cat(
            [vmap(self.hessian_product)(some) for some in torch.split(units, HESSIAN_ROWS)]
        )
        return 0.5 * (h + h.T)

    def ggn_product(self, v: Tensor) -> Tensor:
        """G v at the weights, shape (p,), weight decay included; see `neural.ggn`."""

        def term(batch: Batch) -> Tensor:
            inputs, targets = batch
            return ggn_product(
                lambda w: self._output(w, inputs),
                lambda output: self.example_loss(output, targets).sum() / self.examples,
                self.weights,
                v,
            )

        return self._total(term) + self.weight_decay * v

    def ggn(self) -> Tensor:
        """All of G, shape (p, p), float64, for few weights; weight decay included."""
        data = self._total(
            lambda batch: ggn_matrix(self._output, self.example_loss, self.weights, *batch)
        )
        return data / self.examples + self.weight_decay * torch.eye(self.size).to(data)

    def third(self, v: Tensor) -> Tensor:
        """Slope of v' H v as w moves, shape (p,): third derivatives, twice along v."""

        def bend(f: Callable[[Tensor], Tensor]) -> Tensor:
            def slope(w: Tensor) -> Tensor:
                return _slope(f, w, v)

            bent: Tensor = grad(lambda w: _slope(slope, w, v))(self.weights)
            return bent

        return self._mean(bend)

    # --- single examples -------------------------------------------------------------------------

    def example_gradients(self) -> Iterator[Tensor]:
        """Gradient of every example's own loss, some at a time, shape (b, p) each."""

        def one(x: Tensor, y: Tensor) -> Tensor:
            slope: Tensor = grad(lambda w: self._losses(w, (x[None], y[None]))[0])(self.weights)
            return slope

        rows = max(GRADIENT_NUMBERS // self.size, 1)
        some = (
            part
            for inputs, targets in self.batches
            for part in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True)
        )
        yield from self._over_batches(lambda part: vmap(one)(*part), some)


def _slope(f: Callable[[Tensor], Tensor], w: Tensor, v: Tensor) -> Tensor:
    """Derivative of f at w along v, by forward differentiation."""
    slope: Tensor = jvp(f, (w,), (v,))[1]
    return slope
