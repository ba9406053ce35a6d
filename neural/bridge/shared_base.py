"""Late-phase members on a shared base: their scatter on the local quadratic.

Every base step, member k takes its own minibatch gradient g_k = H w_k + e_k in its own coordinates
P, and the base, Q = 1 - P, takes gamma times the sum of all. With the mean model w and the
deviations d_k = w_k - w, which lie in P, this is exactly

    w   <- w - lr M (H w + mean of e_k),           M = ratio P + gamma K Q,
    d_k <- d_k - lr ratio P (H d_k + e_k - mean of e_k).

The two do not depend on each other. The mean model is SGD with minibatches of K B and a rate for
each weight: plain SGD in the coordinates u, w = M^(1/2) u (`EmpiricalRisk.rescaled`). The K - 1
contrasts of the members are independent runs of SGD on P H P with the noise P C P, none of which
has a drift. With S and D the covariances of one run of each kind, the mean model has S / K, and a
member S / K + (1 - 1/K) D. Independent runs have D = S; a shared base has a smaller D.

Rank-1 factors s and r of a weight W (s r') are coordinates like others: the loss is a smooth
function of (W, s, r), members take their steps in s and r, and `LatePhase.averaged` takes the means
of s and r. (The mean of the products s_k r_k' instead adds W times the covariance of s and r over
members, (1 - 1/K) D_sr: a change of the loss of second order, see docs/bridge_method.md.)

Members scatter with the second covariance, and the loss is a function of the first. On a quadratic
the second does not matter; beyond it, the force of the noise on the mean, the averages of curvature
and noise, and kinks are those of the members' scatter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.merge import check_factors
from neural.late_phase.select import select as resolve
from nqm.errors import NQMError
from nqm.gamma import base_scale

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SharedBaseQuadratic(LocalQuadratic):
    """Local model of the mean of K late-phase members, with the model of their deviations.

    Attributes
    ----------
    members : int
        Number of members, K.
    apart : LocalQuadratic
        Local model with the base held fixed: the deviations are SGD on it.
    """

    members: int
    apart: LocalQuadratic

    @classmethod
    def of(cls, mean: LocalQuadratic, apart: LocalQuadratic, members: int) -> SharedBaseQuadratic:
        """Put the two local models together.

        Parameters
        ----------
        mean, apart : LocalQuadratic
            Of the mean model, and with the base held fixed; in the same coordinates.
        members : int
            Number of members, K.

        Returns
        -------
        SharedBaseQuadratic
        """
        own = {field.name: getattr(mean, field.name) for field in fields(LocalQuadratic)}
        return cls(**own, members=members, apart=apart)

    @property
    def mean_model(self) -> LocalQuadratic:
        """Local model of the mean of the members."""
        names = [field.name for field in fields(LocalQuadratic)]
        return LocalQuadratic(**{name: getattr(self, name) for name in names})

    def mixed(self, mean: FloatArray, apart: FloatArray) -> FloatArray:
        """Covariance of one member.

        Parameters
        ----------
        mean, apart : ndarray, shape (k, k)
            Covariances of one run on the mean model, and with the base held fixed.

        Returns
        -------
        ndarray, shape (k, k)
        """
        return np.asarray(mean / self.members + (1.0 - 1.0 / self.members) * apart)

    def key(self) -> dict[str, Any]:
        """Values that identify this measurement; see `LocalQuadratic.key`.

        Returns
        -------
        dict
        """
        return super().key() | {"members": self.members, "apart": self.apart.key()}


def mean_model(local: LocalQuadratic) -> LocalQuadratic:
    """Local model of the mean of the members; that of independent runs is the model itself.

    Parameters
    ----------
    local : LocalQuadratic

    Returns
    -------
    LocalQuadratic
    """
    return local.mean_model if isinstance(local, SharedBaseQuadratic) else local


def member_mask(risk: EmpiricalRisk, select: str) -> Tensor:
    """Which coordinates of a risk are the members' own.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    select : str
        Weights that are replicated (see `neural.late_phase.select.select`).

    Returns
    -------
    Tensor of bool, shape (p,)

    Raises
    ------
    NQMError
        If none of the risk's weights is replicated, or the averaged model is not the mean of the
        members' weights.
    """
    selection = resolve(risk.model, select)
    chosen = set(selection.parameters)
    check_factors(risk.model, selection.parameters)
    computed = [name for name in selection.buffers if ".parametrizations." in f".{name}"]
    if computed:
        raise NQMError(
            f"the averaged model computes {min(computed)!r} anew from the mean weights, and this "
            "average is not predicted; replicate other weights"
        )
    if not chosen & set(risk.shapes):
        raise NQMError(
            f"select: {select!r} replicates none of the weights that the loss depends on"
        )
    parts = [
        torch.full((shape.numel(),), name in chosen, device=risk.weights.device)
        for name, shape in risk.shapes.items()
    ]
    return torch.cat(parts)


def risk_of_mean(
    risk: EmpiricalRisk, mask: Tensor, members: int, gamma: str | float, member_lr_ratio: float
) -> EmpiricalRisk:
    """The risk in the coordinates in which the mean of the members is plain SGD.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    mask : Tensor of bool, shape (p,)
        The members' own coordinates.
    members : int
        Number of members, K.
    gamma : {"sum", "mean"} or float
        Scale of the base gradient, which is summed over members.
    member_lr_ratio : float
        Learning rate of the members over that of the base.

    Returns
    -------
    EmpiricalRisk
        The risk itself if all weights have the same rate.
    """
    rates = torch.full_like(risk.weights, base_scale(gamma, members) * members)
    rates[mask] = member_lr_ratio
    return risk if bool((rates == 1.0).all()) else risk.rescaled(rates.sqrt())
