"""What the commands do with members on disk: look at them, merge, pool and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from neural.combine.api import ensemble, merge
from neural.combine.cells import Cells, described
from neural.combine.comparison import OUTSIDE, compare
from neural.combine.config import CombineConfig
from neural.combine.data import Parts
from neural.combine.repair import REPAIRS
from neural.combine.rules import RULES, Merge
from neural.combine.sources import Opened
from neural.evaluate import classification_metrics, predict
from neural.training.config import describe
from neural.training.load_run import write_weights
from neural.training.run_folder import check_no_run
from neural.training.task import Task
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import locked
from nqm.progress import Progress
from nqm.runs.toml import lookup
from nqm.table import Stamp, finished, write_table

if TYPE_CHECKING:
    import pandas as pd


def _task(opened: Opened) -> Task:
    """The data of the members; a language model with a state is refused."""
    assert opened.task is not None  # only a caller's own model comes without
    if opened.task.channels == 0:
        raise NQMError(
            f"{opened.task.label} is a text; combining is for sets of images, where predictions do "
            "not depend on a window before"
        )
    return opened.task


def survey(opened: Opened) -> pd.DataFrame:
    """Where members lie, and how good each is.

    Parameters
    ----------
    opened : Opened

    Returns
    -------
    DataFrame
        One row a member: the columns of `neural.combine.members.Members.geometry`, and accuracy,
        nll, brier and ece on the test set.
    """
    import pandas as pd

    task = _task(opened)
    rows = []
    for state in opened.members.states():
        logits, labels = predict(opened.members.with_state(state), task.test())
        rows.append(classification_metrics(logits, labels))
    return pd.concat([opened.members.geometry(), pd.DataFrame(rows)], axis=1)


def write_merged(
    opened: Opened,
    out: str | Path,
    rule: str = "uniform",
    weights: tuple[float, ...] | None = None,
    *,
    held_out: float = 0.2,
    align: str = "none",
    repair: str = "statistics",
) -> list[str]:
    """Merge members and write the model as safetensors.

    Parameters
    ----------
    opened : Opened
    out : str or Path
        Ends in .safetensors; an existing file is not overwritten.
    rule : str
        A name of `neural.combine.rules.RULES`.
    weights : tuple of float, optional
        Of the members, instead of a rule.
    held_out : float
        Share of the test images on which rules choose.
    align : {"none", "weights", "activations"}
        How hidden units are put into the first member's order.
    repair : {"statistics", "rescale", "none"}

    Returns
    -------
    list of str
        Lines to print: test metrics of the merged model on the images that were not held out, and
        the file.

    Raises
    ------
    NQMError
        If the file is there already, or the members cannot be merged.
    """
    made = lookup("rule", rule, RULES)
    lookup("repair", repair, REPAIRS)
    share = held_out if weights is None and made.selected_on == "held_out" else 0.0
    parts = Parts.of_task(_task(opened), held_out=share)
    names = [one.name for one in opened.members]
    about = {"rule": rule, "members": names, "align": align, "repair": repair}

    def model() -> Mapping[str, object]:
        merged = merge(
            opened.members, made, weights=weights, align=align, repair=repair, parts=parts
        )
        logits, labels = predict(merged, parts.test())
        lines.extend(f"{n} {v:.4f}" for n, v in classification_metrics(logits, labels).items())
        return merged.state_dict()

    lines: list[str] = []
    lines.append(str(write_weights(out, model, about)))
    return lines


def pooled_metrics(
    opened: Opened, pool: str, weights: tuple[float, ...] | None
) -> dict[str, float]:
    """Test metrics of the members' pooled predictions.

    Parameters
    ----------
    opened : Opened
    pool : {"probabilities", "logits"}
    weights : tuple of float, optional
        Of the members; equal by default.

    Returns
    -------
    dict of str to float
    """
    task = _task(opened)
    pooled = ensemble(opened.members, task.test, weights=weights, pool=pool)
    _, labels = predict(opened.members.with_state(opened.members.state(0)), task.test())
    return classification_metrics(pooled, labels)


def run_compare(
    opened: Opened,
    config: CombineConfig,
    rules: Mapping[str, Merge],
    out: Path,
    *,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """`compare`, kept in a folder; a killed comparison continues, a finished one is only read.

    Parameters
    ----------
    opened : Opened
    config : CombineConfig
    rules : mapping of str to Merge
        By name.
    out : Path
        Folder for ``compare.parquet``, its pictures, and ``cells`` of parts that are done.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    table : DataFrame
        See `neural.combine.comparison.compare`.
    lines : list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If the folder holds a run or another comparison, or the members cannot be compared.
    """
    from neural.combine.plots import draw

    check_no_run(out)
    task = _task(opened)
    assert opened.run is not None
    data = {k: v for k, v in describe(opened.run)["data"].items() if k != "batch_size"}
    about = {"data": data, "held_out": config.held_out, "seed": config.seed}
    stated = {
        "combine": asdict(config),
        "rules": {name: described(rule) for name, rule in rules.items()},
        "members": {m.name: opened.members.key(i) for i, m in enumerate(opened.members)},
        "data": data,
    }
    key = keys.key({**stated, "combine": keys.differing(config)})
    stamp = Stamp(key, __version__, stated)
    target = out / "compare.parquet"
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, folder=True):
        table = finished(target, stamp)
        if table is None:
            parts = Parts.of_task(
                task, held_out=config.held_out, seed=config.seed, shifts=config.shifts,
                severities=config.severities,
            )  # fmt: skip
            table = compare(
                opened.members, parts, config, rules=rules, cells=Cells(out / "cells"),
                about=about, progress=progress,
            )  # fmt: skip
            write_table(target, table, stamp.metadata())
    return table, [*_words(table), str(target), *map(str, draw(table, out, task.label))]


def _words(table: pd.DataFrame) -> list[str]:
    """What the table shows, in sentences."""
    lines = []
    test = table[table["data"] == "test"]
    combined = test[~test["rule"].isin(["member", "mean_member"])]
    best = combined.sort_values("nll").iloc[0]
    single = test[test["rule"] == "member"].sort_values("nll").iloc[0]
    lines.append(
        f"lowest loss: {best['rule']} ({best['space']}), nll {best['nll']:.4f}; best single "
        f"member {single['nll']:.4f}"
    )
    soup = combined[(combined["rule"] == "uniform") & (combined["space"] == "weights")]
    for _, row in soup.iterrows():
        if row["barrier"] > 0:
            lines.append(
                f"the uniform soup (repair: {row['repair']}) is worse than its mean member by "
                f"{row['barrier']:.4f}: the members do not lie in one basin"
            )
    if (test["predicted_from"] == OUTSIDE).any():
        lines.append(
            "predictions are not to be believed: the members lie outside the quadratic range "
            "about their mean"
        )
    return lines
