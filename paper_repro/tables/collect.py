"""Our numbers for the paper's tables: results of the runs on disk that belong to a row.

Only a recipe's full scale, with the settings the recipe states, stands beside a number of the
paper. The scale ``cpu`` and related recipes have a column of their own, each under its own title;
the scale ``smoke`` is never shown. What commands on combining saved is of small networks and stands
in that column too, under the name of its folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from nqm.errors import NQMError
from nqm.table import read_metadata, read_table
from paper_repro.tables.rows import Row, Saved, Source, Table
from paper_repro.tables.saved import Results

#: Scales that are shown, the largest first.
SHOWN = ("full", "cpu")
#: Settings that change the speed of a run or its evaluation, but not the training.
_FREE = {"evaluate": None, "train": ("channels_last", "compile"), "late_phase": ("fused",)}


@dataclass(frozen=True)
class Measured:
    """One measured value: mean and standard deviation over seeds.

    Attributes
    ----------
    title : str
        Title of the recipe at its scale, or name of the folder.
    scale : str
        Scale of the recipe; empty for a folder.
    mean, sd : float
        In the table's unit; sd is NaN for one seed.
    n : int
        Number of seeds, or splits, with a value.
    diverged : int
        Number of further seeds, which diverged.
    hardware : str
        Hardware and version of torch of the runs.
    """

    title: str
    scale: str
    mean: float
    sd: float
    n: int
    diverged: int
    hardware: str


@dataclass(frozen=True)
class Line:
    """A row of a paper's table with our values.

    Attributes
    ----------
    row : Row
        Method, published value and source of ours.
    ours : Measured, optional
        Our value at full scale; None if it was not run.
    smaller : tuple of Measured
        Our values at a smaller scale or from related recipes.
    left_out : bool
        Whether there are runs at full scale whose settings are not the recipe's.
    """

    row: Row
    ours: Measured | None = None
    smaller: tuple[Measured, ...] = ()
    left_out: bool = False


@dataclass(frozen=True)
class Found:
    """Value of one source at one scale; `measured` is None if no run has the recipe's settings."""

    measured: Measured | None
    left_out: bool


@dataclass
class Runs:
    """Experiments on disk, in folders ``RECIPE-SCALE`` as ``nqm neural train`` makes them."""

    root: Path
    _results: dict[tuple[str, str], pd.DataFrame | None] = field(default_factory=dict)

    def results(self, recipe: str, scale: str) -> pd.DataFrame | None:
        """Return the table of results of an experiment.

        Parameters
        ----------
        recipe, scale : str
            Names of the recipe and its scale.

        Returns
        -------
        DataFrame or None
            None if the experiment was not run.

        Raises
        ------
        NQMError
            If the folder holds another experiment, or a damaged table.
        """
        at = (recipe, scale)
        if at not in self._results:
            path = self.folder(*at) / "results.parquet"
            self._results[at] = read_table(path) if path.exists() else None
            if path.exists():
                stated = read_metadata(path)
                holds = (stated.get("recipe"), stated.get("scale"))
                if holds != at:
                    raise NQMError(
                        f"{path} must hold recipe {recipe} at scale {scale}; got {holds[0]} at "
                        f"{holds[1]}; give the folder its own name"
                    )
        return self._results[at]

    def folder(self, recipe: str, scale: str) -> Path:
        """Return the folder of an experiment.

        Parameters
        ----------
        recipe, scale : str
            Names of the recipe and its scale.

        Returns
        -------
        Path
        """
        return self.root / f"{recipe}-{scale}"

    def find(self, source: Source, scale: str, factor: float) -> Found:
        """Average a metric over the seeds whose runs have the settings of the recipe.

        Parameters
        ----------
        source : Source
            Recipe, arm, weights, metric and data.
        scale : str
            Scale of the recipe.
        factor : float
            From the metric's unit to the unit of the table.

        Returns
        -------
        Found

        Raises
        ------
        NQMError
            As `results`.
        """
        table = self.results(source.recipe, scale)
        table = None if table is None else table[table["arm"] == source.arm]
        if table is None or table.empty:
            return Found(None, left_out=False)
        from neural.training.recipe import load_recipe  # brings torch

        recipe = load_recipe(source.recipe, scale)
        ran = sorted(int(seed) for seed in table["seed"].unique() if seed >= 0)
        stated = {seed: self._stated(source, scale, seed) for seed in ran}
        right = [seed for seed in ran if _same_training(stated[seed], recipe, source.arm, seed)]
        left_out = len(right) < len(ran)
        seeds = right
        if source.weights.startswith("deep_ensemble"):
            # A mean prediction that some other run is part of is not that of the recipe.
            seeds = [] if left_out else [-1]
        values = (_values(table[table["seed"].isin(seeds)], source) * factor).tolist()
        if not values:
            return Found(None, left_out)
        failed = table[table["seed"].isin(right) & (table["status"] == "diverged")]
        against = "" if source.data == ("test",) else f", against {' and '.join(source.data)}"
        hardware = "; ".join(sorted({_hardware(stated[seed]) for seed in right}))
        measured = _measured(
            recipe.title + against, scale, values, failed["seed"].nunique(), hardware
        )
        return Found(measured, left_out)

    def _stated(self, source: Source, scale: str, seed: int) -> Mapping[str, Any]:
        from neural.training.run_folder import read_json

        folder = self.folder(source.recipe, scale) / source.arm / f"seed{seed}"
        return (read_json(folder) if folder.is_dir() else None) or {}


def collect(
    root: str | Path, tables: list[Table], saved: str | Path | None = None
) -> list[tuple[Table, list[Line]]]:
    """Fill every table with the numbers of the runs on disk.

    Parameters
    ----------
    root : str or Path
        Folder of the experiments; it may be empty or absent.
    tables : list of Table
        Tables to fill.
    saved : str or Path, optional
        Folder below which tables of combined models are looked for; `root` by default.

    Returns
    -------
    list of (Table, list of Line)
        A line for each row of each table.

    Raises
    ------
    NQMError
        If a table of results is damaged, or in the folder of another experiment.
    """
    runs, results = Runs(Path(root)), Results(Path(root if saved is None else saved))
    return [(table, [_line(runs, results, table, row) for row in table.rows]) for table in tables]


def _line(runs: Runs, results: Results, table: Table, row: Row) -> Line:
    if isinstance(row.source, Saved):
        found = [
            _measured(title, "", [table.factor * one for one in values], diverged)
            for title, values, diverged in results.values(row.source)
        ]
        return Line(row, smaller=tuple(found))
    full, cpu = (runs.find(row.source, scale, table.factor) for scale in SHOWN)
    smaller = [] if full.measured is not None or not table.reduced else [cpu.measured]
    for source in row.related:
        at_scales = (runs.find(source, scale, table.factor).measured for scale in SHOWN)
        smaller.append(next((one for one in at_scales if one is not None), None))
    return Line(row, full.measured, tuple(one for one in smaller if one), full.left_out)


def _measured(
    title: str, scale: str, values: list[float], diverged: int = 0, hardware: str = ""
) -> Measured:
    """Mean and standard deviation of values, one at least."""
    sd = stdev(values) if len(values) > 1 else math.nan
    return Measured(title, scale, fmean(values), sd, len(values), diverged, hardware)


def _values(table: pd.DataFrame, source: Source) -> pd.Series:
    """One value per seed; a seed without all sets of data has none."""
    chosen = table[
        (table["weights"] == source.weights)
        & (table["metric"] == source.metric)
        & table["data"].isin(source.data)
    ]
    by_data = chosen.pivot_table(index="seed", columns="data", values="value", dropna=False)
    if set(by_data.columns) != set(source.data):
        return pd.Series(dtype=float)
    return by_data.mean(axis=1, skipna=False).dropna()


def _same_training(stated: Mapping[str, Any], recipe: Any, arm: str, seed: int) -> bool:
    from neural.training.config import describe, restore

    if arm not in recipe.arms or "config" not in stated:
        return False
    try:
        ran = restore(stated["config"])
    except NQMError:  # settings that no longer exist
        return False
    return _training(describe(ran)) == _training(describe(replace(recipe.arms[arm], seed=seed)))


def _training(config: Mapping[str, Any]) -> str:
    """Content key of all settings that training depends on."""
    from nqm.keys import key

    kept = {}
    for name, part in config.items():
        free = _FREE.get(name, ())
        if free is not None:
            inner = isinstance(part, Mapping) and free
            kept[name] = {k: v for k, v in part.items() if k not in free} if inner else part
    if (checkpoint := kept["model"].get("checkpoint")) is not None:
        # Where a file of published weights lies changes nothing; its name says which it is.
        kept["model"] = {**kept["model"], "checkpoint": PurePath(checkpoint).name}
    return key(kept)


def _hardware(stated: Mapping[str, Any]) -> str:
    versions = stated.get("versions", {})
    return f"{versions.get('hardware', 'unknown hardware')}, torch {versions.get('torch', '?')}"
