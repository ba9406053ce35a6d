"""Late-phase weights: K copies of some weights, trained with the other weights shared.

von Oswald, Kobayashi et al., ICLR 2021, Figure 5. When `LatePhase` is made, each of K members gets
a copy phi_k of the selected weights; all other weights theta, the base, are shared. At the end the
members are averaged into one model. One cycle takes K minibatches, one for each member::

    phi_k <- U_phi(phi_k, grad_phi_k L(batch_k; theta, phi_k))           for k = 0 .. K-1
    theta <- U_theta(theta, gamma sum_k grad_theta L(batch_k; theta, phi_k))

theta does not change within a cycle and member k uses its own minibatch only, so all members can
take their steps together at the end of the cycle. Their weights are stored stacked, (K, ...), and
one optimizer steps all of them. It must be elementwise, i.e. treat every number separately (SGD,
Adam and similar ones, but not LARS or Muon).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from neural.batches import Adapter, arguments, as_pair, map_tensors, pairs, safe_to_keep
from neural.batches import Batch as Batch
from neural.late_phase import fused as fused_forward
from neural.late_phase import merge as merging
from neural.late_phase import optimizers
from neural.late_phase.clip import clipped
from neural.late_phase.duplicate import results_by_value
from neural.late_phase.member_steps import step_members
from neural.late_phase.options import LEFTOVERS, MemberOptions
from neural.late_phase.pieces import Known, LossWeight, backward_in_pieces
from neural.late_phase.ranks import average, average_gradients
from neural.late_phase.ready import check_ready, checked_statistics
from neural.late_phase.rows import UnclearRowsError
from neural.late_phase.scaler import check_scaler, unscale, unscaled_half
from neural.late_phase.select import select as resolve
from neural.late_phase.swap import places, swapped
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.gamma import base_scale
from nqm.words import html_list

Loss = Callable[[Any, Any], Tensor]


class _Settings(NamedTuple):
    """Settings of a minibatch's forward and backward pass."""

    loss: Loss
    micro_batches: int
    autocast: torch.dtype | None
    loss_weight: LossWeight | None
    batch_weights: Sequence[float] | None
    clip_norm: float | None = None
    scaler: GradScaler | None = None

    def loss_of(self, member: int) -> Loss:
        """Loss of a member's minibatch, times the minibatch's weight and the scaler's scale."""
        loss, scaler = self.loss, self.scaler
        weight = 1.0 if self.batch_weights is None else self.batch_weights[member]
        if weight == 1.0 and scaler is None:
            return loss
        if scaler is None:
            return lambda outputs, targets: loss(outputs, targets) * weight
        return lambda outputs, targets: scaler.scale(loss(outputs, targets) * weight)

    def scaled(self, value: float, device: torch.device) -> float | Tensor:
        """A number times the scaler's scale, which stays on the device: to read it would wait."""
        if self.scaler is None:
            return value
        return self.scaler.scale(torch.full((), value, device=device))


class LatePhase(nn.Module):
    """K late-phase members of a model: copies of some weights, with the other weights shared.

    Parameters
    ----------
    model : Module
        Any module. Its shared weights remain the same `Parameter` objects, so that their optimizer
        and its momentum can be used further. The selected weights in it are not trained any more.
    members : int
        Number of members, K >= 2.
    select : str or iterable of str
        Weights that are replicated (see `neural.late_phase.select.select`). With a normalisation
        layer its running statistics are replicated as well.
    gamma : {"sum", "mean"} or float
        Scale of the base gradient, which is summed over members: 1 (the official code for CIFAR),
        1 / K (that for ImageNet), or a number >= 0.
    noise : float
        Relative size sigma >= 0 of the Gaussian perturbation of the members' initial weights. The
        paper's CIFAR runs use 0.
    noise_rule : {"rms", "fan_in"}
        Standard deviation of the perturbation of a tensor. ``"rms"``: sigma times the tensor's root
        mean square (the official code). ``"fan_in"``: sigma / sqrt(n_in) (the paper), where n_in
        is the fan-in of a matrix or kernel, and the length of a vector.
    idle_steps : {"none", "first", "every"}
        When the optimizer also steps idle members, with a gradient of zero: never, when member 0
        steps, or when any member steps. Momentum and weight decay then act on every idle member
        that has taken a step of its own before. This is what the official code did under torch 1.4
        for CIFAR (``"first"``) and ImageNet (``"every"``).
    leftover : {"carry", "members", "drop"}
        What `cycles` does with the last minibatches of a loader if they are fewer than K.
        ``"carry"``: they begin the first cycle of the next call. ``"members"``: they are yielded as
        a short list, with which `step` steps their members and not the base, as in the official
        code (39 cycles and 1 minibatch in an epoch of CIFAR). ``"drop"``: they are not used.
    seed : int
        Seed of the perturbation, >= 0.

    Raises
    ------
    NQMError
        If an option is out of range, the selection matches nothing, or the model's weights cannot
        be replicated.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from neural import LatePhase
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> late = LatePhase(model, members=5, select="batchnorm+head")
    >>> own = late.optimizer_like(base)
    >>> data = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(10)]
    >>> for batches in late.cycles(data):
    ...     losses = late.step(batches, nn.functional.cross_entropy, base, own)
    >>> single = late.averaged()
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        model: nn.Module,
        members: int,
        select: str | Iterable[str] = "batchnorm+head",
        *,
        gamma: str | float = "sum",
        noise: float = 0.0,
        noise_rule: str = "rms",
        idle_steps: str = "none",
        leftover: str = "carry",
        seed: int = 0,
    ):
        super().__init__()
        MemberOptions(
            members=members,
            gamma=gamma,
            noise=noise,
            noise_rule=noise_rule,
            idle_steps=idle_steps,
            leftover=leftover,
        )
        check_integer("LatePhase.seed", seed, 0)
        check_ready(model, "LatePhase")
        self._ranks_average = False
        #: Whether `clip_norm` averages each minibatch's gradient over processes before it clips,
        #: also without `DistributedDataParallel`; all other averaging is then the caller's.
        self.clips_over_ranks = False
        if isinstance(model, DistributedDataParallel):
            model = model.module
            self._ranks_average = True
        self.model = model
        self.members = members
        self.gamma = gamma
        self.idle_steps = idle_steps
        self.leftover = leftover
        self.selection = resolve(model, select)
        self._carried: list[Batch] = []
        self._had_turn = [False] * members
        self._plans: dict[Any, fused_forward.Plan | None] = {}
        self._warned: set[str] = set()
        self._in_place = 0  # blocks of `as_member` that are open
        self._pieces: Known = {}
        #: The compiled `_member_forward`; None until `compile` is called.
        self._compiled: Callable[..., Any] | None = None
        self.stacked = nn.ParameterDict()
        self.statistics = nn.Module()
        generator = torch.Generator().manual_seed(seed)
        for name in self.selection.parameters:
            self.stacked[_key(name)] = nn.Parameter(
                _spawn(model.get_parameter(name), members, noise, noise_rule, generator)
            )
        for name in self.selection.buffers:
            value = model.get_buffer(name)
            path, _, own = name.rpartition(".")
            saved = own not in model.get_submodule(path)._non_persistent_buffers_set
            stacked = torch.stack([value] * members)
            self.statistics.register_buffer(_key(name), stacked, persistent=saved)
        # Modules and names are determined once, tensors at every use, since `to` may replace them.
        self._places = places(model, [*self.selection.parameters, *self.selection.buffers])
        self._keys = {name: _key(name) for name in self.selection.parameters}
        self._buffer_keys = {name: _key(name) for name in self.selection.buffers}
        device = next(iter(self.stacked.values())).device
        self.index: Tensor
        self.register_buffer("index", torch.arange(members, device=device), persistent=False)

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        held = sum(one.numel() for one in self.model.parameters())
        own = sum(one[0].numel() for one in self.stacked.values())
        entries = {
            "model": type(self.model).__name__,
            "weights": f"{held:,}",
            "of which each member has its own": f"{own:,} ({own / held:.2%})",
            "these are": ", ".join(self.selection.parameters),
            "gamma": self.gamma,
            "idle_steps": self.idle_steps,
            "leftover": self.leftover,
            "device": str(self.index.device),
        }
        return html_list(f"LatePhase of {self.members} members", entries)

    # --- running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, member: int | Tensor, **kwargs: Any) -> Any:
        """Run the model with the weights of one member.

        The backward pass writes gradients to the member's row of the stacked weights. A model with
        activation checkpoints needs `step` or `accumulate` instead: these keep the member's weights
        in the model until the backward pass is done.

        Parameters
        ----------
        *args
            Arguments of the model.
        member : int or Tensor
            Number of the member, 0 to K - 1. With a tensor, `torch.compile` makes one graph for all
            members.
        **kwargs
            Keyword arguments of the model.

        Returns
        -------
        object
            Output of the model.

        Raises
        ------
        NQMError
            If `member` is no whole number from 0 to K - 1.
        """
        if not isinstance(member, Tensor):
            member = self.index[self._check_member(member)]
        run = self._member_forward if self._compiled is None else self._compiled
        with checked_statistics():
            return run(member.reshape(1), args, kwargs)

    @contextmanager
    def as_member(self, member: int) -> Iterator[nn.Module]:
        """Let the model compute with the weights of one member inside the block.

        For loops in which something else calls the model and the backward pass, e.g. a trainer.
        Every backward pass adds to the member's row of the stacked weights' gradients, and to those
        of the shared weights. Afterwards `finish_cycle` steps the members.

        Parameters
        ----------
        member : int
            Number of the member, 0 to K - 1.

        Yields
        ------
        Module
            The model.

        Raises
        ------
        NQMError
            If `member` is no whole number from 0 to K - 1.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from neural import LatePhase
        >>> model = nn.Linear(4, 3)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> late = LatePhase(model, members=2, select="bias", noise=0.1)
        >>> own = late.optimizer_like(base)
        >>> for k in range(2):
        ...     with late.as_member(k):
        ...         model(torch.ones(5, 4)).square().mean().backward()
        >>> if late.finish_cycle(own, 2):
        ...     base.step()
        >>> base.zero_grad()
        """
        k = self._check_member(member)
        # `select` keeps no tensor for the backward pass, which may thus run several times.
        state = {n: self._cast(n, w.select(0, k)) for n, w in self._weights().items()}
        with torch.no_grad():
            state |= {n: v[k].clone() for n, v in self._statistics().items()}
        self._in_place += 1
        try:
            with swapped(self._places, state), checked_statistics():
                yield self.model
        finally:
            self._in_place -= 1
        self._store_statistics(self.index[k].reshape(1), state)

    def _check_outside(self, what: str) -> None:
        if self._in_place:
            raise NQMError(
                f"{what} inside `with late.as_member(k)`, where the model has the weights of one "
                "member; call it after the block"
            )

    def finish_cycle(
        self, member_optimizer: Optimizer, count: int, *, divided_by: float = 1.0
    ) -> bool:
        """Step the members with the gradients that were computed in `as_member`.

        The base's gradient is left for a step of its optimizer, times gamma, and averaged over
        processes where torch's data parallelism is used. Gradients of the members are freed.

        Parameters
        ----------
        member_optimizer : Optimizer
            Optimizer of `member_parameters`. It must be elementwise.
        count : int
            Number of members that have had a minibatch: members 0 to count - 1.
        divided_by : float
            Number by which a trainer has divided every loss, e.g. as it accumulates gradients.

        Returns
        -------
        bool
            Whether the cycle is complete, so that the base is to step. Else the base's gradient is
            freed.

        Raises
        ------
        NQMError
            If the optimizer has other weights or mixes members, `count` is not in 1 .. K, a member
            has no gradient, or idle members are to be stepped.
        """
        self._check_outside("finish_cycle")
        if self.idle_steps != "none":
            raise NQMError(f"finish_cycle needs idle_steps='none'; got {self.idle_steps!r}")
        check_integer("finish_cycle: count", count, 1)
        check_number("finish_cycle: count", count, high=self.members)
        check_number("finish_cycle: divided_by", divided_by, low=0.0, closed_low=False)
        optimizers.check_members(member_optimizer, self.member_parameters())
        if all(p.grad is None for p in self.member_parameters() if p.requires_grad):
            raise NQMError(
                "finish_cycle: the members have no gradient; run forward and backward passes "
                "inside `with late.as_member(k)`"
            )
        complete = count == self.members
        if not complete:
            self.model.zero_grad(set_to_none=True)
        self._average_over_ranks(self.parameters())
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if divided_by != 1.0:
            torch._foreach_mul_(grads, divided_by)
        self._scale_base()
        step_members(member_optimizer, self.member_parameters(), range(count))
        self.stacked.zero_grad(set_to_none=True)
        return complete

    def _store_statistics(self, index: Tensor, state: dict[str, Tensor]) -> None:
        # A trainer switches the mode of the model alone.
        if self.training or self.model.training:
            with torch.no_grad():
                for name, value in self._statistics().items():
                    value.index_copy_(0, index, state[name][None])

    def _check_member(self, member: Any) -> int:
        if isinstance(member, bool) or not isinstance(member, Integral):
            raise NQMError(f"member must be an integer; got {member!r}")
        if not 0 <= int(member) < self.members:
            raise NQMError(f"member must lie in 0 .. {self.members - 1}; got {member}")
        return int(member)

    def fused(self, inputs: Sequence[Any]) -> list[Any]:
        """Run all members on their own inputs, by one forward pass over all rows.

        The result equals that of K calls. It is faster if kernels are small and most of the time
        is spent on launching them. For inputs of new shapes the pass is first compared with K
        passes, on copies of the model. If the rows of different members cannot be distinguished (a
        layer whose input has no rows, a model that mixes rows, an output without rows), members run
        one by one, with a warning that tells the reason.

        Parameters
        ----------
        inputs : sequence of K inputs
            Inputs of the members, each as in a batch, with examples along the first axis. All must
            have the same structure.

        Returns
        -------
        list of K outputs
            Output k is that of member k.

        Raises
        ------
        NQMError
            If there are not K inputs.
        """
        if len(inputs) != self.members:
            raise NQMError(
                f"fused needs one minibatch per member, {self.members}; got {len(inputs)}"
            )
        plan = self._plan(inputs)
        if plan is None:
            outputs = []
            for k, own in enumerate(inputs):
                args, kwargs = arguments(own)
                outputs.append(self(*args, member=k, **kwargs))
            return outputs
        return cast(
            list[Any],
            fused_forward.forward(self.model, self._places, self._member_rows(), inputs, plan),
        )

    def _plan(self, inputs: Sequence[Any]) -> fused_forward.Plan | None:
        """Plan to run all rows together, or None and a warning if there is no such plan."""
        key = None
        try:
            key = fused_forward.key(self.model, inputs)
            if key not in self._plans:
                self._plans[key] = fused_forward.make_plan(self.model, self._member_rows(), inputs)
        except UnclearRowsError as error:
            if key is not None:
                self._plans[key] = None
            self._warn_once(f"fused: {error}; members run one by one")
            return None
        return self._plans[key]

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=3)

    def _member_rows(self) -> list[dict[str, Tensor]]:
        """Weights and statistics of every member; statistics are views that layers update."""
        with torch.no_grad():
            statistics = {name: value.unbind(0) for name, value in self._statistics().items()}
        weights = {name: value.unbind(0) for name, value in self._weights().items()}
        rows = [{n: self._cast(n, w[k]) for n, w in weights.items()} for k in range(self.members)]
        for k, row in enumerate(rows):
            row.update({name: value[k] for name, value in statistics.items()})
        return rows

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the members' forward pass.

        Parameters
        ----------
        *args, **kwargs
            Arguments of `torch.compile`.
        """
        self._compiled = torch.compile(self._member_forward, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LatePhase:
        """Move or convert; members' weights stay at least float32, e.g. after `late.bfloat16()`."""

        def wide(value: Tensor) -> Tensor:
            moved = fn(value)
            if moved.dtype == torch.promote_types(moved.dtype, torch.float32):
                return moved
            return value.to(moved.device, torch.promote_types(moved.dtype, torch.float32))

        self.model._apply(fn)  # type: ignore[no-untyped-call]
        self.statistics._apply(fn)  # type: ignore[no-untyped-call]
        self.stacked._apply(wide)  # type: ignore[no-untyped-call]
        return cast(LatePhase, super()._apply(fn, recurse=False))  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._check_outside("state_dict")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._carried:
            destination[f"{prefix}carried"] = list(self._carried)
        if self.idle_steps != "none":
            destination[f"{prefix}had_turn"] = torch.tensor(self._had_turn)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        carried = state_dict.pop(f"{prefix}carried", [])
        self._carried = [map_tensors(self._on_device, batch) for batch in carried]
        turns = state_dict.pop(f"{prefix}had_turn", None)
        if turns is not None:
            self._had_turn = turns.tolist()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _on_device(self, value: Tensor) -> Tensor:
        return value.to(self.index.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatePhase:
        self._check_outside("deepcopy")
        memo[id(self)] = twin = type(self).__new__(type(self))
        with results_by_value():
            twin.__setstate__(copy.deepcopy(vars(self), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A compiled function would use the weights of the module that it was compiled for.
        self._compiled = None

    def _member_forward(self, index: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = {n: self._cast(n, _row(w, index)) for n, w in self._weights().items()}
        with torch.no_grad():
            state |= {n: v.index_select(0, index)[0] for n, v in self._statistics().items()}
        with swapped(self._places, state):
            output = self.model(*args, **kwargs)
        self._store_statistics(index, state)
        return output

    def _member_backward(
        self,
        k: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        learn: Callable[[Any], Tensor],
    ) -> Tensor:
        """Run a member and its backward pass on views of its rows; nothing of size (K, ...) moves.

        Its weights stay in the model until the backward pass is done, since activation checkpoints
        run layers again.
        """
        stacked = self._weights()
        rows = {n: w.detach()[k].requires_grad_(w.requires_grad) for n, w in stacked.items()}
        # In evaluation mode layers must not write to the statistics.
        views = {n: v[k] if self.training else v[k].clone() for n, v in self._statistics().items()}
        state = {n: self._cast(n, row) for n, row in rows.items()} | views
        with swapped(self._places, state):
            loss = learn(self.model(*args, **kwargs))
        with torch.no_grad():
            for name, view in views.items():
                if state[name] is not view:  # a layer has replaced a buffer
                    view.copy_(state[name])
            reached = [name for name, row in rows.items() if row.grad is not None]
            for name in reached:
                if stacked[name].grad is None:
                    stacked[name].grad = torch.zeros_like(stacked[name])
            into = [cast(Tensor, stacked[name].grad)[k] for name in reached]
            if reached:
                torch._foreach_add_(into, [cast(Tensor, rows[name].grad) for name in reached])
        return loss

    def _weights(self) -> dict[str, Tensor]:
        stacked = self.stacked._parameters
        return {name: cast(Tensor, stacked[key]) for name, key in self._keys.items()}

    def _statistics(self) -> dict[str, Tensor]:
        buffers = self.statistics._buffers
        return {name: cast(Tensor, buffers[key]) for name, key in self._buffer_keys.items()}

    def _cast(self, name: str, value: Tensor) -> Tensor:
        # Members differ little, so they are stored in float32 also for a model of lower precision.
        holder, own = self._places[name][0]
        value = value.to(cast(Tensor, holder._parameters[own]).dtype)
        if getattr(holder, "sparse", False):
            # A row of a stacked weight cannot have a sparse gradient.
            value = cast(Tensor, _DenseGradient.apply(value))  # type: ignore[no-untyped-call]
        return value

    # --- training --------------------------------------------------------------------------------

    def member_parameters(self) -> list[nn.Parameter]:
        """Weights that the member optimizer steps.

        Returns
        -------
        list of Parameter, shape (K, ...) each
            Stacked weights; row k belongs to member k.
        """
        return list(self.stacked.values())

    def optimizer_like(
        self, base_optimizer: Optimizer, *, follow: bool = False, **changes: Any
    ) -> Optimizer:
        """Make the optimizer of the members with parameter groups and settings of the base's.

        Parameters
        ----------
        base_optimizer : Optimizer
            Optimizer of the model's parameters. Members of weights that it does not have get its
            default settings. If it wraps an optimizer, like that of accelerate, the inner one is
            used.
        follow : bool
            True: before each of its steps the members' optimizer takes over the settings that the
            base's has then, so that a scheduler of the base's optimizer drives the members' rates
            (and momentum, where it changes that) as well. False: it keeps those of now.
        **changes
            Settings that differ, e.g. ``weight_decay=5e-3``; they do not follow. With `follow`,
            `lr` is the members' rate now, and its ratio to the base's is kept.

        Returns
        -------
        Optimizer
            Of the same class, on `member_parameters`, with empty state.

        Raises
        ------
        NQMError
            If several optimizers are given, or none can be made from these settings, or there is
            nothing that the members could follow.
        """
        self._check_outside("optimizer_like")
        return optimizers.another(
            base_optimizer, self.model.get_parameter, self._weights(), changes, follow=follow
        )

    def cycles(
        self,
        loader: Iterable[Any],
        leftover: str | None = None,
        *,
        last: bool = False,
        batch: Adapter | None = None,
    ) -> Iterator[list[Batch]]:
        """Group the minibatches of a loader into cycles of K.

        If the loader has fewer than K minibatches, the base would never take a step. They are then
        carried over to the next call for any `leftover`, with a warning.

        Parameters
        ----------
        loader : iterable of batches
            Minibatches (inputs, targets), or of another form with `batch`.
        leftover : {"carry", "members", "drop"}, optional
            What is done with the last minibatches if they are fewer than K, in this call; by
            default that of the object (see `LatePhase`).
        last : bool
            True if no other call follows, so that nothing is carried over.
        batch : callable, optional
            Makes a pair (inputs, targets) of a minibatch as the loader yields it, e.g.
            ``lambda b: (b["image"].to(device), b["label"].to(device))``. A dict or tuple of inputs
            is unpacked into arguments of the model.

        Yields
        ------
        list of batches
            K minibatches, as pairs; fewer only at the end, and only with ``leftover="members"``.

        Raises
        ------
        NQMError
            If `leftover` is another word, or a minibatch is no pair and `batch` makes none of it.
        """
        leftover = self.leftover if leftover is None else leftover
        check_word("leftover", leftover, LEFTOVERS)
        waiting, self._carried = self._carried, []
        complete = False
        for one in safe_to_keep(pairs("cycles", loader, batch), self.members):
            waiting.append(one)
            if len(waiting) == self.members:
                yield waiting
                waiting, complete = [], True
        if waiting and not complete and leftover != "carry" and not last:
            warnings.warn(
                f"leftover={leftover!r}: {len(waiting)} minibatches make no cycle of "
                f"{self.members} members, and the base would never step; they are carried over",
                stacklevel=2,
            )
            leftover = "carry"
        if waiting and leftover == "members":
            yield waiting
        elif leftover == "carry" and not last:
            self._carried = waiting

    def step(  # noqa: PLR0913 - options, by keyword
        self,
        batches: Sequence[Batch],
        loss_fn: Loss,
        base_optimizer: Optimizer | Sequence[Optimizer],
        member_optimizer: Optimizer,
        *,
        fused: bool = False,
        micro_batches: int = 1,
        autocast: torch.dtype | None = None,
        loss_weight: LossWeight | None = None,
        batch_weights: Sequence[float] | None = None,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """Do one cycle: every member steps with its own minibatch, the base with all of them.

        Parameters
        ----------
        batches : sequence of at most K batches
            Batch k is used by member k. If there are fewer than K, their members step and the base
            does not.
        loss_fn : callable
            ``loss_fn(output, targets)`` returns the mean loss of a minibatch.
        base_optimizer : Optimizer or sequence of Optimizer
            Optimizer of the model's parameters.
        member_optimizer : Optimizer
            Optimizer of `member_parameters`. It must be elementwise.
        fused : bool
            Run all minibatches in one forward pass (see `fused`).
        micro_batches : int
            Number of pieces in which each minibatch is run, to save memory. Gradients are the same,
            except that BatchNorm uses the statistics of a piece.
        autocast : dtype, optional
            Type of the model's autocast, e.g. ``torch.bfloat16``. By default the caller's autocast
            is used.
        loss_weight : callable, optional
            ``loss_weight(inputs, targets)`` of a piece returns the number of items that its loss is
            a mean of, e.g. of labels that are not ignored; by default its number of rows.
        batch_weights : sequence of float, optional
            Factor of each minibatch's loss, e.g. where several processes have shares of unequal
            size; by default 1.
        clip_norm : float, optional
            Largest norm of each minibatch's gradient over the weights that its member computes
            with, the shared ones and its own. It is what `torch.nn.utils.clip_grad_norm_` does to
            the whole model in plain training. It acts before gamma and the sum over members; the
            base's gradient is then at most gamma K clip_norm long.
        scaler : GradScaler, optional
            Scales losses, e.g. with ``autocast=torch.float16``. `step` also unscales the gradients
            and updates the scale. If a gradient is not finite, neither base nor members step. To
            know it `step` waits for the GPU once.

        Returns
        -------
        Tensor, shape (len(batches),)
            Losses of the members, detached and unscaled.

        Raises
        ------
        NQMError
            If there are no batches or more than K, if an optimizer has other weights or mixes
            members, if `fused` is combined with `idle_steps`, `micro_batches` or `clip_norm`, or
            `scaler` with `idle_steps`, or if the loss of the pieces is not that of the minibatch
            (rows along another axis, a loss that ignores some of them).
        """
        bases = optimizers.listed(base_optimizer, "base_optimizer")
        scaler = check_scaler(scaler, bases)
        chosen = set(self.selection.parameters)
        shared = [p for name, p in self.model.named_parameters() if name not in chosen]
        optimizers.check(bases, member_optimizer, shared, self.member_parameters())
        if self.idle_steps == "none":
            losses = self.accumulate(
                batches,
                loss_fn,
                fused=fused,
                micro_batches=micro_batches,
                autocast=autocast,
                loss_weight=loss_weight,
                batch_weights=batch_weights,
                clip_norm=clip_norm,
                scaler=scaler,
            )
            if scaler is not None:
                # The scale is taken out here: what wraps an optimizer must not do it again.
                member_optimizer = optimizers.unwrapped(member_optimizer)
                full = len(batches) == self.members
                bases = [optimizers.unwrapped(base) for base in bases if full]
                if not unscale(scaler, [member_optimizer, *bases]):
                    return losses
            step_members(member_optimizer, self.member_parameters(), range(len(batches)))
        else:
            check_integer("micro_batches", micro_batches, 1)
            _check_norm(clip_norm)
            if scaler is not None:
                # A member would have stepped before a later minibatch overflows.
                raise NQMError(f"scaler needs idle_steps='none'; got {self.idle_steps!r}")
            if fused:
                # Idle members step within a cycle, so their passes cannot be done together.
                raise NQMError(f"fused needs idle_steps='none'; got {self.idle_steps!r}")
            settings = _Settings(
                loss_fn, micro_batches, autocast, loss_weight, batch_weights, clip_norm
            )
            losses = self._step_with_idle(batches, member_optimizer, settings)
        if len(batches) == self.members:
            for base in bases:
                base.step()
        return losses

    def accumulate(  # noqa: PLR0913 - options, by keyword
        self,
        batches: Sequence[Batch],
        loss_fn: Loss,
        *,
        fused: bool = False,
        micro_batches: int = 1,
        autocast: torch.dtype | None = None,
        loss_weight: LossWeight | None = None,
        batch_weights: Sequence[float] | None = None,
        clip_norm: float | None = None,
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """Compute the gradients of one cycle without a step, e.g. to clip them first.

        Afterwards ``.grad`` of a stacked weight, (K, ...), holds each member's gradient in its row,
        and ``.grad`` of a shared weight is gamma times the sum over members.

        Parameters
        ----------
        batches, loss_fn, fused, micro_batches, autocast, loss_weight, batch_weights
            See `step`.

        Returns
        -------
        Tensor, shape (len(batches),)
            Losses of the members, detached.

        Raises
        ------
        NQMError
            If there are no batches or more than K, if `fused` is combined with `micro_batches`, or
            if the loss of the pieces is not that of the minibatch.
        """
        batches = self._checked(batches, batch_weights)
        check_integer("micro_batches", micro_batches, 1)
        _check_norm(clip_norm)
        if fused and micro_batches > 1:
            raise NQMError(
                "fused runs whole minibatches; set micro_batches to 1, or fused to False"
            )
        if fused and clip_norm is not None:
            raise NQMError(
                "fused computes the base's gradient of all minibatches at once, but clip_norm "
                "needs that of each; set fused to False"
            )
        self.zero_grad(set_to_none=True)
        settings = _Settings(
            loss_fn,
            micro_batches,
            autocast,
            loss_weight,
            batch_weights,
            clip_norm,
            check_scaler(scaler, ()),
        )
        self._tell_half(settings)
        losses = None
        if fused and len(batches) == self.members:
            losses = self._backward_fused(batches, settings)
        if losses is None:
            losses = torch.stack(
                [self._backward(k, batch, settings) for k, batch in enumerate(batches)]
            )
        self._average_over_ranks(() if clip_norm is not None else self.parameters())
        self._scale_base()
        return losses if settings.scaler is None else losses / settings.scaled(1.0, losses.device)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by `DistributedDataParallel` when it wraps this module; its forward is not used."""
        self._ranks_average = True
        return []

    def _average_over_ranks(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients and copy buffers as torch's data parallelism does, if it is used."""
        if not self._ranks_average:
            return
        average_gradients(parameters)
        with torch.no_grad():
            for value in self.buffers():
                distributed.broadcast(value, 0)

    def _backward_fused(self, batches: Sequence[Batch], settings: _Settings) -> Tensor | None:
        """Losses of all members by one pass; None if there is no plan for it."""
        inputs = [own for own, _ in batches]
        with self._autocast(settings.autocast):
            plan = self._plan(inputs)
            if plan is None:
                return None

            def learn(outputs: list[Any]) -> Tensor:
                pairs = zip(outputs, batches, strict=True)
                losses = torch.stack(
                    [settings.loss_of(k)(out, y) for k, (out, (_, y)) in enumerate(pairs)]
                )
                with torch.autocast(self.index.device.type, enabled=False):
                    torch.autograd.backward(losses.sum())
                return losses.detach()

            rows = self._member_rows()
            losses = fused_forward.forward(self.model, self._places, rows, inputs, plan, learn)
        self._check_reached()
        return cast(Tensor, losses)

    def _backward(self, member: int, batch: Batch, settings: _Settings) -> Tensor:
        if settings.clip_norm is None:
            return self._unclipped_backward(member, batch, settings)
        shared, stacked = list(self.model.parameters()), self.member_parameters()
        norm = settings.scaled(float(settings.clip_norm), self.index.device)
        average_ = average if self._ranks_average or self.clips_over_ranks else _nothing
        with clipped(shared, stacked, member, norm, average_):
            return self._unclipped_backward(member, batch, settings)

    def _unclipped_backward(self, member: int, batch: Batch, settings: _Settings) -> Tensor:
        def run(
            args: tuple[Any, ...], kwargs: dict[str, Any], learn: Callable[[Any], Tensor]
        ) -> Tensor:
            with self._autocast(settings.autocast):
                if self._compiled is None:
                    return self._member_backward(member, args, kwargs, learn)
                return learn(self(*args, member=member, **kwargs))

        with checked_statistics():
            return backward_in_pieces(
                self.model,
                batch,
                settings.micro_batches,
                settings.loss_of(member),
                run,
                self._pieces,
                settings.loss_weight,
            )

    def _autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        # Without a type, a step runs in the caller's autocast if there is one.
        return nullcontext() if dtype is None else torch.autocast(self.index.device.type, dtype)

    def _tell_half(self, settings: _Settings) -> None:
        if settings.scaler is None and (
            told := unscaled_half(settings.autocast, self.model, self.index.device)
        ):
            self._warn_once(told)

    def _scale_base(self) -> None:
        gamma = base_scale(self.gamma, self.members)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if grads and gamma != 1.0:
            torch._foreach_mul_(grads, gamma)

    def _step_with_idle(
        self, batches: Sequence[Batch], optimizer: Optimizer, settings: _Settings
    ) -> Tensor:
        batches = self._checked(batches, settings.batch_weights)
        self.zero_grad(set_to_none=True)
        self._tell_half(settings)
        losses = []
        for k, batch in enumerate(batches):
            losses.append(self._backward(k, batch, settings))
            clips = settings.clip_norm is not None  # it has averaged them already
            self._average_over_ranks(() if clips else self.member_parameters())
            self._had_turn[k] = True
            everyone = self.idle_steps == "every" or k == 0
            # Before its first own turn a member has no gradient, and torch does not step it.
            ready = [j for j in range(self.members) if self._had_turn[j]]
            step_members(optimizer, self.member_parameters(), ready if everyone else [k])
            self.stacked.zero_grad(set_to_none=True)
        self._average_over_ranks(() if clips else self.model.parameters())
        self._scale_base()
        return torch.stack(losses)

    def _checked(
        self, batches: Sequence[Batch], weights: Sequence[float] | None = None
    ) -> list[Batch]:
        """The minibatches of a cycle, which must be pairs."""
        self._check_outside("step")
        if not 0 < len(batches) <= self.members:
            raise NQMError(
                f"a cycle takes 1 .. {self.members} minibatches, one per member; "
                f"got {len(batches)}; see LatePhase.cycles"
            )
        if weights is not None and len(weights) != len(batches):
            raise NQMError(
                f"batch_weights must have one number for each of the {len(batches)} minibatches; "
                f"got {len(weights)}"
            )
        return [as_pair("a cycle is a list of minibatches", one) for one in batches]

    def _check_reached(self) -> None:
        for name in self.selection.parameters:
            if self.model.get_parameter(name).grad is not None:
                raise NQMError(
                    f"fused: {name} is used outside the layer that holds it; set fused to False"
                )

    # --- one model -------------------------------------------------------------------------------

    @torch.no_grad()
    def averaged(self, *, batchnorm: str = "weights", rank1: str | None = None) -> nn.Module:
        """Make the model with the mean of the members' weights.

        Parameters
        ----------
        batchnorm : {"weights", "outputs"}
            ``"weights"``: average scale, shift and running statistics separately. ``"outputs"``:
            average the layers' outputs in evaluation mode, as the official code does; the mean of K
            affine maps is one affine map.
        rank1 : {"factors", "product"}, optional
            ``"factors"``: average the factors s and r, as the paper does, or B and A of low-rank
            updates. ``"product"``: average the matrices s_k r_k^T and B_k A_k, and fold the mean
            into the weight. By default the factors; for low-rank updates of another library
            (peft) it has no default.

        Returns
        -------
        Module
            Of the model's class, with the same state-dict keys, in the training or evaluation mode
            of this module.

        Raises
        ------
        NQMError
            If an option is out of range, or members have the factors of another library's updates
            and `rank1` is not given.
        """
        self._check_outside("averaged")
        check_word("batchnorm", batchnorm, ("weights", "outputs"))
        if rank1 is None:
            merging.check_factors(self.model, self.selection.parameters)
            rank1 = "factors"
        check_word("rank1", rank1, ("factors", "product"))
        weights, statistics = self._weights(), self._statistics()
        state = merging.means(weights | statistics)
        state |= merging.singular_vectors(self.model, state)
        if batchnorm == "outputs":
            state |= merging.mean_affine(self.model, weights, statistics)
        model = merging.with_weights(self.model, state)
        if rank1 == "product":
            for name, weight in merging.mean_products(self.model, weights).items():
                model.get_parameter(name).copy_(weight)
        return model.train(self.training)

    @torch.no_grad()
    def member(self, k: int) -> nn.Module:
        """Make a plain module with the weights of member k.

        Its outputs are those of the member, with one exception: if members' weights have spectral
        normalisation, the singular vectors are computed exactly, while training approximates them.

        Parameters
        ----------
        k : int
            Number of the member, 0 to K - 1.

        Returns
        -------
        Module
            See `averaged`.

        Raises
        ------
        NQMError
            If `k` is no whole number from 0 to K - 1.
        """
        self._check_outside("member")
        k = self._check_member(k)
        state = {n: value[k] for n, value in (self._weights() | self._statistics()).items()}
        state |= merging.singular_vectors(self.model, state)
        return merging.with_weights(self.model, state).train(self.training)

    @torch.no_grad()
    def spread(self) -> float:
        """Compute the relative distance of the members from their mean.

        Returns
        -------
        float
            ``sqrt(mean over k of |phi_k - mean|^2) / |mean|``, over all replicated weights
            together; 0 if their mean is 0.
        """
        values = [
            (torch.view_as_real(w) if w.is_complex() else w).double()
            for w in self._weights().values()
        ]
        apart = sum(float((w - w.mean(0)).square().sum()) for w in values) / self.members
        size = sum(float(w.mean(0).square().sum()) for w in values)
        return float((apart / size) ** 0.5) if size else 0.0

    def extra_repr(self) -> str:
        """Text that `print` shows inside the module's brackets.

        Returns
        -------
        str
            Number of members, weights of each, and gamma.
        """
        numbers = sum(p[0].numel() for p in self.member_parameters())
        return f"members={self.members}, {numbers} weights each, gamma={self.gamma!r}"


def _spawn(
    reference: Tensor, members: int, sigma: float, rule: str, generator: torch.Generator
) -> Tensor:
    """Make K perturbed copies of a weight, (K, ...), at least in float32."""
    value = reference.detach().to(torch.promote_types(reference.dtype, torch.float32))
    stacked = torch.stack([value] * members)
    if sigma > 0.0:
        if rule == "rms":
            size = float(value.abs().square().mean().sqrt())
        else:
            fan_in = value[0].numel() if value.ndim > 1 else value.numel()
            size = max(fan_in, 1) ** -0.5
        # Drawn on the CPU, so that members are the same on every device.
        normal = torch.randn(stacked.shape, generator=generator, dtype=stacked.dtype)
        stacked = stacked + sigma * size * normal.to(stacked.device)
    return stacked


def _row(stacked: Tensor, index: Tensor) -> Tensor:
    """Row of a stacked weight, in the layout of the others: channels-last kernels remain so.

    `index_select` alone writes its result, and the gradient, in row-major order.
    """
    order = sorted(range(1, stacked.ndim), key=lambda axis: -stacked.stride()[axis])
    row = stacked.permute(0, *order).index_select(0, index)[0]
    return row.permute([order.index(axis) for axis in range(1, stacked.ndim)])


class _DenseGradient(torch.autograd.Function):
    """Identity function that makes a sparse gradient dense in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


def _check_norm(norm: float | None) -> None:
    if norm is not None:
        check_number("clip_norm", norm, low=0.0, closed_low=False)


def _nothing(tensors: list[Tensor]) -> None:
    """Average over one process."""


def _key(name: str) -> str:
    # The name of a parameter cannot hold a dot, nor be a method of the dictionary, like `values`.
    path, _, own = name.rpartition(".")
    return f"{path.replace('.', '/')}/{own}"
