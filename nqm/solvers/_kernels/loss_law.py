"""The generating function of the law of the loss: see `nqm.distribution`.

A direction of multiplicity n has the generating function (1 - u)^(-n/2) exp(n shift t / (1 - u))
with u = 2 spread t. Factors of equal n are multiplied; their product has one logarithm, whose
angle only falls, by less than pi with each factor of Im t >= 0, so that its turns can be counted.
"""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import jit

#: Nodes of one block.
NODES = 64
#: A product outside of 1 / _FAR .. _FAR is scaled, at every fourth factor; the largest |u|.
_FAR, LARGEST_U = 1e60, 1e30
#: Directions of |u| below this are summed by a series.
SMALL_U = 0.3


@jit
def _rescale(pr, pi, scale):
    for k in range(NODES):
        size = abs(pr[k]) + abs(pi[k])
        if size > _FAR or size < 1.0 / _FAR:
            scale[k] += math.log(size)
            pr[k] /= size
            pi[k] /= size


@jit
def cumulants(count, spread, shift, series, centred, real, imaginary, out_real, out_imaginary):
    """Compute the cumulant generating function of the loss at complex t, Im t >= 0.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`, the largest spread first, of |2 spread t| below
        `LARGEST_U`.
    series : ndarray, shape (terms, d + 1)
        Column j holds the power series in t of the sum over directions j, j + 1, ...
    centred : bool
        Whether t times the mean is left out.
    real, imaginary : ndarray, shape (k,)
        t; k a multiple of 64.
    out_real, out_imaginary : ndarray, shape (k,)
        Outputs.
    """
    d = spread.size
    pr, pi, scale, turns = np.empty((4, NODES))
    ar, ai = np.empty((2, NODES))
    for first in range(0, real.size, NODES):
        x, y = real[first : first + NODES], imaginary[first : first + NODES]
        linear, largest = 0.0, 0.0
        for k in range(NODES):
            pr[k], pi[k], scale[k], turns[k] = 1.0, 0.0, 0.0, 0.0
            ar[k], ai[k] = 0.0, 0.0
            largest = max(largest, math.hypot(x[k], y[k]))
        near = d
        while near > 0 and 2.0 * spread[near - 1] * largest < SMALL_U:
            near -= 1
        for p in range(series.shape[0] - 1, -1, -1):
            c = 0.0 if centred and p == 1 else series[p, near]
            for k in range(NODES):
                old = ar[k]
                ar[k] = old * x[k] - ai[k] * y[k] + c
                ai[k] = old * y[k] + ai[k] * x[k]
        for i in range(near):
            a, b, n = 2.0 * spread[i], count[i] * shift[i], count[i]
            linear += n * a
            for k in range(NODES):
                fr, fi, old = 1.0 - a * x[k], -a * y[k], pi[k]
                pi[k] = pr[k] * fi + old * fr
                pr[k] = pr[k] * fr - old * fi
                turns[k] += 1.0 if (old < 0.0) & (pi[k] >= 0.0) else 0.0
            if b != 0.0:
                for k in range(NODES):
                    fr, fi = 1.0 - a * x[k], a * y[k]
                    g = b / (fr * fr + fi * fi)
                    qr, qi = g * (x[k] * fr - y[k] * fi), g * (x[k] * fi + y[k] * fr)
                    if centred:
                        qr, qi = a * (qr * x[k] - qi * y[k]), a * (qr * y[k] + qi * x[k])
                    ar[k] += qr
                    ai[k] += qi
            last = i == near - 1 or count[i + 1] != n
            if i % 4 == 3 or last:
                _rescale(pr, pi, scale)
            if last:
                for k in range(NODES):
                    size = 0.5 * math.log(pr[k] * pr[k] + pi[k] * pi[k]) + scale[k]
                    ar[k] -= 0.5 * n * size
                    ai[k] -= 0.5 * n * (math.atan2(pi[k], pr[k]) - 2.0 * math.pi * turns[k])
                    pr[k], pi[k], scale[k], turns[k] = 1.0, 0.0, 0.0, 0.0
        for k in range(NODES):
            linear_part = 0.5 * linear if centred else 0.0
            out_real[first + k] = ar[k] - linear_part * x[k]
            out_imaginary[first + k] = ai[k] - linear_part * y[k]


@jit
def cumulants_around(count, spread, shift, real, imaginary, out):
    """Compute the derivatives of the cumulant generating function at one complex t.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`.
    real, imaginary : float
        t.
    out : ndarray, shape (7,)
        Outputs: real part of K(t); K' and K'' as real and imaginary parts; the same sum as K
        without the parts linear in t; and the distance from t to the closest singularity.
    """
    value, linear = 0.0, 0.0
    s1r, s1i, s2r, s2i = 0.0, 0.0, 0.0, 0.0
    nearest = math.inf
    product, before = 1.0, -1.0
    for i in range(spread.size):
        a, n = spread[i], count[i]
        fr, fi = 1.0 - 2.0 * a * real, -2.0 * a * imaginary
        size = fr * fr + fi * fi
        rr, ri = fr / size, -fi / size
        if n != before or product > _FAR or product < 1.0 / _FAR:
            value -= 0.25 * before * math.log(product)
            product, before = 1.0, n
        product *= size
        nearest = min(nearest, 0.25 * size / (a * a))
        # s = spread r, p = shift r^2: K' = s + p, K'' = 2 s (s + 2 p).
        sr, si = a * rr, a * ri
        pr, pi = shift[i] * (rr * rr - ri * ri), 2.0 * shift[i] * rr * ri
        s1r += n * (sr + pr)
        s1i += n * (si + pi)
        tr, ti = sr + 2.0 * pr, si + 2.0 * pi
        s2r += 2.0 * n * (sr * tr - si * ti)
        s2i += 2.0 * n * (sr * ti + si * tr)
        value += n * shift[i] * (real * rr - imaginary * ri)
        linear += n * (a + shift[i])
    value -= 0.25 * before * math.log(product)
    out[0], out[1], out[2], out[3], out[4] = value, s1r, s1i, s2r, s2i
    out[5], out[6] = value - linear * real, math.sqrt(nearest)


@jit
def cumulant_slope(count, spread, shift, t, centred):
    """Compute the derivative of the cumulant generating function at real t, less the mean.

    Parameters
    ----------
    count, spread, shift : ndarray, shape (d,)
        n, spread and place of `nqm.distribution`.
    t : float
    centred : bool
        Whether the mean is subtracted, without a loss of digits.

    Returns
    -------
    float
    """
    total = 0.0
    for i in range(spread.size):
        u = 2.0 * spread[i] * t
        r = 1.0 / (1.0 - u)
        if centred:
            total += count[i] * (u * r * (spread[i] + shift[i] * (2.0 - u) * r))
        else:
            total += count[i] * r * (spread[i] + shift[i] * r)
    return total
