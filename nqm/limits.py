"""Sizes that are refused before any work: what would not fit into memory, or would not end.

Every refusal names the field, its value, what it would need and the limit.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nqm.errors import NQMError, shown

#: Steps that one call may walk one by one; a billion take minutes in one direction.
WALKED = 10**9
#: Multiplications that one call may need in dense matrices; a processor does some 10^9 a second.
WORK = 1e12
#: Members, clients and snapshots that an algorithm may state; it lists each by its name.
MEMBERS = 10**6


def available_memory() -> int:
    """Bytes of memory this process may have: the machine's, or less where it is limited.

    Returns
    -------
    int
        The least of: the machine's memory, the process limit, the container limit.
    """
    limits = []
    with suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ImportError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits, default=8 * 2**30)


def memory_limit() -> int:
    """Most bytes that one array, or one set of arrays, may take.

    Half of `available_memory`; the environment variable ``NQM_MEMORY`` sets another limit, in GiB.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    NQMError
        If ``NQM_MEMORY`` is not a number > 0.
    """
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
    """Raise NQMError if `count` entries of `bytes_each` are more than `memory_limit`.

    Parameters
    ----------
    field : str
        What the user set, e.g. ``replicas = 10``.
    count : float
        Entries; a Python int of any size.
    bytes_each : float
        Memory of one.
    fix : str
        What to do about it.

    Raises
    ------
    NQMError
        If they are.
    """
    limit = memory_limit()
    needed = min(count, 2**900) * bytes_each  # no float of any size overflows
    if needed > limit:
        advice = f"{fix}, or set NQM_MEMORY (GiB)" if fix else "set NQM_MEMORY (GiB) for more"
        raise NQMError(
            f"{field} needs {readable(needed)} of memory; the limit is {readable(limit)}: {advice}"
        )


def check_memory(where: str, value: object, numbers: float, fix: str = "") -> None:
    """Raise NQMError if so many float64 numbers, which a field asks for, do not fit.

    Parameters
    ----------
    where : str
        The field to lower.
    value : object
        What it holds.
    numbers : float
        Numbers of 8 bytes held at once.
    fix : str
        What to do about it; by default to lower the field.
    """
    check_size(f"{where} = {shown(value)}", numbers, 8, fix or f"lower {where}")


def check_walk(where: str, steps: float, why: str) -> None:
    """Raise NQMError if more than `WALKED` steps would be simulated one by one.

    Parameters
    ----------
    where : str
        The field to lower.
    steps : float
    why : str
        Why no shortcut holds; follows "as" in the message.

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
    """Raise NQMError if a call needs more than `WORK` multiplications.

    Parameters
    ----------
    where : str
        The field that sets the number.
    value : object
        The value of this field.
    multiplications : float
    what : str
        The computation, e.g. "of a singular value decomposition".
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
    """Bytes in the largest unit that fits, e.g. ``1.5 GiB``.

    Parameters
    ----------
    size : float
        Bytes.

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
