"""Worker processes on one machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each with its share of the machine, deaf to Ctrl-C.

    Spawned, as forked children would inherit locks of the parent's threads (numba, BLAS). Ctrl-C is
    for the parent to answer.
    """
    with ProcessPoolExecutor(count, get_context("spawn"), _start, (count,)) as pool:
        yield pool


def share_machine(workers: int) -> None:
    """Be one of so many processes that compute at once.

    One thread for BLAS: threads of several processes wait for each other, which costs far more than
    a second thread gains on matrices of this size. Of Numba's threads an equal part.
    """
    import numba
    import scipy.linalg  # noqa: F401  a BLAS is limited once it is loaded
    from threadpoolctl import threadpool_limits

    threadpool_limits(1, user_api="blas")
    numba.set_num_threads(max(1, numba.get_num_threads() // workers))


def _start(workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    share_machine(workers)
