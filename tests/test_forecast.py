"""The laws beside which forecasts stand, against sums written as their papers print them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.forecast import annealing, multi_power
from nqm import SGD, Constant, Cosine, Log, Phase, WarmupStableDecay

STEPS = 240
AT = np.arange(20, STEPS + 1, 10)
SCHEDULES = {
    "constant": Constant(0.1),
    "cosine": Cosine(0.1, 0.0, over=STEPS),
    "plateau": WarmupStableDecay(peak=0.1, end=0.0, warmup=0, stable=160, decay=80),
}
#: A law's forecast of losses that follow it, when its fit has converged.
CONVERGED = 1e-5


def rates(name: str) -> NDArray[np.float64]:
    return np.asarray(SCHEDULES[name](np.arange(STEPS)) * np.ones(STEPS))


def multi_power_losses(name: str) -> list[float]:
    """Luo et al.: each fall of the rate takes B (1 - (1 + C lr^-gamma S)^-beta) of its size off."""
    lr = rates(name)
    losses = []
    for t in AT:
        loss = 2.0 + 1.5 * lr[:t].sum() ** -0.4
        for k in range(1, t):
            if lr[k] > 0:
                x = 0.5 * lr[k] ** -0.3 * lr[k:t].sum()
                loss -= 3.0 * (lr[k - 1] - lr[k]) * (1 - (1 + x) ** -0.6)
        losses.append(float(loss))
    return losses


def annealing_losses(name: str) -> list[float]:
    """Tissue et al.: L0 + A S1^-alpha - C S2, each fall weighed by the steps since, at 0.99."""
    lr = rates(name)
    losses = []
    for t in AT:
        s2 = sum(
            (lr[k - 1] - lr[k]) * 0.99 ** (i - k) for i in range(1, t) for k in range(1, i + 1)
        )
        losses.append(float(1.0 + 0.8 * lr[:t].sum() ** -0.5 - 0.05 * s2))
    return losses


@pytest.mark.parametrize("known", [("constant", "cosine"), ("cosine",)])
@pytest.mark.parametrize(
    ("law", "truth"), [(multi_power, multi_power_losses), (annealing, annealing_losses)]
)
def test_a_law_forecasts_what_follows_it(law, truth, known) -> None:
    logs = {n: Log(AT, truth(n), Phase(SGD(), lr=SCHEDULES[n], steps=STEPS)) for n in SCHEDULES}
    forecast = law([logs[name] for name in known], logs["plateau"])
    np.testing.assert_allclose(forecast, logs["plateau"].losses, rtol=CONVERGED)
