"""Processes of ``torchrun`` and of ``--workers``: a GPU for each, and what they talk by."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meter import gpu

from neural.training import experiment, workers
from neural.training.cli_options import make_runtime
from neural.training.task import Runtime
from nqm.errors import NQMError


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As the fourth of eight processes on one machine; what they do to begin."""
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", done.append)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield done
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("asked", [None, "cuda"])
def test_each_process_has_its_gpu(joined: list[Any], asked: str | None) -> None:
    with gpu():
        runtime = make_runtime(asked, None, None, trains=True)
    assert (runtime.device, runtime.rank, runtime.world) == (torch.device("cuda:3"), 3, 8)
    assert joined == ["cuda:3", "nccl"]  # the GPU first: NCCL uses the one that is set


def test_processes_on_the_cpu_of_a_machine_with_gpus(joined: list[Any]) -> None:
    assert make_runtime("cpu", None, None).device == torch.device("cpu")
    assert joined == ["gloo"]


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [("cuda", None, 3), ("cuda", 0, 0), ("cuda", 7, 7), ("cpu", None, 0), ("cpu", 2, 2)],
)
def test_images_are_decoded_beside_a_gpu(
    joined: list[Any], monkeypatch: pytest.MonkeyPatch, device: str, asked: int, expected: int
) -> None:
    """24 processors for the 8 processes of this machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    with gpu():
        assert make_runtime(device, None, None, data_workers=asked).workers == expected


def test_one_gpu_for_all_is_refused(joined: list[Any]) -> None:
    with pytest.raises(NQMError, match="--device cuda:1 would put all 8 processes on one GPU"):
        make_runtime("cuda:1", None, None)
    assert joined == []


class Pool:
    """Three workers in this process, which take work in turn."""

    def __init__(self, count: int, start: Any, given: Any) -> None:
        self.starts = [(start, given)] * count

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Any, *args: Any) -> Future[None]:
        start, given = self.starts.pop()
        start(*given)
        work(*args)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize(
    ("first", "expected"),
    [("cuda:0", ["cuda:0", "cuda:1", "cuda:0"]), ("cuda:1", ["cuda:1", "cuda:0", "cuda:1"]),
     ("cpu", ["cpu"] * 3)],
)  # fmt: skip
def test_workers_take_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, first: str, expected: list[str]
) -> None:
    used: list[str] = []
    made_current: list[str] = []
    monkeypatch.setattr(workers, "processes", Pool)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made_current.append(str(device)))
    monkeypatch.setattr(
        experiment, "_run_group", lambda group, out, runtime, _: used.append(str(runtime.device))
    )
    experiment._run_parallel([[], [], []], Path(), Runtime(torch.device(first)), 3, None)
    assert used == expected
    assert made_current == [device for device in expected if device != "cpu"]
