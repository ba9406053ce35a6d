"""Numbers of measured pages come from the tables in docs/tables, and say what these hold."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from figures.pages import VALUES, entry, markdown, off, ratios, render, within

DOCS = Path(__file__).parents[2] / "docs"
TABLES = DOCS / "tables"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_what_its_tables_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert render(text, TABLES) == text, "make gallery renders the tables into the page"
    # A comment at the start of a line would end the paragraph.
    assert not re.search(r"^\s*<!-- = ", text, re.MULTILINE)


def test_every_table_has_its_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    used = set(re.findall(r"<!-- table: (\w+) -->", text) + re.findall(r'entry\("(\w+)"', text))
    assert used == {path.stem for path in TABLES.glob("*.csv")}


@pytest.mark.parametrize(
    "name", ["bridge_networks", "bridge_digits", "bridge_images", "benchmarks", "experiments"]
)
def test_measured_tables_are_not_typed(name: str) -> None:
    """Outside of rendered tables no row holds a number with its uncertainty."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert "<!-- table: " in text
    rest = re.sub(r"<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    assert not re.search(r"^\|.*\d ± \d", rest, re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "one.csv").write_text(
        "lr,grows [%],K = 1,K = 1 ±,K = 16,name\n"
        "0.5,3,1.10,0.02,0.80,a\n"
        "1,40,0.90,,1.05,\n"
    )  # fmt: skip
    return tmp_path


def test_markdown(folder: Path) -> None:
    """Uncertainties join their number, per cent goes into the cell, digits stay as they are."""
    assert markdown(folder / "one.csv") == (
        "| lr | grows | K = 1 | K = 16 | name |\n"
        "|---|---|---|---|---|\n"
        "| 0.5 | 3 % | 1.10 ± 0.02 | 0.80 | a |\n"
        "| 1 | 40 % | 0.90 | 1.05 | |\n"
    )


def test_a_short_row_is_refused(folder: Path) -> None:
    (folder / "bad.csv").write_text("a,b\n1,2\n1\n")
    with pytest.raises(ValueError, match=r"bad\.csv: 1 cells under 2 names"):
        markdown(folder / "bad.csv")


def test_values(folder: Path) -> None:
    assert sorted(ratios(folder, "one")) == [0.8, 0.9, 1.05, 1.1]
    assert list(ratios(folder, "one", columns="K = 1")) == [1.1, 0.9]
    assert list(ratios(folder, "one", "`grows [%]` < 40", "K = 16")) == [0.8]
    values = pd.Series([1.1, 0.9, 0.8, 1.05])
    assert within(values, 10) == "3 of 4"
    assert within(values, 9.9) == "1 of 4"
    assert off(values) == "20"
    assert entry(folder, "one", "0.5", "K = 1") == "1.10"
    assert set(VALUES) == {"ratios", "entry", "within", "off"}


def test_render_replaces_what_is_stale(folder: Path) -> None:
    stale = (
        'Text <!-- = within(ratios("one"), 10) -->9 of 9<!-- end --> and '
        '<!-- = entry("one", "1", "name") -->x<!-- end -->.\n\n'
        "<!-- table: one -->\n\n| old |\n\n<!-- end of table -->\n"
    )
    fresh = render(stale, folder)
    assert fresh.startswith('Text <!-- = within(ratios("one"), 10) -->3 of 4<!-- end --> and ')
    assert "| 1 | 40 % | 0.90 | 1.05 | |\n\n<!-- end of table -->\n" in fresh
    assert "old" not in fresh
    assert render(fresh, folder) == fresh


def test_a_page_loses_nothing_between_markers(folder: Path) -> None:
    """An empty block, and one whose end was forgotten, before another table."""
    name = next(folder.glob("*.csv")).stem
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    page = f"{begin}\n\n{end}\n\nWords.\n\n## More\n\n{begin}\n\nstray\n\n{end}\n"
    shown = render(page, folder)
    assert "Words.\n\n## More" in shown
    assert "stray" in shown
    assert shown.count("| ") > 0


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10_q75"])
def test_differences_are_those_of_the_means(name: str) -> None:
    """What a row says of its difference in points is its accuracy less the base's."""
    bases = {"base": "base (SGD)", "base (SWA)": "base (SWA, rate kept at 0.05)"}
    table = pd.read_csv(TABLES / f"{name}.csv", index_col=0)
    checked = 0
    for weights, row in table.iterrows():
        told = re.match(r"(base.*): ([-+][\d.]+) points", str(row["against"]))
        if told:
            gain = row["accuracy, %"] - table.loc[bases[told[1]], "accuracy, %"]
            assert gain == pytest.approx(float(told[2]), abs=0.0151), weights  # of rounded means
            checked += 1
    assert checked == 3
