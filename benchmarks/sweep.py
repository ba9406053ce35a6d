"""Cells per second of a sweep: one process, two processes, and two Dask workers on loopback.

Tiny cells differ in their rate alone, and scheduled ones in the start of their schedule, so that
they are computed in one call; they show what a cell costs beside its numerics (its key, the
journal, its share of the table; an executor's messages). Realistic ones are computed one by one if
they differ in the number of members, and in one call if they differ in a rate. Every table is the
same.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.timing import best_of
from nqm.runs.executors import processes
from nqm.runs.sweep import Sweep

HARMONIC = {"name": "harmonic", "directions": 2}


def tiny(cells: int) -> Sweep:
    """Return a sweep of cheap cells: two directions, one jump of 10^9 steps.

    Parameters
    ----------
    cells : int
        Number of learning rates.

    Returns
    -------
    Sweep
    """
    base = {
        "problem": {"spectrum": HARMONIC, "noise": {}},
        "phase": [{"algorithm": "sgd", "lr": 0.1, "steps": 10**9}],
        "record": {"at": [10**9]},
    }
    return Sweep(base, {"phase.0.lr": [0.1 + i / (2 * cells) for i in range(cells)]})


def scheduled(cells: int) -> Sweep:
    """Return a sweep of cells that are walked: two directions, 300 steps of SGD under a cosine.

    Parameters
    ----------
    cells : int
        Number of learning rates at the start.

    Returns
    -------
    Sweep
    """
    rate = {"schedule": "cosine", "start": 0.1, "end": 0.05, "over": 300}
    base = {
        "problem": {"spectrum": HARMONIC, "noise": {}},
        "phase": [{"algorithm": "sgd", "lr": rate, "steps": 300}],
        "record": {"at": [300]},
    }
    return Sweep(base, {"phase.0.lr.start": [0.1 + i / (2 * cells) for i in range(cells)]})


def realistic(cells: int, axis: str = "phase.0.members") -> Sweep:
    """Return a sweep of cells with 1000 directions.

    A cell has heavy-ball late-phase weights, 300 steps of a cosine schedule, computed step by step,
    and 101 records.

    Parameters
    ----------
    cells : int
        Number of ensemble sizes, from 1, or of learning rates at the start.
    axis : str
        Entry that differs.

    Returns
    -------
    Sweep
    """
    rate = {"schedule": "cosine", "start": 0.5, "end": 0.05, "over": 300}
    late = {
        "algorithm": "late_phase",
        "members": 10,
        "gamma": "mean",
        "lr": rate,
        "steps": 300,
        "batch_size": 8,
    }
    late |= {"inner": {"algorithm": "heavy_ball", "momentum": 0.9}, "member_lr": 0.01}
    base = {
        "problem": {"spectrum": HARMONIC | {"directions": 1000}, "noise": {}},
        "phase": [late],
    }
    sizes = list(range(1, cells + 1))
    return Sweep(base, {axis: sizes if axis.endswith("members") else [i / 20 for i in sizes]})


def rates(cells: int) -> Sweep:
    """Return `realistic` cells that differ in the start of their schedule."""
    return realistic(cells, "phase.0.lr.start")


@contextmanager
def dask(count: int) -> Iterator[Executor]:
    """Start a Dask scheduler and workers of one thread each on this machine.

    Parameters
    ----------
    count : int
        Number of workers.

    Yields
    ------
    Executor
        Runs cells on the workers.
    """
    from distributed import LocalCluster

    from nqm.runs.cluster import connected

    local: dict[str, Any] = {"dashboard_address": None, "host": "127.0.0.1", "silence_logs": 50}
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, **local) as cluster,
        connected(cluster.scheduler_address) as executor,
    ):
        yield executor


def seconds(
    make: Callable[[int], Sweep],
    cells: int,
    executor: Executor | None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure a whole sweep, its table written, after the workers have loaded all modules.

    Parameters
    ----------
    make : callable
        Number of cells -> sweep.
    cells : int
    executor : Executor, optional
        None: one cell after another in this process.
    clock : callable
        Wall-clock time by default.

    Returns
    -------
    float
        Seconds, the best of several.
    """
    with tempfile.TemporaryDirectory() as folder:
        make(8).run(executor=executor)  # a chunk each, enough for every worker to have had one
        paths = (Path(folder, f"{i}.parquet") for i in range(100))
        return best_of(lambda: make(cells).write(next(paths), executor), clock=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", type=int, default=10_000)
    parser.add_argument("--realistic", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="no worker processes")
    given = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    kinds = {
        "tiny": (tiny, given.tiny),
        "scheduled": (scheduled, given.tiny),
        "realistic": (realistic, given.realistic),
        "realistic rates": (rates, given.realistic),
    }
    for name, (make, cells) in kinds.items():
        mine = seconds(make, cells, None, time.process_time)
        each = f"{cells / mine:.4g} cells/s, {1e3 * mine / cells:.3g} ms each"
        print(f"{name}: {cells} cells, one after another, in processor time {each}", flush=True)
        if given.alone:
            continue
        alone = seconds(make, cells, None)
        for where, workers in (("process", processes), ("Dask worker", dask)):
            for count in (1, 2):
                with workers(count) as executor:
                    took = seconds(make, cells, executor)
                text = f"{cells / took:.4g} cells/s, {alone / took:.2f} times as fast"
                if count == 1:  # more workers than idle processors would only wait for each other
                    text += f", {1e3 * (took - alone) / cells:+.3g} ms per cell"
                print(f"  {count} {where}: {text} (load average {os.getloadavg()[0]:.1f})")


if __name__ == "__main__":
    main()
