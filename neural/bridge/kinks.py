"""Curvature that kinks of the loss add at the scale of the scatter of the weights.

The loss of a ReLU network is smooth only between kinks, and descent converges onto them. Second
derivatives, at a point or averaged over points, do not include the jumps of the gradient at kinks,
but the loss of weights that scatter depends on them. The mean curvature for Gaussian displacements
d of covariance S, jumps included, can be measured with gradients alone, by Stein's lemma (Stein
1981):

    E[H(w + d)] S = E[gradient(w + d) d'].

The difference from the mean of the second derivatives is due to kinks. It is measured along each of
the stiff eigenpairs, and as one number for all other directions. The narrower the Gaussian, the
larger this curvature: every training has its own, and so has the mean of K members, whose Gaussian
is narrower. The loss added by kinks is computed from the loss at both ends of the same
displacements, and at both ends of half of each, which is the width for K = 4.

Noise-free descent converges onto kinks as well, and where it ends their curvature grows with every
halving of the width. The mean of noisy runs is displaced from there, and lies on far fewer: around
it their curvature hardly depends on the width (`docs/bridge_method.md`). Kinks are therefore
measured around the displaced mean, in two steps: at first around the end of descent, whose force
displaces the mean, and then, if they add more than `KINKED`, around the mean.

Assumption: the density of kinks grows by the same amount with every halving of the distance. Then
the curvature added by kinks, and their loss divided by the width squared, grow by the same amount
with every halving of the width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neural.bridge.drift import Drift
from neural.bridge.shared_base import SharedBaseQuadratic
from neural.bridge.smoothing import Kinks, Smoothing
from neural.curvature.gradient_noise import STIFF

#: Curvature added by kinks, relative, beyond which they are measured around the displaced mean.
KINKED = 0.1


def find_kinks(drift: Drift, smoothing: Smoothing, mean_part: float = 0.0) -> Kinks:
    """Measure the curvature that kinks add, at the covariance at which the drift was measured.

    Parameters
    ----------
    drift : Drift
        Measured with the smoothing's local model, or with that model averaged over a training
        (`Smoothing.seen_by`).
    smoothing : Smoothing
        Gives the mean second derivatives. Kinks that it holds already are subtracted.
    mean_part : float
        Where the displacements are centred: 0 is the end of descent, 1 the mean displaced by noise.

    Returns
    -------
    Kinks
        Of the training in which the drift was measured.
    """
    local, slopes, training = smoothing.local, drift.slopes, drift.training
    turn = local.pairs.vectors.T @ drift.local.pairs.vectors
    moved = slopes.displacements @ turn.T
    length, bent, odd = slopes.beyond
    shared = isinstance(drift.local, SharedBaseQuadratic)  # whose `bent` is without kinks
    if length > 0.0 and not shared:  # subtract the kinks that `drift.local` holds beyond the pairs
        bent -= length * (drift.local.draws[0].values[0] - local.draws[0].values[0])
    smooth = smoothing.mean_hessian(training, mean_part=mean_part)
    over = (moved * (slopes.differences @ turn.T - moved @ smooth)).sum(0)
    beyond = odd - bent
    size = (moved**2).sum(0)
    # Along directions of low curvature the scatter is small, and a value of their own would mostly
    # consist of coupling by kinks to other directions: these directions share one number.
    flat = local.pairs.values < STIFF * local.largest
    whole = size[flat].sum() + length
    rest = float((over[flat].sum() + beyond) / whole) if whole > 0 else 0.0
    along = np.where(flat, rest, over / np.maximum(size, 1e-300))
    added = over.sum() + beyond
    if added <= 0.0:
        return Kinks(along, rest)
    costs = []
    for rise, shortening in zip(slopes.rises, (1, 2), strict=True):
        narrower = replace(training, batch_size=training.batch_size * shortening**2)
        smooth = smoothing.mean_hessian(narrower, 0.5, mean_part)
        costs.append(2.0 * rise * shortening**2 - (moved * (moved @ smooth)).sum() - bent)
    cost_ratio = float(np.clip(costs[0] / added, 1.0, 2.0))
    log2_slope = float(np.clip((costs[1] - costs[0]) / added, 0.0, 2.0))
    return Kinks(along, rest, cost_ratio, log2_slope)
