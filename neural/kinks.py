"""Curvature at the scale of the scatter: what kinks of the loss add to its second derivatives.

A network of ReLUs is smooth only between kinks, and descent settles onto them. Second derivatives,
at a point or averaged over points, do not see the jumps of the slope; weights that scatter do. The
curvature that counts for Gaussian scatter d of covariance S is the mean of all of it, jumps
included, and by Stein's lemma (Stein 1981) slopes are enough to tell it:

    E[H(w + d)] S = E[slope(w + d) d'].

What this is more than the mean of the second derivatives is due to kinks. It is taken along each of
the stiff eigenpairs, and once for all that is left, flat pairs and the rest. Kinks weigh the more
the narrower the scatter is, up to one over its width where weights sit on them: every training has
its own, and the slopes at half the width tell the exponent.
"""

from __future__ import annotations

import numpy as np

from neural.drift import Drift
from neural.noise import STIFF
from neural.smoothing import Kinks, Smoothing


def find_kinks(drift: Drift, smoothing: Smoothing) -> Kinks:
    """What kinks add at the scatter at which the drift was measured, by the slopes seen there.

    Parameters
    ----------
    drift : Drift
        Of the smoothing's own local model, or of that as a scatter sees it (`Smoothing.at`).
    smoothing : Smoothing
        Tells the mean second derivatives. Kinks that it has are not counted twice.
    """
    local, slopes = smoothing.local, drift.slopes
    turn = local.pairs.vectors.T @ drift.local.pairs.vectors
    moved = slopes.moved @ turn.T
    length, bent, *odd = slopes.left
    if length > 0.0:  # kinks that the scatter's own model has along the rest
        bent -= length * (drift.local.draws[0].values[0] - local.draws[0].values[0])
    over, beyond = [], []
    for turned, left, width in zip(slopes.turned, odd, (1.0, 0.5), strict=True):
        smooth = smoothing.smooth(drift.lr, drift.batch_size / width**2)
        over.append((moved * (turned @ turn.T - width * moved @ smooth)).sum(0) / width)
        beyond.append(left / width - bent)
    size = (moved**2).sum(0)
    # Where weights hardly scatter, what kinks couple in from elsewhere is all that would be found.
    flat = local.pairs.values < STIFF * local.largest
    whole = size[flat].sum() + length
    rest = float((over[0][flat].sum() + beyond[0]) / whole) if whole > 0 else 0.0
    wide, narrow = (along.sum() + left for along, left in zip(over, beyond, strict=True))
    grown = narrow / wide if wide > 0.0 else 1.0
    exponent = float(np.clip(np.log2(max(grown, 1.0)), 0.0, 1.0))
    return Kinks(np.where(flat, rest, over[0] / np.maximum(size, 1e-300)), rest, exponent)
