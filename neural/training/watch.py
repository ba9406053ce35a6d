"""``nqm neural watch``: the state of all runs below a folder, from the files that runs write.

It reads ``runs.json`` of an experiment (which runs are to come), ``run.json`` of a run (its
status), its lock (whether a process trains it), ``progress.json`` (how far it is), and
``history.parquet`` once it is complete. It writes nothing and needs no PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from neural.training.run_progress import RunProgress, read_progress
from nqm.errors import NQMError
from nqm.files import check_regular, is_locked, replacing
from nqm.progress import duration
from nqm.table import read_table

#: File of an experiment with the runs that it trains.
PLAN = "runs.json"
#: Order of states in the live table, where not all runs have room.
STATES = ("running", "killed", "diverged", "finished", "waiting")
#: Seconds between two looks; between two lines of one run; and until a line within an epoch.
LOOK_EVERY, LINE_EVERY, LONG = 0.5, 5.0, 120.0
_BAR = 10


@dataclass(frozen=True)
class Planned:
    """A run that an experiment will train.

    Attributes
    ----------
    folder : str
        Relative to that of the experiment.
    first : int
        Epochs done where it starts, by another run.
    epochs : int
        Epochs of the run.
    """

    folder: str
    first: int
    epochs: int


@dataclass(frozen=True)
class RunState:
    """State of one run.

    Attributes
    ----------
    name : str
        Arm, or the folder of a run that belongs to none.
    seed : str
        Its seed; empty if its folder does not tell.
    state : {"waiting", "running", "killed", "finished", "diverged"}
        ``killed``: it was begun, is not complete, and no process trains it.
    progress : RunProgress
        How far it is.
    """

    name: str
    seed: str
    state: str
    progress: RunProgress

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in ("finished", "diverged")


@dataclass(frozen=True)
class Plan:
    """What an experiment trains.

    Attributes
    ----------
    title : str
        Title of its recipe.
    arms : tuple of str
        All arms of its recipe, in order.
    runs : tuple of Planned
        Runs that the last command trains.
    """

    title: str = ""
    arms: tuple[str, ...] = ()
    runs: tuple[Planned, ...] = ()


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan of an experiment.

    Parameters
    ----------
    out : Path
        Folder of the experiment.
    plan : Plan
        What it trains.
    """
    with replacing(out / PLAN) as stream:
        stream.write(json.dumps(asdict(plan), indent=1).encode())


def read_plan(out: Path) -> Plan:
    """Read the plan of an experiment.

    Parameters
    ----------
    out : Path
        Folder of the experiment.

    Returns
    -------
    Plan
        An empty one if the file is missing or damaged. Runs outside of the folder are left out.
    """
    try:
        check_regular(out / PLAN)
        content = json.loads((out / PLAN).read_text(encoding="utf-8"))
        runs = [
            Planned(str(run["folder"]), int(run["first"]), int(run["epochs"]))
            for run in content["runs"]
        ]
        arms = tuple(str(arm) for arm in content["arms"])
        title = str(content["title"])
    except (NQMError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Plan()
    inside = (run for run in runs if _inside(Path(run.folder)))
    return Plan(title, arms, tuple(inside))


def _inside(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts


class Watch:
    """The runs below a folder.

    Parameters
    ----------
    out : Path
        The folder: of one run, of an experiment, or of several.

    Attributes
    ----------
    busy : bool
        Whether, at the last look, a process had the lock of an experiment: it checks arms, trains,
        or writes tables.
    """

    def __init__(self, out: Path):
        self.out = out
        self.busy = False
        self._complete: dict[Path, RunState] = {}

    def look(self) -> list[RunState]:
        """Read the state of all runs.

        Returns
        -------
        list of RunState
            Runs of an experiment in the order of its plan, others by name.
        """
        states, (folders, experiments) = [], run_folders(self.out)
        self.busy = any(is_locked(experiment, folder=True) for experiment in experiments)
        for folder, planned in folders.items():
            state = self._complete.get(folder) or _state(folder, self.out, planned)
            if state.complete:
                self._complete[folder] = state
            states.append(state)
        return states


def run_folders(out: Path) -> tuple[dict[Path, Planned | None], list[Path]]:
    """Find the runs at or below a folder.

    Parameters
    ----------
    out : Path
        The folder.

    Returns
    -------
    runs : dict of Path to Planned or None
        Folders of runs that exist or are planned, those of plans first.
    experiments : list of Path
        Folders that have a plan.
    """
    found: dict[Path, Planned | None] = {}
    on_disk: list[Path] = []
    experiments: list[Path] = []
    for place, folders, files in os.walk(out):
        folders.sort()
        folder = Path(place)
        if PLAN in files:
            experiments.append(folder)
            found |= {folder / run.folder: run for run in read_plan(folder).runs}
        if "run.json" in files:
            on_disk.append(folder)
            folders.clear()
    return found | {folder: found.get(folder) for folder in on_disk}, experiments


def _state(folder: Path, out: Path, planned: Planned | None) -> RunState:
    name, seed = arm_and_seed(folder, out)
    stated = _stated(folder)
    if stated is None or stated.get("status") is None:
        running = is_locked(folder, folder=True)
        # It may have begun, or ended, between the two looks.
        stated = _stated(folder)
        running = running or (stated is not None and is_locked(folder, folder=True))
        stated = _stated(folder)
    else:
        running = False
    status = None if stated is None else stated.get("status")
    epochs = _epochs(stated, planned)
    if status in ("finished", "diverged"):
        return RunState(name, seed, status, _final(folder, epochs, status))
    first = RunProgress(0 if planned is None else planned.first, epochs)
    progress = read_progress(folder) or first
    state = "running" if running else "waiting" if stated is None else "killed"
    return RunState(name, seed, state, progress)


def arm_and_seed(folder: Path, out: Path) -> tuple[str, str]:
    """Arm and seed of a run, from the last parts of its path: ``ARM/seedN``.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    out : Path
        Folder at or above it, from which one looks.

    Returns
    -------
    arm : str
        Path of the arm below `out`, or the run's own folder if it is not called ``seedN``.
    seed : str
        Digits; empty if the folder does not tell.
    """
    parts = folder.relative_to(out).parts
    if len(parts) < 2:  # `out` is an arm, or the run itself
        parts = folder.resolve().parts[-2:]
    last = parts[-1].removeprefix("seed")
    seed = last if last != parts[-1] and last.isdigit() else ""
    arm = "/".join(parts[:-1] if seed else parts[-1:] if len(parts) == 2 else parts)
    return "".join(c for c in arm if c.isprintable()), seed


def _stated(folder: Path) -> Mapping[str, Any] | None:
    """Content of ``run.json``; None if there is none, an empty mapping if it is damaged."""
    try:
        text = (folder / "run.json").read_bytes()
    except OSError:
        return None
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    return {}


def _epochs(stated: Mapping[str, Any] | None, planned: Planned | None) -> int:
    if planned is not None:
        return planned.epochs
    with suppress(KeyError, TypeError, ValueError):
        return int((stated or {})["config"]["train"]["epochs"])
    return 0


def _final(folder: Path, epochs: int, status: str) -> RunProgress:
    """Last row of the history of a complete run."""
    try:
        row = read_table(folder / "history.parquet").iloc[-1].to_dict()
        epoch, loss, accuracy = int(row["epoch"]), float(row["loss"]), float(row["accuracy"])
        trained = float(row["train_loss"])
    except (NQMError, KeyError, IndexError, ValueError, TypeError):
        return RunProgress(epochs if status == "finished" else 0, epochs)
    return RunProgress(epoch, epochs, trained, epoch, loss, accuracy)


# --- in words ------------------------------------------------------------------------------------


def time_left(states: Sequence[RunState]) -> float:
    """Estimate the time to the end of all runs, if as many go on side by side as do now.

    Parameters
    ----------
    states : sequence of RunState
        All runs.

    Returns
    -------
    float
        Seconds; NaN if no run tells its pace. A run that does not is taken for as quick per epoch
        as the mean of those that do.
    """
    paces = [s.progress.seconds_per_epoch for s in states if s.state == "running"]
    paces = [pace for pace in paces if math.isfinite(pace)]
    if not paces:
        return math.nan
    mean, total, longest = sum(paces) / len(paces), 0.0, 0.0
    for state in states:
        if state.complete:
            continue
        own = state.progress.left
        if not math.isfinite(own):
            own = (state.progress.epochs - state.progress.epoch) * mean
        total += own
        longest = max(longest, own)
    running = sum(s.state == "running" for s in states)
    return max(longest, total / running)


def line(state: RunState) -> str:
    """Write the state of one run as a line.

    Parameters
    ----------
    state : RunState
        The run.

    Returns
    -------
    str
        Arm, seed, epoch, losses, accuracy, time left.
    """
    progress = state.progress
    said = [_epoch(progress)] if state.state == "running" else [state.state]
    if math.isfinite(progress.train_loss):
        said.append(f"training loss {progress.train_loss:.4f}")
    if math.isfinite(progress.loss):
        said.append(f"test loss {progress.loss:.4f}")
    if math.isfinite(progress.accuracy):
        said.append(f"accuracy {100 * progress.accuracy:.2f} %")
    if state.state == "running" and progress.evaluated and progress.evaluated < int(progress.epoch):
        said[-1] += f" (after epoch {progress.evaluated})"
    if state.state == "running" and (left := duration(progress.left)):
        said.append(f"{left} left")
    seed = f", seed {state.seed}" if state.seed else ""
    return f"{state.name}{seed}: {', '.join(said)}"


def _epoch(progress: RunProgress) -> str:
    whole = progress.epoch % 1 == 0
    return f"epoch {progress.epoch:.{0 if whole else 1}f} of {progress.epochs}"


def table(
    states: Sequence[RunState], *, busy: bool = False, rows: int | None = None, style: bool = True
) -> list[str]:
    """Write the states of all runs as lines of a table.

    Parameters
    ----------
    states : sequence of RunState
        The runs.
    busy : bool
        See `Watch`.
    rows : int, optional
        Most runs to show; those that are running come first. All by default.
    style : bool
        Whether states have colours.

    Returns
    -------
    list of str
        Header, runs, and a summary.
    """
    chosen = list(range(len(states)))
    if rows is not None and len(states) > rows:
        chosen = sorted(chosen, key=lambda i: STATES.index(states[i].state))[: max(rows, 1)]
    cells: list[tuple[str, ...]] = [
        ("run", "seed", "state", "epoch", "train loss", "test loss", "accuracy", "left")
    ]
    cells += [_cells(states[i]) for i in sorted(chosen)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    lines = []
    for number, row in enumerate(cells):
        texts = [
            text.ljust(width) if k < 4 else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        if style and number == 0:
            texts = [click.style(text, bold=True) for text in texts]
        elif style:
            texts[2] = click.style(texts[2], fg=_COLOURS.get(row[2]))
        lines.append("  ".join(texts).rstrip())
    if len(chosen) < len(states):
        lines.append(f"... and {len(states) - len(chosen)} more runs")
    return [*lines, summary(states, busy=busy)]


_HEADER = ("run", "seed", "state", "epoch", "train loss", "test loss", "accuracy", "left")
_COLOURS = {"running": "cyan", "finished": "green", "killed": "yellow", "diverged": "red"}


def _cells(state: RunState) -> tuple[str, ...]:
    progress = state.progress
    # Of a run that waits, epochs of another one with the same beginning do not count.
    done = 0 if state.state == "waiting" else math.floor(progress.epoch)
    full = _BAR * min(done, progress.epochs) // max(1, progress.epochs)
    bar = "#" * full + "." * (_BAR - full)
    left = duration(progress.left) if state.state == "running" else ""
    return (
        state.name,
        state.seed,
        state.state,
        f"{bar} {done}/{progress.epochs}",
        "" if math.isnan(progress.train_loss) else f"{progress.train_loss:.4f}",
        "" if math.isnan(progress.loss) else f"{progress.loss:.4f}",
        "" if math.isnan(progress.accuracy) else f"{100 * progress.accuracy:.2f} %",
        left,
    )


def summary(states: Sequence[RunState], *, busy: bool = False) -> str:
    """Count the runs by state, and say what is left.

    Parameters
    ----------
    states : sequence of RunState
        The runs.
    busy : bool
        See `Watch`.

    Returns
    -------
    str
        One line.
    """
    counts = {name: sum(s.state == name for s in states) for name in STATES}
    said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if counts["running"]:
        left = duration(time_left(states))
        return f"{said}; about {left} left" if left else said
    if not busy and (counts["killed"] or counts["waiting"]):
        return f"{said}; no process trains now: the command that began them goes on with them"
    return said


# --- while training ------------------------------------------------------------------------------


class Display:
    """Shows the runs below a folder while they are trained: a live table, or lines.

    Parameters
    ----------
    out : Path
        Folder of the runs.
    live : bool
        True on a terminal: a table that is drawn anew. False: lines, one for each epoch of a run,
        but at most one in five seconds.
    write : callable
        Takes one text, with its line ends.
    """

    def __init__(self, out: Path, *, live: bool, write: Callable[[str], None]):
        self._watch, self._live, self._write = Watch(out), live, write
        self._looked = -math.inf
        self._drawn = 0
        self._told: dict[tuple[str, str], tuple[float, float]] = {}
        self._ended: set[tuple[str, str]] | None = None

    def __call__(self, stage: str, share: float) -> None:
        """Look, unless the last look was just now.

        Parameters
        ----------
        stage, share
            See `nqm.progress.Progress`; not used, since runs tell more in their files.
        """
        if time.monotonic() - self._looked >= LOOK_EVERY:
            self.update()

    def update(self) -> list[RunState]:
        """Look, and show what is new.

        Returns
        -------
        list of RunState
            What was seen.
        """
        states = self._watch.look()
        self._looked = time.monotonic()
        if self._live:
            self._draw(states)
        else:
            for text in self._lines(states):
                self._write(f"{datetime.now():%H:%M:%S} {text}\n")
        return states

    def _draw(self, states: Sequence[RunState]) -> None:
        """Write the table over the one before."""
        width, height = _size()
        lines = [_cut(text, width) for text in self._table(states, height)]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._write(up + "\x1b[J" + "\n".join(lines) + "\n")
        self._drawn = len(lines)

    def _table(self, states: Sequence[RunState], height: int) -> list[str]:
        return table(states, busy=self._watch.busy, rows=max(1, height - 4))

    def _lines(self, states: Sequence[RunState]) -> Iterator[str]:
        now = self._looked
        if self._ended is None:  # complete before this command began
            self._ended = {(s.name, s.seed) for s in states if s.complete}
            if self._ended:
                yield f"{len(self._ended)} of {len(states)} runs are complete already"
        for state in states:
            name = (state.name, state.seed)
            if state.complete and name not in self._ended:
                self._ended.add(name)
                yield line(state)
            if state.state != "running":
                continue
            epoch = state.progress.epoch
            if name not in self._told:
                self._told[name] = (math.floor(epoch), now)
            before, then = self._told[name]
            new = math.floor(epoch) > math.floor(before) and now - then >= LINE_EVERY
            if new or (now - then >= LONG and epoch > before):
                self._told[name] = (epoch, now)
                yield line(state) + _all_left(states)


def _all_left(states: Sequence[RunState]) -> str:
    left = duration(time_left(states))
    unfinished = sum(not s.complete for s in states)
    return f"; {unfinished} runs to go, about {left}" if unfinished > 1 and left else ""


def _size() -> tuple[int, int]:
    """Columns and rows of the terminal."""
    import shutil

    found = shutil.get_terminal_size()
    return found.columns, found.lines


def _cut(text: str, width: int) -> str:
    """A line cut to the terminal's width: one that wraps would break the drawing."""
    plain = click.unstyle(text)
    return text if len(plain) < width else plain[: max(1, width - 1)]


def follow(out: Path, every: float, *, write: Callable[[str], None]) -> None:
    """Show the runs below a folder until all are complete, or the user stops it.

    Parameters
    ----------
    out : Path
        The folder.
    every : float
        Seconds between two looks.
    write : callable
        See `Display`.
    """
    display = Display(out, live=True, write=write)
    while not all(state.complete for state in display.update()):
        time.sleep(every)
