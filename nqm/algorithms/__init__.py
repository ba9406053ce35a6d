"""The roster: every algorithm by the name used in configuration files."""

from __future__ import annotations

from nqm.algorithms.averaging import EMA, LAWA, SWA
from nqm.algorithms.base import Algorithm, Mode, Optimizer
from nqm.algorithms.lookahead import Lookahead
from nqm.algorithms.members import Ensemble, LatePhase
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.optimizers import SGD, HeavyBall, Nesterov
from nqm.algorithms.wrapper import Wrapper

ROSTER: dict[str, type[Algorithm] | type[MultiplicativeLatePhase]] = {
    "sgd": SGD,
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
    "ema": EMA,
    "swa": SWA,
    "lawa": LAWA,
    "lookahead": Lookahead,
    "ensemble": Ensemble,
    "late_phase": LatePhase,
    "late_phase_multiplicative": MultiplicativeLatePhase,
}

__all__ = [
    "EMA",
    "LAWA",
    "ROSTER",
    "SGD",
    "SWA",
    "Algorithm",
    "Ensemble",
    "HeavyBall",
    "LatePhase",
    "Lookahead",
    "Mode",
    "MultiplicativeLatePhase",
    "Nesterov",
    "Optimizer",
    "Wrapper",
]
