"""TOML tables as calls of functions and classes, with one argument per entry.

Entries of a table are converted to the annotated types of the class that the table names, and every
mistake is reported with its dotted key. `load` reads a file as a plain mapping, `call` builds the
object, and `without_defaults` removes entries that equal their defaults.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from nqm.errors import NQMError, shown, suggest
from nqm.files import check_regular
from nqm.keys import REQUIRED, changed_defaults, omitted, text
from nqm.schedule import SCHEDULES, Constant, Schedule, as_schedule

Mapped = Mapping[str, Any]

#: Larger counts are not exact as floats, nor as numbers in JSON.
LARGEST = 2**53

#: Largest number of parts of a dotted key, and depth of tables within tables.
DEEPEST = 64
_DEEP = f"holds tables within tables more than {DEEPEST} deep"
#: Largest size of a configuration file, bytes.
LONGEST = 16 * 2**20

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
    """Read a TOML file and change it by ``key=value`` overrides.

    Parameters
    ----------
    path : str or Path
        TOML file.
    overrides : sequence of str
        Texts like ``phase.0.lr=0.1``: a dotted key (entries of a list by index) and a value in
        TOML. A value that is not TOML is a text.

    Returns
    -------
    dict of str to Any
        Entries of the file with the overrides.

    Raises
    ------
    NQMError
        If the file cannot be read or is no valid TOML, or an override does not fit it.
    """
    path = Path(path)
    if check_regular(path) > LONGEST:
        raise NQMError(f"{path} is no file of settings: it has more than {LONGEST >> 20} MiB")
    try:
        mapping = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NQMError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # invalid TOML or UTF-8, or an integer of thousands of digits
        reason = str(error).partition("; use sys.")[0]  # without advice to programmers
        raise NQMError(f"{path} is not valid TOML: {reason}") from None
    except RecursionError:
        raise NQMError(f"{path} {_DEEP}") from None
    _check_values(mapping, str(path))
    override(mapping, overrides)
    return mapping


def load_one(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file of one program, not of a grid of them.

    Parameters
    ----------
    path, overrides
        As in `load`.

    Returns
    -------
    dict of str to Any

    Raises
    ------
    NQMError
        As in `load`, and if the file has a table ``[sweep]``, which would be ignored.
    """
    mapping = load(path, overrides)
    if "sweep" in mapping:
        raise NQMError(f"{path} has a [sweep] table; nqm sweep and nqm soup read those")
    return mapping


def override(mapping: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply ``key=value`` settings in place.

    Parameters
    ----------
    mapping : dict
        Configuration, changed in place.
    settings : sequence of str
        Like `overrides` of `load`.

    Raises
    ------
    NQMError
        If a setting has no ``=``, or its key does not fit the mapping.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise NQMError(f"an override must read key=value; got {setting!r}")
        value = _toml_value(text.strip())
        assign(mapping, name.strip(), value)
        _check_values(mapping, f"--set {name.strip():.40}")


def _check_values(mapping: Mapped, where: str) -> None:
    """Raise NQMError if tables are nested too deep, or an integer exceeds all floats."""
    left: list[tuple[Any, int]] = [(mapping, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, Mapping | list):
            if depth > DEEPEST:
                raise NQMError(f"{where} {_DEEP}")
            inner = value.values() if isinstance(value, Mapping) else value
            left.extend((one, depth + 1) for one in inner)
        elif isinstance(value, int) and abs(value) > 2**1000:
            raise NQMError(f"{where} holds {shown(value, 40)}, which is beyond all numbers")


def assign(mapping: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a dotted key; missing tables are made.

    Parameters
    ----------
    mapping : dict
        Configuration, changed in place.
    name : str
        Dotted key; an entry of a list by its index.
    value : Any
        New value.

    Raises
    ------
    NQMError
        If there is no such index, or a part of the key is no table.
    """
    here: Any = mapping
    parts = name.split(".")
    if len(parts) > DEEPEST:
        raise NQMError(f"{name:.40}: a key has at most {DEEPEST} parts; got {len(parts)}")
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
            raise NQMError(f"{name}: {above} is {shown(here, 40)}, not a table; set {above} itself")
        if last:
            here[index] = value
        else:
            here = here[index]


def copied(value: Any) -> Any:
    """Copy tables and lists, so that each can be changed independently.

    Parameters
    ----------
    value : Any
        Table, list or plain value.

    Returns
    -------
    Any
        A copy in which no two entries share a table or list.
    """
    if isinstance(value, Mapping):
        return {name: copied(entry) for name, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def path_of(mapping: Mapped, name: str) -> tuple[str | int, ...]:
    """Split a dotted key into the keys and indices of a mapping.

    Parameters
    ----------
    mapping : mapping
        Configuration, which decides which parts are indices.
    name : str
        Dotted key.

    Returns
    -------
    tuple of str or int
        Keys, and indices >= 0.

    Raises
    ------
    NQMError
        If there is no such index.
    """
    path: list[str | int] = []
    here: Any = mapping
    for part in name.split("."):
        if isinstance(here, list):
            path.append(_index(name, part, len(here)) % len(here))
            here = here[int(part)]
        else:
            path.append(part)
            here = here.get(part) if isinstance(here, dict) else None
    return tuple(path)


def _index(where: str, part: str, size: int) -> int:
    if not re.fullmatch("-?[0-9]{1,9}", part) or not -size <= int(part) < size:
        raise NQMError(f"{where}: expected an index from 0 to {size - 1}; got {shown(part, 40)}")
    return int(part)


def _toml_value(text: str) -> Any:
    try:
        mapping = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    except RecursionError:
        raise NQMError(f"{text:.20}... {_DEEP}") from None
    return mapping["value"] if len(mapping) == 1 else text


#: Annotated class -> function that builds an entry of that kind; schedules need none.
_BUILDERS: dict[type, Callable[[str, Any], Any]] = {}
#: Annotated class -> the entry of its table that names the class, and the classes by name.
_TAGS: dict[type, tuple[str, Mapping[str, Any]]] = {Schedule: ("schedule", SCHEDULES)}


def builds(
    kind: type,
    build: Callable[[str, Any], Any],
    tag: str | None = None,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Register the function that builds entries annotated with a class.

    Parameters
    ----------
    kind : type
        The class.
    build : callable
        ``build(where, value)`` makes the object from an entry.
    tag : str, optional
        Entry of the table that names the object's class, as `named` reads it.
    known : mapping, optional
        The classes by name.
    """
    _BUILDERS[kind] = build
    if tag is not None and known is not None:
        _TAGS[kind] = tag, known
        _tagged_kind.cache_clear()


def schedule(where: str, value: Any) -> Schedule:
    """Build a schedule.

    Parameters
    ----------
    where : str
        Dotted key, for messages.
    value : mapping, float or list of float
        A table with the entry ``schedule``, a number for a constant, or one number a step.

    Returns
    -------
    Schedule
        The schedule.

    Raises
    ------
    NQMError
        If an entry is wrong; the message names its dotted key.
    """
    if isinstance(value, Mapping):
        made: Schedule = named(where, value, "schedule", SCHEDULES)
        return made
    if isinstance(value, list):
        return as_schedule(list(leaf(where, value, tuple[float, ...])), where)
    return as_schedule(leaf(where, value, float), where)


def named(where: str, value: Any, tag: str, known: Mapping[str, Any]) -> Any:
    """Call the function or class that an entry of a table names with the other entries.

    Parameters
    ----------
    where : str
        Dotted key of the table, for messages.
    value : mapping or str
        The table; a name stands for a table without other entries.
    tag : str
        Entry that holds the name.
    known : mapping
        Functions and classes by name.

    Returns
    -------
    Any
        Result of the call.

    Raises
    ------
    NQMError
        If an entry is wrong; the message names its dotted key.
    """
    if isinstance(value, str):
        value = {tag: value}
    table = dict(table_at(where, value))
    require(where, table, tag)
    return call(lookup(f"{where}.{tag}", table.pop(tag), known), table, where, tag=tag)


def lookup(where: str, name: Any, known: Mapping[str, Any]) -> Any:
    """Find an entry of a mapping by the name that the user gave.

    Parameters
    ----------
    where : str
        Dotted key, for messages.
    name : Any
        The name.
    known : mapping
        Entries by name.

    Returns
    -------
    Any
        The entry.

    Raises
    ------
    NQMError
        If the name is unknown; the message suggests one.
    """
    if not isinstance(name, str) or name not in known:
        raise NQMError(f"{where} {shown(name)} is unknown{suggest(str(name), known)}")
    return known[name]


def call(
    target: Callable[..., Any],
    table: Mapped,
    where: str,
    given: Mapped | None = None,
    *,
    tag: str | None = None,
) -> Any:
    """Call a function or class with the entries of a table, converted to annotated types.

    Parameters
    ----------
    target : callable
        Called as ``target(**table, **given)``.
    table : mapping
        Arguments by name.
    where : str
        Dotted key of the table, for messages.
    given : mapping, optional
        Further arguments, which are not converted.
    tag : str, optional
        Entry that named `target` and is no argument of it.

    Returns
    -------
    Any
        Result of the call.

    Raises
    ------
    NQMError
        If an entry is unknown, missing or wrong; the message names its dotted key.
    """
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
    """Find the parameters of a callable and their annotations.

    Parameters
    ----------
    target : callable
        Function or class.

    Returns
    -------
    parameters : mapping of str to inspect.Parameter
        Parameters by name.
    hints : dict of str to Any
        Annotated types by name.
    """
    return inspect.signature(target).parameters, get_type_hints(target)


def _convert(where: str, value: Any, hint: Any) -> Any:
    """Convert an entry to its annotated type: algorithm, schedule(s), or plain value."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    for kind, build in _BUILDERS.items():
        if any(issubclass(one, kind) for one in kinds):
            return build(where, value)
    if Schedule not in kinds:
        return leaf(where, value, hint)
    if get_origin(hint) is not tuple:
        return schedule(where, value)
    if not isinstance(value, list):
        raise NQMError(f"{where} must be a list of schedules; got {shown(value, 60)}")
    return tuple(schedule(f"{where}.{i}", entry) for i, entry in enumerate(value))


def without_defaults(target: Callable[..., Any], table: Mapped) -> dict[str, Any]:
    """Remove the entries of a table that equal defaults, and unify the spelling of the others.

    Parameters
    ----------
    target : callable
        Function or class that `call` would call with the table.
    table : mapping
        Arguments by name; an entry that `target` does not have is not changed.

    Returns
    -------
    dict of str to Any
        Without the entries whose value keys leave out (`nqm.keys.omitted`).
    """
    stated, hints = signature(target)
    kept = {}
    # A changed default is stated, although the table leaves it out.
    for name, value in (changed_defaults(target) | dict(table)).items():
        if name in stated:
            value = _spelled(value, hints.get(name))
            if text(value) == _omitted_text(target, name):
                continue
        kept[name] = value
    return kept


@cache
def _omitted_text(target: Callable[..., Any], name: str) -> str | None:
    """Canonical text of the value that keys leave out; None if there is none."""
    default = omitted(target, name)
    hint = signature(target)[1].get(name)
    return None if default is REQUIRED else text(_spelled(default, hint))


def _spelled(value: Any, hint: Any) -> Any:
    """Unique spelling of an entry, which may be plain as in a file or an object."""
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_origin(hint) in (tuple, list) else None
        return [_spelled(one, inner) for one in value]
    kind = _tagged_kind(hint)
    return value if kind is None else tagged(value, *_TAGS[kind])


@cache
def _tagged_kind(hint: Any) -> type | None:
    """Class of `_TAGS` that an annotation allows, or None."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    allowed = (kind for kind in _TAGS if any(issubclass(one, kind) for one in kinds))
    return next(allowed, None)


def tagged(value: Any, tag: str, known: Mapping[str, Any]) -> Any:
    """Unify the spelling of an entry that names its class.

    Parameters
    ----------
    value : Any
        A name, a table with the entry `tag`, or an object of one of the classes.
    tag : str
        Entry that holds the name.
    known : mapping
        Classes or functions by name.

    Returns
    -------
    str, dict or Any
        The name if all else equals the defaults; a table of the name and the other entries; the
        number of a constant schedule. Any other value is returned unchanged.
    """
    plain = isinstance(value, str | int | float | Mapping)
    names = [] if plain else [name for name, made in known.items() if type(value) is made]
    if names:
        value = {tag: names[0]} | {one.name: getattr(value, one.name) for one in fields(value)}
    if isinstance(value, str) and value in known:
        value = {tag: value}
    if not isinstance(value, Mapping) or not isinstance(value.get(tag), str):
        return value
    name = value[tag]
    if name not in known:
        return value
    rest = without_defaults(known[name], {n: one for n, one in value.items() if n != tag})
    if known[name] is Constant and rest.keys() == {"value"}:
        return rest["value"]
    return {tag: name} | rest if rest else name


def leaf(where: str, value: Any, hint: Any) -> Any:
    """Convert a plain value to a type, strictly: no text becomes a number.

    Parameters
    ----------
    where : str
        Dotted key, for messages.
    value : Any
        Number, text or list.
    hint : type
        Annotated type.

    Returns
    -------
    Any
        Value of that type.

    Raises
    ------
    NQMError
        If the value is of another type, or an integer beyond +-2^53.
    """
    try:
        plain = msgspec.convert(value, hint, strict=True)
        if isinstance(plain, int) and abs(plain) > LARGEST:
            raise NQMError(f"{where} must lie within +-2^53; got {shown(plain, 40)}")
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
        raise NQMError(f"{where}{at} must be {expected}; got {shown(wrong, 60)}") from None


def located(where: str, make: Callable[[], Any]) -> Any:
    """Call a function, and replace the field of a class in its errors by a dotted key.

    Parameters
    ----------
    where : str
        Dotted key of the object that is made.
    make : callable
        Function without arguments.

    Returns
    -------
    Any
        Result of the call.

    Raises
    ------
    NQMError
        Error of the function, with the dotted key.
    """
    try:
        return make()
    except NQMError as error:
        message = str(error)
        head, _, rest = message.partition(" ")
        _, dot, field = head.partition(".")
        if not dot or head.endswith(":"):
            raise NQMError(f"{where}: {message}") from None
        name = f"{where}.{field}"
        raise NQMError(f"{name} {rest}".replace(f" {head}", f" {name}")) from None


def table_at(where: str, value: Any) -> Mapped:
    """Check that an entry is a table.

    Parameters
    ----------
    where : str
        Its dotted key.
    value : Any
        The entry.

    Returns
    -------
    mapping
        `value` itself.

    Raises
    ------
    NQMError
        If it is not.
    """
    if not isinstance(value, Mapping):
        raise NQMError(f"{where} must be a table; got {shown(value, 40)}")
    return value


def require(where: str, table: Mapped, name: str) -> None:
    """Check that a table has an entry.

    Parameters
    ----------
    where : str
        Dotted key of the table.
    table : mapping
        The table.
    name : str
        Name of the entry.

    Raises
    ------
    NQMError
        If it has no such entry.
    """
    if name not in table:
        raise NQMError(f"{where}.{name} is missing; add {name} = ...")


#: Symbols of papers, and other common names -> the keys that the user may mean.
LETTERS: dict[str, tuple[str, ...]] = {
    "t0": ("start_epoch",),
    "k": ("members",),
    "b": ("batch_size", "batch_sizes"),
    "h": ("curvature",),
    "w0": ("initial_mean",),
    "eta": ("lr",),
    "learning_rate": ("lr",),
    "lr": ("member_lr",),
    "sigma": ("noise", "spread"),
    "beta": ("momentum", "decay"),
    "gamma_theta": ("gamma",),
    "wd": ("weight_decay",),
    "l2": ("weight_decay",),
}


def known_keys(where: str, table: Mapped, known: Sequence[str]) -> None:
    """Refuse unknown entries of a table.

    Parameters
    ----------
    where : str
        Dotted key of the table; empty for the top.
    table : mapping
        The table.
    known : sequence of str
        Entries that it may have.

    Raises
    ------
    NQMError
        If an entry is unknown; the message names it, and the key for this symbol of papers
        (`LETTERS`) or of similar spelling.
    """
    for name in table:
        if name not in known:
            meant = [word for word in LETTERS.get(str(name).lower(), ()) if word in known]
            hint = f"; {name} is {_dotted(where, meant[0])}" if meant else suggest(str(name), known)
            raise NQMError(f"{_dotted(where, name)} is not a known key{hint}")


def check_sections(mapping: Mapped, sections: Mapping[str, Sequence[str]]) -> None:
    """Refuse an entry in a table to which it does not belong.

    Parameters
    ----------
    mapping : mapping
        A configuration; its tables are not checked otherwise.
    sections : mapping of str to sequence of str
        Entries that each table may have.

    Raises
    ------
    NQMError
        If there is one; the message names the entry and its table.
    """
    tables = {name: mapping[name] for name in sections if isinstance(mapping.get(name), Mapping)}
    for section, table in {"": mapping, **tables}.items():
        own = sections[section] if section else tuple(sections)
        for name in table:
            words = (str(name), *LETTERS.get(str(name).lower(), ()))
            if any(word in own for word in words):
                continue
            homes = [(home, w) for w in words for home, known in sections.items() if w in known]
            if homes:
                meant = _dotted(*homes[0])
                raise NQMError(f"{_dotted(section, name)} is not a known key; {name} is {meant}")


def _dotted(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)
