"""Batch sizes that make the most of a data budget, alone or together with the rates.

At given rates the loss is bias + sum_k W_k / B_k, where W_k is what the noise of piece k adds at
batch size 1 (`nqm.tuning.piecewise_loss`). With sum n_k B_k = N it is least where W_k / (n_k B_k^2)
is the same for every piece,

    B_k = N sqrt(W_k / n_k) / sum_j sqrt(n_j W_j),      loss = bias + (sum_k sqrt(n_k W_k))^2 / N,

so in one direction B_t is proportional to lr_t times the root of the adjoint. Pieces that would
fall below the smallest batch stay there and leave the rest to the others. The problem is convex
in B and this is the whole solution. Rates are optimised with the batch sizes put in: the
derivative by a rate is then the one at fixed batch sizes (the envelope theorem).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_memory
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.problems.quadrature import condense
from nqm.program import Phase, Program
from nqm.tuning.integer_search import search_numbers
from nqm.tuning.lbfgs import Objective, fastest, from_coarse, usual_starts
from nqm.tuning.piecewise_loss import Evaluated, equal_pieces, evaluate, final_loss
from nqm.tuning.schedule import WIDTH, as_piecewise, flat_rates
from nqm.tuning.sensitivity import WITHIN, Flatness, flat_numbers, flatness


@dataclass(frozen=True)
class BestBatches:
    """A schedule of batch sizes for a data budget, and the loss it ends with.

    Attributes
    ----------
    batch_sizes : ndarray, shape (pieces,)
        Continuous; sum of `lengths` times `batch_sizes` is `examples`.
    whole : ndarray of int, shape (pieces,)
        Whole examples, within the budget.
    lr : ndarray, shape (pieces,)
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece.
    steps : int
    examples : int
        The budget N.
    loss, whole_loss : float
        Exact expected loss at the end with `batch_sizes` and with `whole`, over every direction.
    flat : mapping
        "batch_sizes": how far each may move while all others are scaled to keep the data;
        "lr" and "scale" as in `BestSchedule`, where rates are optimised; "steps", where
        searched: the rest optimised anew, among the numbers of steps looked at.
    """

    batch_sizes: FloatArray
    whole: NDArray[np.int64]
    lr: FloatArray
    lengths: NDArray[np.int64]
    steps: int
    examples: int
    loss: float
    whole_loss: float
    flat: Mapping[str, Flatness] = field(default_factory=dict, repr=False)

    @property
    def program(self) -> Program:
        """SGD with batches of whole examples."""
        lr, size = as_piecewise(self.lr, self.lengths), as_piecewise(self.whole, self.lengths)
        return Program((Phase(SGD(), lr, self.steps, size),))


def best_batches(  # noqa: PLR0913 - options, by keyword
    problem: Problem,
    pieces: int,
    examples: int,
    *,
    lr: float | None = None,
    steps: int | None = None,
    smallest: int = 1,
    highest_lr: float | None = None,
    within: float = WITHIN,
) -> BestBatches:
    """Batch sizes of `pieces` equal pieces with the least expected loss of SGD at equal data.

    At a fixed rate the number of steps decides how much of the start is forgotten and what is left
    for larger batches; it has an optimum of its own, which is searched where `steps` is None.

    Parameters
    ----------
    problem : Problem
    pieces : int
        With fewer steps than pieces, every step is one.
    examples : int
        Data budget N.
    lr : float, optional
        Constant rate; by default every piece has its own, optimised as in `best_piecewise`.
    steps : int, optional
        From 1 to `examples` / `smallest`.
    smallest : int
        Least batch size.
    highest_lr : float, optional
        Of optimised rates, 2 / h of the largest curvature by default.
    within : float
        Rise of the loss that `flat` allows.

    Raises
    ------
    NQMError
        If the examples do not pay for the steps.
    """
    problem = additive_only("best_batches", problem)
    check_integer("best_batches.pieces", pieces, 1)
    check_memory("best_batches.pieces", pieces, 10.0 * pieces)
    check_integer("best_batches.smallest", smallest, 1)
    check_integer("best_batches.examples", examples, smallest)
    if lr is not None:
        check_number("best_batches.lr", lr, low=0.0, closed_low=False)
    small, most = condense(problem, width=WIDTH), examples // smallest
    high, tried = fastest(problem, highest_lr), {}

    def split(count: int) -> Evaluated:
        if lr is None:
            rates = _rates(small, pieces, count, examples, smallest, high)
        else:
            rates = np.full(min(pieces, count), float(lr))
        return _balanced(small, rates, equal_pieces(count, rates.size), examples, smallest)

    if steps is None:
        tried = search_numbers(lambda count: _finite(split(count).loss), 1, most)
        steps = min(tried, key=lambda count: tried[count])
    check_integer("best_batches.steps", steps, 1)
    if steps > most:
        raise NQMError(
            f"best_batches: {examples} examples pay for {most} steps of {smallest}; got {steps} "
            "steps: lower steps or smallest"
        )
    run = split(steps)
    if not math.isfinite(run.loss):
        raise NQMError(
            f"best_batches: SGD diverges in {steps} steps; keep rates below "
            f"{2.0 / problem.curvature.max():g}"
        )
    whole = allocate_whole(
        run.noise * run.batch_size, run.lengths, examples, smallest, run.batch_size
    )
    flat = {"batch_sizes": _flat_batches(run, examples, smallest, within)}
    if lr is None:
        flat |= flat_rates(run, high, within)
    if tried:
        flat["steps"] = flat_numbers(tried, within=within)
    losses = [final_loss(problem, run.lr, run.lengths, b) for b in (run.batch_size, whole)]
    return BestBatches(
        run.batch_size, whole, run.lr, run.lengths, steps, examples, losses[0], losses[1], flat
    )


def allocate(
    noise: FloatArray, lengths: NDArray[np.int64], examples: float, smallest: float
) -> FloatArray:
    """Batch sizes B >= `smallest` of least sum noise / B with sum lengths * B = `examples`.

    Parameters
    ----------
    noise : ndarray, shape (pieces,)
        >= 0. Where it is 0 throughout all batches are alike, and equal ones are returned.
    lengths : ndarray of int, shape (pieces,)
        > 0.
    """
    share = np.sqrt(noise / lengths if noise.any() else np.ones(noise.shape))
    free = share > 0
    while True:
        left = examples - smallest * lengths[~free].sum()
        sizes = np.where(free, left * share / (lengths * share)[free].sum(), float(smallest))
        low = free & (sizes < smallest)
        if not low.any() or not (free & ~low).any():
            return np.maximum(sizes, smallest)
        free &= ~low


def allocate_whole(
    noise: FloatArray,
    lengths: NDArray[np.int64],
    examples: int,
    smallest: int,
    sizes: FloatArray,
) -> NDArray[np.int64]:
    """Whole batch sizes near the continuous `sizes`, with sum lengths * B <= `examples`.

    From two below, one more example at a time goes where it lowers the loss most per example: the
    best whole numbers where pieces are equally long, since what is summed is convex.
    """
    gain_of_one = noise / lengths if noise.any() else np.ones(noise.shape)
    whole = np.maximum(np.floor(sizes).astype(np.int64) - 2, smallest)
    while (fits := lengths <= examples - lengths @ whole).any():
        gain = np.where(fits, gain_of_one / (whole * (whole + 1.0)), -1.0)
        whole[int(np.argmax(gain))] += 1
    return whole


def _balanced(
    problem: Problem,
    rates: FloatArray,
    lengths: NDArray[np.int64],
    examples: int,
    smallest: int,
) -> Evaluated:
    """With the best batch sizes for these rates; at batch size 1 where the loss diverges."""
    unit = evaluate(problem, rates, lengths)
    if not np.isfinite(unit.noise).all():
        return unit
    return evaluate(problem, rates, lengths, allocate(unit.noise, lengths, examples, smallest))


def _rates(
    problem: Problem, pieces: int, steps: int, examples: int, smallest: int, high: float
) -> FloatArray:
    """Best rates of equal pieces, each time with the best batch sizes for them."""

    def objective(lengths: NDArray[np.int64]) -> Objective:
        def at(rates: FloatArray) -> tuple[float, FloatArray]:
            run = _balanced(problem, rates, lengths, examples, smallest)
            return run.loss, run.by_lr

        return at

    starts = usual_starts(problem, steps, examples / steps, high)
    return from_coarse(objective, steps, min(pieces, steps), high, starts)


def _flat_batches(run: Evaluated, examples: int, smallest: int, within: float) -> Flatness:
    """Each batch moved, all others scaled to keep the data."""
    n, sizes = run.lengths, run.batch_size
    if n.size == 1:  # nothing to trade with
        return Flatness(sizes, sizes, within)
    others, bias = examples - n * sizes, run.loss - run.noise.sum()

    def moved(x: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):
            grown = np.maximum((examples - n * x) / others, 0.0)
            return np.asarray(bias + run.noise * sizes / x + (run.noise.sum() - run.noise) / grown)

    return flatness(moved, sizes, float(smallest), examples / n, within=within)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
