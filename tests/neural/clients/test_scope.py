"""Scopes of layers: the divergence, its gradient, and its curvature at the target."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from neural.clients.scope import divergence, divergence_gradient, fused, layers, rescaled, scope_of


def weight(seed: int = 0, count: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.7 + 0.4 * torch.randn(3, count // 3, generator=generator, dtype=torch.float64)


def test_the_divergence_is_that_of_gaussians() -> None:
    scope = torch.tensor([0.3, 0.8], dtype=torch.float64)
    target = torch.tensor([-0.2, 0.5], dtype=torch.float64)
    known = kl_divergence(Normal(0.3, 0.8), Normal(-0.2, 0.5))
    assert float(divergence(scope, target)) == pytest.approx(float(known), rel=1e-6)
    assert float(divergence(target, target)) == pytest.approx(0.0, abs=1e-15)


def test_its_gradient_by_differences() -> None:
    start, target = weight(1), torch.tensor([0.1, 0.6], dtype=torch.float64)
    found = divergence_gradient(start, target)
    step = 1e-6
    for index in range(start.numel()):
        values = []
        for sign in (1, -1):
            moved = start.clone()
            moved.view(-1)[index] += sign * step
            values.append(float(divergence(scope_of(moved), target)))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(found.flatten()[index]) == pytest.approx(slope, abs=1e-8)


def test_at_its_target_it_has_rank_two() -> None:
    """Curvature 1 / (p s^2) along the mean and 2 / (p s^2) radially; nothing elsewhere."""
    start = weight(3).flatten()
    target = scope_of(start)
    size, sd = start.numel(), float(target[1])

    def value(w: Tensor) -> Tensor:
        return divergence(scope_of(w), target)

    hessian = torch.autograd.functional.hessian(value, start)
    along = torch.ones(size, dtype=torch.float64) / math.sqrt(size)
    radial = (start - start.mean()) / (start - start.mean()).norm()
    known = (along.outer(along) + 2 * radial.outer(radial)) / (size * sd**2)
    torch.testing.assert_close(hessian, known, rtol=0, atol=1e-12)


def test_equal_weights_have_a_finite_gradient() -> None:
    found = divergence_gradient(torch.full((2, 3), 0.5), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found, torch.full((2, 3), 0.5 / 6))  # by the mean alone


def test_fused_scopes_average_means_and_variances() -> None:
    scopes = [{"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([5.0, 4.0])}]
    found = fused(scopes, [0.25, 0.75])["a"]
    torch.testing.assert_close(found, torch.tensor([4.0, math.sqrt(0.25 * 9 + 0.75 * 16)]))


def test_rescaling_reaches_the_target() -> None:
    target = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(scope_of(rescaled(weight(4), target)), target)


def test_biases_and_norms_have_no_scope() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    assert list(layers(net)) == ["0.weight", "3.weight"]
    net[3].weight.requires_grad_(False)
    assert list(layers(net)) == ["0.weight"]
