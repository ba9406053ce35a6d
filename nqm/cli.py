"""The command line: ``nqm list | run | sweep | steady | tune``, and commands of other files.

This module imports only click at the top, so that ``nqm --help`` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import pandas as pd

    from nqm.runs.config import Run
    from nqm.table import Stamp


#: Commands in a module of their own, which is read when they are asked for.
ELSEWHERE = {
    **dict.fromkeys(
        ("bound", "critical-batch", "edge", "fit", "optimize", "soup", "time-to-target", "versus"),
        "nqm.commands",
    ),
    "explore": "nqm.explorer.cli",
}
#: Largest number of characters of a message.
LONGEST = 2000


class _Failure(click.ClickException):
    """A user's mistake: one line, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        line = " ".join(self.format_message().split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
        # Names and values may contain control characters of the terminal.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        click.echo(f"error: {line}", file=file, err=True)


class OutFolder(click.Path):
    """A folder for results, as an option's type; the root of the file system is none."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the value of an option.

        Parameters
        ----------
        value, param, ctx
            See `click.ParamType.convert`.

        Returns
        -------
        Path

        Raises
        ------
        UsageError
            If it is a file or the root of a file system.
        """
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        whole = path.resolve()
        if whole == whole.parent:
            self.fail(
                f"{path} is the root of the file system; name a folder for results", param, ctx
            )
        return path


class _Unavailable(click.Command):
    """Replacement of a plug-in that cannot be loaded; a call of it reports the reason."""

    def __init__(self, name: str, reason: str):
        self.reason = " ".join(reason.split())
        super().__init__(name, short_help=f"(unavailable: {self.reason})")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        raise _Failure(f"nqm {self.name} is unavailable: {self.reason}")


class _Commands(click.Group):
    """Commands of this file, and those of the entry-point group ``nqm.commands``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        own = [*self.commands, *ELSEWHERE]
        return [*own, *sorted(_plugins().keys() - set(own))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in ELSEWHERE:
            from importlib import import_module

            found = getattr(import_module(ELSEWHERE[cmd_name]), cmd_name.replace("-", "_"))
            return cast(click.Command, found)
        if cmd_name in self.commands or cmd_name not in (plugins := _plugins()):
            return super().get_command(ctx, cmd_name)
        try:
            command = plugins[cmd_name].load()
        except Exception as error:  # the other commands must work in any case
            return _Unavailable(cmd_name, f"{type(error).__name__}: {error}")
        return command if isinstance(command, click.Command) else None

    def invoke(self, ctx: click.Context) -> Any:
        import warnings

        from nqm.errors import NQMError, NQMWarning
        from nqm.runs.interrupts import Interrupted, end_at_once, interruptible

        def show(message: Warning | str, kind: type[Warning], *where: Any) -> None:
            if issubclass(kind, DeprecationWarning):  # for those who write code, not for its users
                return
            name = "" if issubclass(kind, NQMWarning) else f"{kind.__name__}: "
            click.echo(f"warning: {name}{message}", err=True)

        try:
            with interruptible(), warnings.catch_warnings():
                warnings.showwarning = cast(Any, show)
                return super().invoke(ctx)
        except NQMError as error:
            raise _Failure(str(error)) from None
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "nqm"
            raise _Failure(f"{error.format_message()} See {path} --help.") from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has closed the pipe; click ends quietly
                raise
            raise _Failure(f"cannot write the output: {error.strerror or error}") from None
        except (MemoryError, RecursionError, OverflowError) as error:
            # Sizes are checked before memory is requested; this catches a missing check.
            if os.environ.get("NQM_TRACEBACK"):
                raise
            raise _Failure(
                f"this is more than the machine can do ({type(error).__name__}: {error!s:.100}); "
                "ask for smaller numbers; NQM_TRACEBACK=1 shows where it happened"
            ) from None
        except KeyboardInterrupt as error:
            if isinstance(error, Interrupted):
                end_at_once()
            click.echo(str(error) or "interrupted", err=True)
            raise click.exceptions.Exit(getattr(error, "code", 130)) from None


def _plugins() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="nqm.commands")}


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group("nqm", cls=_Commands, context_settings=_SETTINGS)
@click.version_option(package_name="late-phase-nqm")
def main() -> None:
    """Noisy quadratic theory of SGD, weight averaging and late-phase weights."""
    # On a busy machine a second BLAS thread makes an eigendecomposition some hundred times slower:
    # both wait for each other at every step. NumPy, which reads this, is not loaded yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def options(*names: str) -> Callable[[Any], Any]:
    """Options that several commands share."""
    known = {
        "file": click.argument("file", metavar="FILE.toml"),
        "set": click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change an entry of the file, e.g. --set phase.0.lr=0.1 (repeatable).",
        ),
        "out": click.option(
            "--out", metavar="TABLE", help="Write the result to this .parquet or .csv table."
        ),
        "json": click.option(
            "--json", "as_json", is_flag=True, help="Write one JSON document to standard output."
        ),
        "workers": click.option(
            "--workers",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Number of processors to use; results do not depend on it.",
        ),
    }

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = known[name](command)
        return command

    return decorate


@main.command("list")
def list_() -> None:
    """Show algorithms, schedules, spectra, columns and figures."""
    from nqm.algorithms import ROSTER
    from nqm.runs.config import MODELS, SPECTRA
    from nqm.schedule import SCHEDULES
    from nqm.table import COLUMNS

    for title, entries in (
        ("algorithm", ROSTER),
        ("schedule", SCHEDULES),
        ("spectrum (name)", SPECTRA),
        ("model of least squares (name)", MODELS),
    ):
        click.echo(f"{title}:")
        for name, target in entries.items():
            click.echo(f"  {name}({_parameters(target)})\n      {_summary(target)}")
    click.echo("columns:")
    for name, column in COLUMNS.items():
        unit = f" [{column.unit}]" if column.unit else ""
        click.echo(f"  {name}{unit}: {column.doc}")
    for title, lines in _lists().items():
        click.echo(f"{title}:")
        for name, text in lines.items():
            click.echo(f"  {name}: {text}")


def _lists() -> dict[str, dict[str, str]]:
    """What other packages add to `nqm list`: entry points whose functions return lines by name."""
    from importlib.metadata import entry_points

    return {point.name: point.load()() for point in entry_points(group="nqm.lists")}


def _parameters(target: Callable[..., Any]) -> str:
    import inspect

    shown = []
    for name, parameter in inspect.signature(target).parameters.items():
        default = parameter.default
        if default is inspect.Parameter.empty:
            shown.append(name)
        elif name in ("inner", "outer"):
            shown.append(f"{name}=sgd")
        else:
            shown.append(f"{name}={default!r}")
    return ", ".join(shown)


def _summary(target: Callable[..., Any]) -> str:
    import inspect

    return (inspect.getdoc(target) or "").partition("\n")[0]


@main.command()
@options("file", "set")
@click.option(
    "--method",
    help="jump (exact, by powers), moments (exact, every step), sample (Monte Carlo) or closure "
    "(multiplicative members).",
)
@click.option("--replicas", type=int, help="Number of independent Monte Carlo runs.")
@click.option("--seed", type=int, help="Seed of the Monte Carlo draws.")
@click.option("--precision", help="Precision of Monte Carlo: float64, or float32 (faster).")
@click.option(
    "--quantiles", metavar="Q,Q,...", help="Add quantiles of the loss, e.g. 0.05,0.5,0.95."
)
@options("out", "workers", "json")
def run(
    file: str,
    overrides: tuple[str, ...],
    method: str | None,
    replicas: int | None,
    seed: int | None,
    precision: str | None,
    quantiles: str | None,
    out: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Compute the expected loss of one program.

    \b
    nqm run late.toml --json
    nqm run late.toml --set phase.1.members=20 --method sample --out late.parquet
    """
    from nqm.runs import config, toml

    stated = {"method": method, "replicas": replicas, "seed": seed, "precision": precision}
    short = [f"{name}={value}" for name, value in stated.items() if value is not None]
    mapping = toml.load_one(file, [*overrides, *short])
    if quantiles is not None:
        toml.assign(mapping, "record.quantiles", numbers("--quantiles", quantiles))
    folder = Path(file).parent
    job = config.build(mapping, folder)

    def compute() -> pd.DataFrame:
        unit = "replicas" if job.method == "sample" else "steps"
        with progress_bar(job.work, unit) as progress:
            return job.table(workers, progress)

    deliver(compute, config.stamp(mapping, folder), as_json, out)


def deliver(
    compute: Callable[[], pd.DataFrame], stamp: Stamp, as_json: bool, out: str | None
) -> None:
    """Print a table, or write it where a finished one of the same stamp is not computed again."""
    from nqm.table import read_table, write_table, writing

    if out is None:
        _show(compute(), as_json)
        return
    with writing(out, stamp) as missing:
        if missing:
            write_table(out, compute(), stamp.metadata())
        table = read_table(out)
    _show(table, as_json, out)


def numbers(option: str, text: str) -> list[float]:
    """Numbers from a text with commas."""
    from nqm.errors import NQMError, shown

    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise NQMError(
            f"{option} must be numbers between commas, as 0.05,0.5; got {shown(text)}"
        ) from None


@main.command()
@options("file", "set")
@click.option(
    "--out", metavar="TABLE", required=True, help="Write the result to this .parquet or .csv table."
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Run on a Dask cluster, e.g. tcp://127.0.0.1:8786."
)
@options("workers", "json")
def sweep(
    file: str,
    overrides: tuple[str, ...],
    out: str,
    scheduler: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Run a program over the grid of its [sweep] table.

    A sweep can be interrupted at any time. The same command continues it: finished cells are kept.

    \b
    nqm sweep grid.toml --out grid.parquet --workers 4
    nqm sweep grid.toml --out grid.parquet --scheduler tcp://127.0.0.1:8786
    """
    from nqm.errors import NQMError
    from nqm.runs.sweep import Sweep
    from nqm.table import read_table

    if scheduler is not None and workers > 1:
        raise NQMError("--scheduler brings its own workers; drop --workers")
    cells = Sweep.from_file(file, overrides)
    with _executor(scheduler, workers) as executor, progress_bar(len(cells), "cells") as progress:
        cells.write(out, executor, progress)
    if as_json:
        _show(read_table(out), as_json)
    else:
        click.echo(f"{out}: {len(cells)} cells", err=True)


@contextmanager
def _executor(scheduler: str | None, workers: int) -> Iterator[Executor | None]:
    """Executor of the cells: a cluster, processes, or None for this process."""
    if scheduler is not None:
        from nqm.runs.cluster import connected

        with connected(scheduler) as executor:
            yield executor
    elif workers > 1:
        from nqm.runs.executors import processes

        with processes(workers) as pool:
            yield pool
    else:
        yield None


@main.command()
@options("file", "set", "json")
def steady(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Compute the steady-state loss of the last phase.

    Multiplicative late-phase weights have two rows: first_order is the quasi-steady state, long_run
    the loss that they reach after a long time.

    \b
    nqm steady late.toml --set phase.-1.lr=0.01
    """
    _show(_load(file, overrides).steady(), as_json)


@main.command()
@options("file", "set")
@click.option(
    "--phase",
    "index",
    type=int,
    default=-1,
    show_default=True,
    help="Number of the phase to tune, from 0; -1 is the last.",
)
@click.option("--momentum", is_flag=True, help="Search the momentum as well.")
@click.option(
    "--target", type=float, help="Find the rate that reaches this loss in the fewest steps."
)
@options("json")
def tune(
    file: str,
    overrides: tuple[str, ...],
    index: int,
    momentum: bool,
    target: float | None,
    as_json: bool,
) -> None:
    """Find the best learning rate of one phase.

    By default the rate of least final loss of the program; of a scheduled rate its peak, which may
    lie beyond the stability edge, while the shape stays. With --target, for a program of one
    phase, the rate that reaches this loss in the fewest steps.

    \b
    nqm tune late.toml --phase 0
    nqm tune sgd.toml --target 0.01
    """
    from nqm.errors import NQMError
    from nqm.tuning.program import best_phase_lr, fastest_phase_lr

    job = _load(file, overrides)
    problem = job.additive("tune")
    if target is not None and momentum:
        raise NQMError(
            "tune searches momentum for the final loss only; drop --momentum or --target"
        )
    with progress_bar(None, "settings") as report:
        if target is None:
            best = best_phase_lr(problem, job.program, index, momentum=momentum, progress=report)
            table = best.table()
        else:
            table = fastest_phase_lr(problem, job.program, target, progress=report)
    _show(table, as_json)


def _load(file: str, overrides: tuple[str, ...]) -> Run:
    from nqm.runs import config, toml

    return config.build(toml.load_one(file, overrides), Path(file).parent)


def _show(table: pd.DataFrame, as_json: bool, out: str | None = None) -> None:
    """Print a table as JSON or as text; of a table in a file print the name and number of rows."""
    if as_json:
        from nqm.table import to_json

        click.echo(to_json(table))
    elif out is None:
        click.echo(table.to_string(index=False, float_format=lambda value: f"{value:.6g}"))
    else:
        click.echo(f"{out}: {len(table)} rows", err=True)


@contextmanager
def progress_bar(total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Progress bar for work of more than two seconds, on a terminal only."""
    from tqdm import tqdm

    hidden = not sys.stderr.isatty()
    with tqdm(total=total, unit=f" {unit}", delay=2, disable=hidden, file=sys.stderr) as bar:

        def report(count: int) -> None:
            bar.update(count)

        yield report
