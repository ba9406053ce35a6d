"""TOML files and what they describe: a problem, a program, and how to solve it.

The mapping a file holds is kept as it is (`load`) and identified by its content (`key`); `build`
turns it into objects, field by field, so that every mistake is reported under its dotted name.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from nqm import spectra
from nqm.algorithms import ROSTER
from nqm.algorithms.base import Algorithm, Nonlinear
from nqm.errors import NQMError, check_integer, check_number, suggest
from nqm.problem import Problem
from nqm.program import Phase, Program
from nqm.schedule import SCHEDULES, Schedule, as_schedule

if TYPE_CHECKING:
    import pandas as pd

    from nqm.result import Trajectory

Mapped = Mapping[str, Any]

SPECTRA: dict[str, Callable[..., Any]] = {
    "harmonic": spectra.harmonic,
    "power_law": spectra.power_law,
    "log_uniform": spectra.log_uniform,
    "marchenko_pastur": spectra.marchenko_pastur,
    "two_cluster": spectra.two_cluster,
}

METHODS = ("jump", "moments", "sample")

#: Beyond this, counts are no longer exact as floats, nor as numbers in JSON.
LARGEST = 2**53

_TOP = ("problem", "phase", "record", "method", "replicas", "seed", "sweep")
_START = ("initial_mean", "initial_variance", "minimum")
_CURVATURE = ("curvature", "spectrum", "file")
_NOISE = ("noise_variance", "minimum_variance", "noise")
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
}


@dataclass(frozen=True)
class Run:
    """A problem, a program, and how to solve it.

    Attributes
    ----------
    at : list of int, optional
        Steps to record; about 100 by default.
    quantiles : list of float
        Levels of the loss's distribution over runs that the table should have.
    method : {"jump", "moments", "sample"}
        Exact by powers, exact step by step, or Monte Carlo.
    replicas, seed : int
        Of Monte Carlo.
    """

    problem: Problem
    program: Program
    at: list[int] | None = None
    quantiles: tuple[float, ...] = ()
    method: str = "jump"
    replicas: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise NQMError(f"method {self.method!r} is unknown{suggest(self.method, METHODS)}")
        check_integer("replicas", self.replicas, 2)
        check_integer("seed", self.seed, 0)
        for level in self.quantiles:
            check_number(
                "record.quantiles", level, low=0.0, high=1.0, closed_low=False, closed_high=False
            )
        self.program.recorded(self.at)

    @property
    def work(self) -> int:
        """What `solve` counts its progress in: replicas of Monte Carlo, or steps."""
        return self.replicas if self.method == "sample" else self.program.steps

    def check(self) -> None:
        """Raise what only the solver knows to be impossible, by a run of no steps."""
        phases = tuple(replace(phase, steps=0) for phase in self.program.phases)
        replace(self, program=Program(phases), at=[0], replicas=2).solve()

    def solve(
        self, workers: int | None = 1, progress: Callable[[int], None] | None = None
    ) -> Trajectory:
        """Expected loss at the recorded steps.

        Parameters
        ----------
        workers : int, optional
            Threads of Monte Carlo, which do not change its numbers; None for all processors.
        progress : callable, optional
            Told how much of `work` was done since it was told last.
        """
        # The compiled kernels are loaded only here: a mistake in a file is reported at once.
        if self.method == "sample":
            from nqm.solvers.sample import sample

            return sample(
                self.problem,
                self.program,
                self.at,
                replicas=self.replicas,
                seed=self.seed,
                workers=workers,
                progress=progress,
            )
        from nqm.solvers.moments import solve

        jump = self.method == "jump"
        return solve(self.problem, self.program, self.at, jump=jump, progress=progress)

    def table(
        self, workers: int | None = 1, progress: Callable[[int], None] | None = None
    ) -> pd.DataFrame:
        """`solve`, as a table with a column for each quantile asked for."""
        from nqm.table import quantile_name

        result = self.solve(workers, progress)
        frame = result.table()
        if self.quantiles:
            values = result.quantiles(self.quantiles)
            for level, column in zip(self.quantiles, values.T, strict=True):
                frame[quantile_name(level)] = column
        return frame


# --- reading ---------------------------------------------------------------------------------


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
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name.strip():
            raise NQMError(f"an override must read key=value; got {override!r}")
        assign(mapping, name.strip(), _toml_value(text.strip()))
    return mapping


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


def key(mapping: Mapped, folder: str | Path = ".") -> str:
    """Content key of a configuration: a file that holds the problem counts by its content."""
    content = json.dumps(_canonical(resolve_files(mapping, folder)), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def resolve_files(mapping: Mapped, folder: str | Path) -> dict[str, Any]:
    """Copy in which the problem's file is named by the digest of its content."""
    resolved = copy.deepcopy(dict(mapping))
    problem = resolved.get("problem")
    if isinstance(problem, dict) and isinstance(problem.get("file"), str):
        path = Path(folder, problem["file"])
        try:
            problem["file"] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        except OSError as error:
            raise NQMError(f"problem.file: cannot read {path}: {error.strerror}") from None
    return resolved


def _canonical(value: Any) -> Any:
    """A number is the same however it was written: 1 and 1.0."""
    if isinstance(value, Mapping):
        return {str(name): _canonical(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- building --------------------------------------------------------------------------------


def build(mapping: Mapped, folder: str | Path = ".") -> Run:
    """The objects a configuration describes.

    Parameters
    ----------
    mapping : mapping
        As from `load`; a ``sweep`` table is left alone.
    folder : str or Path
        Where the names of files in it start from.

    Raises
    ------
    NQMError
        Naming the dotted key at fault.
    """
    _known_keys("", mapping, _TOP)
    for name in ("problem", "phase"):
        if name not in mapping:
            header = "[problem]" if name == "problem" else "[[phase]]"
            raise NQMError(f"{name} is missing; add a {header} table")
    phases = mapping["phase"]
    if not isinstance(phases, list):
        raise NQMError(f"phase must be a list of tables, [[phase]] in TOML; got {phases!r:.40}")
    record = _table("record", mapping.get("record", {}))
    _known_keys("record", record, ("at", "quantiles"))
    options: dict[str, Any] = {}
    if "at" in record:
        options["at"] = _leaf("record.at", record["at"], list[int])
    if "quantiles" in record:
        options["quantiles"] = _leaf("record.quantiles", record["quantiles"], tuple[float, ...])
    hints: dict[str, Any] = {"method": str, "replicas": int, "seed": int}
    for name, hint in hints.items():
        if name in mapping:
            options[name] = _leaf(name, mapping[name], hint)
    problem = build_problem(_table("problem", mapping["problem"]), folder)
    program = Program(tuple(_phase(f"phase.{i}", phase) for i, phase in enumerate(phases)))
    return Run(problem, program, **options)


def build_problem(table: Mapped, folder: str | Path = ".") -> Problem:
    """The `Problem` that a ``[problem]`` table describes."""
    _known_keys("problem", table, (*_CURVATURE, *_NOISE, *_START, "multiplicity", "bins"))
    source = _one_of(table, _CURVATURE, "curvature")
    fields = {
        name: _leaf(f"problem.{name}", table[name], float | list[float])
        for name in (*_START, "multiplicity")
        if name in table
    }
    if source == "file":
        stated = [name for name in (*_NOISE, "multiplicity") if name in table]
        if stated:
            raise NQMError(f"problem.{stated[0]} and problem.file exclude each other; drop one")
        path = Path(folder, _leaf("problem.file", table["file"], str))
        problem = spectra.read_problem(path).replace(**fields)
    else:
        noise = _one_of(table, _NOISE, "noise")
        if source == "spectrum":
            curvature = _named("problem.spectrum", table["spectrum"], "name", SPECTRA)
            if isinstance(curvature, tuple):
                if "multiplicity" in fields:
                    raise NQMError(
                        "problem.multiplicity follows from this spectrum; drop problem.multiplicity"
                    )
                curvature, fields["multiplicity"] = curvature
        else:
            curvature = _leaf("problem.curvature", table["curvature"], float | list[float])
        if noise == "noise":
            # A negative or NaN curvature is the problem's error to report, before its power.
            curvature = Problem(curvature, 0.0 * np.asarray(curvature)).curvature
            settings = _table("problem.noise", table["noise"])
            variance = _call(
                spectra.power_noise, settings, "problem.noise", {"curvature": curvature}
            )
            problem = Problem(curvature, variance, **fields)
        else:
            stated_noise = _leaf(f"problem.{noise}", table[noise], float | list[float])
            make = Problem if noise == "noise_variance" else Problem.from_minimum_noise
            problem = _located("problem", lambda: make(curvature, stated_noise, **fields))
    if "bins" in table:
        bins = _leaf("problem.bins", table["bins"], int)
        check_integer("problem.bins", bins, 1)
        problem = problem.binned(bins)
    return problem


def _one_of(table: Mapped, names: tuple[str, ...], what: str) -> str:
    stated = [name for name in names if name in table]
    if len(stated) != 1:
        got = " and ".join(stated) or "none"
        raise NQMError(f"problem: state {what} by exactly one of {', '.join(names)}; got {got}")
    return stated[0]


def _phase(where: str, table: Any) -> Phase:
    table = _table(where, table)
    own = [name for name in _signature(Phase)[0] if name != "algorithm"]
    _require(where, table, "algorithm")
    cls = _lookup(f"{where}.algorithm", table["algorithm"], ROSTER)
    theirs = list(_signature(cls)[0])
    _known_keys(where, table, ("algorithm", *own, *theirs))
    algorithm = _call(cls, {n: v for n, v in table.items() if n in theirs}, where)
    rest = {name: value for name, value in table.items() if name in own}
    phase: Phase = _call(Phase, rest, where, {"algorithm": algorithm})
    return phase


def _algorithm(where: str, value: Any) -> Algorithm | Nonlinear:
    """An inner algorithm: its name, or a table with its name and parameters."""
    made: Algorithm | Nonlinear = _named(where, value, "algorithm", ROSTER)
    return made


def _schedule(where: str, value: Any) -> Schedule:
    if isinstance(value, Mapping):
        made: Schedule = _named(where, value, "schedule", SCHEDULES)
        return made
    return as_schedule(_leaf(where, value, float), where)


def _named(where: str, value: Any, tag: str, known: Mapping[str, Any]) -> Any:
    """Call what the entry `tag` of a table names with the table's other entries."""
    if isinstance(value, str):
        value = {tag: value}
    table = dict(_table(where, value))
    _require(where, table, tag)
    return _call(_lookup(f"{where}.{tag}", table.pop(tag), known), table, where, tag=tag)


def _lookup(where: str, name: Any, known: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in known:
        raise NQMError(f"{where} {name!r} is unknown{suggest(str(name), known)}")
    return known[name]


def _call(
    target: Callable[..., Any],
    table: Mapped,
    where: str,
    given: Mapped | None = None,
    *,
    tag: str | None = None,
) -> Any:
    """``target(**table, **given)`` with every entry of `table` converted to its annotation."""
    given = given or {}
    stated, hints = _signature(target)
    parameters = {n: p for n, p in stated.items() if n not in given}
    _known_keys(where, table, (*([tag] if tag else []), *parameters))
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty:
            _require(where, table, name)
    values = {n: _convert(f"{where}.{n}", value, hints[n]) for n, value in table.items()}
    return _located(where, lambda: target(**values, **given))


@cache
def _signature(
    target: Callable[..., Any],
) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    return inspect.signature(target).parameters, get_type_hints(target)


def _convert(where: str, value: Any, hint: Any) -> Any:
    """A value of the annotated type: an algorithm, a schedule or several, or a plain value."""
    kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]
    if any(issubclass(kind, Algorithm) for kind in kinds):
        return _algorithm(where, value)
    if Schedule not in kinds:
        return _leaf(where, value, hint)
    if get_origin(hint) is not tuple:
        return _schedule(where, value)
    if not isinstance(value, list):
        raise NQMError(f"{where} must be a list of schedules; got {value!r:.60}")
    return tuple(_schedule(f"{where}.{i}", entry) for i, entry in enumerate(value))


def _leaf(where: str, value: Any, hint: Any) -> Any:
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
            hint = int if int in get_args(hint) else float
        elif type(None) in (options := get_args(hint)):
            hint = options[0]
        expected = _WORDS.get(hint, str(error))
        raise NQMError(f"{where}{at} must be {expected}; got {wrong!r:.60}") from None


def _located(where: str, make: Callable[[], Any]) -> Any:
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


def _table(where: str, value: Any) -> Mapped:
    if not isinstance(value, Mapping):
        raise NQMError(f"{where} must be a table; got {value!r:.40}")
    return value


def _require(where: str, table: Mapped, name: str) -> None:
    if name not in table:
        raise NQMError(f"{where}.{name} is missing; add {name} = ...")


def _known_keys(where: str, table: Mapped, known: Sequence[str]) -> None:
    for name in table:
        if name not in known:
            dotted = f"{where}.{name}" if where else name
            raise NQMError(f"{dotted} is not a known key{suggest(str(name), known)}")
