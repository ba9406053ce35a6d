"""Amortized ensembling over optimizers, rates and pivots, beside soups.

    python docs/examples/ame_grid.py "out/shards#members" out/ame

RUN#members are the experts, e.g. the clients of `nqm neural clients`. The table has test images,
four corruptions, and the held-out images, on which a setting may be chosen.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

from neural.combine import compare
from neural.combine.cells import Cells
from neural.combine.config import CombineConfig
from neural.combine.data import Parts
from neural.combine.rules import AME, RULES, Merge
from neural.combine.sources import open_members
from nqm.table import write_table

SHIFTS = ("gaussian_noise", "gaussian_blur", "contrast", "brightness")
RATES = {
    "gd": (0.1, 0.3, 1.0),
    "adagrad": (0.1, 0.3, 1.0),
    "adam": (0.03, 0.1, 0.3),
    "adadelta": (1.0, 10.0, 100.0),
}
PIVOTS = ("first", "soup")


def grid() -> dict[str, Merge]:
    """Soups, descent at 1 / i, and every setting of the grid, by name."""
    rules: dict[str, Merge] = {n: RULES[n] for n in ("uniform", "best", "greedy", "ame")}
    for pivot, (optimizer, rates) in product(PIVOTS, RATES.items()):
        for lr in rates:
            rules[f"{pivot} {optimizer} {lr:g}"] = AME(optimizer, lr, pivot=pivot)
    return rules


if __name__ == "__main__":
    where, out = sys.argv[1], Path(sys.argv[2])
    opened = open_members([where])
    assert opened.task is not None
    parts = Parts.of_task(opened.task, held_out=0.2, shifts=SHIFTS)
    assert parts.held_out is not None
    parts = replace(parts, shifts={"held_out": parts.held_out, **parts.shifts})
    config = CombineConfig(predict=False)
    told = print if sys.stderr.isatty() else None
    table = compare(
        opened.members, parts, config, rules=grid(), cells=Cells(out / "cells"), progress=told
    )
    write_table(out / "ame.parquet", table, {"members": where})
