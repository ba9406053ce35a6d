"""Branches: runs with varied settings from one start, the ingredients of a soup."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.runs import toml

#: More than anyone trains.
MOST_BRANCHES = 10_000
_RANGES = ("log", "uniform")


@dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """How many runs an arm has for each seed, and in what they differ.

    Attributes
    ----------
    count : int
        N, the number of branches.
    vary : mapping
        Dotted key of a run's entry -> what is drawn for it in each branch: ``{log = [a, b]}``, a
        log-uniform number; ``{uniform = [a, b]}``; or a list, one of its entries.
    seed : int
        Of these draws. Those of a branch do not depend on `count`.
    """

    count: int
    vary: Mapping[str, Any]
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("BranchesConfig.count", self.count, 1)
        if self.count > MOST_BRANCHES:
            raise NQMError(
                f"BranchesConfig.count must be at most {MOST_BRANCHES}; got {self.count}"
            )
        check_integer("BranchesConfig.seed", self.seed, 0)
        for name, choice in self.vary.items():
            _check_choice(f"BranchesConfig.vary.{name}", name, choice)
        keys = list(self.vary)
        for one in keys:
            if any(other.startswith(f"{one}.") for other in keys):
                raise NQMError(f"BranchesConfig.vary.{one} overlaps another key; vary one of them")

    def settings(self, branch: int) -> dict[str, Any]:
        """Draw the settings of a branch.

        Parameters
        ----------
        branch : int
            0 to N - 1.

        Returns
        -------
        dict
            Dotted key -> value.
        """
        rng = np.random.default_rng((self.seed, branch))
        return {name: _drawn(choice, rng) for name, choice in self.vary.items()}


def _check_choice(where: str, name: str, choice: Any) -> None:
    if name.partition(".")[0] == "seed":
        raise NQMError(f"{where} cannot vary; branches of a checkpoint have seeds of their own")
    if name == "model.checkpoint":
        raise NQMError(f"{where} cannot vary; all branches have one start")
    if isinstance(choice, list | tuple):
        if not choice:
            raise NQMError(f"{where} must list at least one value; got []")
        return
    kind = next(iter(choice)) if isinstance(choice, Mapping) and len(choice) == 1 else None
    if kind not in _RANGES:
        raise NQMError(
            f"{where} must be a list of values, {{log = [a, b]}} or {{uniform = [a, b]}}; got "
            f"{shown(choice)}"
        )
    ends = choice[kind]
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise NQMError(f"{where}.{kind} must be two numbers; got {shown(ends)}")
    for end in ends:
        if kind == "log":
            check_number(f"{where}.log", end, low=0.0, closed_low=False)
        else:
            check_number(f"{where}.uniform", end)
    if ends[0] > ends[1]:
        raise NQMError(f"{where}.{kind} must not fall; got {list(ends)}")


def _drawn(choice: Any, rng: np.random.Generator) -> Any:
    if not isinstance(choice, Mapping):
        return copy.deepcopy(choice[int(rng.integers(len(choice)))])
    kind, (low, high) = next(iter(choice.items()))
    share = float(rng.random())
    if kind == "uniform":
        return low + share * (high - low)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def expanded(
    config: BranchesConfig, mapping: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The branches of an arm.

    Parameters
    ----------
    config : BranchesConfig
    mapping : mapping
        The arm's run, as `neural.training.config.build` takes it.

    Yields
    ------
    name : str
        ``branch00`` and so on, in which order sorts.
    mapping : dict
        Of the branch's run.

    Raises
    ------
    NQMError
        If an entry that varies lies in a section that the arm has not.
    """
    width = len(str(config.count - 1))
    for name in config.vary:
        if "." in name and name.partition(".")[0] not in mapping:
            raise NQMError(f"branches.vary.{name}: this arm has no such section")
    for branch in range(config.count):
        made = copy.deepcopy(dict(mapping))
        for name, value in config.settings(branch).items():
            toml.assign(made, name, value)
        yield f"branch{branch:0{width}d}", made
