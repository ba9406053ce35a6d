"""Test loss of the weights of a training, of means of K runs and of averages over time, predicted.

To leading order the weights after the last step are Gaussian, N(m, S), and the mean of K runs is
N(m, S / K); an average over time has a mean and a covariance of its own. The test loss is evaluated
at m, and at both ends of random displacements d of covariance S, shortened by sqrt(K):

    E test loss = L(m) + E [(L(m + d / sqrt(K)) + L(m - d / sqrt(K))) / 2 - L(m)].

For a quadratic test loss with gradient g and curvature H at the checkpoint, from which the mean has
moved by a, this is L + g'a + 1/2 a'Ha + 1/2 tr(HS) / K: its gradient counts as well, since the
minimum of the training loss is not that of the test loss. No derivative of it is computed. The
prediction knows the test examples, but no training run.

Means over displacements are estimated by regression on the training loss's own quadratic form
1/2 d'Hd along the eigenpairs, whose expectation 1/2 tr(HS) is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from neural.bridge.config import ITERATE, Plan
from neural.bridge.drift import calm_end, draw_index
from neural.bridge.gaussian import WeightGaussian
from neural.bridge.iterate_averages import TimeAverage
from neural.bridge.scatter import covariance, displacements
from neural.bridge.shared_base import mean_model
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import vector
from neural.curvature.risk import EmpiricalRisk

FloatArray = NDArray[np.float64]
#: Largest number of displacements of a training at which the test loss is evaluated.
DISPLACEMENTS = 32
#: Fewest displacements for a regression: two coefficients, and a standard error of some worth.
REGRESSION = 5
ARRAYS = ("centre", "rises", "control", "gradient", "margins")
#: A test loss: a risk, or a function of a weight vector of shape (p,).
TestLoss = EmpiricalRisk | Callable[[Tensor], float]


def loss_of(test: TestLoss) -> Callable[[Tensor], float]:
    """The test loss as a function of a weight vector.

    Parameters
    ----------
    test : EmpiricalRisk or callable
        The test loss.

    Returns
    -------
    callable
        Maps a weight vector of shape (p,) to the loss.
    """
    return test.loss if isinstance(test, EmpiricalRisk) else test


@dataclass(frozen=True)
class HeldOut:
    """Test loss of one kind of weights: of the iterate, or of an average over time.

    Attributes
    ----------
    members : tuple of int
        Values of K at which the loss was evaluated, increasing.
    centre : ndarray, shape (3,)
        Test loss at the mean of the weights: with the mean force of the noise, and with each of its
        two independent measurements.
    rises : ndarray, shape (n, values of K)
        For each displacement, mean test loss at both ends minus that at the mean.
    control : ndarray, shape (n,)
        For each displacement, half of the training loss's quadratic form minus its expectation.
    gradient : ndarray, shape (p,), optional
        Gradient of the test loss at the mean of the weights.
    margins : ndarray, shape (3, N), optional
        Of every test example's margin: at the mean of the weights, the change of its mean by the
        scatter of a single run, and its variance by that scatter.
    """

    members: tuple[int, ...]
    centre: FloatArray
    rises: FloatArray
    control: FloatArray
    gradient: FloatArray | None = None
    margins: FloatArray | None = None

    def accuracy(self, members: int) -> float:
        """Expected accuracy of the mean of K runs, with Gaussian margins.

        An example is right with probability Phi(mean / standard deviation) of its margin. To second
        order both the change of the mean and the variance fall as 1 / K.

        Parameters
        ----------
        members : int
            Number of runs, K.

        Returns
        -------
        float
            In [0, 1]; NaN if margins are not known.
        """
        if self.margins is None:
            return float("nan")
        centre, change, variance = self.margins
        mean, sd = centre + change / members, np.sqrt(variance / members)
        with np.errstate(divide="ignore", invalid="ignore"):
            score = np.where(sd > 0.0, mean / sd, np.where(mean > 0.0, np.inf, -np.inf))
        return float(ndtr(score).mean())

    @property
    def curvature_ratio(self) -> float:
        """Curvature of the test loss relative to the training loss's, over the displacements."""
        return _slope(self.rises_at(1), self.control)

    def loss(self, members: int) -> tuple[float, float]:
        """Expected test loss of the mean of K runs, and its standard error.

        Parameters
        ----------
        members : int
            Number of runs, K.

        Returns
        -------
        loss, standard_error : float
            The error is that of few displacements. What the Gaussian leaves out is not in it.
        """
        rise = self.rises_at(members)
        return _sum(_centre(self.centre), _mean(rise, self.control / members))

    def gain(self, members: int, single: HeldOut) -> tuple[float, float]:
        """Expected test loss of a single run's last weights minus that of the mean of K runs.

        Parameters
        ----------
        members : int
            Number of runs, K.
        single : HeldOut
            Of the iterate, from the same random numbers.

        Returns
        -------
        gain, standard_error : float
            Positive if averaging lowers the test loss.
        """
        rise = single.rises_at(1) - self.rises_at(members)
        control = single.control - self.control / members
        return _sum(_centre(single.centre - self.centre), _mean(rise, control))

    def rises_at(self, members: int) -> FloatArray:
        """`rises` for any K: K times the rise is linear in log K between two evaluated values.

        Parameters
        ----------
        members : int
            Number of runs, K.

        Returns
        -------
        ndarray, shape (n,)
        """
        x, known = np.log(self.members), self.rises * np.array(self.members)
        return np.array([np.interp(np.log(members), x, row) for row in known]) / members


def _centre(values: FloatArray) -> tuple[float, float]:
    """Loss at the mean, and its error, from the loss for both forces together and for each.

    The scatter of the measured force raises the loss at their mean by as much as the mean of the
    two losses is above it, to second order.
    """
    both, first, second = values
    return float(2.0 * both - 0.5 * (first + second)), float(0.5 * abs(first - second))


def _mean(values: FloatArray, control: FloatArray) -> tuple[float, float]:
    """Mean of values and its standard error, by regression on a control of expectation 0."""
    n, slope = len(values), _slope(values, control)
    mean = float(values.mean() - slope * control.mean())
    if slope == 0.0:
        return mean, float(values.std(ddof=1) / np.sqrt(n))
    apart = control - control.mean()
    rest = values - values.mean() - slope * apart
    leverage = 1.0 / n + control.mean() ** 2 / float(apart @ apart)
    return mean, float(np.sqrt(rest @ rest / (n - 2) * leverage))


def _slope(values: FloatArray, control: FloatArray) -> float:
    """Slope of the regression of values on a control; 0 if there are too few values."""
    apart = control - control.mean()
    spread = float(apart @ apart)
    return float(apart @ values) / spread if len(values) >= REGRESSION and spread > 0.0 else 0.0


def _sum(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], float(np.hypot(one[1], other[1]))


def _evaluated(members: tuple[int, ...]) -> tuple[int, ...]:
    """1, the largest K, and the one nearest to their geometric mean."""
    most = max(members)
    middle = min(members, key=lambda k: abs(np.log(k) - 0.5 * np.log(most)))
    return tuple(sorted({1, middle, most}))


def evaluations(gaussian: WeightGaussian, plan: Plan) -> int:
    """Number of evaluations of the test loss at ends of displacements, for a progress bar.

    Parameters
    ----------
    gaussian, plan
        See `measure_held_out`.

    Returns
    -------
    int
    """
    kinds = 1 + len(plan.averages(gaussian.training))
    return 2 * kinds * _count(gaussian) * len(_evaluated(plan.members))


def _count(gaussian: WeightGaussian) -> int:
    """Number of displacements."""
    return min(len(gaussian.drift.slopes.displacements), DISPLACEMENTS)


def measure_held_out(
    test: TestLoss,
    risk: EmpiricalRisk,
    gaussian: WeightGaussian,
    plan: Plan,
    *,
    cache: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, HeldOut]:
    """Evaluate a test loss over the Gaussian of a training's weights.

    Parameters
    ----------
    test : EmpiricalRisk or callable
        Test loss as a function of the weights, or of a weight vector of shape (p,). The gradient is
        computed for a risk only.
    risk : EmpiricalRisk
        The network's training loss, at the checkpoint.
    gaussian : WeightGaussian
        Gaussian of the weights in the training.
    plan : Plan
        Group sizes, averages over time, and the seed.
    cache : Cache, optional
        Stores the result.
    progress : callable, optional
        Called with 1 after every end of a displacement.

    Returns
    -------
    dict of str to HeldOut
        By the kind of weights. Empty beyond the edge of stability.
    """
    training = gaussian.training
    if not gaussian.stable:
        return {}
    kinds: dict[str, int | TimeAverage] = {ITERATE: training.steps}
    kinds |= {average.name: average for average in plan.averages(training)}
    count, members, local = _count(gaussian), _evaluated(plan.members), mean_model(gaussian.local)

    loss = loss_of(test)

    def at(moved: FloatArray) -> float:
        return loss(risk.weights + vector(risk, moved))

    def with_margins(moved: FloatArray) -> tuple[float, FloatArray]:
        found = None
        if isinstance(test, EmpiricalRisk):
            value, found = test.loss_and_margins(risk.weights + vector(risk, moved))
        else:
            value = at(moved)
        return value, np.zeros(0) if found is None else found.cpu().numpy()

    def of(when: int | TimeAverage) -> tuple[FloatArray, ...]:
        pushes = gaussian.drift.displacement_twice(training, when)
        descent = calm_end(gaussian.checkpoint, training, gaussian.path, when)
        mean = descent + 0.5 * (pushes[0] + pushes[1])
        middle, margin = with_margins(mean)
        centre = np.array([middle, *(at(descent + push) for push in pushes)])
        even, odd = np.zeros_like(margin), np.zeros_like(margin)
        rng, rises, forms = np.random.default_rng([plan.seed, 5]), [], []
        draw = displacements(local, training, when)
        for i in range(count):
            d = draw(rng, draw_index(local, i))
            row = []
            for k in members:
                ends = [with_margins(mean + sign / np.sqrt(k) * d) for sign in (1.0, -1.0)]
                (plus, up), (minus, down) = ends
                row.append(0.5 * (plus + minus) - centre[0])
                if k == 1:
                    even += (0.5 * (up + down) - margin) / count
                    odd += 0.25 * (up - down) ** 2 / count
                if progress is not None:
                    progress(2)
            rises.append(row)
            forms.append(0.5 * float(local.pairs.values @ (local.pairs.vectors.T @ d) ** 2))
        spread = np.diag(covariance(local, training, when))
        expected = 0.5 * float(local.pairs.values @ spread)
        gradient = np.zeros(0)
        if isinstance(test, EmpiricalRisk):
            gradient = test.gradient(risk.weights + vector(risk, mean)).double().cpu().numpy()
        margins = np.stack([margin, even, odd])
        return centre, np.array(rises), np.array(forms) - expected, gradient, margins

    def measured() -> dict[str, Any]:
        arrays = {}
        for name, when in kinds.items():
            for what, values in zip(ARRAYS, of(when), strict=True):
                arrays[f"{name}-{what}"] = values
        return arrays

    stored = (cache or Cache()).of(risk, seed=plan.seed)(
        "test_loss",
        measured,
        training=training,
        members=members,
        averages=plan.averages(training),
        displacements=count,
        local=local.key(),
        moved=f"{float(np.linalg.norm(gaussian.mean)):.8g}",
        test=f"{loss(risk.weights):.6g}",
        gradient=isinstance(test, EmpiricalRisk),
        margins=True,
    )
    found = {}
    for name in kinds:
        centre, rises, control, *rest = (stored[f"{name}-{what}"] for what in ARRAYS)
        gradient, margins = (array if array.size else None for array in rest)
        found[name] = HeldOut(members, centre, rises, control, gradient, margins)
    return found
