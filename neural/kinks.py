"""Curvature at the scale of the scatter: what kinks of the loss add to its second derivatives.

A network of ReLUs is smooth only between kinks, and descent settles onto them. Second derivatives,
at a point or averaged over points, do not see the jumps of the slope; weights that scatter do. The
curvature that counts for Gaussian scatter d of covariance S is the mean of all of it, jumps
included, and by Stein's lemma (Stein 1981) slopes are enough to tell it:

    E[H(w + d)] S = E[slope(w + d) d'].

What this is more than the mean of the second derivatives is due to kinks. It is taken along each of
the stiff eigenpairs, and once for all that is left, flat pairs and the rest. The narrower a scatter
is, the more they weigh, so that every training has its own; and the mean of K members has a
narrower one. What they cost is seen in the loss itself at both ends of the same displacements, and
of half of them, which is the width of K = 4. Where kinks are the denser the nearer they are, by the
same with every halving of the distance, the curvature by kinks grows by the same with every halving
of the width, and so does what they cost over the width's square. It is taken to, as on the network
on which it was looked at (`docs/bridge.md`, CIFAR-10) it does over three halvings.
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
    length, bent, odd = slopes.left
    if length > 0.0:  # kinks that the scatter's own model has along the rest
        bent -= length * (drift.local.draws[0].values[0] - local.draws[0].values[0])
    smooth = smoothing.smooth(drift.lr, drift.batch_size)
    over, beyond = (moved * (slopes.turned @ turn.T - moved @ smooth)).sum(0), odd - bent
    size = (moved**2).sum(0)
    # Where weights hardly scatter, what kinks couple in from elsewhere is all that would be found.
    flat = local.pairs.values < STIFF * local.largest
    whole = size[flat].sum() + length
    rest = float((over[flat].sum() + beyond) / whole) if whole > 0 else 0.0
    along = np.where(flat, rest, over / np.maximum(size, 1e-300))
    found = over.sum() + beyond
    if found <= 0.0:
        return Kinks(along, rest)
    costs = []
    for risen, width in zip(slopes.risen, (1.0, 0.5), strict=True):
        smooth = smoothing.smooth(drift.lr, drift.batch_size / width**2, 0.5)
        costs.append(2.0 * risen / width**2 - (moved * (moved @ smooth)).sum() - bent)
    cost = float(np.clip(costs[0] / found, 1.0, 2.0))
    octave = float(np.clip((costs[1] - costs[0]) / found, 0.0, 2.0))
    return Kinks(along, rest, cost, octave)
