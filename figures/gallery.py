"""The gallery's pictures, drawn from the very code its pages show.

Every entry of a page is a heading, a picture, a Python block and what the block prints. The block
leaves a `table` behind, and the picture is `draw` of it: nothing is stated twice. ::

    python -m figures.gallery docs/gallery*.md     # make gallery

runs all blocks, writes the pictures, and puts what was printed into the page.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from figures.style import (
    LINES,
    MARKERS,
    PALETTE,
    REFERENCE,
    axes_or_new,
    context,
    legend_free,
    new_figure,
    plain_log,
    typeset,
)
from nqm.table import COLUMNS

#: Inches, and dots per inch: 480 x 300 pixels.
SIZE, DPI = (3.2, 2.0), 150
#: Shades of every house colour, towards white, in a picture's palette.
SHADES = 8
#: Values whose largest is so many times their least get a logarithmic axis.
WIDE = 12.0
#: Text chunk of a picture that holds its code's digest.
CHUNK = "Code"

_ENTRY = re.compile(
    r"^!\[(?P<alt>[^\]]*)\]\((?P<picture>images/gallery/[^)]+\.png)\)\n\n"
    r"^```python\n(?P<code>.*?)^```\n\n"
    r"^```text\n(?P<printed>.*?)^```\n(?P<prose>.*?)(?=^#|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Entry:
    """One entry of the gallery, as its page states it.

    Attributes
    ----------
    picture : str
        Its path from the page.
    alt, code, printed, prose : str
    span : (int, int)
        Where `printed` stands in the page.
    """

    picture: str
    alt: str
    code: str
    printed: str
    prose: str
    span: tuple[int, int]

    @property
    def digest(self) -> str:
        """Digest of the code, which its picture holds as well."""
        return hashlib.sha256(self.code.encode()).hexdigest()[:16]

    def run(self) -> tuple[pd.DataFrame, str]:
        """Execute the block.

        Returns
        -------
        table : DataFrame
            The block's variable ``table``.
        printed : str
            What the block prints.
        """
        space: dict[str, Any] = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(self.code, self.picture, "exec"), space)
        return space["table"], out.getvalue()


def entries(page: str) -> list[Entry]:
    """Find all entries of a page.

    Parameters
    ----------
    page : str
        Text of the page, in Markdown.

    Returns
    -------
    list of Entry
        In the order of the page.
    """
    found = _ENTRY.finditer(page)
    return [Entry(**match.groupdict(), span=match.span("printed")) for match in found]


def draw(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """A curve per column against the index; a bar per row where the index holds names.

    Parameters
    ----------
    table : DataFrame
        The index's name labels the x axis, the columns' name the y axis ("expected loss" by
        default). A column known at fewer than half of the rows becomes markers. The entry
        ``switch_step`` of its ``attrs`` is the step at which members are spawned: a dotted line.
    ax : Axes, optional

    Returns
    -------
    Axes
        A curve's gid is its column. Axes are logarithmic where positive values spread widely.
    """
    ax = axes_or_new(ax)
    what = typeset(str(table.columns.name or COLUMNS["loss"].label))
    if pd.api.types.is_numeric_dtype(table.index):
        _curves(table, ax)
        name = str(table.index.name or "")
        ax.set(xlabel=COLUMNS[name].label if name in COLUMNS else typeset(name), ylabel=what)
        steps = np.diff(np.sort(table.index.to_numpy(dtype=float)))
        if table.index.min() > 0 and np.ptp(steps) > 1e-6 * steps.max() and _wide(table.index):
            ax.set_xscale("log")
            if table.index.max() < 1e4 and table.index.min() > 1e-3:
                ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        _bars(table, ax)
        ax.set(xlabel=what)
    return ax


def _wide(values: Any) -> bool:
    """Whether positive values want a logarithmic axis."""
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    return bool(numbers.min() > 0 and numbers.max() > WIDE * numbers.min())


def _curves(table: pd.DataFrame, ax: Axes) -> None:
    curves, marked = 0, 0
    if "switch_step" in table.attrs:
        ax.axvline(
            table.attrs["switch_step"], color=REFERENCE, lw=0.8, ls=":", label="$T_0$", gid="T0"
        )
    for name in table.columns:
        rows = table[name].dropna()
        look: dict[str, Any]
        if 2 * len(rows) < len(table):
            look = {"linestyle": "none", "marker": MARKERS[marked], "markerfacecolor": "white"}
            look |= {"color": REFERENCE, "zorder": 3}
            marked += 1
        else:
            look = {"color": PALETTE[curves], "linestyle": LINES[curves]}
            curves += 1
        ax.plot(rows.index, rows, label=typeset(str(name)), gid=str(name), **look)
    if _wide(table):
        ax.set_yscale("log")
        plain_log(ax.yaxis)
    if len(table.columns) > 1:
        legend_free(ax, handlelength=2.2)


def _bars(table: pd.DataFrame, ax: Axes) -> None:
    rows = np.arange(len(table))
    height = 0.8 / len(table.columns)
    for index, name in enumerate(table.columns):
        values: NDArray[np.float64] = table[name].to_numpy(dtype=float)
        place = rows + (index - (len(table.columns) - 1) / 2) * height
        color = PALETTE[index % len(PALETTE)]
        ax.barh(place, values, height, label=typeset(str(name)), gid=str(name), color=color)
        for y, value in zip(place, values, strict=True):
            gap: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points"}
            ax.annotate(f"{value:.3g}", (value, y), va="center", fontsize=7, **gap)
    ax.set_yticks(rows, [typeset(str(name)) for name in table.index])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.15)
    if len(table.columns) > 1:
        ax.legend(loc="best", handlelength=1.0)


def picture(table: pd.DataFrame, digest: str) -> bytes:
    """Draw a table as a small PNG whose metadata hold the digest of its code.

    Parameters
    ----------
    table : DataFrame
        As `draw` takes it.
    digest : str
        Digest of the entry's code.

    Returns
    -------
    bytes
        The PNG file.
    """
    from PIL import Image, PngImagePlugin

    with context():
        figure = new_figure(*SIZE)
        draw(table, ax=figure.subplots())
        raw, small = io.BytesIO(), io.BytesIO()
        figure.savefig(raw, format="png", dpi=DPI)
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text(CHUNK, digest)
    colors = _palette()
    pixels = np.asarray(Image.open(raw).convert("RGB"), dtype=np.int64)
    seen, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    nearest = np.square(seen[:, None] - colors).sum(axis=-1).argmin(axis=1).astype(np.uint8)
    image = Image.fromarray(nearest[where.ravel()].reshape(pixels.shape[:2]))
    image.putpalette(colors.ravel().tolist())
    image.save(small, format="png", optimize=True, pnginfo=metadata)
    return small.getvalue()


def _palette() -> NDArray[np.int64]:
    """House colours and black, each in `SHADES` steps to white, shape (colours, 3)."""
    shades = np.linspace(0.0, 1.0, SHADES)[:, None]
    inks = [np.array(to_rgb(color)) for color in (*PALETTE, REFERENCE, "black")]
    ramps = np.concatenate([shades + (1.0 - shades) * ink for ink in inks])
    return np.asarray((255.0 * ramps).round(), dtype=np.int64)


def build(path: Path) -> None:
    """Run the blocks of a page, and write its pictures and printed output.

    Parameters
    ----------
    path : Path
        The page; pictures are written beside it, the output into it.
    """
    page = path.read_text(encoding="utf-8")
    for entry in reversed(entries(page)):  # from the end, so that places stay right
        table, printed = entry.run()
        target = path.parent / entry.picture
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture(table, entry.digest))
        page = page[: entry.span[0]] + printed + page[entry.span[1] :]
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    for page in sys.argv[1:]:
        build(Path(page))
