"""``nqm neural list | train | evaluate | export | sweep | bridge``; only click loads at the top."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        from nqm.errors import NQMError

        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise NQMError("this needs PyTorch: pip install 'late-phase-nqm[neural]'") from None
        except RuntimeError as error:  # torch's own, also of a GPU
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
                raise
            reason = str(error).partition("\n")[0]
            raise NQMError(
                f"out of memory ({reason:.150}); lower data.batch_size or evaluate.batch_size, "
                "raise train.micro_batches, or run fewer --workers"
            ) from None


@click.group(cls=_Group)
def neural() -> None:
    """Late-phase weights in PyTorch: train, evaluate and export real networks."""


_device = click.option("--device", help="cpu, cuda or cuda:1; the GPU by default, if there is one.")
_data = click.option(
    "--data",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of data files; the variable NQM_DATA by default.",
)
_set = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an entry of the recipe, e.g. --set late_phase.members=5 (repeatable).",
)
_scale = click.option(
    "--scale",
    default="full",
    show_default=True,
    help="full: the recipe itself; cpu: tens of minutes without a GPU; smoke: under a minute.",
)
_threads = click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of torch; all processors by default."
)


@neural.command("list")
def list_() -> None:
    """Show recipes, models, data sets and selections."""
    from neural.data import DATASETS
    from neural.late_phase.select import TERMS
    from neural.models import MODELS
    from neural.training.recipe import load_recipe, recipe_names

    click.echo("recipe:")
    for name in recipe_names():
        recipe = load_recipe(name)
        click.echo(f"  {name}\n      {recipe.title}; arms {', '.join(recipe.arms)}")
    models = {name: family.description for name, family in MODELS.items()}
    for title, entries in (("model", models), ("data", DATASETS), ("select", TERMS)):
        click.echo(f"{title}:")
        for name, text in entries.items():
            click.echo(f"  {name}\n      {text}")


@neural.command()
@click.argument("recipe")
@_scale
@_set
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the runs.")
@click.option("--arm", "arms", multiple=True, help="Only this arm (repeatable).")
@click.option("--seed", "seeds", type=int, multiple=True, help="Only this seed (repeatable).")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Seeds at once, each in a process of its own.",
)
@click.option(
    "--tensorboard", is_flag=True, help="Note curves for TensorBoard in each run's folder."
)
@_device
@_data
@_threads
def train(
    recipe: str,
    scale: str,
    overrides: tuple[str, ...],
    out: Path | None,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    workers: int,
    tensorboard: bool,
    device: str | None,
    root: Path | None,
    threads: int | None,
) -> None:
    """Train every arm of RECIPE with every seed, and compare them.

    It can be killed at any moment: run again, it goes on where it was stopped.

    \b
    nqm neural train digits_bn
    nqm neural train fashion_mnist_bn --workers 2 --threads 2
    torchrun --nproc-per-node 8 $(which nqm) neural train cifar10_bn
    """
    from dataclasses import replace

    from neural.training.experiment import run_experiment
    from neural.training.recipe import load_recipe
    from nqm.names import folder_name

    if workers > 1:
        _alone("--workers")
    made = load_recipe(recipe, scale, overrides)
    folder = out or Path("out/neural", folder_name(f"{made.name}-{scale}", "recipe"))
    runtime = replace(_runtime(device, root, threads), tensorboard=tensorboard)
    with _progress(hidden=runtime.rank > 0) as told:
        table = run_experiment(
            made, folder, runtime, arms=arms, seeds=seeds or None, workers=workers, progress=told
        )
    if runtime.rank == 0:
        _show(table, made.title, folder)


@neural.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--ood", multiple=True, metavar="DATA", help="Set of images to detect (repeatable).")
@click.option("--corruptions", is_flag=True, help="Accuracy under 14 corruptions, 5 severities.")
@click.option("--flatness", is_flag=True, help="Rise of the loss under weight noise.")
@click.option("--line", is_flag=True, help="Loss on the line from member 0 to the average.")
@click.option("--mc-dropout", type=click.IntRange(min=0), default=0, help="Samples.")
@click.option("--out", metavar="TABLE", help="Write a .parquet or .csv table.")
@_device
@_data
@_threads
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
    threads: int | None,
) -> None:
    """Measure the single model of a finished RUN, the folder of one arm and seed.

    \b
    nqm neural evaluate out/neural/digits_bn-full/late_phase/seed0 --flatness --line
    """
    from neural.training.config import EvaluateConfig
    from neural.training.load_run import evaluate_run, reopen

    _alone("nqm neural evaluate")
    runtime = _runtime(device, root, threads)
    asked = EvaluateConfig(
        ood=ood, corruptions=corruptions, flatness=flatness, line=line, mc_dropout=mc_dropout
    )
    table = evaluate_run(reopen(run, runtime), asked, out, root)
    click.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


@neural.command()
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", required=True, metavar="FILE.safetensors")
@click.option("--member", type=int, help="One member instead of the single model.")
def export(run: Path, out: str, member: int | None) -> None:
    """Write the single model of a finished RUN as safetensors, under its architecture's names.

    \b
    nqm neural export out/neural/digits_bn-full/late_phase/seed0 --out digits.safetensors
    """
    from neural.training.load_run import export as write

    _alone("nqm neural export")
    click.echo(write(run, out, member))


@neural.command()
@click.argument("file", metavar="FILE.toml")
@_set
@click.option("--out", metavar="TABLE", required=True, help="The .parquet or .csv table to write.")
@_device
@_data
@_threads
def sweep(
    file: str,
    overrides: tuple[str, ...],
    out: str,
    device: str | None,
    root: Path | None,
    threads: int | None,
) -> None:
    """Train one arm of a recipe over the grid of FILE's [sweep] table: seeds, K, T0, anything.

    It can be killed at any moment: run again, it goes on where it was stopped.

    \b
    nqm neural sweep members.toml --out members.parquet
    """
    from neural.training.sweep import work
    from nqm.runs.sweep import Sweep

    _alone("nqm neural sweep")
    runtime = _runtime(device, root, threads)
    cells = Sweep.from_file(file, overrides, work(Path(f"{out}.runs"), runtime))
    done = 0
    with _progress(hidden=False) as told:

        def count(more: int) -> None:
            nonlocal done
            done += more
            told(done / len(cells))

        cells.write(out, progress=count)
    click.echo(f"{out}: {len(cells)} cells", err=True)


@neural.command()
@click.argument("target", metavar="RUN|RECIPE")
@_scale
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with tables [bridge] (what is measured and trained) and [plan] (averages).",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a setting, e.g. --set bridge.steps=500 or --set plan.runs=64; other keys are the "
    "recipe's (repeatable).",
)  # fmt: skip
@click.option("--select", help="Weights that are measured, e.g. batchnorm+head; all by default.")
@click.option("--examples", type=int, help="Training examples; 0: all.  [default: 2000]")
@click.option("--members", type=int, multiple=True, help="K (repeatable); 1 to 16 by default.")
@click.option("--predict-only", is_flag=True, help="Train nothing.")
@click.option("--seed", type=int, help="Of all random draws.  [default: 0]")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of results.")
@_device
@_data
@_threads
def bridge(
    target: str,
    scale: str,
    config: Path | None,
    overrides: tuple[str, ...],
    select: str | None,
    examples: int | None,
    members: tuple[int, ...],
    predict_only: bool,
    seed: int | None,
    out: Path | None,
    device: str | None,
    root: Path | None,
    threads: int | None,
) -> None:
    """Predict from curvature and noise what K and the learning rate do to a network, and train.

    RUN is the folder of a finished run, RECIPE one with model.checkpoint. Nothing is fitted to
    the training runs that the prediction is compared with. It can be killed at any moment: run
    again, it goes on where it was stopped. The settings of [bridge] and [plan] are listed under
    "bridge" in the documentation.

    \b
    nqm neural bridge out/neural/digits_bn-full/base/seed0 --select batchnorm+head
    nqm neural bridge RUN --set bridge.lr_times_sharpness=[0.1,0.3] --set plan.runs=64
    """
    from neural.bridge.pipeline import load_config, open_target, run_bridge, split_overrides
    from neural.bridge.plots import draw_bridge
    from nqm.files import locked
    from nqm.names import folder_name

    _alone("nqm neural bridge")
    own, others = split_overrides(overrides)
    asked = {
        "bridge.select": select, "bridge.examples": examples, "plan.seed": seed,
        "plan.members": list(members) or None, "bridge.train": False if predict_only else None,
    }  # fmt: skip
    own += [f"{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]
    settings, plan = load_config(config, own)
    runtime = _runtime(device, root, threads)
    # Of "..", "/" and the like nothing is left that could lead out of out/bridge.
    name = folder_name("-".join(Path(target).parts[-3:]).removesuffix(".toml"), "here")
    out = out or Path("out", "bridge", name)
    opened = open_target(target, runtime, scale, others)
    click.get_current_context().with_resource(locked(out, folder=True))
    with _stages() as report:
        found = run_bridge(opened, settings, plan, runtime, out, report=report)
    columns = ["lr", "batch_size", "members", "weights"]
    columns += ["predicted", "measured", "error", "ratio"]
    shown = found.table[columns].to_string(index=False, float_format=lambda value: f"{value:.4g}")
    click.echo(shown)
    for line in found.words:
        click.echo(f"- {line}")
    title = f"{name}, {settings.select}"
    for path in draw_bridge(found.table, found.course, found.spectrum, out, title):
        click.echo(path)


@contextmanager
def _stages() -> Iterator[Callable[[str, float], None]]:
    """A bar for each stage, one after the other; a line for each where there is no terminal."""
    from datetime import datetime

    from tqdm import tqdm

    form = "{desc}: {percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    bar: Any = None

    def told(stage: str, share: float) -> None:
        nonlocal bar
        if bar is None or bar.desc != stage:
            if bar is not None:
                bar.close()
            hidden = not sys.stderr.isatty()
            if hidden:
                click.echo(f"{datetime.now():%H:%M:%S} {stage}", err=True)
            bar = tqdm(total=1.0, desc=stage, bar_format=form, delay=2, disable=hidden)
            bar.desc = stage
        bar.update(share - bar.n)

    try:
        yield told
    finally:
        if bar is not None:
            bar.close()


def _alone(what: str) -> None:
    """Refuse to be one of several processes of ``torchrun``; the first alone says it."""
    import os

    from nqm.errors import NQMError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(2)
        raise NQMError(
            f"{what} is for one process, and torchrun has started {os.environ['WORLD_SIZE']}; "
            "torchrun is for nqm neural train without --workers"
        )


def _runtime(device: str | None, root: Path | None, threads: int | None) -> Any:
    import torch

    from neural.training import distributed
    from neural.training._malloc import keep_freed_memory
    from neural.training.task import Runtime
    from nqm.errors import NQMError

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    rank, world = distributed.join()
    cuda = torch.cuda.is_available()
    name = device or (f"cuda:{distributed.local_rank()}" if cuda else "cpu")
    try:
        chosen = torch.device(name)
        # What holds no numbers, as "meta" does, cannot train.
        float(torch.ones(1, device=chosen).double().sum().item())
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise NQMError(f"device {name!r} cannot be used: {reason:.100}; use cpu or cuda") from None
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return Runtime(chosen, root, rank, world)


def _show(table: Any, title: str, folder: Path) -> None:
    """Summary over seeds, and where the rest is."""
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


@contextmanager
def _progress(*, hidden: bool) -> Iterator[Callable[[float], None]]:
    from tqdm import tqdm

    hidden = hidden or not sys.stderr.isatty()
    form = "{percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, bar_format=form, delay=2, disable=hidden, file=sys.stderr) as bar:

        def told(share: float) -> None:
            bar.update(share - bar.n)

        yield told
