"""Forecast a logged loss curve from others: the noisy quadratic against two empirical laws.

    python -m benchmarks.forecast LOG.csv PROGRAM.toml ... HELD.csv HELD.toml

Logs are those of ``nqm neural train --log csv``, after their first 100 steps. The last pair is held
out. Its losses are forecast from the other logs by `nqm.fit_loss_curves`, and by two laws that are
fitted to the same logs. The annealing law of Tissue et al. (2024, arXiv 2408.11029)::

    L(t) = L0 + A S1^-alpha - C S2,  S1 = sum of rates,
    S2 = sum over i <= t and k <= i of (lr[k-1] - lr[k]) 0.99^(i-k)

and the multi-power law of Luo et al. (2025, arXiv 2503.12811)::

    L(t) = L0 + A S1^-alpha - B sum over k <= t of (lr[k-1] - lr[k]) G(x),
    x = lr[k]^-gamma (lr[k] + ... + lr[t]),
    G(x) = 1 - (1 + C x)^-beta
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

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


@dataclass(frozen=True)
class Falls:
    """S1 at the records; where the rate falls: by how much, to what, and log S1 from there on."""

    s1: Array
    falls: Array
    rates: Array
    since: Array

    @classmethod
    def of(cls, log: Log) -> Falls:
        """Those of a log's program."""
        phases = log.program.phases
        rates = np.concatenate([phase.settings(0, phase.steps)[:, 0] for phase in phases])
        total = np.cumsum(rates)
        at = 1 + np.flatnonzero((rates[1:] != rates[:-1]) & (rates[1:] > 0.0))
        with np.errstate(divide="ignore"):  # a fall that is yet to come has log 0
            since = np.log(np.maximum(total[log.steps - 1, None] - total[at - 1], 0.0))
        return cls(total[log.steps - 1], rates[at - 1] - rates[at], rates[at], since)

    def columns(self, theta: Array) -> Array:
        """What L0, A and B multiply, given alpha, C, beta and gamma by their logarithms."""
        power, inner, beta, gamma = np.exp(theta)
        x = np.exp(np.minimum(np.log(inner) - gamma * np.log(self.rates) + self.since, 100.0))
        reached = -np.expm1(-beta * np.log1p(x))
        return np.stack([np.ones_like(self.s1), self.s1**-power, -(reached @ self.falls)], axis=1)


def multi_power(logs: Sequence[Log], held: Log) -> Array:
    """Losses of the held-out log by the multi-power law, the best of several starts."""
    parts, losses = [Falls.of(log) for log in logs], np.concatenate([log.losses for log in logs])

    def linear(theta: Array) -> tuple[Array, Array]:
        """L0, A and B >= 0 that fit best, and the relative residuals."""
        columns = np.concatenate([part.columns(theta) for part in parts]) / losses[:, None]
        found = nnls(columns, np.ones(len(losses)))[0]
        return found, columns @ found - 1.0

    starts = [np.log([0.5, c, 0.5, g]) for c in (0.1, 1.0, 10.0) for g in (0.1, 0.5)]
    # Bounded, so that no power overflows.
    fits = [
        least_squares(lambda theta: linear(theta)[1], start, bounds=(-8.0, 5.0), max_nfev=200)
        for start in starts
    ]
    best = min(fits, key=lambda fit: float(fit.cost)).x
    return np.asarray(Falls.of(held).columns(best) @ linear(best)[0])


def main(files: Sequence[str]) -> None:
    """Print the errors of the forecasts."""
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
        "multi-power law": multi_power(known, held),
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
