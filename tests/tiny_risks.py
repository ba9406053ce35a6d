"""Risks on which everything can be written out, and the textbook recursions for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import torch
from torch import Tensor, nn

from neural.bridge.config import Training
from neural.bridge.gaussian import WeightGaussian, measure_gaussian
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.models import build


def tanh_risk(weight_decay: float = 0.01, *, quick: bool = True) -> EmpiricalRisk:
    """43 weights in double precision, 40 examples in two batches of different sizes.

    If `quick`, products with H are those of the dense matrix; `test_curvature` shows that they are
    the same.
    """
    torch.manual_seed(0)
    options = {"channels": 1, "size": 2, "hidden": [5], "activation": "tanh"}
    model = build("mlp", classes=3, **options).double()
    x = torch.randn(40, 1, 2, 2, dtype=torch.double)
    y = torch.randint(3, (40,))
    risk = EmpiricalRisk(model, [(x[:13], y[:13]), (x[13:], y[13:])], weight_decay=weight_decay)
    if quick:
        h = risk.hessian()
        risk.hessian_product = lambda v: h @ v  # type: ignore[method-assign]
    return risk


class Plain(nn.Module):
    """Two vectors of weights: beside every input, how far they are from it, and themselves."""

    def __init__(self, first: Tensor, second: Tensor):
        super().__init__()
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def forward(self, inputs: Tensor) -> Tensor:
        w = torch.cat([self.first, self.second]).expand_as(inputs)
        return torch.stack([w - inputs, w], 1)


class Bowl:
    """Example n has the loss 1/2 (w - a_n)' H (w - a_n) + 1/6 T[w, w, w], T the same for all.

    Without T the gradient noise is the same everywhere, and the quadratic is all there is.

    Parameters
    ----------
    curvature : sequence of float
        Eigenvalues of H, in a random basis.
    away : float
        Every weight at the checkpoint; without T the minimum is at 0.
    examples : int
    cubic : float
        Size of T.
    """

    def __init__(
        self,
        curvature: Sequence[float],
        *,
        away: float = 0.0,
        examples: int = 256,
        cubic: float = 0.0,
    ):
        rng = np.random.default_rng(3)
        p = len(curvature)
        basis = np.linalg.qr(rng.standard_normal((p, p)))[0]
        self.hessian = basis @ np.diag(curvature) @ basis.T
        centres = rng.standard_normal((examples, p)) @ rng.standard_normal((p, p)) / np.sqrt(p)
        centres -= centres.mean(0)
        raw = cubic * rng.standard_normal((p, p, p))
        self.third = np.mean([raw.transpose(order) for order in permutations(range(3))], axis=0)
        #: Of one example's gradient, over these examples as a population.
        self.noise = self.hessian @ (centres.T @ centres / examples) @ self.hessian
        h, t = torch.from_numpy(self.hessian), torch.from_numpy(self.third)

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            off, w = output.unbind(1)
            bent = ((t @ w[0]) @ w[0]) @ w[0]
            return 0.5 * ((off @ h) * off).sum(1) + bent / 6.0

        start = torch.full((p,), away, dtype=torch.double)
        x, y = torch.from_numpy(centres), torch.zeros(examples, dtype=torch.long)
        self.risk = EmpiricalRisk(Plain(start[:1].clone(), start[1:].clone()), [(x, y)], loss=loss)

    def gradient(self, weights: Tensor | None = None) -> Tensor:
        """H w + 1/2 T[w, w], at the checkpoint by default; the centres' mean is 0."""
        w = (self.risk.weights if weights is None else weights).numpy()
        return torch.from_numpy(self.hessian @ w + 0.5 * self.third @ w @ w)


def gaussian_of(bowl: Bowl, training: Training) -> WeightGaussian:
    """Of the weights of a training, by dense derivatives and the fewest displacements."""
    local = measure_local(bowl.risk, None)
    return measure_gaussian(bowl.risk, local, training, displacements=2)


def scatter(
    hessian: np.ndarray, noise: np.ndarray, lr: float, batch_size: float, steps: int
) -> np.ndarray:
    """Covariance of the weights after so many steps of SGD from a sure start, with all of C."""
    shrink = np.eye(len(hessian)) - lr * hessian
    covariance = np.zeros_like(hessian)
    for _ in range(steps):
        covariance = shrink @ covariance @ shrink.T + lr**2 / batch_size * noise
    return covariance


def slide(slope: np.ndarray, hessian: np.ndarray, lr: float, steps: int) -> np.ndarray:
    """Where gradient descent on slope' m + 1/2 m' H m is after so many steps from m = 0."""
    m = np.zeros(len(slope))
    for _ in range(steps):
        m = m - lr * (slope + hessian @ m)
    return m


def quadratic(slope: np.ndarray, hessian: np.ndarray, m: np.ndarray) -> float:
    """The loss slope' m + 1/2 m' H m."""
    return float(slope @ m + 0.5 * m @ hessian @ m)
