"""Questions one asks of a problem: how long, at which rate, up to which batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.optimize import curve_fit, minimize_scalar

from nqm.algorithms.base import Algorithm
from nqm.errors import NQMError, check_integer, check_number
from nqm.least_squares import LeastSquares, any_problem
from nqm.limits import check_memory
from nqm.problem import FloatArray, Problem, numbers_above_zero
from nqm.program import Phase, Program, as_program, one_phase
from nqm.result import Status
from nqm.solvers.moments import PhaseWalk, compose_runs, solve
from nqm.solvers.steady import check_settles, steady
from nqm.transition import cycle_times, extract, runs, spectral_radius

if TYPE_CHECKING:
    from nqm.solvers.least_squares import CoupledPhaseWalk

#: Multiplications that a full scan for the first crossing may cost (about a second).
SCAN_BUDGET = 2e8
#: Relative distance from the floor at which a loss has settled.
SETTLED = 1e-9


# --- stability -------------------------------------------------------------------------------


def stability_edge(
    problem: Problem | LeastSquares,
    algorithm: Algorithm,
    *,
    batch_size: float = 1,
    member_lr_ratio: float = 1.0,
) -> float:
    """Smallest constant learning rate at which some direction is no longer stable.

    All linear methods depend on lr and h through lr * h, so the edge is that of the largest
    curvature. SGD: 2 / h; heavy ball: 2 (1 + momentum) / h; late-phase: lambda h = 2 for the mean
    model or member_lr h = 2 for the members, whichever comes first.

    Parameters
    ----------
    problem : Problem or LeastSquares
        In least squares the noise grows with the weights' distance from the minimum, so that a
        small batch lowers the edge (`nqm.solvers.least_squares.stability_edge`).
    algorithm : Algorithm
    batch_size : float
        Of least squares; the edge of a `Problem` is the same for all.
    member_lr_ratio : float
        member_lr / lr, for late-phase weights.

    Returns
    -------
    float
        ``inf`` if no rate up to 1e4 / h is unstable.
    """
    check_number("stability_edge.member_lr_ratio", member_lr_ratio, low=0.0, closed_low=False)
    check_number("stability_edge.batch_size", batch_size, low=0.0, closed_low=False)
    if not isinstance(algorithm, Algorithm):
        raise NQMError(
            f"stability_edge.algorithm must be a linear algorithm; got {type(algorithm).__name__}"
        )
    problem = any_problem("stability_edge", problem)
    if isinstance(problem, LeastSquares):
        from nqm.solvers import least_squares  # which builds on this module

        return least_squares.stability_edge(
            problem, algorithm, batch_size, member_lr_ratio=member_lr_ratio
        )
    algorithm.check(problem)
    mask = algorithm.replicated(problem)
    if mask is None:
        return _edge(algorithm, float(problem.curvature.max()), member_lr_ratio)
    # Members of their own in some directions only: elsewhere the member rate is none.
    groups = [(mask > 0, member_lr_ratio), (mask == 0, 0.0)]
    return min(
        _edge(algorithm, float(problem.curvature[chosen].max(initial=0.0)), ratio)
        for chosen, ratio in groups
    )


def _edge(algorithm: Algorithm, highest: float, member_lr_ratio: float) -> float:
    """`stability_edge` of directions whose largest curvature is `highest`."""
    if highest == 0.0:
        return float("inf")

    h = np.array([highest])

    def radius(u: FloatArray) -> FloatArray:
        worst = np.zeros(u.shape)
        for mode in algorithm.modes():
            chain = mode.algorithm
            lr = u / highest
            rates = (lr, member_lr_ratio * lr) if chain.rate_count == 2 else lr
            times = cycle_times(chain)

            def step(
                t: int, chain: Algorithm = chain, rates: Any = rates
            ) -> tuple[FloatArray, FloatArray]:
                matrix = extract(chain, h, rates, t).matrix
                return matrix, np.zeros_like(matrix)

            whole, _ = compose_runs(step, runs(chain, times.start, times.stop))
            worst = np.maximum(worst, spectral_radius(whole))
        return worst

    def unstable(u: FloatArray) -> FloatArray:
        return np.asarray(radius(u) > 1.0 + 1e-9)

    grid = np.geomspace(1e-6, 1e4, 4001)
    bad = np.flatnonzero(unstable(grid))
    if bad.size == 0:
        return float("inf")
    if bad[0] == 0:
        return 0.0
    low, high = grid[bad[0] - 1], grid[bad[0]]
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if unstable(np.array([middle]))[0] else (middle, high)
    return float(0.5 * (low + high) / highest)


def searched_edge(problem: Problem | LeastSquares, phase: Phase) -> float:
    """Upper end of the learning rates worth a look when tuning a phase."""
    if not isinstance(phase.algorithm, Algorithm):
        name = type(phase.algorithm).__name__
        raise NQMError(f"{name} has no exact moments to search with; sweep phase.lr instead")
    # With member_lr stated only lr varies: the edge of the base weights alone bounds it.
    ratio = 1.0 if phase.member_lr is None else 1e-9
    batch_size = 1.0
    if isinstance(problem, LeastSquares):  # the largest batch leaves the widest range to search
        batch_size = float(phase.settings(0, 1)[0, -1])
    edge = stability_edge(problem, phase.algorithm, batch_size=batch_size, member_lr_ratio=ratio)
    if not 0 < edge < np.inf:
        raise NQMError(f"no learning rate to search: the stability edge is {edge:g}")
    return edge


# --- best hyper-parameters -------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The best setting found and how flat the optimum is.

    Attributes
    ----------
    lr : float
    loss : float
        Expected loss at `lr`.
    momentum : float
        NaN when only the learning rate was searched.
    flat_low, flat_high : float
        Rates between which the loss stays within 10 % of the best.
    at_edge : bool
        Whether the best rate lies at an end of the searched range.
    evaluated : DataFrame
        Columns lr, loss (and momentum): everything that was computed.
    """

    lr: float
    loss: float
    flat_low: float
    flat_high: float
    at_edge: bool
    momentum: float = float("nan")
    evaluated: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)

    def table(self) -> pd.DataFrame:
        """One row."""
        names = ("lr", "momentum", "loss", "flat_low", "flat_high", "at_edge")
        return pd.DataFrame({name: [getattr(self, name)] for name in names})


def best_lr(
    problem: Problem | LeastSquares,
    make_program: Callable[[float], Program],
    low: float,
    high: float,
    *,
    points: int = 41,
) -> Best:
    """Learning rate in [low, high] with the least expected loss at the end of the program.

    A geometric grid, then a bounded search between the best point's neighbours. "At given steps"
    or "at given data" is what `make_program` says (see `Program` and `nqm.program.steps_for`).

    Parameters
    ----------
    problem : Problem or LeastSquares
    make_program : callable
        From a learning rate to the program to run.
    low, high : float
        Range searched; `stability_edge` is a natural upper end.
    points : int
        Size of the grid.

    Raises
    ------
    NQMError
        If every rate in the range diverges.
    """
    check_number("best_lr.low", low, low=0.0, closed_low=False)
    check_number("best_lr.high", high, low=low, closed_low=False)
    check_integer("best_lr.points", points, 3)
    check_memory("best_lr.points", points, points)
    problem = any_problem("best_lr", problem)
    _callable("best_lr.make_program", make_program)
    rows: list[tuple[float, float]] = []

    def loss(lr: float) -> float:
        program = as_program("best_lr: what make_program returns", make_program(lr))
        with np.errstate(over="ignore", invalid="ignore"):
            value = float(solve(problem, program, [program.steps]).loss[-1])
        value = value if np.isfinite(value) else np.inf
        rows.append((lr, value))
        return value

    grid = np.geomspace(low, high, points)
    losses = np.array([loss(float(lr)) for lr in grid])
    if not np.isfinite(losses).any():
        raise NQMError(f"best_lr: every rate in {low:g}..{high:g} diverges; lower the range")
    best = int(np.argmin(losses))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    minimize_scalar(
        lambda z: min(loss(float(np.exp(z))), 1e300),
        bounds=(np.log(left), np.log(right)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    table = pd.DataFrame(rows, columns=["lr", "loss"]).sort_values("lr", ignore_index=True)
    winner = min(rows, key=lambda row: row[1])
    flat = table.loc[table["loss"] <= 1.1 * winner[1], "lr"]
    return Best(
        lr=winner[0],
        loss=winner[1],
        flat_low=float(flat.min()),
        flat_high=float(flat.max()),
        at_edge=bool(winner[0] <= grid[0] * 1.001 or winner[0] >= grid[-1] / 1.001),
        evaluated=table,
    )


def best_lr_and_momentum(
    problem: Problem | LeastSquares,
    make_program: Callable[[float, float], Program],
    low: float,
    high: float,
    *,
    momenta: Sequence[float] = tuple(1.0 - np.geomspace(1.0, 1e-3, 13)),
    points: int = 31,
) -> Best:
    """Best (learning rate, momentum): `best_lr` for each momentum, then between the best two.

    Parameters
    ----------
    make_program : callable
        From (learning rate, momentum) to the program to run.
    momenta : sequence of float
        Values tried; refined once around the best.
    """
    problem = any_problem("best_lr_and_momentum", problem)
    _callable("best_lr_and_momentum.make_program", make_program)

    def at(momentum: float) -> Best:
        return best_lr(problem, lambda lr: make_program(lr, momentum), low, high, points=points)

    found = {float(m): at(float(m)) for m in momenta}
    order = sorted(found)
    best = min(found, key=lambda m: found[m].loss)
    i = order.index(best)
    left, right = order[max(i - 1, 0)], order[min(i + 1, len(order) - 1)]
    if right > left:
        # Search in log(1 - momentum), the natural scale of a memory.
        def loss(z: float) -> float:
            momentum = 1.0 - float(np.exp(z))
            found[momentum] = at(momentum)
            return found[momentum].loss

        bounds = (np.log1p(-right), np.log1p(-left))
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    best = min(found, key=lambda m: found[m].loss)
    parts = [b.evaluated.assign(momentum=m) for m, b in found.items()]
    winner = found[best]
    return Best(
        lr=winner.lr,
        loss=winner.loss,
        flat_low=winner.flat_low,
        flat_high=winner.flat_high,
        at_edge=winner.at_edge,
        momentum=best,
        evaluated=pd.concat(parts, ignore_index=True),
    )


def _callable(where: str, value: object) -> None:
    if not callable(value):
        raise NQMError(
            f"{where} must be a function that returns a program; got {type(value).__name__}"
        )


# --- time to a target ------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """When the expected loss meets a target.

    Attributes
    ----------
    status : Status
        REACHED, NOT_REACHED (within the phase's steps) or DIVERGED.
    step, examples : float
        Of the crossing; NaN unless reached.
    loss : float
        Expected loss at that step.
    floor : float
        Steady-state loss, NaN where there is none: a target below it is out of reach but for a
        dip on the way.
    scanned : bool
        Whether every step before the crossing was looked at (for a last crossing, every step to
        the horizon). Otherwise only a grid of steps 5 % apart and the bracket were, and a shorter
        swing across the target could have been missed.
    """

    status: Status
    step: float
    examples: float
    loss: float
    floor: float
    scanned: bool


def steps_to_target(
    problem: Problem | LeastSquares, phase: Phase, target: float, *, crossing: str = "first"
) -> Crossing:
    """First (or last) step at which the expected loss is at or below `target`.

    The loss need not fall monotonically (momentum, starts below the floor), so nothing is
    bisected: jumps on a geometric grid of steps bracket the crossing, then steps are scanned.

    Parameters
    ----------
    problem : Problem or LeastSquares
    phase : Phase
        Its `steps` are the horizon; 10**9 is fine at constant rates, but least squares is walked
        step by step.
    target : float
        Expected loss, > 0.
    crossing : {"first", "last"}
        "last" asks from which step on the loss stays at or below the target until the horizon.
    """
    check_number("target", target, low=0.0, closed_low=False)
    if crossing not in ("first", "last"):
        raise NQMError(f"crossing must be 'first' or 'last'; got {crossing!r}")
    phase = one_phase("steps_to_target.phase", phase)
    problem = any_problem("steps_to_target", problem)
    floor = _floor(problem, phase)
    walk = _walk(problem, phase)
    if crossing == "last":
        return _last(walk, phase, target, floor)
    before, lost = 0, Status.NOT_REACHED
    for step, loss in walk.at(_grid(phase.steps)):
        if loss <= target:
            scanned = walk.cost(step) <= SCAN_BUDGET
            start = 0 if scanned else before
            path = walk.path(start, step)
            hit = int(np.flatnonzero(path <= target)[0])
            return _crossed(phase, start + hit, float(path[hit]), floor, scanned)
        before = step
        if not np.isfinite(loss):
            lost = Status.DIVERGED
            break
        if target < floor and abs(loss - floor) <= SETTLED * floor:
            break
    # Dips between grid points count as crossings too, where looking is affordable.
    scanned = walk.cost(before) <= SCAN_BUDGET
    if scanned:
        path = walk.path(0, before)
        dips = np.flatnonzero(path <= target)
        if dips.size:
            return _crossed(phase, int(dips[0]), float(path[dips[0]]), floor, True)
    return Crossing(lost, np.nan, np.nan, np.nan, floor, scanned)


def _walk(problem: Problem | LeastSquares, phase: Phase) -> PhaseWalk | CoupledPhaseWalk:
    """Losses of a phase at any steps."""
    if isinstance(problem, LeastSquares):
        from nqm.solvers.least_squares import CoupledPhaseWalk  # which builds on this module

        return CoupledPhaseWalk(problem, phase)
    return PhaseWalk(problem, phase)


def _last(
    walk: PhaseWalk | CoupledPhaseWalk, phase: Phase, target: float, floor: float
) -> Crossing:
    """Step from which on the loss stays at or below the target until the horizon."""
    grid = _grid(phase.steps)
    losses = np.array([loss for _, loss in walk.at(grid)])
    if not losses[-1] <= target:
        lost = Status.NOT_REACHED if np.isfinite(losses[-1]) else Status.DIVERGED
        return Crossing(lost, np.nan, np.nan, np.nan, floor, False)
    above = np.flatnonzero(~(losses <= target))
    bracket = (0, 0) if above.size == 0 else (int(grid[above[-1]]), int(grid[above[-1] + 1]))
    # A swing above the target between grid points counts too, where looking is affordable.
    scanned = walk.cost(phase.steps) <= SCAN_BUDGET
    start, stop = (0, phase.steps) if scanned else bracket
    path = walk.path(start, stop)
    high = np.flatnonzero(~(path <= target))
    index = 0 if high.size == 0 else int(high[-1]) + 1
    return _crossed(phase, start + index, float(path[index]), floor, scanned)


def _crossed(phase: Phase, step: int, loss: float, floor: float, scanned: bool) -> Crossing:
    return Crossing(Status.REACHED, step, phase.examples(step), loss, floor, scanned)


class OutOfReachError(NQMError):
    """No rate reaches the target within the horizon."""


def fewest_steps(
    problem: Problem | LeastSquares,
    phase: Phase,
    target: float,
    *,
    points: int = 41,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, Crossing]:
    """Constant learning rate at which a phase first meets `target` soonest, and that crossing.

    A geometric grid below the stability edge, then 17 rates between the best one's neighbours.

    Parameters
    ----------
    phase : Phase
        Its `lr` is replaced by each rate tried; its `steps` are the horizon.
    points : int
        Size of the grid.
    progress : callable, optional
        Told of each rate tried.

    Raises
    ------
    OutOfReachError
        An NQMError: no rate reaches the target within the horizon.
    """
    phase = one_phase("fewest_steps.phase", phase)
    problem = any_problem("fewest_steps", problem)
    edge = searched_edge(problem, phase)
    best: tuple[float, Crossing] | None = None
    # From fast to slow; nothing later than the best so far is of interest.
    grid = np.geomspace(0.999 * edge, 1e-5 * edge, points)
    told = progress or (lambda count: None)
    for lr in map(float, grid):
        best = _sooner(best, problem, phase, lr, target)
        told(1)
    if best is None:
        raise OutOfReachError(
            f"target {target:g} is below what any rate reaches in {phase.steps} steps; "
            "raise the target, the steps or the batch size"
        )
    at = int(np.argmin(np.abs(grid - best[0])))
    ends = grid[max(at - 1, 0)], grid[min(at + 1, points - 1)]
    for lr in map(float, np.geomspace(*ends, 17)):
        best = _sooner(best, problem, phase, lr, target)
        told(1)
    assert best is not None
    return best


def _sooner(
    best: tuple[float, Crossing] | None,
    problem: Problem | LeastSquares,
    phase: Phase,
    lr: float,
    target: float,
) -> tuple[float, Crossing] | None:
    steps = phase.steps if best is None else int(best[1].step)
    found = steps_to_target(problem, replace(phase, lr=lr, steps=steps), target)
    if found.status is Status.REACHED and (best is None or found.step < best[1].step):
        return lr, found
    return best


def _floor(problem: Problem | LeastSquares, phase: Phase) -> float:
    try:
        check_settles(phase.algorithm)
        return steady(problem, phase).loss
    except NQMError:
        return float("nan")


def _grid(steps: int) -> list[int]:
    """0, 1, 2, ... then growing by 5 % to `steps`."""
    points = [0]
    while points[-1] < steps:
        points.append(min(steps, max(points[-1] + 1, int(points[-1] * 1.05))))
    return points


# --- critical batch size ---------------------------------------------------------------------


@dataclass(frozen=True)
class CriticalBatch:
    """Fit of steps = least_steps * (1 + critical / batch size) (McCandlish et al. 2018, eq. 2.11).

    Attributes
    ----------
    critical : float
        Batch size at which twice the least number of steps, and of examples, is needed.
    least_steps, least_examples : float
        Limits of large and of small batches.
    table : DataFrame
        A row for each batch size: batch_size, lr (best), step, examples, status (reached, or
        not_reached within `max_steps`), and the fit's step. NaN where not reached; such a batch
        size has no part in the fit.
    """

    critical: float
    least_steps: float
    least_examples: float
    table: pd.DataFrame = field(repr=False)


def critical_batch_size(
    problem: Problem | LeastSquares,
    algorithm: Algorithm,
    target: float,
    batch_sizes: Sequence[float],
    *,
    points: int = 25,
    max_steps: int = 10**7,
) -> CriticalBatch:
    """Batch size beyond which more examples per step no longer save steps.

    For each batch size the constant learning rate that reaches `target` in the fewest steps is
    searched below the stability edge.

    Raises
    ------
    NQMError
        If fewer than three batch sizes reach the target.
    """
    problem = any_problem("critical_batch_size", problem)
    check_number("critical_batch_size.target", target, low=0.0, closed_low=False)
    sizes = numbers_above_zero("critical_batch_size.batch_sizes", batch_sizes)
    if target >= problem.initial_loss:
        raise NQMError(
            f"critical_batch_size: the target {target:g} is met at the start, whose loss is "
            f"{problem.initial_loss:g}; lower the target"
        )
    rows = []
    for batch_size in map(float, sizes):
        phase = Phase(algorithm, 1.0, max_steps, batch_size)
        try:
            lr, found = fewest_steps(problem, phase, target, points=points)
            rows.append((batch_size, lr, found.step, found.examples, str(Status.REACHED)))
        except OutOfReachError:
            rows.append((batch_size, np.nan, np.nan, np.nan, str(Status.NOT_REACHED)))
    table = pd.DataFrame(rows, columns=["batch_size", "lr", "step", "examples", "status"])
    reached = table["status"] == Status.REACHED
    if reached.sum() < 3:
        raise NQMError(
            f"critical_batch_size: {reached.sum()} of {sizes.size} batch sizes reach the target "
            f"{target:g}; three are needed: raise the target, max_steps or the batch sizes"
        )
    used_sizes = table.loc[reached, "batch_size"].to_numpy()
    log_steps = np.log(table.loc[reached, "step"].to_numpy())

    def model(b: FloatArray, log_least: float, log_critical: float) -> FloatArray:
        return np.asarray(log_least + np.log1p(np.exp(log_critical) / b))

    guess = (log_steps.min(), float(np.median(np.log(used_sizes))))
    try:
        with np.errstate(over="ignore"), warnings.catch_warnings(action="ignore"):
            fit, _ = curve_fit(model, used_sizes, log_steps, p0=guess)
    except RuntimeError:
        raise NQMError(
            "critical_batch_size: the steps at these batch sizes do not follow "
            "least (1 + critical / B); take batch sizes from well below to well above the critical"
        ) from None
    least, critical = float(np.exp(fit[0])), float(np.exp(fit[1]))
    fitted = np.exp(model(table["batch_size"].to_numpy(), *fit))
    table["fit"] = np.where(reached, fitted, np.nan)
    return CriticalBatch(critical, least, least * critical, table)
