"""Worker processes on one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from nqm.errors import NQMError


class _Process(SpawnProcess):
    """A process that ignores Ctrl-C from its start, because it inherits the signal mask."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Process


class Workers(ProcessPoolExecutor):
    """Executor of `processes`, which cancels all its work on an error."""


@contextmanager
def processes(
    count: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[Workers]:
    """Start worker processes that end with this process and leave Ctrl-C to it.

    They are spawned: forked children would inherit locks of this process's threads (numba, BLAS).
    If an error ends the block, the processes are killed; results that were returned are kept.

    Parameters
    ----------
    count : int
        Number of processes.
    start : callable, optional
        ``start(*arguments)`` is called in each process; `share_machine` by default.
    arguments : tuple
        Arguments of `start`.

    Yields
    ------
    Workers
        Executor of the processes.

    Raises
    ------
    NQMError
        If a worker ends unexpectedly, for example because memory ran out.
    """
    others = set(multiprocessing.active_children())
    if start is None:
        start = share_machine
    pool = Workers(count, _Context(), _start, (start, arguments))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise NQMError(
                "a worker process was stopped, perhaps for want of memory; run again, with fewer "
                "--workers: what is finished is kept"
            ) from None
        raise
    pool.shutdown()


def share_machine() -> None:
    """Limit the BLAS of a process to one thread while others compute on the same machine.

    On matrices of this size, threads of several processes lose more by waiting for each other than
    they gain. Compiled kernels have one thread anyhow.
    """
    import scipy.linalg  # noqa: F401  a BLAS is limited once it is loaded
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """Wait until the parent has ended, for any reason, and end this process.

    Otherwise a worker would wait for work without end, because it has the other end of its pipe
    open itself. A thread can do this while compiled code (numba, torch, BLAS) runs, because that
    releases the interpreter.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
