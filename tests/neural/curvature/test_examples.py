"""Inputs of any structure, cut into examples: the same numbers as of one tensor, or a refusal."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neural.bridge.config import Training
from neural.bridge.sgd_chains import train_late_phase, train_runs
from neural.curvature import gradient_noise
from neural.curvature.cache import fingerprint
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import BatchNormRisk, grouped
from nqm.errors import NQMError
from tests.tolerances import IDENTITY, agree


class Two(nn.Module):
    """Of two inputs what a linear map of both gives; `shift` is shared by the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, shift: float = 0.0) -> Tensor:
        y: Tensor = self.map(torch.cat([a, b[..., None]], -1)).tanh() + shift
        return y


class One(Two):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x[..., :4], x[..., 4])


SHAPES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b, 0.0],
    "dict": lambda a, b: {"b": b, "a": a},
    "mapping": lambda a, b: UserDict(a=a, b=b, shift=torch.tensor(0.0)),
}


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 5, dtype=torch.double), torch.randint(3, (7,))


def of(shape: str | None, kind: type[EmpiricalRisk] = EmpiricalRisk) -> EmpiricalRisk:
    x, y = data()
    made = (lambda x: x) if shape is None else lambda x: SHAPES[shape](x[:, :4], x[:, 4])
    torch.manual_seed(1)
    model = (One() if shape is None else Two()).double()
    batches = [(made(x[:3]), y[:3]), (made(x[3:]), y[3:])]
    return kind(model, batches if kind is EmpiricalRisk else grouped(batches, 2), weight_decay=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_structure_gives_the_same(shape: str) -> None:
    plain, other = of(None), of(shape)
    v = torch.randn_like(plain.weights)
    agree(other.hessian_product(v), plain.hessian_product(v), IDENTITY)
    agree(other.ggn(), plain.ggn(), IDENTITY)
    agree(gradient_noise.covariance(other), gradient_noise.covariance(plain), IDENTITY)
    assert gradient_noise.trace(other) == pytest.approx(gradient_noise.trace(plain), rel=IDENTITY)
    training = Training(0.1, 2, 3, 0.5)
    trained = [next(iter(train_runs(one, training, 2, [3])))[1] for one in (plain, other)]
    agree(trained[1], trained[0], IDENTITY)
    late = [next(iter(train_late_phase(one, training, 2, "all", [2])))[1] for one in (plain, other)]
    agree(late[1], late[0], IDENTITY)
    groups = [of(one, BatchNormRisk) for one in (None, shape)]
    assert groups[1].examples == 3
    agree(groups[1].gradient(), groups[0].gradient(), IDENTITY)


def test_the_key_holds_all_of_the_data() -> None:
    keys = {fingerprint(of("dict"))}
    for name, value in (("a", torch.zeros(3, 4).double()), ("shift", 0.5)):
        risk = of("dict")
        risk.batches[0][0][name] = value
        keys.add(fingerprint(risk))
    assert len(keys) == 3


def test_rows_that_cannot_be_told_are_refused() -> None:
    x, y = data()
    a, b = x[:, :4], x[:, 4]
    nested = {"a": a, "b": nn.Parameter(b), "shift": object()}
    for inputs, told in (
        ((a, b, torch.zeros(3, 3)), r"holds an input of shape \(3, 3\)"),
        ((a.T, b), r"a batch of 7 examples holds an input of shape \(4, 7\)"),
        (nested, "hold a object, in which examples cannot be told apart"),
    ):
        with pytest.raises(NQMError, match=told):
            gradient_noise.trace(EmpiricalRisk(Two().double(), [(inputs, y)]))
    batches = [((a, b), y), ((a[:, :2], b), y)]
    with pytest.raises(NQMError, match="batches differ in the structure"):
        grouped(batches, 2)


def test_losses_and_targets_that_would_be_miscounted_are_refused() -> None:
    x, y = data()
    model = One().double()

    def mean(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets)

    with pytest.raises(NQMError, match=r"per example, shape \(7,\); got \(\); .*'none'"):
        EmpiricalRisk(model, [(x, y)], loss=mean).loss()
    for targets, told in (
        (torch.where(y == y[0], -100, y), "examples have 0 to 1 labels other than -100"),
        (torch.where(y == y[0], -1, y), "labels must be 0 or more, or -100 for none; got -1"),
        (torch.eye(3)[y], "targets must be integer labels"),
        (y.tolist(), "must be a tensor with a row for each example; got list"),
    ):
        with pytest.raises(NQMError, match=told):
            EmpiricalRisk(model, [(x, targets)])
    # As many labels in every example: the mean is torch's own.
    text, labels = torch.stack([x, x.flip(0), -x], 1), torch.stack([y, y, y], 1)
    labels[:, 0] = -100
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(text).flatten(0, 1), labels.flatten())
    assert EmpiricalRisk(model, [(text, labels)]).loss() == pytest.approx(
        float(expected), rel=IDENTITY
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_weights_without_usable_derivatives_are_refused(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    with pytest.raises(NQMError, match=f"weight 'weight' is {dtype}; a risk takes float32"):
        EmpiricalRisk(model, [(torch.ones(2, 4), torch.tensor([0, 1]))])
