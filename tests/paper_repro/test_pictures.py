"""Every picture of the pages is drawn from tables that lie beside it, and is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from figures import runs
from paper_repro.pictures import (
    CHUNK,
    PICTURES,
    published_cycles,
    published_gains,
    published_means,
    published_ratios,
)

DOCS = Path(__file__).parents[2] / "docs"
IMAGES = DOCS / "images"
#: Kilobytes of one picture.
EACH = 120
#: The pictures were drawn with the version that constraints.txt pins.
DRAWN_WITH = f"matplotlib=={matplotlib.__version__}\n"
#: Drawn without PyTorch.
PLAIN = ("steady_state", "ranking", "scaling_laws", "bridges", "fashion_mnist", "wikitext2")
#: Largest mean difference, of 255, between a committed picture and one drawn now, at an eighth of
#: its size: text of another version of Matplotlib may lie a pixel off, a legend elsewhere is more.
SAME = 1.5


def test_pictures_are_all_that_the_pages_show() -> None:
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    shown = set(re.findall(r"images/(\w+)\.png", text))
    kept = {path.stem for path in IMAGES.glob("*.png")}
    assert shown == kept
    # Those of a journey are drawn by its own session (`python -m figures.journeys`).
    assert {name for name in kept if not name.startswith("journey_")} == set(PICTURES)


def test_every_drawn_table_has_its_picture() -> None:
    used = {name.removeprefix("drawn/") for one in PICTURES.values() for name in one.tables}
    assert {path.stem for path in (DOCS / "tables" / "drawn").iterdir()} <= used


@pytest.mark.parametrize("name", PICTURES)
def test_picture_holds_the_digest_of_its_tables(name: str) -> None:
    path = IMAGES / f"{name}.png"
    assert Image.open(path).info[CHUNK] == PICTURES[name].digest(DOCS), "make pictures"
    assert path.stat().st_size < EACH * 1024


def _coarse(image: Image.Image) -> np.ndarray:
    grey = image.convert("L")
    small = grey.resize((grey.width // 8, grey.height // 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=float)


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in PLAIN else pytest.mark.slow) for one in PICTURES]
)
def test_picture_is_what_is_drawn_now(name: str, tmp_path: Path) -> None:
    if name not in PLAIN:
        pytest.importorskip("torch")
    if DRAWN_WITH not in (DOCS.parent / "constraints.txt").read_text():
        pytest.skip("another Matplotlib lays pictures out by other pixels")
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(PICTURES[name].png(DOCS))
    before, now = (_coarse(Image.open(path)) for path in (IMAGES / f"{name}.png", drawn))
    assert before.shape == now.shape
    assert np.abs(before - now).mean() < SAME, "make pictures"


def test_published_ratios_are_read_with_their_errors() -> None:
    columns = ["lr h_max", "B", "weights", "K = 1", "K = 1 ±", "K = 16", "saved by 16"]
    rows = [[0.25, 32, "iterate", 1.1, 0.1, 0.9, 1.0], [0.25, 32, "SWA", 2.0, 0.2, 3.0, 1.0]]
    found = published_ratios(pd.DataFrame(rows, columns=columns))
    assert found["members"].tolist() == [1, 16]
    assert found["ratio"].tolist() == [1.1, 0.9]
    assert found["ratio_error"].iloc[0] == 0.1
    assert np.isnan(found["ratio_error"].iloc[1])


def test_published_gains_are_shares_and_nats_with_their_intervals() -> None:
    accuracy, loss = "accuracy over equal weights, points", "tuned NLL under equal weights"
    rows = [
        ["deep: gate", 4, "+0.44 (-0.02, +0.86)", "+0.0032 (-0.0001, +0.0067)"],
        ["**equal weights**", 4, "", ""],
    ]
    found = published_gains(pd.DataFrame(rows, columns=["rule", "models", accuracy, loss]))
    assert found["member"].tolist() == ["deep", "**equal weights**"]
    first = found.iloc[0]
    gained = [first[f"accuracy_gain{end}"] for end in ("", "_low", "_high")]
    assert gained == pytest.approx([0.0044, -0.0002, 0.0086])
    assert first["nll_tuned_gain_high"] == pytest.approx(0.0067)
    assert np.isnan(found["accuracy_gain"].iloc[1])


def test_published_cycles_are_errors_with_intervals_of_five_seeds() -> None:
    rows = [["none: four", "local", "85.5 ± 0.3"], ["1/4", "SSE", "85.0 ± 0.4"]]
    found = published_cycles(pd.DataFrame(rows, columns=["rate of the cycles", "way", "a"]), "a")
    assert np.isnan(found["lr_scale"].iloc[0])
    assert found["lr_scale"].iloc[1] == 0.25
    half = stats.t.ppf(0.975, 4) * 0.4 / 5**0.5
    ends = found.loc[1, ["mean", "low", "high"]].tolist()
    assert ends == pytest.approx([15.0, 15.0 - half, 15.0 + half], rel=1e-3)


def test_published_means_are_drawn_with_their_spreads() -> None:
    table = pd.DataFrame({"": ["base", "mean"], "bpc": [1.9, 1.8], "bpc ±": [0.1, np.nan]})
    ax = runs.means(published_means(table, "bpc"))
    (bars,) = ax.containers
    np.testing.assert_allclose(bars[0].get_xdata(orig=False), [1.9, 1.8])
    segments = np.array(bars[2][0].get_segments())
    np.testing.assert_allclose(segments[0, :, 0], [1.8, 2.0])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["base", "mean"]
