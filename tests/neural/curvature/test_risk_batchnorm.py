"""Groups of examples with their own BatchNorm statistics, against torch's training mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from neural.bridge.config import Training
from neural.bridge.sgd_chains import train_runs
from neural.curvature import gradient_noise
from neural.curvature.cache import fingerprint
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import BatchNormRisk, grouped
from nqm.errors import NQMError
from tests.tolerances import IDENTITY, agree

DECAY, SIZE, GROUPS = 0.01, 5, 4


@pytest.fixture
def risk() -> BatchNormRisk:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten()]
    layers += [nn.Linear(8, 4), nn.BatchNorm1d(4, affine=False), nn.Dropout(0.5), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(21, 1, 4, 4, dtype=torch.double), torch.randint(3, (21,))
    return BatchNormRisk(model, grouped([(x[:8], y[:8]), (x[8:], y[8:])], SIZE), weight_decay=DECAY)


def in_training_mode(risk: EmpiricalRisk, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Loss of a minibatch by torch's own BatchNorm, dropout off."""
    model = risk.model.train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    parts = torch.split(w, [shape.numel() for shape in risk.shapes.values()])
    shapes = risk.shapes.items()
    named = {n: p.view(s) for (n, s), p in zip(shapes, parts, strict=True)}
    named |= {name: value.clone() for name, value in model.named_buffers()}
    return nn.functional.cross_entropy(functional_call(model, named, (x,)), y)


def gradients(risk: EmpiricalRisk, w: Tensor) -> Tensor:
    """Gradient of every group, shape (groups, p)."""
    found = []
    for x, y in risk.batches:
        at = w.clone().requires_grad_()
        found.append(torch.autograd.grad(in_training_mode(risk, at, x[0], y[0]), at)[0])
    return torch.stack(found)


def central(of: object, w: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    """A difference quotient of a function of the weights."""
    assert callable(of)
    quotient: Tensor = (of(w + step * v) - of(w - step * v)) / (2.0 * step)
    return quotient


def test_it_is_the_loss_of_training_mode(risk: BatchNormRisk) -> None:
    w = risk.weights
    assert risk.examples == GROUPS
    parts = [in_training_mode(risk, w, x[0], y[0]) for x, y in risk.batches]
    expected = float(torch.stack(parts).mean()) + 0.5 * DECAY * float(w.square().sum())
    assert risk.loss() == pytest.approx(expected, rel=IDENTITY)
    slopes = gradients(risk, w)
    agree(risk.gradient(), slopes.mean(0) + DECAY * w, 1e-11)
    agree(torch.cat(list(risk.example_gradients())), slopes, 1e-11)
    agree(gradient_noise.covariance(risk), np.cov(slopes.numpy(), rowvar=False, ddof=0), 1e-10)
    # Of running statistics it is another loss.
    x, y = (torch.cat([part[i][0] for part in risk.batches]) for i in (0, 1))
    plain = EmpiricalRisk(risk.model, [(x, y)], weight_decay=DECAY)
    assert abs(plain.loss() - risk.loss()) > 0.01
    assert fingerprint(plain) != fingerprint(risk)


def test_curvature_and_third_derivatives_are_differences(risk: BatchNormRisk) -> None:
    w = risk.weights
    v, u = torch.randn_like(w), torch.randn_like(w)
    expected = central(lambda w: gradients(risk, w).mean(0), w, v) + DECAY * v
    agree(risk.hessian_product(v), expected, 1e-7)
    agree(risk.hessian() @ v, expected, 1e-7)

    def bend(w: Tensor) -> Tensor:
        return v @ risk.at(w).hessian_product(v)

    # Torch's kernel would be off in the second digit.
    assert float(risk.third(v) @ u) == pytest.approx(float(central(bend, w, u)), rel=1e-6)


def test_gauss_newton_of_groups(risk: BatchNormRisk) -> None:
    w = risk.weights
    total = torch.zeros(len(w), len(w), dtype=torch.double)
    for x, _ in risk.batches:

        def logits(w: Tensor, x: Tensor = x) -> Tensor:
            with risk.evaluating():
                return risk.output(w, x)[0]

        q = logits(w).softmax(1).detach()
        h = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
        j = torch.stack([central(logits, w, e).detach() for e in torch.eye(len(w)).double()], -1)
        total += torch.einsum("ncp,ncd,ndq->pq", j, h, j) / (SIZE * GROUPS)
    agree(risk.ggn(), total + DECAY * torch.eye(len(w)).double(), 1e-6)
    v = torch.randn_like(w)
    agree(risk.ggn_product(v), risk.ggn() @ v, 1e-10)


def test_the_model_is_left_as_it_is(risk: BatchNormRisk) -> None:
    model = risk.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    risk.hessian_product(risk.weights)
    list(risk.example_gradients())
    risk.ggn()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_everything_else_works_on_groups(risk: BatchNormRisk) -> None:
    local = measure_local(risk, None)
    slopes = gradients(risk, risk.weights).numpy()
    c = np.cov(slopes, rowvar=False, ddof=0)
    agree(local.noise, local.pairs.vectors.T @ c @ local.pairs.vectors, 1e-9)
    lr = 0.05
    ((_, found),) = train_runs(risk, Training(lr, 1, 1), 3, [1])
    # One step of one group each: the gradient of some group.
    choices = risk.weights - lr * (torch.from_numpy(slopes) + DECAY * risk.weights)
    gaps = (found[:, None] - choices[None]).abs().amax(-1)
    assert float(gaps.amin(1).max()) < 1e-12


def test_groups_keep_the_order_and_leave_out_the_rest() -> None:
    x, y = torch.arange(11.0)[:, None], torch.arange(11)
    batches = grouped([(x[:3], y[:3]), (x[3:], y[3:])], 4)
    assert [tuple(a.shape) for a, _ in batches] == [(1, 4, 1)] * 2
    assert torch.equal(torch.cat([b.flatten() for _, b in batches]), y[:8])
    for size, message in ((1, "size must be an integer >= 2; got 1"), (12, "at most the 11")):
        with pytest.raises(NQMError, match=message):
            grouped([(x, y)], size)
