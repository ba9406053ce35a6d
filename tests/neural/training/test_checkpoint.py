"""Weights that others wrote: where the state dict lies, what is taken off its names, refusals."""

from __future__ import annotations

import argparse
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neural.models import build
from neural.models.libraries import OPTIONS, _plain_tensors
from neural.training import checkpoint
from neural.training import train as training
from neural.training.build import load_weights
from neural.training.run_folder import RunFolder
from neural.training.state import TrainState
from neural.training.train import train
from nqm.errors import NQMError
from tests.tiny_runs import LATE, assert_same_run, tiny

STATE = build("digits_cnn", classes=10, channels=1).state_dict()


def prefixed(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS: dict[str, dict[str, Any]] = {
    "plain": STATE,
    "compiled": prefixed("_orig_mod."),
    "compiled within": {n.replace("features.", "features._orig_mod."): v for n, v in STATE.items()},
    "DataParallel": prefixed("module."),
    "compiled and parallel": prefixed("_orig_mod.module."),
    "trainer": {"state_dict": prefixed("model."), "epoch": 3, "optimizer_states": [{"state": {}}]},
    "trainer, deep": {"state_dict": prefixed("net.model._orig_mod."), "epoch": 3},
    "under model": {"model": STATE, "iter_num": 4},
    "EMA": {"state_dict_ema": STATE, "arch": "x"},
    "averaged": prefixed("module.") | {"n_averaged": torch.tensor(3)},
    "before 0.4.1, DataParallel": {  # BatchNorm did not count its batches
        f"module.{n}": v for n, v in STATE.items() if not n.endswith("num_batches_tracked")
    },
    "NumPy's numbers": {
        "state_dict": STATE, "best": np.float64(0.5), "step": np.int64(3), "acc": np.float32(0.1),
        "done": np.bool_(True),
    },
    "options": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, name="x")},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_checkpoints(form: str, tmp_path: Path) -> None:
    torch.save(FORMS[form], tmp_path / "net.pt")
    model = build("digits_cnn", classes=10, channels=1)
    load_weights(model, tmp_path / "net.pt")
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_statistics_from_before_batches_were_counted(prefix: str, tmp_path: Path) -> None:
    """Torch 0.4.0 and older, as published CIFAR ResNets: BatchNorm without a counter."""
    trained = build("resnet8", classes=10)
    trained(torch.randn(4, 3, 32, 32))
    state = trained.state_dict()
    old = {f"{prefix}{n}": v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    torch.save({"best_prec1": 91.0, "state_dict": old}, tmp_path / "net.th")
    model = build("resnet8", classes=10)
    model(torch.randn(4, 3, 32, 32))
    load_weights(model, tmp_path / "net.th")
    for name, value in model.state_dict().items():
        counted = name.endswith("num_batches_tracked")
        assert torch.equal(value, torch.tensor(0) if counted else state[name])


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "net.safetensors")
    model = build("digits_cnn", classes=10, channels=1)
    load_weights(model, tmp_path / "net.safetensors")
    assert torch.equal(model.state_dict()["linear.bias"], STATE["linear.bias"])
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(NQMError, match="is not a complete safetensors file"):
        load_weights(model, tmp_path / "net.safetensors")
    with pytest.raises(NQMError, match="no such file"):
        load_weights(model, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"state_dict": STATE, "path": Path("x")}, r"holds a pathlib.*save its state dict alone"),
        ({"a": 1, "model": "x"}, "holds no state dict"),
        ({}, "holds no state dict"),
        ([1], "it holds a list"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ({1: torch.ones(2)}, "holds no state dict"),
        (STATE | {"linear.weight": torch.zeros(3, 32)}, "size mismatch for linear.weight"),
        (STATE | {"extra": torch.zeros(3)}, "Unexpected key.*extra"),
        (prefixed("a.") | prefixed("b."), "does not fit the model"),
        (
            STATE | {"linear.bias": torch.zeros(10).cfloat()},
            "'linear.bias' is torch.complex64, not",
        ),
        (STATE | {"linear.bias": torch.zeros(10).char()}, "'linear.bias' is torch.int8, not"),
        (STATE | {"linear.bias": torch.zeros(10).to("meta")}, r"has no values \(device 'meta'\)"),
    ],
)
def test_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(NQMError, match=rf"^model.checkpoint .*{words}") as caught:
        load_weights(build("digits_cnn", classes=10, channels=1), tmp_path / "net.pt")
    assert "delete" not in str(caught.value)  # it is not ours
    assert "\n" not in str(caught.value)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": STATE, "x": Trap(sprung)}, tmp_path / "net.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    for name in ("net.pt", "old.pt"):
        for load in (checkpoint.load, checkpoint.load_foreign):
            with pytest.raises(NQMError):
                load(tmp_path / name)
        with _plain_tensors(), pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / name, weights_only=False)  # as a library may ask
    assert not sprung.exists()


@pytest.mark.parametrize("library", OPTIONS)
@pytest.mark.parametrize(
    "option",
    ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
     "features_only", "scriptable", "cache_dir", "num_classes", "in_chans", "block", "kwargs",
     "weights_backbone", "file", "url", "exec", "progress"],
)  # fmt: skip
def test_options_that_name_files_or_code_are_refused(library: str, option: str) -> None:
    with pytest.raises(NQMError, match=f"option '{option}' cannot be set from a configuration"):
        build(f"{library}:resnet18", classes=10, **{option: "x"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet10t", {"pretrained": "yes"}),
        ("timm:resnet10t", {"drop_rate": {"file": "x"}}),
        ("timm:resnet10t", {"act_layer": [{"a": 1}]}),
        ("torchvision:resnet18", {"weights": 3}),
        ("torchvision:resnet18", {"weights": True}),
    ],
)
def test_options_are_plain(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(NQMError, match=next(iter(options))):
        build(name, classes=10, **options)


def test_a_checkpoint_written_later_holds_the_numbers_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, may_write = checkpoint.save, threading.Event()

    def later(path: Path, content: Any) -> None:
        assert may_write.wait(60)
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", later)
    weights, rows = torch.zeros(3), [{"epoch": 1}]
    writer = checkpoint.BackgroundWriter()
    writer.save(tmp_path / "c.pt", {"weights": weights, "rows": rows, "nested": {"w": weights}})
    weights += 1.0  # training goes on
    rows.append({"epoch": 2})
    assert not (tmp_path / "c.pt").exists()
    may_write.set()
    writer.save(tmp_path / "d.pt", {"weights": weights})  # waits for the first
    content = checkpoint.load(tmp_path / "c.pt")
    assert content["weights"].tolist() == content["nested"]["w"].tolist() == [0.0] * 3
    assert content["rows"] == [{"epoch": 1}]
    writer.wait()
    assert checkpoint.load(tmp_path / "d.pt")["weights"].tolist() == [1.0] * 3


def test_a_checkpoint_that_cannot_be_written_later_is_told_once(tmp_path: Path) -> None:
    writer = checkpoint.BackgroundWriter()
    writer.save(tmp_path / "no" / "such" / "c.pt", {"a": 1})
    with pytest.raises(NQMError, match=r"c\.pt"):
        writer.wait()
    writer.save(tmp_path / "c.pt", {"a": 1})
    writer.wait()
    assert checkpoint.load(tmp_path / "c.pt") == {"a": 1}


def test_a_run_with_background_checkpoints_is_resumed_and_ends_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunFolder.__init__

    def in_background(self: RunFolder, *args: Any, **options: Any) -> None:
        original(self, *args, **options | {"background": True})

    run = tiny(late_phase=LATE)
    train(run, tmp_path / "plain")
    monkeypatch.setattr(RunFolder, "__init__", in_background)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", -1.0)
    step, left = TrainState.step, 6

    def stopped(self: TrainState, batches: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(TrainState, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "later")
    assert checkpoint.load(tmp_path / "later/checkpoint.pt")["done"] > 0  # complete
    train(run, tmp_path / "later")
    assert_same_run(tmp_path / "plain", tmp_path / "later")
