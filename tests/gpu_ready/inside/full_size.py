"""Recipes at the scale `full` on data of the real shapes, ready for a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from meter import CUDA

from neural.data import ImageData, Images, TextData
from neural.data.image_sets import CIFAR10_STATS
from neural.late_phase.members import Batch
from neural.models._torchvision import import_torchvision
from neural.training.config import RunConfig
from neural.training.recipe import load_recipe
from neural.training.state import TrainState
from neural.training.task import Runtime, Task, open_task

#: Recipe and arm of every family of models that the paper's experiments train.
RECIPES = {
    "cifar10_bn": "late_phase",
    "cifar100_rank1": "late_phase",
    "cifar10_hypernet": "late_phase",
    "cifar10_q75_fast": "late_phase",
    "imagenet_resnet50": "late_phase",
    "enwik8_lstm_rank1": "late_phase_rank1",
    "transformer_python_docs": "late_phase",
}
SYMBOLS = 205  # of enwik8


class Photographs:
    """ImageNet's minibatches, decoded already."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 5005

    def epoch(self, epoch: int = 0, start: int = 0, /) -> Iterator[Batch]:
        for _ in range(start, len(self)):
            x = torch.randn(self.size, 3, 224, 224, device=CUDA)
            y = torch.zeros(self.size, dtype=torch.int64, device=CUDA)
            yield x.contiguous(memory_format=torch.channels_last), y


def images(classes: int) -> ImageData:
    train, test = (
        Images(torch.zeros((n, 3, 32, 32), dtype=torch.uint8), torch.zeros(n, dtype=torch.int64))
        for n in (50_000, 10_000)
    )
    return ImageData("cifar", "CIFAR", train, test, classes, *CIFAR10_STATS)


class Text(TextData):
    def compact(self) -> TextData:
        return self  # which symbols occur is a number, and there are none


def text() -> TextData:
    parts = (torch.zeros(n, dtype=torch.uint8) for n in (9_000_000, 50_000, 50_000))
    return Text("text", "text", *parts, symbols=SYMBOLS)


def task_of(run: RunConfig, runtime: Runtime) -> Task:
    if run.data.name == "imagenet":
        stream = Photographs(run.data.batch_size)
        return Task("ImageNet", 1000, 3, stream, stream.epoch, 0.0)
    is_text = run.data.name in ("enwik8", "python_docs")
    return open_task(run, runtime, text() if is_text else images(100 if "100" in run.data.name
                                                               else 10))  # fmt: skip


def config(recipe: str, *changes: str, arm: str | None = None, scale: str = "full") -> RunConfig:
    run = load_recipe(recipe, scale, list(changes)).arms[arm or RECIPES[recipe]]
    if run.model.name.startswith("torchvision:"):
        import_torchvision()
        options = {n: v for n, v in run.model.options.items() if n != "weights"}
        run = replace(run, model=replace(run.model, options=options))
    return run


def state(recipe: str, *changes: str, arm: str | None = None, scale: str = "full") -> TrainState:
    """State of training before its first step."""
    run, runtime = config(recipe, *changes, arm=arm, scale=scale), Runtime(CUDA)
    return TrainState(run, task_of(run, runtime), runtime)
