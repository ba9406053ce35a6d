"""The loss of an average of heavy ball, and its derivatives by every step's settings."""

from __future__ import annotations

import numpy as np

from nqm.solvers._kernels.compiling import jit


@jit
def momentum_average(lr, momentum, share, noise, curvature, variance, start, weight, slope):
    """Final loss of an average of heavy ball, and its derivatives by the settings of every step.

    b' = momentum b + h x + e;  x' = x - lr b';  y' = (1 - share) y + share x'; y is evaluated.

    Parameters
    ----------
    lr, momentum, share, noise : ndarray, shape (T,)
        Settings of each step; `noise` is 1 / batch size.
    curvature, variance, start, weight : ndarray, shape (d,)
        h, noise of one example, second moment of the start, and weight of E y^2 in the loss.
    slope : ndarray, shape (4, T)
        Output: derivatives by the four settings; zero before the call.

    Returns
    -------
    float
        Expected loss of y after the last step.
    """
    steps = lr.size
    held = np.empty((steps, 9))  # xx, xb, bb, xy, by, yy before; b'b', xb', yb' after
    loss = 0.0
    for i in range(curvature.size):
        h, v = curvature[i], variance[i]
        xx, xb, bb = start[i], 0.0, 0.0
        xy, by, yy = start[i], 0.0, start[i]
        for t in range(steps):
            rate, m, c = lr[t], momentum[t], share[t]
            bb1 = h * h * xx + 2.0 * h * m * xb + m * m * bb + noise[t] * v
            xb1 = h * xx + m * xb
            yb1 = h * xy + m * by
            held[t, 0], held[t, 1], held[t, 2] = xx, xb, bb
            held[t, 3], held[t, 4], held[t, 5] = xy, by, yy
            held[t, 6], held[t, 7], held[t, 8] = bb1, xb1, yb1
            xx = xx - 2.0 * rate * xb1 + rate * rate * bb1
            xb, bb = xb1 - rate * bb1, bb1
            moved = xy - rate * yb1
            yy = (1.0 - c) ** 2 * yy + 2.0 * c * (1.0 - c) * moved + c * c * xx
            xy = (1.0 - c) * moved + c * xx
            by = (1.0 - c) * yb1 + c * xb
        loss += weight[i] * yy
        p_xx, p_xb, p_bb, p_xy, p_by, p_yy = 0.0, 0.0, 0.0, 0.0, 0.0, weight[i]
        for t in range(steps - 1, -1, -1):
            rate, m, c = lr[t], momentum[t], share[t]
            xx, xb, bb = held[t, 0], held[t, 1], held[t, 2]
            xy, by, yy = held[t, 3], held[t, 4], held[t, 5]
            bb1, xb1, yb1 = held[t, 6], held[t, 7], held[t, 8]
            xx1 = xx - 2.0 * rate * xb1 + rate * rate * bb1
            moved = xy - rate * yb1
            q = 1.0 - c
            slope[2, t] += (
                p_xy * (xx1 - moved)
                + p_by * (xb1 - rate * bb1 - yb1)
                + 2.0 * p_yy * (-q * yy + (q - c) * moved + c * xx1)
            )
            p_moved = q * p_xy + 2.0 * c * q * p_yy
            p_xx1 = p_xx + c * p_xy + c * c * p_yy
            p_x1b1 = p_xb + c * p_by
            slope[0, t] += 2.0 * p_xx1 * (rate * bb1 - xb1) - p_x1b1 * bb1 - p_moved * yb1
            p_bb1 = p_bb + rate * rate * p_xx1 - rate * p_x1b1
            p_xb1 = p_x1b1 - 2.0 * rate * p_xx1
            p_yb1 = q * p_by - rate * p_moved
            slope[1, t] += 2.0 * p_bb1 * (h * xb + m * bb) + p_xb1 * xb + p_yb1 * by
            slope[3, t] += p_bb1 * v
            p_xx = p_xx1 + h * h * p_bb1 + h * p_xb1
            p_xb = 2.0 * h * m * p_bb1 + m * p_xb1
            p_bb = m * m * p_bb1
            p_xy = p_moved + h * p_yb1
            p_by = m * p_yb1
            p_yy = q * q * p_yy
    return loss
