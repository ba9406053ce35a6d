"""One error for a user's mistake; its message names the field, the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Integral, Real


class NQMError(ValueError):
    """A user's mistake; its message is one complete line.

    Parameters
    ----------
    message : str
        Names the field, the value and the fix; line breaks become spaces.
    """

    def __init__(self, message: str = ""):
        super().__init__(" ".join(str(message).split()))


class NQMWarning(UserWarning):
    """A word on input that was changed to be usable; one line."""


def suggest(name: str, known: Iterable[str]) -> str:
    """End of a message about an unknown name: the closest known name, or all of them.

    Parameters
    ----------
    name : str
        The unknown name.
    known : iterable of str
        Names that exist.

    Returns
    -------
    str
        ``"; did you mean 'x'?"``, or ``"; known: x, y"`` if none is close.
    """
    names = sorted(known)
    close = get_close_matches(name[:100], names, n=1)  # matching takes length times length
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def shown(value: object, size: int = 60) -> str:
    """Write a value for a message.

    Parameters
    ----------
    value : object
        The value that the user gave.
    size : int
        Largest number of characters, >= 4.

    Returns
    -------
    str
        Its `repr` on one line, shortened to `size` characters.
    """
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no integer of thousands of digits
        return "an integer of thousands of digits"
    return text if len(text) <= size else text[: size - 3] + "..."


def check_word(where: str, value: object, known: Iterable[str]) -> None:
    """Check that a value is one of the known words.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : object
        The value that the user gave.
    known : iterable of str
        Allowed words.

    Raises
    ------
    NQMError
        If it is none of them; the message suggests one.
    """
    names = tuple(known)
    if not isinstance(value, str) or value not in names:
        raise NQMError(f"{where} {shown(value)} is unknown{suggest(str(value), names)}")


def check_integer(where: str, value: object, minimum: int) -> None:
    """Check that a value is an integer (not a bool) of at least `minimum`.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : object
        The value that the user gave.
    minimum : int
        Smallest value allowed.

    Raises
    ------
    NQMError
        If it is not.
    """
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
    """Check that a value is a finite number (not a bool) in an interval.

    Parameters
    ----------
    where : str
        Name of the field, for the message.
    value : object
        The value that the user gave.
    low, high : float
        Ends of the interval; infinite by default.
    closed_low, closed_high : bool
        Whether the ends belong to it.

    Raises
    ------
    NQMError
        If it is not.
    """
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
    """Check that optional modules are installed, without importing them.

    Parameters
    ----------
    what : str
        Function or option that needs them, for the message.
    extra : str
        Extra of this package that installs them.
    *modules : str
        Top-level names.

    Raises
    ------
    NQMError
        If one is missing; the message names the extra to install.
    """
    missing = [module for module in modules if not _found(module)]
    if missing:
        raise NQMError(f"{what} needs {', '.join(missing)}: pip install 'late-phase-nqm[{extra}]'")


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
