"""Sweeps on a Dask cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextlib import contextmanager

from nqm.errors import NQMError

#: Seconds to wait for a scheduler that does not answer.
PATIENCE = 10
#: How often a chunk of cells is tried again after its worker was lost.
RETRIES = 5


async def _knock(address: str) -> None:
    """Connect to a scheduler and go; raises whatever keeps one from it."""
    from distributed import Security
    from distributed.comm.core import connect

    comm = await connect(address, PATIENCE, **Security().get_connection_args("client"))
    comm.abort()


@contextmanager
def connected(address: str) -> Iterator[Executor]:
    """Connect to a Dask cluster, whose workers then compute the cells of `Sweep.run`.

    Workers need this package, and see the files a configuration names under the same paths. A chunk
    of cells whose worker is lost goes to another one.

    Parameters
    ----------
    address : str
        Of the scheduler, as ``tcp://host:8786``.

    Yields
    ------
    Executor

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
        # A client that cannot connect leaves threads behind that complain later, so look first;
        # in a thread, as the caller may run in an event loop, as a notebook does.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, _knock(address)).result()
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except Exception as error:  # also of protocols that are not installed, as ucx
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
