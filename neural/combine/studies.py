"""Studies of members on disk, each kept in a folder: comparisons, rounding, curves, planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural.combine.cells import Cells, described
from neural.combine.comparison import INSIDE, OUTSIDE, TABLE, check_comparable, compare
from neural.combine.config import CombineConfig
from neural.combine.curve import (
    Curve,
    CurveConfig,
    axes_of_plane,
    control_names,
    judge_curve,
    judge_plane,
    path_on_plane,
    straight,
    summarise,
    train_curve,
)
from neural.combine.data import Parts
from neural.combine.low_precision import LowPrecisionConfig, SeededRounding, low_precision
from neural.combine.members import Members
from neural.combine.ranking import ordered, ranking
from neural.combine.rules import Merge
from neural.combine.sources import Opened
from neural.combine.survey import image_task
from neural.training.config import describe
from neural.training.load_run import write_weights
from neural.training.run_folder import check_no_run
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import locked
from nqm.progress import Progress
from nqm.table import Stamp, finished, read_metadata, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

#: Share of the mean member's loss by which a soup must exceed it before anything is said of it.
CLEAR = 0.05


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

    task = image_task(opened)
    stated = {
        "combine": asdict(config),
        "rules": {name: described(rule) for name, rule in rules.items()},
        **_stated(opened),
    }

    parts = _parts(opened, config)
    check_comparable(opened.members, parts, config, rules)  # told before any work

    def made() -> pd.DataFrame:
        return compare(
            opened.members,
            parts,
            config,
            rules=rules,
            cells=Cells(out / "cells", _about(opened, config)),
            progress=progress,
        )

    table = kept_table(out, "compare", stated, {"combine": keys.differing(config)}, made)
    target = str(out / "compare.parquet")
    return table, [*_words(table), target, *map(str, draw(table, out, task.label))]


def run_growth(
    opened: Opened, config: CombineConfig, out: Path, *, progress: Progress | None = None
) -> list[str]:
    """`neural.combine.growth.growth`, kept beside a comparison; what that computed is used.

    Parameters
    ----------
    opened : Opened
    config : CombineConfig
    out : Path
        Folder for ``growth.parquet`` and its picture.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    list of str
        The files.

    Raises
    ------
    NQMError
        If the folder holds another table of this kind.
    """
    from neural.combine.growth import growth
    from neural.combine.plots import draw_growth

    task, parts = image_task(opened), _parts(opened, config)
    stated = {
        "growth": {
            name: value
            for name, value in asdict(config).items()
            if name in ("pools", "repair", "held_out", "shifts", "severities", "seed")
        },
        **_stated(opened),
    }

    def made() -> pd.DataFrame:
        cells = Cells(out / "cells", _about(opened, config))
        return growth(opened.members, parts, config, cells=cells, progress=progress)

    table = kept_table(out, "growth", stated, {}, made)
    return [str(out / "growth.parquet"), *map(str, draw_growth(table, out, task.label))]


def _parts(opened: Opened, config: CombineConfig) -> Parts:
    return Parts.of_task(
        image_task(opened),
        held_out=config.held_out,
        seed=config.seed,
        shifts=config.shifts,
        severities=config.severities,
    )


def _about(opened: Opened, config: CombineConfig | LowPrecisionConfig) -> dict[str, Any]:
    """What identifies the data of cells."""
    return {"data": _data(opened), "held_out": config.held_out, "seed": config.seed}


def run_ranking(folders: Sequence[str], out: Path | None) -> tuple[pd.DataFrame, list[str]]:
    """Rank finished comparisons by measurement and by prediction.

    Parameters
    ----------
    folders : sequence of str
        Folders of `run_compare`, or the tables in them.
    out : Path, optional
        Folder for ``ranking.csv`` and its picture.

    Returns
    -------
    table : DataFrame
        See `neural.combine.ranking.ranking`.
    lines : list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If a folder holds no comparison, or one without predictions.
    """
    paths = [Path(one) / "compare.parquet" if Path(one).is_dir() else Path(one) for one in folders]
    named = [path.parent.name if path.stem == "compare" else path.stem for path in paths]
    double = next((name for name in named if named.count(name) > 1), None)
    if double is not None:
        raise NQMError(f"two comparisons are called {double!r}; rename one folder")
    tables = {name: read_table(path) for name, path in zip(named, paths, strict=True)}
    for name, table in tables.items():
        missing = next((c for c in TABLE if c not in table), None)
        if missing is not None:
            raise NQMError(f"{name} is no table of `nqm neural compare`: it lacks {missing!r}")
    table = ranking(tables)
    lines = []
    for inside in (True, False):
        rows = table[(table["predicted_from"] != OUTSIDE) == inside]
        if rows.empty:
            continue
        right, pairs = int(rows["right"].sum()), int(rows["pairs"].sum())
        lost = float((rows["chosen_nll"] / rows["best_nll"] - 1.0).max())
        lines.append(
            f"{INSIDE if inside else OUTSIDE}: theory puts {right} of {pairs} pairs of ways into "
            f"the right order; the way it prefers has a loss at most {lost:.1%} above the best"
        )
    if out is not None:
        from neural.combine.plots import draw_ranking

        stated = {"tables": {n: read_metadata(p) for n, p in zip(named, paths, strict=True)}}
        kept_table(out, "ranking.csv", stated, {}, lambda: table)
        lines += [
            str(out / "ranking.csv"),
            *map(str, draw_ranking(tables, out, "ways of combining")),
        ]
    return table, lines


def kept_table(
    out: Path,
    name: str,
    stated: Mapping[str, Any],
    keyed: Mapping[str, Any],
    make: Callable[[], pd.DataFrame],
) -> pd.DataFrame:
    """A table in a folder: computed if it is not there yet, else read.

    Parameters
    ----------
    out : Path
        The folder.
    name : str
        Of the table; its extension is .parquet unless it has one.
    stated : mapping
        All it is computed from, for messages.
    keyed : mapping
        Entries of `stated` that its key takes in another form: without defaults.
    make : callable
        Computes it.

    Returns
    -------
    DataFrame

    Raises
    ------
    NQMError
        If the folder holds a run, or another table of this name.
    """
    check_no_run(out)
    stamp = Stamp(keys.key({**stated, **keyed}), __version__, stated)
    target = out / (name if Path(name).suffix else f"{name}.parquet")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, folder=True):
        table = finished(target, stamp)
        if table is None:
            table = make()
            write_table(target, table, stamp.metadata())
    return table


def run_low_precision(
    opened: Opened,
    config: LowPrecisionConfig,
    out: Path,
    *,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """`neural.combine.low_precision.low_precision`, kept in a folder; a killed study goes on.

    Parameters
    ----------
    opened : Opened
        One member.
    config : LowPrecisionConfig
    out : Path
        Folder for ``low_precision.parquet``, its picture, and ``cells`` of parts that are done.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    table : DataFrame
    lines : list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If the folder holds a run or another study, or the model cannot be rounded.
    """
    from neural.combine.plots import draw_low_precision

    task = image_task(opened)

    def made() -> pd.DataFrame:
        parts = Parts.of_task(task, held_out=config.held_out, seed=config.seed)
        cells = Cells(out / "cells", _about(opened, config))
        return low_precision(opened.members, parts, config, cells=cells, progress=progress)

    SeededRounding().members(opened.members)  # told before any work
    stated = {
        "low_precision": asdict(config),
        "model": opened.members.key(0),
        "data": _data(opened),
        "members": len(opened.members),
    }
    keyed = {"low_precision": keys.differing(config)}
    table = kept_table(out, "low_precision", stated, keyed, made)
    pictures = draw_low_precision(table, out, task.label)
    target = str(out / "low_precision.parquet")
    return table, [*_gains(table), target, *map(str, pictures)]


def run_curve(
    opened: Opened, config: CurveConfig, out: Path, *, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Train and judge a curve between two models; a killed run goes on bit for bit.

    Parameters
    ----------
    opened : Opened
        Two members.
    config : CurveConfig
    out : Path
        Folder for ``curve.parquet``, ``plane.parquet`` if it is asked for, their pictures, the
        bends as safetensors, and ``cells`` of parts that are done.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    summary : DataFrame
        See `neural.combine.curve.summarise`.
    lines : list of str
        The files.

    Raises
    ------
    NQMError
        If the folder holds a run or another curve, or there is no curve between the members.
    """
    from neural.combine.plots import draw_curve, draw_plane

    task, ends = image_task(opened), opened.members
    straight(ends, config)  # told before any work
    batch_size = _batch_size(opened)
    trained = {
        "curve": keys.differing(replace(config, **_OF_JUDGING)),
        **_stated(opened),
        "batch_size": batch_size,
        "version": __version__,
    }
    file = out / "cells" / f"{keys.key(trained)[:32]}.pt"
    parts, cells = Parts.of_task(task), Cells(out / "cells", {"data": _data(opened)})

    @cache
    def curve() -> Curve:
        file.parent.mkdir(parents=True, exist_ok=True)
        device = next(iter(task.test()))[0].device
        return train_curve(
            ends, task.stream, task.loss, config, file=file, device=device, progress=progress
        )

    def kept(name: str, config: CurveConfig, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        stated = {"curve": asdict(config), "batch_size": batch_size, **_stated(opened)}
        keyed = {"curve": keys.differing(config)}
        return kept_table(out, name, stated, keyed, make)

    table = kept(
        "curve",
        replace(config, plane=0),
        lambda: judge_curve(ends, curve(), parts, config, cells=cells, progress=progress),
    )
    files = [out / "curve.parquet", *draw_curve(table, out, task.label)]
    for index, name in enumerate(control_names(config.bends)):
        target = out / f"{name}.safetensors"
        if name.startswith("bend"):
            # The table says whose bends these are, and is there before them.
            if not target.exists():
                state = partial(curve().controls.state, index)
                write_weights(target, state, {"curve": asdict(config)})
            files.append(target)
    if config.plane:
        grid = kept(
            "plane",
            config,
            lambda: judge_plane(
                _corners(curve()),
                parts,
                config.plane,
                repair=config.repair,
                cells=cells,
                progress=progress,
            ),
        )
        path = path_on_plane(curve(), _corners(curve())) if config.bends == 1 else None
        files += [out / "plane.parquet", *draw_plane(grid, out, task.label, path)]
    return summarise(table), list(map(str, files))


def run_plane(
    opened: Opened, points: int, repair: str, out: Path, *, progress: Progress | None = None
) -> list[str]:
    """Judge the plane through three models; a killed run goes on.

    Parameters
    ----------
    opened : Opened
        Three members.
    points : int
        Of the grid along either side.
    repair : {"statistics", "none"}
    out : Path
        Folder for ``plane.parquet``, its picture, and ``cells`` of parts that are done.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If the folder holds a run or another plane, or there is no plane through the members.
    """
    from neural.combine.plots import draw_plane

    task = image_task(opened)
    axes_of_plane(opened.members)
    stated = {"plane": {"points": points, "repair": repair}, **_stated(opened)}

    def made() -> pd.DataFrame:
        return judge_plane(
            opened.members,
            Parts.of_task(task),
            points,
            repair=repair,
            cells=Cells(out / "cells", {"data": _data(opened)}),
            progress=progress,
        )

    table = kept_table(out, "plane", stated, {}, made)
    corners = table[table["corner"] != ""]
    lines = [
        f"{row['corner']} at ({row['x']:.3f}, {row['y']:.3f}): nll {row['nll']:.4f}, accuracy "
        f"{row['accuracy']:.4f}"
        for _, row in corners.iterrows()
    ]
    files = [out / "plane.parquet", *draw_plane(table, out, task.label)]
    return [*lines, *map(str, files)]


#: Settings of a curve that say how it is judged, at their defaults: training does not see them.
_OF_JUDGING: dict[str, Any] = {
    name: getattr(CurveConfig(), name) for name in ("points", "train_examples", "repair", "plane")
}


def _corners(curve: Curve) -> Members:
    """The ends of a curve and its middle bend."""
    last = len(curve.controls) - 1
    return curve.controls.chosen([0, last, (last + 1) // 2])


def _stated(opened: Opened) -> dict[str, Any]:
    """Members and data, by which results are known."""
    members = {m.name: opened.members.key(i) for i, m in enumerate(opened.members)}
    return {"members": members, "data": _data(opened)}


def _batch_size(opened: Opened) -> int:
    assert opened.run is not None
    return opened.run.data.batch_size


def _data(opened: Opened) -> dict[str, Any]:
    """What identifies the data that models are judged on."""
    assert opened.run is not None
    return {k: v for k, v in describe(opened.run)["data"].items() if k != "batch_size"}


def _gains(table: pd.DataFrame) -> list[str]:
    """What ensembles of low precision gain over the model, raw and at tuned temperatures."""
    plain = table[table["rule"] == "float"].iloc[0]
    pooled = table[table["rule"] == "ensemble"]
    largest = pooled.loc[pooled.groupby(["rounding", "grid_bits"])["members"].idxmax()]
    return [
        f"{row['grid_bits']} bits, {row['rounding']}, {row['members']} draws: nll lower by "
        f"{plain['nll'] - row['nll']:.4f} than the model's, at tuned temperatures by "
        f"{plain['nll_tuned'] - row['nll_tuned']:.4f}"
        for _, row in largest.iterrows()
    ]


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
        # Recomputed statistics alone move a loss by some per cent.
        if row["barrier"] > CLEAR * row["mean_member_nll"]:
            lines.append(
                f"the uniform soup (repair: {row['repair']}) is worse than its mean member by "
                f"{row['barrier']:.4f}: the members do not lie in one basin"
            )
    right, pairs = ordered(table)
    if pairs:
        lines.append(f"theory puts {right} of {pairs} pairs of ways into the right order")
    if (test["predicted_from"] == OUTSIDE).any():
        lines.append(
            "predictions are not to be believed: the members lie outside the quadratic range "
            "about their mean"
        )
    return lines
