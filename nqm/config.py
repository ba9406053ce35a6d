"""TOML files and what they describe: a problem, a program, and how to solve it.

The mapping a file holds (`nqm.declare.load`) is kept as it is and identified by its content
(`key`); `build` turns it into objects.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nqm import declare, spectra
from nqm.algorithms import ROSTER
from nqm.algorithms.base import Algorithm, Nonlinear
from nqm.declare import Mapped, call, known_keys, leaf, located, lookup, named, require, table_at
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.problem import Problem
from nqm.program import Phase, Program
from nqm.solvers.fast_normals import check_precision

if TYPE_CHECKING:
    import pandas as pd

    from nqm.result import Trajectory

SPECTRA: dict[str, Callable[..., Any]] = {
    "harmonic": spectra.harmonic,
    "power_law": spectra.power_law,
    "log_uniform": spectra.log_uniform,
    "marchenko_pastur": spectra.marchenko_pastur,
    "two_cluster": spectra.two_cluster,
}

METHODS = ("jump", "moments", "sample")

_TOP = ("problem", "phase", "record", "method", "replicas", "seed", "precision", "sweep")
_START = ("initial_mean", "initial_variance", "minimum")
_CURVATURE = ("curvature", "spectrum", "file")
_NOISE = ("noise_variance", "minimum_variance", "noise")


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
    precision : {"float64", "float32"}
        Of Monte Carlo's normals.
    """

    problem: Problem
    program: Program
    at: list[int] | None = None
    quantiles: tuple[float, ...] = ()
    method: str = "jump"
    replicas: int = 1000
    seed: int = 0
    precision: str = "float64"

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        check_integer("replicas", self.replicas, 2)
        check_integer("seed", self.seed, 0)
        check_precision(self.precision)
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
                precision=self.precision,
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


def key(mapping: Mapped, folder: str | Path = ".") -> str:
    """Content key of a configuration: a file that holds the problem counts by its content."""
    return declare.key(resolve_files(mapping, folder))


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
    known_keys("", mapping, _TOP)
    for name in ("problem", "phase"):
        if name not in mapping:
            header = "[problem]" if name == "problem" else "[[phase]]"
            raise NQMError(f"{name} is missing; add a {header} table")
    phases = mapping["phase"]
    if not isinstance(phases, list):
        raise NQMError(f"phase must be a list of tables, [[phase]] in TOML; got {phases!r:.40}")
    record = table_at("record", mapping.get("record", {}))
    known_keys("record", record, ("at", "quantiles"))
    options: dict[str, Any] = {}
    if "at" in record:
        options["at"] = leaf("record.at", record["at"], list[int])
    if "quantiles" in record:
        options["quantiles"] = leaf("record.quantiles", record["quantiles"], tuple[float, ...])
    hints: dict[str, Any] = {"method": str, "replicas": int, "seed": int, "precision": str}
    for name, hint in hints.items():
        if name in mapping:
            options[name] = leaf(name, mapping[name], hint)
    problem = build_problem(table_at("problem", mapping["problem"]), folder)
    program = Program(tuple(_phase(f"phase.{i}", phase) for i, phase in enumerate(phases)))
    return Run(problem, program, **options)


def build_problem(table: Mapped, folder: str | Path = ".") -> Problem:
    """The `Problem` that a ``[problem]`` table describes."""
    known_keys("problem", table, (*_CURVATURE, *_NOISE, *_START, "multiplicity", "bins"))
    source = _one_of(table, _CURVATURE, "curvature")
    fields = {
        name: leaf(f"problem.{name}", table[name], float | list[float])
        for name in (*_START, "multiplicity")
        if name in table
    }
    if source == "file":
        stated = [name for name in (*_NOISE, "multiplicity") if name in table]
        if stated:
            raise NQMError(f"problem.{stated[0]} and problem.file exclude each other; drop one")
        path = Path(folder, leaf("problem.file", table["file"], str))
        problem = spectra.read_problem(path).replace(**fields)
    else:
        noise = _one_of(table, _NOISE, "noise")
        if source == "spectrum":
            curvature = named("problem.spectrum", table["spectrum"], "name", SPECTRA)
            if isinstance(curvature, tuple):
                if "multiplicity" in fields:
                    raise NQMError(
                        "problem.multiplicity follows from this spectrum; drop problem.multiplicity"
                    )
                curvature, fields["multiplicity"] = curvature
        else:
            curvature = leaf("problem.curvature", table["curvature"], float | list[float])
        if noise == "noise":
            # A negative or NaN curvature is the problem's error to report, before its power.
            curvature = Problem(curvature, 0.0 * np.asarray(curvature)).curvature
            settings = table_at("problem.noise", table["noise"])
            variance = call(
                spectra.power_noise, settings, "problem.noise", {"curvature": curvature}
            )
            problem = Problem(curvature, variance, **fields)
        else:
            stated_noise = leaf(f"problem.{noise}", table[noise], float | list[float])
            make = Problem if noise == "noise_variance" else Problem.from_minimum_noise
            problem = located("problem", lambda: make(curvature, stated_noise, **fields))
    if "bins" in table:
        bins = leaf("problem.bins", table["bins"], int)
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
    table = table_at(where, table)
    own = [name for name in declare.signature(Phase)[0] if name != "algorithm"]
    require(where, table, "algorithm")
    cls = lookup(f"{where}.algorithm", table["algorithm"], ROSTER)
    theirs = list(declare.signature(cls)[0])
    known_keys(where, table, ("algorithm", *own, *theirs))
    algorithm = call(cls, {n: v for n, v in table.items() if n in theirs}, where)
    rest = {name: value for name, value in table.items() if name in own}
    phase: Phase = call(Phase, rest, where, {"algorithm": algorithm})
    return phase


def _algorithm(where: str, value: Any) -> Algorithm | Nonlinear:
    """An inner algorithm: its name, or a table with its name and parameters."""
    made: Algorithm | Nonlinear = named(where, value, "algorithm", ROSTER)
    return made


declare.builds(Algorithm, _algorithm)
