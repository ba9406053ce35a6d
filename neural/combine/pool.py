"""Ensembles: predictions combined instead of weights, one member in memory at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from neural.combine.members import check_weights
from neural.evaluate.metrics import refuse_probabilities
from nqm.errors import NQMError


class Pool(ABC):
    """A rule that makes one prediction of several.

    Attributes
    ----------
    name : str
        In tables and options. A class attribute.
    """

    name: ClassVar[str]

    def __call__(self, log_probs: Iterable[Tensor], weights: Tensor) -> Tensor:
        """Pool predictions.

        Parameters
        ----------
        log_probs : iterable of N tensors, shape (n, C)
            Logits or log-probabilities of each member; may be a generator.
        weights : Tensor, shape (N,) or (n, N)
            >= 0, summing to 1: of the members, or of the members at each example
            (`neural.combine.gate`).

        Returns
        -------
        Tensor of float64, shape (n, C)
            Log-probabilities.

        Raises
        ------
        NQMError
            If weights are negative or do not fit, or probabilities are given.
        """
        where = f"pool {self.name!r}"
        share = check_shares(where, weights)
        total: Tensor | None = None
        for weight, rows in zip(share.unbind(-1), log_probs, strict=True):
            if weight.ndim and weight.shape != rows.shape[:1]:
                raise NQMError(f"{where}: weights of {len(weight)} examples for {len(rows)}")
            if not bool(weight.any()):
                continue
            refuse_probabilities(where, rows)
            total = self._added(total, rows.double().log_softmax(-1), weight[..., None])
        assert total is not None
        return total.log_softmax(-1)

    @abstractmethod
    def _added(self, total: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
        """The sum so far with one member more; `weight` has shape (1,) or (n, 1)."""


def check_shares(where: str, weights: Tensor) -> Tensor:
    """Weights of predictions: one for each member, or one for each member at each example.

    Parameters
    ----------
    where : str
        What they are for, for the message.
    weights : Tensor, shape (N,) or (n, N)

    Returns
    -------
    Tensor of float64
        Of the same shape.

    Raises
    ------
    NQMError
        If one is negative or not finite, or they do not sum to 1 over the members.
    """
    if weights.ndim != 2:
        share = check_weights(where, weights, len(weights))
    else:
        share = weights.double()
        apart = (share.sum(-1) - 1.0).abs()
        if not share.numel() or not bool((apart <= 1e-6).all()):
            raise NQMError(
                f"{where}: weights must be finite and sum to 1 over the members at each of "
                f"{len(share)} examples"
            )
    if bool((share < 0.0).any()):
        raise NQMError(f"{where}: weights must be >= 0; got {float(share.min()):g}")
    return share


class Probabilities(Pool):
    """Weighted arithmetic mean of the probabilities: a mixture of the members."""

    name: ClassVar[str] = "probabilities"

    def _added(self, total: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
        rows = rows + weight.log()
        return rows if total is None else torch.logaddexp(total, rows)


class Logits(Pool):
    """Weighted mean of the logits: the normalised geometric mean of the probabilities."""

    name: ClassVar[str] = "logits"

    def _added(self, total: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
        # Of a weight of 0 nothing is left, be the logarithm infinite.
        rows = torch.where(weight > 0.0, weight * rows, 0.0)
        return rows if total is None else total + rows


#: Name -> pool.
POOLS: dict[str, Pool] = {one.name: one for one in (Probabilities(), Logits())}
