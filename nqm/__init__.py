"""Noisy quadratic theory of SGD, weight averaging and late-phase weights.

Everything public is here; modules load on first use, so that ``nqm --help`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nqm.algorithms import (
        EMA,
        LAWA,
        ROSTER,
        SGD,
        SWA,
        Algorithm,
        Ensemble,
        HeavyBall,
        LatePhase,
        Lookahead,
        MultiplicativeLatePhase,
        Nesterov,
    )
    from nqm.balance import Balance, balance_point
    from nqm.errors import NQMError
    from nqm.problem import Problem
    from nqm.program import Phase, Program, constant
    from nqm.result import Kind, Status, Trajectory
    from nqm.schedule import (
        Constant,
        Cosine,
        Cyclic,
        Joined,
        Linear,
        Piecewise,
        Schedule,
        Warmup,
        WarmupStableDecay,
    )
    from nqm.solvers.moments import solve
    from nqm.solvers.sample import sample
    from nqm.solvers.scan import scan
    from nqm.solvers.steady import Steady, steady
    from nqm.sweep import Sweep
    from nqm.targets import (
        best_lr,
        best_lr_and_momentum,
        critical_batch_size,
        stability_edge,
        steps_to_target,
    )

_HOME = {
    "nqm.algorithms": (
        "EMA LAWA ROSTER SGD SWA Algorithm Ensemble HeavyBall LatePhase Lookahead "
        "MultiplicativeLatePhase Nesterov"
    ),
    "nqm.balance": "Balance balance_point",
    "nqm.errors": "NQMError",
    "nqm.problem": "Problem",
    "nqm.program": "Phase Program constant",
    "nqm.result": "Kind Status Trajectory",
    "nqm.schedule": (
        "Constant Cosine Cyclic Joined Linear Piecewise Schedule Warmup WarmupStableDecay"
    ),
    "nqm.solvers.moments": "solve",
    "nqm.solvers.sample": "sample",
    "nqm.solvers.scan": "scan",
    "nqm.solvers.steady": "Steady steady",
    "nqm.sweep": "Sweep",
    "nqm.targets": (
        "best_lr best_lr_and_momentum critical_batch_size stability_edge steps_to_target"
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'nqm' has no attribute {name!r}")
    return getattr(import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return [*_MODULE, "__version__"]
