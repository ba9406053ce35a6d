"""Equal steps of one or two coordinates at many rates.

As `powers.power_exact`, but with directions along vector lanes and from the highest bit of the
number of steps on: A^2t and Q_2t = Q_t + A^t Q_t A^t' for each bit, one more step for each that is
set. An error in A^t doubles with every squaring to come, so that the last `_PLAIN` of them need no
more than one double: theirs is 2^_PLAIN units in the last place, 1e-13.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import fma, jit
from nqm.solvers._kernels.fast_normals import LANES

#: Last squarings, which are done in one double.
_PLAIN = 10
#: Smaller powers of A add nothing to Q, and their squares are 0.
_NOTHING = 1e-155
#: Largest number whose product has two doubles.
_HUGE = 1e290


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
    count = _bits(steps)
    ah, al, a1, l1, q, q1 = np.empty((6, LANES))
    s0, s1 = np.empty((2, LANES))
    for rate in range(bias.size):
        s0[:], s1[:] = 0.0, 0.0
        for b in range(curvature.shape[0]):
            h, v = curvature[b], variance[b]
            for i in range(LANES):
                high, low = _entry2(coefficients, rate, 0, h[i])
                ah[i], al[i], a1[i], l1[i] = high, low, high, low
                q1[i] = drive[rate, 0] * v[i] + own[rate, 0]
                q[i] = q1[i]
            for bit in range(count - 2, -1, -1):
                if bit >= _PLAIN:
                    for i in range(LANES):
                        q[i] += ah[i] * ah[i] * q[i]
                        high, low = _product2(ah[i], al[i], ah[i], al[i])
                        ah[i], al[i] = _sum2(high, 0.0, low, 0.0)
                else:
                    for i in range(LANES):
                        square = ah[i] * ah[i]
                        q[i] += square * q[i]
                        ah[i] = square + 2.0 * ah[i] * al[i]
                        al[i] = 0.0
                if (steps >> bit) & 1:
                    for i in range(LANES):
                        q[i] = a1[i] * a1[i] * q[i] + q1[i]
                        high, low = _product2(ah[i], al[i], a1[i], l1[i])
                        ah[i], al[i] = _sum2(high, 0.0, low, 0.0)
                if bit > 0 and _all_below(ah, _NOTHING):
                    ah[:] = 0.0
                    break
            for i in range(min(LANES, weight.size - b * LANES)):
                s0[i] += weight[b * LANES + i] * (ah[i] * ah[i] * start[b, i])
                s1[i] += weight[b * LANES + i] * q[i]
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
