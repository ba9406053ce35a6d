"""How many examples a run's risk evaluates together."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from neural.bridge import from_run
from neural.bridge.from_run import PASSES, fitting, risk_of_run
from neural.bridge.pipeline import held_out_risk
from neural.curvature.cache import fingerprint
from neural.curvature.example_losses import SmoothedCrossEntropy, cross_entropy
from neural.curvature.memory import kept_bytes
from neural.curvature.risk import EmpiricalRisk
from neural.training.build import plain_model
from neural.training.task import Runtime, open_task
from tests.tiny_runs import tiny
from tests.tolerances import IDENTITY


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


def test_the_risk_is_the_loss_that_the_run_trains() -> None:
    """With its label smoothing and weights without decay; torch's autograd is the reference."""
    trained = {"label_smoothing": 0.2, "weight_decay": 0.03, "no_decay": "bias"}
    run = tiny(train=trained, model={"name": "mlp", "hidden": [5]})
    task = open_task(run, Runtime())
    torch.manual_seed(0)
    risk = risk_of_run(run, plain_model(run.model, task), Runtime())
    x, y = (torch.cat(part) for part in zip(*risk.batches, strict=True))
    names = list(risk.shapes)

    def loss(w: torch.Tensor) -> torch.Tensor:
        parts = torch.split(w, [shape.numel() for shape in risk.shapes.values()])
        named = {n: p.view(risk.shapes[n]) for n, p in zip(names, parts, strict=True)}
        decay = sum(p.square().sum() for n, p in named.items() if not n.endswith("bias"))
        return task.loss(torch.func.functional_call(risk.model, named, (x,)), y) + 0.015 * decay

    w = risk.weights.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(w), w, create_graph=True)
    v = torch.linspace(-1.0, 1.0, risk.size, dtype=torch.float64)
    (product,) = torch.autograd.grad(slope @ v, w)
    assert risk.loss() == pytest.approx(loss(w).item(), rel=IDENTITY)
    torch.testing.assert_close(risk.gradient(), slope.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(risk.hessian_product(v), product, rtol=1e-10, atol=1e-12)

    test = held_out_risk(risk, task)  # the cross-entropy alone, as every test loss
    other, labels = (torch.cat(part) for part in zip(*test.batches, strict=True))
    plain = nn.functional.cross_entropy(risk.model(other), labels)
    assert test.loss() == pytest.approx(plain.item(), rel=IDENTITY)
    assert len({fingerprint(one) for one in (risk, test)}) == 2


def test_what_the_loss_consists_of_is_in_the_key() -> None:
    """Stages of another smoothing, or of other weights without decay, are not taken over."""
    x, y = torch.ones(6, 4, dtype=torch.float64), torch.arange(6) % 3
    model = net()
    losses = (cross_entropy, SmoothedCrossEntropy(0.1), SmoothedCrossEntropy(0.2))
    risks = [
        EmpiricalRisk(model, [(x, y)], loss=loss, weight_decay=0.1, no_decay=without)
        for loss in losses
        for without in ("", "bias", "head")
    ]
    assert len({fingerprint(risk) for risk in risks}) == len(risks)
