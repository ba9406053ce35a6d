"""The roster: every algorithm by the name used in configuration files."""

from __future__ import annotations

from nqm.algorithms.averaging import EMA as EMA
from nqm.algorithms.averaging import LAWA as LAWA
from nqm.algorithms.averaging import SWA as SWA
from nqm.algorithms.averaging import PolynomialAverage as PolynomialAverage
from nqm.algorithms.base import Algorithm as Algorithm
from nqm.algorithms.base import LimitingCase as LimitingCase
from nqm.algorithms.base import Mode as Mode
from nqm.algorithms.base import Nonlinear as Nonlinear
from nqm.algorithms.base import Optimizer as Optimizer
from nqm.algorithms.correlated_noise import CorrelatedNoise as CorrelatedNoise
from nqm.algorithms.decay import WeightDecay as WeightDecay
from nqm.algorithms.delay import DelayedSGD as DelayedSGD
from nqm.algorithms.federated import FedProx as FedProx
from nqm.algorithms.federated import Scaffold as Scaffold
from nqm.algorithms.local import Federated as Federated
from nqm.algorithms.local import LocalSGD as LocalSGD
from nqm.algorithms.lookahead import Lookahead as Lookahead
from nqm.algorithms.members import Ensemble as Ensemble
from nqm.algorithms.members import LatePhase as LatePhase
from nqm.algorithms.multiplicative import MultiplicativeLatePhase as MultiplicativeLatePhase
from nqm.algorithms.optimizers import SGD as SGD
from nqm.algorithms.optimizers import HeavyBall as HeavyBall
from nqm.algorithms.optimizers import Nesterov as Nesterov
from nqm.algorithms.optimizers import QuasiHyperbolicMomentum as QuasiHyperbolicMomentum
from nqm.algorithms.pace import Pace as Pace
from nqm.algorithms.rounding import Rounded as Rounded
from nqm.algorithms.sampled import Adam as Adam
from nqm.algorithms.sampled import Sampled as Sampled
from nqm.algorithms.sampled import SampledSGD as SampledSGD
from nqm.algorithms.sampled import SignSGD as SignSGD
from nqm.algorithms.schedule_free import PrimalAverage as PrimalAverage
from nqm.algorithms.schedule_free import ScheduleFree as ScheduleFree
from nqm.algorithms.wrapper import Wrapper as Wrapper

ROSTER: dict[str, type[Algorithm] | type[Nonlinear]] = {
    "sgd": SGD,
    "heavy_ball": HeavyBall,
    "nesterov": Nesterov,
    "quasi_hyperbolic_momentum": QuasiHyperbolicMomentum,
    "delayed_sgd": DelayedSGD,
    "ema": EMA,
    "swa": SWA,
    "lawa": LAWA,
    "polynomial_average": PolynomialAverage,
    "schedule_free": ScheduleFree,
    "primal_average": PrimalAverage,
    "pace": Pace,
    "lookahead": Lookahead,
    "local_sgd": LocalSGD,
    "federated": Federated,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "weight_decay": WeightDecay,
    "rounded": Rounded,
    "correlated_noise": CorrelatedNoise,
    "ensemble": Ensemble,
    "late_phase": LatePhase,
    "late_phase_multiplicative": MultiplicativeLatePhase,
    "sampled_sgd": SampledSGD,
    "sign_sgd": SignSGD,
    "adam": Adam,
}
