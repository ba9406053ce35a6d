"""Train all runs of a recipe, and collect their results in a table.

Runs of one seed may be equal up to the epoch at which one of them spawns members, begins to average
or changes its learning rate. These epochs are trained once; the other runs start from a checkpoint.
On a CPU the results are bit for bit those of separate runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from neural.data import Data, Images
from neural.training import preflight
from neural.training.config import RunConfig, describe
from neural.training.cycles import cycles
from neural.training.gpu_scale import check_device
from neural.training.loggers import load_logger
from neural.training.recipe import Recipe, check_seeds
from neural.training.report import ood_images
from neural.training.results import Finished, collect, histories
from neural.training.run_folder import RunFolder, check_no_run
from neural.training.task import Runtime, load_data, open_task
from neural.training.train import train
from neural.training.watch import Plan, Planned, write_plan
from neural.training.workers import run_in_workers
from nqm import __version__, keys
from nqm.errors import NQMError, suggest
from nqm.files import locked
from nqm.progress import Progress, within
from nqm.table import read_metadata, write_table

#: Seconds to wait for another process that writes the folder's tables.
PATIENCE = 60.0


@dataclass(frozen=True)
class Job:
    """One run of an experiment.

    Attributes
    ----------
    arm : str
        Name of the arm.
    seed : int
        Seed of the run.
    run : RunConfig
        Configuration of the run, with its seed.
    start : (str, int), optional
        Arm and epoch of the checkpoint from which it starts.
    keep : tuple of int
        Epochs after which it writes a checkpoint for other runs.
    """

    arm: str
    seed: int
    run: RunConfig
    start: tuple[str, int] | None = None
    keep: tuple[int, ...] = ()

    def folder(self, out: Path) -> Path:
        """Folder of the run.

        Parameters
        ----------
        out : Path
            Folder of the experiment.

        Returns
        -------
        Path
            ``out/ARM/seedN``; of a branch ``out/ARM/branchI/seedN``.
        """
        return out / self.arm / f"seed{self.seed}"


def jobs(recipe: Recipe, seeds: Sequence[int] | None = None) -> list[list[Job]]:
    """List the runs of a recipe.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    seeds : sequence of int, optional
        Seeds of the runs; those of the recipe by default.

    Returns
    -------
    list of list of Job
        One list per seed; a run comes after the run from which it starts.
    """
    return [_seed_jobs(recipe, seed) for seed in (recipe.seeds if seeds is None else seeds)]


def _seed_jobs(recipe: Recipe, seed: int) -> list[Job]:
    """Runs of one seed; each starts from the run with which it has the most epochs in common."""
    made: list[Job] = []
    for arm, config in recipe.arms.items():
        run = replace(config, seed=recipe.run_seed(arm, seed))
        shared = {job.arm: _shared(job.run, run) for job in made}
        donor = max(shared, key=lambda name: shared[name], default=None)
        start = (donor, shared[donor]) if donor is not None and shared[donor] else None
        made.append(Job(arm, seed, run, start))
    wanted: dict[str, set[int]] = {}
    for job in made:
        if job.start is not None:
            wanted.setdefault(job.start[0], set()).add(job.start[1])
    return [replace(job, keep=tuple(sorted(wanted.get(job.arm, ())))) for job in made]


def _shared(first: RunConfig, second: RunConfig) -> int:
    """Number of epochs that two runs have in common."""
    without = {"late_phase": None, "average": None, "snapshots": None}
    lr = first.train.lr
    if describe(replace(first, **without)) != describe(  # type: ignore[arg-type]
        replace(second, **without, train=replace(second.train, lr=lr))  # type: ignore[arg-type]
    ):
        return 0
    epochs = min(_plain_epochs(first), _plain_epochs(second))
    if second.train.lr == lr:
        return epochs
    if first.train.lr_every != "epoch":
        return 0
    times = np.arange(epochs)
    differ = lr(times) != second.train.lr(times)
    return int(differ.argmax()) if differ.any() else epochs


def _plain_epochs(run: RunConfig) -> int:
    """Number of epochs before a run does anything but plain training."""
    sections = (run.late_phase, run.average, run.snapshots)
    starts = (section.start_epoch for section in sections if section is not None)
    return min(starts, default=run.train.epochs)


def run_experiment(
    recipe: Recipe,
    out: str | Path,
    runtime: Runtime | None = None,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train every arm with every seed; runs that are complete are not trained again.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    out : str or Path
        Folder for one folder per run, ``results.parquet``, ``history.parquet`` and, with snapshots,
        ``cycles.parquet``.
    runtime : Runtime, optional
        Device and folder of data files; one CPU by default.
    arms : sequence of str
        Names of the arms to train, or of an arm with all its branches; all by default.
    seeds : sequence of int, optional
        Seeds to train; those of the recipe by default.
    workers : int
        Number of processes. The runs of a seed are trained by one of them. The number does not
        change any result. On GPUs they take one each in turn, from that of `runtime` on.
    progress : callable, optional
        Called with the stage, "training", and the fraction of all runs that is done.

    Returns
    -------
    DataFrame
        Results of all complete runs of the recipe, those of earlier calls included. Columns arm,
        seed, status, weights, member, data, metric, value (see `neural.training.report`). A
        diverged run has one row without a value. Weights ``deep_ensemble_...`` (seed -1) are the
        mean prediction of an arm's runs.

    Raises
    ------
    NQMError
        If an arm is unknown, `out` holds other results, a run cannot be trained, `workers` is
        above 1 under ``torchrun``, or scale gpu is asked for on a CPU.
    """
    runtime, out = runtime or Runtime(), Path(out)
    if workers > 1 and runtime.world > 1:
        raise NQMError(
            f"workers must be 1 where {runtime.world} processes share a run; got {workers}"
        )
    check_device(recipe.scale, runtime.device)
    arms = [name for arm in arms for name in _named(recipe, arm)]
    for name in runtime.loggers:
        load_logger(name)
    check_no_run(out)
    target = out / "results.parquet"
    if target.exists() and read_metadata(target).get("recipe") != recipe.name:
        raise NQMError(
            f"{target} does not hold results of recipe {recipe.name}; choose another folder; "
            "nothing was overwritten"
        )
    chosen = {arm: run for arm, run in recipe.arms.items() if not arms or arm in arms}
    if seeds is not None:
        check_seeds("seed", seeds)
    groups = jobs(replace(recipe, arms=chosen), seeds)
    _rehearse(groups, out, runtime)
    if runtime.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        planned = tuple(_planned(job, out) for group in groups for job in group)
        write_plan(out, Plan(recipe.title, tuple(recipe.arms), planned))
    if workers == 1:
        for index, group in enumerate(groups):
            _run_group(group, out, runtime, within(progress, index, len(groups)))
    else:
        _run_parallel(groups, out, runtime, min(workers, len(groups)), progress)
    if runtime.rank > 0:
        return pd.DataFrame()
    with _locked_soon(out):
        return _write_tables(recipe, [*recipe.seeds, *(seeds or ())], out)


@contextmanager
def _locked_soon(out: Path) -> Iterator[None]:
    """Lock the tables, after other processes that train other runs of the folder."""
    until = time.monotonic() + PATIENCE
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(out, folder=True))
                break
            except NQMError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)
        yield


def dry_run(
    recipe: Recipe, runtime: Runtime | None = None, *, arms: Sequence[str] = ()
) -> list[str]:
    """Run one whole minibatch of every arm through training and evaluation; write nothing.

    That is a base step, a step of the members, the average, and all measurements of the end on
    a few test examples, at learning rate 0.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    runtime : Runtime, optional
        Device and folder of data files; one CPU by default.
    arms : sequence of str
        Names of the arms, as in `run_experiment`.

    Returns
    -------
    list of str
        Names of the arms that were run.

    Raises
    ------
    NQMError
        If an arm is unknown or cannot be trained.
    """
    runtime = runtime or Runtime()
    check_device(recipe.scale, runtime.device)
    chosen = [name for arm in arms for name in _named(recipe, arm)] or list(recipe.arms)
    seed = recipe.seeds[0]
    runs = {arm: replace(recipe.arms[arm], seed=recipe.run_seed(arm, seed)) for arm in chosen}
    _rehearse_arms(runs, runtime, whole=True)
    return list(runs)


def _named(recipe: Recipe, arm: str) -> list[str]:
    """An arm, or all its branches."""
    names = [name for name in recipe.arms if arm in (name, name.partition("/")[0])]
    if not names:
        known = dict.fromkeys(name.partition("/")[0] for name in recipe.arms)
        raise NQMError(f"recipe {recipe.name} has no arm {arm!r}{suggest(arm, known)}")
    return names


def _write_tables(recipe: Recipe, seeds: Sequence[int], out: Path) -> pd.DataFrame:
    """Join the results of all complete runs, those that other processes have trained included."""
    target = out / "results.parquet"
    runs = _done(recipe, [*seeds, *_trained_seeds(recipe, out)], out)
    table = collect(runs)
    key = keys.key({"recipe": dict(recipe.mapping), "scale": recipe.scale})
    metadata = {"key": key, "version": __version__, "recipe": recipe.name, "scale": recipe.scale}
    write_table(target, table, metadata)
    write_table(out / "history.parquet", histories(runs), metadata)
    if len(turns := cycles(runs)):
        write_table(out / "cycles.parquet", turns, metadata)
    return table


def _planned(job: Job, out: Path) -> Planned:
    first = 0 if job.start is None else job.start[1]
    return Planned(job.folder(out).relative_to(out).as_posix(), first, job.run.train.epochs)


def _rehearse(groups: list[list[Job]], out: Path, runtime: Runtime) -> None:
    """Check every arm that has incomplete runs, before the first of them is trained."""
    incomplete: dict[str, RunConfig] = {}
    for job in (job for group in groups for job in group):
        folder = RunFolder(job.folder(out), job.run, writes=False, world=runtime.world)
        if folder.status is None:
            folder.check_world(None)
            incomplete[job.arm] = job.run
    _rehearse_arms(incomplete, runtime)


def _rehearse_arms(arms: Mapping[str, RunConfig], runtime: Runtime, whole: bool = False) -> None:
    data: dict[tuple[str, str | None, int | None], Data] = {}
    ood: dict[str, Images] = {}
    for arm, run in arms.items():
        try:
            source = (run.data.name, run.data.path, run.data.size)
            if source not in data:
                data = {source: load_data(run.data, runtime.root)}
            task = open_task(run, runtime, data[source])
            new = [name for name in run.evaluate.ood if name not in ood]
            ood |= ood_images(task, new, runtime.root)
            preflight.check_run(run, runtime, task)
            few = {name: ood[name] for name in run.evaluate.ood}
            preflight.rehearse(run, runtime, task, few, whole=whole)
        except NQMError as error:
            raise NQMError(f"arm {arm}: {error}") from error


def _trained_seeds(recipe: Recipe, out: Path) -> list[int]:
    """Seeds of all folders of runs."""
    folders = (path for arm in recipe.arms for path in (out / arm).glob("seed*"))
    digits = (path.name.removeprefix("seed") for path in folders)
    return [int(text) for text in digits if text.isascii() and text.isdigit() and len(text) < 20]


def _done(recipe: Recipe, seeds: Sequence[int], out: Path) -> list[Finished]:
    """Runs of a recipe, of any arm and these seeds, that are complete."""
    done = []
    for group in jobs(recipe, sorted(set(seeds))):
        for job in group:
            try:
                folder = RunFolder(job.folder(out), job.run, writes=False)
            except NQMError:  # the folder holds another configuration
                continue
            if folder.status is not None:
                done.append(Finished(job.arm, job.seed, folder))
    return sorted(done, key=lambda run: list(recipe.arms).index(run.arm))


def _run_group(
    group: Sequence[Job], out: Path, runtime: Runtime, progress: Progress | None
) -> None:
    """Train all runs of one seed, in order."""
    folders = {job.arm: job.folder(out) for job in group}
    for index, job in enumerate(group):
        start = None
        if job.start is not None:
            path = folders[job.start[0]] / f"epoch{job.start[1]}.pt"
            start = path if path.exists() else None
        train(
            job.run,
            folders[job.arm],
            runtime,
            start=start,
            keep=job.keep,
            rehearsed=True,
            progress=within(progress, index, len(group)),
        )
    for job in group:
        for epoch in job.keep:
            (folders[job.arm] / f"epoch{epoch}.pt").unlink(missing_ok=True)
    if progress is not None:
        progress("training", 1.0)


def _work(
    groups: list[list[Job]],
    out: Path,
    runtime: Runtime,
    index: int,
    device: torch.device,
    progress: Progress,
) -> None:
    _run_group(groups[index], out, replace(runtime, device=device), progress)


def _run_parallel(
    groups: list[list[Job]], out: Path, runtime: Runtime, workers: int, progress: Progress | None
) -> None:
    if runtime.workers:  # those that decode images are shared out as well
        runtime = replace(runtime, workers=max(1, runtime.workers // workers))
    work = partial(_work, groups, out, runtime)
    run_in_workers(work, len(groups), workers, runtime.device, "training", progress)
