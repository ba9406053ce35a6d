"""Table of the cycles of runs with snapshots: rate, test error and distance against steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from neural.training.results import Finished

#: Points of a run's learning rate, but for the ends of epochs.
POINTS = 200
#: The least part of an epoch by which the rate before its end is asked for.
BEFORE = 1e-9
NAN = float("nan")


def cycles(runs: Sequence[Finished]) -> pd.DataFrame:
    """Collect what `figures.combine.cycle` draws.

    Parameters
    ----------
    runs : sequence of Finished
        Those without snapshots, and diverged ones, are left out.

    Returns
    -------
    DataFrame
        Columns arm, kind (of snapshots), seed, row (``schedule``: the learning rate at this step;
        ``test``: an evaluation; ``snapshot``), cycle (of a star: each begins at the first snapshot,
        so that lines do not hang together; 0 for the others), member (-1: no snapshot), step, lr,
        error and distance, from the weights where the cycles began; NaN before that. The rates are
        those of an arm's first run.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for one in runs:
        if one.folder.run.snapshots is None or one.folder.status != "finished":
            continue
        about = {"arm": one.arm, "kind": one.folder.run.snapshots.kind, "seed": one.seed}
        history = one.folder.history()
        last = history.iloc[-1]
        batches = round(int(last["step"]) / int(last["epoch"]))
        if one.arm not in seen:
            rows += [about | row for row in _rates(one, batches)]
            seen.add(one.arm)
        rows += [about | row for row in _tests(one, history, batches)]
    names = ("arm", "kind", "seed", "row", "cycle", "member", "step", "lr", "error", "distance")
    return pd.DataFrame(rows, columns=list(names))


def _rates(one: Finished, batches: int) -> list[dict[str, Any]]:
    """The rate over a run, also right before the end of each epoch, where cycles may jump."""
    run = one.folder.run
    rate = run.base_lr()
    ends = np.arange(run.train.epochs + 1.0)
    times = np.unique([*np.linspace(0.0, ends[-1], POINTS, endpoint=False), *ends[:-1]])
    times = np.sort(np.concatenate((times, ends[1:] - BEFORE)))
    plain = {"row": "schedule", "cycle": 0, "member": -1, "error": NAN, "distance": NAN}
    return [plain | {"step": t * batches, "lr": rate(t)} for t in times]


def _tests(one: Finished, history: pd.DataFrame, batches: int) -> list[dict[str, Any]]:
    """Evaluations and snapshots of a run; each cycle of a star starts at the first snapshot."""
    run = one.folder.run
    kept = run.snapshots
    assert kept is not None
    first, star, rate = kept.first_epochs, kept.kind == "star", run.base_lr()
    distances = history["distance"] if "distance" in history else [NAN] * len(history)
    moved = dict(zip(history["epoch"], distances, strict=True)) | {first: 0.0}
    result = one.folder.result()
    scores = result[(result["weights"] == "snapshot") & (result["metric"] == "accuracy")]
    score = scores.set_index("member")["value"]
    taken = [
        {
            "row": "snapshot", "cycle": k if star else 0, "member": k, "step": at * batches,
            "lr": rate(at - BEFORE), "error": 1.0 - score[k],
            "distance": moved.get(at, NAN),
        }
        for k, at in enumerate(map(kept.taken_at, range(kept.members)))
    ]  # fmt: skip
    plain = {"row": "test", "cycle": 0, "member": -1}
    rows = [
        plain | {
            "cycle": -(-max(row["epoch"] - first, 0) // kept.cycle_epochs) if star else 0,
            "step": row["step"], "lr": row["lr"], "error": 1.0 - row["accuracy"],
            "distance": NAN if row["epoch"] < first else moved[row["epoch"]],
        }
        for row in history.to_dict("records")
    ]  # fmt: skip
    if first not in history["epoch"].to_numpy():  # where the cycles begin
        begin = {"step": first * batches, "lr": rate(first), "error": NAN}
        rows.append((taken[0] if kept.kind != "triangle" else begin) | plain | {"distance": 0.0})
    rows += [
        taken[0] | plain | {"cycle": k, "step": taken[k - 1]["step"]}
        for k in range(1, kept.members if star else 1)
    ]
    return sorted(rows, key=lambda row: (row["cycle"], row["step"])) + taken
