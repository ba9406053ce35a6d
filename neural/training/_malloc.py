"""Keep freed memory of the host in the process.

glibc maps every large block anew and hands it back when it is freed. Training on a CPU frees and
asks for the same large tensors in every step, so that each is faulted in page by page again: half
of the time of a small ResNet, where page faults are dear (`benchmarks/allocator.py`).
"""

from __future__ import annotations

import ctypes

# Of malloc.h: blocks that are mapped by themselves at most, and free memory that is kept at most.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> bool:
    """Have large blocks taken from memory that the process has freed, and keep that.

    The process then holds as much as it ever needed at once.

    Returns
    -------
    bool
        Whether the C library took it; False of any but glibc, where nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
