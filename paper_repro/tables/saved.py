"""Values in the tables that commands on combining save, wherever their folders are.

A folder named ``seedN`` belongs to its parent; federated rounds that differ in nothing but the seed
belong together. The value is then the mean over seeds, as that of modules is over splits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nqm import keys
from nqm.errors import NQMError
from nqm.table import read_metadata, read_table
from paper_repro.tables.rows import Saved

Config = Mapping[str, Any]
#: Rounds at the end of federated training whose accuracy is averaged.
LAST_ROUNDS = 5


@dataclass(frozen=True)
class Kind:
    """A kind of saved table.

    Attributes
    ----------
    file : str
        Its name in a folder.
    section : str
        Entry of its configuration by which it is known.
    prepare : callable
        Adds columns, given the table and its configuration.
    """

    file: str
    section: str
    prepare: Callable[[pd.DataFrame, Config], pd.DataFrame]


def _compared(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    members = table[table["rule"] == "member"].groupby("data")["accuracy"].mean()
    return table.assign(
        part=np.where(table["data"] == "test", "test", "shift"),
        lost=table["data"].map(members) - table["accuracy"],
        align=config["combine"].get("align", "none"),
        amortized=bool(table["rule"].str.startswith("ame").any()),
    )


def _rounded(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Of ensembles and means of draws, those of most draws."""
    group = table.groupby(["rule", "rounding", "grid_bits"])
    return table[table["members"] == group["members"].transform("max")]


def _curved(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    return table.assign(error=1.0 - table["accuracy"], kind=config["curve"]["kind"])


def _composed(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    task = config["modules"].get("task", "opinions")
    return table.assign(perplexity=np.exp(table["nll"]), task=task)


def _paired(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    from neural.modules.report import pairs  # brings torch

    return pairs(table).assign(task=config["modules"].get("task", "opinions"))


def _gated(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    return table


def _federated(table: pd.DataFrame, config: Config) -> pd.DataFrame:
    clients, scope = config["clients"], config.get("scope")
    method = "FedAvg"
    if scope is not None:
        method = "scope" if scope["strength"] else "rescaled"
    elif clients["prox"]:
        method = "FedProx"
    elif clients["control"]:
        method = "SCAFFOLD"
    elif clients["extrapolate"]:
        method = "FedExP"
    found = table.tail(LAST_ROUNDS).assign(method=method, dirichlet=clients["dirichlet"])
    # Diverged rounds end with a server that has no loss.
    return found.assign(accuracy=math.nan) if table["nll"].isna().any() else found


#: By name in `Saved.kind`: the command that saves it.
KINDS = {
    "compare": Kind("compare.parquet", "combine", _compared),
    "low-precision": Kind("low_precision.parquet", "low_precision", _rounded),
    "curve": Kind("curve.parquet", "curve", _curved),
    "modules": Kind("modules.parquet", "modules", _composed),
    "pairs of modules": Kind("modules.parquet", "modules", _paired),
    "gates": Kind("gates.parquet", "gates", _gated),
    "clients": Kind("history.parquet", "clients", _federated),
}


@dataclass
class Results:
    """Saved tables below a folder, read when they are first asked for.

    Attributes
    ----------
    root : Path
        It may be empty or absent.
    """

    root: Path
    _held: dict[str, dict[str, list[pd.DataFrame]]] = field(default_factory=dict)

    def values(self, source: Saved) -> Iterator[tuple[str, list[float], int]]:
        """Values of a source in every folder that has it.

        Parameters
        ----------
        source : Saved

        Yields
        ------
        title : str
            The folder, as seen from `root`.
        values : list of float
            One for each seed and split, at least one.
        diverged : int
            Seeds without a value, whose training diverged.

        Raises
        ------
        NQMError
            If a table is damaged, or of another version.
        """
        if source.kind not in self._held:
            self._held[source.kind] = self._read(KINDS[source.kind])
        for title, tables in self._held[source.kind].items():
            found = [value for table in tables for value in _values(table, source)]
            finite = [value for value in found if not math.isnan(value)]
            if finite:
                yield title, finite, len(found) - len(finite)

    def _read(self, kind: Kind) -> dict[str, list[pd.DataFrame]]:
        """Tables of a kind, those of different seeds together under one title."""
        groups: dict[str, list[pd.DataFrame]] = {}
        titles: dict[str, str] = {}
        for path in sorted(self.root.rglob(kind.file)) if self.root.is_dir() else []:
            config = read_metadata(path).get("config")
            if not isinstance(config, dict) or not isinstance(config.get(kind.section), dict):
                continue  # another table of this name
            folder = path.parent
            title = folder.relative_to(self.root).as_posix()
            group = title
            if re.fullmatch(r"seed\d+", folder.name):
                group = title = folder.relative_to(self.root).parent.as_posix()
            if kind.section == "clients":
                group = keys.key({name: part for name, part in config.items() if name != "seed"})
            title = titles.setdefault(group, title)
            try:
                table = kind.prepare(read_table(path), config)
            except KeyError as error:
                raise NQMError(
                    f"{path} is of another version: it lacks {error}; make it anew or move it away"
                ) from None
            groups.setdefault(title, []).append(table)
        return groups


def _values(table: pd.DataFrame, source: Saved) -> list[float]:
    """The value of each split of a table; none if no row counts."""
    missing = {source.column, *source.where} - set(table)
    if missing:
        return []
    for name, value in source.where.items():
        wanted = value if isinstance(value, tuple) else (value,)
        table = table[table[name].isin(wanted)]
    parts = [part for _, part in table.groupby("split")] if "split" in table else [table]
    return [_taken(part, source) for part in parts if not part.empty]


def _taken(table: pd.DataFrame, source: Saved) -> float:
    held = table.groupby(source.by)[source.column].mean() if source.by else table[source.column]
    return float(getattr(held, source.take)())
