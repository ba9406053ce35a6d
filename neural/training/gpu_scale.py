"""The scale ``gpu`` of a recipe: its training as it is run on a GPU, by one rule for all recipes.

Epochs, rates, minibatches and seeds stay those of the recipe. All arms get the same settings, so
that a difference between arms is never one of precision. A setting is only changed from its
default; what the recipe, its table ``[scale.gpu]`` or ``--set`` state is kept.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neural.late_phase.ready import is_recurrent
from neural.models import build
from neural.training.config import LatePhaseConfig, ModelConfig, RunConfig
from nqm.errors import NQMError

#: Settings that the rule decides, by the name of their entry.
SETTINGS = ("train.precision", "train.channels_last", "train.compile", "late_phase.fused")


@dataclass(frozen=True)
class Choice:
    """What a setting is at scale gpu, and why.

    Attributes
    ----------
    value : str or bool
        Value of the setting.
    reason : str
        One line.
    """

    value: str | bool
    reason: str


def choose(runs: Collection[RunConfig]) -> dict[str, Choice]:
    """Choose the settings of a recipe at scale gpu; of a recipe at that scale, those that it has.

    Parameters
    ----------
    runs : collection of RunConfig
        Runs of all arms.

    Returns
    -------
    dict of str to Choice
        For every entry of `SETTINGS`.

    Raises
    ------
    NQMError
        If a model cannot be built.
    """
    nets = [_net(model) for model in {str(run.model): run.model for run in runs}.values()]
    recurrent = any(map(is_recurrent, nets))
    convolutions = all(any(p.ndim >= 4 for p in net.parameters()) for net in nets)
    compiled = _compile(runs, recurrent)
    layout = "the layout in which tensor cores convolve" if convolutions else "no convolutions"
    return {
        "train.precision": _precision(runs, recurrent),
        "train.channels_last": Choice(convolutions, layout),
        "train.compile": compiled,
        "late_phase.fused": _fused(runs, bool(compiled.value)),
    }


def changes(runs: Collection[RunConfig]) -> dict[str, Any]:
    """Changes of a recipe that make its scale gpu.

    Parameters
    ----------
    runs : collection of RunConfig
        Runs of all arms at scale full, with the user's changes.

    Returns
    -------
    dict of str to object
        Nested, as in a recipe.

    Raises
    ------
    NQMError
        If a model cannot be built.
    """
    made: dict[str, Any] = {}
    for entry, choice in choose(runs).items():
        section, name = entry.split(".")
        if choice.value in (True, "bfloat16"):  # nothing is switched off
            made.setdefault(section, {})[name] = choice.value
    return made


def check_device(scale: str, device: torch.device) -> None:
    """Check that the scale gpu is trained on a GPU.

    Parameters
    ----------
    scale : str
        Scale of the recipe.
    device : device
        Device of the training.

    Raises
    ------
    NQMError
        If the scale is gpu and the device is the CPU.
    """
    if scale == "gpu" and device.type == "cpu":
        raise NQMError(
            "scale gpu is for a GPU, and the device is cpu, where bfloat16 is slow; use --scale "
            "full or cpu, or --device cuda"
        )


def _net(model: ModelConfig) -> nn.Module:
    """The network on the meta device; numbers of classes and channels make no difference here."""
    options = {n: v for n, v in model.options.items() if n not in ("weights", "pretrained")}
    with torch.device("meta"):
        return build(model.name, classes=10, channels=3, **options)


def _precision(runs: Collection[RunConfig], recurrent: bool) -> Choice:
    stated = sorted({run.train.precision for run in runs})
    if stated not in (["float32"], ["bfloat16"]):
        return Choice(" and ".join(stated), "as the recipe states")
    if recurrent:
        return Choice(
            "float32",
            "autocast would run cuDNN's recurrent layers in float16, where small gradients vanish; "
            "they use TF32",
        )
    return Choice(
        "bfloat16",
        "matrix products and convolutions; weights, gradients, optimizers, statistics and the "
        "loss stay in float32",
    )


def _compile(runs: Collection[RunConfig], recurrent: bool) -> Choice:
    late = _late(runs)
    if recurrent:
        return Choice(False, "recurrent layers have kernels of their own")
    if any(part.fused for part in late):
        return Choice(False, "a fused pass is not compiled")
    if any(run.train.sync_batchnorm for run in runs):
        return Choice(False, "does not work with train.sync_batchnorm")
    return Choice(True, "fewer kernels in all epochs, with or without members")


def _fused(runs: Collection[RunConfig], compiled: bool) -> Choice:
    late = _late(runs)
    if not late:
        return Choice(False, "no members")
    if compiled:
        return Choice(False, "a fused pass is not compiled, and train.compile serves all epochs")
    for used, reason in (
        (any(run.train.micro_batches > 1 for run in runs), "minibatches are run in pieces"),
        (any(part.idle_steps != "none" for part in late), "idle members step within a cycle"),
        (any(run.train.sync_batchnorm for run in runs), "does not work with train.sync_batchnorm"),
        (any(run.train.clip_norm for run in runs), "train.clip_norm clips each minibatch alone"),
    ):
        if used:
            return Choice(False, reason)
    return Choice(True, "the minibatches of all members in one pass")


def _late(runs: Collection[RunConfig]) -> list[LatePhaseConfig]:
    return [run.late_phase for run in runs if run.late_phase is not None]
