"""Keep freed memory of the host in the process.

By default glibc maps every large block anew, and returns it to the system when it is freed.
Training on a CPU frees and allocates the same large tensors in every step, and the system then
provides each of them again, page by page. Where such page faults are slow, they take half of the
time of a small ResNet (`benchmarks/allocator.py`).
"""

from __future__ import annotations

import ctypes

# Constants of malloc.h: largest number of separately mapped blocks, largest free memory to keep.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> bool:
    """Make the allocator keep freed memory and reuse it for large blocks.

    The memory of the process then never shrinks.

    Returns
    -------
    bool
        True if the C library accepted the settings. With libraries other than glibc nothing changes
        and it is False.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
