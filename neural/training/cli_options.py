"""Options shared by the commands of `neural`, and the objects made from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nqm.progress import Lines

if TYPE_CHECKING:
    import torch

    from neural.training.task import Runtime
    from nqm.progress import Progress

device_option = click.option(
    "--device", help="cpu, cuda or cuda:1.  [default: the GPU if there is one]"
)
data_option = click.option(
    "--data",
    "root",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of data files.  [default: the environment variable NQM_DATA]",
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
    help="full: the recipe itself; gpu: the same in bfloat16 and compiled; cpu: tens of minutes "
    "without a GPU; smoke: less than a minute.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads of torch.  [default: all processors]"
)
data_workers_option = click.option(
    "--data-workers",
    type=click.IntRange(0, 1024),
    help="Processes that decode images of a folder or of ImageNet for each process that trains.  "
    "[default: on a GPU the processors of the machine, at most 16; on the CPU 0]",
)


def check_alone(what: str) -> None:
    """Check that the command is not started as several processes by ``torchrun``.

    Parameters
    ----------
    what : str
        Name of the command or option, for the message.

    Raises
    ------
    NQMError
        In the first of several processes; the others exit with the same code without a message.
    """
    from neural.training.distributed import processes
    from nqm.errors import NQMError

    if processes() > 1:
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(2)
        raise NQMError(
            f"{what} is for one process, and torchrun has started {os.environ['WORLD_SIZE']}; "
            "torchrun is for nqm neural train without --workers"
        )


def make_runtime(
    device: str | None,
    root: Path | None,
    threads: int | None,
    *,
    trains: bool = False,
    data_workers: int | None = None,
) -> Runtime:
    """Make the runtime of a command from its options.

    Parameters
    ----------
    device : str or None
        Name of the device; with None the GPU if there is one.
    root : Path or None
        Folder of the data files; with None that of the environment variable NQM_DATA.
    threads : int or None
        Number of threads of torch; with None torch's own choice.
    trains : bool
        Whether float32 may be TF32 on a GPU, as in training; measurements need all digits.
    data_workers : int or None
        Number of processes that decode images; with None this process's share of the processors of
        the machine, at most 16, if it has a GPU to wait for them, and 0 else.

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

    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = _device(device)
    rank, world = distributed.join(chosen)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high" if trains else "highest")
        torch.backends.cudnn.allow_tf32 = trains
        torch.backends.cudnn.benchmark = True
    if data_workers is None:
        share = (os.cpu_count() or 1) // distributed.local_world()
        data_workers = max(1, min(16, share)) if chosen.type == "cuda" else 0
    return Runtime(chosen, root, rank, world, data_workers)


def _device(asked: str | None) -> torch.device:
    """The device of this process; under ``torchrun`` each process has a GPU of its own."""
    import torch

    from neural.training.distributed import local_rank, processes
    from nqm.errors import NQMError

    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        if chosen.type == "cuda":
            if not torch.cuda.is_available():  # what torch raises depends on how it was built
                raise RuntimeError("torch finds no GPU")
            if ":" in name and processes() > 1:
                raise NQMError(
                    f"--device {name} would put all {processes()} processes on one GPU; "
                    "leave it out, and each process takes its own"
                )
            if ":" not in name:
                chosen = torch.device("cuda", local_rank())
            torch.cuda.set_device(chosen)  # kernels and NCCL of a process use this GPU alone
        # A device without numbers, like "meta", cannot train.
        float(torch.ones(1, device=chosen).double().sum().item())
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise NQMError(f"device {name!r} cannot be used: {reason:.100}; use cpu or cuda") from None
    return chosen


@contextmanager
def progress_bar(*, hidden: bool = False) -> Iterator[Progress]:
    """Tell how far long work is: a bar for each stage on a terminal, and lines else.

    Parameters
    ----------
    hidden : bool
        True to show nothing, e.g. in all but the first of several processes.

    Yields
    ------
    Progress
        Called with the name of a stage and the fraction of it that is done.
    """
    if hidden:
        yield lambda stage, share: None
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield Lines(lambda text: click.echo(text, err=True))


@contextmanager
def _bars() -> Iterator[Progress]:
    from tqdm import tqdm

    form = "{desc}: {percentage:5.1f}%|{bar}| {elapsed}<{remaining}"
    bar: Any = None

    def progress(stage: str, share: float) -> None:
        nonlocal bar
        if bar is None or bar.desc != stage:
            if bar is not None:
                bar.close()
            bar = tqdm(total=1.0, bar_format=form, delay=2, file=sys.stderr)
            bar.desc = stage
        bar.update(share - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()
