"""Shuffled epochs: what is left of the scatter, and the force of their order, written out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from neural.bridge.config import Training
from neural.bridge.scatter import covariance, noise_sums
from neural.bridge.shuffled import order_force, scatter_sums, sums_at_end
from neural.curvature.gradient_noise import trace
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from nqm import Phase, Problem
from nqm.solvers.shuffle import shuffled_steady
from tests.tiny_risks import Plain, tanh_risk
from tests.tolerances import agree

SIZE = 3


def test_the_scatter_of_all_places_written_out() -> None:
    """Two epochs of four minibatches: noises of one add up to zero, others are independent."""
    responses, n, examples = np.random.default_rng(0).standard_normal((8, 2)), 4, 4 * SIZE
    training = Training(0.1, SIZE, 8, sampling="shuffled")
    size = (examples - SIZE) / (examples - 1.0)  # variance of a minibatch without replacement
    own = size * (n * np.eye(n) - np.ones((n, n))) / (n - 1.0)
    expected = np.zeros((2, 2))
    for place in range(1, n + 1):
        epochs = [responses[:place]]
        epochs += [responses[a : a + n] for a in range(place, 8 - n + 1, n)]
        for r in epochs:
            expected += r.T @ own[: len(r), : len(r)] @ r / n
    agree(scatter_sums(responses, examples, training), expected, 1e-12)


@pytest.mark.parametrize("steps", [3, 4, 6, 8])
def test_the_scatter_at_the_end_over_all_orders(steps: int) -> None:
    """Up to two epochs of four minibatches of one example: the mean over all 24 x 24 orders."""
    rng, n = np.random.default_rng(0), 4
    responses, noise = rng.standard_normal((8, 2))[:steps], rng.standard_normal(n)
    noise -= noise.mean()
    ends = [
        responses[::-1].T @ noise[[*first, *second][:steps]]
        for first in permutations(range(n))
        for second in permutations(range(n))
    ]
    expected = np.mean(np.square(ends), 0) / np.mean(noise**2)
    agree(sums_at_end(responses, n, 1), expected, 1e-12)
    if steps < n:
        found = scatter_sums(responses, n, Training(0.1, 1, steps, sampling="shuffled"))
        agree(np.diag(found), expected, 1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_variance_is_that_of_the_steady_state(momentum: float) -> None:
    h, lr, examples = np.array([2.0, 0.5, 0.03]), 0.2, 8 * SIZE
    training = Training(lr, SIZE, 4000, momentum, "shuffled")
    problem = Problem(h, np.ones(3), initial_mean=0.0, initial_variance=0.0)
    steady = shuffled_steady(problem, Phase(training.algorithm, lr, 1, batch_size=SIZE), examples)
    u = training.effective_lr * h
    found = training.effective_lr**2 / SIZE * noise_sums(u, training, examples)
    agree(found, steady.weight_variance, 1e-9)


def test_at_low_rates_the_force_is_a_quarter_of_the_slope_of_the_noise() -> None:
    risk, lr, size = tanh_risk(), 1e-7, 8
    local = measure_local(risk, None)
    training = Training(lr, size, 10, sampling="shuffled")

    def noise(w: Tensor) -> float:  # of a minibatch of 8 out of 40
        return trace(risk.at(w)) * (40 - size) / 39 / size

    force = order_force(risk, local, training)
    for along in torch.randn(3, risk.size, generator=torch.Generator().manual_seed(0)).double():
        ends = [noise(risk.weights + sign * 1e-4 * along) for sign in (1.0, -1.0)]
        slope = (ends[0] - ends[1]) / 2e-4
        assert force @ along.numpy() == pytest.approx(lr / 4.0 * slope, rel=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_force_is_the_mean_over_all_orders_of_an_epoch(momentum: float) -> None:
    """Example n has the Hessian H + c x_n x_n' and the slope -x_n at 0, where training starts."""
    h, lr, c, small = torch.tensor([1.5, 0.4, 0.1]).double(), 0.5, 0.8, 1e-3
    x = small * torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    x -= x.mean(0)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        off, w = output.unbind(1)
        along = ((w - off) * w).sum(1)
        return 0.5 * (h * w * w).sum(1) - along + 0.5 * c / small * along**2

    model = Plain(torch.zeros(1).double(), torch.zeros(2).double())
    risk = EmpiricalRisk(model, [(x, torch.zeros(4, dtype=torch.long))], loss=loss)
    training = Training(lr, 1, 4, momentum, "shuffled")
    found = order_force(risk, measure_local(risk, None), training)
    each = np.diag(h) + c / small * np.einsum("ni,nj->nij", x, x)
    mean, force, orders = each.mean(0), np.zeros(3), list(permutations(range(4)))
    for order in orders:
        w, buffer = np.zeros(3), np.zeros(3)
        for n in order:
            force += (each[n] - mean) @ w / (4 * len(orders))
            buffer = momentum * buffer + each[n] @ w - x[n].numpy()
            w = w - lr * buffer
    # Further terms are smaller by the examples' own part of the curvature, some 1e-3.
    assert np.linalg.norm(found - force) < 5e-3 * np.linalg.norm(force)


def test_a_local_model_has_the_scatter_of_its_sampling() -> None:
    risk = tanh_risk()
    local, training = measure_local(risk, None), Training(0.1, 8, 400, sampling="shuffled")
    drawn = Training(0.1, 8, 400)
    variances = [np.diag(covariance(local, one)) for one in (training, drawn)]
    agree(variances[0], np.diag(local.noise) * 0.1**2 / 8 * noise_sums(
        0.1 * np.maximum(local.pairs.values, 0.0), training, risk.examples), 1e-9)  # fmt: skip
    assert variances[0].sum() < 0.5 * variances[1].sum()
