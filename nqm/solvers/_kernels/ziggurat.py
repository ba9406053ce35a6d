"""Tables of the ziggurat method for normals (Marsaglia & Tsang 2000), 256 layers.

Layers of equal area v under exp(-x^2 / 2), the lowest with the tail beyond r:
x_255 = r, f(x_{i-1}) = f(x_i) + v / x_i. The compiled generator reads them with the bit layout of
NumPy's ``Generator.standard_normal``, so that its stream is NumPy's for the same SFC64 state.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nqm.problems.quadratic import FloatArray

LAYERS = 256
#: Start r of the tail: the value at which the topmost of 256 layers ends at f = 1.
TAIL_START = 3.6541528853610088
#: 52 random bits choose the position inside a layer.
BITS = 2.0**52


def tables() -> tuple[NDArray[np.uint64], FloatArray, FloatArray]:
    """Compute the tables of the ziggurat method.

    A draw of 52 bits b in layer i is x = b * width[i], accepted at once if b < accept[i], and
    otherwise if a uniform height between height[i - 1] and height[i] lies under the density.

    Returns
    -------
    accept : ndarray of uint64, shape (256,)
        Bits below which a draw is accepted at once.
    width : ndarray, shape (256,)
        Right edge of each layer over 2^52.
    height : ndarray, shape (256,)
        Density exp(-x^2 / 2) at the right edge of each layer; 1 for layer 0.
    """
    r = TAIL_START
    f = math.exp(-0.5 * r * r)
    area = r * f + math.sqrt(math.pi / 2) * math.erfc(r / math.sqrt(2))
    edge = np.empty(LAYERS)
    edge[LAYERS - 1] = r
    for i in range(LAYERS - 2, 0, -1):
        x = edge[i + 1]
        edge[i] = math.sqrt(-2.0 * math.log(area / x + math.exp(-0.5 * x * x)))
    edge[0] = area / f  # a box as wide as the lowest layer with its tail is large
    height = np.exp(-0.5 * edge**2)
    height[0] = 1.0
    accept = np.empty(LAYERS)
    accept[0] = r / edge[0]
    accept[1] = 0.0
    accept[2:] = edge[1:-1] / edge[2:]
    return (accept * BITS).astype(np.uint64), edge / BITS, height
