"""Objects that hold arrays, in one line."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import numpy as np

#: Longest array that is written out.
WRITTEN = 6


def array_words(array: np.ndarray[Any, Any]) -> str:
    """An array in few words.

    Parameters
    ----------
    array : ndarray

    Returns
    -------
    str
        Its entries if they are few, else its shape and range: ``<1000: 0.001 to 1>``.
    """
    if array.size <= WRITTEN:
        return np.array2string(array, precision=6, separator=", ").replace("\n", "")
    shape = " x ".join(str(n) for n in array.shape)
    if array.dtype.kind not in "iuf":
        return f"<{shape}>"
    known = array[~np.isnan(array)]
    if not known.size:
        return f"<{shape}: all nan>"
    low, high = known.min(), known.max()
    return f"<{shape}: all {low:.6g}>" if low == high else f"<{shape}: {low:.6g} to {high:.6g}>"


def short_repr(self: Any) -> str:
    """``repr`` of a dataclass with arrays: what differs from the defaults, arrays in few words.

    Parameters
    ----------
    self : dataclass

    Returns
    -------
    str
    """
    parts = []
    for one in fields(self):
        value = getattr(self, one.name)
        if not one.repr or value is None:
            continue
        if isinstance(value, np.ndarray):
            parts.append(f"{one.name}={array_words(value)}")
        elif one.default is MISSING or value != one.default:
            parts.append(f"{one.name}={value!r}")
    return f"{type(self).__name__}({', '.join(parts)})"
