"""State of a training run: model, members, optimizers, average, position, random state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neural.data.sampling import keyed_generator
from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import Batch, LatePhase
from neural.late_phase.pieces import Known, backward_in_pieces, mean_over_rows
from neural.late_phase.ranks import average_gradients
from neural.late_phase.reparametrize import fold
from neural.late_phase.select import select
from neural.models.hyper_wrn import TemplateBank
from neural.training import snapshots
from neural.training.build import make_late, make_model
from neural.training.config import RunConfig
from neural.training.distributed import share_weights, summed
from neural.training.optim import make_optimizer, set_lr
from neural.training.sync_batchnorm import synchronise
from neural.training.task import DTYPES, Runtime, Task
from nqm.errors import NQMError


class TrainState:
    """State of a run; `step`, `spawn` and `end_epoch` change it.

    Parameters
    ----------
    run : RunConfig
        The run.
    task : Task
        Its data and loss.
    runtime : Runtime
        Device, folder of data files and ranks.

    Attributes
    ----------
    model : Module
        The network; from T0 on the base of the members.
    done : int
        Number of minibatches used so far.
    late : LatePhase or None
        Base and members; None before T0.
    average : Module or None
        State of the run's average over time: over the model, or over `late` with all its members.
        None until it is first updated.

    Raises
    ------
    NQMError
        If the model cannot be made, or a selection matches nothing.
    """

    def __init__(self, run: RunConfig, task: Task, runtime: Runtime):
        self.run, self.task, self.runtime = run, task, runtime
        torch.manual_seed(run.seed)
        self.model = make_model(run.model, task, root=runtime.root).to(
            runtime.device, DTYPES[run.train.precision]
        )
        if runtime.world > 1:
            if run.train.sync_batchnorm:
                self.model = synchronise(self.model)
            # Initial weights may differ between processes, e.g. by whitening, which uses the
            # process's part of the data. All must start with the same weights.
            share_weights(self.model)
        if run.train.channels_last:
            _channels_last(self.model)
        self.optimizer = self._hooked(make_optimizer(self.model, run.train))
        if run.late_phase is not None:
            select(self.model, run.late_phase.select)  # raises NQMError now instead of at T0
        # A graph for each size of a minibatch: else all take one for any size after the first short
        # minibatch, at the end of an epoch.
        self.forward = torch.compile(self.model, dynamic=False) if run.train.compile else self.model
        self.late: LatePhase | None = None
        self.member_optimizer: Optimizer | None = None
        self.average: nn.Module | None = None
        self.known_pieces: Known = {}
        self.base_lr = run.base_lr()
        #: Snapshots taken, what a star goes back to, and weights where the cycles begin.
        self.taken = 0
        self.centre: dict[str, Any] | None = None
        self.origin: list[Tensor] | None = None
        self.done = 0
        self.rows: list[dict[str, Any]] = []
        #: Sum and count of the losses since the history's last row.
        self.losses = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        self.autocast = torch.bfloat16 if run.train.precision == "bfloat16" else None

    @property
    def trained(self) -> nn.Module:
        """The module that is trained: the model or, from T0 on, `late`."""
        return self.model if self.late is None else self.late

    @property
    def epoch(self) -> float:
        """Number of epochs done, with the fraction of the current one."""
        return self.done / len(self.task.stream)

    def spawn(self) -> None:
        """Make the members, and their optimizer with empty momentum, at T0."""
        settings = self.run.late_phase
        assert settings is not None
        if self.runtime.world > 1:  # the same members in all processes
            torch.manual_seed(_keyed_seed(self.run.seed, self.done, self.runtime.world))
        self.late = make_late(self.model, self.run)
        self.late.clips_over_ranks = self.runtime.world > 1
        own = self.late.optimizer_like(self.optimizer)
        for group in own.param_groups if settings.weight_decay is not None else ():
            if group.get("decays", True):  # weights of `no_decay` have no decay
                group["weight_decay"] = settings.weight_decay
        self.member_optimizer = self._hooked(own)
        if self.run.train.compile:
            self.late.compile(dynamic=False)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Take one step of the optimizer, on one minibatch or on one for each member.

        Parameters
        ----------
        batches : sequence of Batch
            One minibatch before T0; from T0 on at most K, where batch k is used by member k.

        Returns
        -------
        Tensor, shape (len(batches),)
            Losses in nats, detached, on the device.
        """
        self._set_rates()
        self.trained.train()
        weights = self._begin_shares(len(batches))
        if self.late is None:
            losses = self._base_step(batches[0], 1.0 if weights is None else weights[0])
        else:
            assert self.member_optimizer is not None
            assert self.run.late_phase is not None
            losses = self.late.step(
                batches,
                self.task.loss,
                self.optimizer,
                self.member_optimizer,
                fused=self.run.late_phase.fused,
                micro_batches=self.run.train.micro_batches,
                autocast=self.autocast,
                loss_weight=mean_over_rows,
                batch_weights=weights,
                clip_norm=self.run.train.clip_norm,
            )
        self.losses[0] += losses.sum()
        self.losses[1] += len(losses)
        self.done += len(batches)
        average = self.run.average
        # With fewer minibatches than members, the base takes no step.
        moved = self.late is None or len(batches) == self.late.members
        if average is None or not average.every_step or not moved:
            return losses
        if self.epoch > average.start_epoch:
            average.step(self._begun_average(), self.trained)
        return losses

    def try_out(self, batch: Batch) -> None:
        """Take one step of the model, the members and the average at learning rate 0.

        Parameters
        ----------
        batch : Batch
            Inputs and targets.

        Raises
        ------
        NQMError
            If the model returns something other than a tensor of logits.
        """
        inputs, _ = batch
        with torch.no_grad():
            # On a copy, since the pass changes running statistics.
            logits = copy.deepcopy(self.model).train()(inputs)
        if not isinstance(logits, Tensor):
            raise NQMError(
                f"model {self.run.model.name} gives a {type(logits).__name__} in training, not "
                "logits; set model.aux_logits = false if it has auxiliary outputs"
            )
        set_lr(self.optimizer, 0.0)
        self.model.train()
        self._base_step(batch)
        settings = self.run.late_phase
        if settings is not None:
            self.spawn()
            assert self.late is not None
            assert self.member_optimizer is not None
            set_lr(self.member_optimizer, 0.0)
            self.late.train()
            count = settings.members if settings.fused else 2
            self.late.step(
                [batch] * count,
                self.task.loss,
                self.optimizer,
                self.member_optimizer,
                fused=settings.fused,
                autocast=self.autocast,
                clip_norm=self.run.train.clip_norm,
            )
        average = self.run.average
        if average is not None:
            average.step(self._begun_average(), self.trained)
            average.end_epoch(self._begun_average(), self.trained, self.run.train.epochs)

    def _base_step(self, batch: Batch, weight: float = 1.0) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        enabled = self.autocast is not None

        def run(args: Any, kwargs: Any, learn: Callable[[Any], Tensor]) -> Tensor:
            with torch.autocast(self.runtime.device.type, self.autocast, enabled=enabled):
                return learn(self.forward(*args, **kwargs))

        def loss(output: Tensor, targets: Tensor) -> Tensor:
            mean = self.task.loss(output, targets)
            return mean if weight == 1.0 else mean * weight

        count = self.run.train.micro_batches
        value = backward_in_pieces(
            self.model, batch, count, loss, run, self.known_pieces, mean_over_rows
        )
        self.optimizer.step()
        return value.reshape(1)

    def _begin_shares(self, count: int) -> list[float] | None:
        """Seed this process for a step, and weigh the shares of its minibatches by examples."""
        if self.runtime.world == 1:
            return None
        # By step instead of from a stored state: only the first process writes checkpoints.
        torch.manual_seed(_keyed_seed(self.run.seed, self.done, self.runtime.rank))
        stream = self.task.stream
        return [stream.plan.weight((self.done + k) % len(stream)) for k in range(count)]

    def _set_rates(self) -> None:
        train, late = self.run.train, self.run.late_phase
        now = self.epoch if train.lr_every == "step" else self.done // len(self.task.stream)
        set_lr(self.optimizer, self.base_lr(self.epoch))
        if self.member_optimizer is not None and late is not None:
            set_lr(self.member_optimizer, float((late.member_lr or train.lr)(now)))

    def finite(self) -> bool:
        """Tell whether every loss since the history's last row is finite, in all processes.

        Returns
        -------
        bool
            The same in all processes.
        """
        return self.all_finite(self.losses[0])

    def all_finite(self, value: Tensor | float) -> bool:
        """Tell whether a number is finite in all processes, which must call this together.

        Parameters
        ----------
        value : Tensor or float
            The number of this process.

        Returns
        -------
        bool
            The same in all processes.
        """
        value = torch.as_tensor(value, dtype=torch.float64, device=self.runtime.device)
        return bool((value if self.runtime.world == 1 else summed(value)).isfinite())

    def take_mean_loss(self) -> float:
        """Return the mean training loss since the previous call, and start a new mean.

        Returns
        -------
        float
            In nats, over the minibatches of all processes; NaN if there was no step.
        """
        losses = self.losses if self.runtime.world == 1 else summed(self.losses)
        total, count = losses.tolist()
        self.losses.zero_()
        return total / count if count else float("nan")

    def end_epoch(self, epoch: int) -> None:
        """Update the average over time after an epoch.

        Parameters
        ----------
        epoch : int
            Number of epochs done.
        """
        average = self.run.average
        if average is None or epoch <= average.start_epoch:
            return
        if self.average is None and average.every_step:
            return  # there was no base step since the start of the average
        average.end_epoch(self._begun_average(), self.trained, epoch)

    def snapshot(self) -> dict[str, Tensor] | None:
        """Take the snapshot that is due after so many minibatches, and begin the next cycle.

        Called between steps, and before the first one; a second call at one time does nothing.

        Returns
        -------
        dict of str to Tensor, or None
            Plain state dict of the snapshot; None if none is due.
        """
        settings = self.run.snapshots
        if settings is None or self.taken == settings.members:
            return None
        if self.origin is None and self.done == settings.first_epochs * len(self.task.stream):
            self.origin = self._plain_weights()
        if self.done != settings.taken_at(self.taken) * len(self.task.stream):
            return None
        self.taken += 1
        state = snapshots.plain_state(self.model)
        if self.taken < settings.members and settings.kind != "triangle":
            self._begin_cycle(settings)
        return state

    def ends_cycle(self, epoch: int) -> bool:
        """Tell whether a snapshot of the cycles is due.

        Parameters
        ----------
        epoch : int
            Number of epochs done.

        Returns
        -------
        bool
            False for the end of the first epochs, which other runs may have trained.
        """
        kept = self.run.snapshots
        if kept is None or self.taken == kept.members:
            return False
        return kept.first_epochs < epoch == kept.taken_at(self.taken)

    def distance(self) -> float:
        """Euclidean distance of the weights from those where the cycles began.

        Returns
        -------
        float
            NaN before, and without snapshots.
        """
        if self.origin is None:
            return float("nan")
        moved = zip(self._plain_weights(), self.origin, strict=True)
        return math.hypot(*(float((now - then).norm()) for now, then in moved))

    def _plain_weights(self) -> list[Tensor]:
        """Copies of the weights, without reparametrisations."""
        return [value.detach() for value in fold(duplicate(self.model)).parameters()]

    def _begin_cycle(self, settings: snapshots.SnapshotsConfig) -> None:
        """Go back to the first snapshot, if this is a star, and empty the optimizer's state."""
        if settings.kind == "star" and self.centre is None:
            self.centre = copy.deepcopy({"weights": self.model.state_dict()})
            if not settings.reset_optimizer:
                self.centre["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        elif self.centre is not None:
            self.model.load_state_dict(self.centre["weights"])
            if not settings.reset_optimizer:
                self.optimizer.load_state_dict(copy.deepcopy(self.centre["optimizer"]))
        if settings.reset_optimizer:
            self.optimizer.state.clear()

    def _begun_average(self) -> nn.Module:
        """State of the average, made at the first call."""
        assert self.run.average is not None
        if self.average is None:
            self.average = self.run.average.begin(self.trained)
        return self.average

    def _hooked(self, optimizer: Optimizer) -> Optimizer:
        """Let an optimizer average gradients over ranks, and clip them, before every step.

        With members, `LatePhase.step` averages and clips the gradient of each minibatch.
        """
        world, norm = self.runtime.world, self.run.train.clip_norm

        def before(optimizer: Optimizer, *_: Any) -> None:
            if norm is not None and self.late is not None:
                return
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if world > 1:
                average_gradients(parameters)
            if norm is not None:
                nn.utils.clip_grad_norm_(parameters, norm)

        if world > 1 or norm is not None:
            optimizer.register_step_pre_hook(before)
        return optimizer

    # --- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values from which training continues bit for bit.

        Returns
        -------
        dict of str to object
            Argument of `load_state_dict`.
        """
        state: dict[str, Any] = {
            "done": self.done,
            "rows": self.rows,
            "losses": self.losses,
            "weights": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.runtime.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.runtime.device)
        if self.member_optimizer is not None:
            state["member_optimizer"] = self.member_optimizer.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        if self.taken:
            state["taken"] = self.taken
        if self.centre is not None:
            state["centre"] = self.centre
        if self.origin is not None:
            state["origin"] = self.origin
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Parameters
        ----------
        state : mapping
            Result of `state_dict` of this run, or of a run with the same beginning.
        """
        if "member_optimizer" in state:
            self.spawn()
        self.trained.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.member_optimizer is not None:
            self.member_optimizer.load_state_dict(state["member_optimizer"])
        if "average" in state:
            self._begun_average().load_state_dict(state["average"])
        self.taken, self.centre = state.get("taken", 0), state.get("centre")
        self.origin = state.get("origin")
        self.done = state["done"]
        self.rows = list(state["rows"])
        self.losses.copy_(state["losses"])
        torch.set_rng_state(state["random"].cpu())
        if "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.runtime.device)


def _keyed_seed(*key: int) -> int:
    return keyed_generator(*key).initial_seed() >> 1


def _channels_last(model: nn.Module) -> None:
    """Convert convolution kernels, the weights with four axes, to the channels-last layout."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, TemplateBank):
            module.channels_last_()
