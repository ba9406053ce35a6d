"""Curvature that kinks of the loss add at the scale of the scatter of the weights.

A network of ReLUs is smooth only between kinks, and descent converges onto them. Second
derivatives, at a point or averaged over points, do not include the jumps of the gradient; weights
that scatter feel them. The curvature for Gaussian displacements d of covariance S is the mean of
all of it, jumps included, and by Stein's lemma (Stein 1981) gradients suffice to measure it:

    E[H(w + d)] S = E[gradient(w + d) d'].

The difference from the mean of the second derivatives is due to kinks. It is measured along each of
the stiff eigenpairs, and as one number for all other directions. The narrower the Gaussian, the
larger this curvature, so every training has its own; and the mean of K members has a narrower
Gaussian. The loss added by kinks is measured by the loss itself at both ends of the same
displacements, and of half of them, which is the width for K = 4. If the density of kinks grows by
the same amount with every halving of the distance, then so does the curvature by kinks with every
halving of the width, and so does their loss divided by the width squared. This is assumed; on the
network where it was measured (`docs/bridge.md`, CIFAR-10) it holds over three halvings.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neural.bridge.drift import Drift
from neural.bridge.smoothing import Kinks, Smoothing
from neural.curvature.gradient_noise import STIFF


def find_kinks(drift: Drift, smoothing: Smoothing) -> Kinks:
    """Curvature that kinks add at the covariance at which the drift was measured.

    Parameters
    ----------
    drift : Drift
        Measured with the smoothing's local model, or with that model averaged over a training
        (`Smoothing.seen_by`).
    smoothing : Smoothing
        Gives the mean second derivatives. Its own kinks are not counted twice.

    Returns
    -------
    Kinks
    """
    local, slopes, training = smoothing.local, drift.slopes, drift.training
    turn = local.pairs.vectors.T @ drift.local.pairs.vectors
    moved = slopes.displacements @ turn.T
    length, bent, odd = slopes.beyond
    if length > 0.0:  # kinks that the local model as seen has beyond the eigenpairs
        bent -= length * (drift.local.draws[0].values[0] - local.draws[0].values[0])
    smooth = smoothing.mean_hessian(training)
    over = (moved * (slopes.differences @ turn.T - moved @ smooth)).sum(0)
    beyond = odd - bent
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
    for rise, parts in zip(slopes.rises, (1, 2), strict=True):
        narrower = replace(training, batch_size=training.batch_size * parts**2)
        smooth = smoothing.mean_hessian(narrower, 0.5)
        costs.append(2.0 * rise * parts**2 - (moved * (moved @ smooth)).sum() - bent)
    cost_ratio = float(np.clip(costs[0] / found, 1.0, 2.0))
    log2_slope = float(np.clip((costs[1] - costs[0]) / found, 0.0, 2.0))
    return Kinks(along, rest, cost_ratio, log2_slope)
