"""What a comparison of combined models computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from neural.combine.align import ALIGNS
from neural.combine.pool import POOLS
from neural.combine.repair import REPAIRS
from neural.combine.rules import RULES, Linear, Merge
from neural.combine.weigh import WEIGHTS
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.runs import toml

Section = TypeVar("Section")

#: Weights of predictions that differ by example (`neural.combine.gate`).
GATE = "gate"


@dataclass(frozen=True)
class CombineConfig:
    """Settings of a comparison: the table ``[combine]``.

    Attributes
    ----------
    rules : tuple of str
        Rules that merge weights (`neural.combine.rules.RULES`).
    pools : tuple of str
        How predictions are pooled: ``probabilities``, ``logits``.
    weights : tuple of str
        Weights of pooled predictions: ``uniform``, ``accuracy``, ``inverse_loss``, ``best``, or
        ``gate``, by how sure the members are of an example.
    align : str
        How hidden units are put into the first member's order: ``none``, ``weights``,
        ``activations``.
    repair : tuple of str
        What is done to a merged model: ``statistics`` (BatchNorm statistics anew), ``rescale``
        (REPAIR), ``none``. Each is reported.
    held_out : float
        Share of the test images on which rules and temperatures are chosen; results are those on
        the others. 0: none, and temperatures are tuned two-fold.
    shifts : tuple of str
        Corruptions of the test images, or ``corruptions`` for all.
    severities : tuple of int
        Of the corruptions, 1 to 5.
    predict : bool
        Whether losses are predicted from derivatives at the mean (`neural.combine.surrogate`).
    predict_examples : int
        Test examples at which the derivatives are taken.
    swag : int
        Draws of SWAG (`neural.combine.swag`) that take the place of the members, the snapshots of
        one run; 0: the members themselves.
    seed : int
        Of the held-out part, and of these draws.
    """

    rules: tuple[str, ...] = ("uniform", "greedy")
    pools: tuple[str, ...] = ("probabilities",)
    weights: tuple[str, ...] = ("uniform",)
    align: str = "none"
    repair: tuple[str, ...] = ("statistics",)
    held_out: float = 0.2
    shifts: tuple[str, ...] = ()
    severities: tuple[int, ...] = (3,)
    predict: bool = True
    predict_examples: int = 1000
    swag: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        known: dict[str, Mapping[str, Any]] = {
            "rules": RULES,
            "pools": POOLS,
            "weights": {**WEIGHTS, GATE: None},
            "repair": REPAIRS,
        }
        for name, roster in known.items():
            values = getattr(self, name)
            for value in values:
                check_word(f"CombineConfig.{name}", value, tuple(roster))
            if len(set(values)) < len(values):
                raise NQMError(f"CombineConfig.{name} names one twice: {list(values)}")
        check_word("CombineConfig.align", self.align, tuple(ALIGNS))
        if not self.repair:
            raise NQMError('CombineConfig.repair must name one at least, e.g. ["none"]; got []')
        check_number("CombineConfig.held_out", self.held_out, low=0.0, high=1.0, closed_high=False)
        for severity in self.severities:
            if severity not in range(1, 6):
                raise NQMError(f"CombineConfig.severities must be 1 to 5; got {severity}")
        check_integer("CombineConfig.predict_examples", self.predict_examples, 1)
        check_integer("CombineConfig.swag", self.swag, 0)
        if self.swag == 1:
            raise NQMError("CombineConfig.swag must be 0, or at least 2 draws; got 1")
        check_integer("CombineConfig.seed", self.seed, 0)


def load_section(
    kind: Callable[..., Section],
    name: str,
    path: Path | None = None,
    overrides: Sequence[str] = (),
) -> Section:
    """Read settings that are one table.

    Parameters
    ----------
    kind : callable
        Dataclass of the settings.
    name : str
        Of the table.
    path : Path, optional
        TOML file with this table and no other.
    overrides : sequence of str
        ``key=value``, e.g. ``low_precision.draws=8``.

    Returns
    -------
    object
        The settings.

    Raises
    ------
    NQMError
        If a key or value is wrong; the message names the dotted key.
    """
    mapping: dict[str, Any] = {} if path is None else toml.load(path)
    toml.override(mapping, overrides)
    toml.check_sections(mapping, {name: tuple(toml.signature(kind)[0])})
    toml.known_keys("", mapping, (name,))
    made: Section = toml.call(kind, toml.table_at(name, mapping.get(name, {})), name)
    return made


def load_config(
    path: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[CombineConfig, dict[str, Merge]]:
    """Read the settings of a comparison.

    Parameters
    ----------
    path : Path, optional
        TOML file with ``[combine]`` and, for options of a rule, ``[rule.NAME]``.
    overrides : sequence of str
        ``key=value``, e.g. ``combine.held_out=0.1`` or ``rule.fisher.examples=500``.

    Returns
    -------
    config : CombineConfig
    rules : dict of str to Merge
        The rules to apply, by name.

    Raises
    ------
    NQMError
        If a key or value is wrong; the message names the dotted key.
    """
    mapping: dict[str, Any] = {} if path is None else toml.load(path)
    toml.override(mapping, overrides)
    names = tuple(toml.signature(CombineConfig)[0])
    toml.check_sections(mapping, {"combine": names})
    toml.known_keys("", mapping, ("combine", "rule"))
    config: CombineConfig = toml.call(
        CombineConfig, toml.table_at("combine", mapping.get("combine", {})), "combine"
    )
    options = toml.table_at("rule", mapping.get("rule", {}))
    for name in options:
        if name not in config.rules:
            raise NQMError(f"rule.{name} is not in combine.rules, {list(config.rules)}; add it")
    return config, {name: _rule(name, options.get(name, {})) for name in config.rules}


def _rule(name: str, table: Any) -> Merge:
    """A rule of the roster with some options changed."""
    rule = RULES[name]
    changes = dict(toml.table_at(f"rule.{name}", table))
    if not changes:
        return rule
    part: Any = rule.weigh if isinstance(rule, Linear) else rule
    held = {one.name: getattr(part, one.name) for one in fields(part)}
    toml.known_keys(f"rule.{name}", changes, tuple(held))
    plain = {k: v for k, v in held.items() if isinstance(v, int | float | str | tuple | None)}
    made: Any = toml.call(type(part), plain | changes, f"rule.{name}")
    return replace(rule, weigh=made) if isinstance(rule, Linear) else made
