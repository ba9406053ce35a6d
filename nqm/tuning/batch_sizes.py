"""Batch sizes of least loss for a given number of examples, with or without optimised rates.

At given rates the loss is bias + sum_k W_k / B_k, where W_k is the loss that the noise of piece k
adds at batch size 1 (`nqm.tuning.piecewise_loss`). With sum n_k B_k = N the loss is least where
W_k / (n_k B_k^2) is the same for every piece,

    B_k = N sqrt(W_k / n_k) / sum_j sqrt(n_j W_j),      loss = bias + (sum_k sqrt(n_k W_k))^2 / N,

so in one direction B_t is proportional to lr_t times the root of the adjoint. Pieces whose batch
would be smaller than `smallest` take `smallest`; the other pieces share the remaining examples.
The problem is convex in B, so this is its only solution. Rates are optimised with the optimal batch
sizes of each; the derivative by a rate is then that at fixed batch sizes (the envelope theorem).
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
from nqm.tuning.lbfgs import Objective, fastest, optimise
from nqm.tuning.piecewise_loss import Evaluated, equal_pieces, evaluate, final_loss
from nqm.tuning.schedule import WIDTH, as_piecewise, flat_rates
from nqm.tuning.sensitivity import WITHIN, Flatness, flat_numbers, flatness
from nqm.words import short_html, short_repr


@dataclass(frozen=True)
class BestBatches:
    """Optimal schedule of batch sizes for a data budget, and its final loss.

    Attributes
    ----------
    batch_sizes : ndarray, shape (pieces,)
        Real-valued optimum; the sum of `lengths` times `batch_sizes` is `examples`.
    whole : ndarray of int, shape (pieces,)
        Batch sizes in whole examples, within the budget.
    lr : ndarray, shape (pieces,)
        Learning rate of each piece.
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece.
    steps : int
        Steps in all: the sum of `lengths`.
    examples : int
        Data budget N.
    loss, whole_loss : float
        Exact expected loss at the end with `batch_sizes` and with `whole`, over every direction.
    flat : mapping
        Intervals of near-optimal values. "batch_sizes": of each batch size, while all others are
        scaled to keep the number of examples; "lr" and "scale" as in `BestSchedule`, where rates
        are optimised; "steps", where searched: among the numbers of steps that were tried, with
        everything else optimised for each.
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

    __repr__ = short_repr
    _repr_html_ = short_html

    @property
    def program(self) -> Program:
        """Program of SGD with the rates `lr` and the batch sizes `whole`."""
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
    """Find the batch sizes of least expected loss of SGD for a given number of examples.

    More steps forget more of the start but leave smaller batches. The number of steps therefore
    has an optimum, which is searched if `steps` is None.

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares).
    pieces : int
        Number of pieces of equal length, each with a batch size of its own, >= 1. With fewer steps
        than pieces every step is a piece.
    examples : int
        Data budget N: examples of all steps together.
    lr : float, optional
        Constant learning rate; by default every piece has its own, optimised as in
        `best_piecewise`.
    steps : int, optional
        Number of steps, from 1 to `examples` / `smallest`; searched by default.
    smallest : int
        Smallest batch size allowed, >= 1.
    highest_lr : float, optional
        Upper bound of optimised rates; 1 / h of the smallest curvature by default.
    within : float
        Relative rise of the loss that the intervals in `flat` allow.

    Returns
    -------
    BestBatches
        Batch sizes, rates, number of steps, exact final loss and intervals of near-optimal values.

    Raises
    ------
    NQMError
        If `steps` batches of the smallest size need more than `examples`, if SGD diverges, or if an
        argument is out of range.
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
    """Minimise sum noise / B over B >= `smallest` with sum lengths * B = `examples`.

    Parameters
    ----------
    noise : ndarray, shape (pieces,)
        Loss that the noise of each piece adds at batch size 1, >= 0. If all are 0, every choice has
        the same loss and equal batch sizes are returned.
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece, > 0.
    examples : float
        Data budget N, at least `smallest` for every step.
    smallest : float
        Smallest batch size allowed.

    Returns
    -------
    ndarray, shape (pieces,)
        Real-valued batch sizes.
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
    """Round batch sizes to whole examples with sum lengths * B <= `examples`.

    Starts two below the real-valued sizes and enlarges by 1, again and again, the batch that lowers
    the loss most per example. For pieces of equal length this is the best choice of whole numbers,
    because each term of the sum is convex.

    Parameters
    ----------
    noise : ndarray, shape (pieces,)
        Loss that the noise of each piece adds at batch size 1, >= 0.
    lengths : ndarray of int, shape (pieces,)
        Steps of each piece, > 0.
    examples : int
        Data budget N.
    smallest : int
        Smallest batch size allowed.
    sizes : ndarray, shape (pieces,)
        Real-valued batch sizes, as `allocate` returns them.

    Returns
    -------
    ndarray of int, shape (pieces,)
        Whole batch sizes.
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
    """Evaluate these rates at their best batch sizes; at batch size 1 if the loss diverges."""
    unit = evaluate(problem, rates, lengths)
    if not np.isfinite(unit.noise).all():
        return unit
    return evaluate(problem, rates, lengths, allocate(unit.noise, lengths, examples, smallest))


def _rates(
    problem: Problem, pieces: int, steps: int, examples: int, smallest: int, high: float
) -> FloatArray:
    """Optimise the rates of equal pieces, each set of rates with its best batch sizes."""

    def objective(lengths: NDArray[np.int64]) -> Objective:
        def at(rates: FloatArray) -> tuple[float, FloatArray]:
            run = _balanced(problem, rates, lengths, examples, smallest)
            return run.loss, run.by_lr

        return at

    return optimise(objective, problem, steps, min(pieces, steps), examples / steps, high)


def _flat_batches(run: Evaluated, examples: int, smallest: int, within: float) -> Flatness:
    """Interval of each batch size while all others are scaled to keep the number of examples."""
    n, sizes = run.lengths, run.batch_size
    if n.size == 1:  # the budget fixes a single batch size
        return Flatness(sizes, sizes, within)
    others, bias = examples - n * sizes, run.loss - run.noise.sum()

    def moved(x: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore"):
            grown = np.maximum((examples - n * x) / others, 0.0)
            return np.asarray(bias + run.noise * sizes / x + (run.noise.sum() - run.noise) / grown)

    return flatness(moved, sizes, float(smallest), examples / n, within=within)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
