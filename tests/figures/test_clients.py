"""Curves of federated rounds show the numbers of their table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from figures import clients
from neural.clients.experiment import draw
from tests.tolerances import IDENTITY, agree


def test_over_rounds(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"round": [1, 2, 3], "accuracy": [0.2, 0.5, np.nan], "drift": [3.0, 2.0, np.nan]}
    )
    ax = clients.over_rounds(table, column="drift")
    (line,) = ax.lines
    agree(line.get_ydata()[:2], [3.0, 2.0], IDENTITY)  # type: ignore[index]
    assert ax.get_ylabel() == "client drift"
    files = draw(table, tmp_path, "a title with $")
    assert sorted(path.name for path in files) == ["clients.pdf", "clients.png"]


def test_arms_are_means_over_seeds() -> None:
    rows = [
        {"arm": arm, "seed": seed, "round": number, "accuracy": 0.1 * number + 0.02 * seed + shift}
        for arm, shift in (("FedAvg", 0.0), ("FedProx", 0.3))
        for seed in (0, 1)
        for number in (1, 2)
    ]
    ax = clients.over_rounds(pd.DataFrame(rows))
    lines = {line.get_gid(): line for line in ax.lines}
    agree(lines["mean FedAvg"].get_ydata(), [0.11, 0.21], 1e-9)
    agree(lines["mean FedProx"].get_ydata(), [0.41, 0.51], 1e-9)
