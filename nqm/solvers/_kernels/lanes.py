"""Single-precision normals, one lane for each replica: see `fast_normals`.

Lanes are the last axis of every array, here and in `lane_samples`, so that each inner loop is one
of vector instructions without any reassociation. Casts keep integers at 32 bits.
"""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import fma, jit
from nqm.solvers._kernels.fast_normals import COS, LANES, LOG, SIN

_U1, _U3, _U7, _U9, _U11, _U21, _U25 = (np.uint32(n) for n in (1, 3, 7, 9, 11, 21, 25))
_U29, _U30, _SIGN = np.uint32(29), np.uint32(30), np.uint32(0x80000000)
_F1, _F_2, _ROOT_HALF = np.float32(1.0), np.float32(-2.0), np.int32(0x3F3504F3)
_U_STEP, _U_HALF, _T_STEP, _T_HALF = (np.float32(2.0**-n) for n in (31, 32, 29, 30))
# Minus twice the logarithm is what is wanted.
_W0, _W1, _W2, _W3, _W4, _W5, _W6 = (np.float32(-2.0 * c) for c in LOG)
_W_LN2 = np.float32(-2.0 * math.log(2.0))
_S0, _S1, _S2, _S3 = (np.float32(c) for c in SIN)
_C0, _C1, _C2, _C3 = (np.float32(c) for c in COS)


@jit
def _xoshiro(a, b, c, d):
    """32 bits of xoshiro128++ and the next state."""
    total = np.uint32(a + d)
    bits = np.uint32(np.uint32(np.uint32(total << _U7) | np.uint32(total >> _U25)) + a)
    shifted = np.uint32(b << _U9)
    c, d = np.uint32(c ^ a), np.uint32(d ^ b)
    b, a = np.uint32(b ^ c), np.uint32(a ^ d)
    c = np.uint32(c ^ shifted)
    d = np.uint32(np.uint32(d << _U11) | np.uint32(d >> _U21))
    return bits, a, b, c, d


@jit
def _box_muller(p, q):
    """Two normals: p chooses the radius, q an angle below pi/4, the octant by its last bits."""
    u = fma(np.float32(np.int32(p >> _U1)), _U_STEP, _U_HALF)
    bits = np.float32(u).view(np.int32)
    exponent = np.int32(np.int32(bits - _ROOT_HALF) >> 23)
    f = np.int32(bits - np.int32(exponent << 23)).view(np.float32) - _F1
    w = fma(f, fma(f, fma(f, fma(f, fma(f, fma(f, _W6, _W5), _W4), _W3), _W2), _W1), _W0)
    radius = math.sqrt(fma(np.float32(exponent), _W_LN2, f * fma(f, fma(f, w, _F1), _F_2)))
    t = fma(np.float32(np.int32(q >> _U3)), _T_STEP, _T_HALF)
    y = t * t
    sine = radius * (t * fma(y, fma(y, fma(y, _S3, _S2), _S1), _S0))
    cosine = radius * fma(y, fma(y, fma(y, _C3, _C2), _C1), _C0)
    swap = (q & _U1) != 0
    first, second = (sine, cosine) if swap else (cosine, sine)
    first = np.uint32(np.float32(first).view(np.uint32) ^ np.uint32(np.uint32(q << _U30) & _SIGN))
    second = np.uint32(np.float32(second).view(np.uint32) ^ np.uint32(np.uint32(q << _U29) & _SIGN))
    return np.uint32(first).view(np.float32), np.uint32(second).view(np.float32)


@jit
def fill_lanes(lanes, out):
    """Draw single-precision standard normals, one stream per lane.

    Parameters
    ----------
    lanes : ndarray of uint32, shape (4, LANES)
        xoshiro128++ states, advanced in place.
    out : ndarray of float32, shape (even, LANES)
        Filled with the draws.
    """
    for j in range(0, out.shape[0], 2):
        for r in range(LANES):
            a, b, c, d = lanes[0, r], lanes[1, r], lanes[2, r], lanes[3, r]
            p, a, b, c, d = _xoshiro(a, b, c, d)
            q, a, b, c, d = _xoshiro(a, b, c, d)
            lanes[0, r], lanes[1, r], lanes[2, r], lanes[3, r] = a, b, c, d
            out[j, r], out[j + 1, r] = _box_muller(p, q)
