"""Curvature at the scale of the scatter: what kinks of the loss add to its second derivatives.

A network of ReLUs is smooth only between kinks, and descent settles onto them. Second derivatives,
at a point or averaged over points, do not see the jumps of the slope; weights that scatter do. The
curvature that counts for Gaussian scatter d of covariance S is the mean of all of it, jumps
included, and by Stein's lemma (Stein 1981) slopes are enough to tell it:

    E[H(w + d)] S = E[slope(w + d) d'].

What this is more than the mean of the second derivatives is due to kinks. It is taken along each of
the stiff eigenpairs, and once for all that is left, flat pairs and the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neural.curvature import Landscape
from neural.local_model import Kept, fingerprint, vector
from neural.noise import STIFF
from neural.smoothing import Kinks, Smoothing
from neural.spectrum import Progress
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]


def measure_kinks(
    landscape: Landscape,
    smoothing: Smoothing,
    *,
    samples: int = 16,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Kinks:
    """Measure them at the scatter of so many steps of SGD.

    Parameters
    ----------
    landscape : Landscape
    smoothing : Smoothing
        Of this landscape: its scatter, and the mean second derivatives there.
    samples : int
        Random displacements: slopes at both ends of each, and a Hessian product where there are
        more directions than pairs.
    seed : int
    folder : Path, optional
        Keeps what is found, and gives it when asked again.
    progress : callable, optional
        Told of slopes done.
    """
    check_integer("samples", samples, 1)
    kept = Kept(folder, f"{fingerprint(landscape)}-{seed}")
    local, lr, batch_size = smoothing.local, smoothing.lr, smoothing.batch_size
    steps = smoothing.steps
    vectors = local.pairs.vectors
    dense = vectors.shape[1] == landscape.size

    def slopes() -> dict[str, Any]:
        rng = np.random.default_rng([seed, 5])
        moved, turned, rest = [], [], np.zeros(2)
        for _ in range(samples):
            d = local.displacement(rng, lr, batch_size, steps)
            given = vector(landscape, d)
            ends = [landscape.gradient(landscape.weights + sign * given) for sign in (1.0, -1.0)]
            odd = 0.5 * (ends[0] - ends[1]).double().cpu().numpy()
            if progress is not None:
                progress(2)
            moved.append(vectors.T @ d)
            turned.append(vectors.T @ odd)
            if dense:
                continue
            left = d - vectors @ moved[-1]
            even = landscape.curvature_product(vector(landscape, left)).double().cpu().numpy()
            rest += left @ (odd - even), left @ left
        return {"moved": np.array(moved), "turned": np.array(turned), "rest": rest}

    basis = f"{len(local.pairs.values)}-{len(local.draws)}"
    found = kept(f"kinks-{lr:.8g}-{batch_size}-{steps}-{samples}-{basis}", slopes)
    moved = found["moved"]
    smooth = np.diag(local.pairs.values) + smoothing.width.curvature
    over = (moved * (found["turned"] - moved @ smooth)).sum(0)
    size = (moved**2).sum(0)
    # Where weights hardly scatter, what kinks couple in from elsewhere is all that would be found.
    flat = local.pairs.values < STIFF * local.largest
    whole = size[flat].sum() + found["rest"][1]
    rest = float((over[flat].sum() + found["rest"][0]) / whole) if whole > 0 else 0.0
    return Kinks(np.where(flat, rest, over / np.maximum(size, 1e-300)), rest)
