"""The benchmark of advice: on a tiny network, and its share of the gain on made-up losses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from benchmarks.advice import best_cell, loss_at, main, share
from neural.bridge.advise import Advice
from neural.training.experiment import run_experiment
from tests.tiny_runs import recipe


def losses(single: float, eight: float) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "weights": "iterate",
            "members": [1, 8],
            "measured": [single, eight],
            "error": [0.3, 0.4],
            "test_loss": 1.0,
        }
    )


def test_the_share_of_the_best_gain() -> None:
    """K = 2 lies 3/7 of the way in 1 / K from K = 8 to K = 1."""
    grid = [losses(0.5, 0.4), losses(0.9, 0.1), losses(float("inf"), float("inf"))]
    found = Advice(0.1, 32, "iterate", 8, 0.0, 0.0, "prediction", ())
    assert share(grid, losses(0.9, 0.3), found) == pytest.approx((0.6 / 0.8, 0.4 * 2**0.5 / 0.8))
    assert best_cell(grid)["measured"] == 0.1
    assert loss_at(grid[0], "iterate", 2, "measured") == pytest.approx(0.4 + 0.1 * 3 / 7)


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_experiment(recipe({"base": {}}), tmp_path, seeds=[0])
    main([str(tmp_path / "base" / "seed0"), "16", "bridge.select='head'"])
    line = capsys.readouterr().out
    assert line.startswith("lr h_max = ")
    assert "of the gain of the best cell (" in line
