"""Pictures of the documentation's pages, drawn from the tables that lie beside them.

What was measured once is kept as CSV: published numbers in ``docs/tables``, what only a picture
shows in ``docs/tables/drawn``. ::

    python -m paper_repro.pictures docs      # make pictures

draws all of ``docs/images`` again, and computes nothing; after the folder come names of single
pictures. Those of the gallery are `figures.gallery`'s.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from figures import bridge, runs, style

#: Text chunk of a picture that holds the digest of its tables.
CHUNK = "Tables"
#: Colours of a picture's palette: lines and their smoothed edges need no more.
COLORS = 96

#: The drawn tables by their names.
Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Picture:
    """One picture of the documentation.

    Attributes
    ----------
    tables : tuple of str
        Files it is drawn from, without the ending, from the folder of tables.
    draw : callable
        Takes the tables and a folder, writes a PNG there, and returns what it wrote.
    """

    tables: tuple[str, ...]
    draw: Callable[[Tables, Path], list[Path]]

    def files(self, docs: Path) -> list[Path]:
        """Paths of the tables.

        Parameters
        ----------
        docs : Path
            Folder of the pages.

        Returns
        -------
        list of Path
        """
        return [docs / "tables" / f"{name}.csv" for name in self.tables]

    def digest(self, docs: Path) -> str:
        """Digest of the tables, which the picture holds as well.

        Parameters
        ----------
        docs : Path
            Folder of the pages.

        Returns
        -------
        str
        """
        content = b"".join(path.read_bytes() for path in self.files(docs))
        return hashlib.sha256(content).hexdigest()[:16]

    def png(self, docs: Path) -> bytes:
        """Draw the picture.

        Parameters
        ----------
        docs : Path
            Folder of the pages.

        Returns
        -------
        bytes
            A PNG of few colours.
        """
        held = {path.stem: _read(path) for path in self.files(docs)}
        with TemporaryDirectory() as folder:
            paths = self.draw(held, Path(folder))
            (path,) = [path for path in paths if path.suffix == ".png"]
            return _small(path, self.digest(docs))


def _read(path: Path) -> pd.DataFrame:
    """Read a table; texts stay as they are, and an empty cell is no number."""
    from nqm.table import read_table

    head = path.read_text(encoding="utf-8")[:1]
    if head == "#":  # written by nqm, with metadata
        return read_table(path)
    table = pd.read_csv(path)
    texts = table.columns[[not pd.api.types.is_numeric_dtype(table[name]) for name in table]]
    return table.fillna(dict.fromkeys(texts, ""))


def _small(path: Path, digest: str) -> bytes:
    from PIL import Image, PngImagePlugin

    kept = PngImagePlugin.PngInfo()
    kept.add_text(CHUNK, digest)
    drawn = Image.open(path).convert("RGB")
    few = drawn.quantize(COLORS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    content = io.BytesIO()
    few.save(content, format="png", optimize=True, pnginfo=kept)
    return content.getvalue()


# --- theory ---------------------------------------------------------------------------------------


def _study(figure: str) -> Callable[[Tables, Path], list[Path]]:
    """A figure of `nqm figure`, drawn from its table."""

    def draw(tables: Tables, folder: Path) -> list[Path]:
        from paper_repro.study import find

        (table,) = tables.values()
        return style.save(find(figure).draw(table), folder / figure, {})

    return draw


# --- training -------------------------------------------------------------------------------------


def _training(title: str, **starts: int) -> Callable[[Tables, Path], list[Path]]:
    """Curves over epochs and every model, from tables ..._history and ..._results."""

    def draw(tables: Tables, folder: Path) -> list[Path]:
        from neural.training import plots

        history, results = tables.values()
        return plots.draw(results, history, folder, title, starts)

    return draw


def published_means(table: pd.DataFrame, column: str, series: str = "") -> pd.DataFrame:
    """Means of a published table.

    Parameters
    ----------
    table : DataFrame
        Its first column names the models.
    column : str
        Column of the means; that of their standard deviations is called ``COLUMN ±``.
    series : str
        Name of these means in a legend.

    Returns
    -------
    DataFrame
        Columns model, mean, spread, series.
    """
    parts = {"model": table.iloc[:, 0], "mean": table[column], "spread": table[f"{column} ±"]}
    return pd.DataFrame(parts).assign(series=series)


def _means(title: str, label: str, **columns: str) -> Callable[[Tables, Path], list[Path]]:
    """Every model of a published table; `columns` are series and their columns of means."""

    def draw(tables: Tables, folder: Path) -> list[Path]:
        (table,) = tables.values()
        parts = [
            published_means(table, column, series.replace("_", " "))
            for series, column in columns.items()
        ]
        with style.context():
            figure = style.new_figure(style.PAGE, 0.9 + 0.22 * len(table) * len(parts))
            ax = runs.means(pd.concat(parts), ax=figure.subplots())
            ax.set_xlabel(f"{label}; bars: standard deviation over seeds")
        return style.finish(figure, folder / "means", title)

    return draw


# --- the bridge -----------------------------------------------------------------------------------

#: Networks of the page, by their tables.
NETWORKS = {
    "bridge_digits": "digits MLP at its minimum",
    "bridge_digits_three": "three digits MLPs as trained",
    "bridge_cifar10": "CIFAR-10, GroupNorm net",
    "bridge_fashion_mnist": "Fashion-MNIST, the same net",
    "bridge_resnet8": "CIFAR-10, ResNet-8",
    "bridge_resnet20": "published ResNet-20",
}


def published_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Ratios of a published table, one in a row.

    Parameters
    ----------
    table : DataFrame
        Columns ``lr h_max``, ``B`` (optional), ``weights`` (optional), ``K = ...`` and, with their
        standard errors, ``K = ... ±``.

    Returns
    -------
    DataFrame
        Columns lr_times_sharpness, batch_size (0 if not stated), members, ratio, ratio_error; rows
        of the iterate.
    """
    if "weights" in table:
        table = table[table["weights"] == "iterate"]
    rows: list[dict[str, Any]] = []
    for _, row in table.iterrows():
        case = {"lr_times_sharpness": row["lr h_max"], "batch_size": row.get("B", 0)}
        for name in map(str, table.columns):
            if found := re.fullmatch(r"K = (\d+)", name):
                error = row.get(f"{name} ±", float("nan"))
                own = {"members": int(found[1]), "ratio": row[name], "ratio_error": error}
                rows.append(case | own)
    return pd.DataFrame(rows)


def _bridges(tables: Tables, folder: Path) -> list[Path]:
    parts = {name: published_ratios(table) for name, table in tables.items()}
    rates = sorted(pd.concat(parts.values())["lr_times_sharpness"].unique())
    with style.context():
        figure = style.new_figure(style.PAGE, 4.8)
        axes = figure.subplots(2, 3)
        named: dict[float, Any] = {}
        for ax, (name, rows) in zip(axes.flat, parts.items(), strict=True):
            bridge.ratios(rows, rates, ax=ax)
            ax.set_title(NETWORKS[name])
            handles, labels = ax.get_legend_handles_labels()
            named |= dict(zip(map(float, labels), handles, strict=True))
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        order = [named[rate] for rate in rates], [f"{rate:g}" for rate in rates]
        figure.legend(
            *order, title=r"learning rate times $h_{\max}$", loc="outside lower center", ncols=7
        )
    title = "rise of the loss by noise: measured over predicted"
    return style.finish(figure, folder / "bridges", title, axes.flat)


# --- combining ------------------------------------------------------------------------------------


def _combined(draw_page: str, title: str) -> Callable[[Tables, Path], list[Path]]:
    """A page of `neural.combine.plots` of a single table."""

    def draw(tables: Tables, folder: Path) -> list[Path]:
        from neural.combine import plots

        (table,) = tables.values()
        written: list[Path] = getattr(plots, draw_page)(table, folder, title)
        return written

    return draw


def _ways(tables: Tables, folder: Path) -> list[Path]:
    from neural.combine.plots import draw_ranking

    (table,) = tables.values()
    parts = {str(name): rows for name, rows in table.groupby("comparison", sort=False)}
    return draw_ranking(parts, folder, "every way of combining: predicted and measured")


#: "+0.26 (-0.05, +0.56)", a gain with its interval.
_GAIN = re.compile(r"([-+][\d.]+) \(([-+][\d.]+), ([-+][\d.]+)\)")


def published_gains(table: pd.DataFrame) -> pd.DataFrame:
    """Gains over equal weights, of the published table of ensembles of text classifiers.

    Parameters
    ----------
    table : DataFrame
        ``docs/tables/gates_films.csv``.

    Returns
    -------
    DataFrame
        As `figures.agreement.gains` takes it, and what kind of rule each is.
    """
    columns = {
        "accuracy": ("accuracy over equal weights, points", 0.01),
        "nll_tuned": ("tuned NLL under equal weights", 1.0),
    }
    rows = []
    for _, row in table.iterrows():
        alone = row["models"] == 1
        name = re.split(r": | \(| on | in |, the", row["rule"])[0]
        kept: dict[str, Any] = {"rule": "member" if alone else "weights", "member": name}
        for metric, (column, unit) in columns.items():
            if found := _GAIN.fullmatch(row[column]):
                for end, value in zip(("", "_low", "_high"), found.groups(), strict=True):
                    kept[f"{metric}_gain{end}"] = unit * float(value)
        rows.append(kept)
    return pd.DataFrame(rows)


#: Student's t at 97.5 % for five seeds, over the root of five.
_HALF = 2.776 / 5**0.5


def published_cycles(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Errors in per cent with 95 % intervals, from accuracies of a published table of five seeds.

    Parameters
    ----------
    table : DataFrame
        ``docs/tables/snapshots_resnet20.csv``, or one of its columns.
    metric : str
        A column of means and standard deviations, as "85.5 ± 0.3".

    Returns
    -------
    DataFrame
        As `figures.combine.cycle_rates` takes it.
    """
    parts = table[metric].str.split(" ± ", expand=True).astype(float)
    rates = table["rate of the cycles"].str.replace("1/4", "0.25")
    return pd.DataFrame(
        {
            "way": table["way"],
            "lr_scale": pd.to_numeric(rates, errors="coerce"),
            "mean": 100.0 - parts[0],
            "low": 100.0 - parts[0] - _HALF * parts[1],
            "high": 100.0 - parts[0] + _HALF * parts[1],
        }
    )


def _cycle_rates(tables: Tables, folder: Path) -> list[Path]:
    from figures import combine

    with style.context():
        figure = style.new_figure(style.PAGE, 2.2 * len(tables) + 0.5)
        axes = figure.subplots(len(tables), 2, squeeze=False, sharey="row")
        for line, (name, table) in zip(axes, tables.items(), strict=True):
            for ax, what in zip(line, ("soup", "ensemble"), strict=True):
                combine.cycle_rates(published_cycles(table, f"{what}, %"), ax=ax)
                ax.set(title=f"{CYCLED[name]}: {what}", yscale="log")
                style.plain_log(ax.yaxis)
            line[0].set_ylabel("test error, %")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return style.finish(figure, folder / "cycle_rates", "snapshots of one start", axes.flat)


#: Tables of cycles, and what was trained.
CYCLED = {
    "snapshots_resnet20": "ResNet-20, CIFAR-10 q75",
    "snapshots_letters": "ResNet-8, letters",
}


def _shift(tables: Tables, folder: Path) -> list[Path]:
    from figures import combine

    (table,) = tables.values()
    with style.context():
        figure = style.new_figure(0.7 * style.PAGE, 2.8)
        combine.soup_scatter(table, ax=figure.subplots()).set_title("")
    title = "digits, twelve ingredients, five seeds: means and 95 % intervals"
    return style.finish(figure, folder / "soup_shift_digits", title)


def _cycles(tables: Tables, folder: Path) -> list[Path]:
    from neural.training.plots import draw_cycles

    (table,) = tables.values()
    return draw_cycles(
        table, folder, "EMNIST letters (2,000 images): cycles at four times the rate"
    )


def _gates(tables: Tables, folder: Path) -> list[Path]:
    from neural.combine.plots import draw_gates

    gains, people = tables.values()
    title = "10,043 sentences of film reviews: agreement, and gains over equal weights"
    return draw_gates(published_gains(gains), people, folder, title)


def _modules(tables: Tables, folder: Path) -> list[Path]:
    from neural.modules.report import draw

    (table,) = tables.values()
    return draw(table, folder)


DRAWN = "drawn/"
#: All pictures of docs/images but the gallery's.
PICTURES: dict[str, Picture] = {
    "steady_state": Picture((DRAWN + "steady_state",), _study("steady_state")),
    "ranking": Picture((DRAWN + "ranking",), _study("ranking")),
    "scaling_laws": Picture((DRAWN + "scaling",), _study("scaling")),
    "fashion_mnist": Picture(
        ("fashion_mnist",),
        _means("Fashion-MNIST, ResNet-8", "test accuracy, %", accuracy="accuracy, %"),
    ),
    "cifar10_q75": Picture(
        ("cifar10_q75",),
        _means("CIFAR-10 (JPEG q75), ResNet-8", "test accuracy, %", accuracy="accuracy, %"),
    ),
    "wikitext2": Picture(
        ("wikitext2",),
        _means(
            "WikiText-2 bytes, LSTM of 256 units",
            "test bits per character",
            last_weights="bpc",
            SWA="bpc with SWA",
        ),
    ),
    "fashion_mnist_fge": Picture(
        (DRAWN + "fashion_mnist_fge_history", DRAWN + "fashion_mnist_fge_results"),
        _training("Fashion-MNIST, 10,000 images: one budget", late_phase=9),
    ),
    "bridges": Picture(tuple(NETWORKS), _bridges),
    "which_combining": Picture((DRAWN + "which_combining",), _ways),
    "combining_resnet20": Picture(
        (DRAWN + "combining_resnet20",),
        _combined("draw", "CIFAR-10 (8,125 train, 932 test), ResNet-20: eight fine-tunings"),
    ),
    "soup_shift": Picture(
        (DRAWN + "soup_shift",), _combined("draw", "published ResNet-20, twelve ingredients")
    ),
    "soup_shift_digits": Picture((DRAWN + "soup_shift_digits",), _shift),
    "low_precision_resnet20": Picture(
        (DRAWN + "low_precision_resnet20",),
        _combined("draw_low_precision", "rounded copies of the published ResNet-20, CIFAR-10"),
    ),
    "cycles_letters": Picture((DRAWN + "cycles_letters",), _cycles),
    "cycle_rates": Picture(tuple(CYCLED), _cycle_rates),
    "curve_digits": Picture(
        (DRAWN + "curve_digits",), _combined("draw_curve", "two networks of the digits, 8 x 8")
    ),
    "gates_films": Picture(("gates_films", DRAWN + "gates_kappa"), _gates),
    "modules_opinions": Picture((DRAWN + "modules_opinions",), _modules),
    "modules_language": Picture((DRAWN + "modules_language",), _modules),
}


def chosen(names: list[str]) -> Iterator[tuple[str, Picture]]:
    """Pictures of these names; all of them for no name."""
    yield from ((name, PICTURES[name]) for name in names or PICTURES)


def build(docs: Path, names: list[str]) -> None:
    """Draw pictures.

    Parameters
    ----------
    docs : Path
        Folder of the pages; pictures are written to its ``images``.
    names : list of str
        Keys of `PICTURES`; all of them if empty.
    """
    for name, picture in chosen(names):
        path = docs / "images" / f"{name}.png"
        path.write_bytes(picture.png(docs))
        print(path)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2:])
