"""Ensembles: predictions combined instead of weights, one member in memory at a time."""

from __future__ import annotations

import math
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
        weights : Tensor, shape (N,)
            >= 0, summing to 1.

        Returns
        -------
        Tensor of float64, shape (n, C)
            Log-probabilities.

        Raises
        ------
        NQMError
            If weights are negative or do not fit, or probabilities are given.
        """
        share = check_weights(f"pool {self.name!r}", weights, len(weights)).tolist()
        if min(share) < 0.0:
            raise NQMError(f"pool {self.name!r}: weights must be >= 0; got {min(share):g}")
        total: Tensor | None = None
        for weight, rows in zip(share, log_probs, strict=True):
            if weight == 0.0:
                continue
            refuse_probabilities(f"pool {self.name!r}", rows)
            total = self._added(total, rows.double().log_softmax(-1), weight)
        assert total is not None
        return total.log_softmax(-1)

    @abstractmethod
    def _added(self, total: Tensor | None, rows: Tensor, weight: float) -> Tensor:
        """The sum so far with one member more."""


class Probabilities(Pool):
    """Weighted arithmetic mean of the probabilities: a mixture of the members."""

    name: ClassVar[str] = "probabilities"

    def _added(self, total: Tensor | None, rows: Tensor, weight: float) -> Tensor:
        rows = rows + math.log(weight)
        return rows if total is None else torch.logaddexp(total, rows)


class Logits(Pool):
    """Weighted mean of the logits: the normalised geometric mean of the probabilities."""

    name: ClassVar[str] = "logits"

    def _added(self, total: Tensor | None, rows: Tensor, weight: float) -> Tensor:
        return weight * rows if total is None else total + weight * rows


#: Name -> pool.
POOLS: dict[str, Pool] = {one.name: one for one in (Probabilities(), Logits())}
