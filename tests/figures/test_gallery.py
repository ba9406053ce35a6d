"""The gallery: every entry has its picture, and every number in its prose is one its code prints.

The blocks themselves run in `test_docs`, which also compares what they print with the page.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from figures.gallery import CHUNK, Entry, build, draw, entries, picture
from figures.style import PALETTE

DOCS = Path(__file__).parents[2] / "docs"
TEXT = "".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("gallery*.md")))
ENTRIES = entries(TEXT)
#: Kilobytes of one picture, and of all.
EACH, ALL = 25, 600


def stem(entry: Entry) -> str:
    return Path(entry.picture).stem


def test_the_pages_are_made_of_entries() -> None:
    """No heading of an entry, and no block, is missed by the pattern."""
    assert len(ENTRIES) == len(re.findall("^## ", TEXT, re.M)) == TEXT.count("```python") > 20
    assert len({entry.picture for entry in ENTRIES}) == len(ENTRIES)
    drawn = {path.name for path in (DOCS / "images" / "gallery").iterdir()}
    assert drawn == {Path(entry.picture).name for entry in ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES, ids=stem)
def test_entry(entry: Entry) -> None:
    """Its picture is of this code; the numbers set in bold are printed; public names only."""
    path = DOCS / entry.picture
    image = Image.open(path)
    assert image.info[CHUNK] == entry.digest, "the code has changed: make gallery"
    assert image.size == (480, 300)
    assert path.stat().st_size < EACH * 1024
    quoted = re.findall(r"\*\*([^*]+)\*\*", entry.prose)
    assert quoted
    tokens = re.findall(r"[-+]?[\d.]*\d", entry.printed)
    assert set(quoted) <= set(tokens), "a number in bold is not one that the code prints"
    assert entry.alt
    assert not re.search(r"\._|import _", entry.code)


def test_all_pictures_are_small() -> None:
    sizes = [(DOCS / entry.picture).stat().st_size for entry in ENTRIES]
    assert sum(sizes) < ALL * 1024


def test_curves_and_markers() -> None:
    steps = pd.Index(range(0, 101, 10), name="step")
    few = pd.Series({0: 2.0, 100: 1.0})
    table = pd.DataFrame({"a": np.geomspace(100, 1, 11), "few": few}, steps)
    ax = draw(table)
    a, marks = ax.get_lines()
    assert (a.get_gid(), marks.get_gid()) == ("a", "few")
    np.testing.assert_array_equal(a.get_xdata(), steps)
    np.testing.assert_array_equal(a.get_ydata(), table["a"])
    np.testing.assert_array_equal(marks.get_xdata(), [0, 100])
    assert (a.get_linestyle(), marks.get_linestyle()) == ("-", "None")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training step", "expected loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert ax.get_legend() is not None


def test_axes_are_logarithmic_where_values_spread() -> None:
    narrow = pd.DataFrame({"a": [1.0, 2.0, 3.0]}, pd.Index([1.0, 10.0, 100.0], name="K"))
    ax = draw(narrow.rename_axis(columns="ratio"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$K$", "ratio")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.get_legend() is None
    negative = draw(pd.DataFrame({"a": [-1.0, 200.0]}, [1.0, 2.0]))
    assert negative.get_yscale() == "linear"
    even = draw(pd.DataFrame({"a": [1.0] * 100}, range(1, 101)))
    assert even.get_xscale() == "linear"


def test_names_become_bars() -> None:
    ax = draw(pd.DataFrame({"loss": [0.5, 0.25]}, ["one", "two"]))
    assert [bar.get_width() for bar in ax.patches] == [0.5, 0.25]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"]
    assert [text.get_text() for text in ax.texts] == ["0.5", "0.25"]


def test_a_picture_is_small_and_of_the_house_colours() -> None:
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [2.0, 1.0]}, [0, 1])
    image = Image.open(io.BytesIO(picture(table, "digest")))
    assert image.mode == "P"
    assert image.info[CHUNK] == "digest"
    seen = {color for _, color in image.convert("RGB").getcolors()}
    for name in PALETTE[:2]:
        assert tuple(round(255 * part) for part in to_rgb(name)) in seen


def test_building_draws_and_notes_what_is_printed(tmp_path: Path) -> None:
    def one(name: str, value: int) -> str:
        code = f"import pandas as pd\ntable = pd.DataFrame({{'a': [{value}, 2]}})\nprint({value})\n"
        head = f"## {name}\n\n![alt](images/gallery/{name}.png)\n\n"
        return f"{head}```python\n{code}```\n\n```text\nold, and longer\n```\n\n**{value}** so.\n\n"

    page = tmp_path / "page.md"
    page.write_text("# T\n\n" + one("first", 1) + one("second", 3) + "# Other\n\nend\n")
    build(page)
    new = entries(page.read_text())
    assert [entry.printed for entry in new] == ["1\n", "3\n"]
    assert page.read_text().endswith("# Other\n\nend\n")
    for entry in new:
        assert Image.open(tmp_path / entry.picture).info[CHUNK] == entry.digest
