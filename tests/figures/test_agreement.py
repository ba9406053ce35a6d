"""The matrix of kappa and the bars of gains show the numbers of their tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from figures import agreement
from neural.combine.plots import draw_gates
from tests.tolerances import IDENTITY, agree


def people() -> pd.DataFrame:
    pairs = {("a", "a"): 1.0, ("a", "label"): 0.25, ("label", "a"): 0.25, ("label", "label"): 1.0}
    rows = [{"first": one, "second": two, "kappa": value} for (one, two), value in pairs.items()]
    return pd.DataFrame([*rows, {"first": "rater", "second": "label", "kappa": 0.875}])


def gains() -> pd.DataFrame:
    entry = {"member": "", "accuracy_gain": math.nan, "nll_gain": math.nan}
    rules = ("ensemble", "shallow", "deep_reward")
    table = pd.DataFrame([{"rule": "member", **entry, "member": "words"},
                          *({"rule": rule, **entry} for rule in rules)])  # fmt: skip
    for k, name in enumerate(("accuracy", "nll", "nll_tuned")):
        table[f"{name}_gain"] = [-0.2, math.nan, 0.01 * k, 0.03]
        table[f"{name}_gain_low"] = [-0.25, math.nan, -0.01, 0.02]
        table[f"{name}_gain_high"] = [-0.1, math.nan, 0.05, 0.05]
    return table


def test_kappa_of_every_two() -> None:
    ax = agreement.kappa(people())
    (image,) = ax.images
    shown = np.ma.filled(image.get_array().astype(float), np.nan)  # type: ignore[union-attr]
    agree(shown[~np.eye(2, dtype=bool)], [0.25, 0.25], IDENTITY)
    assert np.isnan(np.diag(shown)).all()  # one's agreement with oneself tells nothing
    assert [text.get_text() for text in ax.texts] == ["0.25", "0.25"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "label"]
    assert "one rater 0.88" in ax.get_xlabel()


def test_gains_and_their_intervals(tmp_path: Path) -> None:
    ax = agreement.gains(gains(), columns=("accuracy", "nll"))
    assert [text.get_text() for text in ax.get_yticklabels()] == ["words", "shallow", "deep reward"]
    bars = {
        name: [bar.get_width() for bar in ax.patches if bar.get_gid() == name]
        for name in ("accuracy", "nll")
    }
    agree(bars["accuracy"], [-0.2, 0.0, 0.03], IDENTITY)
    agree(bars["nll"], [-0.2, 0.01, 0.03], IDENTITY)
    ends = [line.get_segments() for line in ax.collections]  # type: ignore[attr-defined]
    agree(np.array(ends[0])[:, :, 0], [[-0.25, -0.1], [-0.01, 0.05], [0.02, 0.05]], 1e-9)
    files = draw_gates(gains(), people(), tmp_path, "a title with $")
    assert sorted(path.name for path in files) == ["gates.pdf", "gates.png"]
