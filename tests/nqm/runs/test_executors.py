"""Worker processes share the machine and leave Ctrl-C to the parent."""

from __future__ import annotations

import signal

from threadpoolctl import threadpool_info

from nqm.runs.executors import processes


def state() -> tuple[bool, set[int]]:
    """Whether Ctrl-C is ignored, threads of every BLAS."""
    import scipy.linalg  # noqa: F401

    blas = {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, blas


def test_workers_share_the_machine() -> None:
    with processes(2) as pool:
        deaf, blas = pool.submit(state).result()
    assert deaf
    assert blas == {1}
