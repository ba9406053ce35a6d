"""A run's model, its weights to start from, and its late-phase members."""

from __future__ import annotations

from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from neural import checkpoint, reparametrize
from neural.config import ModelConfig, RunConfig
from neural.late_phase import LatePhase
from neural.models import build as build_model
from neural.models.fast_cnn import FastCNN, whiten_
from neural.select import select
from neural.task import Task
from nqm.errors import NQMError


def plain_model(config: ModelConfig, task: Task) -> nn.Module:
    """The architecture of a run, freshly initialised."""
    return build_model(config.name, classes=task.classes, channels=task.channels, **config.options)


def make_late(model: nn.Module, run: RunConfig) -> LatePhase:
    """Late-phase members of a run on its model."""
    settings = run.late_phase
    assert settings is not None
    return LatePhase(
        model,
        settings.members,
        settings.select,
        gamma=settings.gamma,
        noise=settings.noise,
        noise_rule=settings.noise_rule,
        idle_steps=settings.idle_steps,
        seed=run.seed,
    )


def make_model(
    config: ModelConfig, task: Task, *, root: Path | None = None, start: bool = True
) -> nn.Module:
    """The model of a run, and what is put on it.

    Parameters
    ----------
    config : ModelConfig
    task : Task
    root : Path, optional
        Folder of data files, where a checkpoint is looked for as well.
    start : bool
        False if the weights are to be loaded anyway: they do not become those of the start.
    """
    model = plain_model(config, task)
    if start and isinstance(model, FastCNN):
        whiten_(model, _some_images(task))
    if start and config.checkpoint is not None:
        load_weights(model, _found(config.checkpoint, root))
    if config.rank1 is not None:
        reparametrize.add_rank1(model, config.rank1)
    if config.lora is not None:
        head = select(model, "head").parameters
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in head)
        reparametrize.add_lora(model, config.lora)
    return model


def _some_images(task: Task) -> Tensor:
    """Some two thousand training images, as a model sees them."""
    images: list[Tensor] = []
    for x, _ in task.stream.epoch(0):
        images.append(x.cpu())
        if sum(len(one) for one in images) >= 2000:
            break
    return torch.cat(images)


def _found(name: str, root: Path | None) -> Path:
    """A checkpoint by its path, or below the folder of data files."""
    from neural.data.catalog import data_root

    path = Path(name).expanduser()
    if path.exists() or path.is_absolute():
        return path
    # A name is a name, and no pattern.
    below = sorted(data_root(root).rglob(escape(path.name))) if data_root(root).is_dir() else []
    return next((one for one in below if one.match(escape(name))), path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, strictly; that of a published checkpoint under ``state_dict``."""
    try:
        content = checkpoint.load(path)
    except NQMError as error:
        raise NQMError(f"model.checkpoint {error}") from None
    state = content.get("state_dict", content)
    try:
        model.load_state_dict({name.removeprefix("module."): v for name, v in state.items()})
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(f"model.checkpoint {path} does not fit the model: {reason:.200}") from None
