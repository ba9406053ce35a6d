"""Products of small matrices, in one double and in two."""

from __future__ import annotations

from nqm.solvers._kernels.compiling import jit

_SPLITTER = 2.0**27 + 1.0


# Plain loops on purpose: array expressions multiply the time these kernels take to compile.
@jit
def copy(a, out):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            out[r, c] = a[r, c]


@jit
def times(a, b, out):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            total = 0.0
            for k in range(n):
                total += a[r, k] * b[k, c]
            out[r, c] = total


@jit
def then(a1, q1, a2, q2, a, q, half):
    """(a, q) = first step 1, then step 2; `a`, `q` may be none of the inputs."""
    n = a1.shape[0]
    times(a2, a1, a)
    times(a2, q1, half)
    for r in range(n):
        for c in range(r + 1):
            total = q2[r, c]
            for k in range(n):
                total += half[r, k] * a2[c, k]
            q[r, c] = total
            q[c, r] = total


@jit
def carry_pair(left, pair, right, out, half):
    """`out` = left pair right'; `out` may be `pair`."""
    n = left.shape[0]
    times(left, pair, half)
    for r in range(n):
        for c in range(n):
            total = 0.0
            for k in range(n):
                total += half[r, k] * right[c, k]
            out[r, c] = total


@jit
def _add_product(high, low, ah, al, bh, bl):
    """High + low + (ah + al)(bh + bl), all in two doubles: see `nqm.double_double`."""
    product = ah * bh
    scaled = _SPLITTER * ah
    a1 = scaled - (scaled - ah)
    a2 = ah - a1
    scaled = _SPLITTER * bh
    b1 = scaled - (scaled - bh)
    b2 = bh - b1
    rest = ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2 + (ah * bl + al * bh)
    total = high + product
    second = total - high
    rest += low + ((high - (total - second)) + (product - second))
    rounded = total + rest
    return rounded, rest - (rounded - total)


@jit
def times_exact(a, a_low, b, b_low, out, out_low):
    n = a.shape[0]
    for r in range(n):
        for c in range(n):
            high, low = 0.0, 0.0
            for k in range(n):
                high, low = _add_product(high, low, a[r, k], a_low[r, k], b[k, c], b_low[k, c])
            out[r, c], out_low[r, c] = high, low


@jit
def size(a):
    """Largest absolute value of an entry."""
    size = 0.0
    for r in range(a.shape[0]):
        for c in range(a.shape[1]):
            size = max(size, abs(a[r, c]))
    return size
