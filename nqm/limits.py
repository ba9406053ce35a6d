"""How much memory one thing may ask for, checked before it is made."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from nqm.errors import NQMError


@cache
def memory_limit() -> int:
    """Bytes that one thing may take: half of what this process may have at most."""
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
    return min(limits, default=8 * 2**30) // 2


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
    """
    limit = memory_limit()
    needed = min(count, 2**900) * bytes_each  # no float of any size overflows
    if needed > limit:
        advice = f"; {fix}" if fix else ""
        raise NQMError(
            f"{field} needs {readable(needed)} of memory, more than {readable(limit)}, "
            f"half of what this machine has{advice}"
        )


def readable(size: float) -> str:
    """Bytes in the largest unit that fits, e.g. ``1.5 GiB``."""
    value, unit = float(size), 0
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {units[unit]}"
