"""The stream of NumPy's `Generator(SFC64).standard_normal`, and Student's t of it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.ziggurat import TAIL_START, tables

_ACCEPT, _WIDTH, _HEIGHT = tables()
_ONE, _THREE, _EIGHT, _NINE, _ELEVEN, _24, _40 = (np.uint64(n) for n in (1, 3, 8, 9, 11, 24, 40))
_LAYER, _PLACE = np.uint64(0xFF), np.uint64(0x000FFFFFFFFFFFFF)
_UNIT = 2.0**-53


@jit
def _next(state):
    """Next 64 bits of SFC64; `state` is (a, b, c, counter)."""
    a, b, c, counter = state[0], state[1], state[2], state[3]
    bits = a + b + counter
    state[0] = b ^ (b >> _ELEVEN)
    state[1] = c + (c << _THREE)
    state[2] = ((c << _24) | (c >> _40)) + bits
    state[3] = counter + _ONE
    return bits


@jit
def _mix(states):
    """Advance generators that were just seeded by twelve rounds, as the author of SFC64 does."""
    for i in range(states.shape[0]):
        for _ in range(12):
            _next(states[i])


def streams(seed: np.random.SeedSequence, count: int) -> NDArray[np.uint64]:
    """Seed generators of normals that are independent of each other.

    Parameters
    ----------
    seed : numpy.random.SeedSequence
        The second child of it is used: `fast_normals.lanes` uses the first.
    count : int
        Number of generators.

    Returns
    -------
    ndarray of uint64, shape (count, 4)
        State of each, as ``numpy.random.SFC64`` has it after three words of seed; a generator of
        another kind, Philox, makes them, faster than a `SeedSequence` would.
    """
    child = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, 1))
    states = np.ones((count, 4), dtype=np.uint64)
    states[:, :3] = np.random.Philox(child).random_raw(3 * count).reshape(count, 3)
    _mix(states)
    return states


@jit
def unit(state):
    return (_next(state) >> _ELEVEN) * _UNIT


@jit
def _second_try(state, bits, x):
    """Slow part of the ziggurat: a draw of the tail or of a wedge; NaN for a rejection."""
    layer = bits & _LAYER
    if layer == 0:
        while True:
            beyond = -math.log1p(-unit(state)) / TAIL_START
            if -2.0 * math.log1p(-unit(state)) > beyond * beyond:
                break
        # A bit of the place, which the draw does not use otherwise, chooses the side.
        side = (bits >> _NINE) & _PLACE
        return -(TAIL_START + beyond) if (side >> _EIGHT) & _ONE else TAIL_START + beyond
    rise = _HEIGHT[layer - _ONE] - _HEIGHT[layer]
    if rise * unit(state) + _HEIGHT[layer] < math.exp(-0.5 * x * x):
        return x
    return np.nan


@jit
def fill_normals(state, out):
    """Draw standard normals: the stream of ``numpy.random.Generator(SFC64).standard_normal``.

    Parameters
    ----------
    state : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    out : ndarray, any length
        Filled with the draws.
    """
    a, b, c, counter = state[0], state[1], state[2], state[3]
    for i in range(out.size):
        while True:
            bits = a + b + counter
            a = b ^ (b >> _ELEVEN)
            b = c + (c << _THREE)
            c = ((c << _24) | (c >> _40)) + bits
            counter += _ONE
            layer = bits & _LAYER
            place = (bits >> _NINE) & _PLACE
            # Negate without a branch (a random one is mispredicted half the time), and convert
            # from a signed integer, which takes one instruction.
            side = np.int64((bits >> _EIGHT) & _ONE)
            x = ((np.int64(place) ^ -side) + side) * _WIDTH[layer]
            if place >= _ACCEPT[layer]:
                state[0], state[1], state[2], state[3] = a, b, c, counter
                x = _second_try(state, bits, x)
                a, b, c, counter = state[0], state[1], state[2], state[3]
                if math.isnan(x):
                    continue
            out[i] = x
            break
    state[0], state[1], state[2], state[3] = a, b, c, counter


@jit
def correlate(root, normal, columns):
    """Correlate independent normals (d * columns,) in place by root (d, r); none if r = 0."""
    rank = root.shape[1]
    if rank == 0:
        return
    for i in range(root.shape[0] - 1, -1, -1):
        for c in range(columns):
            total = 0.0
            for j in range(min(i + 1, rank)):
                total += root[i, j] * normal[j * columns + c]
            normal[i * columns + c] = total


@jit
def student(state, dof):
    """Student's t by the polar method of Bailey (1994), scaled to unit variance; dof > 2."""
    radius = math.sqrt((dof - 2.0) * math.expm1(-2.0 / dof * math.log1p(-unit(state))))
    return radius * math.cos(2.0 * math.pi * unit(state))
