"""The path of training without noise from the checkpoint, followed on the loss itself.

Far from a minimum a quadratic at the checkpoint does not tell where descent ends: curvature and
noise change on the way. Full-batch descent is therefore trained once for each training. Its losses
are the descent of the prediction, its weights the places around which noise scatters. Between its
ends, curvature is interpolated in the length of the way, and noise in its own trace, which is
measured along the way: noise may fall by most of its size on a small part of the length.
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
from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk

FloatArray = NDArray[np.float64]
#: Number of losses of the second half that are interpolated between, for other trainings.
LOSSES = 16
#: Number of traces of the noise for every doubling of the steps.
TRACES = 2
#: Least change of the trace along the way, relative to that at its start, by which the noise is
#: interpolated; below it, in the length.
TRACE_CHANGE = 0.1


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
    trace_steps, traces : ndarray, shape (m,)
        Trace of the covariance of one example's gradient after these steps, from 0 to T.
    """

    training: Training
    averages: tuple[TimeAverage, ...]
    steps: FloatArray
    losses: FloatArray
    lengths: FloatArray
    ends: FloatArray
    slopes: FloatArray
    trace_steps: FloatArray
    traces: FloatArray

    @property
    def noise_trace(self) -> float:
        """Trace of the covariance of one example's gradient at the end."""
        return float(self.traces[-1])

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
        times = self._times(training, when)
        whole = max(float(self.lengths[-1]), 1e-300)
        return np.interp(times, np.arange(len(self.lengths)), self.lengths)[()] / whole

    def noise_fraction(self, training: Training, when: float | TimeAverage | FloatArray) -> Any:
        """Change of the noise's trace, as a fraction of that at the end.

        Parameters
        ----------
        training, when
            See `fraction`.

        Returns
        -------
        float, or ndarray of the shape of `when`
            1 at the end. It may leave [0, 1] where the trace does not change in one direction. The
            `fraction` of the length if the trace changes by less than `TRACE_CHANGE`.
        """
        whole = self.traces[-1] - self.traces[0]
        if abs(whole) <= TRACE_CHANGE * self.traces[0]:
            return self.fraction(training, when)
        # Linear in log steps beyond the first one: the trace falls as a power of the steps.
        x, known = (np.log1p(t) for t in (self._times(training, when), self.trace_steps))
        return (np.interp(x, known, self.traces)[()] - self.traces[0]) / whole

    def _times(self, training: Training, when: float | TimeAverage | FloatArray) -> FloatArray:
        if isinstance(when, np.ndarray):
            return np.asarray(when * training.effective_lr / self.training.effective_lr)
        return np.array(self._time(training, when))


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
    halvings = np.arange(TRACES * np.log2(training.steps) + 1.0) / TRACES
    traced = sorted({0, *(training.steps * 0.5**halvings).round().astype(int).tolist()})

    def trained() -> dict[str, Any]:
        running, last, lengths = Running(averages, risk.weights), risk.weights, [0.0]
        traces = [gradient_noise.trace(risk)]

        def seen(step: int, weights: Tensor) -> None:
            nonlocal last
            running(step, weights)
            lengths.append(lengths[-1] + float(torch.linalg.vector_norm(weights - last)))
            last = weights
            if step in traced:
                traces.append(gradient_noise.trace(risk.at(weights)))
            if progress is not None:
                progress(1)

        start = risk.loss()
        losses = noise_free(risk, training, at, seen=seen) - start
        means = [running.values[average.name] for average in averages]
        places = [last, *means]
        return {
            "losses": np.concatenate([[0.0], losses, [risk.loss(mean) - start for mean in means]]),
            "lengths": np.array(lengths),
            "ends": np.stack([(w - risk.weights).double().cpu().numpy() for w in places]),
            "slopes": np.stack([risk.gradient(w).double().cpu().numpy() for w in places]),
            "traces": np.array(traces),
        }

    own = replace(training, batch_size=1, sampling="with replacement")  # they do not matter
    stored = (cache or Cache()).of(risk)(
        "noise_free_path", trained, training=own, at=at, averages=averages, traced=traced
    )
    return NoiseFreePath(
        training,
        averages,
        steps=np.array([0, *at], dtype=float),
        losses=np.asarray(stored["losses"]),
        lengths=np.asarray(stored["lengths"]),
        ends=np.asarray(stored["ends"]),
        slopes=np.asarray(stored["slopes"]),
        trace_steps=np.array(traced, dtype=float),
        traces=np.asarray(stored["traces"]),
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
