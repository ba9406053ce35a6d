"""Advice against a grid of real trainings: share of the best gain that it gets, and its cost.

    python -m benchmarks.advice RUN STEPS [SETTING ...]

The grid is three rates (lr times the largest curvature 0.0625, 0.25, 1), K = 1, 2, 4, 8, and the
weights themselves, SWA and EMA, 16 runs of B = 32; the advised training is trained as well. Gains
are over the last weights of a single run at the middle rate. Cost is processor time; reading the
data, which both need, is not counted. A SETTING is one of the bridge, e.g.
``bridge.select='head'``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from neural.bridge.advise import Advice, advise
from neural.bridge.api import measure_checkpoint
from neural.bridge.comparison import measure_training
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.pipeline import (
    held_out_risk,
    load_config,
    measured_risk,
    open_target,
)
from neural.bridge.quick import PROBE_RUNS, SETTINGS, measure_for_advice
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk
from neural.training.task import Runtime

RATES = (0.0625, 0.25, 1.0)
#: Rates this near, relatively, count as one of the grid: two measurements of the curvature differ.
SAME = 0.05
PLAN = ["plan.members=[1,2,4,8]", "plan.runs=16", "plan.records=1"]


def trained(
    risk: EmpiricalRisk, test: EmpiricalRisk, config: BridgeConfig, plan: Plan, lr: float
) -> pd.DataFrame:
    """Measured losses at one learning rate."""
    training = replace(config.reference(1.0), lr=lr)
    return measure_training(risk, training, plan, test=test).table.assign(lr=lr)


def loss_at(table: pd.DataFrame, weights: str, members: int, column: str) -> float:
    """Loss of an average, between K of the grid by interpolation in 1 / K."""
    rows = table[table["weights"] == weights].sort_values("members", ascending=False)
    return float(np.interp(1.0 / members, 1.0 / rows["members"], rows[column]))


def best_cell(tables: Sequence[pd.DataFrame]) -> pd.Series[float]:
    """Cell of least measured loss of the grid."""
    cells = pd.concat(tables, ignore_index=True)
    return cells.iloc[int(cells["measured"].to_numpy().argmin())]


def share(tables: Sequence[pd.DataFrame], own: pd.DataFrame, found: Advice) -> tuple[float, float]:
    """Gain of the advised cell over that of the best cell of the grid, and its standard error.

    The two cells count as independent; the error of the single run is not counted. The error is
    NaN if a cell has one group of runs.
    """
    middle, best = loss_at(tables[len(tables) // 2], "iterate", 1, "measured"), best_cell(tables)
    measured, error = (
        loss_at(own, found.weights, found.members, name) for name in ("measured", "error")
    )
    whole = middle - best["measured"]
    return (middle - measured) / whole, float(np.hypot(error, best["error"]) / whole)


def main(words: Sequence[str]) -> None:
    """Print one line: the advice, its share of the best gain, its cost, and test losses."""
    target, steps, *own = words
    config, plan = load_config(None, [*SETTINGS, *PLAN, f"bridge.steps={steps}", *own])
    runtime = Runtime()
    opened = open_target(target, runtime)
    risk = measured_risk(opened, config, plan, runtime, Cache())
    test = held_out_risk(risk, opened.task, config.test_examples)
    times = [time.process_time()]
    found = advise(measure_for_advice(risk, config, plan, None, PROBE_RUNS))
    times.append(time.process_time())
    largest = measure_checkpoint(risk.with_curvature_of(1), config, seed=0).largest
    times.append(time.process_time())
    grid = [trained(risk, test, config, plan, rate / largest) for rate in RATES]
    times.append(time.process_time())
    near = [abs(rate / (found.lr * largest) - 1.0) < SAME for rate in RATES]
    advised = grid[near.index(True)] if any(near) else trained(risk, test, config, plan, found.lr)
    advice, _, whole = np.diff(times)
    measured, test_loss = (
        loss_at(advised, found.weights, found.members, name) for name in ("measured", "test_loss")
    )
    single = loss_at(grid[1], "iterate", 1, "test_loss")
    least = min(float(table["test_loss"].min()) for table in grid)
    gain, error = share(grid, advised, found)
    best = best_cell(grid)
    print(
        f"lr h_max = {found.lr * largest:.3g}, {found.weights}, K = {found.members} "
        f"({found.basis}): {gain:.0%} ± {error:.0%} of the gain of the best cell "
        f"({best['lr'] * largest:.3g}, {best['weights']}, K = {best['members']}), cost "
        f"{advice / whole:.1%}; loss {measured:+.3g}, expected {found.change:+.3g}; test loss "
        f"{test_loss:.4f}, single run {single:.4f}, least of the grid {least:.4f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
