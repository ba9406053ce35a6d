"""The path of training without noise from the checkpoint, followed on the loss itself.

Far from a minimum a quadratic at the checkpoint does not tell where descent ends: curvature and
noise change on the way. Full-batch descent is therefore trained once for each training. Its losses
are the descent of the prediction, its weights the places around which noise scatters. Between its
ends, curvature is interpolated in the length of the way, and noise in its own trace, which is
measured along the way: noise may fall by most of its size on a small part of the length. Noise may
also fall and then grow. Where its trace turns round, curvature and noise are known as well, and
each part of the way between two such knots is interpolated for itself.
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
#: Least change of the trace between two knots, relative to that at the start, by which the noise is
#: interpolated; below it, in the length. A trace that comes back by as much has turned round.
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
    knots : ndarray of int, shape (n,)
        Steps after which this trace has turned round, and T.
    places : ndarray, shape (n, p)
        Displacement from the checkpoint at the knots.
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
    knots: NDArray[np.int64]
    places: FloatArray

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
        whole = max(float(self.lengths[-1]), 1e-300)
        return self._length(self._times(training, when))[()] / whole

    def shares(self, training: Training, when: float | TimeAverage | FloatArray) -> FloatArray:
        """Interpolation in the length of the way: shares of what is known at the knots.

        Parameters
        ----------
        training, when
            See `fraction`.

        Returns
        -------
        ndarray, shape (..., n)
            In [0, 1]; what they lack of 1 is the share of the checkpoint.
        """
        times = self._times(training, when)
        return self._shares(times, [self._part(times, i) for i in range(len(self.knots))])

    def noise_shares(
        self, training: Training, when: float | TimeAverage | FloatArray
    ) -> FloatArray:
        """Interpolation in the trace of the noise: shares of the noise at the knots.

        Between two knots whose traces differ by less than `TRACE_CHANGE`, it is in the length.

        Parameters
        ----------
        training, when
            See `fraction`.

        Returns
        -------
        ndarray, shape (..., n)
            See `shares`. They may leave [0, 1] by as little as a trace that comes back without
            having turned round.
        """
        times = self._times(training, when)
        # Linear in log steps beyond the first one: the trace falls as a power of the steps.
        x, known = np.log1p(times), np.log1p(self.trace_steps)
        trace = np.interp(x, known, self.traces)
        ends = np.interp(np.log1p([0, *self.knots]), known, self.traces)
        parts = []
        for i, (start, whole) in enumerate(zip(ends, np.diff(ends), strict=False)):
            far = abs(whole) > TRACE_CHANGE * self.traces[0]
            parts.append((trace - start) / whole if far else self._part(times, i))
        return self._shares(times, parts)

    def _part(self, times: FloatArray, i: int) -> FloatArray:
        """Length from the knot before knot i, as a fraction of that to knot i."""
        start, end = self.lengths[[0, *self.knots][i]], self.lengths[self.knots[i]]
        return np.asarray((self._length(times) - start) / max(end - start, 1e-300))

    def _length(self, times: FloatArray) -> FloatArray:
        """Length of the way after steps of this path."""
        return np.asarray(np.interp(times, np.arange(len(self.lengths)), self.lengths))

    def _shares(self, times: FloatArray, parts: Sequence[FloatArray]) -> FloatArray:
        """Shares of the knots, given how far each part of the way is done."""
        own = np.searchsorted(self.knots[:-1], times)  # the part in which a time lies
        shares = np.zeros((*np.shape(times), len(parts)))
        for i, part in enumerate(parts):
            here = own == i
            shares[..., i] += np.where(here, part, 0.0)
            if i:
                shares[..., i - 1] += np.where(here, 1.0 - part, 0.0)
        return shares

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

    def moved_to(places: Sequence[Tensor]) -> FloatArray:
        return np.stack([(w - risk.weights).double().cpu().numpy() for w in places])

    def trained() -> dict[str, Any]:
        running, last, lengths = Running(averages, risk.weights), risk.weights, [0.0]
        traces = [gradient_noise.trace(risk)]
        turns = Turns(TRACE_CHANGE * traces[0])
        turns(0, risk.weights, traces[0])

        def seen(step: int, weights: Tensor) -> None:
            nonlocal last
            running(step, weights)
            lengths.append(lengths[-1] + float(torch.linalg.vector_norm(weights - last)))
            last = weights
            if step in traced:
                traces.append(gradient_noise.trace(risk.at(weights)))
                turns(step, weights, traces[-1])
            if progress is not None:
                progress(1)

        start = risk.loss()
        losses = noise_free(risk, training, at, seen=seen) - start
        means = [running.values[average.name] for average in averages]
        places = [last, *means]
        knots = [*turns.found, (training.steps, last, traces[-1])]
        return {
            "losses": np.concatenate([[0.0], losses, [risk.loss(mean) - start for mean in means]]),
            "lengths": np.array(lengths),
            "ends": moved_to(places),
            "slopes": np.stack([risk.gradient(w).double().cpu().numpy() for w in places]),
            "traces": np.array(traces),
            "knots": np.array([step for step, *_ in knots]),
            "places": moved_to([weights for _, weights, _ in knots]),
        }

    own = replace(training, batch_size=1, sampling="with replacement")  # they do not matter
    stored = (cache or Cache()).of(risk)(
        "noise_free_path",
        trained,
        training=own,
        at=at,
        averages=averages,
        traced=traced,
        turning=TRACE_CHANGE,
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
        knots=np.asarray(stored["knots"]),
        places=np.asarray(stored["places"]),
    )


class Turns:
    """Places where a value that is seen step by step turns round.

    Parameters
    ----------
    least : float
        By how much a value must come back from its extreme before this counts as a turn.

    Attributes
    ----------
    found : list of (int, Tensor, float)
        Step, weights and value of every extreme that was a turn; never the first step.
    """

    def __init__(self, least: float):
        self.least, self.found = least, list[tuple[int, Tensor, float]]()
        self._extremes: dict[int, tuple[int, Tensor, float]] = {}
        self._way = 0

    def __call__(self, step: int, weights: Tensor, value: float) -> None:
        """Take the value at a step.

        Parameters
        ----------
        step : int
            Number of the step.
        weights : Tensor
            Weights there, which must not change afterwards.
        value : float
            The value.
        """
        here = step, weights, value
        for way in (1, -1):  # the value rises, or falls
            far = self._extremes.get(way)
            if far is not None and self._way != -way and way * (far[2] - value) > self.least:
                if self._way:
                    self.found.append(far)
                self._way = -way
                self._extremes[-way] = here
            if far is None or way * (value - far[2]) >= 0.0:
                self._extremes[way] = here


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
