"""Snapshots: models that a run keeps on its way, and what is made of them.

Three ways of training are built of cycles of the learning rate. A *chain* is a snapshot ensemble
(SSE: Huang et al. 2017; fine-tuning: Sadrtdinov et al. 2023), a *star* StarSSE (Sadrtdinov et al.
2023), a *triangle* fast geometric ensembling (FGE, Garipov et al. 2018). A run writes each snapshot
as a plain state dict into its folder ``members``, with a list that `neural.combine` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from neural.late_phase import averaging
from neural.late_phase.duplicate import duplicate
from neural.late_phase.reparametrize import fold
from neural.training.distributed import Parts, share_weights
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.schedule import Cosine, Schedule

KINDS = ("chain", "star", "triangle")
#: Folder of a run that holds models beside its single one, and the list of them.
FOLDER, LIST = "members", "members.json"
#: More than anyone evaluates.
MOST_MEMBERS = 10_000

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SnapshotsConfig:
    """Snapshots of a run: when they are taken, and the learning rate between them.

    The first `first_epochs` follow `TrainConfig.lr`.

    Attributes
    ----------
    kind : {"chain", "star", "triangle"}
        chain: the first snapshot at the end of `first_epochs`; then cycles in which the rate falls
        as half a cosine to 0, each from the end of the one before, with a snapshot at its end.
        star: the same, but every cycle starts from the first snapshot. triangle: cycles in which
        the rate falls from `lr_high` to `lr_low` and rises again in straight lines, minibatch by
        minibatch; a snapshot in the middle of each; the optimizer is kept.
    members : int
        M, the number of snapshots.
    first_epochs : int
        Epochs of training before the cycles; 0 is for a triangle from a checkpoint.
    cycle_epochs : int
        Epochs of a cycle; even for a triangle.
    lr_scale : float
        Of a chain or a star: a cycle's first rate over the largest rate of the first epochs.
    lr_high, lr_low : float, optional
        Largest and smallest rate of a triangle.
    reset_optimizer : bool
        Of a chain or a star: whether each cycle starts with an empty optimizer state. If not, a
        chain goes on with it, and a star restores that of the first snapshot.
    """

    kind: str
    members: int
    first_epochs: int
    cycle_epochs: int
    lr_scale: float = 1.0
    lr_high: float | None = None
    lr_low: float | None = None
    reset_optimizer: bool = True

    def __post_init__(self) -> None:
        check_word("SnapshotsConfig.kind", self.kind, KINDS)
        check_integer("SnapshotsConfig.members", self.members, 1)
        if self.members > MOST_MEMBERS:
            raise NQMError(
                f"SnapshotsConfig.members must be at most {MOST_MEMBERS}; got {self.members}"
            )
        triangle = self.kind == "triangle"
        check_integer("SnapshotsConfig.first_epochs", self.first_epochs, 0 if triangle else 1)
        check_integer("SnapshotsConfig.cycle_epochs", self.cycle_epochs, 1)
        check_number("SnapshotsConfig.lr_scale", self.lr_scale, low=0.0, closed_low=False)
        for name in ("lr_high", "lr_low"):
            value = getattr(self, name)
            if triangle and value is None:
                raise NQMError(f"SnapshotsConfig.{name} is missing; a triangle needs it")
            if triangle:
                check_number(f"SnapshotsConfig.{name}", value, low=0.0)
            elif value is not None:
                raise NQMError(
                    f"SnapshotsConfig.{name} would be ignored (kind = {self.kind!r} has "
                    f"lr_scale); leave it out; got {value}"
                )
        if not triangle:
            return
        for name, default in (("lr_scale", 1.0), ("reset_optimizer", True)):
            if (value := getattr(self, name)) != default:
                raise NQMError(
                    f"SnapshotsConfig.{name} would be ignored (a triangle has lr_high and lr_low, "
                    f"and keeps its optimizer); leave it out; got {value}"
                )
        assert self.lr_high is not None
        assert self.lr_low is not None
        if self.lr_high < self.lr_low:
            raise NQMError(
                f"SnapshotsConfig.lr_high must be at least lr_low, {self.lr_low}; "
                f"got {self.lr_high}"
            )
        if self.cycle_epochs % 2:
            raise NQMError(
                "SnapshotsConfig.cycle_epochs must be even for a triangle, whose snapshots are "
                f"taken in the middle of a cycle; got {self.cycle_epochs}"
            )

    @property
    def start_epoch(self) -> int:
        """Epochs of plain training."""
        return self.first_epochs

    @property
    def epochs(self) -> int:
        """Epochs of the whole run."""
        cycles = self.members - (self.kind != "triangle")
        return self.first_epochs + cycles * self.cycle_epochs

    def taken_at(self, member: int) -> int:
        """Epochs done when a snapshot is taken.

        Parameters
        ----------
        member : int
            0 to M - 1.

        Returns
        -------
        int
        """
        middle = self.cycle_epochs // 2 if self.kind == "triangle" else 0
        return self.first_epochs + middle + member * self.cycle_epochs

    def cycle(self, base: Schedule) -> Callable[[float], float]:
        """Learning rate in the cycles.

        Parameters
        ----------
        base : Schedule
            Of the first epochs.

        Returns
        -------
        callable
            Epochs done, at least `first_epochs` and with the part of the running one -> rate.
        """
        if self.lr_high is not None and self.lr_low is not None:
            high, low = self.lr_high, self.lr_low

            def triangle(epoch: float) -> float:
                way = 2.0 * ((epoch - self.first_epochs) % self.cycle_epochs) / self.cycle_epochs
                near = abs(way - 1.0)  # 1 at either end, 0 in the middle
                return high * near + low * (1.0 - near)

            return triangle
        largest = float(np.max(base(np.arange(self.first_epochs))))
        peak = self.lr_scale * largest
        if not np.isfinite(peak):
            raise NQMError(
                f"snapshots.lr_scale times {largest:g}, the largest rate of the first epochs, is "
                f"no finite number; got {self.lr_scale:g}"
            )
        cosine = Cosine(peak, 0.0, self.cycle_epochs)
        return lambda epoch: float(cosine((epoch - self.first_epochs) % self.cycle_epochs))

    def entries(self) -> list[dict[str, Any]]:
        """What the list of snapshots says of each.

        Returns
        -------
        list of dict
            As `kept_list` takes them. Behind a snapshot of a chain or a triangle lies all training
            up to it; the cycle of a star is its member's alone.
        """
        star = self.kind == "star"
        return [
            {
                "name": f"snapshot{k}",
                "file": file_name(k),
                "epochs": float(self.cycle_epochs) if star and k else 0.0,
                "trunk": float(self.first_epochs if star else self.taken_at(k)),
            }
            for k in range(self.members)
        ]


def file_name(member: int) -> str:
    """Name of a snapshot's file in the folder of them.

    Parameters
    ----------
    member : int
        0 to M - 1.

    Returns
    -------
    str
    """
    return f"snapshot{member}.safetensors"


def kept_list(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The list of the models that a run kept on its way.

    Parameters
    ----------
    entries : sequence of mapping
        Each with ``name``, ``file`` (beside the list), ``epochs`` (of this model alone) and
        ``trunk`` (epochs of the training that it shares with the others).

    Returns
    -------
    bytes
        JSON.

    Raises
    ------
    NQMError
        If an entry has no finite number of epochs.
    """
    for entry in entries:
        if not math.isfinite(entry["epochs"]):
            raise NQMError(f"{entry['name']}: epochs must be finite; got {entry['epochs']}")
    return json.dumps(list(entries), indent=1).encode()


def plain_state(model: nn.Module) -> State:
    """A model's weights as a plain state dict of its architecture, on the CPU.

    Parameters
    ----------
    model : Module
        With or without reparametrisations.

    Returns
    -------
    dict of str to Tensor
        Copies; BatchNorm statistics as they are.
    """
    state = fold(duplicate(model)).state_dict()
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def soup(model: nn.Module, states: Iterable[Mapping[str, Tensor]], parts: Parts) -> nn.Module:
    """Mean of the snapshots' weights, all counted alike; BatchNorm statistics are recomputed.

    Parameters
    ----------
    model : Module
        The architecture, with plain weights; it is copied.
    states : iterable of mapping
        Plain state dicts; one is in memory at a time. Under ``torchrun`` those of the first process
        are used, and statistics are means over the parts of all.
    parts : Parts
        Training data.

    Returns
    -------
    Module
    """
    one = duplicate(model)
    mean = averaging.swa(one)
    for state in states:
        one.load_state_dict(state)
        mean.update_parameters(one)
    made: nn.Module = mean.module
    if parts.world > 1:
        share_weights(made)
    averaging.recompute_statistics(made, parts(), batch_weights=parts.weights)
    parts.average_statistics(made)
    return made
