"""The loss of soups and ensembles predicted from derivatives at one point.

About some weights, the members' mean for example, with offsets d_i, everything to second order is
in ``g_i = gradient . d_i``, ``M_ij = d_i' H d_j / 2`` and ``F_ij = mean_n (g_n . d_i)(g_n . d_j)``,
g_n the gradient of one example's loss. For weights w that sum to 1 and cross-entropy::

    soup         = L + g.w + w' M w
    mean member  = L + g.w + w . diag M
    ensemble     = mean member - (w . diag F - w' F w) / 2

It takes one gradient, N Hessian products and N forward derivatives, and no evaluation of a soup or
of a member. The last line is the second order of log-mean-exp over members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from neural.combine.cells import Arrays
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.members import Batch
from nqm.progress import Progress, counted

#: Returns the arrays of a part of the work by its name; computes them if it must.
Keep = Callable[[str, Callable[[], Arrays]], Arrays]
#: Mean error of the members' predicted losses, relative to their mean, up to which predictions of
#: soups and ensembles are believed.
RANGE = 0.1


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Second-order model of the loss about some weights, along N offsets.

    Attributes
    ----------
    loss : float
        At these weights, in nats.
    slope : Tensor of float64, shape (N,)
        g_i.
    curvature : Tensor of float64, shape (N, N)
        M_ij.
    second : Tensor of float64, shape (N, N)
        F_ij.
    """

    loss: float
    slope: Tensor
    curvature: Tensor
    second: Tensor

    def soup(self, weights: Tensor) -> float:
        """Loss of the weighted mean of models.

        Parameters
        ----------
        weights : Tensor of float64, shape (N,)
            Of the models at the offsets; sum to 1.

        Returns
        -------
        float
            In nats.
        """
        return self.loss + float(self.slope @ weights + weights @ self.curvature @ weights)

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
        return self.loss + float((self.slope + self.curvature.diagonal()) @ weights)

    def ensemble(self, weights: Tensor) -> float:
        """Loss of the weighted mean of the models' probabilities.

        Parameters
        ----------
        weights : Tensor of float64, shape (N,)

        Returns
        -------
        float
            In nats.
        """
        spread = self.second.diagonal() @ weights - weights @ self.second @ weights
        return self.mean_member(weights) - 0.5 * float(spread)

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
        units = torch.eye(len(self.slope), dtype=torch.float64)[: len(losses)]
        predicted = np.array([self.soup(unit) for unit in units])
        return bool(np.abs(predicted - losses).mean() <= RANGE * np.mean(losses))


def make_surrogate(
    model: nn.Module,
    offsets: Tensor,
    batches: Sequence[Batch],
    *,
    keep: Keep = lambda name, make: make(),
    progress: Progress | None = None,
) -> Surrogate:
    """Measure the second-order model about a model's weights.

    Parameters
    ----------
    model : Module
        In the middle. It is evaluated in evaluation mode: BatchNorm statistics stay as they are.
    offsets : Tensor, shape (N, p)
        Displacements of all parameters, in the order of ``model.named_parameters()``.
    batches : sequence of (inputs, targets)
        Data on which the loss is predicted.
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

    def first() -> Arrays:
        loss, gradient = risk.loss_and_gradient()
        return {"loss": np.array(loss), "slope": (wide @ gradient.double().cpu()).numpy()}

    def along(offset: Tensor) -> Arrays:
        bent = risk.hessian_product(offset).double().cpu()
        slopes = risk.example_slopes(offset).double().cpu()
        return {"curvature": (0.5 * (wide @ bent)).numpy(), "slopes": slopes.numpy()}

    wide = offsets.double()
    start = keep("gradient", first)
    more(1)
    rows = []
    for index, offset in enumerate(offsets.to(risk.weights)):
        rows.append(keep(f"offset {index}", partial(along, offset)))
        more(1)
    m, slopes = (np.stack([row[name] for row in rows]) for name in ("curvature", "slopes"))
    return Surrogate(
        float(start["loss"]),
        torch.from_numpy(start["slope"]),
        torch.from_numpy(0.5 * (m + m.T)),
        torch.from_numpy(slopes @ slopes.T / slopes.shape[1]),
    )
