"""Late-phase weights in a Trainer of Hugging Face's transformers, as a callback.

::

    model.accepts_loss_kwargs = False  # every minibatch's loss is its own mean
    settings = TrainingArguments(gradient_accumulation_steps=5, max_grad_norm=0.0, ...)
    trainer = Trainer(model, settings, callbacks=[LatePhaseCallback(select="layernorm+head")])
    trainer.train()  # model is then the averaged model

A Trainer accumulates as many minibatches in its whole life, so that the late phase is a call of
`train` of its own, after the plain training: K is `gradient_accumulation_steps`, and one step of
the Trainer is one cycle. Minibatches at the end of an epoch that make no cycle move their members
only. Evaluation, saved models and the end of training see the mean of the members. One device;
checkpoints do not hold the members, and training cannot go on from them. A `compute_loss_func` must
not divide by the number of labels that the Trainer counts over all minibatches.
"""

from __future__ import annotations

import inspect
import warnings
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neural import LatePhase
from nqm import NQMError


class LatePhaseCallback(TrainerCallback):  # type: ignore[misc]
    """Train late-phase members, as many as the Trainer accumulates minibatches.

    Parameters
    ----------
    member_settings : dict, optional
        Settings of the members' optimizer that differ from those of the Trainer's.
    **options
        Further arguments of `neural.LatePhase`, e.g. `select`.
    """

    def __init__(self, member_settings: dict[str, Any] | None = None, **options: Any) -> None:
        self.member_settings, self.options = member_settings or {}, options
        self.turn = ExitStack()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **others: Any,
    ) -> None:
        """Refuse what this callback does not handle as soon as the Trainer is made."""
        named = inspect.signature(model.forward).parameters.values()
        counted = any(one.kind is one.VAR_KEYWORD for one in named)  # as the Trainer decides
        settings = {
            "several devices": args.world_size > 1 or args.n_gpu > 1,
            "fp16=True": args.fp16,
            "max_grad_norm": args.max_grad_norm > 0,
            "gradient_accumulation_steps=1": args.gradient_accumulation_steps == 1,
        }
        for name, given in settings.items():
            if given:
                raise NQMError(f"LatePhaseCallback does not handle {name}; use late.step instead")
        if getattr(model, "accepts_loss_kwargs", counted):
            raise NQMError(
                "LatePhaseCallback: the Trainer would divide losses by the number of labels of all "
                "minibatches; set model.accepts_loss_kwargs = False before the Trainer is made"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **others: Any,
    ) -> None:
        """Make the members."""
        self.on_init_end(args, state, control, model)
        if state.global_step > 0:
            raise NQMError("LatePhaseCallback does not handle resume_from_checkpoint")
        # The Trainer logs the norm of the model's gradients; those of the members are elsewhere.
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor", UserWarning)
        self.late = LatePhase(model, args.gradient_accumulation_steps, **self.options)
        self.own = self.late.optimizer_like(optimizer, follow=True, **self.member_settings)

    def _next(self, seen: int) -> None:
        self.turn.close()
        self.seen = seen
        self.turn.enter_context(self.late.as_member(seen - 1))

    def on_step_begin(self, *states: Any, **others: Any) -> None:
        """Put the weights of member 0 into the model."""
        self._next(1)

    def on_substep_end(self, *states: Any, **others: Any) -> None:
        """Put those of the next member into it."""
        self._next(self.seen + 1)

    def on_pre_optimizer_step(self, *states: Any, **others: Any) -> None:
        """Step the members; the Trainer steps the base after this."""
        self.turn.close()
        # The Trainer has divided every loss by the number of minibatches. Without a complete cycle
        # the base has no gradient, and its optimizer does nothing.
        self.late.finish_cycle(self.own, self.seen, divided_by=self.seen)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Write the mean of the members into the model where it is evaluated or saved."""
        if control.should_evaluate or control.should_save:
            self.late.model.load_state_dict(self.late.averaged().state_dict())

    on_epoch_end = on_step_end

    def on_train_end(self, *states: Any, **others: Any) -> None:
        """Write the mean of the members into the model."""
        self.late.model.load_state_dict(self.late.averaged().state_dict())
