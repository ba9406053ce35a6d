"""Figures of a bridge, drawn from its tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from figures import bridge, style
from neural.curvature.gradient_noise import noise_exponent


def draw_bridge(
    table: pd.DataFrame, course: pd.DataFrame, spectrum: pd.DataFrame, folder: Path, title: str
) -> list[Path]:
    """Draw a page of figures of a bridge, as PNG and PDF.

    Parameters
    ----------
    table, course, spectrum : DataFrame
        Tables of a `neural.bridge.pipeline.Bridge`.
    folder : Path
        Folder for ``bridge.png`` and ``bridge.pdf``.
    title : str
        Title of the page; plain text, not mathematics.

    Returns
    -------
    list of Path
        The files that were written.
    """
    with style.context():
        figure = style.new_figure(style.PAGE, 6.6)
        several = table["batch_size"].nunique() > 1
        tested = bool(table["predicted_test_gain"].notna().any())
        last_row = ("ghi" if tested else "ghh") if several else ("ggi" if tested else "ggg")
        axes = figure.subplot_mosaic(f"abc;def;{last_row}")
        pairs = spectrum[spectrum["kind"] == "pair"]
        h, noise = (pairs[name].to_numpy(float) for name in ("curvature", "noise_variance"))
        bridge.spectrum(spectrum, ax=axes["a"])
        bridge.noise_against_curvature(spectrum, noise_exponent(h, noise), ax=axes["b"])
        bridge.course(course, ax=axes["c"])
        bridge.against_members(table, ax=axes["d"])
        bridge.against_rate(table, ax=axes["e"])
        last = "gh" if several else "fg"
        if several:
            bridge.against_batch_size(table, ax=axes["f"])
        bridge.averages(table, ax=axes[last[0]])
        bridge.residuals(table, float(h.max()), ax=axes[last[1]])
        if tested:
            bridge.held_out(table, ax=axes["i"])
    return style.finish(figure, folder / "bridge", title, axes.values())
