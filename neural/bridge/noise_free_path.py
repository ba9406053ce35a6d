"""The path of training without noise from the checkpoint, followed on the loss itself.

Far from a minimum a quadratic at the checkpoint does not tell where descent ends: curvature and
noise change on the way. Full-batch descent is therefore trained once for each training. Its losses
are the descent of the prediction, its weights the places around which noise scatters, and the
length of the way is the measure by which curvature and noise are interpolated between places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import Plan, Training
from neural.bridge.iterate_averages import Running, TimeAverage
from neural.bridge.sgd_chains import noise_free
from neural.curvature.cache import Cache
from neural.curvature.gradient_noise import trace
from neural.curvature.risk import EmpiricalRisk

FloatArray = NDArray[np.float64]
#: Number of losses of the second half that are interpolated between, for other trainings.
LOSSES = 16


@dataclass(frozen=True)
class NoiseFreePath:
    """Full-batch descent from the checkpoint with the rate and the steps of a training.

    Other trainings are taken to follow the same way: t steps at the rate lr reach what this one
    reaches after the same lr t, but at most its end. Averages over time that are not known lie
    where the path is at their mean step.

    Attributes
    ----------
    training : Training
        T steps.
    averages : tuple of TimeAverage
        Averages over the steps of the path that are known.
    steps : ndarray, shape (n,)
        Steps at which the loss is known, from 0 to T.
    losses : ndarray, shape (n + a,)
        Change of the loss from the checkpoint at these steps, then at the a averages.
    lengths : ndarray, shape (T + 1,)
        Length of the way after every step, from 0.
    ends, slopes : ndarray, shape (1 + a, p)
        Displacement from the checkpoint, and gradient of the loss there: at the end, then at the
        averages.
    noise_trace : float
        Trace of the covariance of one example's gradient at the end.
    """

    training: Training
    averages: tuple[TimeAverage, ...]
    steps: FloatArray
    losses: FloatArray
    lengths: FloatArray
    ends: FloatArray
    slopes: FloatArray
    noise_trace: float

    def _known(self, training: Training, when: float | TimeAverage) -> int | None:
        """Row of an average of this path."""
        same = training.effective_lr == self.training.effective_lr
        return self.averages.index(when) if same and when in self.averages else None

    def _scaled(self, training: Training, when: float | TimeAverage) -> float:
        """Number of steps of this path that go as far."""
        if isinstance(when, TimeAverage):
            weights = when.weights()  # what they lack is that of the checkpoint, at step 0
            steps = float(np.arange(1, when.steps + 1) @ weights)
        else:
            steps = when
        return steps * training.effective_lr / self.training.effective_lr

    def _time(self, training: Training, when: float | TimeAverage) -> float:
        return min(self._scaled(training, when), float(self.training.steps))

    def covers(self, training: Training, when: float | TimeAverage) -> bool:
        """Whether a place of another training lies on this path, not beyond its end.

        Parameters
        ----------
        training, when
            See `change`.

        Returns
        -------
        bool
        """
        known = self._known(training, when) is not None
        return known or self._scaled(training, when) <= self.training.steps

    def change(self, training: Training, when: float | TimeAverage) -> float:
        """Change of the loss from the checkpoint.

        Parameters
        ----------
        training : Training
            This one, or another one.
        when : float or TimeAverage
            Number of steps, or an average over time.

        Returns
        -------
        float
        """
        if (row := self._known(training, when)) is not None:
            return float(self.losses[len(self.steps) + row])
        losses = self.losses[: len(self.steps)]
        return float(np.interp(self._time(training, when), self.steps, losses))

    def displacement(self, training: Training, when: float | TimeAverage) -> FloatArray:
        """Displacement from the checkpoint, on the straight line to the end where it is not known.

        Parameters
        ----------
        training, when
            See `change`.

        Returns
        -------
        ndarray, shape (p,)
        """
        if (row := self._known(training, when)) is not None:
            return np.asarray(self.ends[1 + row])
        return np.asarray(self.fraction(training, when) * self.ends[0])

    def slope(self, training: Training, when: float | TimeAverage) -> FloatArray:
        """Gradient of the loss; before the end it is that of the end, as long as the steps are.

        Parameters
        ----------
        training, when
            See `change`.

        Returns
        -------
        ndarray, shape (p,)
        """
        if (row := self._known(training, when)) is not None:
            return np.asarray(self.slopes[1 + row])
        speeds = np.diff(self.lengths)
        middles = np.arange(len(speeds)) + 0.5
        speed = float(np.interp(self._time(training, when), middles, speeds))
        return np.asarray(self.slopes[0] * (speed / speeds[-1] if speeds[-1] > 0.0 else 1.0))

    def fraction(self, training: Training, when: float | TimeAverage | FloatArray) -> Any:
        """Length of the way, as a fraction of the whole.

        Parameters
        ----------
        training : Training
            See `change`.
        when : float, TimeAverage or ndarray
            Number of steps, an average over time, or an array of numbers of steps.

        Returns
        -------
        float, or ndarray of the shape of `when`
            In [0, 1].
        """
        if isinstance(when, np.ndarray):
            times = when * training.effective_lr / self.training.effective_lr
        else:
            times = np.array(self._time(training, when))
        known = np.arange(len(self.lengths))
        whole = max(float(self.lengths[-1]), 1e-300)
        return np.interp(times, known, self.lengths)[()] / whole


def measure_path(
    risk: EmpiricalRisk,
    training: Training,
    plan: Plan,
    *,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> NoiseFreePath:
    """Train without noise from the checkpoint.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss; descent starts at its weights.
    training : Training
        Gives learning rate, momentum and number of steps.
    plan : Plan
        Gives recorded steps and averages over time.
    cache : Cache, optional
        Stores the result.
    progress : callable, optional
        Called with 1 after every step.

    Returns
    -------
    NoiseFreePath
    """
    averages = plan.averages(training)
    at = sorted({*training.course_steps(plan.records), *training.course_steps(LOSSES)})

    def trained() -> dict[str, Any]:
        running, last, lengths = Running(averages, risk.weights), risk.weights, [0.0]

        def seen(step: int, weights: Tensor) -> None:
            nonlocal last
            running(step, weights)
            lengths.append(lengths[-1] + float(torch.linalg.vector_norm(weights - last)))
            last = weights
            if progress is not None:
                progress(1)

        start = risk.loss()
        losses = noise_free(risk, training, at, seen=seen) - start
        means = [running.values[average.name] for average in averages]
        places = [last, *means]
        population = 1.0 - 1.0 / risk.examples  # as in `measure_local`
        return {
            "losses": np.concatenate([[0.0], losses, [risk.loss(mean) - start for mean in means]]),
            "lengths": np.array(lengths),
            "ends": np.stack([(w - risk.weights).double().cpu().numpy() for w in places]),
            "slopes": np.stack([risk.gradient(w).double().cpu().numpy() for w in places]),
            "noise_trace": np.array(population * trace(risk.at(last))),
        }

    own = replace(training, batch_size=1, sampling="with replacement")  # they do not matter
    stored = (cache or Cache()).of(risk)(
        "noise_free_path", trained, training=own, at=at, averages=averages
    )
    return NoiseFreePath(
        training,
        averages,
        steps=np.array([0, *at], dtype=float),
        losses=np.asarray(stored["losses"]),
        lengths=np.asarray(stored["lengths"]),
        ends=np.asarray(stored["ends"]),
        slopes=np.asarray(stored["slopes"]),
        noise_trace=float(stored["noise_trace"]),
    )


def farthest(trainings: Sequence[Training]) -> Training:
    """The training that descends farthest: the largest product of effective rate and steps.

    Parameters
    ----------
    trainings : sequence of Training
        At least one.

    Returns
    -------
    Training
    """
    return max(trainings, key=lambda training: training.effective_lr * training.steps)
