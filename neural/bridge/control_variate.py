"""A control variate: response of the quadratic to the runs' minibatches, minus its expectation.

The few stiffest directions carry most of the excess loss, and a few runs (and even fewer means of
K runs) sample them with a large error. But the minibatches of the runs are known. On the quadratic
at the checkpoint a run responds to them, along the measured directions, by

    z_(t+1) = (1 - lr h) z_t - lr (slope of the minibatch - slope of all examples),

and zbar, the mean of K runs, changes the loss by s'zbar + 1/2 zbar' H zbar, with s the slope that
remains after noise-free descent. The expectation of this change is known. The change minus its
expectation is therefore a control variate with coefficient 1: subtracting it from a measurement
leaves the expectation unchanged and removes most of the variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.bridge.config import Training
from neural.bridge.held_out import HeldOut
from neural.bridge.iterate_averages import Running, TimeAverage
from neural.bridge.prediction import expected_excess
from neural.bridge.response import response
from neural.bridge.scatter import largest_stable_lr
from neural.bridge.sgd_chains import minibatches
from neural.curvature.cache import Cache
from neural.curvature.local_quadratic import LocalQuadratic
from neural.curvature.risk import EmpiricalRisk
from nqm.problems.quadratic import Problem

FloatArray = NDArray[np.float64]
#: Largest number of directions of the control variate: the stiffest are taken.
DIRECTIONS = 2048


@dataclass(frozen=True)
class ControlVariate:
    """Response of the quadratic to the minibatches of a training.

    Attributes
    ----------
    training : Training
        The training whose minibatches are used.
    curvature, slope : ndarray, shape (k,)
        Curvature and slope of the loss along the directions of the control variate.
    slopes : Tensor of float64, shape (N, k)
        Slope of every example's loss along these directions, minus the mean over examples.
    vectors : ndarray, shape (p, k)
        The directions, orthonormal.
    """

    training: Training
    curvature: FloatArray
    slope: FloatArray
    slopes: Tensor
    vectors: FloatArray

    def responses(
        self, keys: Sequence[tuple[int, int]], when: Sequence[int | TimeAverage]
    ) -> list[Tensor]:
        """Displacements of runs on the quadratic, given the keys of their minibatches.

        Parameters
        ----------
        keys : sequence of (int, int)
            Key of the minibatches of every run (see `minibatches`).
        when : sequence of int or TimeAverage
            Steps, and averages over all steps.

        Returns
        -------
        list of Tensor, shape (runs, k)
            Displacements, one tensor for each entry of `when`.
        """
        training, h = self.training, torch.from_numpy(self.curvature)
        z = torch.zeros(len(keys), len(h), dtype=torch.double)
        buffer, at = torch.zeros_like(z), {}
        averages = Running([moment for moment in when if isinstance(moment, TimeAverage)], z)
        draws = [minibatches(len(self.slopes), training, key) for key in keys]
        for step in range(1, training.steps + 1):
            noise = torch.stack([self.slopes[next(draw)].mean(0) for draw in draws])
            buffer = training.momentum * buffer + h * z + noise
            z = z - training.lr * buffer
            averages(step, z)
            if step in when:
                at[step] = z
        return [
            at[moment] if isinstance(moment, int) else averages.values[moment.name]
            for moment in when
        ]

    def of(
        self, z: Sequence[Tensor], when: Sequence[int | TimeAverage], members: int
    ) -> FloatArray:
        """Control variates for the mean weights of groups of K runs.

        Parameters
        ----------
        z : sequence of Tensor, shape (runs, k)
            Result of `responses`. Runs that do not fill a group are not used.
        when : sequence of int or TimeAverage
            The times of `z`.
        members : int
            Number of runs in a group, K.

        Returns
        -------
        ndarray, shape (groups, times)
            In units of the loss; the expectation is zero.
        """
        h = self.curvature
        variates = []
        for (means, loss), moment in zip(self._groups(z, when, members), when, strict=True):
            left = 1.0 - h * response(self.training, moment)(h)
            variates.append(loss + means @ (self.slope * left))
        return np.stack(variates, 1)

    def of_test(
        self, z: Tensor, when: int | TimeAverage, members: int, held_out: HeldOut
    ) -> FloatArray:
        """Control variate of the test loss of the mean weights of groups of K runs.

        It has the test loss's own slope, and the training loss's quadratic form times
        `HeldOut.curvature_ratio`.

        Parameters
        ----------
        z : Tensor, shape (runs, k)
            Result of `responses` at one time.
        when : int or TimeAverage
            This time.
        members : int
            Number of runs in a group, K.
        held_out : HeldOut
            Test loss over the Gaussian of the weights at this time.

        Returns
        -------
        ndarray, shape (groups,)
            In units of the loss; the expectation is zero.
        """
        ((means, loss),) = self._groups([z], [when], members)
        variate = held_out.curvature_ratio * loss
        if held_out.gradient is not None:
            variate = variate + means @ (self.vectors.T @ held_out.gradient)
        return np.asarray(variate)

    def _groups(
        self, z: Sequence[Tensor], when: Sequence[int | TimeAverage], members: int
    ) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Mean displacements of the groups, and their quadratic loss minus its expectation."""
        groups, h = len(z[0]) // members, self.curvature
        noise = self.slopes.square().mean(0).numpy()
        problem = Problem(h, noise, initial_mean=0.0, initial_variance=0.0)
        expected = expected_excess(problem, self.training, len(self.slopes), when)
        for at_moment, mean_loss in zip(z, expected, strict=True):
            means = at_moment[: groups * members].view(groups, members, -1).mean(1).numpy()
            yield means, 0.5 * means**2 @ h - mean_loss / members


def measure_control_variate(
    risk: EmpiricalRisk, local: LocalQuadratic, training: Training, cache: Cache | None = None
) -> ControlVariate | None:
    """Measure the slopes of all examples along the eigenpairs and the gradient's Lanczos nodes.

    Parameters
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    local : LocalQuadratic
        Measured on this risk.
    training : Training
        The training whose minibatches are used.
    cache : Cache, optional
        Stores the slopes.

    Returns
    -------
    ControlVariate or None
        None where the expectation is not known: beyond the edge of stability, and where no
        curvature is positive.
    """
    # With the Lanczos nodes of the rest of the slope; without them most of the variance would stay.
    rest = local.gradient
    curvature = np.concatenate([local.pairs.values, rest.values])
    chosen = np.flatnonzero(curvature > 0.0)[:DIRECTIONS]
    if not len(chosen):
        return None
    if training.lr >= largest_stable_lr(local, training):
        return None
    vectors = np.hstack([local.pairs.vectors, rest.vectors])[:, chosen]

    def slopes() -> dict[str, Any]:
        each = risk.example_gradients()
        return {"slopes": np.concatenate([g.double().cpu().numpy() @ vectors for g in each])}

    stored = (cache or Cache()).of(risk)
    each = stored("example_slopes", slopes, directions=len(chosen), local=local.key())["slopes"]
    slope = np.concatenate([local.slope, rest.amplitudes])[chosen]
    centred = torch.from_numpy(each - each.mean(0))
    return ControlVariate(training, curvature[chosen], slope, centred, vectors)
