"""Constants and seeds of the single-precision normal generator of ``precision="float32"``.

Every replica of a block is a lane: its own xoshiro128++ (Blackman & Vigna 2021), seeded from the
block's `numpy.random.SeedSequence`, and the polar angle and radius of Box & Muller (1958) from
two draws of 32 bits. Only the normals are of single precision; states and losses are float64.
The radius has 31 random bits, so no normal exceeds sqrt(64 log 2) = 6.66 (a true one does once in
3.6e10 draws), its square right within 1.5e-7 and 4e-7 of itself. The operations are IEEE additions,
multiplications, fused multiply-adds and square roots: the same bits on any processor.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nqm.errors import check_word

#: Allowed precisions of Monte Carlo normals; see `nqm.sample`.
PRECISIONS = ("float64", "float32")
#: Replicas that advance together, one lane each.
LANES = 32
#: Largest normal that the generator can return.
LARGEST = math.sqrt(64.0 * math.log(2.0))

#: (log(1 + f) - f + f^2/2) / f^3 on sqrt(1/2) .. sqrt(2): powers of f, Chebyshev interpolation,
#: relative error of the logarithm 1.6e-7.
LOG = (
    0.33333410287823945, -0.25000921663237885, 0.19985127782264306, -0.16592856266968328,
    0.14676396612450382, -0.1411842489711763, 0.0927221423648207,
)  # fmt: skip
#: sin(pi t / 4) / t and cos(pi t / 4) on 0 .. 1: powers of t^2; errors 3.4e-9 and 3.9e-8.
SIN = (0.7853981609800137, -0.08074543476917713, 0.0024900069643157387, -3.595439925590299e-05)
COS = (0.9999999723759496, -0.3084242527090074, 0.01584991298202756, -0.00031887899167336986)


def check_precision(precision: str) -> None:
    """Refuse an unknown precision.

    Parameters
    ----------
    precision : str
        Must be one of `PRECISIONS`.

    Raises
    ------
    NQMError
        If it is none of them.
    """
    check_word("precision", precision, PRECISIONS)


def lanes(seed: np.random.SeedSequence) -> NDArray[np.uint32]:
    """Seed the single-precision generator of one block.

    Parameters
    ----------
    seed : numpy.random.SeedSequence
        Seed of the block; a child of it is used, so that draws in float64 are independent.

    Returns
    -------
    ndarray of uint32, shape (4, LANES)
        State of xoshiro128++ for each lane.
    """
    words = seed.spawn(1)[0].generate_state(4 * LANES)
    return words.astype(np.uint32).reshape(4, LANES)
