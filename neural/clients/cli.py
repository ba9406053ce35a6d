"""``nqm neural clients``; only click loads at the top."""

from __future__ import annotations

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
@click.argument("recipe")
@scale_option
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with the tables [clients] and, for scope alignment, [scope].",
)  # fmt: skip
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a setting of the rounds or of the recipe, e.g. --set clients.rounds=20, "
    "--set train.lr=0.05 (repeatable).",
)  # fmt: skip
@click.option("--arm", help="Arm of the recipe.  [default: the first]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and shards.")
@click.option(
    "--out", type=OutFolder(),
    help="Folder of the results.  [default: out/clients/RECIPE-SCALE/seedN]",
)  # fmt: skip
@device_option
@data_option
@threads_option
def clients(
    recipe: str,
    scale: str,
    config: Path | None,
    overrides: tuple[str, ...],
    arm: str | None,
    seed: int,
    out: Path | None,
    device: str | None,
    root: Path | None,
    threads: int | None,
) -> None:
    """Train RECIPE's model by federated rounds: FedAvg, FedProx, SCAFFOLD, FedExP.

    Data, model and SGD are those of one arm of the recipe; its images are divided among clients.
    The command can be killed at any moment; the same command then continues with the round where
    it stopped.

    \b
    nqm neural clients digits_bn --set clients.rounds=20 --set clients.prox=0.1 --out out/prox
    """
    from dataclasses import replace

    from neural.clients.config import load_config, own_overrides
    from neural.clients.experiment import draw, run_clients, words
    from neural.training.recipe import load_recipe
    from nqm.errors import NQMError, suggest
    from nqm.names import folder_name

    check_alone("nqm neural clients")
    own, others = own_overrides(overrides)
    rounds, scope = load_config(config, own)
    made = load_recipe(recipe, scale, others, arms=() if arm is None else (arm,))
    name = arm if arm is not None else next(iter(made.arms))
    if name not in made.arms:
        raise NQMError(f"recipe {made.name} has no arm {name!r}{suggest(name, made.arms)}")
    run = replace(made.arms[name], seed=seed)
    folder = out or Path(
        "out/clients", folder_name(f"{made.name}-{scale}", "recipe"), f"seed{seed}"
    )
    runtime = make_runtime(device, root, threads, trains=True)
    with progress_bar() as progress:
        table = run_clients(run, rounds, folder, scope=scope, runtime=runtime, progress=progress)
    for line in words(table, rounds):
        click.echo(line)
    for path in draw(table, folder, f"{made.title}: {rounds.count} clients"):
        click.echo(path)
