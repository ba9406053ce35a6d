"""``nqm neural train | watch | evaluate | sweep``; only click loads at the top."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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


@click.command()
@click.argument("recipe")
@scale_option
@set_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
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
    default=1,
    show_default=True,
    help="Processes; each trains one seed at a time, and takes the next GPU if there are several.",
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
    workers: int,
    loggers: tuple[str, ...],
    device: str | None,
    root: Path | None,
    data_workers: int | None,
    threads: int | None,
) -> None:
    """Train every arm of RECIPE with every seed, and compare them.

    The command can be killed at any moment; the same command then continues where it stopped.

    \b
    nqm neural train digits_bn
    nqm neural train fashion_mnist_bn --workers 2 --threads 2 --log tensorboard
    torchrun --nproc-per-node 8 $(which nqm) neural train cifar10_bn
    """
    from dataclasses import replace

    from neural.training.distributed import leave
    from neural.training.experiment import run_experiment
    from neural.training.recipe import load_recipe
    from neural.training.watch import Display
    from nqm.names import folder_name

    if workers > 1:
        check_alone("--workers")
    made = load_recipe(recipe, scale, overrides)
    folder = out or Path("out/neural", folder_name(f"{made.name}-{scale}", "recipe"))
    runtime = make_runtime(device, root, threads, trains=True, data_workers=data_workers)
    runtime = replace(runtime, loggers=tuple(dict.fromkeys(loggers)))
    display = Display(
        folder,
        live=sys.stderr.isatty(),
        write=lambda text: click.echo(text, err=True, nl=False),
    )
    table = run_experiment(
        made,
        folder,
        runtime,
        arms=arms,
        seeds=seeds or None,
        workers=workers,
        progress=display if runtime.rank == 0 else None,
    )
    leave()
    if runtime.rank == 0:
        display.update()
        _show(table, made.title, folder)


def _show(table: Any, title: str, folder: Path) -> None:
    """Print a summary over seeds, the runs that diverged, and the names of the figures."""
    from neural.training.plots import draw
    from neural.training.summary import summarise
    from nqm.table import read_table

    click.echo(title)
    metrics = [
        name for name in ("accuracy", "nll", "ece", "bpc") if (table["metric"] == name).any()
    ]
    for metric in metrics:
        click.echo(f"\n{metric}")
        summary = summarise(table, metric)
        shown = summary.to_string(index=False, float_format=lambda value: f"{value:.4f}", na_rep="")
        click.echo(shown)
    for arm, seed in table.loc[table["status"] == "diverged", ["arm", "seed"]].to_numpy():
        click.echo(f"diverged: {arm}, seed {seed}")
    for path in draw(table, read_table(folder / "history.parquet"), folder, title):
        click.echo(path)


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
@device_option
@data_option
@data_workers_option
@threads_option
def sweep(
    file: str,
    overrides: tuple[str, ...],
    out: str,
    device: str | None,
    root: Path | None,
    data_workers: int | None,
    threads: int | None,
) -> None:
    """Train one arm of a recipe over the grid of FILE's [sweep] table: seeds, K, T0, ...

    The command can be killed at any moment; the same command then continues where it stopped.

    \b
    nqm neural sweep members.toml --out members.parquet
    """
    from neural.training.sweep import work
    from nqm.progress import counted
    from nqm.runs.sweep import Sweep

    check_alone("nqm neural sweep")
    runtime = make_runtime(device, root, threads, trains=True, data_workers=data_workers)
    cells = Sweep.from_file(file, overrides, work(Path(f"{out}.runs"), runtime))
    with progress_bar() as progress:
        cells.write(out, progress=counted(progress, "cells", len(cells), exact=True))
    click.echo(f"{out}: {len(cells)} cells", err=True)
