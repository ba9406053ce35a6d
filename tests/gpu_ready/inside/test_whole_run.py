"""A whole run on a GPU: begun, stopped by a signal among the members, continued, and evaluated."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import config, images
from meter import CUDA, gpu
from torch import Tensor
from torch.utils import _pytree as pytree

from neural import evaluate
from neural.data import ImageData, Images
from neural.training import checkpoint
from neural.training import train as training
from neural.training.run_folder import RunFolder
from neural.training.task import Runtime, open_task
from nqm.runs.interrupts import Stopped

CHANGES = [
    'model.name="wrn-10-1"', "train.epochs=4",
    "late_phase.start_epoch=2", "late_phase.members=2", "evaluate.ood=[]", "evaluate.every=1",
]  # fmt: skip
AVERAGES: dict[str, list[str]] = {
    "plain": [],
    "bfloat16": ['train.precision="bfloat16"'],
    "SWA": [
        'average.method="swa"', "average.start_epoch=2",
        'arm.late_phase.use=["late_phase","average"]',
    ],
}  # fmt: skip


def few() -> ImageData:
    """Five minibatches of training images."""
    data = images(10)
    assert data.train is not None
    train, test = (Images(of.pixels[:640], of.labels[:640]) for of in (data.train, data.test))
    return replace(data, train=train, test=test)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("bfloat16", marks=pytest.mark.slow),
        "SWA",
    ],
)
def test_a_stopped_run_goes_on(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved: dict[str, Any] = {}

    def save(path: Path, content: Any) -> None:
        saved[path.name] = pytree.tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), content)
        path.touch()

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "load", lambda path, device="cpu": saved[path.name])
    monkeypatch.setattr(training, "open_task", lambda run, runtime: open_task(run, runtime, few()))
    # Metrics are of numbers on the host, which are unknown here.
    evaluate.score  # noqa: B018 - loads its module
    monkeypatch.setattr(evaluate, "classification_metrics", lambda z, y: {"accuracy": 1.0 * len(z)})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    numbers = sys.modules["neural.evaluate.predict"]
    for name in ("_check_labels", "refuse_probabilities"):
        monkeypatch.setattr(numbers, name, lambda *_, **__: None)
    asked = iter([False] * 13 + [True] + [False] * 99)  # five minibatches an epoch
    monkeypatch.setattr(training, "stop_asked", lambda: next(asked))
    run = config("cifar10_bn", *CHANGES, *AVERAGES[kind])
    with gpu():
        with pytest.raises(Stopped):
            training.train(run, tmp_path / "run", Runtime(CUDA))
        stopped = saved["checkpoint.pt"]
        assert 10 < stopped["done"] < 20
        assert all(t.device.type == "cpu" for t in pytree.tree_leaves(stopped)
                   if isinstance(t, Tensor))  # fmt: skip
        done = training.train(run, tmp_path / "run", Runtime(CUDA))
    assert done.status == "finished"
    assert len(done.history) == 4
    assert {"model.pt", "late.pt"} <= saved.keys()
    assert RunFolder(tmp_path / "run", run, writes=False).status == "finished"
