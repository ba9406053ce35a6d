"""How every figure looks, and what its file says about itself."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from nqm.table import replacing

#: Widths of a journal's column and page, in inches.
COLUMN, PAGE = 3.5, 7.0
DPI = 200

#: Okabe & Ito (2008): told apart with any colour vision. Black is kept for references.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE = "#333333"
#: Further colours, for more arms than the palette has (Tol 2021); never for two meanings of one.
MORE = ("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#661100")
MARKERS = ("o", "s", "^", "D", "v", "P")
#: Further markers, where one colour has more than `MARKERS`.
MORE_MARKERS = ("X", "<", ">", "p", "h", "*", "d", "8")
LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)), (0, (7, 2)),
                          (0, (3, 1, 1, 1, 1, 1)))  # fmt: skip
#: A sequential map that is monotone in lightness.
COLORMAP = "viridis"
UNSTABLE = "#d9d9d9"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.0,
    "legend.borderaxespad": 0.4,
    "legend.labelspacing": 0.35,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.width": 0.5,
    "ytick.minor.width": 0.5,
    "pdf.fonttype": 42,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


def context() -> AbstractContextManager[None]:
    """Apply the project's Matplotlib style inside a ``with`` block.

    Returns
    -------
    context manager
        Sets `STYLE` on entry and restores the user's own settings on exit.
    """
    settings: Any = STYLE  # the stubs ask for a literal type of every key
    return mpl.rc_context(settings)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line style of the curve with this number.

    Parameters
    ----------
    index : int
        From 0.

    Returns
    -------
    dict
        ``color``, ``marker`` and ``linestyle``. The first 12 colours differ, and so do the pairs of
        marker and line style of the first 36 curves: they are told apart without colour.
    """
    colors = PALETTE + MORE
    turn = index // len(MARKERS)
    return {
        "color": colors[index % len(colors)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[(index + turn) % len(LINES)],
    }


def ordered(count: int, colormap: str = COLORMAP) -> list[dict[str, Any]]:
    """Looks of ordered numbers: the shade tells their order, line and marker tell them apart.

    Parameters
    ----------
    count : int
        How many.
    colormap : str
        As for `shades`.

    Returns
    -------
    list of dict
        As `look` returns them, with the colours of `shades`.
    """
    return [look(i) | {"color": color} for i, color in enumerate(shades(count, colormap))]


def shades(count: int, colormap: str = COLORMAP) -> list[Any]:
    """Colours of ordered numbers, from dark to light, told apart by their lightness.

    Parameters
    ----------
    count : int
        How many.
    colormap : str
        Another map for another quantity of the same page.

    Returns
    -------
    list of tuple
        RGBA; the light end of the map, which is faint on white, is left out.
    """
    colors = mpl.colormaps[colormap]
    return [colors(0.75 * i / max(count - 1, 1)) for i in range(count)]


#: Symbols as plain text has them, and as they are set.
_AS_SET = (
    ("h_max", r"h_{\max}"),
    ("eta", r"\eta"),
    ("lambda", r"\lambda"),
    ("gamma", r"\gamma"),
    ("sigma^2", r"\sigma^2"),
)
_SYMBOLS = {name: name for name in "KhBCHtv"} | dict(_AS_SET)
_SYMBOL = re.compile(r"(?<![\w$^'])(" + "|".join(map(re.escape, _SYMBOLS)) + r")(?![\w$^])")


def typeset(text: str) -> str:
    """Set the symbols of a text as mathematics; its dollar signs are shown as such.

    Parameters
    ----------
    text : str
        Plain text in which symbols stand as words, e.g. ``"K = 2"`` or ``"lr h_max"``.

    Returns
    -------
    str
        For Matplotlib, e.g. ``"$K$ = 2"``.
    """
    plain = _SYMBOL.sub(lambda at: f"${_SYMBOLS[at[1]]}$", text.replace("$", r"\$"))
    return re.sub(r"\bT(\d)\b", r"$T_\1$", plain)


def new_figure(width: float = COLUMN, height: float = 2.6) -> Figure:
    """Make an empty figure with constrained layout; no window, no change of backend.

    Parameters
    ----------
    width, height : float
        Size of the figure, in inches.

    Returns
    -------
    Figure
        A figure without axes. A notebook's cell that ends with it shows it.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the given axes, or make a figure of one column with single axes.

    Parameters
    ----------
    ax : Axes or None
        Axes to draw on; None makes a new figure.

    Returns
    -------
    Axes
        `ax` itself, or the axes of the new figure. A notebook's cell that ends with these shows the
        figure.
    """
    if ax is not None:
        return ax
    figure = new_figure()
    made: Axes = figure.subplots()
    made._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return made


def panel_letters(axes: list[Axes]) -> None:
    """Put (a), (b), ... before the titles of panels, and align the titles left.

    Parameters
    ----------
    axes : list of Axes
        The panels in their order; those after the ninth get no letter.
    """
    for letter, ax in zip("abcdefghi", axes, strict=False):
        title = ax.get_title() or ax.get_title(loc="left")
        ax.set_title("")
        ax.set_title(f"({letter}) {title}".rstrip(), loc="left")


def legend_free(ax: Axes, columns: int = 2, **options: Any) -> None:
    """Put the legend where it hides no data; above them if there is no such place.

    Parameters
    ----------
    ax : Axes
        With all of its data, and its scale.
    columns : int
        Columns of a legend above the data.
    **options
        Of `Axes.legend`, for a legend among the data.
    """
    legend = ax.legend(loc="best", **options)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    # A curve between two points counts as well.
    paths = (line.get_path().interpolated(8).transformed(line.get_transform()) for line in ax.lines)
    inside = (box.count_contains(np.asarray(path.vertices)) for path in paths)
    if any(inside):
        legend_above(ax, columns)


def legend_above(ax: Axes, columns: int = 2, title: str = "") -> None:
    """Put the legend at the top of the axes, and make room for it above the data.

    Parameters
    ----------
    ax : Axes
        With all of its data, and its scale.
    columns : int
        Columns of the legend.
    title : str
        Title of the legend.
    """
    entries = len(ax.get_legend_handles_labels()[1])
    rows = -(-entries // columns) + bool(title)
    share = 0.05 + 0.11 * rows
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        if low <= 0.0:  # without any data a logarithmic axis keeps the limits of a linear one
            low, high = 0.1, 1.0
        ax.set_ylim(low, high * (high / low) ** (share / (1.0 - share)))
    else:
        ax.set_ylim(low, high + (high - low) * share / (1.0 - share))
    ax.legend(
        loc="upper center", ncols=columns, title=title or None, title_fontsize=7,
        columnspacing=0.7, handlelength=1.7, handletextpad=0.4, fontsize=6.5,
    )  # fmt: skip


def members_axis(ax: Axes, values: list[int]) -> None:
    """Make the x axis logarithmic (base 2) with one tick at each ensemble size.

    Parameters
    ----------
    ax : Axes
        Axes to change.
    values : list of int
        Ensemble sizes K that get a tick; at least 1.
    """
    ax.set_xscale("log", base=2)
    ax.set_xticks(values, [str(value) for value in values])
    ax.minorticks_off() if ax.get_yscale() != "log" else ax.xaxis.minorticks_off()


def finish(figure: Figure, stem: Path, title: str, axes: Iterable[Axes] = ()) -> list[Path]:
    """Give a page its letters and its title, and write it as PNG and as PDF.

    Parameters
    ----------
    figure : Figure
    stem : Path
        Path without the ending.
    title : str
        Title of the page; plain text, not mathematics. Kept in the files.
    axes : iterable of Axes
        Panels that get a letter, in their order.

    Returns
    -------
    list of Path
        As `save` returns it.
    """
    with context():
        panel_letters(list(axes))
        figure.suptitle(title, fontsize=9, parse_math=False)  # show a "$" of a name as such
    return save(figure, stem, {"title": title})


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis of less than two decades at 1, 2 and 5, with plain numbers.

    Parameters
    ----------
    axis : Axis
        Its limits are final; a longer axis, or one that is not logarithmic, stays as it is.
    """
    low, high = axis.get_view_interval()
    if axis.get_scale() == "log" and 0.0 < high < 100.0 * low:
        short = high < 5.0 * low  # which may hold no more than one of 1, 2 and 5
        axis.set_major_locator(MaxNLocator(4) if short else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, stem: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Write a figure as PNG and as PDF, with its parameters inside the files.

    The PNG has the parameters as the text chunk ``Parameters``, the PDF as its keywords, both in
    JSON. The layout is fixed when the PNG is written, and the PDF has the same layout.

    Parameters
    ----------
    figure : Figure
        Figure to write.
    stem : Path
        Path without the ending; missing folders are made.
    parameters : mapping of str to value
        What the figure was made from; values that JSON can hold.

    Returns
    -------
    list of Path
        The paths of the PNG and of the PDF, in this order.
    """
    paths = [stem.with_suffix(f".{kind}") for kind in ("png", "pdf")]
    for path in paths:
        write(figure, path, stem.name, parameters)
        figure.set_layout_engine("none")  # the second file keeps the layout of the first
    return paths


def write(figure: Figure, path: Path, title: str, parameters: Mapping[str, Any]) -> None:
    """Write a figure in the format of the path's ending, all or nothing.

    Parameters
    ----------
    figure : Figure
        Figure to write.
    path : Path
        PNG, PDF or SVG; missing folders are made.
    title : str
        Title in the file.
    parameters : mapping of str to value
        What the figure was made from, kept in the file as JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(parameters, sort_keys=True)
    kind = path.suffix.lower().removeprefix(".")
    kinds: dict[str, dict[str, Any]] = {
        "png": {"Title": title, "Parameters": text},
        "pdf": {"Title": title, "Keywords": text, "CreationDate": None},
        "svg": {"Title": title, "Description": text, "Date": None},
    }
    # The same figure is the same bytes: no date, and names in SVG by content.
    with replacing(path) as stream, context(), mpl.rc_context({"svg.hashsalt": "nqm"}):
        figure.savefig(stream, format=kind, metadata=kinds[kind])
