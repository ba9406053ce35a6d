"""Configurations: TOML files that state a problem, a program, and a method of solution.

The mapping of a file (`nqm.runs.toml.load`) is not changed and is identified by its content
(`key`); `build` turns it into objects.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nqm import __version__, keys
from nqm.algorithms import ROSTER
from nqm.algorithms.base import Algorithm, Nonlinear
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.files import check_regular
from nqm.problems import spectra
from nqm.problems.least_squares import LeastSquares, power_law
from nqm.problems.quadratic import Problem
from nqm.problems.random_features import random_features, random_features_equivalent
from nqm.program import Phase, Program, steps_for
from nqm.result import check_level, check_sampled
from nqm.runs import toml
from nqm.runs.toml import Mapped, call, known_keys, leaf, located, lookup, named, require, table_at
from nqm.solvers._kernels.fast_normals import check_precision

if TYPE_CHECKING:
    import pandas as pd

    from nqm.result import Trajectory
    from nqm.table import Stamp

#: Text in messages for an entry that a configuration does not state.
ABSENT = "its default"
SPECTRA: dict[str, Callable[..., Any]] = {
    "harmonic": spectra.harmonic,
    "power_law": spectra.power_law,
    "log_uniform": spectra.log_uniform,
    "marchenko_pastur": spectra.marchenko_pastur,
    "two_cluster": spectra.two_cluster,
}

#: Least-squares problems that define their target and start.
MODELS: dict[str, Callable[..., LeastSquares]] = {
    "power_law": power_law,
    "random_features": random_features,
    "random_features_equivalent": random_features_equivalent,
}

METHODS = ("jump", "moments", "sample", "closure")
#: Random numbers of the cells of a sweep: own ones for each cell, or the same ones for all.
STREAMS = ("own", "common")

_TOP = (
    "problem",
    "phase",
    "record",
    "method",
    "replicas",
    "seed",
    "precision",
    "control",
    "streams",
    "sweep",
)
_PROBLEM = (
    *("curvature", "spectrum", "file"),
    *("noise_variance", "minimum_variance", "noise"),
    *("initial_mean", "initial_variance", "minimum"),
    *("inputs", "label_noise", "model"),
    *("multiplicity", "precondition", "bins"),
)
_TABLES = ("problem", "phase", "record", "sweep")
_START = ("initial_mean", "initial_variance", "minimum")
_CURVATURE = ("curvature", "spectrum", "file")
_NOISE = ("noise_variance", "minimum_variance", "noise")
#: Entries of least squares, whose noise follows from its inputs and labels.
_INPUTS = ("inputs", "label_noise", "model")


@dataclass(frozen=True)
class Run:
    """A problem, a program, and a method of solution.

    Attributes
    ----------
    problem : Problem or LeastSquares
        Problem of d directions.
    program : Program
        Phases that are run from the problem's start.
    at : list of int, optional
        Steps to record; about 100 by default.
    quantiles : list of float
        Levels of the quantiles of the loss that the table contains.
    bound : bool
        Whether the table contains what no linear method could beat (`bound`), and the loss above
        it (`regret`).
    method : {"jump", "moments", "sample", "closure"}
        Exact by powers, exact step by step (to first order for multiplicative late-phase weights),
        Monte Carlo, or a moment closure of multiplicative late-phase weights.
    replicas, seed : int
        Number of Monte Carlo runs, and seed of their draws.
    precision : {"float64", "float32"}
        Precision of the Monte Carlo normals.
    control : bool
        Whether a control variate adjusts the Monte Carlo means (`nqm.sample`).
    streams : {"own", "common"}
        Random numbers of the Monte Carlo cells of a sweep: own ones for each cell, or those of
        `seed` for all cells, so that differences between cells scatter less.
    """

    problem: Problem | LeastSquares
    program: Program
    at: list[int] | None = None
    quantiles: tuple[float, ...] = ()
    bound: bool = False
    method: str = "jump"
    replicas: int = 1000
    seed: int = 0
    precision: str = "float64"
    control: bool = False
    streams: str = "own"

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        check_integer("replicas", self.replicas, 2)
        check_integer("seed", self.seed, 0)
        check_precision(self.precision)
        check_word("streams", self.streams, STREAMS)
        if self.control and self.method != "sample":
            raise NQMError(f"control is for method 'sample'; got method {self.method!r}")
        if self.method == "closure" and self.quantiles:
            raise NQMError(
                "record.quantiles: a moment closure has no distribution of the loss; use "
                'method = "sample", or drop record.quantiles'
            )
        if isinstance(self.problem, LeastSquares):
            self._check_least_squares()
        for level in self.quantiles:
            check_level("record.quantiles", level)
        if self.quantiles:
            self.problem.check_distribution("record.quantiles")
        if self.quantiles and self.method == "sample":
            check_sampled(self.problem, self.quantiles, self.replicas)
        elif self.quantiles and self.problem.correlated and isinstance(self.problem, Problem):
            from nqm.solvers.correlated import check_cost  # slow to load

            check_cost(self.problem, self.program)
        self.program.recorded(self.at)

    def _check_least_squares(self) -> None:
        """Raise NQMError for options that the solvers of least squares do not have."""
        if self.method == "closure":
            raise NQMError("method: 'closure' does not know least squares; use 'jump' or 'sample'")
        if self.quantiles and self.method != "sample":
            raise NQMError(
                "record.quantiles: least squares has no exact ones, as its weights are not "
                'Gaussian; use method = "sample"'
            )
        if self.bound:
            raise NQMError(
                "record.bound: no bound is known for least squares, whose noise depends on the "
                "weights; drop record.bound"
            )
        if self.precision != "float64" or self.control:
            name = "control" if self.control else "precision"
            raise NQMError(f"{name}: least squares is sampled literally, in float64; drop {name}")

    @property
    def work(self) -> int:
        """Units of progress of `solve` in all: replicas of Monte Carlo, or steps."""
        return self.replicas if self.method == "sample" else self.program.steps

    def check(self) -> None:
        """Check what only the solver can check, by a run of no steps.

        Raises
        ------
        NQMError
            If the solver refuses the run.
        """
        # For least squares one step is needed to see how a method draws its minibatches.
        least = 1 if isinstance(self.problem, LeastSquares) else 0
        phases = (replace(phase, steps=min(phase.steps, least)) for phase in self.program.phases)
        program = Program(tuple(phases))
        replace(self, program=program, at=[program.steps], replicas=3).solve()

    def solve(
        self, workers: int | None = 1, progress: Callable[[int], None] | None = None
    ) -> Trajectory:
        """Compute the expected loss at the recorded steps.

        Parameters
        ----------
        workers : int, optional
            Number of Monte Carlo threads, which does not change results; None for all processors.
        progress : callable, optional
            Called with the units of `work` done since the last call.

        Returns
        -------
        Trajectory
            Losses at the records.

        Raises
        ------
        NQMError
            If a method does not fit the problem, or if it would take too much memory or time.
        """
        # The compiled kernels are loaded only here: a mistake in a file is reported at once.
        if isinstance(self.problem, LeastSquares):
            return self._solve_least_squares(self.problem, progress)
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
                control=self.control,
                progress=progress,
            )
        if self.method == "closure":
            from nqm.solvers.closure import moment_closure

            return moment_closure(self.problem, self.program, self.at, progress=progress)
        from nqm.solvers.moments import solve

        jump = self.method == "jump"
        return solve(self.problem, self.program, self.at, jump=jump, progress=progress)

    def _solve_least_squares(
        self, problem: LeastSquares, progress: Callable[[int], None] | None
    ) -> Trajectory:
        """Solve least squares by its exact moments, or by its own sampler."""
        if self.method != "sample":
            from nqm.solvers.least_squares.moments import solve

            jump = self.method == "jump"
            return solve(problem, self.program, self.at, jump=jump, progress=progress)
        from nqm.solvers.least_squares.sample import sample

        result = sample(problem, self.program, self.at, replicas=self.replicas, seed=self.seed)
        if progress is not None:
            progress(self.work)
        return result

    def steady(self) -> pd.DataFrame:
        """Compute the steady state of the last phase.

        Returns
        -------
        DataFrame
            One row; two for multiplicative late-phase weights (``kind`` first_order and long_run).

        Raises
        ------
        NQMError
            If the phase has no steady state.
        """
        last = self.program.phases[-1]
        if isinstance(self.problem, LeastSquares):
            from nqm.solvers.least_squares.moments import steady

            return steady(self.problem, last).table()
        from nqm.solvers.steady import settle

        return settle(self.problem, last)

    def additive(self, asked: str) -> Problem:
        """Return the problem for a command that needs noise independent of the weights.

        Parameters
        ----------
        asked : str
            Name of the command, for the message.

        Returns
        -------
        Problem
            `problem` itself.

        Raises
        ------
        NQMError
            If the problem is a `LeastSquares`.
        """
        if isinstance(self.problem, LeastSquares):
            raise NQMError(
                f"{asked} does not know least squares (problem.inputs); sweep phase.0.lr instead"
            )
        return self.problem

    def table(
        self, workers: int | None = 1, progress: Callable[[int], None] | None = None
    ) -> pd.DataFrame:
        """Compute the result of `solve` as a table.

        Parameters
        ----------
        workers, progress
            As in `solve`.

        Returns
        -------
        DataFrame
            Columns of `Trajectory.table`, one for each level of `quantiles`, and bound and regret
            if asked for.
        """
        from nqm.table import quantile_name

        result = self.solve(workers, progress)
        frame = result.table()
        if self.quantiles:
            values = result.quantiles(self.quantiles)
            for level, column in zip(self.quantiles, values.T, strict=True):
                frame[quantile_name(level)] = column
        if self.bound:
            from nqm.tuning.information import program_bound

            least = program_bound(self.additive("record.bound"), self.program, self.at)
            frame["bound"], frame["regret"] = least, frame["loss"] - least
        return frame


def key(mapping: Mapped, folder: str | Path = ".") -> str:
    """Compute the content key of a configuration from the entries that differ from defaults.

    Parameters
    ----------
    mapping : mapping
        Result of `nqm.runs.toml.load`, or a part of it.
    folder : str or Path
        Folder to which the name of the problem's file is relative; the key depends on the content
        of the file.

    Returns
    -------
    str
        Equal for a stated default and an omitted one, and for any spelling of a number, schedule
        or algorithm.

    Raises
    ------
    NQMError
        If the problem's file cannot be read.
    """
    return keys.key(without_defaults(resolve_files(mapping, folder)))


def stamp(mapping: Mapped, folder: str | Path = ".") -> Stamp:
    """Build the stamp of a table of this configuration.

    Parameters
    ----------
    mapping, folder
        As in `key`.

    Returns
    -------
    Stamp
        Content key, version and configuration.
    """
    from nqm.table import Stamp  # slow to load

    stated = resolve_files(mapping, folder)
    made = keys.key(without_defaults(stated))
    return Stamp(made, __version__, stated, without_defaults, absent=ABSENT)


def without_defaults(mapping: Mapped) -> dict[str, Any]:
    """Remove the entries of a configuration that equal their defaults.

    Parameters
    ----------
    mapping : mapping
        Result of `resolve_files`. It is not checked: unknown entries are not changed.

    Returns
    -------
    dict of str to Any
        With one spelling of every number, schedule and algorithm.
    """
    kept = toml.without_defaults(Run, {n: v for n, v in mapping.items() if n not in _TABLES})
    record = mapping.get("record")
    if isinstance(record, Mapping):
        record = toml.without_defaults(Run, record)
        kept |= {"record": record} if record else {}
    elif "record" in mapping:
        kept["record"] = record
    if "problem" in mapping:
        problem = mapping["problem"]
        kept["problem"] = _plain_problem(problem) if isinstance(problem, Mapping) else problem
    if "phase" in mapping:
        phases = mapping["phase"]
        listed = isinstance(phases, list)
        kept["phase"] = [_plain_phase(one) for one in phases] if listed else phases
    return kept


def _plain_problem(table: Mapped) -> dict[str, Any]:
    """Entries of a ``[problem]`` table that differ from the defaults."""
    kept = dict(table)
    if "file" not in table:  # a file may state these itself
        own = {name: kept.pop(name) for name in (*_START, "multiplicity") if name in kept}
        kept |= toml.without_defaults(Problem, own)
    if "inputs" in table and "label_noise" in kept:
        kept |= toml.without_defaults(LeastSquares, {"label_noise": kept.pop("label_noise")})
    for name, known in (("spectrum", SPECTRA), ("model", MODELS)):
        if name in kept:
            kept[name] = toml.tagged(kept[name], "name", known)
    if isinstance(kept.get("noise"), Mapping):
        kept["noise"] = toml.without_defaults(spectra.power_noise, kept["noise"])
    return kept


def _plain_phase(table: Any) -> Any:
    """Entries of a phase's table that differ from the defaults."""
    name = table.get("algorithm") if isinstance(table, Mapping) else None
    if not isinstance(name, str) or name not in ROSTER:
        return table
    kept = {n: value for n, value in table.items() if n != "algorithm"}
    return {"algorithm": name} | toml.without_defaults(
        Phase, toml.without_defaults(ROSTER[name], kept)
    )


def resolve_files(mapping: Mapped, folder: str | Path) -> dict[str, Any]:
    """Replace the name of the problem's file by the digest of its content.

    Parameters
    ----------
    mapping : mapping
        A configuration; it is not changed.
    folder : str or Path
        Folder to which the name of the file is relative.

    Returns
    -------
    dict of str to Any
        A copy with ``problem.file = {"sha256": ...}``.

    Raises
    ------
    NQMError
        If the file cannot be read.
    """
    resolved = copy.deepcopy(dict(mapping))
    problem = resolved.get("problem")
    if isinstance(problem, dict) and isinstance(problem.get("file"), str):
        path = Path(folder, problem["file"])
        try:
            check_regular(path)
            with open(path, "rb") as stream:
                problem["file"] = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        except NQMError as error:
            raise NQMError(f"problem.file: {error}") from None
        except OSError as error:
            raise NQMError(f"problem.file: cannot read {path}: {error.strerror}") from None
    return resolved


# --- building --------------------------------------------------------------------------------


def build(mapping: Mapped, folder: str | Path = ".") -> Run:
    """Build the run that a configuration describes.

    Parameters
    ----------
    mapping : mapping
        Result of `nqm.runs.toml.load`; a ``sweep`` table is ignored.
    folder : str or Path
        Folder to which file names in it are relative.

    Returns
    -------
    Run
        Checked, but not computed.

    Raises
    ------
    NQMError
        If an entry is unknown, missing or wrong; the message names its dotted key.
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
    known_keys("record", record, ("at", "quantiles", "bound"))
    options: dict[str, Any] = {}
    if "quantiles" in record:
        options["quantiles"] = leaf("record.quantiles", record["quantiles"], tuple[float, ...])
    if "bound" in record:
        options["bound"] = leaf("record.bound", record["bound"], bool)
    hints: dict[str, Any] = {"method": str, "replicas": int, "seed": int, "precision": str}
    hints |= {"control": bool, "streams": str}
    for name, hint in hints.items():
        if name in mapping:
            options[name] = leaf(name, mapping[name], hint)
    problem = build_problem(table_at("problem", mapping["problem"]), folder)
    program = Program(tuple(_phase(f"phase.{i}", phase) for i, phase in enumerate(phases)))
    if "at" in record:
        stated = record["at"]
        if isinstance(stated, list):
            stated = [program.steps if step == "end" else step for step in stated]
        options["at"] = leaf("record.at", stated, list[int])
    return Run(problem, program, **options)


def build_problem(table: Mapped, folder: str | Path = ".") -> Problem | LeastSquares:
    """Build the problem that a ``[problem]`` table describes.

    Parameters
    ----------
    table : mapping
        The table.
    folder : str or Path
        Folder to which a file name in it is relative.

    Returns
    -------
    Problem or LeastSquares
        The second if the table has an entry ``inputs``.

    Raises
    ------
    NQMError
        If an entry is unknown, missing or wrong; the message names its dotted key.
    """
    known_keys("problem", table, _PROBLEM)
    if "inputs" in table:
        return _least_squares(table)
    for name in _INPUTS:
        if name in table:
            raise NQMError(
                f'problem.{name} is for least squares; add inputs = "gaussian" or drop {name}'
            )
    source = _one_of(table, _CURVATURE, "curvature")
    fields = _vectors(table)
    problem = (_from_file if source == "file" else _from_curvature)(table, source, fields, folder)
    if "precondition" in table:
        problem = _preconditioned(problem, table["precondition"])
    if "bins" in table:
        bins = leaf("problem.bins", table["bins"], int)
        check_integer("problem.bins", bins, 1)
        problem = problem.binned(bins)
    return problem


def _from_file(table: Mapped, source: str, fields: dict[str, Any], folder: str | Path) -> Problem:
    """Problem of a file, with noise of its own or as the table states it."""
    path = Path(folder, leaf("problem.file", table["file"], str))
    read = spectra.read_fields(path)
    for name in ("noise_variance", "multiplicity"):
        noises = [one for one in (_NOISE if name in _NOISE else (name,)) if one in table]
        if name in read and noises:
            raise NQMError(
                f"problem.{noises[0]} and the column {name!r} of problem.file exclude each other; "
                "drop one"
            )
    if "noise_variance" in read:
        return Problem(**read).replace(**fields)
    if not any(name in table for name in _NOISE):
        raise NQMError(
            f"{path}: column 'noise_variance' is missing; add it, or state the noise by one of "
            f"{', '.join(f'problem.{name}' for name in _NOISE)}"
        )
    return _with_noise(table, read.pop("curvature"), read | fields)


def _from_curvature(
    table: Mapped, source: str, fields: dict[str, Any], folder: str | Path
) -> Problem:
    """Problem of stated eigenvalues or a named spectrum."""
    _one_of(table, _NOISE, "noise")
    return _with_noise(table, _curvature(table, source, fields), fields)


def _with_noise(table: Mapped, curvature: Any, fields: dict[str, Any]) -> Problem:
    """Problem of known curvatures, with the noise that the table states."""
    noise = _one_of(table, _NOISE, "noise")
    if noise == "noise":
        # `Problem` reports a negative or NaN curvature before its power is computed.
        curvature = Problem(curvature, 0.0 * np.asarray(curvature)).curvature
        settings = table["noise"]
        if isinstance(settings, int | float):
            raise NQMError(
                "problem.noise must be a table, {scale = 1.0, exponent = 1.0}; "
                f"got {settings}; the same noise in all directions is noise_variance = {settings}"
            )
        settings = table_at("problem.noise", settings)
        variance = call(spectra.power_noise, settings, "problem.noise", {"curvature": curvature})
        return Problem(curvature, variance, **fields)
    stated = leaf(f"problem.{noise}", table[noise], float | list[float])
    make = Problem if noise == "noise_variance" else Problem.from_minimum_noise
    problem: Problem = located("problem", lambda: make(curvature, stated, **fields))
    return problem


def _preconditioned(problem: Problem, stated: Any) -> Problem:
    """Problem in which SGD is SGD with gradients times stated numbers, or a power of curvature."""
    where = "problem.precondition"
    if not isinstance(stated, Mapping):
        factors: Any = leaf(where, stated, float | list[float])
    else:
        known_keys(where, stated, ("exponent",))
        require(where, stated, "exponent")
        exponent = leaf(f"{where}.exponent", stated["exponent"], float)
        check_number(f"{where}.exponent", exponent)
        if np.any(problem.curvature == 0.0) and exponent != 0.0:
            raise NQMError(
                f"{where}.exponent: some curvature is 0, which has no power above 0 and below "
                "infinity; drop flat directions, or list the numbers"
            )
        with np.errstate(over="ignore"):
            factors = problem.curvature**exponent
    made: Problem = located("problem", lambda: problem.precondition(factors))
    return made


def _least_squares(table: Mapped) -> LeastSquares:
    """One-pass least squares: Gaussian inputs, noisy labels."""
    check_word("problem.inputs", leaf("problem.inputs", table["inputs"], str), ("gaussian",))
    for name in (*_NOISE, "file", "precondition", "bins"):
        if name in table:
            raise NQMError(f"problem.{name} and problem.inputs exclude each other; drop one")
    source = _one_of(table, ("curvature", "spectrum", "model"), "the inputs")
    fields = _vectors(table)
    label_noise = leaf("problem.label_noise", table.get("label_noise", 0.0), float)
    if source == "model":
        if fields:
            name = next(iter(fields))
            raise NQMError(f"problem.{name} follows from problem.model; drop {name}")
        settings = dict(table_at("problem.model", table["model"]))
        require("problem.model", settings, "name")
        make = lookup("problem.model.name", settings.pop("name"), MODELS)
        check_number("problem.label_noise", label_noise, low=0.0)
        model: LeastSquares = call(
            make, settings, "problem.model", {"label_noise": label_noise}, tag="name"
        )
        return model
    curvature = _curvature(table, source, fields)
    made: LeastSquares = located("problem", lambda: LeastSquares(curvature, label_noise, **fields))
    return made


def _vectors(table: Mapped) -> dict[str, Any]:
    """Start, minimum and multiplicity, if stated."""
    return {
        name: leaf(f"problem.{name}", table[name], float | list[float])
        for name in (*_START, "multiplicity")
        if name in table
    }


def _curvature(table: Mapped, source: str, fields: dict[str, Any]) -> Any:
    """Curvature from its list or its named spectrum, which may set the multiplicity."""
    if source == "curvature":
        return leaf("problem.curvature", table["curvature"], float | list[float])
    curvature = named("problem.spectrum", table["spectrum"], "name", SPECTRA)
    if isinstance(curvature, tuple):
        if "multiplicity" in fields:
            raise NQMError(
                "problem.multiplicity follows from this spectrum; drop problem.multiplicity"
            )
        curvature, fields["multiplicity"] = curvature
    return curvature


def _one_of(table: Mapped, names: tuple[str, ...], what: str) -> str:
    stated = [name for name in names if name in table]
    if len(stated) != 1:
        got = " and ".join(stated) or "none"
        raise NQMError(f"problem: state {what} by exactly one of {', '.join(names)}; got {got}")
    return stated[0]


def _phase(where: str, table: Any) -> Phase:
    table = table_at(where, table)
    own = [name for name in toml.signature(Phase)[0] if name != "algorithm"]
    if "examples" in table and "steps" in table:
        raise NQMError(f"{where}.examples and {where}.steps exclude each other; drop one")
    require(where, table, "algorithm")
    cls = lookup(f"{where}.algorithm", table["algorithm"], ROSTER)
    theirs = list(toml.signature(cls)[0])
    known_keys(where, table, ("algorithm", "examples", *own, *theirs))
    algorithm = call(cls, {n: v for n, v in table.items() if n in theirs}, where)
    rest = {name: value for name, value in table.items() if name in own}
    if "examples" in table:
        examples = leaf(f"{where}.examples", table["examples"], float)
        check_number(f"{where}.examples", examples, low=0.0)
        size = toml.schedule(f"{where}.batch_size", rest.get("batch_size", 1))
        steps = located(where, lambda: steps_for(algorithm, examples, batch_size=size))
        return call(Phase, rest, where, {"algorithm": algorithm, "steps": steps})  # type: ignore[no-any-return]
    phase: Phase = call(Phase, rest, where, {"algorithm": algorithm})
    return phase


def _algorithm(where: str, value: Any) -> Algorithm | Nonlinear:
    """Build an inner algorithm from its name, or a table with its name and parameters."""
    made: Algorithm | Nonlinear = named(where, value, "algorithm", ROSTER)
    return made


toml.builds(Algorithm, _algorithm, "algorithm", ROSTER)
