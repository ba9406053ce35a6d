"""``nqm neural``: its group and ``list``; the other commands are where what they run is.

Only click loads at the top, and a command's file only when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

#: Command -> the module that has it, under the same name.
COMMANDS = {
    "train": "neural.training.cli",
    "watch": "neural.training.cli",
    "results": "neural.training.cli",
    "show": "neural.training.cli",
    "evaluate": "neural.training.cli",
    "sweep": "neural.training.cli",
    "bridge": "neural.bridge.cli",
    "advise": "neural.bridge.cli",
    "members": "neural.combine.cli",
    "merge": "neural.combine.cli",
    "ensemble": "neural.combine.cli",
    "export": "neural.combine.cli",
    "compare": "neural.combine.cli",
    "ranking": "neural.combine.cli",
    "low-precision": "neural.combine.cli",
    "curve": "neural.combine.cli",
    "plane": "neural.combine.cli",
    "gates": "neural.combine.cli",
    "clients": "neural.clients.cli",
    "modules": "neural.modules.cli",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        command: click.Command = getattr(
            import_module(COMMANDS[cmd_name]), cmd_name.replace("-", "_")
        )
        return command

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


@neural.command("list")
def list_() -> None:
    """Show recipes, models, data sets and selections."""
    from neural.data import DATASETS
    from neural.data.own import OWN
    from neural.late_phase.select import TERMS
    from neural.models import MODELS, OTHERS
    from neural.training.recipe import load_recipe, recipe_names

    click.echo("recipe:")
    for name in recipe_names():
        recipe = load_recipe(name)
        arms = dict.fromkeys(arm.partition("/")[0] for arm in recipe.arms)
        click.echo(f"  {name}\n      {recipe.title}; arms {', '.join(arms)}")
    models = {name: family.description for name, family in MODELS.items()}
    models |= OTHERS
    sets = DATASETS | {name: text for name, (text, _) in OWN.items()}
    for title, entries in (("model", models), ("data", sets), ("select", TERMS)):
        click.echo(f"{title}:")
        for name, text in entries.items():
            click.echo(f"  {name}\n      {text}")
