"""TF32 in training alone: measurements compute with all digits of float32, and restore what was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from full_size import config, task_of
from meter import CUDA, gpu
from torch import Tensor, nn

from neural import evaluate
from neural.curvature.risk import EmpiricalRisk
from neural.training import cli, cli_options
from neural.training.preflight import check_run
from neural.training.task import Runtime
from nqm.errors import NQMError

FULL, FAST = ("highest", False), ("high", True)


def now() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_in_training() -> Iterator[None]:
    before = now()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cudnn.benchmark = False


class Noting(nn.Module):
    """Notes the precision of its passes forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: list[tuple[str, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(now())
        return self.linear(x) ** 2


def test_curvature_and_evaluation_use_full_float32() -> None:
    model = Noting()
    data = [(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))]
    risk = EmpiricalRisk(model, data, "all")
    for measure in (risk.hessian_product, risk.ggn_product, risk.output_slopes):
        measure(torch.ones_like(risk.weights))
    risk.gradient()
    next(risk.example_gradients())
    evaluate.predict(model, data)
    evaluate.score(model, data)
    evaluate.score_text(model, data)
    assert len(model.seen) > 5
    assert set(model.seen) == {FULL}
    assert now() == FAST


def test_an_error_restores_the_setting() -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate.score(nn.Identity(), ((1 / 0, None) for _ in range(1)))
    assert now() == FAST


@pytest.mark.parametrize(("trains", "expected"), [(True, FAST), (False, FULL)])
def test_commands_that_train_may_use_tf32(
    monkeypatch: pytest.MonkeyPatch, trains: bool, expected: tuple[str, bool]
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with gpu():
        assert cli_options.make_runtime("cuda:0", None, None, trains=trains).device == CUDA
    assert now() == expected


def test_the_train_command_asks_for_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def note(*_: object, trains: bool = False, **others: object) -> Runtime:
        asked.append(trains)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_runtime", note)
    CliRunner().invoke(cli.train, ["digits_bn"])
    CliRunner().invoke(cli.evaluate, ["nowhere"])
    assert asked == [True, False]


def test_recurrent_layers_are_not_run_in_float16() -> None:
    """Torch's autocast for cuDNN's recurrent layers does so whatever its type."""
    run = config("enwik8_lstm_rank1", 'train.precision="bfloat16"')
    with gpu(), pytest.raises(NQMError, match="layers of lstm_lm in float16 on a GPU"):
        check_run(run, Runtime(CUDA), task_of(run, Runtime(CUDA)))


def test_a_gpu_without_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config("cifar10_bn", 'model.name="wrn-10-1"', scale="gpu")
    with gpu():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        with pytest.raises(NQMError, match=r"newer; Tesla T4 has none; set it to 'float32'"):
            check_run(run, Runtime(CUDA), task_of(run, Runtime(CUDA)))
