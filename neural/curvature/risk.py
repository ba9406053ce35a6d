"""A trained network's loss as a function of some of its weights, and its derivatives.

The function is the mean loss over fixed data; its argument is the flat vector w of the selected
weights. The other weights and the running statistics are constants. Derivatives are taken in
evaluation mode: in training mode BatchNorm makes the loss a function of the batch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from neural.curvature.checks import (
    check_model,
    check_output,
    check_risk,
    check_weights,
    no_derivative,
    one_tensor,
    slope_along,
)
from neural.curvature.example_losses import (
    ExampleLoss,
    check_batches,
    cross_entropy,
    is_cross_entropy,
)
from neural.curvature.examples import EachRow, MakeBatch, input_rows, joined, rows
from neural.curvature.ggn import JACOBIAN_ROWS, ggn_matrix, ggn_product
from neural.curvature.memory import PASSES, fitting, kept_bytes
from neural.curvature.plain_kernels import plain_kernels
from neural.evaluate.precision import full_float32
from neural.late_phase.members import Batch
from neural.late_phase.rows import arguments
from neural.late_phase.select import select as resolve
from neural.late_phase.swap import call, places
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.runs.interrupts import let_through

#: Matrices that may be used as the curvature: the Hessian, or the generalised Gauss-Newton matrix.
CURVATURES = ("hessian", "ggn")

#: Rows of a dense Hessian that are computed together; memory is proportional to them.
HESSIAN_ROWS = 32
#: Work of a Hessian product, and of one of several together, in gradients: about, as measured on
#: a convolutional net (3.9 and 1.9).
PRODUCT, TOGETHER = 4, 2
#: Largest number of entries of single examples' gradients that are in memory together.
GRADIENT_NUMBERS = 2**26
#: Messages of torch if a derivative does not exist, or an operation does not work within `vmap`.
_MISSING = re.compile(
    "forward AD|derivative for|implemented|double backward|atching rule|vmap|functorch|torch.func|"
    "modified inplace|in-?place operation"
)


class EmpiricalRisk:
    """Mean loss over fixed data as a function of a flat vector of weights.

    ``L(w) = 1/N sum_n loss(model(x_n; w), y_n) + weight_decay / 2 |w|^2``, the last term without
    the weights that `no_decay` selects.

    Parameters
    ----------
    model : Module
        The network. It is run in evaluation mode and is not changed.
    batches : sequence of (inputs, targets)
        The data, always read in this order and one batch at a time. Inputs are a tensor, or a tuple
        or mapping of the model's arguments (see `neural.curvature.examples`); targets are a tensor.
    select : str or iterable of str
        Weights that w consists of (see `neural.late_phase.select.select`); ``"all"`` by default.
    loss : callable
        ``loss(output, targets)`` returns one loss per example, shape (B,). By default
        `cross_entropy`; then every example must have the same number of labels other than -100.
    weight_decay : float
        Coefficient of the L2 term, at least 0. The term contributes to gradient and curvature, not
        to the gradient noise.
    no_decay : str
        Weights without decay (see `neural.late_phase.select.select`); none by default.
    curvature : {"hessian", "ggn"}
        Matrix that `curvature_product` and `curvature_matrix` compute, and with them every
        measurement of curvature: the Hessian, or the generalised Gauss-Newton matrix (see
        `neural.curvature.ggn`), which has no negative eigenvalues if the loss is convex in the
        output.

    Attributes
    ----------
    weights : Tensor, shape (p,)
        Weights at which derivatives are taken; at first those of the model.
    frame : (Tensor, Tensor), optional
        Origin and scale of the coordinates, shape (p,) each (`rescaled`); none by default.
    curvature_batches : list of (inputs, targets), optional
        Data of `curvature_product` (`with_curvature_of`); all data by default.
    factors : sequence of Tensor, optional
        For each batch, the weights of its examples in the loss (`sampled`); 1/N by default.
    undecayed : frozenset of str
        Names of the weights that `no_decay` selects.
    decay_ratios : Tensor, shape (p,), optional
        Factor of every weight's decay, if the risk is `decaying`.
    size : int
        Number of selected weights, p.
    examples : int
        Number of examples, N.

    Raises
    ------
    NQMError
        If the weights are not all float32 or all float64 on one device, if there is no batch, or if
        targets do not fit the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        select: str | Iterable[str] = "all",
        *,
        loss: ExampleLoss = cross_entropy,
        weight_decay: float = 0.0,
        no_decay: str = "",
        curvature: str = "hessian",
    ):
        check_model(model)
        check_number("weight_decay", weight_decay, low=0.0)
        check_word("curvature", curvature, CURVATURES)
        self.model, self.example_loss = model, loss
        self.weight_decay, self.curvature = weight_decay, curvature
        names = resolve(model, select).parameters
        check_weights({name: model.get_parameter(name) for name in names})
        self.places = places(model, names)
        self.shapes = {name: model.get_parameter(name).shape for name in names}
        self.weights = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        self.frame: tuple[Tensor, Tensor] | None = None
        self.decay_ratios: Tensor | None = None
        self.curvature_batches: list[Batch] | None = None
        self.factors: Sequence[Tensor] | None = None
        without = resolve(model, no_decay).parameters if no_decay else ()
        self.undecayed = frozenset(self.shapes) & frozenset(without)
        self._decayed: float | Tensor = 1.0
        if self.undecayed:
            parts = [
                torch.full((shape.numel(),), float(name not in self.undecayed))
                for name, shape in self.shapes.items()
            ]
            self._decayed = torch.cat(parts).to(self.weights)
        #: Whether torch is right in batches of products, once it is known; shared by copies.
        self._right_together: dict[str, bool] = {}
        self.size = self.weights.numel()
        self._take(batches)

    def _take(self, batches: Iterable[Batch]) -> None:
        """Store the data, which is read many times, as a list."""
        self.batches = list(batches)
        check_batches(self.batches, self.example_loss)
        if is_cross_entropy(self.example_loss):
            self.batches = [(inputs, labels.long()) for inputs, labels in self.batches]
        self.examples = sum(len(targets) for _, targets in self.batches)
        self._sound = False
        self._kept: float | None = None

    def at(self, weights: Tensor) -> EmpiricalRisk:
        """The same function, with derivatives taken at other weights.

        Parameters
        ----------
        weights : Tensor, shape (p,)
            The other weights.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and data.
        """
        moved = copy.copy(self)
        moved.weights = weights
        return moved

    def with_curvature_of(self, batches: int) -> EmpiricalRisk:
        """The same loss, with products of the curvature of its first batches alone.

        They cost less; loss, gradients and noise stay those of all examples. The dense matrix does
        not change.

        Parameters
        ----------
        batches : int
            Number of batches, at least 1.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and data.
        """
        check_integer("batches", batches, 1)
        moved = copy.copy(self)
        moved.curvature_batches = self.batches[:batches] if batches < len(self.batches) else None
        return moved

    def in_one_batch(self) -> EmpiricalRisk:
        """The same loss, with all examples in one batch: a small network takes fewer calls so.

        Results change by rounding; products of the curvature keep their data.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares the model.
        """
        moved = copy.copy(self)
        tensors, make = joined(self.batches)
        moved._take([make(tensors)])
        return moved

    def rescaled(self, scale: Tensor) -> EmpiricalRisk:
        """The same loss in the coordinates u, w = weights + scale u, which start at 0.

        SGD at rate lr in u is SGD on w with the rate lr scale^2 of every weight. A scale of 0 holds
        a weight fixed: slope, curvature and noise are 0 along it.

        Parameters
        ----------
        scale : Tensor, shape (p,)
            At least 0.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and data.
        """
        moved = copy.copy(self)
        origin, before = self.weights, torch.ones_like(self.weights)
        if self.frame is not None:
            origin, before = self.model_weights(self.weights), self.frame[1]
        moved.frame = (origin, before * scale.to(self.weights))
        moved.weights = torch.zeros_like(self.weights)
        return moved

    def decaying(self, ratios: Tensor) -> EmpiricalRisk:
        """The same loss with another weight decay for every weight.

        Parameters
        ----------
        ratios : Tensor, shape (p,)
            Factors of `weight_decay`, at least 0.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and data.
        """
        moved = copy.copy(self)
        moved.decay_ratios = ratios.to(self.weights)
        return moved

    def model_weights(self, w: Tensor) -> Tensor:
        """Weights of the model at a point of the risk's coordinates.

        Parameters
        ----------
        w : Tensor, shape (..., p)
            The point; the weights themselves unless the risk is `rescaled`.

        Returns
        -------
        Tensor, shape (..., p)
        """
        return w if self.frame is None else self.frame[0] + self.frame[1] * w

    def coordinates(self, weights: Tensor) -> Tensor:
        """Inverse of `model_weights`; 0 for weights that are held fixed.

        Parameters
        ----------
        weights : Tensor, shape (..., p)
            Weights of the model.

        Returns
        -------
        Tensor, shape (..., p)
        """
        if self.frame is None:
            return weights
        origin, scale = self.frame
        return torch.where(scale > 0.0, (weights - origin) / scale, torch.zeros_like(origin))

    @property
    def _decay_rates(self) -> float | Tensor:
        """Weight decay of each weight, shape (p,), or of all."""
        rates = self.weight_decay * self._decayed
        return rates if self.decay_ratios is None else rates * self.decay_ratios

    def decay_gradient(self, w: Tensor) -> Tensor:
        """Gradient of the L2 term.

        Parameters
        ----------
        w : Tensor, shape (..., p)
            Weights.

        Returns
        -------
        Tensor, shape (..., p)
        """
        slope = self._decay_rates * self.model_weights(w)
        return slope if self.frame is None else self.frame[1] * slope

    def _decay_product(self, v: Tensor) -> Tensor:
        """Product of the L2 term's Hessian with a vector."""
        return self._decay_rates * (v if self.frame is None else self.frame[1] ** 2 * v)

    def on(self, batches: Sequence[Batch]) -> EmpiricalRisk:
        """The loss of the same model on other data, without weight decay; e.g. a test loss.

        It has no label smoothing either.

        Parameters
        ----------
        batches : sequence of (inputs, targets)
            The other data.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and weights.

        Raises
        ------
        NQMError
            If there is no batch, or targets do not fit.
        """
        moved = copy.copy(self)
        moved.curvature_batches = moved.factors = None
        moved.weight_decay, moved._decayed, moved.undecayed = 0.0, 1.0, frozenset()
        if is_cross_entropy(self.example_loss):
            moved.example_loss = cross_entropy
        moved._take(batches)
        return moved

    def sampled(self, batches: Sequence[Batch], factors: Sequence[Tensor]) -> EmpiricalRisk:
        """The same loss, estimated from some of its examples.

        Parameters
        ----------
        batches : sequence of (inputs, targets)
            The examples.
        factors : sequence of Tensor, shape (b,)
            For each batch, the weights of its examples in the loss, in place of 1/N each.

        Returns
        -------
        EmpiricalRisk
            A shallow copy for `loss`, `gradient` and `curvature_product`; weight decay is included.
        """
        moved = copy.copy(self)
        moved.batches, moved.factors, moved.curvature_batches = list(batches), list(factors), None
        moved.examples = sum(len(targets) for _, targets in batches)
        return moved

    def example_bytes(self) -> float:
        """Memory of the second derivatives of one example's loss, by what a forward pass keeps.

        Returns
        -------
        float
            Bytes, without those of the weights.
        """
        if self._kept is None:
            inputs = self.batches[0][0]
            tensors, make = input_rows(inputs, len(self.batches[0][1]))
            few = make([tensor[:2].clone() for tensor in tensors])  # a slice keeps the whole batch
            weights = self.weights.clone().requires_grad_()
            with self.evaluating():
                kept = kept_bytes(self.model, lambda: self.output(weights, few))
            self._kept = PASSES * kept / min(2, len(self.batches[0][1]))
        return self._kept

    def check(self) -> None:
        """Check that the loss is finite and, on the first two examples, that it can be measured.

        Raises
        ------
        NQMError
            See `neural.curvature.checks.check_risk`.
        """
        if not self._sound:
            check_risk(self)
            self._sound = True

    def of_examples(self, batch: Batch) -> EmpiricalRisk:
        """The mean loss of other examples, with the same weight decay; it is not checked.

        Parameters
        ----------
        batch : (inputs, targets)
            The examples.

        Returns
        -------
        EmpiricalRisk
            A shallow copy that shares model and weights.
        """
        moved = copy.copy(self)
        moved.batches, moved.examples = [batch], len(batch[1])
        moved.curvature_batches = moved.factors = None
        moved._sound = True
        return moved

    # --- the function and its derivatives, of one batch ----------------------------------------

    def output(self, w: Tensor, inputs: Any) -> Tensor:
        """The model's output.

        Parameters
        ----------
        w : Tensor, shape (p,)
            Weights.
        inputs : object
            Inputs of a batch.

        Returns
        -------
        Tensor, shape (B, ...), or what else the model gives
        """
        args, kwargs = arguments(inputs)
        output: Tensor = call(self.model, self.places, self.named(w), args, kwargs)
        return output

    def example_losses(self, w: Tensor, batch: Batch) -> Tensor:
        """Losses of a batch's examples.

        Parameters
        ----------
        w : Tensor, shape (p,)
            Weights.
        batch : (inputs, targets)

        Returns
        -------
        Tensor, shape (B,)

        Raises
        ------
        NQMError
            If the loss gives anything else than one number for each example.
        """
        inputs, targets = batch
        output = self.output(w, inputs)
        if is_cross_entropy(self.example_loss):
            check_output(output, type(self.model).__name__)
        losses = self.example_loss(output, targets)
        if not isinstance(losses, Tensor) or losses.shape != (len(targets),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise NQMError(
                f"loss must give one number per example, shape ({len(targets)},); got {got}; with "
                "torch's losses take reduction='none'"
            )
        return losses

    def named(self, w: Tensor) -> dict[str, Tensor]:
        """Weights of the model by name.

        Parameters
        ----------
        w : Tensor, shape (p,)
            A point of the risk's coordinates.

        Returns
        -------
        dict of str to Tensor
        """
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(self.model_weights(w), sizes)
        return {n: p.view(shape) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode with plain kernels inside the block, then restore it.

        Float32 is computed in full, as errors of TF32 would be per cents of a Hessian product.

        Attributes that a forward pass sets on its modules are removed at the end: they would refer
        to a derivative that is finished.

        Yields
        ------
        None
        """
        saved = [(m, dict(vars(m)), dict(m._buffers)) for m in self.model.modules()]
        try:
            self.model.eval()
            with plain_kernels(), full_float32():
                yield
        finally:
            for module, attributes, buffers in saved:
                for name in vars(module).keys() - attributes.keys():
                    del vars(module)[name]
                vars(module).update(attributes)
                module._buffers.update(buffers)

    def over_batches(
        self, term: Callable[[Batch], Tensor], batches: Iterable[Batch] | None = None
    ) -> Iterator[Tensor]:
        """Compute a term of every batch, in evaluation mode.

        Parameters
        ----------
        term : callable
            Maps a batch to a tensor.
        batches : iterable of (inputs, targets), optional
            Those of the risk by default.

        Yields
        ------
        Tensor

        Raises
        ------
        NQMError
            If torch lacks a derivative.
        """
        for batch in self.batches if batches is None else batches:
            with self.evaluating(), torch.no_grad():  # derivatives are those of torch.func alone
                try:
                    value = term(batch)
                except RuntimeError as error:
                    let_through(error)
                    if not _MISSING.search(str(error)):
                        raise
                    raise no_derivative(type(self.model).__name__, error) from error
            yield value

    def _total(self, term: Callable[[Batch], Tensor]) -> Tensor:
        """Sum of a term over batches."""
        return reduce(torch.add, self.over_batches(term))

    def _mean(self, of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Sum over batches of a linear functional of the batch's summand of the mean loss."""
        summands = self._summands()

        def term(batch: Batch) -> Tensor:
            summand = next(summands)
            return of(lambda w: summand(self.example_losses(w, batch)))

        return self._total(term)

    def _summands(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each batch, the function of its examples' losses that is its summand of the loss."""
        if self.factors is None:
            yield from repeat(lambda losses: losses.sum() / self.examples)
        else:
            yield from (lambda losses, f=f: (losses * f).sum() for f in self.factors)

    def mean_loss(self, w: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a minibatch at w, without weight decay; the caller sets the model's mode.

        Parameters
        ----------
        w : Tensor, shape (p,)
            Weights.
        batch : (inputs, targets)
            The minibatch.

        Returns
        -------
        Tensor, scalar
            Differentiable in `w`.
        """
        return self.example_losses(w, batch).mean()

    # --- mean loss -------------------------------------------------------------------------------

    def loss(self, w: Tensor | None = None) -> float:
        """Mean loss, weight decay included.

        Parameters
        ----------
        w : Tensor, shape (p,), optional
            Weights; `weights` by default.

        Returns
        -------
        float
        """
        at = self.weights if w is None else w
        return float(self._mean(lambda f: f(at))) + self._decay(at)

    def loss_and_margins(self, w: Tensor) -> tuple[float, Tensor | None]:
        """Compute `loss` and the margins of all examples by one forward pass.

        Parameters
        ----------
        w : Tensor, shape (p,)
            Weights.

        Returns
        -------
        loss : float
        margins : Tensor of float64, shape (N,), or None
            Logit of the right class minus the largest of the others: an example is right if it is
            above 0. None unless an example has one label and one number for each of its classes.
        """
        margins: list[Tensor] = []

        def term(batch: Batch) -> Tensor:
            inputs, targets = batch
            output = self.output(w, inputs)
            if isinstance(output, Tensor) and output.ndim == 2 and targets.ndim == 1:
                right = output.gather(1, targets[:, None])
                others = output.scatter(1, targets[:, None], -torch.inf)
                margins.append((right[:, 0] - others.amax(1)).double())
            return self.example_loss(output, targets).sum() / self.examples

        total = float(self._total(term)) + self._decay(w)
        labelled = is_cross_entropy(self.example_loss) and margins
        return total, torch.cat(margins) if labelled else None

    def _decay(self, w: Tensor) -> float:
        """The L2 term of the loss."""
        squares = self.model_weights(w.detach()).double().square()
        return 0.5 * float((self._decay_rates * squares).sum())

    def gradient(self, w: Tensor | None = None) -> Tensor:
        """Gradient of the mean loss, weight decay included.

        Parameters
        ----------
        w : Tensor, shape (p,), optional
            Weights; `weights` by default.

        Returns
        -------
        Tensor, shape (p,)
        """
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Tensor | None = None) -> tuple[float, Tensor]:
        """Compute `loss` and `gradient` together, at the cost of the gradient.

        Parameters
        ----------
        w : Tensor, shape (p,), optional
            Weights; `weights` by default.

        Returns
        -------
        loss : float
        gradient : Tensor, shape (p,)
        """
        at = self.weights if w is None else w

        def both(f: Callable[[Tensor], Tensor]) -> Tensor:
            # torch.func.grad keeps a graph for further derivatives, at twice the cost.
            with torch.enable_grad():
                w = at.detach().requires_grad_()
                value = f(w)
                (slope,) = torch.autograd.grad(value, w)
            return torch.cat((slope, value.detach()[None]))

        joined = self._mean(both)
        return float(joined[-1]) + self._decay(at), joined[:-1] + self.decay_gradient(at)

    def weighted_gradient(self, weights: Tensor) -> Tensor:
        """Weighted sum of the examples' gradients, without weight decay.

        With independent random weights of variance 1 / (N - 1), from which their mean is
        subtracted, it is a random vector with the covariance of one example's gradient.

        Parameters
        ----------
        weights : Tensor, shape (N,)
            Factor of each example's gradient.

        Returns
        -------
        Tensor, shape (p,)
        """
        by_batch = iter(torch.split(weights, [len(targets) for _, targets in self.batches]))

        def term(batch: Batch) -> Tensor:
            factors = next(by_batch)
            slope: Tensor = grad(lambda w: factors @ self.example_losses(w, batch))(self.weights)
            return slope

        return self._total(term)

    # --- curvature -------------------------------------------------------------------------------

    def curvature_product(self, v: Tensor) -> Tensor:
        """Product of the chosen curvature (Hessian or Gauss-Newton) with a vector.

        Parameters
        ----------
        v : Tensor, shape (p,)
            The vector.

        Returns
        -------
        Tensor, shape (p,)
        """
        of = self
        if self.curvature_batches is not None:
            of = copy.copy(self)
            of.batches, of.curvature_batches = self.curvature_batches, None
            of.examples = sum(len(targets) for _, targets in of.batches)
        return of.ggn_product(v) if self.curvature == "ggn" else of.hessian_product(v)

    def curvature_products(
        self, vectors: Tensor, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Products of the chosen curvature with several vectors, which cost less together.

        Parameters
        ----------
        vectors : Tensor, shape (k, p)
            The vectors, as many at once as fit the memory.
        progress : callable, optional
            Called with the number of products done since the last call.

        Returns
        -------
        Tensor, shape (k, p)
        """
        largest = max(len(targets) for _, targets in self.curvature_batches or self.batches)
        count = fitting(largest * self.example_bytes(), HESSIAN_ROWS)
        products = EachRow(self.curvature_product)
        products.together = count > 1 and len(vectors) > 1 and self._right_together.get("all", True)
        found: list[Tensor] = []
        for part in torch.split(vectors, count):
            each = products(part)
            if products.together and "all" not in self._right_together:
                first = self.curvature_product(part[0])
                room = 1e-7 if first.dtype == torch.float64 else 1e-3
                right = float((each[0] - first).norm()) <= room * float(first.norm())
                products.together = self._right_together["all"] = right
                each = each if right else products(part)
            found.append(each)
            if progress is not None:
                progress(len(part))
        return torch.cat(found)

    @property
    def matrix_work(self) -> int:
        """Units of work of `curvature_matrix`, for a progress bar."""
        return self.examples if self.curvature == "ggn" else self.size

    def curvature_matrix(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """The chosen curvature (Hessian or Gauss-Newton) as a dense matrix, for few weights.

        Parameters
        ----------
        progress : callable, optional
            Called with the number of rows (or of examples, for the Gauss-Newton matrix) done since
            the last call; `matrix_work` in all.

        Returns
        -------
        Tensor, shape (p, p)
        """
        return self.ggn(progress) if self.curvature == "ggn" else self.hessian(progress)

    def hessian_product(self, v: Tensor) -> Tensor:
        """Product H v of the Hessian with a vector, weight decay included.

        Parameters
        ----------
        v : Tensor, shape (p,)
            The vector.

        Returns
        -------
        Tensor, shape (p,)
        """
        data: Tensor = self._mean(lambda f: slope_along(grad(f), self.weights, v))
        return data + self._decay_product(v)

    def hessian(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """The Hessian as a dense matrix, for few weights; weight decay included.

        Parameters
        ----------
        progress : callable, optional
            See `curvature_matrix`.

        Returns
        -------
        Tensor, shape (p, p)
        """
        products, h = EachRow(self.hessian_product), self.weights.new_empty(self.size, self.size)
        batch = max(len(targets) for _, targets in self.batches)
        count = fitting(batch * self.example_bytes(), HESSIAN_ROWS)
        for rows_of in torch.split(torch.arange(self.size), count):
            units = self.weights.new_zeros(len(rows_of), self.size)
            units[torch.arange(len(rows_of)), rows_of] = 1.0
            h[rows_of] = products(units)
            if progress is not None:
                progress(len(rows_of))
        self._check_matrix(h, self.hessian_product)
        return (h + h.T).mul_(0.5)

    def _check_matrix(self, matrix: Tensor, product: Callable[[Tensor], Tensor]) -> None:
        """Raise NQMError unless a matrix times a random vector is what a single product gives."""
        v = torch.randn(self.size, generator=torch.Generator().manual_seed(0)).to(self.weights)
        computed, expected = matrix.to(v) @ v, product(v)
        room = 1e-7 if v.dtype == torch.float64 else 1e-2
        if float((computed - expected).norm()) > room * float(matrix.norm() * v.norm()):
            raise NQMError(
                f"{type(self.model).__name__}: torch's derivatives in batches are wrong for one of "
                "its layers; ask for eigenpairs instead of the whole matrix"
            )

    def ggn_product(self, v: Tensor) -> Tensor:
        """Product G v of the Gauss-Newton matrix with a vector, weight decay included.

        See `neural.curvature.ggn`.

        Parameters
        ----------
        v : Tensor, shape (p,)
            The vector.

        Returns
        -------
        Tensor, shape (p,)
        """
        summands = self._summands()

        def term(batch: Batch) -> Tensor:
            inputs, targets = batch
            summand = next(summands)
            return ggn_product(
                lambda w: one_tensor(self.output(w, inputs)),
                lambda output: summand(self.example_loss(output, targets)),
                self.weights,
                v,
            )

        return self._total(term) + self._decay_product(v)

    def ggn(self, progress: Callable[[int], None] | None = None) -> Tensor:
        """The Gauss-Newton matrix as a dense matrix, for few weights; weight decay included.

        It is summed over small groups of examples, as many as fit the memory.

        Parameters
        ----------
        progress : callable, optional
            See `curvature_matrix`.

        Returns
        -------
        Tensor of float64, shape (p, p)
        """
        self.check()
        count = fitting(self.example_bytes() + 32.0 * self.size, JACOBIAN_ROWS)
        data = self._total(
            lambda batch: ggn_matrix(
                lambda w, inputs: one_tensor(self.output(w, inputs)),
                self.example_loss,
                self.weights,
                *batch,
                at_once=count,
                progress=progress,
            )
        )
        decay = self._decay_product(torch.ones_like(self.weights))
        g = data.div_(self.examples)
        g.diagonal().add_(decay)
        self._check_matrix(g, self.ggn_product)
        return g

    def third(self, v: Tensor) -> Tensor:
        """Third derivatives of the loss, twice along v: the gradient of v' H v in the weights.

        Parameters
        ----------
        v : Tensor, shape (p,)
            The direction.

        Returns
        -------
        Tensor, shape (p,)
        """

        def bend(f: Callable[[Tensor], Tensor]) -> Tensor:
            def slope(w: Tensor) -> Tensor:
                return slope_along(f, w, v)

            bent: Tensor = grad(lambda w: slope_along(slope, w, v))(self.weights)
            return bent

        return self._mean(bend)

    # --- single examples -------------------------------------------------------------------------

    def output_slopes(self, v: Tensor) -> Tensor:
        """Derivative of the model's outputs along a direction.

        Parameters
        ----------
        v : Tensor, shape (p,)

        Returns
        -------
        Tensor, shape (N, ...)
            Of every example's output, for example its logits.
        """

        def term(batch: Batch) -> Tensor:
            return slope_along(lambda w: self.output(w, batch[0]), self.weights, v)

        return torch.cat(list(self.over_batches(term)))

    def outputs(self) -> Tensor:
        """Compute the model's outputs.

        Returns
        -------
        Tensor, shape (N, ...)
        """
        return torch.cat(list(self.over_batches(lambda b: self.output(self.weights, b[0]))))

    def example_gradients(self) -> Iterator[Tensor]:
        """Gradient of every example's loss, without weight decay, in blocks of examples.

        Yields
        ------
        Tensor, shape (b, p)
            Gradients of the next b examples, in the order of the batches.
        """
        self.check()
        numbers = 2.0 * self.size * self.weights.element_size()
        size = fitting(self.example_bytes() + numbers, max(GRADIENT_NUMBERS // self.size, 1))
        for batch in self.batches:
            tensors, make = rows(batch)

            def gradient(*row: Tensor, make: MakeBatch = make) -> Tensor:
                alone = make([tensor[None] for tensor in row])
                slope: Tensor = grad(lambda w: self.example_losses(w, alone)[0])(self.weights)
                return slope

            blocks = zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
            yield from self.over_batches(EachRow(gradient).of, blocks)

    def example_products(self, directions: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean product of every example's own Hessian with a direction of its own.

        Parameters
        ----------
        directions : callable
            Maps gradients of examples, shape (b, p), to their directions, shape (b, p).

        Returns
        -------
        Tensor, shape (p,)
            Without weight decay.
        """
        gradients, total = self.example_gradients(), torch.zeros_like(self.weights)
        for batch in self.batches:
            tensors, make = rows(batch)

            def product(v: Tensor, *row: Tensor, make: MakeBatch = make) -> Tensor:
                alone = make([tensor[None] for tensor in row])
                return slope_along(
                    grad(lambda w: self.example_losses(w, alone)[0]), self.weights, v
                )

            each, one_by_one = EachRow(product), EachRow(product)
            one_by_one.together, start = False, 0
            while start < len(tensors[0]):
                own = directions(next(gradients))
                block: Any = (own, *(tensor[start : start + len(own)] for tensor in tensors))
                (products,) = self.over_batches(each.of, [block])
                if not start:  # as in `curvature_products`
                    head: Any = tuple(part[:1] for part in block)
                    (alone,) = self.over_batches(one_by_one.of, [head])
                    room = 1e-7 if alone.dtype == torch.float64 else 1e-3
                    if float((products[0] - alone[0]).norm()) > room * float(alone.norm()):
                        each = one_by_one
                        (products,) = self.over_batches(each.of, [block])
                total += products.sum(0)
                start += len(own)
        return total / self.examples
