"""Options that the commands of `neural` share, and what they make of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from neural.training.task import Runtime
    from nqm.progress import Progress

device_option = click.option(
    "--device", help="cpu, cuda or cuda:1; the GPU by default, if there is one."
)
data_option = click.option(
    "--data",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of data files; the variable NQM_DATA by default.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change an entry of the recipe, e.g. --set late_phase.members=5 (repeatable).",
)
scale_option = click.option(
    "--scale",
    default="full",
    show_default=True,
    help="full: the recipe itself; cpu: tens of minutes without a GPU; smoke: under a minute.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of torch; all processors by default."
)


def check_alone(what: str) -> None:
    """Refuse to be one of several processes of ``torchrun``; the first alone says it.

    Parameters
    ----------
    what : str
        The command or option, for the message.

    Raises
    ------
    NQMError
        In the first of several processes; the others leave with the same code and say nothing.
    """
    import os

    from neural.training.distributed import processes
    from nqm.errors import NQMError

    if processes() > 1:
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(2)
        raise NQMError(
            f"{what} is for one process, and torchrun has started {os.environ['WORLD_SIZE']}; "
            "torchrun is for nqm neural train without --workers"
        )


def make_runtime(device: str | None, root: Path | None, threads: int | None) -> Runtime:
    """Where a command computes, from its options.

    Parameters
    ----------
    device : str or None
        The GPU by default, if there is one.
    root : Path or None
        Folder of the data files.
    threads : int or None
        Threads of torch.

    Returns
    -------
    Runtime

    Raises
    ------
    NQMError
        If the device cannot be used.
    """
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


@contextmanager
def progress_bar(*, hidden: bool = False, lines: bool = False) -> Iterator[Progress]:
    """A bar for each stage, one after the other, on a terminal only.

    Parameters
    ----------
    hidden : bool
        Show nothing, as all but the first of several processes do.
    lines : bool
        Where there is no terminal, print a line with the time when a stage begins.

    Yields
    ------
    Progress
    """
    from datetime import datetime

    from tqdm import tqdm

    form = "{desc}: {percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    hidden = hidden or not sys.stderr.isatty()
    bar: Any = None

    def told(stage: str, share: float) -> None:
        nonlocal bar
        if bar is None or bar.desc != stage:
            if bar is not None:
                bar.close()
            if hidden and lines:
                click.echo(f"{datetime.now():%H:%M:%S} {stage}", err=True)
            bar = tqdm(total=1.0, bar_format=form, delay=2, disable=hidden, file=sys.stderr)
            bar.desc = stage
        bar.update(share - bar.n)

    try:
        yield told
    finally:
        if bar is not None:
            bar.close()
