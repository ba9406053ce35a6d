"""Two coordinates at constant rates: the search for the fewest steps.

d directions, T steps. One direction is z' = A z + b e; with z_0 the start of unit size and c what
is read, E (c z_T)^2 = (c A^T z_0)^2 + sum over t < T of (c A^t b)^2: two plain trajectories.
"""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit

#: Smaller responses are set to 0. The fourth power of this is still a normal number; denormal ones
#: would be slow.
_FAINT = 1e-75
#: Steps of the doubling grid are 1 .. 2 _BASE - 1, then _BASE .. 2 _BASE - 1 times powers of two.
_BASE = 16


@jit
def double_responses(matrix, kick, start, read, started, noisy):
    """Compute squared responses of two coordinates at all steps of the doubling grid.

    Every grid step from 2 _BASE on is twice an earlier one, so each costs one squaring.

    Parameters
    ----------
    matrix, kick : ndarray, shape (d, 2, 2) and (d, 2)
        A, and b of the noise, of one step z' = A z + b e.
    start, read : ndarray, shape (2,)
        z_0 per unit of the start, and the evaluated weights c as a linear form of z.
    started, noisy : ndarray, shape (d, grid)
        Outputs: (c A^t z_0)^2, and the variance of c z_t per unit of noise variance.
    """
    a, b, c, e = np.empty(_BASE), np.empty(_BASE), np.empty(_BASE), np.empty(_BASE)
    p, q, s = np.empty(_BASE), np.empty(_BASE), np.empty(_BASE)
    z0, z1, c0, c1 = start[0], start[1], read[0], read[1]
    rounds = (started.shape[1] - (2 * _BASE - 1)) // _BASE
    for i in range(matrix.shape[0]):
        m00, m01, m10, m11 = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        k0, k1 = kick[i, 0], kick[i, 1]
        a0, b0, e0, d0 = 1.0, 0.0, 0.0, 1.0
        p0, q0, s0 = 0.0, 0.0, 0.0
        for t in range(2 * _BASE - 1):
            a0, b0, e0, d0 = (
                m00 * a0 + m01 * e0,
                m00 * b0 + m01 * d0,
                m10 * a0 + m11 * e0,
                m10 * b0 + m11 * d0,
            )
            u0, u1, w0, w1 = (
                m00 * p0 + m01 * q0,
                m00 * q0 + m01 * s0,
                m10 * p0 + m11 * q0,
                m10 * q0 + m11 * s0,
            )
            p0 = u0 * m00 + u1 * m01 + k0 * k0
            q0 = u0 * m10 + u1 * m11 + k0 * k1
            s0 = w0 * m10 + w1 * m11 + k1 * k1
            y = c0 * (a0 * z0 + b0 * z1) + c1 * (e0 * z0 + d0 * z1)
            started[i, t] = y * y
            noisy[i, t] = c0 * c0 * p0 + 2.0 * c0 * c1 * q0 + c1 * c1 * s0
            if t >= _BASE - 1:
                j = t - (_BASE - 1)
                a[j], b[j], c[j], e[j], p[j], q[j], s[j] = a0, b0, e0, d0, p0, q0, s0
        for r in range(rounds):
            at = 2 * _BASE - 1 + r * _BASE
            for j in range(_BASE):
                a0, b0, e0, d0 = a[j], b[j], c[j], e[j]
                p0, q0, s0 = p[j], q[j], s[j]
                u0, u1 = a0 * p0 + b0 * q0, a0 * q0 + b0 * s0
                w0, w1 = e0 * p0 + d0 * q0, e0 * q0 + d0 * s0
                p[j] = p0 + u0 * a0 + u1 * b0
                q[j] = q0 + u0 * e0 + u1 * d0
                s[j] = s0 + w0 * e0 + w1 * d0
                trace, cross = a0 + d0, b0 * e0
                a0, b0, e0, d0 = a0 * a0 + cross, b0 * trace, e0 * trace, d0 * d0 + cross
                a[j] = a0 if abs(a0) > _FAINT else 0.0
                b[j] = b0 if abs(b0) > _FAINT else 0.0
                c[j] = e0 if abs(e0) > _FAINT else 0.0
                e[j] = d0 if abs(d0) > _FAINT else 0.0
                y = c0 * (a[j] * z0 + b[j] * z1) + c1 * (c[j] * z0 + e[j] * z1)
                started[i, at + j] = y * y
                noisy[i, at + j] = c0 * c0 * p[j] + 2.0 * c0 * c1 * q[j] + c1 * c1 * s[j]


@jit
def jump_responses(matrix, kick, start, read, steps, state, impulse, noisy):
    """Compute the responses of two coordinates after a number of steps, in O(log steps).

    Parameters
    ----------
    matrix, kick : ndarray, shape (d, 2, 2) and (d, 2)
        A, and b of the noise, of one step z' = A z + b e.
    start, read : ndarray, shape (2,)
        z_0 per unit of the start, and the evaluated weights c as a linear form of z.
    steps : int
        Number of steps, >= 0.
    state, impulse : ndarray, shape (d, 2)
        Outputs: A^steps z_0 and A^steps b.
    noisy : ndarray, shape (d,)
        Output: variance of c z per unit of noise variance.
    """
    c0, c1 = read[0], read[1]
    for i in range(matrix.shape[0]):
        a0, b0, e0, d0 = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        k0, k1 = kick[i, 0], kick[i, 1]
        p0, q0, s0 = k0 * k0, k0 * k1, k1 * k1
        ma, mb, me, md = 1.0, 0.0, 0.0, 1.0
        mp, mq, ms = 0.0, 0.0, 0.0
        left = steps
        while left > 0:
            if left & 1:
                u0, u1 = a0 * mp + b0 * mq, a0 * mq + b0 * ms
                w0, w1 = e0 * mp + d0 * mq, e0 * mq + d0 * ms
                mp, mq, ms = (
                    p0 + u0 * a0 + u1 * b0,
                    q0 + u0 * e0 + u1 * d0,
                    s0 + w0 * e0 + w1 * d0,
                )
                ma, mb, me, md = (
                    a0 * ma + b0 * me,
                    a0 * mb + b0 * md,
                    e0 * ma + d0 * me,
                    e0 * mb + d0 * md,
                )
            left >>= 1
            if left:
                u0, u1 = a0 * p0 + b0 * q0, a0 * q0 + b0 * s0
                w0, w1 = e0 * p0 + d0 * q0, e0 * q0 + d0 * s0
                p0, q0, s0 = (
                    p0 + u0 * a0 + u1 * b0,
                    q0 + u0 * e0 + u1 * d0,
                    s0 + w0 * e0 + w1 * d0,
                )
                trace, cross = a0 + d0, b0 * e0
                a0, b0, e0, d0 = a0 * a0 + cross, b0 * trace, e0 * trace, d0 * d0 + cross
                if abs(a0) + abs(b0) + abs(e0) + abs(d0) < _FAINT:
                    a0, b0, e0, d0 = 0.0, 0.0, 0.0, 0.0
        state[i, 0] = ma * start[0] + mb * start[1]
        state[i, 1] = me * start[0] + md * start[1]
        impulse[i, 0] = ma * k0 + mb * k1
        impulse[i, 1] = me * k0 + md * k1
        noisy[i] = c0 * c0 * mp + 2.0 * c0 * c1 * mq + c1 * c1 * ms


@jit
def orbit(matrix, state, out):
    """Compute state, A state, A^2 state, ... for every direction.

    Parameters
    ----------
    matrix, state : ndarray, shape (d, 2, 2) and (d, 2)
        A and the first vector.
    out : ndarray, shape (T, d, 2)
        Output; its first row is `state`.
    """
    for i in range(matrix.shape[0]):
        a, b, c, e = matrix[i, 0, 0], matrix[i, 0, 1], matrix[i, 1, 0], matrix[i, 1, 1]
        x, y = state[i, 0], state[i, 1]
        for t in range(out.shape[0]):
            out[t, i, 0], out[t, i, 1] = x, y
            x, y = a * x + b * y, c * x + e * y
            x = x if abs(x) > _FAINT else 0.0
            y = y if abs(y) > _FAINT else 0.0
