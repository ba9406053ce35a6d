"""Two processes with half of every minibatch each, against one process with all of it."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from neural.data.sampling import EpochPlan
from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.ranks import average_gradients
from neural.training import preflight
from neural.training import train as training
from neural.training.build import plain_model
from neural.training.config import RunConfig
from neural.training.distributed import join, local_rank, summed
from neural.training.experiment import run_experiment
from neural.training.run_folder import RunFolder
from neural.training.state import TrainState
from neural.training.sync_batchnorm import synchronise
from neural.training.task import Runtime, open_task
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import read_table
from tests.tiny_runs import CNN, LATE, recipe, tiny, together, weights

#: Float64 sums in another order, after twelve steps.
SAME = 1e-10
#: Without BatchNorm, whose statistics are each process's own.
BASE: dict[str, Any] = {"train": {"precision": "float64"}, "data": {"test_examples": 20}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, clipped": {"train": {"precision": "float64", "clip_norm": 0.3}},
    "late-phase": {"late_phase": LATE | {"noise": 0.2}},
    "late-phase, clipped, mean, SWA": {
        "late_phase": LATE | {"gamma": "mean"},
        "train": {"precision": "float64", "clip_norm": 0.3},
        "average": {"method": "swa", "start_epoch": 1},
    },
    "late-phase, fused, short": {"late_phase": LATE | {"fused": True, "leftover": "members"}},
    "late-phase, GroupNorm": {
        "model": CNN | {"norm": "group"}, "late_phase": LATE | {"select": "groupnorm+head"},
    },
    "star of snapshots": {
        "snapshots": {"kind": "star", "members": 2, "first_epochs": 2, "cycle_epochs": 1},
    },
}  # fmt: skip


def cases() -> dict[str, RunConfig]:
    return {name: tiny(**BASE | extra) for name, extra in KINDS.items()}


def train_all(rank: int, world: int, folder: Path) -> tuple[int, int, list[str], list[str]]:
    written: list[str] = []
    replace = os.replace

    def noted(source: Any, target: Any) -> None:
        written.append(str(target))
        replace(source, target)

    os.replace = noted  # type: ignore[assignment]
    statuses = []
    for name, run in cases().items():
        statuses.append(train(run, folder / name, Runtime(rank=rank, world=world)).status)
    return rank, world, written, statuses


@pytest.mark.slow
def test_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    answers = together(2, train_all, tmp_path / "two")
    assert [answer[:2] for answer in answers] == [(0, 2), (1, 2)]
    assert answers[0][2]
    assert answers[1][2] == []  # the first alone writes
    for name, run in cases().items():
        train(run, tmp_path / "one" / name)
        for file in ("model", "late"):
            if not (tmp_path / "one" / name / f"{file}.pt").exists():
                continue
            expected = weights(tmp_path / "one" / name, file)
            found = weights(tmp_path / "two" / name, file)
            assert expected.keys() == found.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=SAME, atol=SAME)
    assert answers[0][3] == ["finished"] * len(KINDS)


def train_arms(rank: int, world: int, folder: Path) -> list[float]:
    arms = {
        "base": {},
        "late": {"use": ["late_phase"]},
        "hot": {"train": {"lr": 1e30}},
        "swa": {"average": {"method": "swa", "start_epoch": 2}},
    }
    made = recipe(arms, **BASE, late_phase=LATE, seeds=2)
    table = run_experiment(made, folder, Runtime(rank=rank, world=world))
    return [] if table.empty else table["value"].dropna().tolist()


@pytest.mark.slow
def test_experiment_of_two_processes(tmp_path: Path) -> None:
    first, second = together(2, train_arms, tmp_path / "two")
    assert second == []
    alone = train_arms(0, 1, tmp_path / "one")
    torch.testing.assert_close(torch.tensor(first), torch.tensor(alone), rtol=1e-5, atol=1e-5)
    assert set(read_table(tmp_path / "two/results.parquet")["status"]) == {"finished", "diverged"}


def step_with_a_bad_example(rank: int, world: int) -> tuple[bool, bool]:
    run = tiny(**BASE)
    runtime = Runtime(rank=rank, world=world)
    task = open_task(run, runtime)
    train_state = TrainState(run, task, runtime)
    x, y = next(task.stream.epoch(0))
    train_state.step([(x, y)])
    before = train_state.finite()
    train_state.step([(x * (torch.inf if rank == 1 else 1.0), y)])
    return before, train_state.finite()


def test_all_processes_stop_when_one_diverges() -> None:
    assert together(2, step_with_a_bad_example) == [(True, False)] * 2


def mean_loss_of_two_steps(rank: int, world: int) -> tuple[list[float], float]:
    run = tiny(**BASE)
    runtime = Runtime(rank=rank, world=world)
    task = open_task(run, runtime)
    train_state = TrainState(run, task, runtime)
    losses = [float(train_state.step([batch])[0]) for batch in task.stream.epoch(0)][:2]
    train_state.losses.copy_(torch.tensor([sum(losses), 2.0], dtype=torch.float64))
    return losses, train_state.take_mean_loss()


def test_training_loss_is_that_of_all_processes() -> None:
    (first, told), (second, other) = together(2, mean_loss_of_two_steps)
    assert first != second
    assert told == other == pytest.approx(sum(first + second) / 4, rel=1e-14)


#: BatchNorm, and averages whose statistics are computed once more from the training data.
STATISTICS: dict[str, dict[str, Any]] = {
    "swa": {"average": {"method": "swa", "start_epoch": 0}},
    "late swa": {"average": {"method": "swa", "start_epoch": 1}, "late_phase": LATE},
    "soup": {"snapshots": {"kind": "star", "members": 2, "first_epochs": 1, "cycle_epochs": 1}},
}


def with_statistics(name: str) -> RunConfig:
    train = {"precision": "float64", "epochs": 2}
    return tiny(train=train, model=CNN, data={"test_examples": 20}, **STATISTICS[name])


def train_with_statistics(rank: int, world: int, folder: Path) -> list[str]:
    return [
        train(with_statistics(name), folder / name, Runtime(rank=rank, world=world)).status
        for name in STATISTICS
    ]


@pytest.mark.slow
def test_statistics_are_those_of_the_data_of_all_processes(tmp_path: Path) -> None:
    """As one process finds them from the parts, which are minibatches of half the size there."""
    assert together(2, train_with_statistics, tmp_path) == [["finished"] * len(STATISTICS)] * 2
    for name in STATISTICS:
        run = with_statistics(name)
        saved = weights(tmp_path / name)
        model = plain_model(run.model, open_task(run, Runtime())).double()
        means: dict[str, list[Tensor]] = {}
        for rank in range(2):
            model.load_state_dict(saved)
            stream = open_task(run, Runtime(rank=rank, world=2)).stream
            recompute_statistics(model, stream.epoch(run.train.epochs))
            for key, value in model.named_buffers():
                means.setdefault(key, []).append(value.clone())
        for key, (first, second) in means.items():
            if "running" in key and name != "late swa":  # whose members have their own
                assert not torch.equal(first, second)
                torch.testing.assert_close(saved[key], (first + second) / 2, rtol=SAME, atol=SAME)


def train_and_be_killed(rank: int, world: int, folder: Path, after: int) -> str:
    training.CHECKPOINT_EVERY = -1.0
    original, left = TrainState.step, after

    def step(self: TrainState, batches: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batches)

    TrainState.step = step  # type: ignore[method-assign]
    return train(cases()["late-phase"], folder, Runtime(rank=rank, world=world)).status


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(EOFError):
        together(2, train_and_be_killed, tmp_path / "killed", 5)
    assert (tmp_path / "killed/checkpoint.pt").exists()
    assert together(2, train_and_be_killed, tmp_path / "killed", 99) == ["finished"] * 2
    assert json.loads((tmp_path / "killed/run.json").read_text())["world"] == 2
    train(cases()["late-phase"], tmp_path / "one")
    for key, tensor in weights(tmp_path / "one", "late").items():
        found = weights(tmp_path / "killed", "late")[key]
        torch.testing.assert_close(found, tensor, rtol=SAME, atol=SAME)


@pytest.mark.parametrize(("before", "now", "how"), [
    (1, 2, "written by 1 process, and now there are 2; go on without torchrun"),
    (4, 1, "written by 4 processes, and now there are 1; go on by torchrun --nproc-per-node 4"),
])  # fmt: skip
@pytest.mark.parametrize("donor", [False, True])
def test_another_number_of_processes_does_not_go_on(
    tmp_path: Path, before: int, now: int, how: str, donor: bool
) -> None:
    """BatchNorm sees other parts of the minibatches, so that it would be another training."""
    run, folder = tiny(), tmp_path / "run"
    with RunFolder(folder, run, world=before).begun():
        pass
    name = "epoch1.pt" if donor else "checkpoint.pt"
    (folder / name).write_bytes(b"not read")
    start = folder / name if donor else None
    asked = tmp_path / "other" if donor else folder
    with pytest.raises(NQMError, match=how):
        train(run, asked, Runtime(world=now), start=start)
    assert (folder / name).read_bytes() == b"not read"


def test_a_run_without_a_checkpoint_begins_with_any_number(tmp_path: Path) -> None:
    run = tiny()
    with RunFolder(tmp_path, run, world=4).begun():
        pass
    RunFolder(tmp_path, run, world=1).check_world(None)
    train(run, tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["world"] == 1


def reduce(rank: int, world: int) -> list[Any]:
    held = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(())),
            torch.nn.Parameter(torch.zeros(4))]  # fmt: skip
    held[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    held[1].grad = torch.tensor(10.0 * rank)
    average_gradients(held)
    average_gradients([held[2]])
    value = torch.tensor([1.0 + rank])
    total = summed(value)
    grads = [p.grad.tolist() for p in held if p.grad is not None]
    return [grads, held[2].grad is None, value.tolist(), total.tolist(), local_rank()]


def test_means_and_sums_over_processes() -> None:
    grads = [[[0.0, 1.5, 3.0], [4.5, 6.0, 7.5]], 5.0]
    assert together(2, reduce) == [
        [grads, True, [1.0], [3.0], 0],
        [grads, True, [2.0], [3.0], 1],
    ]


def test_process_of_its_own_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert join() == (0, 1)
    assert local_rank() == 0
    assert not torch.distributed.is_initialized()


def whitened(rank: int, world: int) -> list[Any]:
    """First weights of a net whose first layer is made of what its process sees of the data."""
    run = tiny(model={"name": "fast_cnn", "width": 8}, data={"train_examples": 64})
    runtime = Runtime(rank=rank, world=world)
    task = open_task(run, runtime)
    images = next(iter(task.stream.epoch(0)))[0]
    torch.manual_seed(rank)  # nothing that was drawn before is the same either
    train_state = TrainState(run, task, runtime)
    state = train_state.model.state_dict()
    return [float(images.double().sum()), {n: v.double().sum().item() for n, v in state.items()}]


def test_all_processes_start_from_the_weights_of_the_first() -> None:
    (seen, one), (other_seen, other) = together(2, whitened)
    assert seen != other_seen
    assert one == other


def test_processes_of_processes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NQMError, match="workers must be 1 where 2 processes share a run"):
        run_experiment(recipe({"a": {}}), tmp_path / "out", Runtime(world=2), workers=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "s.toml").write_text('recipe = "digits_bn"\n[sweep]\nseed = [0, 1]\n')
    commands = [
        ["train", "digits_bn", "--workers", "2"],
        ["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "s.csv")],
        ["evaluate", str(tmp_path)],
        ["export", str(tmp_path), "--out", "x.safetensors"],
        ["bridge", str(tmp_path)],
    ]
    for rank, words in (("0", "is for one process, and torchrun has started 2"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        for command in commands:
            answer = CliRunner().invoke(main, ["neural", *command])
            assert answer.exit_code == 2
            lines = answer.stderr.splitlines()
            assert len(lines) == (rank == "0")
            assert words in answer.stderr


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE must be a whole number >= 1; got 'two'"),
        ("WORLD_SIZE", "0", "WORLD_SIZE must be a whole number >= 1; got '0'"),
        ("RANK", "-1", "RANK must be a whole number >= 0; got '-1'"),
        ("WORLD_SIZE", "2", "cannot be joined .*; start them by torchrun"),
    ],
)
def test_variables_that_torchrun_did_not_set(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str
) -> None:
    for other in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(NQMError, match=words):
        join()


#: 99 examples: the last minibatch has three, one for the first process and two for the second.
UNEQUAL: dict[str, Any] = {
    "train": {"precision": "float64", "epochs": 2},
    "data": {"test_examples": 20, "train_examples": 99},
}


def unequal() -> dict[str, RunConfig]:
    late: dict[str, dict[str, Any]] = {
        "plain": {},
        "late": {"late_phase": LATE | {"leftover": "carry"}},
        "fused": {"late_phase": LATE | {"fused": True, "leftover": "members"}},
    }
    return {name: tiny(**UNEQUAL | extra) for name, extra in late.items()}


def train_unequal(rank: int, world: int, folder: Path) -> list[float]:
    """Training losses of all runs, as the history tells them."""
    return [
        row["loss"]
        for name, run in unequal().items()
        for row in train(run, folder / name, Runtime(rank=rank, world=world)).history.to_dict(
            "records"
        )
    ]


def test_examples_weigh_the_same_where_a_minibatch_does_not_divide(tmp_path: Path) -> None:
    together(2, train_unequal, tmp_path / "two")
    for name, run in unequal().items():
        train(run, tmp_path / "one" / name)
        file = "model" if name == "plain" else "late"
        for key, tensor in weights(tmp_path / "one" / name, file).items():
            found = weights(tmp_path / "two" / name, file)[key]
            torch.testing.assert_close(found, tensor, rtol=SAME, atol=SAME)


def test_statistics_of_unequal_parts_are_weighted(tmp_path: Path) -> None:
    """Of the first layer, whose inputs do not depend on other statistics: those of all data."""
    assert together(2, train_unequal_average, tmp_path) == ["finished"] * 2
    run = unequal_average()
    model = plain_model(run.model, task := open_task(run, Runtime())).double()
    model.load_state_dict(weights(tmp_path))
    first = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert first.running_mean is not None
    found = first.running_mean.clone()
    recompute_statistics(model, task.stream.epoch(run.train.epochs))
    torch.testing.assert_close(found, first.running_mean, rtol=SAME, atol=SAME)


def unequal_average() -> RunConfig:
    return tiny(**UNEQUAL | {"model": CNN, "average": {"method": "swa", "start_epoch": 0}})


def train_unequal_average(rank: int, world: int, folder: Path) -> str:
    return train(unequal_average(), folder, Runtime(rank=rank, world=world)).status


#: BatchNorm whose statistics are those of all processes: as one process trains.
SYNCED: dict[str, dict[str, Any]] = {
    "plain": {},
    "late": {"late_phase": LATE | {"select": "batchnorm+head", "leftover": "members"}},
    "swa": {"average": {"method": "swa", "start_epoch": 1}},
}


def synced() -> dict[str, RunConfig]:
    train = {"precision": "float64", "epochs": 2, "sync_batchnorm": True}
    shared = {"model": CNN, "train": train, "data": UNEQUAL["data"]}
    return {name: tiny(**shared | extra) for name, extra in SYNCED.items()}


def train_synced(rank: int, world: int, folder: Path) -> list[str]:
    return [
        train(run, folder / name, Runtime(rank=rank, world=world)).status
        for name, run in synced().items()
    ]


def test_synchronised_batchnorm_is_that_of_one_process(tmp_path: Path) -> None:
    assert together(2, train_synced, tmp_path / "two") == [["finished"] * len(SYNCED)] * 2
    for name, run in synced().items():
        train(run, tmp_path / "one" / name)
        file = "late" if name == "late" else "model"
        expected = weights(tmp_path / "one" / name, file)
        found = weights(tmp_path / "two" / name, file)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=SAME, atol=SAME)


def layer_of_a_part(rank: int, world: int, momentum: float | None) -> list[Any]:
    """Outputs, gradients and statistics of a layer for three and two rows, as lists."""
    x = rows()[:3] if rank == 0 else rows()[3:]
    layer = synchronise(torch.nn.BatchNorm1d(4, momentum=momentum).double())
    return [value.tolist() for value in run_layer(layer, x)]


def rows() -> Tensor:
    return torch.linspace(-2.0, 3.0, 60, dtype=torch.float64).view(5, 4, 3).square()


def run_layer(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer(x)
    y = layer(x)
    (y.sin() + y**3).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]  # type: ignore[list-item]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_layer_of_unequal_parts(momentum: float | None) -> None:
    one, two = (
        [torch.tensor(value, dtype=torch.float64) for value in values]
        for values in together(2, layer_of_a_part, momentum)
    )
    expected = run_layer(torch.nn.BatchNorm1d(4, momentum=momentum).double(), rows())
    for index in (0, 1):
        joined = torch.cat([one[index], two[index]])
        torch.testing.assert_close(joined, expected[index], rtol=1e-12, atol=1e-12)
    for index in (2, 3):  # each process's loss is its own: gradients are averaged later
        both = one[index] + two[index]
        torch.testing.assert_close(both, expected[index], rtol=1e-12, atol=1e-12)
    for found in (one[4:], two[4:]):
        wide = [value.double() for value in expected[4:]]
        torch.testing.assert_close(found, wide, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_synchronised_is_refused() -> None:
    class Own(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(NQMError, match="sync_batchnorm does not know the layer Own"):
        synchronise(torch.nn.Sequential(torch.nn.Sequential(Own(3))))
    for words, sections in (
        ("late_phase.fused", {"late_phase": LATE | {"fused": True}}),
        ("train.micro_batches", {"train": {"micro_batches": 2, "sync_batchnorm": True}}),
        ("train.compile", {"train": {"compile": True, "sync_batchnorm": True}}),
    ):
        run = tiny(**{"model": CNN, "train": {"sync_batchnorm": True}} | sections)
        task = open_task(run, Runtime())
        with pytest.raises(NQMError, match=f"sync_batchnorm does not work with {words}"):
            preflight.check_run(run, Runtime(world=2), task)
        preflight.check_run(run, Runtime(), task)


def test_the_part_that_batchnorm_sees_is_told() -> None:
    run = tiny(model=CNN)
    task = open_task(run, Runtime())
    with pytest.warns(UserWarning, match="from the 8 of 32 examples that each of 4 processes has"):
        preflight.check_run(run, Runtime(world=4), task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preflight.check_run(run, Runtime(world=4, rank=1), task)
        preflight.check_run(tiny(), Runtime(world=4), task)
        preflight.check_run(tiny(model=CNN, train={"sync_batchnorm": True}), Runtime(world=4), task)


def masks(rank: int, world: int) -> list[list[float]]:
    """What dropout would draw in each of two steps, and again in the second after a resume."""
    run = tiny(**BASE)
    runtime = Runtime(rank=rank, world=world)
    task = open_task(run, runtime)
    train_state = TrainState(run, task, runtime)
    drawn = []
    train_state.model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(4).tolist()))
    first, second = list(task.stream.epoch(0))[:2]
    train_state.step([first])
    state = train_state.state_dict()
    train_state.step([second])
    torch.manual_seed(7)
    train_state.load_state_dict(state | {"done": 1})
    train_state.step([second])
    return drawn


def test_each_process_draws_its_own_dropout_masks() -> None:
    first, second = together(2, masks)
    assert len({tuple(mask) for mask in [*first, *second]}) == 4
    assert first[1] == first[2]
    assert second[1] == second[2]


def test_weights_of_shares_of_143_images_on_eight_processes() -> None:
    """Seventeen images for the first, eighteen for each other one: 8 * 17 / 143, 8 * 18 / 143."""
    plans = [EpochPlan(1143, 1000, rank=rank, world=8) for rank in range(8)]
    assert [plan.weight(0) for plan in plans] == [1.0] * 8
    assert [plan.weight(1) for plan in plans] == [136 / 143] + [144 / 143] * 7
