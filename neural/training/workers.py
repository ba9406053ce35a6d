"""Independent work in several processes, each with its own threads, with one progress for all."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import wait
from typing import Any, Protocol

import torch

from neural.training._malloc import keep_freed_memory
from nqm.progress import Progress
from nqm.runs.executors import Workers, processes
from nqm.runs.interrupts import note_signals, stop, stop_asked


class Work(Protocol):
    """One of several independent pieces of work; sent to another process by pickle."""

    def __call__(self, index: int, device: torch.device, progress: Progress) -> None:
        """Do the work with this number, from 0, and report the share of it that is done."""


#: In a worker: fraction of each piece of work that is done, in memory shared by all processes.
_SHARES: Any = None
#: In a worker: its device.
_DEVICE = torch.device("cpu")


def run_in_workers(
    work: Work,
    count: int,
    workers: int,
    device: torch.device,
    stage: str,
    progress: Progress | None = None,
) -> None:
    """Do independent work in several processes, the pieces in their order.

    The processes share torch's threads out and have this process's settings of torch. If one
    piece fails, all processes are killed.

    Parameters
    ----------
    work : callable
        Called in a worker with the number of a piece, the worker's device, and its progress.
    count : int
        Number of pieces.
    workers : int
        Number of processes.
    device : torch.device
        The CPU, or the first of the GPUs that the workers take in turn.
    stage : str
        Name of the stage that is reported.
    progress : callable, optional
        Called with the stage and the fraction of all work that is done.

    Raises
    ------
    NQMError
        If a worker ends unexpectedly, or its work raises it.
    """
    spawn = multiprocessing.get_context("spawn")
    shares, started = spawn.Array("d", count), spawn.Value("i", 0)
    threads = max(1, torch.get_num_threads() // workers)
    given = (shares, started, _devices(device), threads, _flags())
    with processes(workers, _start_worker, given) as pool:
        pending = {pool.submit(_do, work, index) for index in range(count)}
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when="FIRST_COMPLETED")
            if stop_asked():
                _stop_workers(pool)
            if progress is not None:
                progress(stage, sum(shares[:]) / count)
            for future in done:
                future.result()


def _do(work: Work, index: int) -> None:
    def progress(stage: str, share: float) -> None:
        _SHARES[index] = share

    work(index, _DEVICE, progress)
    _SHARES[index] = 1.0


def _flags() -> dict[str, Any]:
    """Settings of torch for the whole process that change numbers or speed."""
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.backends.cudnn.deterministic,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _set_flags(flags: dict[str, Any]) -> None:
    torch.set_float32_matmul_precision(flags["matmul"])
    torch.backends.cudnn.allow_tf32 = flags["tf32"]
    torch.backends.cudnn.benchmark = flags["benchmark"]
    torch.backends.cudnn.deterministic = flags["deterministic"]
    torch.use_deterministic_algorithms(flags["algorithms"])


def _start_worker(
    shares: Any, started: Any, devices: list[torch.device], threads: int, flags: dict[str, Any]
) -> None:
    global _SHARES, _DEVICE
    _SHARES = shares
    with started.get_lock():
        _DEVICE = devices[started.value % len(devices)]
        started.value += 1
    if _DEVICE.type == "cuda":
        torch.cuda.set_device(_DEVICE)
    note_signals()
    torch.set_num_threads(threads)
    keep_freed_memory()
    _set_flags(flags)


def _devices(first: torch.device) -> list[torch.device]:
    """Devices that workers take in turn: a GPU each, from the first one on, or the CPU."""
    if first.type != "cuda":
        return [first]
    count, start = torch.cuda.device_count(), first.index or 0
    return [torch.device("cuda", (start + i) % count) for i in range(count)]


def _stop_workers(pool: Workers) -> None:
    """Let all workers write their checkpoints, and end the work."""
    for process in multiprocessing.active_children():
        process.terminate()  # sends SIGTERM, which the worker notes
    pool.shutdown(cancel_futures=True)
    stop()
