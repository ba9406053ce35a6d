"""Random samples of examples whose weighted losses are, on average, the loss of all examples.

Few examples of a trained network have a large loss, and these make up most of its derivatives. An
example is therefore drawn with a probability in proportion to its gradient, and counts with the
inverse of this probability (Horvitz & Thompson 1952).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from neural.curvature.examples import joined
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError

FloatArray = NDArray[np.float64]
#: Part of all draws that is uniform, so that no example counts more than ten times its share.
UNIFORM = 0.1
#: A sample is drawn if it has less than this fraction of the examples; else all are used.
FRACTION = 0.25


def sampled_part(examples: int, count: int) -> float:
    """Fraction of the examples that a sample has.

    Parameters
    ----------
    examples : int
        Number of examples, N.
    count : int
        Number of examples of a sample.

    Returns
    -------
    float
        1 if all examples are used (`FRACTION`).
    """
    return count / examples if count < FRACTION * examples else 1.0


def inclusion_probabilities(sizes: FloatArray, count: int) -> FloatArray:
    """Probabilities of examples to be in a sample.

    Parameters
    ----------
    sizes : ndarray, shape (N,)
        Size of every example's contribution, at least 0; infinite and NaN count as the largest.
    count : int
        Number of examples of a sample, at most N.

    Returns
    -------
    ndarray, shape (N,)
        Between 0 and 1, with the sum `count`.
    """
    known = sizes[np.isfinite(sizes)]
    sizes = np.where(np.isfinite(sizes), sizes, known.max(initial=1.0))
    sizes = sizes if sizes.sum() > 0.0 else np.ones_like(sizes)
    share = (1.0 - UNIFORM) * sizes / sizes.sum() + UNIFORM / len(sizes)
    certain = np.zeros(len(sizes), dtype=bool)
    while True:
        scale = (count - certain.sum()) / share[~certain].sum() if not certain.all() else 0.0
        found = np.where(certain, 1.0, scale * share)
        more = found > 1.0
        if not more.any():
            return found
        certain |= more


class ExampleSamples:
    """Independent sequences of samples of a risk's examples.

    Samples are systematic: of all examples in a random order, one is taken where the sum of the
    probabilities passes a number (start + 0, 1, 2, ...). Successive starts of a sequence are spread
    evenly over [0, 1), so that each example is drawn as often as its probability says.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss; probabilities are in proportion to the gradients at its weights.
    count : int
        Number of examples of a sample.
    seed : sequence of int
        Seed of the order and of the first starts.
    """

    def __init__(self, risk: EmpiricalRisk, count: int, seed: Sequence[int]):
        self._risk, self._count, self._all = risk, count, True
        if sampled_part(risk.examples, count) == 1.0:
            return
        try:
            self._tensors, self._make = joined(risk.batches)
        except NQMError:  # e.g. texts of different lengths, which cannot be in one batch
            return
        self._all = False
        sizes = torch.cat([each.norm(dim=1) for each in risk.example_gradients()])
        self._chances = inclusion_probabilities(sizes.double().cpu().numpy(), count)
        rng = np.random.default_rng(seed)
        self._order = rng.permutation(risk.examples)
        self._ends = np.cumsum(self._chances[self._order])
        self._starts = rng.random(2)

    def draw(self, sequence: int, number: int) -> EmpiricalRisk:
        """Draw a sample.

        Parameters
        ----------
        sequence : {0, 1}
            Samples of different sequences are independent.
        number : int
            Number of the sample in its sequence, from 0.

        Returns
        -------
        EmpiricalRisk
            Loss of the sample (`EmpiricalRisk.sampled`), or of all examples.
        """
        if self._all:
            return self._risk
        start = (self._starts[sequence] + number * (np.sqrt(5.0) - 1.0) / 2.0) % 1.0
        places = np.searchsorted(self._ends, start + np.arange(self._count), side="right")
        index = self._order[np.minimum(places, len(self._order) - 1)]
        weights = 1.0 / (self._risk.examples * self._chances[index])
        most = max(len(targets) for _, targets in self._risk.batches)
        parts = torch.split(torch.from_numpy(index), most)
        rows = [[tensor[part.to(tensor.device)] for tensor in self._tensors] for part in parts]
        factors = torch.split(torch.from_numpy(weights).to(self._risk.weights), most)
        return self._risk.sampled([self._make(tensors) for tensors in rows], factors)
