"""``nqm neural bridge``; only click loads at the top."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from neural.training.cli_options import (
    check_alone,
    data_option,
    device_option,
    make_runtime,
    progress_bar,
    scale_option,
    threads_option,
)
from nqm.cli import OutFolder


@click.command()
@click.argument("target", metavar="RUN|RECIPE")
@scale_option
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with tables [bridge] (what is measured and trained) and [plan] (averages).",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting, e.g. --set bridge.steps=500 or --set plan.runs=64; keys of other "
    "tables change the recipe (repeatable).",
)
@click.option(
    "--select", help="Weights that the loss depends on, e.g. batchnorm+head.  [default: all]"
)
@click.option(
    "--examples", type=int, help="Training examples in the measured loss; 0: all.  [default: 2000]"
)
@click.option(
    "--members",
    type=int,
    multiple=True,
    help="K, number of runs whose weights are averaged (repeatable).  [default: 1 to 16]",
)
@click.option("--predict-only", is_flag=True, help="Predict losses, but train nothing.")
@click.option("--seed", type=int, help="Seed of all random draws.  [default: 0]")
@click.option(
    "--out",
    type=OutFolder(),
    help="Folder for results.  [default: out/bridge/NAME]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; each does one training at a time, and takes the next GPU if there are "
    "several.  [default: for small nets on the CPU one of one thread for each processor, unless "
    "--threads is given; else 1]",
)
@device_option
@data_option
@threads_option
@click.option(
    "--memory",
    type=float,
    metavar="GIB",
    help="Memory of each process for derivatives, matrices and runs; what does not fit is computed "
    "in smaller parts or refused.  [default: half of the machine's]",
)
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
    workers: int | None,
    device: str | None,
    root: Path | None,
    threads: int | None,
    memory: float | None,
) -> None:
    """Predict losses for K and the learning rate from curvature and noise, and compare by training.

    RUN is the folder of a finished run, RECIPE a recipe with model.checkpoint. Nothing is
    fitted to the training runs that the prediction is compared with. The command can be killed at
    any moment; the same command then continues where it stopped. The settings of [bridge] and
    [plan] are listed under "bridge" in the documentation.

    \b
    nqm neural bridge out/neural/digits_bn-full/base/seed0 --select batchnorm+head
    nqm neural bridge RUN --set bridge.lr_times_sharpness=[0.1,0.3] --set plan.runs=64
    """
    import torch
    from threadpoolctl import threadpool_limits

    from neural.bridge.pipeline import load_config, open_target, run_bridge, split_overrides
    from neural.bridge.plots import draw_bridge
    from neural.bridge.verdict import along_slope, in_range
    from neural.bridge.workers import side_by_side
    from neural.training.run_folder import check_no_run
    from nqm.files import locked
    from nqm.limits import memory_budget
    from nqm.names import folder_name

    check_alone("nqm neural bridge")
    own, others = split_overrides(overrides)
    asked = {
        "bridge.select": select,
        "bridge.examples": examples,
        "plan.seed": seed,
        "plan.members": list(members) or None,
        "bridge.train": False if predict_only else None,
    }
    own += [f"{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]
    settings, plan = load_config(config, own)
    runtime = make_runtime(device, root, threads)
    # `folder_name` removes "..", "/" and the like, which could lead out of out/bridge.
    name = folder_name("-".join(Path(target).parts[-3:]).removesuffix(".toml"), "here")
    out = out or Path("out", "bridge", name)
    check_no_run(out)
    context = click.get_current_context()
    context.with_resource(memory_budget(memory))
    opened = open_target(target, runtime, scale, others)
    context.with_resource(locked(out, folder=True))
    if threads is None and runtime.device.type == "cpu":
        fitting = side_by_side(opened.model, opened.task, settings, plan)
        if fitting is not None:  # whatever their number: results are then the same
            torch.set_num_threads(1)
            context.with_resource(threadpool_limits(1, user_api="blas"))
        workers = workers or fitting
    with progress_bar() as progress:
        results = run_bridge(
            opened, settings, plan, runtime, out, workers=workers or 1, progress=progress
        )
    columns = ["lr", "batch_size", "members", "weights"]
    columns += ["predicted", "measured", "error", "ratio"]
    counts = in_range(results.table) & ~along_slope(results.table)
    table = results.table[columns].assign(ratio=results.table["ratio"].where(counts))
    click.echo("Change of the training loss from the checkpoint; ratio: measured over predicted")
    click.echo("rise by noise, - where that is beyond the range of the theory or not known:")
    text = table.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}")
    click.echo(text)
    for line in results.words:
        click.echo(f"- {line}")
    title = f"{name}, {settings.select}"
    for path in draw_bridge(results.table, results.course, results.spectrum, out, title):
        click.echo(path)


@click.command()
@click.argument("target", metavar="RUN|RECIPE|BRIDGE")
@click.option("--members", type=int, help="Largest K that you would pay for.  [default: 16]")
@click.option(
    "--worth",
    type=float,
    default=0.01,
    show_default=True,
    help="Least saving of one more member, relative to what noise costs a single run.",
)
@click.option("--steps", type=int, help="Steps of the training to come.  [default: 1000]")
@click.option("--epochs", type=float, help="The same in passes over the run's training data.")
@click.option("--batch-size", type=int, help="Examples of a minibatch, B.  [default: 32]")
@click.option("--select", help="Weights that will be trained, e.g. batchnorm+head.  [default: all]")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the measurement, e.g. --set bridge.examples=500 (repeatable).",
)
@click.option(
    "--probe-runs",
    type=int,
    help="Short runs at a rate, an eighth of the steps; 0: predict only.  [default: 4]",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON document to standard output.")
@device_option
@data_option
@threads_option
def advise(
    target: str,
    members: int | None,
    worth: float,
    steps: int | None,
    epochs: float | None,
    batch_size: int | None,
    select: str | None,
    overrides: tuple[str, ...],
    probe_runs: int | None,
    as_json: bool,
    device: str | None,
    root: Path | None,
    threads: int | None,
) -> None:
    """Advise on learning rate, average and K for a training from a network's weights.

    RUN is the folder of a finished run, RECIPE a recipe with model.checkpoint: a few short runs (an
    eighth of the steps) show at which rates the network stays near its minimum, and what noise
    adds; noise-free descent is followed to half of the end. What this costs is told before it
    starts. BRIDGE is a folder that nqm neural bridge has written: nothing is measured, and trained
    cells that contradict their prediction do not count.

    \b
    nqm neural advise out/neural/digits_mlp-full/base/seed0 --epochs 40 --members 8
    nqm neural advise out/bridge/digits_mlp-full-base-seed0
    """
    from neural.bridge.advise import advise as advice
    from neural.bridge.advise import check_asked, read_bridge
    from neural.bridge.pipeline import (
        load_config,
        measured_risk,
        open_target,
        split_overrides,
        steps_of,
    )
    from neural.bridge.quick import (
        PROBE_RUNS,
        SETTINGS,
        check_probe,
        cost_in_runs,
        measure_for_advice,
    )
    from neural.curvature.cache import Cache
    from nqm.errors import NQMError, check_number

    if epochs is not None:
        check_number("epochs", epochs, low=0.0, closed_low=False)
        if steps is not None:
            raise NQMError(
                f"steps = {steps} and epochs = {epochs:g} say the same; give one of them"
            )
    asked = {
        "bridge.steps": steps,
        "bridge.batch_sizes": None if batch_size is None else [batch_size],
        "bridge.select": select,
    }
    own = [f"{name}={json.dumps(value)}" for name, value in asked.items() if value is not None]
    check_asked(members, worth)
    check_probe(probe_runs or 0)
    if Path(target).is_dir() and not Path(target, "run.json").is_file():
        length = [] if epochs is None else ["bridge.steps"]
        length += [] if probe_runs is None else ["probe_runs"]
        if given := [*own, *length, *overrides]:
            raise NQMError(
                f"{given[0].partition('=')[0]} cannot be changed: {target} is no run, and a bridge "
                "is measured already; give its run"
            )
        table = read_bridge(Path(target))
    else:
        check_alone("nqm neural advise")
        more, others = split_overrides(overrides)
        settings, plan = load_config(None, [*SETTINGS, *own, *more])
        if probe_runs is None:
            probe_runs = PROBE_RUNS if settings.optimizer == "sgd" else 0
        check_probe(probe_runs, settings)
        runtime = make_runtime(device, root, threads)
        opened = open_target(target, runtime, overrides=others)
        if epochs is not None:
            settings = replace(settings, steps=steps_of(opened, epochs, settings.batch_sizes[0]))
        with progress_bar() as progress:
            risk = measured_risk(opened, settings, plan, runtime, Cache(), progress)
            if probe_runs:
                usual, most = cost_in_runs(risk.examples, settings, probe_runs)
                click.echo(
                    f"This costs about as much as {usual:.2g} runs of the training itself, and "
                    f"{most:.2g} at most.",
                    err=True,
                )
                if usual > (runs := members or max(plan.members)):
                    click.echo(
                        f"That is more than the {runs} runs that may be averaged; --set "
                        "bridge.examples=N takes fewer examples and costs less.",
                        err=True,
                    )
            table = measure_for_advice(risk, settings, plan, progress, probe_runs)
    found = advice(table, members, worth)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for line in found.words:
        click.echo(f"- {line}")
