"""Tables of papers beside our runs: one module per table, each a list of rows as data."""

from __future__ import annotations

from importlib import import_module

from paper_repro.tables.rows import Table

#: In the order of the page.
NAMES = (
    "cifar10", "cifar100", "other_networks", "imagenet", "enwik8", "ood", "ablations", "fge",
    "snapshots",
)  # fmt: skip


def load_tables() -> list[Table]:
    """Return all tables: those of the paper, then those of other papers.

    Returns
    -------
    list of Table
        In the order of `NAMES`.
    """
    return [import_module(f"paper_repro.tables.{name}").TABLE for name in NAMES]
