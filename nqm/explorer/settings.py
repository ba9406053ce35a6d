"""What the controls state, and what follows from it: a configuration, two tables, sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nqm.algorithms import Algorithm
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.gamma import base_scale
from nqm.problems import spectra
from nqm.problems.quadratic import Problem
from nqm.runs import config
from nqm.tuning.stability import stability_edge

if TYPE_CHECKING:
    import pandas as pd

    from nqm.program import Phase

#: Methods after T0, and the entries of a phase that the controls do not set.
METHODS: dict[str, dict[str, Any]] = {
    "late_phase": {},
    "ensemble": {},
    "sgd": {},
    "heavy_ball": {"momentum": 0.9},
    "swa": {},
    "ema": {"decay": 0.99},
    "lawa": {"every": 10, "window": 10},
    "schedule_free": {},
    "lookahead": {},
}
#: Those with members.
WITH_MEMBERS = ("late_phase", "ensemble")
#: Ensemble sizes that `Exploration.rates` compares, beside the chosen one.
SIZES = (1, 4, 16)
#: Learning rates of `Exploration.rates`, as shares of the largest stable rate of plain SGD.
RATES = np.geomspace(1e-3, 0.98, 25)
#: Columns of a `Problem` that a table [problem] may state, beside the curvature.
_VECTORS = ("noise_variance", "multiplicity", "initial_mean", "initial_variance", "minimum")
#: Gradient noise C = H, of spectra that come without noise.
NOISE: Mapping[str, Any] = {"scale": 1.0, "exponent": 1.0}


def problem_of_file(path: Path, name: str) -> dict[str, Any]:
    """Table [problem] of a spectrum's file: with the file's noise, or C = H where it has none.

    Parameters
    ----------
    path : Path
        A file that `nqm.problems.spectra.read_fields` reads.
    name : str
        Its name in the table.

    Returns
    -------
    dict

    Raises
    ------
    NQMError
        If the file is no spectrum.
    """
    known = "noise_variance" in spectra.read_fields(path)
    return {"file": name} if known else {"file": name, "noise": NOISE}


@dataclass(frozen=True)
class Exploration:
    """SGD until T0, then one method on as many examples.

    Attributes
    ----------
    problem : mapping
        The table [problem] of a configuration file.
    method : str
        Algorithm after T0, one of `METHODS`.
    members : int
        K, for methods with members.
    gamma : "mean", "sum" or float
        Scale of the summed base gradient of late-phase weights.
    first_lr, later_lr : float
        Learning rates before and after T0; members have the latter too.
    batch_size : int
        Examples of one minibatch of one member.
    switch : int
        T0, steps of SGD.
    later : int
        Steps of plain SGD that the examples after T0 would be; K members take later / K steps.
    folder : Path
        Folder to which a file of the problem is relative.

    Raises
    ------
    NQMError
        If a value is out of its range.
    """

    problem: Mapping[str, Any]
    method: str = "late_phase"
    members: int = 10
    gamma: str | float = "mean"
    first_lr: float = 0.5
    later_lr: float = 0.1
    batch_size: int = 8
    switch: int = 400
    later: int = 400
    folder: Path = Path()

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        for name, low in (("members", 1), ("batch_size", 1), ("switch", 0), ("later", 1)):
            check_integer(name, getattr(self, name), low)
        for name in ("first_lr", "later_lr"):
            check_number(name, getattr(self, name), low=0.0, closed_low=False)

    @property
    def size(self) -> int:
        """Number of members: K, or 1 for methods without members."""
        return self.members if self.method in WITH_MEMBERS else 1

    @property
    def sharpest(self) -> float:
        """Largest curvature of the problem."""
        return float(self._problem().curvature.max())

    def configuration(self) -> dict[str, Any]:
        """The experiment as a configuration of ``nqm run``.

        Returns
        -------
        dict of str to Any

        Raises
        ------
        NQMError
            If the examples after T0 are not enough for one step of all members.
        """
        steps = self.later // self.size
        if steps == 0:
            raise NQMError(
                f"{self.later} minibatches after T0 are not enough for one step of K = {self.size} "
                "members; take fewer members or more minibatches"
            )
        own: dict[str, Any] = {"algorithm": self.method, **METHODS[self.method]}
        if self.method in WITH_MEMBERS:
            own["members"] = self.members
        if self.method == "late_phase":
            own["gamma"] = self.gamma
        first = {"algorithm": "sgd", "lr": self.first_lr, "steps": self.switch}
        second = own | {"lr": self.later_lr, "steps": steps}
        phases = [first, second] if self.switch else [second]
        return {
            "problem": dict(self.problem),
            "phase": [phase | {"batch_size": self.batch_size} for phase in phases],
        }

    def toml(self) -> str:
        """The configuration as the text of a file for ``nqm run``.

        Returns
        -------
        str
        """
        made = self.configuration()
        lines = ["[problem]", *_entries(made["problem"])]
        for phase in made["phase"]:
            lines += ["", "[[phase]]", *_entries(phase)]
        return "\n".join([*lines, ""])

    def built(self) -> config.Run:
        """The experiment as a run that can be solved.

        Returns
        -------
        Run
        """
        return config.build(self.configuration(), self.folder)

    def curves(self) -> pd.DataFrame:
        """Exact expected losses against examples.

        Returns
        -------
        DataFrame
            Columns series (``before``, ``mean model``, ``average member``, ``sgd``), examples,
            loss. Rows of ``sgd`` go on with plain SGD at the later rate after T0.
        """
        import pandas as pd

        whole = self.built().solve().table()
        late = whole["step"] >= self.switch
        parts = [_series(whole[late], "mean model")]
        if self.size > 1:
            parts.append(_series(whole[late], "average member", "member_loss"))
        if self.method != "sgd":
            plain = replace(self, method="sgd").built().solve().table()
            parts.append(_series(plain[plain["step"] >= self.switch], "sgd"))
        if self.switch:
            parts.insert(0, _series(whole[whole["step"] <= self.switch], "before"))
        return pd.concat(parts, ignore_index=True)

    def rates(self) -> pd.DataFrame:
        """Exact expected loss at the end against the later rate, for several K at equal data.

        Returns
        -------
        DataFrame
            Columns members, lr, loss; losses above the start's, or not finite, are left out. K for
            which the examples are not enough are left out too.
        """
        import pandas as pd

        sizes = sorted({*SIZES, self.size}) if self.method in WITH_MEMBERS else [1]
        top = 2.0 / self.sharpest
        rows = []
        for size in sizes:
            if size > self.later:
                continue
            for rate in RATES * top:
                one = replace(self, members=size, later_lr=float(rate))
                result = one.built()
                end = result.program.steps
                loss = float(replace(result, at=[end]).solve().loss[-1])
                rows.append({"members": size, "lr": float(rate), "loss": loss})
        table = pd.DataFrame(rows)
        start = self._problem().initial_loss
        kept: pd.DataFrame = table[np.isfinite(table["loss"]) & (table["loss"] < start)]
        return kept.reset_index(drop=True)

    def words(self) -> list[str]:
        """What a reader of the picture should know, in sentences.

        Returns
        -------
        list of str
            Stability of each phase, the loss at the end beside that of SGD, the effective rate of
            late-phase weights, and the least loss that a linear method could reach.
        """
        from nqm.tuning.information import program_bound

        run, problem = self.built(), self._problem()
        lines = list(self._instabilities(run.program.phases, problem))
        if lines:
            return lines
        end = run.program.steps
        result = replace(run, at=[end]).solve()
        loss = float(result.loss[-1])
        lines.append(f"Loss at the end: {loss:.4g}.")
        if self.method != "sgd":
            plain = replace(self, method="sgd").built()
            sgd = float(replace(plain, at=[plain.program.steps]).solve().loss[-1])
            lines[0] = (
                f"Loss at the end: {loss:.4g}; plain SGD on the same examples: {sgd:.4g} "
                f"({_ratio(loss, sgd)})."
            )
        if self.method == "late_phase":
            gamma = base_scale(self.gamma, self.members)
            effective = self.later_lr * (1.0 + gamma * self.members)
            lines.append(
                f"The mean model has the losses of SGD at rate {effective:.3g} on minibatches of "
                f"{self.members * self.batch_size}: compare methods over rates, not at one rate."
            )
        least = float(program_bound(problem, run.program, [end])[-1])
        if np.isfinite(least):
            lines.append(
                f"No linear method could get below {least:.4g} with these "
                f"{int(result.examples[-1]):,} examples."
            )
        return lines

    def _problem(self) -> Problem:
        return replace(self, members=1).built().additive("explore")

    def _instabilities(self, phases: tuple[Phase, ...], problem: Problem) -> Iterator[str]:
        """A sentence for each phase whose rate is at or above its stability edge."""
        for number, phase in enumerate(phases):
            assert isinstance(phase.algorithm, Algorithm)  # all of METHODS are
            edge = stability_edge(problem, phase.algorithm, batch_size=self.batch_size)
            rate = self.first_lr if number == 0 and self.switch else self.later_lr
            if rate >= edge:
                name = "before T0" if number == 0 and self.switch else "after T0"
                yield (
                    f"Unstable {name}: the rate {rate:.3g} is not below {edge:.3g}, beyond which "
                    "the direction of the largest curvature grows at every step."
                )


def problem_table(problem: Problem) -> dict[str, Any]:
    """State a problem as the table [problem] of a configuration file.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    dict of str to Any
        Vectors as lists; a vector of equal entries as one number.

    Raises
    ------
    NQMError
        If directions are correlated, which the table does not state.
    """
    if problem.correlated:
        raise NQMError(
            "explore: a problem with correlated directions cannot be stated in a file of settings; "
            "expected losses do not depend on correlations: leave them out"
        )
    table: dict[str, Any] = {"curvature": problem.curvature.tolist()}
    for name in _VECTORS:
        values = getattr(problem, name)
        table[name] = float(values[0]) if (values == values[0]).all() else values.tolist()
    return table


def _series(table: pd.DataFrame, name: str, column: str = "loss") -> pd.DataFrame:
    """Rows of one curve, of the mean model or of the average member."""
    return table[["examples", column]].rename(columns={column: "loss"}).assign(series=name)


def _ratio(loss: float, other: float) -> str:
    if not np.isfinite(other) or other <= 0:
        return "which diverges"
    return f"{loss / other:.2f} times it"


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in table.items()]


def _value(value: Any) -> str:
    """One value in TOML; JSON's numbers, texts and lists are also TOML's."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_entries(value)) + " }"
    return json.dumps(value)
