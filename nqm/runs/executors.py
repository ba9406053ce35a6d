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
    """A process that is deaf to Ctrl-C from its first moment on: it inherits the mask."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(SpawnContext):
    Process = _Process


class Workers(ProcessPoolExecutor):
    """What `processes` gives: on an error it gives up all its work by itself."""


@contextmanager
def processes(
    count: int, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[Workers]:
    """Start worker processes that end with this one and ignore Ctrl-C, which this process answers.

    They are spawned: forked children would inherit locks of this process's threads (numba, BLAS).
    When the block is left by an error, the processes are killed; results handed over stay.

    Parameters
    ----------
    count : int
        Number of processes.
    start : callable, optional
        ``start(*arguments)`` is called in each; `share_machine` by default.
    arguments : tuple
        Of `start`.

    Yields
    ------
    Workers

    Raises
    ------
    NQMError
        If a worker ends by itself, as when the system stops it for want of memory.
    """
    others = set(multiprocessing.active_children())
    if start is None:
        start, arguments = share_machine, (count,)
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


def share_machine(workers: int) -> None:
    """Limit the threads of a process that computes beside others.

    BLAS gets one thread: on matrices of this size, threads of several processes lose more by
    waiting for each other than they gain. Numba gets an equal part of the processors.

    Parameters
    ----------
    workers : int
        Number of processes that compute at once.
    """
    import numba
    import scipy.linalg  # noqa: F401  a BLAS is limited once it is loaded
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
    numba.set_num_threads(max(1, numba.get_num_threads() // workers))


def _start(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    """Wait until the parent is gone, however it went, and end this process.

    A worker would wait for work for ever: it holds the other end of its pipe itself. A thread can
    do it as compiled code (numba, torch, BLAS) lets the interpreter go.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
