"""The training loop."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from neural.data import Images
from neural.late_phase.members import Batch
from neural.training import preflight, report
from neural.training.config import RunConfig
from neural.training.run_folder import RunFolder
from neural.training.state import Session
from neural.training.task import Place, Stream, open_task
from neural.training.tensorboard import Board

#: Seconds between two checkpoints.
CHECKPOINT_EVERY = 60.0
#: Base steps between two looks at the losses; looking waits for a GPU.
LOOK_EVERY = 50


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes
    ----------
    status : str
        ``finished`` or ``diverged``.
    history : DataFrame
        One row per evaluation during training.
    result : DataFrame
        One row per metric at the end (see `neural.training.report`).
    """

    status: str
    history: pd.DataFrame
    result: pd.DataFrame


def train(
    run: RunConfig,
    folder: str | Path,
    place: Place | None = None,
    *,
    start: Path | None = None,
    keep: Collection[int] = (),
    rehearsed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train one run; killed at any moment and called again, it goes on where it was.

    Parameters
    ----------
    run : RunConfig
    folder : str or Path
        Takes checkpoints, the history and the result. A finished run is only read; a folder of
        another configuration is never touched.
    place : Place, optional
        Device, data folder, ranks; one CPU by default.
    start : Path, optional
        Checkpoint of a run with the same beginning, to start from.
    keep : collection of int
        Epochs after which a checkpoint is kept for other runs to start from.
    rehearsed : bool
        Whether `neural.training.preflight` has found this run sound already.
    progress : callable, optional
        Told (minibatches done, of all) now and then.

    Raises
    ------
    NQMError
        On anything the user can mend. A loss that is not finite is no error: the run stops, says
        ``diverged``, and keeps what it has.
    """
    place = place or Place()
    log = RunFolder(Path(folder), run, writes=place.rank == 0)
    if log.status is not None:
        return Outcome(log.status, log.history(), log.result())
    task = open_task(run, place)
    ood = report.ood_images(task, run.evaluate.ood, place.root)
    if not rehearsed:
        preflight.check_run(run, place, task)
        preflight.rehearse(run, place, task, ood)
    session = Session(run, task, place)
    with log.begun():
        if (state := log.checkpoint(place.device, start)) is not None:
            session.load_state_dict(state)
        status = _go_on(session, ood, log, keep, progress)
    return Outcome(status, log.history(), log.result())


def _go_on(
    session: Session,
    ood: Mapping[str, Images],
    log: RunFolder,
    keep: Collection[int],
    progress: Callable[[int, int], None] | None,
) -> str:
    """Train to the end, and write what came out; returns the status."""
    run, task, place = session.run, session.task, session.place
    board = Board(log.path, session.done) if place.tensorboard and place.rank == 0 else None
    batches = len(task.stream)
    total = run.train.epochs * batches
    saved, status = time.monotonic(), "finished"
    for count, (group, after) in enumerate(_groups(session, total)):
        epochs_before = session.done // batches
        if group:
            session.step(group)
        session.done = after
        ended = range(epochs_before + 1, after // batches + 1)
        if ended or count % LOOK_EVERY == 0:
            if not session.finite():
                status = "diverged"
                break
            if progress is not None:
                progress(after, total)
        for epoch in ended:
            session.end_epoch(epoch)
            if epoch % run.evaluate.every == 0 or epoch == run.train.epochs:
                session.rows.append(report.during(session, epoch))
                log.write_history(session.rows)
                if board is not None:
                    board.add(session.rows[-1])
            if epoch in keep:
                log.keep(epoch, session.state_dict())
        if time.monotonic() - saved > CHECKPOINT_EVERY:
            log.save(session.state_dict())
            saved = time.monotonic()
    if status == "finished" and not math.isfinite(session.rows[-1]["loss"]):
        status = "diverged"  # with the very last step
    log.write_history(session.rows)
    log.finish(status, report.final(session, ood) if status == "finished" else None)
    return status


def _groups(session: Session, total: int) -> Iterator[tuple[list[Batch], int]]:
    """Minibatches of each base step, and how many are used after it; spawns the members at T0.

    An empty group passes over minibatches that are dropped.
    """
    settings, batches = session.run.late_phase, len(session.task.stream)
    stream = _endless(session.task.stream, session.done)
    while session.done < total:
        if settings is None or session.done < settings.start_epoch * batches:
            yield [next(stream)], session.done + 1
            continue
        if session.late is None:
            session.spawn()
        carries = settings.leftover == "carry"
        left = total - session.done if carries else batches - session.done % batches
        group = list(itertools.islice(stream, min(settings.members, left)))
        after = session.done + len(group)
        # What is carried at the very end has no next epoch to go to.
        short = len(group) < settings.members
        yield [] if short and settings.leftover != "members" else group, after


def _endless(stream: Stream, done: int) -> Iterator[Batch]:
    """Batches of epoch after epoch, from one in the middle on."""
    first, start = divmod(done, len(stream))
    for epoch in itertools.count(first):
        yield from stream.epoch(epoch, start if epoch == first else 0)
