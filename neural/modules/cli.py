"""``nqm neural modules``; only click loads at the top."""

from __future__ import annotations

from pathlib import Path

import click

from neural.training.cli_options import (
    check_alone,
    data_option,
    make_runtime,
    progress_bar,
    threads_option,
)
from nqm.cli import OutFolder


@click.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Change a setting, e.g. --set modules.splits=2 (repeatable).",
)  # fmt: skip
@click.option(
    "--out", type=OutFolder(), default=Path("out/modules"),
    show_default=True, help="Folder of the results.",
)  # fmt: skip
@data_option
@threads_option
def modules(
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path,
    root: Path | None,
    threads: int | None,
) -> None:
    """Combine modules of text domains for a domain that none of them has seen.

    Each domain of rated sentences is left out in turn. CONFIG is a TOML file with the table
    [modules]. The command can be killed at any moment; the same command then continues.

    \b
    nqm neural modules --set modules.splits=5 --out out/modules
    """
    from neural.combine.config import load_section
    from neural.modules.experiment import ModulesConfig, run_modules

    check_alone("nqm neural modules")
    settings = load_section(ModulesConfig, "modules", config, overrides)
    make_runtime("cpu", root, threads)
    with progress_bar() as progress:
        means, files = run_modules(settings, out, root=root, progress=progress)
    click.echo(means.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
    for path in files:
        click.echo(path)
