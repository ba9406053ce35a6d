"""The loss of soups and ensembles predicted from derivatives at one point.

About some weights, the members' mean for example, with offsets d_i, the logits of every example
are followed to first order, ``z_i = z + J d_i``, and the loss of these logits is computed as it is.
What their curvature adds is followed to second order: it is ``R = M - G``, with the Hessian H in
``M_ij = d_i' H d_j / 2``, and ``G_ij = mean_n (J d_i)' S (J d_j) / 2``, S = diag(p) - pp'.
For weights w that sum to 1, and l the mean cross-entropy::

    soup                  = L + l(z + sum_i w_i J d_i) - l(z) + w' R w
    mean member           = sum_i w_i (soup of member i alone)
    ensemble              = L + l(log sum_i w_i softmax(z_i)) - l(z) + w . diag R
    ensemble of logits    = L + l(z + sum_i w_i J d_i) - l(z) + w . diag R

To second order in d the third line is ``mean member - (w . diag F - w' F w) / 2``, F_ij the mean
over examples of the product of their losses' slopes along d_i and d_j: the law of an ensemble of
noisy weights. A model that is linear in its weights is predicted exactly, however far its members
lie. It takes N Hessian products and N forward derivatives, and evaluates no soup and no member.

BatchNorm statistics move the logits as weights do. A member has its own; those of a soup, computed
anew, are taken to follow the weights linearly, as fitted to the members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neural.combine.cells import Arrays
from neural.combine.pool import POOLS
from neural.curvature.risk import EmpiricalRisk
from neural.evaluate.metrics import IGNORED
from neural.late_phase.members import Batch
from neural.late_phase.swap import Place, places, swapped
from nqm.progress import Progress, counted

#: Returns the arrays of a part of the work by its name; computes them if it must.
Keep = Callable[[str, Callable[[], Arrays]], Arrays]
#: Mean error of the members' predicted losses, relative to their mean, up to which predictions of
#: soups and ensembles are believed.
RANGE = 0.1
_TENSORS = ("logits", "labels", "moves", "repaired", "bend")
#: Step for the derivative along statistics, which torch does not have; the error is its square.
_STEP = 1.0 / 64.0


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Model of the loss about some weights, along N offsets.

    Attributes
    ----------
    loss : float
        At these weights, in nats.
    logits : Tensor of float64, shape (n, C)
        At these weights, of n examples.
    labels : Tensor of int64, shape (n,)
    moves : Tensor of float64, shape (N, n, C)
        Derivatives of the logits along the offsets, J d_i, with each model's own statistics.
    repaired : Tensor of float64, shape (N, n, C)
        The same if statistics are computed anew for each model; equal to `moves` without BatchNorm.
    bend : Tensor of float64, shape (N, N)
        R_ij, the part of the second order that the logits' own curvature makes.
    """

    loss: float
    logits: Tensor
    labels: Tensor
    moves: Tensor
    repaired: Tensor
    bend: Tensor

    def arrays(self) -> Arrays:
        """All but the loss, as arrays.

        Returns
        -------
        dict of str to ndarray
        """
        return {name: getattr(self, name).numpy() for name in _TENSORS}

    @classmethod
    def of_arrays(cls, loss: float, arrays: Arrays) -> Surrogate:
        """Inverse of `arrays`.

        Parameters
        ----------
        loss : float
            In nats; on all data, where the derivatives are those of a part of it.
        arrays : dict of str to ndarray

        Returns
        -------
        Surrogate
        """
        return cls(loss, **{name: torch.from_numpy(arrays[name]) for name in _TENSORS})

    @property
    def offsets(self) -> int:
        """Number of offsets, N."""
        return len(self.bend)

    def _at(self, logits: Tensor) -> float:
        """Loss where the logits have changed to these, without their curvature."""
        return self.loss + _loss(logits, self.labels) - _loss(self.logits, self.labels)

    def soup(self, weights: Tensor, *, repaired: bool = False) -> float:
        """Loss of the weighted mean of models.

        Parameters
        ----------
        weights : Tensor of float64, shape (N,)
            Of the models at the offsets; sum to 1.
        repaired : bool
            Whether BatchNorm statistics are computed anew, instead of the mean of the models' own.

        Returns
        -------
        float
            In nats.
        """
        moves = self.repaired if repaired else self.moves
        moved = self.logits + torch.einsum("i,inc->nc", weights, moves)
        return self._at(moved) + float(weights @ self.bend @ weights)

    def mean_member(self, weights: Tensor) -> float:
        """Weighted mean of the models' losses.

        Parameters
        ----------
        weights : Tensor of float64, shape (N,)

        Returns
        -------
        float
            In nats.
        """
        units = torch.eye(self.offsets, dtype=torch.float64)
        return math.fsum(
            float(w) * self.soup(unit) for w, unit in zip(weights, units, strict=True) if w
        )

    def ensemble(self, weights: Tensor, pool: str = "probabilities") -> float:
        """Loss of the models' pooled predictions.

        Parameters
        ----------
        weights : Tensor of float64, shape (N,)
        pool : {"probabilities", "logits"}
            What is averaged.

        Returns
        -------
        float
            In nats.
        """
        members = ((self.logits + move).log_softmax(-1) for move in self.moves)
        pooled = POOLS[pool](members, weights)
        return self._at(pooled) + float(weights @ self.bend.diagonal())

    def holds(self, losses: Sequence[float]) -> bool:
        """Whether the losses of the first models come out, each of them.

        Their mean alone may by chance, far outside the quadratic range.

        Parameters
        ----------
        losses : sequence of float
            Measured losses of the models at the first offsets, in nats.

        Returns
        -------
        bool
            True if the mean error is at most `RANGE` times the mean loss.
        """
        units = torch.eye(self.offsets, dtype=torch.float64)[: len(losses)]
        predicted = np.array([self.soup(unit) for unit in units])
        return bool(np.abs(predicted - losses).mean() <= RANGE * np.mean(losses))


def make_surrogate(
    model: nn.Module,
    offsets: Tensor,
    batches: Sequence[Batch],
    statistics: Mapping[str, Tensor] | None = None,
    *,
    keep: Keep = lambda name, make: make(),
    progress: Progress | None = None,
) -> Surrogate:
    """Measure the surrogate about a model's weights.

    Parameters
    ----------
    model : Module
        In the middle. It is evaluated in evaluation mode: BatchNorm statistics stay as they are.
    offsets : Tensor, shape (N, p)
        Displacements of all parameters, in the order of ``model.named_parameters()``.
    batches : sequence of (inputs, targets)
        Data on which the loss is predicted.
    statistics : mapping of str to Tensor, shape (M, ...), optional
        Displacements of buffers of the models at the first M offsets; the others have none of their
        own. See `neural.combine.members.Members.buffer_offsets`.
    keep : callable
        Called as ``keep(name, make)`` for each part of the work, and returns the arrays of
        ``make()`` or what an earlier call with this name returned.
    progress : callable, optional
        Called as ``progress("derivatives", share)``.

    Returns
    -------
    Surrogate

    Raises
    ------
    NQMError
        If the model has no second derivatives.
    """
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)  # frozen weights differ between members as well
    try:
        risk = EmpiricalRisk(model, batches)
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(trainable[name])
    risk.check()
    more = counted(progress, "derivatives", 1.0 + len(offsets))

    def along(offset: Tensor) -> Arrays:
        bent = risk.hessian_product(offset).double().cpu()
        moved = risk.output_slopes(offset)
        return {"curvature": (0.5 * (wide @ bent)).numpy(), "move": moved.cpu().numpy()}

    def shifted(index: int) -> Arrays:
        moves = {name: rows[index] for name, rows in buffers.items()}
        return {"shift": _statistics_slope(risk, where, moves).cpu().numpy()}

    wide = offsets.double()
    buffers = statistics or {}
    where = places(model, buffers)
    start = keep("outputs", lambda: {"logits": risk.outputs().cpu().numpy()})
    more(1)
    rows, shifts = [], []
    for index, offset in enumerate(offsets.to(risk.weights)):
        rows.append(keep(f"offset {index}", partial(along, offset)))
        if index < min(map(len, buffers.values()), default=0):
            shifts.append(keep(f"statistics {index}", partial(shifted, index)))
        more(1)
    labels = torch.cat([targets for _, targets in batches]).flatten().cpu()
    judged = labels != IGNORED

    def flat(one: NDArray[Any]) -> Tensor:
        return torch.from_numpy(one).flatten(0, -2).double()[judged]

    logits, labels = flat(start["logits"]), labels[judged]
    moves = torch.stack([flat(row["move"]) for row in rows])
    m = torch.from_numpy(np.stack([row["curvature"] for row in rows]))
    bend = 0.5 * (m + m.T) - _gauss_newton(logits, moves)
    own = repaired = moves
    if shifts:
        shift = torch.stack([flat(one["shift"]) for one in shifts])
        follow = torch.einsum("im,mnc->inc", _linear_fit(wide, len(shift)), shift)
        repaired = moves + follow
        own = torch.cat((moves[: len(shift)] + shift, repaired[len(shift) :]))
    return Surrogate(_loss(logits, labels), logits, labels, own, repaired, bend)


def _statistics_slope(
    risk: EmpiricalRisk, where: Mapping[str, tuple[Place, ...]], moves: Mapping[str, Tensor]
) -> Tensor:
    """Derivative of the outputs along buffers, shape (n, ...).

    Steps go towards the member alone, where a variance stays positive.
    """

    def at(step: float) -> Tensor:
        here = {name: getattr(*where[name][0]) for name in moves}
        there = {name: here[name] + step * move.to(here[name]) for name, move in moves.items()}
        with swapped(where, there):
            return risk.outputs()

    return (4.0 * at(_STEP) - at(2.0 * _STEP) - 3.0 * at(0.0)) / (2.0 * _STEP)


def _linear_fit(offsets: Tensor, first: int) -> Tensor:
    """What multiplies the first models' displacements so as to give all, fitted with a constant.

    Shape (N, first): rows of P with ``P @ shift = S offset``, S the linear map of least norm that
    fits ``shift_i = a + S offset_i`` at the first models.
    """
    centered = offsets[:first] - offsets[:first].mean(0)
    gram = centered @ centered.T
    fit = torch.linalg.pinv(gram, rtol=1e-9, hermitian=True)
    fitted: Tensor = offsets @ centered.T @ fit
    return fitted - fitted.mean(1, keepdim=True)


def _gauss_newton(logits: Tensor, moves: Tensor) -> Tensor:
    """G_ij, the second order that the softmax's curvature makes, shape (N, N)."""
    p = logits.softmax(-1)
    scaled = p.sqrt() * (moves - (p * moves).sum(-1, keepdim=True))
    rows = scaled.flatten(1)
    return 0.5 * (rows @ rows.T) / len(logits)


def _loss(logits: Tensor, labels: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits, labels))
