"""Content keys: a configuration is identified by the entries that differ from their defaults.

A new entry with a default therefore changes no older key. A changed default must not change keys
either: `omits` states the earlier default, which keys continue to leave out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

Target = TypeVar("Target", bound=Callable[..., Any])

#: Result of `omitted` for an entry without a default.
REQUIRED = inspect.Parameter.empty


def key(mapping: Mapping[str, Any]) -> str:
    """Content key of a mapping.

    Parameters
    ----------
    mapping : mapping
        Holds numbers, texts, lists and mappings. The order of its entries does not matter, nor the
        spelling of a number: 1 or 1.0, 0.1 or 1e-1.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    return hashlib.sha256(text(mapping).encode()).hexdigest()


def same(one: Any, other: Any) -> bool:
    """Tell whether two plain values give the same key; 1 and 1.0 do, 1 and True do not.

    Parameters
    ----------
    one, other : Any
        Numbers, texts, lists and mappings.

    Returns
    -------
    bool
        Whether their `text` is equal.
    """
    return text(one) == text(other)


def text(value: Any) -> str:
    """Write a plain value in its canonical form, from which keys are computed.

    Parameters
    ----------
    value : Any
        Numbers, texts, lists and mappings.

    Returns
    -------
    str
        JSON with sorted names and one spelling of each number.
    """
    return json.dumps(_canonical(value), sort_keys=True, default=str)


def _canonical(value: Any) -> Any:
    """The value with one spelling of every number and list."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def omits(**values: Any) -> Callable[[Target], Target]:
    """Decorate a class or function whose defaults have changed.

    Parameters
    ----------
    **values
        Earlier default by name of the entry; keys continue to leave it out.

    Returns
    -------
    callable
        Decorator that returns its target.

    Raises
    ------
    TypeError
        If there is no such entry.

    Examples
    --------
    The decay was 0.99 by default and is now 0.999. Runs made before have keys without it:

    >>> from dataclasses import dataclass
    >>> @omits(decay=0.99)
    ... @dataclass(frozen=True)
    ... class Average:
    ...     decay: float = 0.999
    >>> differing(Average(0.99)), differing(Average())
    ({}, {'decay': 0.999})
    """

    def mark(target: Target) -> Target:
        parameters = inspect.signature(target).parameters
        for name in values:
            if name not in parameters:
                raise TypeError(f"{target.__name__} has no entry {name!r}")
        target.__omitted__ = {**earlier_defaults(target), **values}  # type: ignore[attr-defined]
        return target

    return mark


def earlier_defaults(target: object) -> Mapping[str, Any]:
    """Earlier defaults that `omits` states for a class or function.

    Parameters
    ----------
    target : object
        Class, function or anything else.

    Returns
    -------
    mapping of str to Any
        Earlier default by name; empty if `omits` was not applied.
    """
    stated: Mapping[str, Any] = getattr(target, "__omitted__", {})
    return stated


def omitted(target: Callable[..., Any], name: str) -> Any:
    """Value of an entry that keys leave out: the default, or the one that `omits` states.

    Parameters
    ----------
    target : callable
        A class or function.
    name : str
        One of its parameters.

    Returns
    -------
    Any
        `REQUIRED` if there is no default, or no such parameter.
    """
    stated = earlier_defaults(target)
    return stated[name] if name in stated else _default(target, name)


def _default(target: Callable[..., Any], name: str) -> Any:
    """Present default; `REQUIRED` if there is none."""
    for field in fields(target) if is_dataclass(target) else ():
        if field.name == name and field.default_factory is not MISSING:
            return field.default_factory()
        if field.name == name and field.default is not MISSING:
            return field.default
    parameter = inspect.signature(target).parameters.get(name)
    return REQUIRED if parameter is None else parameter.default


def changed_defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Present defaults of the entries whose default has changed.

    Parameters
    ----------
    target : callable
        Class or function to which `omits` may have been applied.

    Returns
    -------
    dict of str to Any
        Present default by name.
    """
    return {name: _default(target, name) for name in earlier_defaults(target)}


def differing(value: Any, plain: Callable[[Any], Any] = lambda entry: entry) -> dict[str, Any]:
    """Entries of a dataclass that differ from the values that keys leave out.

    Parameters
    ----------
    value : dataclass instance
        Configuration.
    plain : callable
        Takes an entry; returns it as numbers, texts, lists and mappings.

    Returns
    -------
    dict of str to Any
        Plain entries by name.
    """
    made: Callable[..., Any] = type(value)
    entries = {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return {
        name: entry
        for name, entry in entries.items()
        if omitted(made, name) is REQUIRED or not same(entry, plain(omitted(made, name)))
    }


def difference(
    stated: Mapping[str, Any], asked: Mapping[str, Any], absent: str = "none"
) -> str | None:
    """Describe the first entry in which two configurations differ, for a message.

    Parameters
    ----------
    stated, asked : mapping
        The configuration on disk, and the one that the user asks for.
    absent : str
        Text for an entry that one of them lacks.

    Returns
    -------
    str or None
        For example ``late_phase.members = 4, you ask for 8``; None if they are the same.
    """
    one, other = dict(_entries(stated)), dict(_entries(asked))
    names = [
        name
        for name in {**other, **one}
        if name not in one or name not in other or not same(one[name], other[name])
    ]
    if not names:
        return None
    first = names[0]
    more = f" (and {len(names) - 1} more entries differ)" if len(names) > 1 else ""
    if first.endswith(".sha256"):  # the digest of a file
        return f"another content of {first.removesuffix('.sha256')}{more}"
    before, now = (
        json.dumps(part[first], default=str) if first in part else absent for part in (one, other)
    )
    return f"{first} = {before:.40}, you ask for {now:.40}{more}"


def _entries(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists of tables by index."""
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        inner = {str(index): one for index, one in enumerate(value)}.items()
    else:
        yield where, value
        return
    for name, entry in inner:
        yield from _entries(entry, f"{where}.{name}" if where else str(name))
