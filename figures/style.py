"""How every figure looks, and what its file says about itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nqm.table import replacing

#: Widths of a journal's column and page, in inches.
COLUMN, PAGE = 3.5, 7.0
DPI = 200

#: Okabe & Ito (2008): told apart with any colour vision. Black is kept for references.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE = "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P")
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
        The panels in their order; those after the eighth get no letter.
    """
    for letter, ax in zip("abcdefgh", axes, strict=False):
        title = ax.get_title() or ax.get_title(loc="left")
        ax.set_title("")
        ax.set_title(f"({letter}) {title}".rstrip(), loc="left")


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
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(parameters, sort_keys=True)
    kinds: dict[str, dict[str, Any]] = {
        "png": {"Title": stem.name, "Parameters": text},
        "pdf": {"Title": stem.name, "Keywords": text, "CreationDate": None},
    }
    paths = []
    for kind, metadata in kinds.items():
        path = stem.with_suffix(f".{kind}")
        with replacing(path) as stream, context():
            figure.savefig(stream, format=kind, metadata=metadata)
            figure.set_layout_engine("none")  # the second file keeps the layout of the first
        paths.append(path)
    return paths
