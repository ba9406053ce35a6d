"""Pictures of combined models hold the numbers of their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from figures import combine


def line(ax: Axes, gid: str) -> tuple[np.ndarray, np.ndarray]:
    (one,) = [line for line in ax.get_lines() if line.get_gid() == gid]
    return np.asarray(one.get_xdata()), np.asarray(one.get_ydata())


def rounded() -> pd.DataFrame:
    columns = ["rule", "rounding", "grid_bits", "bits", "passes", "nll", "nll_tuned"]
    return pd.DataFrame(
        [
            ("float", "", 0, 32.0, 1, 0.5, 0.4),
            ("rtn", "nearest", 5, 5.2, 1, 0.6, 0.45),
            ("ensemble", "stochastic", 5, 10.1, 2, 0.4, 0.41),
            ("ensemble", "stochastic", 5, 5.2, 1, 0.7, 0.44),
            ("weight_mean", "stochastic", 5, 32.0, 1, 0.55, 0.42),
            ("ensemble", "gaussian", 5, 64.0, 2, 0.45, 0.43),
        ],
        columns=columns,
    )


def test_a_budget_is_drawn_in_its_order() -> None:
    ax = combine.budget(rounded())
    x, y = line(ax, "stochastic 5")
    np.testing.assert_array_equal(x, [5.2, 10.1])
    np.testing.assert_array_equal(y, [0.7, 0.4])
    np.testing.assert_array_equal(line(ax, "stochastic 5 tuned")[1], [0.44, 0.41])
    np.testing.assert_array_equal(line(ax, "float")[1], [0.5, 0.5])
    drawn = {one.get_gid() for one in ax.get_lines()}
    assert "gaussian 5" not in drawn  # noise saves no memory
    assert ax.get_xscale() == "log"
    passes = combine.budget(rounded(), cost="passes")
    np.testing.assert_array_equal(line(passes, "gaussian 5")[0], [2])


@pytest.mark.parametrize(("metric", "values"), [("error", [0.1, 0.3]), ("nll", [1.0, 2.0])])
def test_a_curve_and_its_line(metric: str, values: list[float]) -> None:
    table = pd.DataFrame(
        {"path": ["curve", "curve", "line", "line"], "t": [1.0, 0.0, 0.0, 1.0], "data": "test",
         "accuracy": [0.7, 0.9, 0.9, 0.7], "nll": [2.0, 1.0, 1.0, 2.0]}
    )  # fmt: skip
    ax = combine.curve(table, metric=metric)
    for path in ("curve", "line", "ends"):
        x, y = line(ax, path)
        np.testing.assert_allclose(x, [0.0, 1.0])
        np.testing.assert_allclose(y, values)


@pytest.mark.parametrize("high", [0.1, 1.0])
def test_a_plane_has_its_corners_and_a_path(high: float) -> None:
    x, y = np.meshgrid([0.0, 1.0, 2.0], [0.0, high, 2 * high])
    grid = pd.DataFrame({"corner": "", "x": x.ravel(), "y": y.ravel()})
    corners = pd.DataFrame({"corner": list("abc"), "x": [0.0, 1.0, 0.5], "y": [0.0, 0.0, high]})
    table = pd.concat([corners, grid], ignore_index=True)
    table["nll"] = table["x"] + 3 * table["y"]
    table["accuracy"] = 1.0 - table["nll"] / 20
    path = np.array([[0.0, 0.0], [0.4, 0.02], [1.0, 0.0]])
    ax = combine.plane(table, path=path)
    np.testing.assert_array_equal(line(ax, "corners")[0], corners["x"])
    np.testing.assert_array_equal(np.column_stack(line(ax, "path")), path)
    assert ax.get_aspect() == (1.0 if high == 1.0 else "auto")
    flat = table.assign(nll=1.0)
    combine.plane(flat)  # a plane without a slope has no contours
