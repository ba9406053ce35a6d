"""Compute and draw a figure by its name; an unchanged table is not computed again."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import figures.style
import nqm
from nqm.errors import NQMError
from nqm.files import check_replaceable
from nqm.runs.executors import processes
from nqm.table import read_metadata, read_table, write_table
from paper_repro.study import Claim, Scale, Study, find, on_problem

if TYPE_CHECKING:
    import pandas as pd

    from nqm.problems.quadratic import Problem


@dataclass(frozen=True)
class Built:
    """One computed and drawn figure.

    Attributes
    ----------
    name : str
        Name of the figure.
    metadata : dict
        Metadata of the table and both pictures, as `stamp` returns it.
    table : DataFrame
        Numbers that are drawn and checked.
    png, pdf : Path
        Paths of the pictures.
    claims : list of Claim
        Checks of the table; none for another problem than the figure's own.
    seconds : float
        Time for computing and drawing.
    reused : bool
        Whether the table of an earlier run was drawn again.
    """

    name: str
    metadata: dict[str, Any]
    table: pd.DataFrame
    png: Path
    pdf: Path
    claims: list[Claim]
    seconds: float
    reused: bool

    @property
    def study(self) -> Study:
        """Module of the figure."""
        return find(self.name)


def stamp(name: str, scale: Scale, problem: Problem | None = None) -> dict[str, Any]:
    """Return the metadata of a figure's table.

    Parameters
    ----------
    name : str
        Name of the figure.
    scale : Scale
        Full or smoke.
    problem : Problem, optional
        Another problem than the figure's own.

    Returns
    -------
    dict
        Figure, scale, settings, version, seed, a digest of the code, the key of another problem,
        and ``key``, a digest of all of these.

    Raises
    ------
    NQMError
        If there is no such figure.
    """
    study = find(name)
    settings = json.loads(json.dumps(asdict(study.settings(scale))))
    content: dict[str, Any] = {"figure": name, "scale": str(scale), "settings": settings}
    content |= {"version": nqm.__version__, "seed": settings.get("seed"), "code": _code(study)}
    content |= {} if problem is None else {"problem": problem.key()}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return content | {"key": key}


def _code(study: Study) -> str:
    """Digest of the sources a table depends on: all of nqm, and the figure's own modules."""
    sources = sorted(Path(nqm.__file__).parent.rglob("*.py"))
    module = cast(ModuleType, study)
    own = {module.__file__} | {
        inspect.getsourcefile(value)
        for value in vars(module).values()
        if getattr(value, "__module__", "").startswith("paper_repro.")
    }
    sources += sorted(Path(path) for path in own if path and not path.endswith("study.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _stem(name: str, metadata: Mapping[str, Any]) -> str:
    """Name of the files: a figure of another problem never has that of the paper's."""
    problem = metadata.get("problem")
    return name if problem is None else f"{name}-{str(problem)[:8]}"


def build(
    name: str,
    scale: Scale = Scale.FULL,
    out: str | Path = "out/paper",
    problem: Problem | None = None,
) -> Built:
    """Compute a figure's table and draw it as PNG and PDF.

    A table in `out` with the same key is drawn again without computing. A table of another scale,
    version or code is computed anew and replaced: `out` holds results of this command. A file that
    this command did not write is never replaced.

    Parameters
    ----------
    name : str
        Name of the figure.
    scale : Scale
        Full or smoke.
    out : str or Path
        Folder of the files; it is made if it does not exist.
    problem : Problem, optional
        Draw the figure of this problem instead of the paper's. Its learning rates are in units of
        1 / its largest curvature, no claim is checked, and the files are called NAME-KEY.

    Returns
    -------
    Built

    Raises
    ------
    NQMError
        For an unknown name, an unwritable folder, a file of that name that another command
        wrote, or a figure that is of its own problem only.
    """
    began = time.perf_counter()
    study, out = find(name), Path(out)
    compute = study.compute if problem is None else on_problem(name, problem)
    metadata = stamp(name, scale, problem)
    stem = _stem(name, metadata)
    check_outputs([stem], out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NQMError(f"cannot write {out}: {error.strerror or error}") from None
    path = out / f"{stem}.parquet"
    table = _earlier(path, metadata["key"])
    reused = table is not None
    if table is None:
        write_table(path, compute(scale), metadata)
        table = read_table(path)
    png, pdf = _picture(study, table, out / stem, metadata)
    claims = study.claims(table) if problem is None else []
    seconds = time.perf_counter() - began
    return Built(name, metadata, table, png, pdf, claims, seconds, reused)


def build_all(names: Sequence[str], scale: Scale, out: Path) -> Generator[Built, None, None]:
    """Build several figures in two processes.

    Drawing holds Python's lock, so that threads would not run at the same time.

    Parameters
    ----------
    names : sequence of str
        Names of the figures.
    scale : Scale
        Full or smoke.
    out : Path
        Folder of the files; it is made if it does not exist.

    Yields
    ------
    Built
        In the order in which the figures are finished.

    Raises
    ------
    NQMError
        As `build`.
    """
    if len(names) == 1:
        yield build(names[0], scale, out)
        return
    with processes(min(2, os.cpu_count() or 1)) as pool:
        # The report's order begins with the quick ones; the long ones have to start first.
        tasks = [pool.submit(build, name, scale, out) for name in reversed(names)]
        for task in as_completed(tasks):
            yield task.result()


def redraw(name: str, path: Path, out: Path) -> tuple[Path, Path]:
    """Draw a figure from a table that was computed before.

    Parameters
    ----------
    name : str
        Name of the figure.
    path : Path
        The table (Parquet or CSV).
    out : Path
        Folder of the pictures.

    Returns
    -------
    png, pdf : Path

    Raises
    ------
    NQMError
        If the table cannot be read, belongs to another figure, or lacks a column.
    """
    study = find(name)
    table, metadata = read_table(path), read_metadata(path)
    other = metadata.get("figure", name)
    if other != name:
        raise NQMError(f"{path} is the table of figure {other!r}; asked to draw {name!r}")
    try:
        return _picture(study, table, out / _stem(name, metadata), metadata)
    except NQMError:
        raise
    except Exception as error:  # a table from elsewhere may hold anything
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)[:100]
        raise NQMError(f"{path} is not a table of figure {name!r}: {reason}") from None


def check_outputs(names: Sequence[str], out: Path) -> None:
    """Check that the files of these figures can be written.

    Parameters
    ----------
    names : sequence of str
        Names of the figures.
    out : Path
        Folder of the files.

    Raises
    ------
    NQMError
        If a file cannot be replaced, or was not written by this command.
    """
    for name in names:
        for kind in ("parquet", "png", "pdf"):
            check_replaceable(out / f"{name}.{kind}")
        _earlier(out / f"{name}.parquet")


def _earlier(path: Path, key: str = "") -> pd.DataFrame | None:
    """Return the saved table if it has this key; NQMError if another command wrote the file."""
    if not path.exists():
        return None
    try:
        found, table = read_metadata(path), read_table(path)
    except NQMError:
        with path.open("rb") as stream:
            if stream.read(4) != b"PAR1":
                raise
        return None  # a table that was cut short is computed anew
    if "figure" not in found:
        raise NQMError(f"{path} was not written by this command; move it or choose another --out")
    return table if found.get("key") == key else None


def _picture(
    study: Study, table: pd.DataFrame, stem: Path, metadata: dict[str, Any]
) -> tuple[Path, Path]:
    try:
        png, pdf = figures.style.save(study.draw(table), stem, metadata)
    except OSError as error:
        raise NQMError(f"cannot write {stem}.png: {error.strerror or error}") from None
    return png, pdf
