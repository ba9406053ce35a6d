"""``nqm neural modules``; only click loads at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """Combine modules of several domains for a domain that none of them has seen.

    Each domain is left out in turn. CONFIG is a TOML file with the table [modules]. With task =
    "opinions" there sentences are classified, with "language" bytes are predicted, with
    "corruptions" images are classified. The command can be killed at any moment; the same command
    then continues.

    \b
    nqm neural modules --set modules.splits=5 --out out/modules
    nqm neural modules --set modules.task=language --out out/language
    nqm neural modules --set modules.task=corruptions --out out/corruptions
    """
    from neural.combine.config import load_section
    from neural.modules.corruptions import CorruptionsConfig, run_corruption_modules
    from neural.modules.experiment import ModulesConfig, run_modules
    from neural.modules.language import LanguageConfig, run_language_modules
    from nqm.errors import check_word
    from nqm.runs import toml

    tasks: dict[str, tuple[Any, Any]] = {
        "opinions": (ModulesConfig, run_modules),
        "language": (LanguageConfig, run_language_modules),
        "corruptions": (CorruptionsConfig, run_corruption_modules),
    }
    check_alone("nqm neural modules")
    mapping = {} if config is None else toml.load(config)
    toml.override(mapping, overrides)
    task = toml.table_at("modules", mapping.get("modules", {})).get("task", "opinions")
    check_word("modules.task", task, tuple(tasks))
    kind, run = tasks[task]
    settings = load_section(kind, "modules", config, overrides)
    make_runtime("cpu", root, threads)
    with progress_bar() as told:
        means, lines = run(settings, out, root=root, progress=told)
    click.echo(means.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
    for line in lines:
        click.echo(line)
