"""Forecast a logged loss curve from others: the noisy quadratic against an annealing law.

    python -m benchmarks.forecast LOG.csv PROGRAM.toml ... HELD.csv HELD.toml

Logs are those of ``nqm neural train --log csv``, after their first 100 steps. The last pair is held
out. Its losses are forecast from the other logs by `nqm.fit_loss_curves`, and by the law of Tissue
et al. (2024, arXiv 2408.11029), fitted to the same logs::

    L(t) = L0 + A S1^-alpha - C S2,  S1 = sum of rates,
    S2 = sum over i <= t and k <= i of (lr[k-1] - lr[k]) 0.99^(i-k)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from nqm import Log, fit_loss_curves
from nqm.commands import logged, program_of
from nqm.program import Program

Array = NDArray[np.float64]
DECAY = 0.99


def sums(program: Program) -> tuple[Array, Array]:
    """S1 and S2 after every step, 1 to the last."""
    rates = np.concatenate([phase.settings(0, phase.steps)[:, 0] for phase in program.phases])
    falls = np.concatenate(([0.0], rates[:-1] - rates[1:]))
    momentum = np.zeros_like(rates)
    for t in range(1, len(rates)):
        momentum[t] = DECAY * momentum[t - 1] + falls[t]
    return np.cumsum(rates), np.cumsum(momentum)


def law(theta: Array, s1: Array, s2: Array) -> Array:
    """Losses of the annealing law; all parameters are positive."""
    floor, scale, power, gain = np.exp(theta)
    return np.asarray(floor + scale * s1**-power - gain * s2)


def annealing(logs: Sequence[Log], held: Log) -> Array:
    """Losses of the held-out log by the annealing law, the best of several starts."""
    parts = [(*(s[log.steps - 1] for s in sums(log.program)), log.losses) for log in logs]

    def residuals(theta: Array) -> Array:
        return np.concatenate([law(theta, s1, s2) / y - 1.0 for s1, s2, y in parts])

    low = min(float(y.min()) for _, _, y in parts)
    starts = [
        np.log([low * a, low, b, c]) for a in (0.1, 0.9) for b in (0.3, 1.0) for c in (0.1, 1)
    ]
    fits = [least_squares(residuals, start, max_nfev=2000) for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost))
    return law(best.x, *(s[held.steps - 1] for s in sums(held.program)))


def main(files: Sequence[str]) -> None:
    """Print the errors of both forecasts."""
    logs = []
    for table, file in zip(files[::2], files[1::2], strict=True):
        steps, losses = logged(table, "train_loss", averaged=True, first=100)
        logs.append(Log(steps, losses, program_of(file)[0].program))
    *known, held = logs
    fitted = fit_loss_curves(*known)
    table = fitted.forecast(held.program, held.steps.tolist())
    inside = (table["lower"] <= held.losses) & (held.losses <= table["upper"])
    print(f"{'':24}{'rms error':>10}{'at the end':>12}")
    forecasts = {
        "noisy quadratic": table["loss"].to_numpy(),
        "annealing law": annealing(known, held),
    }
    for name, losses in forecasts.items():
        errors = losses / held.losses - 1.0
        print(f"{name:24}{np.sqrt((errors**2).mean()):>10.1%}{errors[-1]:>12.1%}")
    print(f"inside the band of 95 %: {inside.sum()} of {len(inside)} records")
    last = table.iloc[-1]
    print(
        f"at the end: {last['loss']:.4g} ({last['lower']:.4g} to {last['upper']:.4g}), "
        f"measured {held.losses[-1]:.4g}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
