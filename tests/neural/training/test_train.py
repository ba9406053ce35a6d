"""Training against loops written by hand, killed and continued runs, and files that are in the way.

The loops use torch's optimizers and, for the members, `LatePhase` itself, whose mathematics has
tests of its own; here it is about which batches, rates and averages a run gives it.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neural import LatePhase, models
from neural.training import checkpoint
from neural.training import train as training
from neural.training.config import RunConfig
from neural.training.run_folder import open_run
from neural.training.state import TrainState
from neural.training.train import train
from nqm.errors import NQMError
from tests.tiny_runs import (
    BATCHES,
    CNN,
    LATE,
    assert_equal,
    assert_same_run,
    batches,
    in_process,
    tiny,
    train_until_killed,
    weights,
)

STEPS = {"schedule": "piecewise", "values": [0.1, 0.03, 0.01], "boundaries": [1, 2]}


def sgd(parameters: Any, lr: float, weight_decay: float = 5e-4) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def initial(run: RunConfig) -> nn.Module:
    torch.manual_seed(run.seed)
    return models.build(run.model.name, classes=10, channels=1, **run.model.options)


# --- against loops written by hand ---------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("model", [CNN, {"name": "mlp", "hidden": [8], "dropout": 0.3}])
def test_plain_run_is_the_loop_anyone_would_write(
    tmp_path: Path, model: dict[str, Any], seed: int
) -> None:
    run = tiny(model=model, train={"lr": STEPS}, seed=seed)
    outcome = train(run, tmp_path / "run")
    net = initial(run)
    optimizer = sgd(net.parameters(), 0.1)
    means = []
    for epoch, lr in enumerate([0.1, 0.03, 0.01]):
        optimizer.param_groups[0]["lr"] = lr
        losses = []
        for x, y in batches(run).epoch(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(np.mean(losses))
    assert outcome.status == "finished"
    assert_equal(weights(tmp_path / "run"), dict(net.state_dict()))
    np.testing.assert_allclose(outcome.history["train_loss"], means, rtol=1e-12)
    assert outcome.history["lr"].tolist() == [0.1, 0.03, 0.01]
    assert outcome.history["step"].tolist() == [4, 8, 12]


def test_rate_moves_with_every_step_if_asked(tmp_path: Path) -> None:
    line = {"schedule": "linear", "start": 0.1, "end": 0.02, "over": 2}
    run = tiny(train={"lr": line, "lr_every": "step"})
    train(run, tmp_path / "run")
    net = initial(run)
    optimizer = sgd(net.parameters(), 0.1)
    stream = itertools.chain(*(batches(run).epoch(epoch) for epoch in range(3)))
    for step, (x, y) in enumerate(stream):
        # 0.08 less over two epochs of four batches, then flat.
        optimizer.param_groups[0]["lr"] = 0.1 + (0.02 - 0.1) * min(step / 8, 1.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert_equal(weights(tmp_path / "run"), dict(net.state_dict()))


@pytest.mark.parametrize(
    ("members", "leftover"),
    [(3, "carry"), (3, "members"), (3, "drop"), (5, "carry")],  # 4 batches an epoch
)
@pytest.mark.parametrize("lr_every", ["epoch", "step"])
def test_late_phase_run_is_the_loop_of_the_library(
    tmp_path: Path, members: int, leftover: str, lr_every: str
) -> None:
    settings = {
        "start_epoch": 1, "members": members, "leftover": leftover, "gamma": 0.7,
        "noise": 0.3, "weight_decay": 1e-2,
        "member_lr": {"schedule": "linear", "start": 0.2, "end": 0.05, "over": 3},
    }  # fmt: skip
    late_settings = settings | {"select": "batchnorm+head"}
    run = tiny(
        model=CNN,
        late_phase=late_settings,
        train={"epochs": 4, "lr": STEPS, "lr_every": lr_every},
        seed=3,
    )
    train(run, tmp_path / "run")

    net = initial(run)
    base = sgd(net.parameters(), 0.1)
    for x, y in batches(run).epoch(0):
        base.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        base.step()
    late = LatePhase(
        net, members, "batchnorm+head", gamma=0.7, noise=0.3, leftover=leftover, seed=3
    )
    own = late.optimizer_like(base, weight_decay=1e-2)
    used = BATCHES
    for epoch in (1, 2, 3):
        for cycle in late.cycles(batches(run).epoch(epoch)):
            # Rates are those of the moment when the cycle's first minibatch is drawn.
            now = used / BATCHES if lr_every == "step" else used // BATCHES
            base.param_groups[0]["lr"] = [0.1, 0.03, 0.01, 0.01][int(now)]
            own.param_groups[0]["lr"] = 0.2 + (0.05 - 0.2) * min(now / 3, 1.0)
            late.step(cycle, nn.functional.cross_entropy, base, own)
            used += len(cycle)
        if leftover == "drop":
            used = (epoch + 1) * BATCHES
    state = {name: value for name, value in late.state_dict().items() if name != "carried"}
    assert_equal(weights(tmp_path / "run", "late"), state)
    assert_equal(weights(tmp_path / "run"), dict(late.averaged().state_dict()))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_other_optimizers_are_torchs(tmp_path: Path, optimizer: str) -> None:
    run = tiny(train={"optimizer": optimizer, "lr": 0.01, "betas": [0.8, 0.99], "epochs": 2})
    train(run, tmp_path / "run")
    net = initial(run)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    own = kind(net.parameters(), lr=0.01, betas=(0.8, 0.99), weight_decay=5e-4)
    for epoch in range(2):
        for x, y in batches(run).epoch(epoch):
            own.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            own.step()
    assert_equal(weights(tmp_path / "run"), dict(net.state_dict()))


@pytest.mark.parametrize("late", [None, LATE], ids=["plain", "late-phase"])
def test_micro_batches_change_nothing_without_batchnorm(
    tmp_path: Path, late: dict[str, Any] | None
) -> None:
    extra = {} if late is None else {"late_phase": late}
    for pieces in (1, 3):
        run = tiny(train={"precision": "float64", "micro_batches": pieces}, **extra)
        train(run, tmp_path / str(pieces))
    whole, cut = weights(tmp_path / "1"), weights(tmp_path / "3")
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=1e-12, atol=1e-12)


# --- averages over time --------------------------------------------------------------------------


def snapshots(run: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> list[Any]:
    """State dicts of what is trained, copied when `TrainState.<at>` is done."""
    taken = []
    original = getattr(TrainState, at)

    def watched(self: Any, argument: Any) -> Any:
        result = original(self, argument)
        state = {n: v.clone() for n, v in self.trained.state_dict().items()}
        taken.append((self.epoch, argument, state))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, at, watched)
        train(run, folder)
    return taken


def test_swa_of_a_plain_run_is_the_mean_over_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny(model=CNN, train={"epochs": 5}, average={"method": "swa", "start_epoch": 2})
    taken = snapshots(run, tmp_path / "run", monkeypatch, "end_epoch")
    kept = [state for _, epoch, state in taken if epoch > 2]
    assert len(kept) == 3
    net = initial(run)
    mean = {n: torch.stack([one[n] for one in kept]).double().mean(0) for n in kept[0]}
    net.load_state_dict({n: v.to(kept[0][n].dtype) for n, v in mean.items()})
    final = weights(tmp_path / "run")
    for name, _ in net.named_parameters():
        torch.testing.assert_close(final[name].double(), mean[name], rtol=1e-6, atol=1e-7)
    # Statistics of the first BatchNorm follow from the data alone: a mean over the batches of
    # one pass, each batch's variance unbiased. Its input depends on no other statistics.
    first = [
        nn.functional.conv2d(x, final["features.0.weight"], padding=1)
        for x, _ in batches(run).epoch(5)
    ]
    means = torch.stack([one.mean((0, 2, 3)) for one in first]).mean(0)
    variances = torch.stack([one.var((0, 2, 3), unbiased=True) for one in first]).mean(0)
    torch.testing.assert_close(final["features.1.running_mean"], means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final["features.1.running_var"], variances, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("members", [3, 9], ids=["K=3", "a cycle that ends two epochs"])
def test_swa_of_members_is_the_mean_of_base_and_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: int
) -> None:
    run = tiny(
        train={"epochs": 5},
        late_phase=LATE | {"members": members},
        average={"method": "swa", "start_epoch": 1},
    )
    taken = snapshots(run, tmp_path / "run", monkeypatch, "end_epoch")
    kept = [state for _, epoch, state in taken if epoch > 1]
    assert [epoch for _, epoch, _ in taken] == [1, 2, 3, 4, 5]
    final = weights(tmp_path / "run")
    assert all(any("stacked" in name for name in one) for one in kept)
    mean = {n: torch.stack([one[n].double() for one in kept]).mean(0) for n in kept[0]}
    for name, tensor in final.items():
        head = f"stacked.{name.replace('.', '/')}"
        expected = mean[head].mean(0) if head in mean else mean[f"model.{name}"]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("leftover", ["carry", "members"])
def test_ema_follows_every_base_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leftover: str
) -> None:
    run = tiny(
        train={"epochs": 4},
        late_phase=LATE | {"leftover": leftover},
        average={"method": "ema", "start_epoch": 2, "decay": 0.6},
    )
    taken = snapshots(run, tmp_path / "run", monkeypatch, "step")
    average: dict[str, Any] = {}
    for epoch, group, state in taken:
        if epoch <= 2 or len(group) < 3:
            continue
        for name, tensor in state.items():
            before = average.get(name, tensor.double())
            average[name] = 0.6 * before + 0.4 * tensor.double()
    final = weights(tmp_path / "run")
    for name, tensor in final.items():
        head = f"stacked.{name.replace('.', '/')}"
        expected = average[head].mean(0) if head in average else average[f"model.{name}"]
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)


def test_averaging_does_not_disturb_training(tmp_path: Path) -> None:
    for name, extra in {"with": {"average": {"method": "ema"}}, "without": {}}.items():
        train(tiny(model=CNN, **extra), tmp_path / name)
    one, other = (train_history(tmp_path / name) for name in ("with", "without"))
    assert one.drop(columns=["average_loss", "average_accuracy"]).equals(other)


def train_history(folder: Path) -> Any:
    from nqm.table import read_table

    return read_table(folder / "history.parquet")


# --- killed and continued ------------------------------------------------------------------------

KILLED: dict[str, dict[str, Any]] = {
    "dropout, SWA, members that carry": {
        "model": CNN | {"dropout": 0.3},
        "train": {"epochs": 4, "clip_norm": 1.0},
        "late_phase": {"start_epoch": 2, "members": 3, "noise": 0.2},
        "average": {"method": "swa", "start_epoch": 2},
        "evaluate": {"every": 2, "mc_dropout": 2},
    },
    "EMA, short cycles, Adam": {
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.2},
        "train": {"epochs": 3, "optimizer": "adamw", "lr": 0.01},
        "late_phase": LATE | {"leftover": "members"},
        "average": {"method": "ema", "start_epoch": 1, "decay": 0.8},
    },
    "plain, rate by step, EMA": {
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.2},
        "train": {
            "epochs": 3,
            "lr_every": "step",
            "lr": {"schedule": "cosine", "start": 0.1, "end": 0.01, "over": 3},
        },
        "data": {"augment": ["crop", "flip"], "cutout": 2},
        "average": {"method": "ema", "start_epoch": 1, "decay": 0.8},
    },
    "more members than batches, idle steps": {
        "model": CNN,
        "train": {"epochs": 5},
        "late_phase": LATE | {"members": 5, "idle_steps": "first", "noise": 0.1},
    },
}


#: Two of them leave nothing out: carried and short cycles, SWA and EMA, both models.
OFTEN = ("dropout, SWA, members that carry", "EMA, short cycles, Adam")


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.slow) for one in KILLED]
)
def test_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path, case: str) -> None:
    run = tiny(**KILLED[case], seed=5)
    train(run, tmp_path / "whole")
    rng = random.Random(case)
    kills = 0
    # Twice at once, where there is nothing but a folder that is being made; then anywhere.
    for moment in itertools.chain((1, 2), iter(lambda: rng.randint(3, 24), None)):
        code, status = in_process(train_until_killed, run, tmp_path / "killed", moment)
        if code == 0:
            assert status == "finished"
            break
        assert code == -9
        kills += 1
        assert kills < 40
    assert kills >= 4
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_run_killed_at_the_end_is_finished_alike(tmp_path: Path) -> None:
    run = tiny(train={"epochs": 1}, data={"batch_size": 100})
    train(run, tmp_path / "whole")
    for moment in itertools.count(6):
        folder = tmp_path / str(moment)
        code, _ = in_process(train_until_killed, run, folder, moment)
        if code == 0:
            break
        assert train(run, folder).status == "finished"
        assert_same_run(tmp_path / "whole", folder)
    assert moment > 15


def test_finished_run_is_only_read(tmp_path: Path) -> None:
    run = tiny()
    first = train(run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    again = train(run, tmp_path / "run")
    assert again.status == first.status
    assert again.history.equals(first.history)
    assert again.result.equals(first.result)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_deleted_table_is_computed_again(tmp_path: Path) -> None:
    run = tiny()
    train(run, tmp_path / "whole")
    for name in ("history", "result"):
        train(run, tmp_path / name)
        (tmp_path / name / f"{name}.parquet").unlink()
        train(run, tmp_path / name)
        assert_same_run(tmp_path / "whole", tmp_path / name)


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [None, LATE], ids=["plain", "late-phase"])
def test_divergence_is_a_status(tmp_path: Path, late: dict[str, Any] | None) -> None:
    extra = {} if late is None else {"late_phase": late}
    values = {"schedule": "piecewise", "values": [0.05, 1e30], "boundaries": [1]}
    run = tiny(train={"lr": values}, **extra)
    outcome = train(run, tmp_path / "run")
    assert outcome.status == "diverged"
    assert outcome.history["epoch"].tolist() == [1]
    assert outcome.result.empty
    assert not (tmp_path / "run/checkpoint.pt").exists()
    again = train(run, tmp_path / "run")
    assert again.status == "diverged"
    assert again.history.equals(outcome.history)


def test_divergence_within_the_first_epoch_and_with_the_last_step(tmp_path: Path) -> None:
    first = train(tiny(train={"lr": 1e30}), tmp_path / "first")
    assert first.status == "diverged"
    assert first.history.empty
    assert train(tiny(train={"lr": 1e30}), tmp_path / "first").status == "diverged"
    # No loss is infinite, the weights are.
    last = tiny(data={"batch_size": 100}, train={"epochs": 1, "lr": 1e38})
    assert train(last, tmp_path / "last").status == "diverged"


# --- what is in the way --------------------------------------------------------------------------


def refused(run: RunConfig, folder: Path, *words: str) -> None:
    """One line, and not a byte changed."""
    inside = folder.rglob("*") if folder.is_dir() else [folder]
    before = {path: path.read_bytes() for path in inside if path.is_file()}
    with pytest.raises(NQMError) as caught:
        train(run, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for word in words:
        assert word in message
    inside = folder.rglob("*") if folder.is_dir() else [folder]
    assert {path: path.read_bytes() for path in inside if path.is_file()} == before


def test_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    words = "was trained with seed = 0, you ask for 1; use --out OTHER; nothing was overwritten"
    refused(tiny(seed=1), tmp_path / "run", words)
    words = "was trained with train.lr.value = 0.05, you ask for 0.06 (and 1 more entries differ)"
    refused(tiny(train={"lr": 0.06, "epochs": 4}), tmp_path / "run", "more entries differ")
    refused(tiny(train={"lr": 0.06}), tmp_path / "run", words.partition(" (")[0])
    late = tiny(late_phase=LATE)
    refused(late, tmp_path / "run", "was trained with late_phase.members = none, you ask for 3")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("years of work")
    refused(tiny(), tmp_path / "foreign", "is not the folder of a run: it holds no run.json")
    (tmp_path / "file").write_text("a file")
    refused(tiny(), tmp_path / "file", "is a file")


def changed(stated: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {k: v for k, v in {**stated, key: value}.items() if v != "gone"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("status", "foo", "its status is 'foo'"), ("status", 3, "its status is 3"),
        ("status", "gone", "it has no status"), ("config", "gone", "it has no config"),
        ("config", 3, "its config is 3"), ("key", None, "its key is None"),
        ("versions", [], r"its versions is \[\]"),
    ],
)  # fmt: skip
def test_damaged_statement_of_a_run(key: str, value: Any, words: str, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    file = tmp_path / "run/run.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), key, value)))
    for read in (lambda: train(tiny(), tmp_path / "run"), lambda: open_run(tmp_path / "run")):
        with pytest.raises(NQMError, match=rf"run.json cannot be read \({words}\)"):
            read()


def test_statement_of_a_run_changed_by_hand(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    file = tmp_path / "run/run.json"
    whole = file.read_text()
    assert '"hidden": [' in whole
    stated = json.loads(whole)
    stated["config"]["model"]["hidden"] = [9]
    file.write_text(json.dumps(stated))
    with pytest.raises(NQMError, match="was changed after training"):
        open_run(tmp_path / "run")
    file.write_text("[" * 100_000)
    with pytest.raises(NQMError, match="cannot be read"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff\xfe", '{"key": 3}'])
def test_damaged_note_of_a_run(tmp_path: Path, content: str) -> None:
    train(tiny(), tmp_path)
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    refused(tiny(), tmp_path)


def interrupted(run: RunConfig, folder: Path) -> None:
    code, _ = in_process(train_until_killed, run, folder, 30)
    assert code == -9
    assert (folder / "checkpoint.pt").exists()


def test_damaged_checkpoint(tmp_path: Path) -> None:
    run = tiny()
    interrupted(run, tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    rng = random.Random(0)
    for _ in range(12):
        (tmp_path / "checkpoint.pt").write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(NQMError, match="not a complete checkpoint") as caught:
            train(run, tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    refused(run, tmp_path, "not a complete checkpoint", "delete it and run again")
    (tmp_path / "checkpoint.pt").unlink()
    assert train(run, tmp_path).status == "finished"


def test_damaged_tables_of_a_finished_run(tmp_path: Path) -> None:
    run = tiny()
    train(run, tmp_path)
    for name in ("history", "result"):
        path = tmp_path / f"{name}.parquet"
        whole = path.read_bytes()
        for size in (0, 3, 100, len(whole) - 5):
            path.write_bytes(whole[:size])
            refused(run, tmp_path, f"{name}.parquet", "not a complete table")
        path.write_bytes(whole)


def test_damaged_history_of_an_unfinished_run_is_written_anew(tmp_path: Path) -> None:
    run = tiny()
    interrupted(run, tmp_path / "run")
    (tmp_path / "run/history.parquet").write_bytes(b"PAR1")
    train(run, tmp_path / "run")
    train(run, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def train_with_little_room(run: RunConfig, folder: Path, size: int) -> str:
    """Train where no file may grow beyond `size` bytes: to a program, a full disk."""
    training.CHECKPOINT_EVERY = -1.0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return train(run, folder).status


@pytest.mark.parametrize("size", [16, 2_000, 12_000])
def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, size: int) -> None:
    run = tiny(model=CNN)
    code, message = in_process(train_with_little_room, run, tmp_path / "run", size)
    assert code == 0
    assert message.startswith(f"cannot write {tmp_path / 'run'}")
    assert "\n" not in message
    assert not list((tmp_path / "run").glob(".*"))
    train(run, tmp_path / "whole")
    train(run, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def save_with_little_room(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    checkpoint.save(path, {"weights": torch.zeros(10_000)})


def test_full_disk_keeps_the_checkpoint_there_was(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.arange(5_000)})
    code, message = in_process(save_with_little_room, path)
    assert code == 0
    assert message == f"cannot write {path}: File too large"
    assert_equal(checkpoint.load(path), {"weights": torch.arange(5_000)})
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint.pt"]


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, Any]:
        return eval, ("open('/dev/null').close() or {}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_runs_no_code(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"weights": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(NQMError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_checkpoint_that_is_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pt"
    for size in (1, 10, 100, 1000) * 20:
        path.write_bytes(rng.bytes(size))
        with pytest.raises(NQMError) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], path)
    with pytest.raises(NQMError, match="holds a list"):
        checkpoint.load(path)
    with pytest.raises(NQMError, match="no such file"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(NQMError):
        checkpoint.load(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    try:
        (tmp_path / "closed/probe").mkdir()
    except PermissionError:
        with pytest.raises(NQMError, match="cannot write") as caught:
            train(tiny(), tmp_path / "closed/run")
        assert "\n" not in str(caught.value)
    else:
        pytest.skip("root may write anywhere")


def test_note_of_a_run_says_what_it_was(tmp_path: Path) -> None:
    run = tiny(late_phase=LATE, average={"method": "swa", "start_epoch": 1})
    train(run, tmp_path / "run")
    opened, stated = open_run(tmp_path / "run")
    assert opened == run
    assert stated["status"] == "finished"
    assert stated["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["train"]["lr"] == {
        "schedule": "constant",
        "value": 0.05,
    }
    train(run, tmp_path / "out/arm/seed0")
    for path, what in (("out", "an experiment"), ("out/arm", "an arm")):
        with pytest.raises(NQMError, match=rf"{path} is {what}; give one of its runs: .*/seed0$"):
            open_run(tmp_path / path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(NQMError, match="not the folder of a run"):
            open_run(path)


# --- precision and layout ------------------------------------------------------------------------


def test_precisions_and_layout(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "float32": {},
        "float64": {"precision": "float64"},
        "bfloat16": {"precision": "bfloat16"},
        "channels_last": {"channels_last": True},
    }
    late = LATE | {"select": "batchnorm+head"}
    for name, settings in kinds.items():
        train(tiny(model=CNN, late_phase=late, train=settings), tmp_path / name)
    reference = weights(tmp_path / "float64")
    assert all(v.dtype == torch.float64 for v in reference.values() if v.is_floating_point())
    # What a step's rounding becomes after twelve steps: a few hundred times the unit of float32.
    for name, tolerance in (("float32", 1e-4), ("channels_last", 1e-4), ("bfloat16", 0.1)):
        found = weights(tmp_path / name)
        for key, tensor in found.items():
            if not tensor.is_floating_point():
                assert torch.equal(tensor, reference[key])
                continue
            assert tensor.dtype == torch.float32
            scale = float(reference[key].abs().max()) + 0.1
            gap = float((tensor.double() - reference[key]).abs().max())
            assert gap < tolerance * scale, (name, key, gap)
    different = weights(tmp_path / "bfloat16")["linear.weight"]
    assert not torch.equal(different, weights(tmp_path / "float32")["linear.weight"])
