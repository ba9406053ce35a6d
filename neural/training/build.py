"""Make a run's model with its initial weights, and its late-phase members."""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neural.late_phase import reparametrize
from neural.late_phase.members import LatePhase
from neural.late_phase.select import select
from neural.models import MODELS, family_of
from neural.models import build as build_model
from neural.models.fast_cnn import FastCNN, whiten_
from neural.training import checkpoint
from neural.training.config import ModelConfig, RunConfig
from neural.training.task import Task
from nqm.errors import NQMError

#: Keys under which checkpoints of other software hold the state dict, in the order of trial.
UNDER = ("state_dict", "model_state_dict", "model", "net", "module", "state_dict_ema", "model_ema")
#: End of the name of BatchNorm's count of batches.
_COUNTER = "num_batches_tracked"


def plain_model(config: ModelConfig, task: Task) -> nn.Module:
    """Make the network of a run with random weights, without rank-1 or low-rank factors.

    Parameters
    ----------
    config : ModelConfig
        Name and options of the model.
    task : Task
        Gives the numbers of classes and channels.

    Returns
    -------
    Module
        The network.

    Raises
    ------
    NQMError
        If the model is unknown or its options are wrong, or it takes images and the data are a text
        or the other way round.
    """
    family = family_of(config.name)
    if family is not None and family.images != (task.channels > 0):
        takes, data = ("images", "a text") if family.images else ("a text", "images")
        fitting = ", ".join(n for n, one in MODELS.items() if one.images == (task.channels > 0))
        raise NQMError(
            f"model.name {config.name!r} takes {takes}, and the data are {data}; choose one of "
            f"{fitting}"
        )
    return build_model(config.name, classes=task.classes, channels=task.channels, **config.options)


def make_late(model: nn.Module, run: RunConfig) -> LatePhase:
    """Spawn the late-phase members of a run from its model.

    Parameters
    ----------
    model : Module
        The model; the members start with its present weights.
    run : RunConfig
        The run; it must have a ``late_phase`` section.

    Returns
    -------
    LatePhase
        Base and members.
    """
    late = run.late_phase
    assert late is not None
    return LatePhase(model, select=late.select, seed=run.seed, **late.arguments())


def make_model(
    config: ModelConfig, task: Task, *, root: Path | None = None, start: bool = True
) -> nn.Module:
    """Make the network of a run with its initial weights and its rank-1 or low-rank factors.

    Parameters
    ----------
    config : ModelConfig
        Name and options of the model, checkpoint, and factors.
    task : Task
        Gives the numbers of classes and channels.
    root : Path, optional
        Folder of data files, in which the checkpoint is searched too.
    start : bool
        False if other weights will be loaded: initial weights are then not loaded or computed.

    Returns
    -------
    Module
        The network.

    Raises
    ------
    NQMError
        If the model cannot be made, or the checkpoint does not fit it.
    """
    model = plain_model(config, task)
    if start and isinstance(model, FastCNN):
        whiten_(model, _some_images(task))
    if start and config.checkpoint is not None:
        load_weights(model, find_checkpoint(config.checkpoint, root))
    if config.rank1 is not None:
        reparametrize.add_rank1(model, config.rank1)
    if config.lora is not None:
        head = select(model, "head").parameters
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in head)
        reparametrize.add_lora(model, config.lora)
    return model


def _some_images(task: Task) -> Tensor:
    """At least two thousand training images if there are so many, as the model gets them."""
    batches: list[Tensor] = []
    for x, _ in task.stream.epoch(0):
        batches.append(x.cpu())
        if sum(map(len, batches)) >= 2000:
            break
    return torch.cat(batches)


def find_checkpoint(name: str, root: Path | None) -> Path:
    """Find a checkpoint by its path, or below the folder of data files.

    Parameters
    ----------
    name : str
        Path, or the end of one.
    root : Path, optional
        Folder of data files.

    Returns
    -------
    Path
        `name` itself if nothing is found.
    """
    from neural.data.catalog import data_root

    path = Path(name).expanduser()
    if path.exists() or path.is_absolute():
        return path
    # Characters such as "*" in the name are no wildcards.
    below = sorted(data_root(root).rglob(escape(path.name))) if data_root(root).is_dir() else []
    return next((candidate for candidate in below if candidate.match(escape(name))), path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict that other software wrote into a model; every name must match.

    The state dict may be nested under one of the keys `UNDER` of the file. Prefixes added by
    compilation, data parallelism, averaging and trainers are removed if the remaining names are
    those of the model.

    Parameters
    ----------
    model : Module
        The model; its weights are changed in place.
    path : Path
        A file of torch, or a .safetensors file.

    Raises
    ------
    NQMError
        If the file cannot be read, holds no state dict, or does not fit the model.
    """
    try:
        state = read_weights(path, model)
        if reason := untied(state, ties(model)):
            raise NQMError(f"{path}: {reason}")
        for name, own in model.state_dict().items():
            if name in state and (reason := _no_weight(state[name], own)):
                raise NQMError(f"{path}: {name!r} {reason}")
    except NQMError as error:
        raise NQMError(f"model.checkpoint {error}") from None
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(f"model.checkpoint {path} does not fit the model: {reason:.200}") from None


def _no_weight(value: Tensor, own: Tensor) -> str | None:
    """Why torch would copy a tensor into a model's own one, and yet nothing or nonsense."""
    if value.is_meta:
        return "has no values (device 'meta'); save the model when its weights are in memory"
    if own.is_floating_point() and not value.is_floating_point():
        return f"is {value.dtype}, not {own.dtype}; save the weights as real numbers"
    return None


def ties(model: nn.Module) -> dict[str, str]:
    """Tensors that a model has under several names, as tied weights.

    Parameters
    ----------
    model : Module

    Returns
    -------
    dict of str to str
        Every further name of such a tensor -> its first.
    """
    first: dict[int, str] = {}
    named = {
        name: first.setdefault(id(value), name)
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    return {name: known for name, known in named.items() if known != name}


def tied(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict with tied tensors under all their names; safetensors writes them under one.

    Parameters
    ----------
    state : mapping of str to Tensor
    names : mapping of str to str
        Result of `ties`.

    Returns
    -------
    dict of str to Tensor
    """
    made = dict(state)
    for name, first in names.items():
        if name in made:
            made.setdefault(first, made[name])
    return {name: made[first] for name, first in names.items() if first in made} | made


def untied(state: Mapping[str, Tensor], names: Mapping[str, str]) -> str | None:
    """Why a state dict cannot be that of a model with tied tensors.

    Parameters
    ----------
    state : mapping of str to Tensor
    names : mapping of str to str
        Result of `ties`.

    Returns
    -------
    str or None
        None if all names of a tensor have the same values, which need not be finite.
    """
    for name, first in names.items():
        one, other = state.get(name), state.get(first)
        if one is None or other is None or one is other:
            continue
        alike = one.shape == other.shape and one.dtype == other.dtype
        if not alike or not torch.equal(one.nan_to_num(), other.nan_to_num()):
            return f"{name!r} and {first!r} are one tensor in the model, and differ here"
    return None


def read_weights(path: Path, model: nn.Module, *, part: bool = False) -> dict[str, Tensor]:
    """Read a foreign state dict under a model's own names.

    Parameters
    ----------
    path : Path
        A file of torch, or .safetensors.
    model : Module
        Gives the names; tied tensors that the file has once come under all their names.
    part : bool
        Whether the file holds some of them only, as a shard does; its names are then not changed.

    Returns
    -------
    dict of str to Tensor
        On the CPU. Other names than the model's are kept for the caller to refuse.

    Raises
    ------
    NQMError
        If the file cannot be read or holds no state dict.
    """
    content = checkpoint.load_foreign(path)
    state = _state_dict(content)
    if not state:
        held = ", ".join(map(str, content)) or "nothing"
        raise NQMError(
            f"{path} holds no state dict, by itself or under {', '.join(UNDER)}; it has {held:.100}"
        )
    if part:
        return state
    names, several = set(model.state_dict()), ties(model)
    # Before version 0.4.1 torch did not count the batches of BatchNorm.
    counters = {name for name in names if name.endswith(_COUNTER)}
    spare = {*counters, *several, *several.values()}
    found = tied(_renamed(state, names, spare), several)
    if found.keys() < names:
        found |= {name: torch.tensor(0) for name in counters - found.keys()}
    return found


def _state_dict(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors by name that a checkpoint holds; empty if there are none."""
    for entry in (content, *(content.get(name) for name in UNDER)):
        if not isinstance(entry, Mapping) or not entry:
            continue
        if all(isinstance(n, str) and isinstance(v, Tensor) for n, v in entry.items()):
            return dict(entry)
    return {}


def _renamed(state: dict[str, Tensor], names: set[str], optional: set[str]) -> dict[str, Tensor]:
    """Remove prefixes that other software adds; without success, the state dict as it is."""
    renamed = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if "n_averaged" not in names:  # the count of torch's AveragedModel
        renamed.pop("n_averaged", None)
    while renamed and not names - optional <= renamed.keys() <= names:
        first = {name.partition(".")[0] for name in renamed}
        if len(first) > 1 or any(name in first for name in renamed):
            return state
        renamed = {name.partition(".")[2]: value for name, value in renamed.items()}
    return renamed or state
