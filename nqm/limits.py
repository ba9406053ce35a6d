"""Limits of memory and time, checked before any work begins.

Every message names the field, its value, the memory or work that it needs, and the limit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from nqm.errors import NQMError, check_number, shown

#: Steps that one call may take one by one; 10^9 take minutes in one direction.
WALKED = 10**9
#: Multiplications of dense matrices that one call may need; a processor does some 10^9 per second.
WORK = 1e12
#: Largest number of members, clients or snapshots of an algorithm, which names each of them.
MEMBERS = 10**6


_BUDGET: ContextVar[int | None] = ContextVar("memory budget", default=None)


@contextmanager
def memory_budget(gib: float | None) -> Iterator[None]:
    """Lower `memory_limit` inside the block.

    Parameters
    ----------
    gib : float, optional
        GiB, > 0; by default nothing changes.

    Yields
    ------
    None

    Raises
    ------
    NQMError
        If `gib` is not a number > 0.
    """
    if gib is not None:
        check_number("memory", gib, low=0.0, closed_low=False)
    token = _BUDGET.set(_BUDGET.get() if gib is None else int(min(gib, 2.0**40) * 2**30))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def available_memory() -> int:
    """Bytes of memory that this process may use.

    Returns
    -------
    int
        The smallest of the machine's memory, the process limit and the container limit.
    """
    limits = [_machine_memory()]
    with suppress(ImportError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(limits)


@functools.cache
def _machine_memory() -> int:
    """Memory of the machine or the container: files that every short run would read again."""
    limits = []
    with suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits, default=8 * 2**30)


def memory_limit() -> int:
    """Largest number of bytes of one array, or of arrays that exist at the same time.

    Half of `available_memory`; the environment variable ``NQM_MEMORY`` sets another limit, in GiB.
    Inside `memory_budget` it is at most that budget.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    NQMError
        If ``NQM_MEMORY`` is not a number > 0.
    """
    budget, limit = _BUDGET.get(), _stated_limit()
    return limit if budget is None else min(budget, limit)


def _stated_limit() -> int:
    """`memory_limit` outside `memory_budget`."""
    text = os.environ.get("NQM_MEMORY", "")
    if not text:
        return available_memory() // 2
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit > 0.0:
        raise NQMError(f"NQM_MEMORY must be a number of GiB > 0; got {text!r}")
    return int(min(limit, 2.0**40) * 2**30)


def check_size(field: str, count: float, bytes_each: float = 8, fix: str = "") -> None:
    """Check that `count` entries of `bytes_each` fit in `memory_limit`.

    Parameters
    ----------
    field : str
        Field and value that the user set, e.g. ``replicas = 10``.
    count : float
        Number of entries; may be a Python int of any size.
    bytes_each : float
        Memory of one entry, bytes.
    fix : str
        Advice to the user.

    Raises
    ------
    NQMError
        If they do not fit.
    """
    limit = memory_limit()
    needed = min(count, 2**900) * bytes_each  # no float of any size overflows
    if needed > limit:
        raised = "raise --memory" if limit == _BUDGET.get() else "set NQM_MEMORY"
        advice = f"{fix}, or {raised} (GiB)" if fix else f"{raised} (GiB) for more"
        raise NQMError(
            f"{field} needs {readable(needed)} of memory; the limit is {readable(limit)}: {advice}"
        )


def check_memory(where: str, value: object, numbers: float, fix: str = "") -> None:
    """Check that the float64 numbers that a field needs fit in memory.

    Parameters
    ----------
    where : str
        Name of the field.
    value : object
        Its value.
    numbers : float
        Numbers of 8 bytes that exist at the same time.
    fix : str
        Advice to the user; by default to lower the field.

    Raises
    ------
    NQMError
        If they do not fit.
    """
    check_size(f"{where} = {shown(value)}", numbers, 8, fix or f"lower {where}")


def check_walk(where: str, steps: float, why: str) -> None:
    """Check that at most `WALKED` steps are taken one by one.

    Parameters
    ----------
    where : str
        Name of the field that sets the number.
    steps : float
        Number of steps.
    why : str
        Reason why steps cannot be combined; follows "as" in the message.

    Raises
    ------
    NQMError
        If `steps` is above the limit.
    """
    if steps > WALKED:
        raise NQMError(
            f"{where} = {steps:.6g} steps would be walked one by one, as {why}; "
            f"the limit is {WALKED:.0e}: lower {where}"
        )


def check_work(where: str, value: object, multiplications: float, what: str, fix: str = "") -> None:
    """Check that a call needs at most `WORK` multiplications.

    Parameters
    ----------
    where : str
        Name of the field that sets the number.
    value : object
        Its value.
    multiplications : float
        Number of multiplications.
    what : str
        Name of the computation, e.g. "of a singular value decomposition".
    fix : str
        Advice to the user; by default to lower the field.

    Raises
    ------
    NQMError
        If `multiplications` is above the limit.
    """
    if multiplications > WORK:
        raise NQMError(
            f"{where} = {shown(value)} would need {multiplications:.1e} multiplications {what}; "
            f"the limit is {WORK:.0e}: {fix or f'lower {where}'}"
        )


def readable(size: float) -> str:
    """Write a number of bytes in the largest unit that fits, e.g. ``1.5 GiB``.

    Parameters
    ----------
    size : float
        Number of bytes.

    Returns
    -------
    str
        Three digits and the unit.
    """
    value, unit = float(size), 0
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {units[unit]}"
