"""Networks, losses and data of users that cannot be measured are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from neural.bridge import BridgeConfig, measure
from neural.curvature.example_losses import cross_entropy
from neural.curvature.local_quadratic import measure_local
from neural.curvature.minimise import minimise
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError


class Net(nn.Module):
    """A linear net of 4 inputs and 3 classes; subclasses do something odd."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Any:
        return self.map(x)


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        x /= 2.0
        return super().forward(x)  # type: ignore[no-any-return]


class Counts(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls  # type: ignore[no-any-return]


class Rounds(Net):
    """Its loss jumps where a weight moves; derivatives are zero there, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.map.bias * 1e6).floor().remainder(2.0)  # type: ignore[no-any-return]


class Drops(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[4, 1] = torch.nan
    return x


def squared(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().mean(-1)


X, Y = data()
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "inputs changed": (InPlace, [(X.clone(), Y)], cross_entropy, "changes its inputs in place"),
    "hidden state": (Counts, [(X, Y)], cross_entropy, "when it is called again"),
    "jumps": (Rounds, [(X, Y)], cross_entropy, "its loss jumps"),
    "random": (Drops, [(X, Y)], cross_entropy, "training=self.training"),
    "precision": (Net, [(X.double(), Y)], cross_entropy, "fails on the first examples.*float64"),
    "shape": (Net, [(X[:, :3], Y)], cross_entropy, r"inputs float32 \(3,\)"),
    "many classes": (Net, [(X[:3], Y[:3]), (X[3:], Y[3:] + 1)], cross_entropy, r"in 0\.\.2.*got 3"),
    "NaN": (Net, [(X[:2], Y[:2]), (with_nan(X)[2:], Y[2:])], cross_entropy, "number 4, holds NaN"),
    "broadcast": (lambda: nn.Linear(4, 1), [(X, X[:, 0])], squared, r"output\.squeeze\(1\)"),
    "one number": (Net, [(X, Y)], nn.CrossEntropyLoss(), "reduction='none'"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_measured_is_refused(case: str) -> None:
    make, batches, loss, told = CASES[case]
    torch.manual_seed(0)
    starts: list[Callable[[EmpiricalRisk], Any]] = [
        EmpiricalRisk.check,
        lambda risk: minimise(risk, 2),
        lambda risk: measure_local(risk, 2),
    ]
    for start in starts:
        with pytest.raises(NQMError, match=told) as said:
            start(EmpiricalRisk(make(), batches, loss=loss))
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ((X, Y), r"pairs \(inputs, targets\).*got a Tensor"),
        ([(X, X, Y)], "got a tuple of 3"),
        ([(X, X)], "integer labels.*CrossEntropyLoss"),
        ([(X, Y.to("meta"))], r"targets have no values \(device 'meta'\)"),
    ],
)
def test_data_of_another_form_are_refused(batches: Any, told: str) -> None:
    with pytest.raises(NQMError, match=told):
        EmpiricalRisk(Net(), batches)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(NQMError, match=r"has no values \(device 'meta'\); load"):
        EmpiricalRisk(Net().to("meta"), [(X, Y)])


@pytest.mark.parametrize("model", [torch.tanh, None])
def test_only_modules_are_measured(model: Any) -> None:
    with pytest.raises(NQMError, match=r"must be a torch\.nn\.Module"):
        EmpiricalRisk(model, [(X, Y)])


def test_torchscript_is_refused() -> None:
    program = torch.jit.trace(nn.Linear(4, 3), X)  # type: ignore[no-untyped-call]
    with pytest.raises(NQMError, match="TorchScript"):
        EmpiricalRisk(program, [(X, Y)])


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    one, other = (EmpiricalRisk(Net(), [(X, labels)]) for labels in (Y, Y.to(kind)))
    other = other.at(one.weights)
    other.check()
    assert other.loss() == one.loss()


def test_torch_s_orthogonal_layer_jumps() -> None:
    """Its diagonal is cut to whole numbers, so that a weight of 0.999 is a zero."""
    torch.manual_seed(0)
    layer = parametrizations.orthogonal(nn.Linear(4, 3))
    with pytest.raises(NQMError, match="its loss jumps"):
        EmpiricalRisk(layer, [(X, Y)]).check()


def test_steep_losses_and_kinks_are_no_jumps() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 3)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20.0)
    risk = EmpiricalRisk(model, [(X, Y)])
    risk.check()
    risk.rescaled(torch.linspace(0.0, 3.0, risk.size)).check()


@pytest.mark.parametrize(
    ("loss", "decay", "told"),
    [
        (lambda output, targets: output.sum(1), 0.0, "largest curvature of the loss is 0"),
        (lambda output, targets: 0.0 * output.sum(1) + 1.0, 0.1, "same gradient"),
    ],
)
def test_without_curvature_or_noise_there_is_nothing_to_predict(
    loss: Any, decay: float, told: str
) -> None:
    risk = EmpiricalRisk(Net(), [(X, Y)], loss=loss, weight_decay=decay)
    with pytest.raises(NQMError, match=told):
        measure(risk, BridgeConfig(eigenpairs=0, steps=10))
