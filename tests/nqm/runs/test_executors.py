"""Worker processes share the machine and leave Ctrl-C to the parent."""

from __future__ import annotations

import signal

import numba
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from nqm.runs.executors import processes, share_machine


def state() -> tuple[bool, set[int], int]:
    """Whether Ctrl-C is ignored, threads of every BLAS, threads of Numba."""
    import scipy.linalg  # noqa: F401

    blas = {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, blas, numba.get_num_threads()


def test_workers_share_the_machine() -> None:
    own = numba.get_num_threads()
    with processes(2) as pool:
        deaf, blas, threads = pool.submit(state).result()
    assert deaf
    assert blas == {1}
    assert threads == max(1, own // 2)


@pytest.mark.parametrize(("workers", "threads"), [(1, 2), (2, 1), (3, 1)])
def test_a_part_of_numbas_threads(
    workers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    monkeypatch.setattr(numba, "get_num_threads", lambda: 2)
    monkeypatch.setattr(numba, "set_num_threads", given.append)
    with threadpool_limits(2):  # gives back what share_machine takes
        share_machine(workers)
    assert given == [threads]
