"""The roster: every algorithm by the name used in configuration files."""

from __future__ import annotations

from nqm.algorithms.averaging import EMA, LAWA, SWA, PolynomialAverage
from nqm.algorithms.base import Algorithm, Mode, Nonlinear, Optimizer
from nqm.algorithms.decay import WeightDecay
from nqm.algorithms.local import Federated, LocalSGD
from nqm.algorithms.lookahead import Lookahead
from nqm.algorithms.members import Ensemble, LatePhase
from nqm.algorithms.multiplicative import MultiplicativeLatePhase
from nqm.algorithms.optimizers import SGD, HeavyBall, Nesterov
from nqm.algorithms.rounding import Rounded
from nqm.algorithms.sampled import Adam, Sampled, SampledSGD, SignSGD
from nqm.algorithms.schedule_free import ScheduleFree
from nqm.algorithms.wrapper import Wrapper

ROSTER: dict[str, type[Algorithm] | type[Nonlinear]] = {
    "sgd": SGD,
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
    "ema": EMA,
    "swa": SWA,
    "lawa": LAWA,
    "polynomial_average": PolynomialAverage,
    "schedule_free": ScheduleFree,
    "lookahead": Lookahead,
    "local_sgd": LocalSGD,
    "federated": Federated,
    "weight_decay": WeightDecay,
    "rounded": Rounded,
    "ensemble": Ensemble,
    "late_phase": LatePhase,
    "late_phase_multiplicative": MultiplicativeLatePhase,
    "sampled_sgd": SampledSGD,
    "sign_sgd": SignSGD,
    "adam": Adam,
}

__all__ = [
    "EMA",
    "LAWA",
    "ROSTER",
    "SGD",
    "SWA",
    "Adam",
    "Algorithm",
    "Ensemble",
    "Federated",
    "HeavyBall",
    "LatePhase",
    "LocalSGD",
    "Lookahead",
    "Mode",
    "MultiplicativeLatePhase",
    "Nesterov",
    "Nonlinear",
    "Optimizer",
    "PolynomialAverage",
    "Rounded",
    "Sampled",
    "SampledSGD",
    "ScheduleFree",
    "SignSGD",
    "WeightDecay",
    "Wrapper",
]
