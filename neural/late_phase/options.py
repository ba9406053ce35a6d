"""Options of late-phase members, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from nqm.errors import check_integer, check_number, check_word
from nqm.gamma import check_gamma
from nqm.limits import MEMBERS

NOISE_RULES = ("rms", "fan_in")
IDLE_STEPS = ("none", "first", "every")
LEFTOVERS = ("carry", "members", "drop")


@dataclass(frozen=True, kw_only=True)
class MemberOptions:
    """Options of `neural.LatePhase`, where they are documented in full.

    Attributes
    ----------
    members : int
        Number of members, K >= 2.
    gamma : {"sum", "mean"} or float
        Scale of the summed base gradient: 1, 1 / K, or a number >= 0.
    noise : float
        Relative size of the members' initial perturbation, >= 0.
    noise_rule : {"rms", "fan_in"}
        Standard deviation of the perturbation: relative to the weights, or to the fan-in.
    idle_steps : {"none", "first", "every"}
        When idle members are stepped too.
    leftover : {"carry", "members", "drop"}
        What is done with the last minibatches of a loader if they are fewer than K.

    Raises
    ------
    NQMError
        If an option is out of range.
    """

    members: int
    gamma: str | float = "sum"
    noise: float = 0.0
    noise_rule: str = "rms"
    idle_steps: str = "none"
    leftover: str = "carry"

    def __post_init__(self) -> None:
        check_integer("LatePhase.members", self.members, 2)
        check_number("LatePhase.members", self.members, high=MEMBERS)
        check_number("LatePhase.noise", self.noise, low=0.0)
        check_word("LatePhase.noise_rule", self.noise_rule, NOISE_RULES)
        check_word("LatePhase.idle_steps", self.idle_steps, IDLE_STEPS)
        check_word("LatePhase.leftover", self.leftover, LEFTOVERS)
        check_gamma("LatePhase.gamma", self.gamma)

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of `neural.LatePhase`.

        Returns
        -------
        dict of str to object
            Value by name; options of a subclass are not included.
        """
        return {option.name: getattr(self, option.name) for option in fields(MemberOptions)}
