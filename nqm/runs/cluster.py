"""Sweeps on a Dask cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextlib import contextmanager

from nqm.errors import NQMError

#: Seconds to wait for a scheduler that does not answer.
PATIENCE = 10
#: Number of times a chunk of cells is computed again after its worker was lost.
RETRIES = 5


async def _knock(address: str) -> None:
    """Connect to a scheduler and disconnect; raises any error of the connection."""
    from distributed import Security
    from distributed.comm.core import connect

    comm = await connect(address, PATIENCE, **Security().get_connection_args("client"))
    comm.abort()


@contextmanager
def connected(address: str) -> Iterator[Executor]:
    """Connect to a Dask cluster, whose workers then compute the cells of `Sweep.run`.

    Workers need this package, and need the files of a configuration at the same paths. If a worker
    is lost, another one computes its cells.

    Parameters
    ----------
    address : str
        Address of the scheduler, e.g. ``tcp://host:8786``.

    Yields
    ------
    Executor
        To be passed to `Sweep.run`.

    Raises
    ------
    NQMError
        If Dask is not installed, or nothing answers at the address.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise NQMError("--scheduler needs Dask: pip install 'late-phase-nqm[cluster]'") from None
    try:
        # A client that cannot connect leaves threads that log errors later, so try first; in a
        # thread, because the caller may run in an event loop, as a notebook does.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _knock(address)).result()
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # also a protocol that is not installed, such as ucx
        raise NQMError(
            f"no Dask scheduler answers at {address!r} ({error!s:.80}); start one with "
            "`dask scheduler` and give its address, e.g. tcp://127.0.0.1:8786"
        ) from None
    try:
        yield client.get_executor(retries=RETRIES)
    except (CancelledError, OSError, TimeoutError, KilledWorker) as error:
        if client.status == "running" and not isinstance(error, KilledWorker):
            raise
        raise NQMError(
            f"the Dask scheduler at {address} or its workers were lost; run again: what is "
            "finished is kept"
        ) from None
    finally:
        client.close()
