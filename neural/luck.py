"""The luck of the draw: what chains' own minibatches do on the quadratic, less what is expected.

Of the few stiffest directions that carry most of the excess a handful of chains is a small sample,
and of the mean of K a K-th as many. But their minibatches are known. In the linear picture at the
checkpoint a chain answers to them, along the measured directions, by

    z_(t+1) = (1 - lr h) z_t - lr (slope of the minibatch - slope of all examples),

and zbar, the mean of K, changes the loss by s'zbar + 1/2 zbar' H zbar, with s the slope that
noise-free descent has left. The expectation of that is known. It is a control variate with
coefficient 1: taken off a measurement, less its expectation, it leaves the expectation of the
measurement as it is, and takes most of the scatter out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.chains import Training, minibatches
from neural.curvature import Landscape
from neural.local_model import Kept, LocalModel, fingerprint
from neural.prediction import edge, expected_excess
from neural.time_averages import Running, TimeAverage, power
from nqm.problem import Problem

FloatArray = NDArray[np.float64]
#: Directions looked at, at most: the stiffest.
DIRECTIONS = 2048


@dataclass(frozen=True)
class Luck:
    """What the minibatches of a training do on the quadratic.

    Attributes
    ----------
    training : Training
    curvature, slope : FloatArray, shape (k,)
        Along the directions looked at.
    slopes : Tensor, shape (N, k)
        Of every example, less their mean.
    """

    training: Training
    curvature: FloatArray
    slope: FloatArray
    slopes: Tensor

    def responses(
        self, keys: Sequence[tuple[int, int]], when: Sequence[int | TimeAverage]
    ) -> list[Tensor]:
        """How chains answer to minibatches drawn by these keys (`neural.chains.minibatches`).

        Parameters
        ----------
        keys : sequence of (int, int)
            One for every chain.
        when : sequence of int or TimeAverage
            Steps, and averages over all steps.

        Returns
        -------
        list of Tensor, shape (chains, k)
        """
        training, h = self.training, torch.from_numpy(self.curvature)
        z = torch.zeros(len(keys), len(h), dtype=torch.double)
        buffer, at = torch.zeros_like(z), {}
        averages = Running([one for one in when if isinstance(one, TimeAverage)], z)
        draws = [minibatches(len(self.slopes), training, key) for key in keys]
        for step in range(1, training.steps + 1):
            noise = torch.stack([self.slopes[next(draw)].mean(0) for draw in draws])
            buffer = training.momentum * buffer + h * z + noise
            z = z - training.lr * buffer
            averages(step, z)
            if step in when:
                at[step] = z
        return [at[one] if isinstance(one, int) else averages.values[one.name] for one in when]

    def of(
        self, z: Sequence[Tensor], when: Sequence[int | TimeAverage], members: int
    ) -> FloatArray:
        """Luck of the mean of every `members` chains, shape (groups, times).

        Parameters
        ----------
        z : sequence of Tensor, shape (chains, k)
            One for each of `when`. Chains left over are not used.
        when : sequence of int or TimeAverage
        members : int
            K.
        """
        groups = len(z[0]) // members
        training, h = self.training, self.curvature
        noise = self.slopes.square().mean(0).numpy()
        problem = Problem(h, noise, initial_mean=0.0, initial_variance=0.0)
        expected = expected_excess(problem, training, len(self.slopes), when)
        u = training.lr / (1.0 - training.momentum) * h
        found = []
        for one, moment, mean_loss in zip(z, when, expected, strict=True):
            means = one[: groups * members].view(groups, members, -1).mean(1).numpy()
            left = power(u, moment) if isinstance(moment, int) else moment.left(u)
            loss = 0.5 * means**2 @ h - mean_loss / members
            found.append(loss + means @ (self.slope * left))
        return np.stack(found, 1)


def measure_luck(
    landscape: Landscape, local: LocalModel, training: Training, folder: Path | None = None
) -> Luck | None:
    """The slopes of all examples along the eigenpairs, and along what is left of the slope.

    Parameters
    ----------
    landscape : Landscape
    local : LocalModel
        Of this landscape.
    training : Training
    folder : Path, optional
        Keeps what is found, and gives it when asked again.

    Returns
    -------
    Luck or None
        None where nothing is known to be taken off: of shuffled epochs, beyond the edge of
        stability, and where no curvature is positive.
    """
    # The rest of the slope as Lanczos has it: what it carries would be luck's largest part else.
    rest = local.gradient
    curvature = np.concatenate([local.pairs.values, rest.values])
    held = np.flatnonzero(curvature > 0.0)[:DIRECTIONS]
    if training.sampling == "shuffled" or not len(held) or training.lr >= edge(local, training):
        return None
    vectors = np.hstack([local.pairs.vectors, rest.vectors])[:, held]

    def slopes() -> dict[str, Any]:
        each = landscape.example_gradients()
        return {"slopes": np.concatenate([g.double().cpu().numpy() @ vectors for g in each])}

    kept = Kept(folder, fingerprint(landscape))
    found = kept(f"slopes-{len(held)}-{local.largest:.10g}", slopes)["slopes"]
    slope = np.concatenate([local.slope, rest.amplitudes])[held]
    return Luck(training, curvature[held], slope, torch.from_numpy(found - found.mean(0)))
