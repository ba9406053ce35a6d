"""How kernels are compiled, and cached on disk."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

from numba import njit
from numba.extending import intrinsic


@functools.cache
def _say_uncached() -> None:
    """Warn once that nothing is cached; not in workers, whose parent has warned already."""
    if multiprocessing.parent_process() is None:
        text = (
            "no folder for numba's cache can be written to, so every process compiles for some "
            "seconds; set NUMBA_CACHE_DIR to one that can"
        )
        warnings.warn_explicit(text, RuntimeWarning, "nqm", 0)


@functools.cache
def _stamp() -> str:
    """Digest of every file of this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def jit(function: Any) -> Any:
    """Compile on first use; cache on disk if a folder can be written to, else in this process.

    Numba takes a cached function for fresh if its own file is as it was, but it holds the code of
    functions and constants of other files too: here it is fresh if the whole folder is.
    """
    try:
        compiled: Any = njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # "no locator available": no folder can be written to
        _say_uncached()
        return njit(nogil=True, error_model="numpy")(function)
    file = compiled._cache._cache_file
    file._source_stamp = (file._source_stamp, _stamp())
    return compiled


def _fused(_: Any, a: Any, b: Any, c: Any) -> Any:
    return a(a, a, a), lambda context, builder, signature, args: builder.fma(*args)


#: Fused a * b + c as an explicit instruction: the compiler may not fuse on its own.
fma: Any = intrinsic(_fused)
