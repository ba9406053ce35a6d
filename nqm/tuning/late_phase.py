"""When to spawn late-phase weights, and how many, at equal data.

A run is T0 steps of SGD at rate lr, then T1 cycles of K additive late-phase members. A cycle draws
K minibatches, so a budget of S minibatches is spent by T0 = S - K T1 steps before it, exactly. The
mean model obeys SGD at rate lambda = member_lr + gamma K lr with batches K times as large
(`nqm.algorithms.LatePhase`): the loss is that of two pieces with batch sizes (B, K B), and both
rates can be optimised by the gradients of `nqm.tuning.piecewise_loss`. K = 1 is plain SGD whose
rate changes at T0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nqm.algorithms.members import LatePhase
from nqm.algorithms.optimizers import SGD
from nqm.errors import NQMError, check_integer, check_number
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem
from nqm.problems.quadrature import condense
from nqm.program import Phase, Program
from nqm.solvers.moments import solve
from nqm.tuning.integer_search import search_numbers
from nqm.tuning.lbfgs import SLOWEST, best_constant, descend, stable
from nqm.tuning.piecewise_loss import Evaluated, evaluate
from nqm.tuning.schedule import WIDTH
from nqm.tuning.sensitivity import WITHIN, Flatness, flat_numbers, flatness

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BestLatePhase:
    """The best start and number of late-phase members, and all settings that were evaluated.

    Attributes
    ----------
    members : int
        K; 1 is plain SGD.
    start, late_steps : int
        T0, steps before the late phase, and T1, its cycles.
    lr, late_lr : float
        Rates of the first phase, and lambda of the mean model in the late phase.
    batch_size : float
        Examples in one minibatch.
    loss, member_loss : float
        Exact expected loss at the end, of the mean model and of the average member, by
        `nqm.solve` on the algorithm itself.
    table : DataFrame
        Columns members, start, late_steps, lr, late_lr, examples, loss; a row for each setting.
    flat : mapping
        "start" at these members and "members" at their best start, each with the free rates
        optimised anew, among the rows of `table`; "lr" and "late_lr" with all else fixed.
    """

    members: int
    start: int
    late_steps: int
    lr: float
    late_lr: float
    batch_size: float
    loss: float
    member_loss: float
    table: pd.DataFrame = field(repr=False)
    flat: Mapping[str, Flatness] = field(repr=False)

    @property
    def program(self) -> Program:
        """Program of the best setting, as `late_program` writes it."""
        return late_program(
            self.members, self.start, self.late_steps, self.lr, self.late_lr, self.batch_size
        )


def late_program(
    members: int, start: int, late_steps: int, lr: float, late_lr: float, batch_size: float
) -> Program:
    """Program of SGD, then late-phase weights (SGD again if `members` is 1).

    Members and base weights have rate `late_lr` / 2 each, so that with gamma = 1 / K the mean model
    has lambda = `late_lr`.

    Parameters
    ----------
    members : int
        Number K of members, >= 1.
    start : int
        T0: steps of SGD before the late phase; 0 leaves them out.
    late_steps : int
        T1: steps of the late phase.
    lr : float
        Learning rate of SGD before the late phase.
    late_lr : float
        Effective learning rate lambda of the mean model in the late phase.
    batch_size : float
        Examples of one minibatch.

    Returns
    -------
    Program
        Of one phase if `start` is 0, otherwise of two.
    """
    half = 0.5 * late_lr
    late = (
        Phase(SGD(), late_lr, late_steps, batch_size)
        if members == 1
        else Phase(LatePhase(members, gamma="mean"), half, late_steps, batch_size, member_lr=half)
    )
    before = (Phase(SGD(), lr, start, batch_size),) if start else ()
    return Program((*before, late))


def best_late_phase(
    problem: Problem,
    examples: float,
    members: Sequence[int] = (1, 2, 3, 5, 10, 20),
    *,
    batch_size: float = 1.0,
    lr: float | None = None,
    late_lr: float | None = None,
    within: float = WITHIN,
) -> BestLatePhase:
    """Find the start and number of additive late-phase members of least loss at equal data.

    For every number of members K, lengths of the late phase on a geometric grid are evaluated, then
    lengths around the best (`nqm.tuning.integer_search`).

    Parameters
    ----------
    problem : Problem
        Noisy quadratic problem (not least squares).
    examples : float
        Data budget in examples; only whole minibatches of it are used.
    members : sequence of int
        Numbers K to try. K = 1 adds plain SGD for comparison.
    batch_size : float
        Examples of one minibatch.
    lr, late_lr : float, optional
        Learning rate of SGD, and lambda = member_lr + gamma K lr of the late phase. Each is
        optimised for every setting unless it is stated.
    within : float
        Relative rise of the loss that the intervals in `flat` allow.

    Returns
    -------
    BestLatePhase
        Best setting, its exact loss, the table of all settings and intervals of near-optimal ones.

    Raises
    ------
    NQMError
        If the examples do not pay for one cycle of some K.
    """
    problem = additive_only("best_late_phase", problem)
    for name, rate in (("lr", lr), ("late_lr", late_lr)):
        if rate is not None:
            check_number(f"best_late_phase.{name}", rate, low=0.0, closed_low=False)
    check_number("best_late_phase.batch_size", batch_size, low=0.0, closed_low=False)
    check_number("best_late_phase.examples", examples, low=batch_size)
    budget = int(examples // batch_size)
    if not members:
        raise NQMError("best_late_phase.members must name at least one number; got none")
    for count in members:
        check_integer("best_late_phase.members", count, 1)
    if max(members) > budget:
        raise NQMError(
            f"best_late_phase: {budget} minibatches do not pay for one cycle of {max(members)} "
            "members; raise examples or lower members"
        )
    small = condense(problem, width=WIDTH)
    high = stable(small)
    constant = best_constant(small, budget, batch_size, high)
    rows: dict[tuple[int, int], Evaluated] = {}

    def loss(count: int, late_steps: int) -> float:
        lengths = np.array([budget - count * late_steps, late_steps])
        sizes = batch_size * np.array([1.0, count])
        rows[count, late_steps] = run = _two_rates(
            small, lengths, sizes, (lr, late_lr), constant, high
        )
        return run.loss if np.isfinite(run.loss) else np.inf

    by_count: dict[int, dict[int, float]] = {}
    for count in sorted(set(members)):
        by_count[count] = search_numbers(partial(loss, count), 1, budget // count)
    least = {count: min(losses.values()) for count, losses in by_count.items()}
    best = min(least, key=lambda count: least[count])
    if not np.isfinite(least[best]):
        raise NQMError(f"best_late_phase: every setting diverges; keep rates below {high:g}")
    late_steps = min(by_count[best], key=lambda steps: by_count[best][steps])
    run, start = rows[best, late_steps], budget - best * late_steps
    starts = {budget - best * late: value for late, value in by_count[best].items()}
    flat = _flat_rates(run, high, within) | {
        "start": flat_numbers(starts, within=within),
        "members": flat_numbers(least, within=within),
    }
    table = _table(rows, budget * batch_size)
    rate, late_rate = map(float, run.lr)
    program = late_program(best, start, late_steps, rate, late_rate, batch_size)
    exact = solve(problem, program, [program.steps])
    return BestLatePhase(
        best,
        start,
        late_steps,
        rate,
        late_rate,
        batch_size,
        float(exact.loss[0]),
        float(exact.member_loss[0]),
        table,
        flat,
    )


def _table(rows: Mapping[tuple[int, int], Evaluated], examples: float) -> pd.DataFrame:
    import pandas as pd

    names = ["members", "start", "late_steps", "lr", "late_lr", "examples", "loss"]
    return pd.DataFrame(
        [
            (members, run.lengths[0], late_steps, *run.lr, examples, run.loss)
            for (members, late_steps), run in sorted(rows.items(), key=lambda row: row[0])
        ],
        columns=names,
    )


def _flat_rates(run: Evaluated, high: float, within: float) -> dict[str, Flatness]:
    """Stated rates may lie beyond the bounds of the search."""
    bounds = np.minimum(SLOWEST * high, run.lr), np.maximum(high, run.lr)
    flat = flatness(run.moved, run.lr, *bounds, within=within)
    ends = zip(flat.low, flat.high, strict=True)
    return {
        name: Flatness(np.asarray(low), np.asarray(high), within)
        for name, (low, high) in zip(("lr", "late_lr"), ends, strict=True)
    }


def _two_rates(
    problem: Problem,
    lengths: FloatArray,
    sizes: FloatArray,
    stated: tuple[float | None, float | None],
    constant: float,
    high: float,
) -> Evaluated:
    """Both pieces at the rates stated, or at the best ones."""
    low = np.array([SLOWEST * high if rate is None else rate for rate in stated])
    top = np.array([high if rate is None else rate for rate in stated])
    rates = low
    if None in stated:

        def objective(rates: FloatArray) -> tuple[float, FloatArray]:
            run = evaluate(problem, rates, lengths, sizes)
            return run.loss, run.by_lr

        # One start at the best constant rate of SGD, one that anneals.
        starts = [constant * np.array(shape) for shape in ((1.0, 1.0), (2.0, 0.25))]
        rates = descend(objective, starts, low, top)
    return evaluate(problem, rates, lengths, sizes)
