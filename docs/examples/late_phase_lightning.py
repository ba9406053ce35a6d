"""Late-phase weights in a Lightning Trainer, as a callback.

::

    trainer = Trainer(max_epochs=30, callbacks=[LatePhaseCallback(5, start_epoch=20)])
    trainer.fit(module, loader)  # module.model is then the averaged model

From `start_epoch` on every minibatch goes to the next member, and the module's optimizer steps the
base once for every K minibatches, which Lightning accumulates. Minibatches at the end of an epoch
that make no cycle move their members only. Validation and the end of training see the mean of the
members. One device, one optimizer; checkpoints of Lightning do not hold the members.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from neural import LatePhase
from nqm import NQMError


class LatePhaseCallback(Callback):
    """Train K late-phase members of one network of the module from an epoch on.

    Parameters
    ----------
    members : int
        Number of members, K.
    start_epoch : int
        Epochs that are trained without members.
    network : str
        Name of the attribute of the module that holds the network.
    member_settings : dict, optional
        Settings of the members' optimizer that differ from those of the module's.
    **options
        Further arguments of `neural.LatePhase`, e.g. `select`.
    """

    def __init__(
        self,
        members: int,
        start_epoch: int,
        network: str = "model",
        member_settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.members, self.start_epoch, self.network = members, start_epoch, network
        self.member_settings, self.options = member_settings or {}, options
        self.late: LatePhase | None = None
        self.turn = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this callback does not handle before the first step."""
        settings = {
            "several devices": trainer.world_size > 1,
            "several optimizers": len(trainer.optimizers) != 1,
            "manual optimization": not pl_module.automatic_optimization,
            "gradient_clip_val": trainer.gradient_clip_val is not None,
            "accumulate_grad_batches": trainer.accumulate_grad_batches != 1,
            "precision='16-mixed'": getattr(trainer.precision_plugin, "scaler", None) is not None,
        }
        for name, given in settings.items():
            if given:
                raise NQMError(f"LatePhaseCallback does not handle {name}; use late.step instead")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the members at `start_epoch`."""
        if self.late is None and trainer.current_epoch >= self.start_epoch:
            network = getattr(pl_module, self.network)
            self.late = LatePhase(network, self.members, **self.options)
            base = trainer.optimizers[0]
            self.own = self.late.optimizer_like(base, follow=True, **self.member_settings)
            trainer.accumulate_grad_batches = self.members

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the weights of the next member into the network."""
        if self.late is not None:
            self.seen = batch_idx % self.members + 1
            self.turn.enter_context(self.late.as_member(self.seen - 1))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them out again."""
        self.turn.close()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Step the members; Lightning steps the base after this."""
        if self.late is not None:
            # Lightning has divided every loss by K. Without a complete cycle the base has no
            # gradient, and its optimizer does nothing.
            self.late.finish_cycle(self.own, self.seen, divided_by=self.members)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the mean of the members into the network, which does not train with it."""
        if self.late is not None:
            self.late.model.load_state_dict(self.late.averaged().state_dict())

    on_train_end = on_validation_start
