"""Content keys: a configuration is known by what differs from its defaults.

A new entry with a default therefore leaves every older key as it was. A default that is changed
later must not: `omits` then tells which value keys go on to leave out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

Target = TypeVar("Target", bound=Callable[..., Any])

#: What `omitted` returns for an entry without a default.
REQUIRED = inspect.Parameter.empty


def key(mapping: Mapping[str, Any]) -> str:
    """Content key of a mapping.

    Parameters
    ----------
    mapping : mapping
        Of numbers, texts, lists and mappings. The order of its entries does not matter, and a
        number is the same however it was written: 1 or 1.0, 0.1 or 1e-1.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    return hashlib.sha256(text(mapping).encode()).hexdigest()


def same(one: Any, other: Any) -> bool:
    """Whether two plain values give the same key; 1 and 1.0 do, 1 and True do not."""
    return text(one) == text(other)


def text(value: Any) -> str:
    """One text of all plain values that give the same key."""
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
        By the name of the entry: its default of before, which keys go on to leave out.

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
    """The defaults of before that `omits` states of a class or function; empty for any other."""
    stated: Mapping[str, Any] = getattr(target, "__omitted__", {})
    return stated


def omitted(target: Callable[..., Any], name: str) -> Any:
    """The value that keys leave out: the default, or the one that `omits` states.

    Parameters
    ----------
    target : callable
        A class or function.
    name : str
        One of its parameters.

    Returns
    -------
    Any
        `REQUIRED` where there is no default, or no such parameter.
    """
    stated = earlier_defaults(target)
    return stated[name] if name in stated else _default(target, name)


def _default(target: Callable[..., Any], name: str) -> Any:
    """Today's default; `REQUIRED` where there is none."""
    for field in fields(target) if is_dataclass(target) else ():
        if field.name == name and field.default_factory is not MISSING:
            return field.default_factory()
        if field.name == name and field.default is not MISSING:
            return field.default
    parameter = inspect.signature(target).parameters.get(name)
    return REQUIRED if parameter is None else parameter.default


def changed_defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Today's defaults of the entries whose default has changed (see `omits`)."""
    return {name: _default(target, name) for name in earlier_defaults(target)}


def differing(value: Any, plain: Callable[[Any], Any] = lambda entry: entry) -> dict[str, Any]:
    """Entries of a dataclass that differ from what keys leave out.

    Parameters
    ----------
    value : dataclass instance
    plain : callable
        Gives an entry as numbers, texts, lists and mappings.

    Returns
    -------
    dict of str to Any
        Plain entries by name.
    """
    made: Callable[..., Any] = type(value)
    found = {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return {
        name: entry
        for name, entry in found.items()
        if omitted(made, name) is REQUIRED or not same(entry, plain(omitted(made, name)))
    }


def difference(
    stated: Mapping[str, Any], asked: Mapping[str, Any], absent: str = "none"
) -> str | None:
    """The first entry in which two configurations differ, for a message.

    Parameters
    ----------
    stated, asked : mapping
        The configuration on disk, and the one asked for.
    absent : str
        Said of an entry that one of them lacks.

    Returns
    -------
    str or None
        As ``late_phase.members = 4, you ask for 8``; None if they are the same.
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
    if first.endswith(".sha256"):  # of the content of a file
        return f"another content of {first.removesuffix('.sha256')}{more}"
    before, now = (
        json.dumps(part[first], default=str) if first in part else absent for part in (one, other)
    )
    return f"{first} = {before:.40}, you ask for {now:.40}{more}"


def _entries(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold; lists of tables by index."""
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        inner = {str(index): one for index, one in enumerate(value)}.items()
    else:
        yield where, value
        return
    for name, entry in inner:
        yield from _entries(entry, f"{where}.{name}" if where else str(name))
