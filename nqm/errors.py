"""One error for a user's mistake: what, where, expected, got, do this."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Integral, Real


class NQMError(ValueError):
    """A mistake in what the user asked for; its message is one line fit to print alone."""

    def __init__(self, message: str = ""):
        super().__init__(" ".join(str(message).split()))


def suggest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a near miss, else the list of what exists.

    Parameters
    ----------
    name : str
        What was asked for.
    known : iterable of str
        What exists.
    """
    names = sorted(known)
    close = get_close_matches(name[:100], names, n=1)  # matching takes length times length
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def shown(value: object, size: int = 60) -> str:
    """What was given, on one line of at most `size` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= size else text[: size - 3] + "..."


def check_word(where: str, value: object, known: Iterable[str]) -> None:
    """Raise NQMError, with a suggestion, unless `value` is one of the known words."""
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise NQMError(f"{where} {shown(value)} is unknown{suggest(str(value), names)}")


def check_integer(where: str, value: object, minimum: int) -> None:
    """Raise NQMError unless `value` is an integer (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise NQMError(f"{where} must be an integer >= {minimum}; got {shown(value)}")


def check_number(
    where: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    closed_low: bool = True,
    closed_high: bool = True,
) -> None:
    """Raise NQMError unless `value` is a finite number in the stated interval."""
    try:
        x = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:  # an integer beyond all floats
        x = math.inf
    ok = (
        math.isfinite(x)
        and (x >= low if closed_low else x > low)
        and (x <= high if closed_high else x < high)
    )
    if not ok:
        left = f"{'[' if closed_low else '('}{low:g}"
        right = f"{high:g}{']' if closed_high and math.isfinite(high) else ')'}"
        interval = f"lie in {left}, {right}"
        if low == -math.inf:
            most = f"be {'at most' if closed_high else 'below'} {high:g}"
            interval = "be a finite number" if high == math.inf else most
        raise NQMError(f"{where} must {interval}; got {shown(value)}")


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Raise NQMError, naming the extra to install, unless every module can be found.

    Parameters
    ----------
    what : str
        What needs them, as the user called it.
    extra : str
        The extra of this package that brings them.
    *modules : str
        Top-level names; none is imported.
    """
    missing = [module for module in modules if not _found(module)]
    if missing:
        raise NQMError(f"{what} needs {', '.join(missing)}: pip install 'late-phase-nqm[{extra}]'")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
