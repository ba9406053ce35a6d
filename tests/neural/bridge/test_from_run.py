"""How many examples a run's risk evaluates together."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from neural.bridge import from_run
from neural.bridge.from_run import PASSES, fitting, risk_of_run
from neural.curvature.memory import kept_bytes
from neural.training.build import plain_model
from neural.training.task import Runtime, open_task
from tests.tiny_runs import tiny


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def test_a_pass_keeps_inputs_and_activations() -> None:
    """Four inputs, and eight outputs of the ReLU, which the next layer shares: twelve numbers."""
    x, model = torch.randn(5, 4, dtype=torch.float64), net()
    assert kept_bytes(model, lambda: model(x.clone())) == 5 * 12 * 8


@pytest.mark.parametrize(
    ("allowed", "sizes"), [(20, [20, 7]), (19, [19, 1, 7]), (6, [6, 6, 6, 2, 6, 1])]
)
def test_batches_fit_the_memory(
    monkeypatch: pytest.MonkeyPatch, allowed: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(from_run, "memory_limit", lambda: allowed * PASSES * 12 * 8)
    x = torch.randn(27, 4, dtype=torch.float64)
    y = torch.arange(27) % 3
    batches = [(x[:20].clone(), y[:20]), (x[20:].clone(), y[20:])]
    if allowed == 20:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fitting(net(), batches, torch.device("cpu")) is batches
        return
    with pytest.warns(UserWarning, match=f"for {allowed} examples at a time: 20 would take"):
        found = fitting(net(), batches, torch.device("cpu"))
    assert [len(inputs) for inputs, _ in found] == sizes
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), x)
    assert torch.equal(torch.cat([targets for _, targets in found]), y)


def test_smaller_batches_change_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(model={"name": "digits_cnn", "width": 4})
    torch.manual_seed(0)
    model = plain_model(run.model, open_task(run, Runtime()))
    whole = risk_of_run(run, model, Runtime())
    assert whole.weights.dtype == torch.float64
    v = torch.linspace(-1.0, 1.0, whole.size, dtype=torch.float64)
    monkeypatch.setattr(from_run, "memory_limit", lambda: 2**20)
    with pytest.warns(UserWarning, match="examples at a time"):
        parts = risk_of_run(run, model, Runtime())
    for one, other in (
        (whole.gradient(), parts.gradient()),
        (whole.hessian_product(v), parts.hessian_product(v)),
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
