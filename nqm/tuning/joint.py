"""The best averaged heavy ball: rates, momentum, average and batch sizes together.

    b' = momentum b + g;   x' = x - lr b';   y' = decay y + (1 - decay) x',   y is evaluated,

with settings of their own in every piece. One sweep forwards through the second moments of
(x, b, y) and one backwards give the exact derivative by every setting of every step
(`nqm.solvers._kernels.adjoint`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from nqm.algorithms.averaging import EMA
from nqm.algorithms.optimizers import HeavyBall
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.problems.quadrature import condense
from nqm.program import Phase, Program
from nqm.solvers._kernels.adjoint import momentum_average
from nqm.solvers.moments import Map, power, solve
from nqm.tuning.information import information_bound
from nqm.tuning.lbfgs import LEAST, SLOWEST, best_constant, fastest, stable
from nqm.tuning.piecewise_loss import equal_pieces
from nqm.tuning.schedule import FITS, MOST, WIDTH, optimised
from nqm.tuning.sensitivity import WITHIN, Flatness, flatness
from nqm.words import short_html, short_repr

#: What can be optimised.
SETTINGS = ("lr", "momentum", "decay", "batch_size")
#: Largest momentum searched, and the least share of an iterate in the average.
HEAVIEST, LEAST_SHARE = 0.9999, 1e-6
#: Largest relative distance of the two computations of a loss. Steps far beyond the edge of
#: stability amplify rounding, which a search would fit.
AGREEING = 1e-7
#: Iterations of one search; together with rounding it decides how close to the optimum it ends.
ITERATIONS = 400


@dataclass(frozen=True)
class BestLinear:
    """Settings of every piece, and the loss that they end with.

    Attributes
    ----------
    lr, momentum, decay, batch_size : ndarray, shape (pieces,)
        Settings of each piece.
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece, all > 0.
    loss : float
        Exact expected loss of the average at the end, over every direction.
    bound : float
        Least loss of any linear method with the same examples (`nqm.information_bound`).
    free : tuple of str
        Which of the settings were optimised.
    flat : mapping
        For each of "lr", "momentum" and "decay" that is free the interval of each piece's setting,
        all others fixed, in which the loss stays close to the optimum (`Flatness`). Batch sizes
        have none: their sum is fixed.
    """

    lr: FloatArray
    momentum: FloatArray
    decay: FloatArray
    batch_size: FloatArray
    lengths: NDArray[np.int64]
    loss: float
    bound: float
    free: tuple[str, ...] = field(default=SETTINGS)
    flat: Mapping[str, Flatness] = field(default_factory=dict, repr=False)

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def regret(self) -> float:
        """Loss above the bound."""
        return self.loss - self.bound

    @property
    def program(self) -> Program:
        """Phases that do the same, to be solved or sampled."""
        rows = zip(
            self.lr.tolist(), self.momentum.tolist(), self.decay.tolist(),
            self.batch_size.tolist(), self.lengths.tolist(), strict=True,
        )  # fmt: skip
        return Program(
            tuple(
                Phase(EMA(HeavyBall(momentum), decay), lr, steps, batch_size)
                for lr, momentum, decay, batch_size, steps in rows
            )
        )


def linear_loss(
    problem: Problem,
    lr: FloatArray,
    momentum: FloatArray,
    decay: FloatArray,
    batch_size: FloatArray,
) -> tuple[float, dict[str, FloatArray]]:
    """Compute the final loss of averaged heavy ball, and its derivatives by every setting.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares).
    lr, momentum, decay, batch_size : ndarray, shape (steps,)
        Settings of every step.

    Returns
    -------
    loss : float
        Expected loss of the average after the last step.
    slopes : dict of str to ndarray, shape (steps,)
        Exact derivatives, by name of the setting.

    Raises
    ------
    NQMError
        If the problem is least squares, or the arrays are not of one length.
    """
    problem = additive_only("linear_loss", problem)
    arrays = [np.ascontiguousarray(x, dtype=np.float64) for x in (lr, momentum, decay, batch_size)]
    if any(x.shape != arrays[0].shape or x.ndim != 1 for x in arrays):
        shapes = ", ".join(str(x.shape) for x in arrays)
        raise NQMError(
            "linear_loss: lr, momentum, decay and batch_size must be of one length; got shapes "
            f"{shapes}"
        )
    rates, heavy, kept, size = arrays
    check_memory("linear_loss: the number of steps", rates.size, 14.0 * rates.size)
    slope = np.zeros((4, rates.size))
    start = problem.initial_mean**2 + problem.initial_variance
    loss = momentum_average(
        rates, heavy, 1.0 - kept, 1.0 / size, problem.curvature, problem.noise_variance, start,
        problem.weight, slope,
    )  # fmt: skip
    by = slope[0], slope[1], -slope[2], -slope[3] / size**2
    return float(loss), dict(zip(SETTINGS, by, strict=True))


def best_linear(
    problem: Problem,
    pieces: int,
    steps: int,
    batch_size: float = 1.0,
    *,
    free: Sequence[str] = SETTINGS,
    highest_lr: float | None = None,
    within: float = WITHIN,
) -> BestLinear:
    """Optimise rates, momentum, the average and batch sizes of heavy ball together.

    Bounded quasi-Newton (L-BFGS-B) with exact gradients, on the condensed spectrum, from the best
    constant rate, from the best rates alone, and from the optimum of each setting alone; so the
    loss is no larger than any of theirs. It is a local optimum. Rates may exceed the stability
    edge, as in `best_piecewise`.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem.
    pieces : int
        Number of pieces of equal length, each with settings of its own, >= 1; up to one per step.
    steps : int
        Steps, >= 1.
    batch_size : float
        Examples of one minibatch, > 0. If batch sizes are free their mean, >= 1; each is then at
        least 1, and `steps` times the mean are the examples of all.
    free : sequence of str
        Which of "lr", "momentum", "decay" and "batch_size" are optimised. Others keep the best
        constant rate, momentum 0, decay 0 (the last iterate), and `batch_size`.
    highest_lr : float, optional
        Upper bound of the rates; by default as in `best_piecewise`.
    within : float
        Relative rise of the loss that the intervals in `flat` allow, > 0.

    Returns
    -------
    BestLinear
        Its loss is exact, over every direction of `problem`.

    Raises
    ------
    NQMError
        If an argument is out of range, or the problem is least squares.
    """
    problem = additive_only("best_linear", problem)
    check_integer("best_linear.pieces", pieces, 1)
    check_integer("best_linear.steps", steps, 1)
    check_memory("best_linear.steps", steps, 20.0 * steps)
    check_number("best_linear.within", within, low=0.0, closed_low=False)
    names = (free,) if isinstance(free, str) else tuple(free)
    for name in names:
        check_word("best_linear.free", name, SETTINGS)
    if not names:
        raise NQMError(f"best_linear.free must name settings to optimise; got none of {SETTINGS}")
    check_number(
        "best_linear.batch_size", batch_size, low=1.0 if "batch_size" in names else 0.0,
        closed_low="batch_size" in names,
    )  # fmt: skip
    high, width, best = fastest(problem, highest_lr), WIDTH, None
    while True:
        small = condense(problem, width=width)
        search = _Search(small, equal_pieces(steps, min(pieces, steps)), batch_size, high, names)
        found = search.run()
        exact = replace(found, loss=float(solve(problem, found.program, [steps]).loss[0]))
        best = exact if best is None or exact.loss < best.loss else best
        fits = abs(exact.loss - found.loss) <= FITS * exact.loss
        if fits or small.directions * pieces > MOST or small.directions == problem.directions:
            bound = information_bound(problem, batch_size, steps, methods="linear")
            flat = flat_settings(small, best, high, within)
            return replace(best, bound=float(bound), flat=flat)
        width /= 8.0


def flat_settings(
    problem: Problem, found: BestLinear, high: float, within: float
) -> dict[str, Flatness]:
    """Find the interval of each piece's setting in which the loss stays close to the optimum.

    Parameters
    ----------
    problem : Problem
        Condensed problem on which losses are compared.
    found : BestLinear
        The optimum.
    high : float
        Upper bound of the rates.
    within : float
        Relative rise of the loss allowed.

    Returns
    -------
    dict of str to Flatness
        For each of "lr", "momentum" and "decay" that is free; of shape (pieces,).
    """
    run, flat = _Moved(problem, found), {}
    if "lr" in found.free:
        low = SLOWEST * min(high, stable(problem))
        flat["lr"] = flatness(lambda x: run.loss(lr=x), found.lr, low, high, within=within)
    shares = {"momentum": 1.0 - HEAVIEST, "decay": LEAST_SHARE}
    for name, least in shares.items():
        if name in found.free:  # positive numbers are searched: 1 - momentum and 1 - decay

            def moved(x: FloatArray, name: str = name) -> FloatArray:
                return run.loss(**{name: 1.0 - x})

            share = flatness(moved, 1.0 - getattr(found, name), least, 1.0, within=within)
            flat[name] = Flatness(1.0 - share.high, 1.0 - share.low, within)
    return flat


class _Moved:
    """Loss as a function of one piece's settings, all other pieces at the optimum.

    It is sum_i <G_i, S_i> + c of the second moments S (d, 3, 3) of (x, b, y) after a piece, with
    G and c carried back from the end of the run.
    """

    def __init__(self, problem: Problem, found: BestLinear):
        self.problem, self.found = problem, found
        maps = self._maps(found.lr, found.momentum, found.decay)
        corner = np.array([1.0, 0.0, 1.0])
        start = problem.initial_mean**2 + problem.initial_variance
        moment = start[:, None, None] * np.outer(corner, corner)
        self.before: list[FloatArray] = []
        for matrix, noise in maps:
            self.before.append(moment)
            moment = matrix @ moment @ matrix.swapaxes(1, 2) + noise
        form, rest = np.zeros_like(moment), 0.0
        form[:, 2, 2] = problem.weight
        after = []
        for matrix, noise in reversed(maps):
            after.append((form, rest))
            rest = rest + float(np.sum(form * noise))
            form = matrix.swapaxes(1, 2) @ form @ matrix
        self.after = after[::-1]

    def _maps(
        self, lr: FloatArray, momentum: FloatArray, decay: FloatArray
    ) -> list[tuple[FloatArray, FloatArray]]:
        """Transition and noise of every piece, at settings of its own."""
        h, v = self.problem.curvature, self.problem.noise_variance
        maps = []
        pieces = zip(lr, momentum, decay, self.found.batch_size, self.found.lengths, strict=True)
        for rate, heavy, kept, size, length in pieces:
            step = np.zeros((h.size, 3, 3))
            step[:, 0, 0], step[:, 0, 1] = 1.0 - rate * h, -rate * heavy
            step[:, 1, 0], step[:, 1, 1] = h, heavy
            step[:, 2] = (1.0 - kept) * step[:, 0]
            step[:, 2, 2] = kept
            push = np.array([-rate, 1.0, -(1.0 - kept) * rate])
            noise = (v / size)[:, None, None] * np.outer(push, push)
            many = power(Map(step, noise, np.zeros_like(step)), int(length))
            maps.append((many.matrix, many.noise))
        return maps

    def loss(self, **moved: FloatArray) -> FloatArray:
        """Entry k: the loss with these settings in piece k alone."""
        found = self.found
        settings = {"lr": found.lr, "momentum": found.momentum, "decay": found.decay} | moved
        losses = []
        rows = zip(self._maps(**settings), self.before, self.after, strict=True)
        for (matrix, noise), moment, (form, rest) in rows:
            after = matrix @ moment @ matrix.swapaxes(1, 2) + noise
            losses.append(float(np.sum(form * after)) + rest)
        return np.array(losses)


@dataclass(frozen=True)
class _Search:
    """Search on a condensed problem, over points z (4, pieces).

    Its rows are log lr, -log(1 - momentum), log(1 - decay), and the logarithm of the share
    that each step of a piece has of the examples beyond one per step.
    """

    problem: Problem
    lengths: NDArray[np.int64]
    batch_size: float
    high: float
    free: tuple[str, ...]

    @property
    def pieces(self) -> int:
        return len(self.lengths)

    def settings(self, z: FloatArray) -> list[FloatArray]:
        """Lr, momentum, decay and batch size of the pieces."""
        size = np.full(self.pieces, float(self.batch_size))
        if "batch_size" in self.free:
            weight = np.exp(z[3] - z[3].max())
            spare = (self.batch_size - 1.0) * self.lengths.sum()
            size = 1.0 + spare * weight / (self.lengths @ weight)
        return [np.exp(z[0]), -np.expm1(-z[1]), -np.expm1(z[2]), size]

    def value(self, z: FloatArray) -> tuple[float, FloatArray]:
        """Logarithm of the loss, and its gradient by z."""
        own = self.settings(z)
        steps = [np.repeat(each, self.lengths) for each in own]
        with np.errstate(over="ignore", invalid="ignore"):
            loss, slopes = linear_loss(self.problem, *steps)
            begins = np.cumsum(self.lengths) - self.lengths
            by = np.add.reduceat(np.array([slopes[name] for name in SETTINGS]), begins, axis=1)
        if not math.isfinite(loss) or not np.isfinite(by).all():
            return math.inf, np.zeros_like(z)
        gradient = np.empty_like(z)
        gradient[0] = by[0] * own[0]
        gradient[1] = by[1] * (1.0 - own[1])
        gradient[2] = -by[2] * (1.0 - own[2])
        spare = own[3] - 1.0
        total = self.lengths @ spare
        common = by[3] @ spare / total if total > 0.0 else 0.0
        gradient[3] = spare * (by[3] - self.lengths * common)
        loss = max(loss, LEAST)
        return math.log(loss), gradient / loss

    def descend(self, begin: FloatArray, names: Sequence[str]) -> FloatArray:
        """Local optimum over the settings `names` from a point."""
        rows = [i for i, name in enumerate(SETTINGS) if name in names]
        low = math.log(SLOWEST * min(self.high, stable(self.problem)))
        bounds = (
            (low, math.log(self.high)),
            (0.0, -math.log(1.0 - HEAVIEST)),
            (math.log(LEAST_SHARE), 0.0),
            (-30.0, 30.0),
        )
        chosen = [bounds[i] for i in rows for _ in range(self.pieces)]

        def part(flat: FloatArray) -> tuple[float, FloatArray]:
            z = begin.copy()
            z[rows] = flat.reshape(len(rows), -1)
            value, gradient = self.value(z)
            return value, gradient[rows].ravel()

        result = minimize(
            part, begin[rows].ravel(), jac=True, method="L-BFGS-B", bounds=chosen,
            options={"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "ftol": 1e-12, "maxcor": 30},
        )  # fmt: skip
        z = begin.copy()
        z[rows] = result.x.reshape(len(rows), -1)
        return z if self.value(z)[0] <= self.value(begin)[0] else begin

    def starts(self) -> list[FloatArray]:
        """Points to begin with: plain SGD, and where they are free better rates and averages."""
        pieces, steps = self.pieces, int(self.lengths.sum())
        plain = np.zeros((4, pieces))
        plain[0] = math.log(best_constant(self.problem, steps, self.batch_size, self.high))
        found = [plain]
        if "lr" in self.free:
            rates = optimised(self.problem, pieces, steps, self.batch_size, self.high, None).lr
            found.append(plain.copy())
            found[-1][0] = np.log(rates)
        if "decay" in self.free:  # the mean of the second half, at a larger rate where it is free
            ages = np.cumsum(self.lengths) - 0.5 * self.lengths
            averaged = found[-1].copy()
            averaged[2] = np.log(np.minimum(1.0, 1.0 / np.maximum(1.0, ages - 0.5 * steps)))
            found.append(averaged)
            if "lr" in self.free:
                faster = averaged.copy()
                faster[0] = math.log(0.5 * min(self.high, stable(self.problem)))
                found.append(faster)
        if "momentum" in self.free and "lr" in self.free:
            heavy = found[-1].copy()
            heavy[0] -= math.log(5.0)
            heavy[1] = math.log(5.0)
            found.append(heavy)
        return found

    def run(self) -> BestLinear:
        """Best of the optima from all starts, and from the optimum of each setting alone."""
        begins = self.starts()
        if len(self.free) > 1:
            begins += [self.descend(begins[0], (name,)) for name in self.free]
        ends = [self.descend(begin, self.free) for begin in begins]
        ends += begins[:1]
        for z in sorted(ends, key=lambda point: self.value(point)[0]):
            loss = math.exp(self.value(z)[0])
            lr, momentum, decay, size = self.settings(z)
            found = BestLinear(lr, momentum, decay, size, self.lengths, loss, math.nan, self.free)
            steps = int(self.lengths.sum())
            if abs(solve(self.problem, found.program, [steps]).loss[0] - loss) <= AGREEING * loss:
                break
        return found
