"""The training loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from neural.data import Images
from neural.late_phase.members import Batch
from neural.training import preflight, report
from neural.training.config import RunConfig
from neural.training.loggers import load_logger
from neural.training.monitor import Monitor
from neural.training.run_folder import RunFolder
from neural.training.state import TrainState
from neural.training.task import Runtime, Stream, open_task
from nqm.progress import Progress
from nqm.runs.interrupts import stop, stop_asked

#: Seconds between two checkpoints.
CHECKPOINT_EVERY = 60.0
#: Base steps after which several processes agree whether a signal has asked one of them to stop.
AGREE_EVERY = 10
#: Base steps between two checks that the losses are finite; a check waits for the GPU.
LOOK_EVERY = 50


@dataclass(frozen=True)
class Outcome:
    """Status and results of a run.

    Attributes
    ----------
    status : {"finished", "diverged"}
        Whether training was completed or stopped at a loss that is not finite.
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
    runtime: Runtime | None = None,
    *,
    start: Path | None = None,
    keep: Collection[int] = (),
    rehearsed: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Train one run; if it was killed, continue from its last checkpoint.

    Parameters
    ----------
    run : RunConfig
        The run.
    folder : str or Path
        Folder for checkpoints, the history and the result. The results of a complete run are read;
        a folder of another configuration is refused and not changed.
    runtime : Runtime, optional
        Device, data folder, ranks; one CPU by default.
    start : Path, optional
        Checkpoint of a run with the same beginning, from which to start.
    keep : collection of int
        Numbers of epochs after which a checkpoint is written for other runs.
    rehearsed : bool
        True if the checks of `neural.training.preflight` were done already.
    progress : callable, optional
        Called as ``progress("training", fraction)``, with the fraction of minibatches done.

    Returns
    -------
    Outcome
        Status, history and result. If a loss is not finite, training stops with the status
        ``diverged``.

    Raises
    ------
    NQMError
        If the folder holds another configuration or the checkpoint of another number of processes,
        or the run cannot be trained.
    Stopped
        If a signal asked for it inside `nqm.runs.interrupts.stops_later`; a checkpoint is written.
    """
    runtime = runtime or Runtime()
    for name in runtime.loggers:
        load_logger(name)
    log = RunFolder(
        Path(folder),
        run,
        writes=runtime.rank == 0,
        world=runtime.world,
        background=runtime.device.type == "cuda",  # which would wait for the disk
    )
    if log.status is not None:
        return Outcome(log.status, log.history(), log.result())
    log.check_world(start)
    task = open_task(run, runtime)
    ood = report.ood_images(task, run.evaluate.ood, runtime.root)
    if not rehearsed:
        preflight.check_run(run, runtime, task)
        preflight.rehearse(run, runtime, task, ood)
    train_state = TrainState(run, task, runtime)
    with log.begun():
        _resume(train_state, log, start)
        monitor, status = Monitor(train_state, log), "killed"
        try:
            status = _go_on(train_state, ood, log, keep, progress, monitor)
        finally:
            monitor.close(status)
    return Outcome(status, log.history(), log.result())


def _resume(train_state: TrainState, log: RunFolder, start: Path | None) -> None:
    """Load the checkpoint, if there is one; its tensors are freed at the end."""
    if (state := log.checkpoint(start)) is not None:
        train_state.load_state_dict(state)
        log.check_snapshots(train_state.taken)


def _go_on(
    train_state: TrainState,
    ood: Mapping[str, Images],
    log: RunFolder,
    keep: Collection[int],
    progress: Progress | None,
    monitor: Monitor,
) -> str:
    """Train to the end and write the results; return the status."""
    run = train_state.run
    batches = len(train_state.task.stream)
    total = run.train.epochs * batches
    saved, status = time.monotonic(), "finished"
    _take_snapshot(train_state, log)  # of a run that starts from another one's checkpoint
    for count, (group, after) in enumerate(_groups(train_state, total)):
        epochs_before = train_state.done // batches
        if group:
            train_state.step(group)
        train_state.done = after
        ended = range(epochs_before + 1, after // batches + 1)
        look = bool(ended) or count % LOOK_EVERY == 0
        if look:
            if not train_state.finite():
                status = "diverged"
                break
            monitor.point()
        for epoch in ended:
            train_state.end_epoch(epoch)
            due = epoch % run.evaluate.every == 0 or epoch == run.train.epochs
            if due or train_state.ends_cycle(epoch):
                train_state.rows.append(report.during(train_state, epoch))
                log.write_history(train_state.rows)
                monitor.evaluated(train_state.rows[-1])
            if epoch in keep:
                log.keep(epoch, train_state.state_dict())
            _take_snapshot(train_state, log)
        if look:
            monitor.write()
            if progress is not None:
                progress("training", after / total)
        asked = _stop_asked(train_state, count)
        if asked or time.monotonic() - saved > CHECKPOINT_EVERY:
            log.save(train_state.state_dict())
            saved = time.monotonic()
        if asked:
            log.wait()
            train_state.all_finite(0.0)  # all processes wait until the first has written
            stop()
    if status == "finished" and not train_state.all_finite(train_state.rows[-1]["loss"]):
        status = "diverged"  # by the last step
    log.write_history(train_state.rows)
    finished = status == "finished"
    log.finish(status, report.final(train_state, ood, log.snapshots()) if finished else None)
    return status


def _stop_asked(train_state: TrainState, count: int) -> bool:
    """Whether all processes stop now; they agree on it, as each waits for the others in a step."""
    if train_state.runtime.world == 1:
        return stop_asked()
    if count % AGREE_EVERY:
        return False
    return not train_state.all_finite(float("inf") if stop_asked() else 0.0)


def _take_snapshot(train_state: TrainState, log: RunFolder) -> None:
    """Write the snapshot that is due now, if any; checkpoints that know of it come later."""
    if (state := train_state.snapshot()) is not None:
        log.write_snapshot(train_state.taken - 1, state)


def _groups(train_state: TrainState, total: int) -> Iterator[tuple[list[Batch], int]]:
    """Yield the minibatches of each base step, and the number of minibatches used after it.

    It spawns the members at T0. An empty group means that minibatches are dropped. The caller sets
    `train_state.done` to the second number before it asks for the next group.
    """
    late, stream = train_state.run.late_phase, train_state.task.stream
    start = total if late is None else late.start_epoch * len(stream)
    for batch in _batches(stream, train_state.done, start):
        yield [batch], train_state.done + 1
    while train_state.done < total:
        if train_state.late is None:
            train_state.spawn()
        assert train_state.late is not None
        # With "carry" a cycle may continue into the next epoch; an incomplete last one is dropped.
        this_epoch = train_state.done // len(stream) + 1
        end = total if train_state.late.leftover == "carry" else this_epoch * len(stream)
        for group in train_state.late.cycles(_batches(stream, train_state.done, end), last=True):
            yield group, train_state.done + len(group)
        if train_state.done < end:
            yield [], end


def _batches(stream: Stream, start: int, end: int) -> Iterator[Batch]:
    """Yield minibatches `start` to `end` - 1 of a run, counted over all epochs."""
    size = len(stream)
    while start < end:
        epoch, skip = divmod(start, size)
        count = min(size - skip, end - start)
        yield from itertools.islice(stream.epoch(epoch, skip), count)
        start += count
