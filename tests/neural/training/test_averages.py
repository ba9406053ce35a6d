"""Averages over time: the roster's contract, their options, and one written from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import Batch, LatePhase
from neural.training import checkpoint, preflight
from neural.training import train as training
from neural.training.averages import AVERAGES, EMA, SWA, Average, single_models
from neural.training.build import plain_model
from neural.training.config import build, describe
from neural.training.task import Runtime, open_task
from neural.training.train import train
from nqm.errors import NQMError
from tests.tiny_runs import (
    LATE,
    assert_equal,
    assert_same_run,
    mapping,
    recipe,
    tiny,
    value,
    weights,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def network_with_members() -> nn.Module:
    return LatePhase(network(), 2, "batchnorm+head", noise=0.3)


def epoch() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 3, generator=generator), None) for _ in range(3)]


def moved(module: nn.Module, size: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size
    return module


# --- the roster ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(AVERAGES))
@pytest.mark.parametrize("make", [network, network_with_members])
def test_every_member_keeps_the_contract(method: str, make: Callable[[], nn.Module]) -> None:
    kind = AVERAGES[method]
    assert kind.method == method
    assert kind.every_step == (kind.step is not Average.step)
    average, module = kind(start_epoch=1), make()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = average.begin(module)
    shapes = {name: tensor.shape for name, tensor in state.state_dict().items()}
    average.step(state, module)
    average.end_epoch(state, module, 2)
    assert_equal(module.state_dict(), before)

    # Saved here, loaded into a new state there, and on: the same as without a stop.
    saved = {name: tensor.clone() for name, tensor in state.state_dict().items()}
    assert {name: tensor.shape for name, tensor in saved.items()} == shapes
    other = average.begin(moved(make(), 7.0))
    other.load_state_dict(saved)
    moved(module, 0.5)
    assert_equal(state.state_dict(), saved)  # what is kept is a copy
    for one in (state, other):
        average.step(one, module)
        average.end_epoch(one, module, 3)
    assert_equal(other.state_dict(), state.state_dict())

    models = average.models(state, epoch)
    assert method in models
    assert all(name == method or name.startswith(f"{method}_") for name in models)
    network().load_state_dict(models[method].state_dict())
    for model in models.values():
        assert model.eval()(epoch()[0][0]).shape == (6, 2)


def test_values_of_two_updates() -> None:
    """SWA: their mean. EMA starts at the first one: d first + (1 - d) second."""
    module = nn.Linear(1, 1, bias=False)
    for average, expected in ((SWA(), 3.0), (EMA(decay=0.75), 2.5)):
        state = average.begin(module)
        for number in (2.0, 4.0):
            nn.init.constant_(module.weight, number)
            average.step(state, module)
            average.end_epoch(state, module, 1)
        weight = average.models(state, lambda: [])[average.method].state_dict()["weight"]
        assert weight.item() == pytest.approx(expected, rel=1e-6)


def test_members_give_every_mean_that_may_differ() -> None:
    assert list(single_models(network(), "x")) == ["x"]
    assert list(single_models(network_with_members(), "x")) == ["x", "x_outputs"]


# --- options -------------------------------------------------------------------------------------

FOREIGN = [
    (method, option.name, option.default)
    for method, kind in AVERAGES.items()
    for other in AVERAGES.values()
    for option in fields(other)
    if option.name not in {own.name for own in fields(kind)}
]


@pytest.mark.parametrize(("method", "option", "default"), FOREIGN)
def test_options_of_another_method_are_refused_even_at_their_default(
    method: str, option: str, default: Any
) -> None:
    own = ", ".join(one.name for one in fields(AVERAGES[method]))
    message = f"average.{option} is no option of average.method = '{method}', which has {own}"
    average = {"method": method, "start_epoch": 1, option: default}
    with pytest.raises(NQMError, match=message) as caught:
        build(mapping(average=average))
    assert "\n" not in str(caught.value)


def test_an_arm_that_names_another_method_is_told_of_options_it_inherits() -> None:
    arms = {"a": {"use": ["average"]}, "b": {"use": ["average"], "average": {"method": "swa"}}}
    average = {"method": "ema", "start_epoch": 1, "decay": 0.9}
    with pytest.raises(NQMError, match=r"^arm\.b: average\.decay is no option .* 'swa', which has"):
        recipe(arms, average=average)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ema", "start_epoch": -1}, "average.start_epoch must be an integer >= 0"),
        ({"method": "ema", "decay": "most"}, "average.decay must be a number; got 'most'"),
        ({"method": "ema", "decay": 1.0}, r"average.decay must lie in \[0, 1\); got 1.0"),
        ({"method": "ema", "beta": 0.9}, "average.beta is no option .* which has start_epoch, dec"),
        ({"method": ["swa"]}, "average.method .* is unknown"),
        ({"decay": 0.9}, "average.method is missing"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message) as caught:
        build(mapping(average=options))
    assert "\n" not in str(caught.value)


def test_a_run_states_the_options_of_its_own_method_alone() -> None:
    for options in ({"method": "swa", "start_epoch": 1}, {"method": "ema", "start_epoch": 0}):
        stated = describe(tiny(average=options))["average"]
        assert stated == options | ({"decay": 0.999} if options["method"] == "ema" else {})


# --- a strategy of one's own: one class, one entry in the roster ---------------------------------


class _Snapshots(nn.Module):
    """Copies of a module, the latest last, and how many were taken."""

    taken: Tensor

    def __init__(self, module: nn.Module, count: int):
        super().__init__()
        single = single_models(module, "x")["x"]
        self.copies = nn.ModuleList(duplicate(single) for _ in range(count))
        self.register_buffer("taken", torch.tensor(0))


class _MeanPrediction(nn.Module):
    """Logarithm of the mean probability that some models give."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.stack([model(x) for model in self.models])
        return logits.softmax(-1).mean(0).log()


@dataclass(frozen=True)
class SnapshotEnsemble(Average[_Snapshots]):
    """Mean prediction of snapshots at the ends of cycles (Huang et al. 2017)."""

    method: ClassVar[str] = "snapshots"

    cycle: int = 1
    count: int = 3

    def begin(self, module: nn.Module) -> _Snapshots:
        return _Snapshots(module, self.count)

    def end_epoch(self, state: _Snapshots, module: nn.Module, epoch: int) -> None:
        if epoch % self.cycle:
            return
        now = single_models(module, "x")["x"].state_dict()
        state.copies[int(state.taken) % self.count].load_state_dict(now)
        state.taken += 1

    def models(
        self, state: _Snapshots, batches: Callable[[], Iterable[Batch]]
    ) -> dict[str, nn.Module]:
        used = list(state.copies)[: int(state.taken)]
        last = used[(int(state.taken) - 1) % self.count]
        return {self.method: last, f"{self.method}_ensemble": _MeanPrediction(used)}


@pytest.fixture
def _snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AVERAGES, "snapshots", SnapshotEnsemble)


SNAPSHOTS = {"method": "snapshots", "start_epoch": 1, "cycle": 2, "count": 2}


@pytest.mark.usefixtures("_snapshots")
def test_a_snapshot_ensemble_is_trained_and_measured(tmp_path: Path) -> None:
    run = build(mapping(train={"epochs": 6}, average=SNAPSHOTS))
    assert build(describe(run)) == run
    train(run, tmp_path / "run", keep=(4, 6))
    task = open_task(run, Runtime())
    x = torch.cat([inputs for inputs, _ in task.test()])
    labels = torch.cat([targets for _, targets in task.test()])
    probabilities = []
    for epochs in (4, 6):
        net = plain_model(run.model, task)
        net.load_state_dict(checkpoint.load(tmp_path / "run" / f"epoch{epochs}.pt")["weights"])
        probabilities.append(net.eval()(x).softmax(-1).detach().double())
    table = training.RunFolder(tmp_path / "run", run).result()
    # The last snapshot is the run's model; the ensemble predicts the mean of the last two.
    mean = torch.stack(probabilities).mean(0)
    right = (mean.argmax(-1) == labels).double().mean().item()
    assert value(table, "snapshots_ensemble", "accuracy") == pytest.approx(right)
    nll = -mean.log().gather(1, labels[:, None]).mean().item()
    assert value(table, "snapshots_ensemble", "nll") == pytest.approx(nll, rel=1e-5)
    last = checkpoint.load(tmp_path / "run" / "epoch6.pt")["weights"]
    assert_equal(weights(tmp_path / "run"), last)


@pytest.mark.usefixtures("_snapshots")
def test_a_snapshot_ensemble_of_members_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(mapping(train={"epochs": 6}, late_phase=LATE | {"members": 5}, average=SNAPSHOTS))
    train(run, tmp_path / "whole")

    class StoppedError(Exception):
        """Stands for a kill: the checkpoint is the one before."""

    original = training.TrainState.end_epoch

    def end_epoch(self: training.TrainState, epoch: int) -> None:
        original(self, epoch)
        if epoch == 5:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(training.TrainState, "end_epoch", end_epoch)
        patch.setattr(training, "CHECKPOINT_EVERY", -1.0)
        with pytest.raises(StoppedError):
            train(run, tmp_path / "killed")
    state = checkpoint.load(tmp_path / "killed" / "checkpoint.pt")
    assert int(state["average"]["taken"]) == 2
    train(run, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.usefixtures("_snapshots")
def test_options_and_preflight_know_the_new_strategy() -> None:
    with pytest.raises(NQMError, match="which has start_epoch, cycle, count"):
        build(mapping(average=SNAPSHOTS | {"decay": 0.9}))
    with pytest.raises(NQMError, match=r"average\.cycle must be a whole number"):
        build(mapping(average=SNAPSHOTS | {"cycle": 0.5}))
    # It takes weights at the end of an epoch, whether or not a cycle was just completed.
    late = LATE | {"members": 7}
    run = tiny(train={"epochs": 4}, late_phase=late, average=SNAPSHOTS | {"start_epoch": 3})
    preflight.check_cycles(run, 4)
    average = {"method": "ema", "start_epoch": 3}
    with pytest.raises(NQMError, match="last complete cycle"):
        preflight.check_cycles(tiny(train={"epochs": 4}, late_phase=late, average=average), 4)
