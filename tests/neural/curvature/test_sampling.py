"""Samples of examples: their probabilities, and losses that are unbiased."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neural.bridge.drift import passes_at_displacements
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.sampling import ExampleSamples, inclusion_probabilities, sampled_part
from tests.tiny_risks import tanh_risk
from tests.tolerances import IDENTITY, agree


def test_probabilities_follow_the_sizes() -> None:
    sizes = np.array([0.0, 1.0, 2.0, 4.0, 100.0])
    found = inclusion_probabilities(sizes, 2)
    assert found.sum() == pytest.approx(2.0)
    assert found[-1] == 1.0  # its share would be more
    share = 0.9 * sizes[:-1] / sizes.sum() + 0.02
    agree(found[:-1], share / share.sum(), IDENTITY)
    agree(inclusion_probabilities(np.zeros(4), 1), [0.25] * 4, IDENTITY)
    agree(inclusion_probabilities(np.array([np.nan, 3.0, np.inf, 3.0]), 1), [0.25] * 4, IDENTITY)
    agree(inclusion_probabilities(sizes, 5), [1.0] * 5, IDENTITY)


def test_a_small_risk_is_not_sampled() -> None:
    risk = tanh_risk()
    assert sampled_part(40, 10) == 1.0
    assert sampled_part(40, 9) == 9 / 40
    assert ExampleSamples(risk, 10, [0]).draw(0, 0) is risk
    assert passes_at_displacements(3, 40) == 12
    assert passes_at_displacements(3, 128_000) == 1


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_samples_have_the_loss_of_all_examples_on_average(curvature: str) -> None:
    risk = tanh_risk()
    risk.curvature = curvature
    v = torch.randn(risk.size, generator=torch.Generator().manual_seed(0)).double()

    def derivatives(of: EmpiricalRisk) -> torch.Tensor:
        loss = torch.tensor([of.loss()], dtype=torch.float64)
        return torch.cat([of.gradient(), of.curvature_product(v), loss])

    samples = ExampleSamples(risk, 8, [3])
    count = 987  # a Fibonacci number: the starts divide [0, 1) best
    total = torch.zeros(2 * risk.size + 1, dtype=torch.float64)
    for number in range(count):
        part = samples.draw(number % 2, number)
        assert part.examples == 8
        total += torch.cat(
            [part.gradient(), part.curvature_product(v), torch.tensor([part.loss()])]
        )
    expected = torch.cat([risk.gradient(), risk.curvature_product(v), torch.tensor([risk.loss()])])
    assert float((total / count - expected).norm() / expected.norm()) < 0.01
    first, other = (samples.draw(sequence, 0).gradient() for sequence in (0, 1))
    assert not torch.equal(first, other)


def test_examples_are_drawn_as_often_as_their_probabilities_say() -> None:
    risk = tanh_risk()
    norms = torch.cat([g.norm(dim=1) for g in risk.example_gradients()]).numpy()
    expected, count = inclusion_probabilities(norms, 8), 200
    samples = ExampleSamples(risk, 8, [3])
    x = torch.cat([inputs for inputs, _ in risk.batches])
    drawn = np.zeros(40)
    for number in range(count):
        for inputs, _ in samples.draw(0, number).batches:
            drawn += (inputs[:, None] == x[None]).flatten(2).all(-1).sum(0).numpy()
    assert np.abs(drawn - count * expected).max() < 4.0  # at random it would be up to 20


def test_examples_that_cannot_be_joined_are_all_used() -> None:
    risk = tanh_risk()
    (x, y), *_ = risk.batches
    ragged = EmpiricalRisk(
        risk.model,
        [((x, torch.tensor(1.0)), y), ((x, torch.tensor(2.0)), y)],
        loss=lambda o, _: o[:, 0],
    )
    assert ExampleSamples(ragged, 2, [0]).draw(0, 0) is ragged
