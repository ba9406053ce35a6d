"""Losses of training without noise, for all learning rates from one path.

Gradient descent at a low rate follows nearly the same curve as at a high one, in more steps: after
t steps at the rate lr it is where descent at the rate lr' is after t lr / lr' steps. What the two
differ by is of the order of lr times curvature; it is computed on the quadratic and added, so that
nothing is left of it where the loss is quadratic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import ITERATE, Plan, Training
from neural.bridge.sgd_chains import noise_free
from neural.curvature.cache import Cache
from neural.curvature.gradient_noise import trace
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk

FloatArray = NDArray[np.float64]
#: Steps shorter than this part of the longest one may go back and forth: they are rounding errors.
SHORT = 0.01


@dataclass(frozen=True)
class NoiseFreePaths:
    """Losses of training without noise, for every training of a configuration.

    Attributes
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    local : LocalQuadratic
        Measured on this risk.
    trainings : sequence of Training
        Those whose losses may come from one path.
    plan : Plan
        Recorded steps and averages over time.
    cache : Cache
        Stores the results.
    progress : callable, optional
        Called with 1 after every step of a path.
    """

    risk: EmpiricalRisk
    local: LocalQuadratic
    trainings: Sequence[Training]
    plan: Plan
    cache: Cache = field(default_factory=Cache)
    progress: Callable[[int], None] | None = None
    _known: dict[float, dict[str, Any]] = field(default_factory=dict, repr=False)

    def together(self, training: Training) -> list[float]:
        """Learning rates whose losses come from one path with those of a training.

        Parameters
        ----------
        training : Training
            One of the trainings.

        Returns
        -------
        list of float
            Decreasing; that of the training is among them. It is alone with momentum, and where
            lr h_max is above 1: such a path goes back and forth.
        """
        alike = [other for other in self.trainings if other.steps == training.steps]
        slow = {other.lr for other in alike if other.lr * self.local.largest <= 1.0}
        if training.momentum or training.lr not in slow:
            return [training.lr]
        return sorted(slow, reverse=True)

    def changes(self, training: Training) -> dict[str, float]:
        """Change of the loss from the checkpoint, and of the noise, by training without noise.

        Parameters
        ----------
        training : Training
            One of the trainings.

        Returns
        -------
        dict of str to float
            For the iterate, averaged over the recorded steps, and for each average over time; and
            ``noise_change``, the relative change of the noise's trace at the end.
        """
        rates = self.together(training)
        while True:
            found = self._walked(training, rates)
            own = rates.index(training.lr)
            if own == 0 or found["smooth"]:
                break
            rates = rates[1:]
        names = [ITERATE, *(a.name for a in self.plan.averages(training)), "noise_change"]
        return {name: float(found[name][own]) for name in names}

    def _walked(self, training: Training, rates: Sequence[float]) -> dict[str, Any]:
        """Results of the path at the first rate, for all of them; walked once."""
        plan = self.plan
        if rates[0] not in self._known:
            self._known[rates[0]] = self.cache.of(self.risk)(
                "noise_free_path",
                lambda: self._walk(replace(training, lr=rates[0]), rates),
                rates=list(rates),
                local=self.local.key() if len(rates) > 1 else None,
                momentum=training.momentum,
                steps=training.steps,
                records=plan.records,
                averages=plan.averages(training),
            )
        return self._known[rates[0]]

    def _walk(self, training: Training, rates: Sequence[float]) -> dict[str, Any]:
        risk, local, records = self.risk, self.local, training.record_steps(self.plan.records)
        kinds = [(ITERATE, _at(step, training.steps)) for step in records]
        for average in self.plan.averages(training):
            weights = average.weights()
            kinds.append((average.name, np.append(1.0 - weights.sum(), weights)))
        shares = [[_sooner(own, lr / rates[0]) for _, own in kinds] for lr in rates]
        means = [[torch.zeros_like(risk.weights) for _ in kinds] for _ in rates]
        before, last, longest, smooth = risk.weights, torch.zeros_like(risk.weights), 0.0, True

        def seen(step: int, weights: Tensor) -> None:
            nonlocal before, last, longest, smooth
            moved, last, before = last, weights - before, weights
            length = float(last.norm())
            longest = max(longest, length)
            smooth &= float(moved @ last) >= 0.0 or length < SHORT * longest
            for of_rate, own in zip(means, shares, strict=True):
                for mean, share in zip(of_rate, own, strict=True):
                    if share[step]:
                        mean.add_(weights - risk.weights, alpha=float(share[step]))
            if self.progress is not None:
                self.progress(1)

        noise_free(risk, training, [training.steps], seen=seen)
        found: dict[str, list[float]] = {name: [] for name in [*dict(kinds), "noise_change"]}
        population = 1.0 - 1.0 / risk.examples  # as in `measure_local`
        for lr, of_rate, own in zip(rates, means, shares, strict=True):
            losses: dict[str, list[float]] = {name: [] for name in dict(kinds)}
            for (name, exact), mean, share in zip(kinds, of_rate, own, strict=True):
                change = risk.loss(risk.weights + mean) - local.loss
                if lr != rates[0]:
                    change += _quadratic(local, lr, exact) - _quadratic(local, rates[0], share)
                losses[name].append(change)
            for name, each in losses.items():
                found[name].append(float(np.mean(each)))
            noise = population * trace(risk.at(risk.weights + of_rate[len(records) - 1]))
            found["noise_change"].append(noise / local.noise_trace - 1.0)
        return {"smooth": np.array(smooth)} | {k: np.array(each) for k, each in found.items()}


def _at(step: int, steps: int) -> FloatArray:
    """Share of the weights after every step, from 0, in those after one step."""
    share = np.zeros(steps + 1)
    share[step] = 1.0
    return share


def _sooner(share: FloatArray, ratio: float) -> FloatArray:
    """Shares of a path that takes `ratio` steps for one; between two steps it is linear."""
    times = ratio * np.arange(len(share))
    before = np.minimum(times.astype(int), len(share) - 1)
    part = times - before
    moved = np.zeros(len(share))
    np.add.at(moved, before, (1.0 - part) * share)
    np.add.at(moved, np.minimum(before + 1, len(share) - 1), part * share)
    return moved


def _quadratic(local: LocalQuadratic, lr: float, share: FloatArray) -> float:
    """Change of the quadratic's loss at a mean of the weights on its descent path.

    Negative curvature is replaced by zero, as in `neural.bridge.drift.descended`.
    """
    h, _, g = local.points()
    h = np.maximum(h, 0.0)
    left, age = polyval(1.0 - lr * h, share), lr * float(share @ np.arange(len(share)))
    with np.errstate(divide="ignore", invalid="ignore"):
        psi = np.where(lr * h * len(share) < 1e-9, age, (1.0 - left) / h)
    return float(g @ (0.5 * psi**2 * h - psi))
