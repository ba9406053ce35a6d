"""Equal steps of one or two coordinates at many rates.

One coordinate has a closed form: the power a^2T and the sum of all smaller ones. Two go as
`powers.power_exact`, but with directions along vector lanes and from the highest bit of the number
of steps on: A^2t and Q_2t = Q_t + A^t Q_t A^t' for each bit, one more step for each that is set. An
error in A^t doubles with every squaring to come, so that the last `_PLAIN` of them need no more
than one double: theirs is 2^_PLAIN units in the last place, 1e-13.
"""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import fma, jit
from nqm.solvers._kernels.fast_normals import LANES

#: Last squarings, which are done in one double.
_PLAIN = 10
#: Smaller powers of A add nothing to Q, and their squares are 0.
_NOTHING = 1e-155
#: Largest number whose product has two doubles.
_HUGE = 1e290
# Bits of doubles: what moves a mantissa to 1 / sqrt 2 .. sqrt 2, the mantissa, 1 / sqrt 2, 1, 2^52.
_ROOT_HALF, _MANTISSA = np.int64(0x3FE6A09E << 32), np.int64(0x000FFFFFFFFFFFFF)
_ONE_BITS, _MAGIC_BITS = np.int64(0x3FF0 << 48), np.uint64(0x4330 << 48)
_LOWEST = _ONE_BITS - _ROOT_HALF
_MAGIC, _ROUND = 2.0**52, 1.5 * 2.0**52
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_PER_LN2 = 1.0 / math.log(2.0)
# (log((1 + s) / (1 - s)) / s - 2) / s^2 in powers of s^2 (fdlibm), and 1 / n!.
_L1, _L2, _L3 = 6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01
_L4, _L5, _L6 = 2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01
_L7 = 1.479819860511658591e-01
_E3, _E4, _E5, _E6, _E7, _E8, _E9, _E10, _E11, _E12, _E13 = (
    1.0 / math.factorial(n) for n in range(3, 14)
)


@jit
def _product2(ah, al, bh, bl):
    """(ah + al)(bh + bl) as high and low, not yet normal."""
    high = ah * bh
    return high, fma(ah, bh, -high) + (ah * bl + al * bh)


@jit
def _sum2(ah, al, bh, bl):
    """Sum of two numbers of two doubles; of one double, if it is not finite or huge."""
    high = ah + bh
    second = high - ah
    low = ((ah - (high - second)) + (bh - second)) + (al + bl)
    total = high + low
    kept = abs(total) < _HUGE
    return (total if kept else high), ((low - (total - high)) if kept else 0.0)


@jit
def _entry2(c, rate, e, h):
    """Entry e of A at curvature h, by Horner's rule; c (2, L, 3, entries)."""
    high, low = _product2(c[0, rate, 2, e], c[1, rate, 2, e], h, 0.0)
    high, low = _sum2(high, low, c[0, rate, 1, e], c[1, rate, 1, e])
    high, low = _product2(high, low, h, 0.0)
    return _sum2(high, low, c[0, rate, 0, e], c[1, rate, 0, e])


@jit
def _all_below(values, limit):
    below = True
    for i in range(values.size - 1, -1, -1):
        below = abs(values[i]) < limit
        if not below:
            break
    return below


@jit
def _rest_below(a, limit):
    return _all_below(a[1], limit) and _all_below(a[2], limit) and _all_below(a[3], limit)


@jit
def _bits(steps):
    count = 0
    while steps >> count > 0:
        count += 1
    return count


@jit
def _log(x):
    """Natural logarithm of x > 0, within one unit in the last place (as fdlibm computes it).

    Written out, as `_exp`, so that loops over lanes become vector instructions. -708 for 0.
    """
    bits = np.float64(x).view(np.int64) + _LOWEST
    high = np.uint64(np.uint64(bits >> 52) | _MAGIC_BITS).view(np.float64) - _MAGIC
    k = high - 1023.0
    f = np.int64((bits & _MANTISSA) + _ROOT_HALF).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    r = fma(z, fma(z, fma(z, fma(z, fma(z, fma(z, _L7, _L6), _L5), _L4), _L3), _L2), _L1) * z
    half = 0.5 * f * f
    return k * _LN2_HIGH - ((half - (s * (half + r) + k * _LN2_LOW)) - f)


@jit
def _exp(x):
    """Exponential of x, and less 1: 0 below -708 and infinite above 709."""
    shifted = fma(x, _PER_LN2, _ROUND)
    k = shifted - _ROUND
    r = fma(k, -_LN2_LOW, fma(k, -_LN2_HIGH, x))
    y = fma(r, fma(r, fma(r, fma(r, fma(r, _E13, _E12), _E11), _E10), _E9), _E8)
    y = fma(r, fma(r, fma(r, fma(r, fma(r, fma(r, y, _E7), _E6), _E5), _E4), _E3), 0.5)
    less = fma(r * r, y, r)
    scale = np.int64((np.float64(shifted).view(np.int64) << 52) + _ONE_BITS).view(np.float64)
    power = fma(scale, less, scale)
    power = 0.0 if x < -708.0 else (math.inf if x > 709.0 else power)
    return power, (less if k == 0.0 else power - 1.0)


@jit
def scan1(coefficients, drive, own, steps, curvature, variance, start, weight, bias, noisy):
    """Compute the loss of one coordinate after equal steps, for many rates and directions.

    Parameters
    ----------
    coefficients : ndarray, shape (2, L, 3, 1)
        Of 1, h, h^2 in the entry of A, in two doubles, for each rate.
    drive, own : ndarray, shape (L, 1)
        Q of one step per unit of `variance`, and independently of it.
    steps : int
        Number of steps, >= 1.
    curvature, variance : ndarray, shape (b, LANES)
        h and the variance of a minibatch's noise; 0 beyond the last direction.
    start : ndarray, shape (b, LANES)
        Second moment of the start.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    bias, noisy : ndarray, shape (L,)
        Outputs: loss due to the start and to noise.
    """
    twice = 2.0 * steps
    kept, summed, s0, s1 = np.empty((4, LANES))
    for rate in range(bias.size):
        s0[:], s1[:] = 0.0, 0.0
        line = coefficients[0, rate, 2, 0] == 0.0 and coefficients[1, rate, 2, 0] == 0.0
        c0, l0 = coefficients[0, rate, 0, 0], coefficients[1, rate, 0, 0]
        c1, l1 = coefficients[0, rate, 1, 0], coefficients[1, rate, 1, 0]
        drives, adds = drive[rate, 0], own[rate, 0]
        for b in range(curvature.shape[0]):
            h, v, first = curvature[b], variance[b], start[b]
            if line:
                for i in range(LANES):
                    high, low = _product2(c1, l1, h[i], 0.0)
                    kept[i], summed[i] = _sum2(high, low, c0, l0)
            else:
                for i in range(LANES):
                    kept[i], summed[i] = _entry2(coefficients, rate, 0, h[i])
            for i in range(LANES):
                size = abs(kept[i])
                low = summed[i] if kept[i] > 0.0 else -summed[i]
                # The low part is within a rounding of 0: one digit of its quotient is enough.
                power, less = _exp(twice * (_log(size) + low * (2.0 - size)))
                over = (size - 1.0) + low
                kept[i] = power * first[i] if first[i] != 0.0 else 0.0
                q = drives * v[i] + adds
                ratio = less / (over * (over + 2.0)) if over != 0.0 else float(steps)
                summed[i] = q * ratio if q != 0.0 else 0.0
            for i in range(min(LANES, weight.size - b * LANES)):
                s0[i] += weight[b * LANES + i] * kept[i]
                s1[i] += weight[b * LANES + i] * summed[i]
        bias[rate], noisy[rate] = s0.sum(), s1.sum()


@jit
def _dot2(ah, al, bh, bl, ch, cl, dh, dl):
    """A b + c d, all of two doubles."""
    high, low = _product2(ah, al, bh, bl)
    other, rest = _product2(ch, cl, dh, dl)
    return _sum2(high, low, other, rest)


@jit
def _step2(a, base, q, first):
    """Lanes of A -> base A and Q -> base Q base' + first; `a`, `base` of two doubles."""
    for i in range(LANES):
        b0, b1, b2, b3 = base[0, i], base[1, i], base[2, i], base[3, i]
        l0, l1, l2, l3 = base[4, i], base[5, i], base[6, i], base[7, i]
        u0, u1 = b0 * q[0, i] + b1 * q[1, i], b0 * q[1, i] + b1 * q[2, i]
        w0, w1 = b2 * q[0, i] + b3 * q[1, i], b2 * q[1, i] + b3 * q[2, i]
        q[0, i] = u0 * b0 + u1 * b1 + first[0, i]
        q[1, i] = u0 * b2 + u1 * b3 + first[1, i]
        q[2, i] = w0 * b2 + w1 * b3 + first[2, i]
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
        a[0, i], a[4, i] = _dot2(b0, l0, a0, k0, b1, l1, a2, k2)
        a[1, i], a[5, i] = _dot2(b0, l0, a1, k1, b1, l1, a3, k3)
        a[2, i], a[6, i] = _dot2(b2, l2, a0, k0, b3, l3, a2, k2)
        a[3, i], a[7, i] = _dot2(b2, l2, a1, k1, b3, l3, a3, k3)


@jit
def _double_noise2(a, q):
    """Lanes of Q -> Q + A Q A'."""
    for i in range(LANES):
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        q0, q1, q2 = q[0, i], q[1, i], q[2, i]
        u0, u1 = a0 * q0 + a1 * q1, a0 * q1 + a1 * q2
        w0, w1 = a2 * q0 + a3 * q1, a2 * q1 + a3 * q2
        q[0, i] = q0 + (u0 * a0 + u1 * a1)
        q[1, i] = q1 + (u0 * a2 + u1 * a3)
        q[2, i] = q2 + (w0 * a2 + w1 * a3)


@jit
def _square2(a, plain):
    """Lanes of A -> A A, in one double if `plain`."""
    if plain:
        for i in range(LANES):
            a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
            k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
            trace, cross = a0 + a3, a1 * a2
            rest, apart = k0 + k3, a1 * k2 + k1 * a2
            a[0, i] = a0 * a0 + cross + (2.0 * a0 * k0 + apart)
            a[1, i] = a1 * trace + (a1 * rest + k1 * trace)
            a[2, i] = a2 * trace + (a2 * rest + k2 * trace)
            a[3, i] = a3 * a3 + cross + (2.0 * a3 * k3 + apart)
            a[4, i], a[5, i], a[6, i], a[7, i] = 0.0, 0.0, 0.0, 0.0
        return
    for i in range(LANES):
        a0, a1, a2, a3 = a[0, i], a[1, i], a[2, i], a[3, i]
        k0, k1, k2, k3 = a[4, i], a[5, i], a[6, i], a[7, i]
        trace, rest = _sum2(a0, k0, a3, k3)
        cross, apart = _product2(a1, k1, a2, k2)
        high, low = _product2(a0, k0, a0, k0)
        a[0, i], a[4, i] = _sum2(high, low, cross, apart)
        high, low = _product2(a3, k3, a3, k3)
        a[3, i], a[7, i] = _sum2(high, low, cross, apart)
        high, low = _product2(a1, k1, trace, rest)
        a[1, i], a[5, i] = _sum2(high, 0.0, low, 0.0)
        high, low = _product2(a2, k2, trace, rest)
        a[2, i], a[6, i] = _sum2(high, 0.0, low, 0.0)


@jit
def scan2(
    coefficients, drive, own, steps, curvature, variance, mean, start, read, weight, bias, noisy
):
    """Compute the loss of two coordinates after equal steps, for many rates and directions.

    Parameters
    ----------
    coefficients : ndarray, shape (2, L, 3, 4)
        Of 1, h, h^2 in the entries of A, row by row.
    drive, own : ndarray, shape (L, 3)
        Entries (0, 0), (1, 0) and (1, 1) of Q of one step.
    steps, curvature, variance
        See `scan1`.
    mean, start : ndarray, shape (2, b, LANES) and (3, b, LANES)
        Mean and covariance of the start.
    read : ndarray, shape (2,)
        Evaluated weights as a linear form of the state.
    weight, bias, noisy
        See `scan1`.
    """
    count, c0, c1 = _bits(steps), read[0], read[1]
    a, base = np.empty((8, LANES)), np.empty((8, LANES))
    q, first = np.empty((3, LANES)), np.empty((3, LANES))
    s0, s1 = np.empty((2, LANES))
    for rate in range(bias.size):
        s0[:], s1[:] = 0.0, 0.0
        for b in range(curvature.shape[0]):
            for e in range(4):
                for i in range(LANES):
                    high, low = _entry2(coefficients, rate, e, curvature[b, i])
                    a[e, i], a[4 + e, i], base[e, i], base[4 + e, i] = high, low, high, low
            for e in range(3):
                for i in range(LANES):
                    first[e, i] = drive[rate, e] * variance[b, i] + own[rate, e]
                    q[e, i] = first[e, i]
            for bit in range(count - 2, -1, -1):
                _double_noise2(a, q)
                _square2(a, bit < _PLAIN)
                if (steps >> bit) & 1:
                    _step2(a, base, q, first)
                if bit > 0 and _all_below(a[0], _NOTHING) and _rest_below(a, _NOTHING):
                    a[:] = 0.0
                    break
            for i in range(min(LANES, weight.size - b * LANES)):
                g0, g1 = c0 * a[0, i] + c1 * a[2, i], c0 * a[1, i] + c1 * a[3, i]
                moved = g0 * mean[0, b, i] + g1 * mean[1, b, i]
                spread = g0 * g0 * start[0, b, i] + g1 * g1 * start[2, b, i]
                spread += 2.0 * g0 * g1 * start[1, b, i]
                s0[i] += weight[b * LANES + i] * (moved * moved + spread)
                random = c0 * c0 * q[0, i] + 2.0 * c0 * c1 * q[1, i] + c1 * c1 * q[2, i]
                s1[i] += weight[b * LANES + i] * random
        bias[rate], noisy[rate] = s0.sum(), s1.sum()
