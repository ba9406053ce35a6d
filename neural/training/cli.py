"""``nqm neural train | show | watch | results | evaluate | sweep``; only click is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neural.training.cli_options import (
    check_alone,
    data_option,
    data_workers_option,
    device_option,
    make_runtime,
    progress_bar,
    scale_option,
    set_option,
    threads_option,
)
from nqm.cli import OutFolder

if TYPE_CHECKING:
    import pandas as pd


@click.command()
@click.argument("recipe")
@scale_option
@set_option
@click.option(
    "--out",
    type=OutFolder(),
    help="Folder of the runs.  [default: out/neural/RECIPE-SCALE]",
)
@click.option(
    "--arm", "arms", multiple=True, help="Train only this arm (repeatable).  [default: all]"
)
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    help="Train with this seed instead of the recipe's (repeatable).",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; each trains one seed at a time, and takes the next GPU if there are several.  "
    "[default: for small nets on the CPU one of one thread for each processor, unless --threads is "
    "given; else 1]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run one minibatch of every arm through training and evaluation, and write nothing.",
)
@click.option(
    "--log",
    "loggers",
    multiple=True,
    metavar="NAME",
    help="Log losses, rates and metrics of each run: csv, tensorboard, wandb, or the entry point "
    "of a package (repeatable).",
)
@device_option
@data_option
@data_workers_option
@threads_option
def train(
    recipe: str,
    scale: str,
    overrides: tuple[str, ...],
    out: Path | None,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    workers: int | None,
    dry_run: bool,
    loggers: tuple[str, ...],
    device: str | None,
    root: Path | None,
    data_workers: int | None,
    threads: int | None,
) -> None:
    """Train every arm of RECIPE with every seed, and compare them.

    The command can be killed at any moment; the same command then continues where it stopped. At
    SIGTERM or SIGUSR1 it writes a checkpoint and exits with 75.

    \b
    nqm neural train digits_bn
    nqm neural train digits_bn --dry-run
    nqm neural train fashion_mnist_bn --workers 2 --threads 2 --log tensorboard
    torchrun --nproc-per-node 8 $(which nqm) neural train cifar10_bn
    """
    from dataclasses import replace

    from neural.training import experiment
    from neural.training.distributed import leave
    from neural.training.recipe import load_recipe
    from neural.training.watch import Display
    from nqm.names import folder_name
    from nqm.runs.interrupts import stops_later
    from nqm.table import read_table

    if workers is not None and workers > 1:
        check_alone("--workers")
    made = load_recipe(recipe, scale, overrides, arms=arms)
    folder = out or Path("out/neural", folder_name(f"{made.name}-{scale}", "recipe"))
    if dry_run:
        check_alone("--dry-run")
        runtime = make_runtime(device, root, threads, trains=True, data_workers=data_workers)
        for arm in experiment.dry_run(made, runtime, arms=arms):
            click.echo(f"arm {arm}: one minibatch trained and evaluated")
        return
    runtime = make_runtime(device, root, threads, trains=True, data_workers=data_workers)
    if workers is None and threads is None and (runtime.device.type, runtime.world) == ("cpu", 1):
        workers = _one_thread_each(made, len(seeds or made.seeds), root)
    runtime = replace(runtime, loggers=tuple(dict.fromkeys(loggers)))
    display = Display(
        folder,
        live=sys.stderr.isatty(),
        write=lambda text: click.echo(text, err=True, nl=False),
    )
    with stops_later():
        table = experiment.run_experiment(
            made,
            folder,
            runtime,
            arms=arms,
            seeds=seeds or None,
            workers=workers or 1,
            progress=display if runtime.rank == 0 else None,
        )
    leave()
    if runtime.rank == 0:
        display.update()
        _show(table, made.title)
        starts = {
            arm: run.late_phase.start_epoch for arm, run in made.arms.items() if run.late_phase
        }
        history, turns = folder / "history.parquet", folder / "cycles.parquet"
        _draw(table, read_table(history), folder, starts, made.title)
        if turns.exists():
            _draw_cycles(read_table(turns), folder, made.title)


def _one_thread_each(recipe: Any, seeds: int, root: Path | None) -> int | None:
    """Number of processes for small nets, with torch set to one thread; None if they are large.

    The number of threads does not depend on that of processes, nor do results then.
    """
    import os

    import torch

    from neural.training.cost import side_by_side

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = side_by_side(recipe, seeds, cores or 1, root)
    if workers is not None:
        torch.set_num_threads(1)
    return workers


@click.command()
@click.argument(
    "paths",
    metavar="RUN|OUT...",
    nargs=-1,
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--reference",
    metavar="ARM",
    help="Arm with which the others are compared.  [default: the first arm]",
)
@click.option(
    "--out",
    type=OutFolder(),
    help="Folder for comparison.png and comparison.pdf: curves over epochs, and the results.",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON document to standard output.")
def results(
    paths: tuple[Path, ...], reference: str | None, out: Path | None, as_json: bool
) -> None:
    """Compare finished trainings: the runs in the folders RUN, or all runs below OUT.

    A table of all models in percent, and for every arm in words whether it is better than the
    reference, by the differences of runs with the same seed. nqm neural train prints the same at
    its end. (nqm neural compare is about ways to combine models, not about trainings.)

    \b
    nqm neural results out/neural/digits_bn-full
    nqm neural results out/neural/digits_bn-full out/mine --reference digits_bn-full/base --json
    """
    from neural.training.cycles import cycles
    from neural.training.results import collect, find_runs, histories, starts
    from neural.training.results_table import compare
    from neural.training.run_folder import check_no_run
    from neural.training.watch import read_plan
    from nqm.errors import NQMError
    from nqm.table import to_json

    runs, incomplete = find_runs(paths)
    if incomplete:
        count = f"{incomplete} run{'s are' if incomplete > 1 else ' is'}"
        click.echo(f"{count} not complete and left out; nqm neural watch shows them", err=True)
    if not runs:
        raise NQMError("no run is complete yet")
    table = collect(runs)
    compared = compare(table, reference)  # also checks the reference
    title = read_plan(paths[0]).title if len(paths) == 1 else ""
    if as_json:
        click.echo(to_json(compared))
    else:
        _show(table, title, reference)
    if out is not None:
        check_no_run(out)
        named = ", ".join(path.resolve().name for path in paths)
        _draw(table, histories(runs), out, starts(runs), title or named)
        _draw_cycles(cycles(runs), out, title or named)


def _show(table: pd.DataFrame, title: str, reference: str | None = None) -> None:
    """Print results as a table, verdicts, and the runs that diverged."""
    from neural.training.results_table import text

    if title:
        click.echo(title)
    for line in text(table, reference=reference, style=sys.stdout.isatty()):
        click.echo(line)


def _draw(
    table: pd.DataFrame, history: pd.DataFrame, out: Path, starts: dict[str, int], title: str
) -> None:
    """Draw the comparison of arms, and print the names of its files."""
    from neural.training.plots import draw

    for path in draw(table, history, out, title, starts):
        click.echo(path, err=True)


def _draw_cycles(table: pd.DataFrame, out: Path, title: str) -> None:
    """Draw the cycles of runs with snapshots, if there are any."""
    from neural.training.plots import draw_cycles

    for path in draw_cycles(table, out, title):
        click.echo(path, err=True)


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="Print the table once, and end.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
def watch(out: Path, once: bool, every: float) -> None:
    """Show the state of all runs below the folder OUT, again and again until all are complete.

    It reads what runs write and changes nothing: it can be started and stopped at any moment, also
    on another machine that sees the folder. Without a terminal the table is printed once.

    \b
    nqm neural watch out/neural/digits_bn-full
    nqm neural watch out --once
    """
    from neural.training.watch import Watch, follow, table
    from nqm.errors import NQMError

    if not out.is_dir():
        raise NQMError(f"{out}: no such folder; give the --out of a training")
    looking = Watch(out)
    states = looking.look()
    if not states:
        raise NQMError(f"there is no run below {out}; give the --out of a training")
    if once or not sys.stdout.isatty():
        click.echo("\n".join(table(states, busy=looking.busy)))
    else:
        follow(out, every, write=lambda text: click.echo(text, nl=False))


@click.command()
@click.argument("recipe", required=False)
@scale_option
@set_option
@click.option("--all", "every", is_flag=True, help="One table of all recipes of the package.")
@click.option(
    "--share",
    type=click.FloatRange(0.0, 1.0, min_open=True),
    default=0.25,
    show_default=True,
    help="Share of an H100's peak rate that training is assumed to reach.",
)
@click.option("--names", is_flag=True, help="Print the name of every weight of every selection.")
@click.option("--csv", metavar="FILE", help="Also write the table of all recipes to a CSV file.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON document to standard output.")
@data_option
def show(
    recipe: str | None,
    scale: str,
    overrides: tuple[str, ...],
    every: bool,
    share: float,
    names: bool,
    csv: str | None,
    as_json: bool,
    root: Path | None,
) -> None:
    """Print the configuration of RECIPE and estimate its FLOPs, hours, memory and disk.

    Nothing is trained or downloaded. Without RECIPE, or with --all: one table of all recipes.

    \b
    nqm neural show digits_bn
    nqm neural show cifar10_bn --set late_phase.members=20 --json
    """
    import json

    from neural.training.recipe import load_recipe
    from neural.training.show import describe_recipe, note, overview, text
    from nqm.errors import NQMError

    if every or recipe is None:
        if recipe is not None or overrides:
            raise NQMError("--all shows the recipes as they are; leave out RECIPE and --set")
        table = overview(scale, share, root)
        if csv is not None:
            table.to_csv(csv, index=False)
        if as_json:
            rows = table.to_numpy().tolist()
            click.echo(json.dumps({"columns": list(table.columns), "rows": rows}))
        else:
            click.echo(table.to_string(index=False))
            click.echo(f"\n{note(share)}")
        return
    if csv is not None:
        raise NQMError("--csv writes the table of all recipes; leave out RECIPE")
    content = describe_recipe(load_recipe(recipe, scale, overrides), share, root)
    click.echo(json.dumps(content) if as_json else text(content, names))


@click.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--ood",
    multiple=True,
    metavar="DATA",
    help="Measure how well images of this data set are detected as out of distribution "
    "(repeatable).",
)
@click.option(
    "--corruptions",
    is_flag=True,
    help="Measure accuracy under 14 corruptions at 5 severities.",
)
@click.option("--flatness", is_flag=True, help="Measure the rise of the loss under weight noise.")
@click.option(
    "--line", is_flag=True, help="Measure the loss on the line from member 0 to the average."
)
@click.option(
    "--mc-dropout",
    type=click.IntRange(min=0),
    default=0,
    help="Measure the mean prediction over this many dropout masks; 0: do not.",
)
@click.option("--out", metavar="TABLE", help="Also write the results to a .parquet or .csv table.")
@device_option
@data_option
@data_workers_option
@threads_option
def evaluate(
    run: Path,
    ood: tuple[str, ...],
    corruptions: bool,
    flatness: bool,
    line: bool,
    mc_dropout: int,
    out: str | None,
    device: str | None,
    root: Path | None,
    data_workers: int | None,
    threads: int | None,
) -> None:
    """Measure the single model of a finished RUN, the folder of one arm and seed.

    \b
    nqm neural evaluate out/neural/digits_bn-full/late_phase/seed0 --flatness --line
    """
    from neural.training.config import EvaluateConfig
    from neural.training.load_run import evaluate_run, reopen

    check_alone("nqm neural evaluate")
    runtime = make_runtime(device, root, threads, data_workers=data_workers)
    asked = EvaluateConfig(
        ood=ood, corruptions=corruptions, flatness=flatness, line=line, mc_dropout=mc_dropout
    )
    opened = reopen(run, runtime)
    with progress_bar() as progress:
        table = evaluate_run(opened, asked, out, root, progress)
    click.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


@click.command()
@click.argument("file", metavar="FILE.toml")
@set_option
@click.option("--out", metavar="TABLE", required=True, help="The .parquet or .csv table to write.")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Train on a Dask cluster, a worker for each GPU, e.g. tcp://127.0.0.1:8786.",
)
@device_option
@data_option
@data_workers_option
@threads_option
def sweep(
    file: str,
    overrides: tuple[str, ...],
    out: str,
    scheduler: str | None,
    device: str | None,
    root: Path | None,
    data_workers: int | None,
    threads: int | None,
) -> None:
    """Train one arm of a recipe over the grid of FILE's [sweep] table: seeds, K, T0, ...

    The command can be killed at any moment; the same command then continues where it stopped.

    \b
    nqm neural sweep members.toml --out members.parquet
    nqm neural sweep members.toml --out members.parquet --scheduler tcp://127.0.0.1:8786
    """
    from contextlib import nullcontext

    from neural.training.sweep import Remote, work
    from nqm.progress import counted
    from nqm.runs.interrupts import stops_later
    from nqm.runs.sweep import Sweep

    check_alone("nqm neural sweep")
    runs = Path(f"{out}.runs")
    connection: Any = nullcontext()
    if scheduler is None:
        runtime = make_runtime(device, root, threads, trains=True, data_workers=data_workers)
        cells = Sweep.from_file(file, overrides, work(runs, runtime))
    else:
        from nqm.runs.cluster import connected

        # The workers have other working folders, and devices that this process need not have.
        root = None if root is None else root.resolve()
        remote = Remote(device, root, threads, data_workers)
        runtime = make_runtime("cpu", root, threads)
        cells = Sweep.from_file(
            Path(file).resolve(), overrides, work(runs.resolve(), runtime, remote)
        )
        connection = connected(scheduler)
    with connection as executor, progress_bar() as progress, stops_later():
        cells.write(out, executor, counted(progress, "cells", len(cells), exact=True))
    click.echo(f"{out}: {len(cells)} cells", err=True)
