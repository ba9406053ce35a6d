"""Tables of papers beside our runs, each a list of rows as data.

A table of recipes has a module of its own; `combining` has those of systems that combine models.
"""

from __future__ import annotations

from importlib import import_module

from paper_repro.tables import combining
from paper_repro.tables.rows import Table

_OF_RECIPES = (
    "cifar10", "cifar100", "other_networks", "imagenet", "enwik8", "ood", "ablations", "fge",
    "snapshots",
)  # fmt: skip
#: In the order of the page.
NAMES = (*_OF_RECIPES, *(table.name for table in combining.TABLES))


def load_tables() -> list[Table]:
    """Return all tables: those of the paper, then those of other papers.

    Returns
    -------
    list of Table
        In the order of `NAMES`.
    """
    of_recipes = [import_module(f"paper_repro.tables.{name}").TABLE for name in _OF_RECIPES]
    return [*of_recipes, *combining.TABLES]
