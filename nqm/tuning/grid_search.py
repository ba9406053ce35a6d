"""Search of a grid for the fewest steps to a target: problems x batch sizes x rates x algorithms.

Three facts make this quick (the notation is that of `nqm.problems.quadratic`):

1. With additive noise the expected loss is bias(T) + noise(T) / B, so that one propagation serves
   every batch size.
2. At a constant rate a direction's responses depend on u = lr h alone. On a geometric grid of rates
   one table of responses over log u serves every rate: a rate is a shift of the table. The sum over
   directions is then a product of matrices, whose weights are the same for every rate.
3. The sum over a spectrum is a quadrature (`nqm.condense`).

The table is on a grid of steps 3 to 6 % apart, and its interpolation in log u has a relative error
of about 1e-3; it only selects settings near the best. The loss of these is then computed at every
step on the condensed spectrum, and the reported crossing is confirmed on all directions: the loss
there is at or below the target, and one step earlier it is above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from nqm.algorithms.base import Algorithm
from nqm.algorithms.time_dependence import TimeDependence
from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem, numbers_above_zero
from nqm.problems.quadrature import condense
from nqm.result import Status
from nqm.solvers._kernels.responses import double_responses, jump_responses, orbit
from nqm.transition import embedding, extract, minibatches, readout, spectral_radius

#: Longest horizon: losses are good to 1e-7 there, and to 1e-9 up to 10^7 steps.
MOST_STEPS = 10**9
#: Largest spacing of the table in log u, and nodes of its local interpolation.
SPACING, STENCIL = 0.02, 6
#: Rates that share one block of the matrix product.
BLOCK = 10
#: Settings whose screened steps are within this factor of the best are computed exactly, ...
NEAR = 1.1
#: ... or within NEAR_LATE if the crossing is later than LATE steps, where oscillations are damped.
NEAR_LATE, LATE = 1.03, 20_000
#: First step that is computed, as a share of the screened crossing.
BEFORE = 0.75
BEFORE_LATE = 0.95
#: Columns that are NaN for a setting that does not reach the target.
MEASURED = ("lr", "step", "examples", "loss", "loss_before")
#: Up to this step the best setting is computed from its start, to exclude an earlier crossing.
FROM_START = 2 * 10**6


@dataclass(frozen=True)
class _Chain:
    """One direction of an algorithm with at most two coordinates, u = lr h in place of lr."""

    algorithm: Algorithm
    start: FloatArray
    read: FloatArray

    @classmethod
    def of(cls, algorithm: Algorithm) -> _Chain:
        if not (
            isinstance(algorithm, Algorithm)
            and len(algorithm.coordinates) <= 2
            and algorithm.rate_count == minibatches(algorithm) == 1
            and algorithm.time == TimeDependence()
            and not algorithm.member_count
            and not (algorithm.constants or extract(algorithm, 1.0, 1.0).own.size)
        ):
            raise NQMError(
                "search takes algorithms of one or two coordinates, like HeavyBall or EMA; "
                f"got {type(algorithm).__name__}: use fewest_steps"
            )
        start, read = np.zeros(2), np.zeros(2)
        n = len(algorithm.coordinates)
        start[:n], read[:n] = embedding(algorithm)[0].sum(axis=1), readout(algorithm, 0)
        return cls(algorithm, start, read)

    def step(self, u: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A (d, 2, 2) and b (d, 2), for noise in units of the curvature."""
        transition = extract(self.algorithm, 1.0, u)
        n = transition.matrix.shape[-1]
        matrix, kick = np.zeros((u.size, 2, 2)), np.zeros((u.size, 2))
        matrix[:, :n, :n], kick[:, :n] = transition.matrix, transition.noise[..., 0]
        return matrix, kick

    def stable(self, u: FloatArray) -> NDArray[np.bool_]:
        return np.asarray(spectral_radius(self.step(u)[0]) < 1.0)

    def table(self, u: FloatArray, steps: int) -> tuple[FloatArray, FloatArray]:
        """Responses to the start and to the noise, (steps, u); zero where unstable."""
        matrix, kick = self.step(u)
        matrix[~self.stable(u)] = 0.0
        started, noisy = np.empty((u.size, steps)), np.empty((u.size, steps))
        double_responses(matrix, kick, self.start, self.read, started, noisy)
        return started.T, noisy.T


class _Run:
    """Losses of one setting, on every direction of a problem or on its condensed form."""

    def __init__(self, problem: Problem, chain: _Chain, lr: float):
        self.chain = chain
        self.matrix, self.kick = chain.step(lr * problem.curvature)
        self.start_weight, self.noise_weight = _weights(problem)

    def at(self, step: int) -> tuple[float, float]:
        """Compute (bias, noise) after `step` steps; `onwards` continues from this state."""
        d = len(self.matrix)
        self.state, self.impulse, seen = np.empty((d, 2)), np.empty((d, 2)), np.empty(d)
        jump_responses(
            self.matrix,
            self.kick,
            self.chain.start,
            self.chain.read,
            step,
            self.state,
            self.impulse,
            seen,
        )
        self.noise = float(self.noise_weight @ seen)
        return float(self.start_weight @ (self.state @ self.chain.read) ** 2), self.noise

    def onwards(self, steps: int) -> tuple[FloatArray, FloatArray]:
        """Compute (bias, noise) after each of the next `steps` steps."""
        bias = self._seen(self.state, self.start_weight, steps + 1)[1:]
        noise = self._seen(self.impulse, self.noise_weight, steps + 1)[:-1]
        return bias, self.noise + np.cumsum(noise)

    def _seen(self, state: FloatArray, weight: FloatArray, steps: int) -> FloatArray:
        """Weighted sum over directions of (c A^t state)^2 for t = 0, ..., steps - 1.

        With t = k S + s the square is linear in the products of the state after k S steps, and
        its coefficients depend on s alone: all steps together are one product of matrices.
        """
        size = math.isqrt(steps)
        d, count = len(self.matrix), -(-steps // size)
        rows, states = np.empty((size, d, 2)), np.empty((count, d, 2))
        read = np.broadcast_to(self.chain.read, (d, 2))
        orbit(np.ascontiguousarray(self.matrix.swapaxes(1, 2)), read, rows)
        orbit(np.linalg.matrix_power(self.matrix, size), state, states)
        r, q, x, y = rows[..., 0], rows[..., 1], states[..., 0], states[..., 1]
        coefficients = np.hstack([r * r, 2.0 * r * q, q * q])
        products = np.hstack([weight * x * x, weight * x * y, weight * y * y])
        return np.asarray(products @ coefficients.T).reshape(-1)[:steps]

    def losses(self, first: int, last: int, batch_size: float) -> FloatArray:
        """Compute the expected loss after each of first, ..., last steps."""
        check_memory("search.horizon: the steps to the target", last, 4.0 * (last - first))
        bias, noise = self.at(first)
        path = np.empty(last - first + 1)
        path[0] = bias + noise / batch_size
        if last > first:
            later, louder = self.onwards(last - first)
            path[1:] = later + louder / batch_size
        return path


def doubling_grid(horizon: int) -> NDArray[np.int64]:
    """Steps of the coarse grid: 1, ..., 31, then 16, ..., 31 times each power of two.

    Parameters
    ----------
    horizon : int
        The grid ends with the first octave whose last step is >= `horizon`.

    Returns
    -------
    ndarray of int
        Rising numbers of steps.
    """
    octave, grid = np.arange(16, 32), [np.arange(1, 32)]
    while grid[-1][-1] < horizon:
        octave = octave * 2
        grid.append(octave)
    return np.concatenate(grid).astype(np.int64)


def search(
    problems: Problem | Sequence[Problem],
    algorithms: Algorithm | Sequence[Algorithm],
    lr: ArrayLike,
    batch_sizes: Sequence[float],
    target: float,
    *,
    horizon: int = 10**7,
) -> pd.DataFrame:
    """Find the setting that meets `target` in the fewest steps, for every problem and batch size.

    The step reported is the first at which the exact expected loss of that setting, over every
    direction of the problem, is at or below the target. Unstable settings are left out.

    Parameters
    ----------
    problems : Problem or sequence of Problem
        Noisy quadratic problems, for instance one with several preconditioners.
    algorithms : Algorithm or sequence of Algorithm
        Methods of one or two coordinates: SGD, HeavyBall, Nesterov, EMA of SGD.
    lr : array_like, shape (L,)
        Learning rates, > 0: a geometric grid, smallest first.
    batch_sizes : sequence of float
        Examples of one minibatch, > 0.
    target : float
        Expected loss to reach, > 0 and below that of the start.
    horizon : int
        Largest number of steps considered, at most 10^9, where losses have a relative error of
        1e-7 (1e-9 up to 10^7).

    Returns
    -------
    DataFrame
        One row per problem and batch size: ``problem`` and ``algorithm`` (positions in the
        arguments), ``batch_size``, ``lr``, ``step``, ``examples``, ``loss`` (at that step),
        ``loss_before`` (one step earlier), ``status`` (reached, or not_reached within the horizon,
        with NaN), ``scanned`` (whether the loss was computed at every earlier step of this
        setting), and ``unstable`` (number of settings, an algorithm at a rate, that were left out
        as unstable).

    Raises
    ------
    NQMError
        If the rates are no geometric grid, an algorithm has more than two coordinates, the start
        meets the target, or an argument is out of range.
    """
    spectra = [
        additive_only("search", problem) for problem in _several("search.problems", problems)
    ]
    methods = _several("search.algorithms", algorithms)
    chains = [_Chain.of(method) for method in methods]
    rates = _geometric(lr)
    check_number("search.target", target, low=0.0, closed_low=False)
    check_integer("search.horizon", horizon, 1)
    if horizon > MOST_STEPS:
        raise NQMError(
            f"search.horizon must be at most {MOST_STEPS:.0e}, as its powers lose one unit in the "
            f"last place a step; got {horizon}: use fewest_steps"
        )
    sizes = numbers_above_zero("search.batch_sizes", batch_sizes)
    for problem in spectra:
        if target >= problem.initial_loss:
            raise NQMError(
                f"search: the target {target:g} is met at the start, whose loss is "
                f"{problem.initial_loss:g}; lower the target"
            )
    small = [condense(problem) for problem in spectra]
    unstable = [
        sum(int(np.sum(~chain.stable(rates * problem.curvature.max()))) for chain in chains)
        for problem in spectra
    ]
    screened = _screen(small, chains, rates, sizes, target, horizon)
    rows = [
        {"problem": i, "batch_size": size}
        | _settle(spectra[i], small[i], chains, rates, size, target, horizon, screened[i, :, :, j])
        | {"unstable": unstable[i]}
        for i in range(len(spectra))
        for j, size in enumerate(map(float, sizes))
    ]
    return pd.DataFrame(rows)


# --- screening -----------------------------------------------------------------------------------


def _screen(
    problems: list[Problem],
    chains: list[_Chain],
    lr: FloatArray,
    sizes: FloatArray,
    target: float,
    horizon: int,
) -> FloatArray:
    """Approximate steps to the target, (problems, algorithms, rates, batch sizes); inf if none."""
    ratio = np.log(lr[1] / lr[0]) if lr.size > 1 else 1.0
    shift = int(np.ceil(ratio / SPACING))
    spacing = ratio / shift
    found = np.full((len(problems), len(chains), lr.size, sizes.size), np.inf)
    descending = lr[::-1]
    tops = np.array([problem.curvature[0] for problem in problems])
    for top in np.unique(tops):
        members = np.flatnonzero(tops == top)
        weights = [
            _shared_weights(problems[i], spacing, shift, min(BLOCK, lr.size)) for i in members
        ]
        reach = max(len(start) for start, _ in weights)
        start_weight, noise_weight = (
            np.hstack([np.pad(w[part], ((0, reach - len(w[part])), (0, 0))) for w in weights])
            for part in (0, 1)
        )
        u = descending[0] * top * np.exp(-spacing * np.arange((lr.size - 1) * shift + reach))
        for k, chain in enumerate(chains):
            best = found[members].min(axis=(1, 2)).max()  # later crossings cannot win
            grid = doubling_grid(int(min(horizon, 1.2 * best)))
            started, noisy = chain.table(u, grid.size)
            first = int(np.argmax(chain.stable(descending * top)))
            if not chain.stable(descending[first : first + 1] * top)[0]:
                continue
            for block in range(first, lr.size, BLOCK):
                part = slice(block * shift, block * shift + reach)
                bias = started[:, part] @ start_weight[: started[:, part].shape[1]]
                noise = noisy[:, part] @ noise_weight[: started[:, part].shape[1]]
                count = min(BLOCK, lr.size - block)
                shape = (grid.size, members.size, -1)
                steps = _first_below(
                    grid, bias.reshape(shape), noise.reshape(shape), sizes, target
                )[:, :count]
                found[members, k, block : block + count] = steps
    found[found > horizon] = np.inf
    return found[:, :, ::-1]


def _shared_weights(
    problem: Problem, spacing: float, shift: int, count: int
) -> tuple[FloatArray, FloatArray]:
    """Weights of the table's nodes, counted from the largest u, for `count` rates in a row.

    Local Lagrange interpolation of the directions on nodes even in log u, none of which lies
    above the largest direction, so that no unstable node is ever used for a stable rate.
    """
    place = np.log(problem.curvature[0] / problem.curvature) / spacing
    left = np.maximum(place.astype(np.int64) - STENCIL // 2 + 1, 0)
    inside = place - left
    columns = np.zeros((left.max() + STENCIL, 2))
    measures = np.column_stack(_weights(problem))
    for j in range(STENCIL):
        others = np.delete(np.arange(STENCIL), j)
        basis = np.prod((inside[:, None] - others) / (j - others), axis=1)
        np.add.at(columns, left + j, basis[:, None] * measures)
    shifted = np.zeros((len(columns) + (count - 1) * shift, count, 2))
    for k in range(count):
        shifted[k * shift : k * shift + len(columns), k] = columns
    return np.ascontiguousarray(shifted[..., 0]), np.ascontiguousarray(shifted[..., 1])


def _first_below(
    grid: NDArray[np.int64], bias: FloatArray, noise: FloatArray, sizes: FloatArray, target: float
) -> FloatArray:
    """First crossing by settings and batch sizes, log-linear between the grid's steps."""
    out = np.full((*bias.shape[1:], sizes.size), np.inf)
    # The batch size that meets the target at each step, and the least that has met it by then.
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = np.where(bias < target, noise / (target - bias), np.inf)
    needed = np.minimum.accumulate(needed, axis=0)
    for j, size in enumerate(sizes):
        rows, columns = np.nonzero(needed[-1] <= size)
        now = np.count_nonzero(needed[:, rows, columns] > size, axis=0)
        before = np.maximum(now - 1, 0)
        low, high = (
            np.log(bias[s, rows, columns] + noise[s, rows, columns] / size) for s in (now, before)
        )
        gap = np.where(high > low, (high - np.log(target)) / np.maximum(high - low, 1e-300), 1.0)
        out[rows, columns, j] = grid[before] + np.clip(gap, 0.0, 1.0) * (grid[now] - grid[before])
    return out


# --- the crossing itself -------------------------------------------------------------------------


def _settle(  # noqa: PLR0913
    problem: Problem,
    small: Problem,
    chains: list[_Chain],
    lr: FloatArray,
    size: float,
    target: float,
    horizon: int,
    screened: FloatArray,
) -> dict[str, object]:
    """Find the best of the settings near the best, and its crossing over every direction."""
    nothing = {
        "algorithm": -1,
        **dict.fromkeys(MEASURED, np.nan),
        "status": str(Status.NOT_REACHED),
        "scanned": False,
    }
    least = screened.min()
    if not np.isfinite(least):
        return nothing
    near, before = (NEAR, BEFORE) if least < LATE else (NEAR_LATE, BEFORE_LATE)
    order = np.argsort(screened, axis=None, kind="stable")
    best, winner = horizon + 1, (-1, -1)
    for flat in order:
        k, i = np.unravel_index(flat, screened.shape)
        if screened[k, i] > near * min(least, best):
            break
        first = int(before * screened[k, i])
        last = min(best - 1, int(1.02 * screened[k, i]) + 2)
        if last <= first:
            continue
        path = _Run(small, chains[k], float(lr[i])).losses(first, last, size)
        met = np.flatnonzero(path <= target)
        if met.size:
            best, winner = first + int(met[0]), (int(k), int(i))
    if winner[0] < 0:
        return nothing
    k, i = winner
    rate = float(lr[i])
    scanned = best <= FROM_START
    if scanned:
        path = _Run(small, chains[k], rate).losses(0, best, size)
        best = int(np.flatnonzero(path <= target)[0]) if (path <= target).any() else best
    step, loss, above = _confirm(_Run(problem, chains[k], rate), best, size, target)
    return {
        "algorithm": k,
        "lr": rate,
        "step": float(step),
        "examples": step * size,
        "loss": loss,
        "loss_before": above,
        "status": str(Status.REACHED),
        "scanned": scanned,
    }


def _confirm(run: _Run, step: int, size: float, target: float) -> tuple[int, float, float]:
    """Find the crossing at or next to `step` over every direction: (step, loss, loss before).

    Quadrature can shift it if the loss is within about 1e-10 of the target.
    """
    while True:
        above, loss = run.losses(max(step - 1, 0), max(step, 1), size)
        if loss > target:
            step += 1
        elif above <= target and step > 1:
            step -= 1
        else:
            return step, float(loss), float(above)


# --- small things --------------------------------------------------------------------------------


def _weights(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """Loss per unit of squared response to the start, and to noise in units of the curvature."""
    start = problem.initial_mean**2 + problem.initial_variance
    h = problem.curvature
    noise = np.divide(problem.noise_variance, h**2, where=h > 0, out=np.zeros_like(h))
    return problem.weight * start, problem.weight * noise


def _several(where: str, given: Any) -> list[Any]:
    """Turn one or several objects into a list, which must not be empty."""
    several = list(given) if isinstance(given, list | tuple) else [given]
    if not several:
        raise NQMError(f"{where} must name at least one; got none")
    return several


def _geometric(rates: ArrayLike) -> FloatArray:
    lr = numbers_above_zero("search.lr", rates)
    even = np.geomspace(lr[0], lr[-1], lr.size)
    if lr.size > 1 and not (lr[-1] > lr[0] and np.allclose(lr, even, rtol=1e-9, atol=0.0)):
        raise NQMError(
            "search.lr must be a geometric grid, smallest first, as of numpy.geomspace; "
            f"got {shown(rates)}"
        )
    return lr
