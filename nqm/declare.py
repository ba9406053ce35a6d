"""TOML tables as the calls they stand for, field by field.

A table's entries are converted to the annotations of what the table names, and every mistake is
reported under its dotted key. `load` reads a file as a plain mapping, `key` identifies a mapping by
its content, `call` builds what it describes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from nqm.errors import NQMError, suggest
from nqm.schedule import SCHEDULES, Schedule, as_schedule

Mapped = Mapping[str, Any]

#: Beyond this, counts are no longer exact as floats, nor as numbers in JSON.
LARGEST = 2**53

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    float | list[float]: "a number or a list of numbers",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    tuple[int, ...]: "a list of whole numbers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of texts",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping a TOML file holds, changed by ``key=value`` overrides.

    Parameters
    ----------
    path : str or Path
    overrides : sequence of str
        As ``phase.0.lr=0.1``: a dotted key, lists by index, and a value in TOML (anything that
        is not TOML is taken as text).
    """
    path = Path(path)
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NQMError(f"{path}: no such file") from None
    except OSError as error:
        raise NQMError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NQMError(f"{path} is not valid TOML: {error}") from None
    override(mapping, overrides)
    return mapping


def override(mapping: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply ``key=value`` settings in place (see `load`)."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise NQMError(f"an override must read key=value; got {setting!r}")
        assign(mapping, name.strip(), _toml_value(text.strip()))


def assign(mapping: dict[str, Any], name: str, value: Any) -> None:
    """Set the dotted key `name` in place, lists by index; tables on the way are made."""
    here: Any = mapping
    parts = name.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(here, list):
            index: Any = _index(where, part, len(here))
        elif isinstance(here, dict):
            index = part
            if not last and part not in here:
                here[part] = {}
        else:
            above = ".".join(parts[:depth])
            raise NQMError(f"{name}: {above} is {here!r:.40}, not a table; set {above} itself")
        if last:
            here[index] = value
        else:
            here = here[index]


def _index(where: str, part: str, size: int) -> int:
    if not part.lstrip("-").isdigit() or not -size <= int(part) < size:
        raise NQMError(f"{where}: expected an index from 0 to {size - 1}; got {part!r}")
    return int(part)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def key(mapping: Mapped) -> str:
    """Content key of a mapping; a number is the same however it was written, 1 or 1.0."""
    content = json.dumps(_canonical(mapping), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    """A number is the same however it was written: 1 and 1.0."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


#: Annotated class -> how an entry of that kind is built; schedules are built in.
_BUILDERS: dict[type, Callable[[str, Any], Any]] = {}


def builds(kind: type, build: Callable[[str, Any], Any]) -> None:
    """Have entries annotated with `kind` built by ``build(where, value)``."""
    _BUILDERS[kind] = build


def schedule(where: str, value: Any) -> Schedule:
    """A schedule by its table, or a constant by its number."""
    if isinstance(value, Mapping):
        made: Schedule = named(where, value, "schedule", SCHEDULES)
        return made
    return as_schedule(leaf(where, value, float), where)


def named(where: str, value: Any, tag: str, known: Mapping[str, Any]) -> Any:
    """Call what the entry `tag` of a table names with the table's other entries."""
    if isinstance(value, str):
        value = {tag: value}
    table = dict(table_at(where, value))
    require(where, table, tag)
    return call(lookup(f"{where}.{tag}", table.pop(tag), known), table, where, tag=tag)


def lookup(where: str, name: Any, known: Mapping[str, Any]) -> Any:
    """What `name` names; NQMError with a suggestion if nothing."""
    if not isinstance(name, str) or name not in known:
        raise NQMError(f"{where} {name!r} is unknown{suggest(str(name), known)}")
    return known[name]


def call(
    target: Callable[..., Any],
    table: Mapped,
    where: str,
    given: Mapped | None = None,
    *,
    tag: str | None = None,
) -> Any:
    """``target(**table, **given)`` with every entry of `table` converted to its annotation."""
    given = given or {}
    stated, hints = signature(target)
    parameters = {n: p for n, p in stated.items() if n not in given}
    known_keys(where, table, (*([tag] if tag else []), *parameters))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty:
            require(where, table, name)
    values = {n: _convert(f"{where}.{n}", value, hints[n]) for n, value in table.items()}
    return located(where, lambda: target(**values, **given))


@cache
def signature(
    target: Callable[..., Any],
) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """Parameters of a callable and their annotations."""
    return inspect.signature(target).parameters, get_type_hints(target)


def _convert(where: str, value: Any, hint: Any) -> Any:
    """A value of the annotated type: an algorithm, a schedule or several, or a plain value."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    for kind, build in _BUILDERS.items():
        if any(issubclass(one, kind) for one in kinds):
            return build(where, value)
    if Schedule not in kinds:
        return leaf(where, value, hint)
    if get_origin(hint) is not tuple:
        return schedule(where, value)
    if not isinstance(value, list):
        raise NQMError(f"{where} must be a list of schedules; got {value!r:.60}")
    return tuple(schedule(f"{where}.{i}", entry) for i, entry in enumerate(value))


def leaf(where: str, value: Any, hint: Any) -> Any:
    """A plain value of the annotated type, strictly."""
    try:
        plain = msgspec.convert(value, hint, strict=True)
        if isinstance(plain, int) and abs(plain) > LARGEST:
            raise NQMError(f"{where} must lie within +-2^53; got {plain!s:.40}")
        return plain
    except msgspec.ValidationError as error:
        _, _, inside = str(error).partition(" - at `$")
        at = inside.rstrip("`").replace("[", ".").replace("]", "")
        wrong = value
        for part in at.split(".")[1:]:
            wrong = wrong[int(part)]
        if inside.strip("`"):  # one entry of a list
            hint = next((kind for kind in (int, str) if kind in get_args(hint)), float)
        elif type(None) in (options := get_args(hint)):
            hint = options[0]
        expected = _WORDS.get(hint, str(error))
        raise NQMError(f"{where}{at} must be {expected}; got {wrong!r:.60}") from None


def located(where: str, make: Callable[[], Any]) -> Any:
    """Call `make`; an error that names a class's field names the dotted key instead."""
    try:
        return make()
    except NQMError as error:
        message = str(error)
        head, _, rest = message.partition(" ")
        _, dot, field = head.partition(".")
        if not dot or head.endswith(":"):
            raise NQMError(f"{where}: {message}") from None
        raise NQMError(f"{where}.{field} {rest}") from None


def table_at(where: str, value: Any) -> Mapped:
    """`value` itself; NQMError unless it is a table."""
    if not isinstance(value, Mapping):
        raise NQMError(f"{where} must be a table; got {value!r:.40}")
    return value


def require(where: str, table: Mapped, name: str) -> None:
    """Raise NQMError unless the table has the entry."""
    if name not in table:
        raise NQMError(f"{where}.{name} is missing; add {name} = ...")


def known_keys(where: str, table: Mapped, known: Sequence[str]) -> None:
    """Raise NQMError, with a suggestion, on an entry that is not known."""
    for name in table:
        if name not in known:
            dotted = f"{where}.{name}" if where else name
            raise NQMError(f"{dotted} is not a known key{suggest(str(name), known)}")
