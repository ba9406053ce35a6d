"""Computing time of the stages of a bridge, in gradients of the whole training set."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING

from neural.curvature.risk import EmpiricalRisk

if TYPE_CHECKING:
    import pandas as pd

#: Row of the cost table -> stages of the cache (`neural.curvature.cache`) that it sums.
STAGES = {
    "minimise": ("minimised",),
    "curvature and noise": ("second_moments", "eigenpairs", "krylov", "trace"),
    "averages": ("descent", "averages"),
    "third derivatives": ("slopes", "slopes_at_mean", "force", "balance", "balanced"),
    "test loss": ("test_loss",),
    "noise-free paths": ("noise_free_path",),
    "training": ("training", "example_slopes"),
    "density of the spectrum": ("density",),
}


def cost_table(
    risk: EmpiricalRisk, share: float, log: Mapping[tuple[str, str], float]
) -> pd.DataFrame:
    """Tabulate the wall time of the stages, also in gradients of all training examples.

    Parameters
    ----------
    risk : EmpiricalRisk
        Its gradient is timed three times, and the shortest time is used.
    share : float
        Fraction of the training set's examples that are in the risk.
    log : mapping of (str, str) to float
        Seconds of every result by its stage and key (`Cache.log`). A result that was read from its
        file has the seconds of its computation.

    Returns
    -------
    DataFrame
        Columns stage, seconds, epochs (seconds over those of one gradient of the training set).
    """
    import pandas as pd

    epoch = min(_seconds(risk) for _ in range(3)) / share
    known = {stage for stages in STAGES.values() for stage in stages}
    others = {stage: (stage,) for stage, _ in log if stage not in known}  # nothing is left out
    rows = []
    for name, stages in (STAGES | others).items():
        seconds = [spent for (stage, _), spent in log.items() if stage in stages]
        if seconds:
            rows.append((name, sum(seconds), sum(seconds) / epoch))
    return pd.DataFrame(rows, columns=["stage", "seconds", "epochs"])


def _seconds(risk: EmpiricalRisk) -> float:
    start = perf_counter()
    risk.gradient()
    return perf_counter() - start
