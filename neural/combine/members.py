"""Members: trained models of one architecture, read from disk when they are needed.

Merging streams over them: two state dicts are in memory at a time, however many members there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from neural.late_phase.duplicate import duplicate
from neural.late_phase.merge import singular_vectors
from neural.training.build import tied, ties, untied
from nqm.errors import NQMError
from nqm.limits import check_size

if TYPE_CHECKING:
    import pandas as pd

    from neural.training.task import Runtime

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Member:
    """One trained model.

    Attributes
    ----------
    name : str
        For tables and messages.
    read : callable
        Returns its state dict; called whenever the weights are needed.
    epochs : float
        Epochs of training that this member alone took; NaN if it is not known.
    trunk : tuple of (str, float), optional
        Name of the training that several members share, and its epochs, counted once for all.
    source : Path, optional
        Where it lies.
    """

    name: str
    read: Callable[[], Mapping[str, Tensor]] = field(repr=False)
    epochs: float = math.nan
    trunk: tuple[str, float] | None = None
    source: Path | None = None

    @property
    def epochs_all(self) -> float:
        """Epochs of training behind this member, shared ones included."""
        return self.epochs + (0.0 if self.trunk is None else self.trunk[1])


def _fault(value: Any, like: Tensor, *, parameter: bool) -> str | None:
    """Why a tensor of a state dict cannot take the place of the model's; None: it can."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "meta" if value.is_meta else "quantised" if value.is_quantized else value.layout
        return f"is no dense tensor of numbers ({kind}); save it as one"
    if value.shape != like.shape:
        return (
            f"has shape {tuple(value.shape)}, the model {tuple(like.shape)}; all need one "
            "architecture"
        )
    real = like.dtype.is_floating_point or like.dtype.is_complex
    if real and not (value.dtype.is_floating_point or value.dtype.is_complex):
        return (
            f"holds {value.dtype}, the model {like.dtype}: integers are no weights without their "
            "scale; convert the member"
        )
    try:
        fits = torch.promote_types(value.dtype, like.dtype) == like.dtype
    except RuntimeError:  # types of 8 bits and fewer have no common one with others
        return f"is {value.dtype}, the model's {like.dtype}; convert the member to {like.dtype}"
    if not fits:
        return (
            f"is {value.dtype}, and the model's {like.dtype} would lose digits; convert the model "
            "or the member"
        )
    finite = value.isfinite()
    if not parameter and not bool(finite.all()):
        finite |= ~like.to(value.device).isfinite()  # a mask of minus infinities, say
    return None if bool(finite.all()) else "holds numbers that are not finite; leave it out"


class Members(Sequence[Member]):
    """Trained models of one architecture.

    Parameters
    ----------
    model : Module
        The architecture. Its weights do not matter, except that they give names, shapes and types.
    members : sequence of Member
        At least one; names must differ.
    ancestor : Member, optional
        The model from which all were fine-tuned, which some rules need.

    Raises
    ------
    NQMError
        If there is no member, or two have the same name.
    """

    def __init__(self, model: nn.Module, members: Sequence[Member], ancestor: Member | None = None):
        if not members:
            raise NQMError("members: at least one model is needed; got none")
        names = [member.name for member in members]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise NQMError(f"members: {twice!r} is given twice; every member needs its own name")
        self.model, self.ancestor = model, ancestor
        self._members = tuple(members)
        self._like = {name: value.detach() for name, value in model.state_dict().items()}
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        #: Other name of a tied tensor -> the one it is known by.
        self._tied = ties(model)
        self._keys: dict[str, str] = {}

    @classmethod
    def of_states(
        cls,
        model: nn.Module,
        states: Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
        ancestor: Mapping[str, Tensor] | None = None,
    ) -> Members:
        """Members whose state dicts are in memory.

        Parameters
        ----------
        model : Module
            The architecture.
        states : mapping or sequence of state dicts
            By name, or numbered from 0.
        ancestor : state dict, optional
            Of the model from which all were fine-tuned.

        Returns
        -------
        Members
        """
        named = states if isinstance(states, Mapping) else {str(i): s for i, s in enumerate(states)}
        made = [Member(name, _returning(state)) for name, state in named.items()]
        start = None if ancestor is None else Member("ancestor", _returning(ancestor))
        return cls(model, made, start)

    @classmethod
    def open(
        cls,
        *where: str | Path,
        like: str | Path | None = None,
        model: nn.Module | None = None,
        ancestor: str | Path | None = None,
        runtime: Runtime | None = None,
    ) -> Members:
        """Members on disk (see `neural.combine.sources.open_members`).

        Parameters
        ----------
        *where : str or Path
            Each a finished run, ``RUN#members``, ``RUN#snapshots``, a pattern of runs, a file of
            weights, or a folder that Hugging Face's libraries wrote.
        like : str or Path, optional
            A run or recipe that states the architecture, for files that do not.
        model : Module, optional
            The architecture itself.
        ancestor : str or Path, optional
            The model from which all were fine-tuned.
        runtime : Runtime, optional
            Device and data folder; one CPU by default.

        Returns
        -------
        Members

        Raises
        ------
        NQMError
            If a member cannot be read or has another architecture than the first.
        """
        from neural.combine.sources import open_members

        return open_members(
            where, like=like, model=model, ancestor=ancestor, runtime=runtime
        ).members

    @overload
    def __getitem__(self, index: int) -> Member: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Member, ...]: ...

    def __getitem__(self, index: int | slice) -> Member | tuple[Member, ...]:
        return self._members[index]

    def __len__(self) -> int:
        return len(self._members)

    def chosen(self, indices: Sequence[int]) -> Members:
        """Some of the members, with the same architecture and ancestor.

        Parameters
        ----------
        indices : sequence of int

        Returns
        -------
        Members
        """
        return Members(self.model, [self._members[i] for i in indices], self.ancestor)

    def mapped(self, change: Callable[[State], State]) -> Members:
        """The same members with changed weights, which are computed once and held in memory.

        Parameters
        ----------
        change : callable
            Maps a state dict to another one of the same architecture.

        Returns
        -------
        Members

        Raises
        ------
        NQMError
            If the state dicts of all members do not fit into memory.
        """
        size = sum(value.numel() for value in self._like.values())
        check_size(f"members = {len(self)}", float(len(self)) * size, 4)

        def reading(index: int) -> Callable[[], State]:
            @cache
            def read() -> State:
                return change(self.state(index))

            return read

        made = [replace(member, read=reading(i)) for i, member in enumerate(self)]
        return Members(self.model, made, self.ancestor)

    # --- weights -----------------------------------------------------------------------------

    def state(self, index: int) -> State:
        """State dict of one member, in the types of the model.

        Parameters
        ----------
        index : int

        Returns
        -------
        dict of str to Tensor
            On the CPU.

        Raises
        ------
        NQMError
            If a name or shape does not fit the model, a type would lose digits, or a weight is not
            finite.
        """
        return self._checked(self._members[index])

    def states(self) -> Iterator[State]:
        """State dicts of all members, one after the other.

        Yields
        ------
        dict of str to Tensor
        """
        return (self._checked(member) for member in self._members)

    def stored_types(self) -> dict[str, torch.dtype]:
        """Types in which the members are stored.

        Returns
        -------
        dict of str to torch.dtype
            By the name of a tensor; the model's type where members differ.
        """
        found: dict[str, set[torch.dtype]] = {name: set() for name in self._like}
        for member in self._members:
            self._checked(member)
            for name, value in tied(member.read(), self._tied).items():
                found[name].add(value.dtype)
        like = {name: value.dtype for name, value in self._like.items()}
        return {name: next(iter(t)) if len(t) == 1 else like[name] for name, t in found.items()}

    def ancestor_state(self, rule: str) -> State:
        """State dict of the ancestor.

        Parameters
        ----------
        rule : str
            What needs it, for the message.

        Returns
        -------
        dict of str to Tensor

        Raises
        ------
        NQMError
            If there is none, or it does not fit the model.
        """
        if self.ancestor is None:
            raise NQMError(
                f"{rule} needs the model from which the members were fine-tuned; give ancestor"
            )
        return self._checked(self.ancestor)

    def key(self, index: int) -> str:
        """Content key of a member's weights.

        Parameters
        ----------
        index : int

        Returns
        -------
        str
        """
        name = self._members[index].name
        if name not in self._keys:
            self._keys[name] = state_key(self.state(index))
        return self._keys[name]

    def updated(self, state: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> State:
        """A state dict with other parameters, under all names of tied ones.

        Parameters
        ----------
        state : mapping of str to Tensor
            A state dict.
        changes : mapping of str to Tensor
            By the names of `weight_names`.

        Returns
        -------
        dict of str to Tensor
            In the types of `state`. Vectors of spectral normalisation are those of the new weights.
        """
        new = {**state, **{name: value.to(state[name].dtype) for name, value in changes.items()}}
        new |= {name: new[first] for name, first in self._tied.items()}
        return new | singular_vectors(self.model, new)

    def with_state(self, state: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the model with other weights.

        Parameters
        ----------
        state : mapping of str to Tensor

        Returns
        -------
        Module
            In evaluation mode.
        """
        made = duplicate(self.model)
        made.load_state_dict(state, strict=True)
        return made.eval()

    def _checked(self, member: Member) -> State:
        state, who = tied(member.read(), self._tied), f"member {member.name!r}"
        for name, like in self._like.items():
            if name not in state:
                raise NQMError(f"{who}: {name!r} is missing; all need one architecture")
            fault = _fault(state[name], like, parameter=name in self._parameters)
            if fault is not None:
                raise NQMError(f"{who}: {name!r} {fault}")
        if reason := untied(state, self._tied):
            raise NQMError(f"{who}: {reason}")
        extra = next((name for name in state if name not in self._like), None)
        if extra is not None:
            raise NQMError(f"{who} holds {extra!r}, which the model does not have")
        return {
            name: state[name].detach().to("cpu", like.dtype) for name, like in self._like.items()
        }

    # --- geometry ----------------------------------------------------------------------------

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the parameters; a tied weight comes once."""
        return tuple(name for name, _ in self.model.named_parameters())

    def flat(self, state: Mapping[str, Tensor]) -> Tensor:
        """The parameters of a state dict as one vector, in the order of `weight_names`.

        Parameters
        ----------
        state : mapping of str to Tensor

        Returns
        -------
        Tensor, shape (p,)
        """
        return torch.cat([state[name].flatten() for name in self.weight_names])

    def named(self, vector: Tensor) -> State:
        """The inverse of `flat`: parameters by name, in the types of the model.

        Parameters
        ----------
        vector : Tensor, shape (p,)

        Returns
        -------
        dict of str to Tensor
        """
        like = {name: self.model.get_parameter(name) for name in self.weight_names}
        parts = torch.split(vector, [one.numel() for one in like.values()])
        return {
            name: part.view(one.shape).to(one)
            for (name, one), part in zip(like.items(), parts, strict=True)
        }

    def offsets(self, origin: Mapping[str, Tensor]) -> Tensor:
        """Displacement of every member from given weights; all are held in memory at once.

        Parameters
        ----------
        origin : mapping of str to Tensor
            A state dict.

        Returns
        -------
        Tensor, shape (N, p)

        Raises
        ------
        NQMError
            If they do not fit into memory.
        """
        start = self.flat(origin)
        check_size(f"members = {len(self)}", float(len(self)) * len(start), start.element_size())
        rows = torch.empty(len(self), len(start), dtype=start.dtype)
        for row, state in zip(rows, self.states(), strict=True):
            torch.sub(self.flat(state), start, out=row)
        return rows

    def buffer_offsets(self, origin: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Displacement of every member's buffers of real numbers, such as running statistics.

        Parameters
        ----------
        origin : mapping of str to Tensor
            A state dict.

        Returns
        -------
        dict of str to Tensor, shape (N, ...)
            By the name of the buffer; without those that are equal in all members and the origin.
        """
        saved = self.model.state_dict().keys()
        names = [n for n, b in self.model.named_buffers() if n in saved and b.is_floating_point()]
        rows = [{n: state[n] - origin[n] for n in names} for state in self.states()]
        moved = {n: torch.stack([row[n] for row in rows]) for n in names}
        return {n: row for n, row in moved.items() if row.any()}

    def geometry(self) -> pd.DataFrame:
        """Where the members lie.

        Returns
        -------
        DataFrame
            One row a member: ``member``, ``norm`` (of its weights), ``distance`` (from the mean of
            all), ``cosine`` (least cosine between its displacement and another's, both measured
            from the ancestor or, without one, from the mean), ``from_ancestor`` (distance; NaN
            without an ancestor).
        """
        import pandas as pd

        from neural.combine.mean import mean_state

        mean = mean_state(self)
        offsets = self.offsets(mean).double()
        distance = offsets.norm(dim=1)
        moved, from_ancestor = offsets, torch.full((len(self),), math.nan)
        if self.ancestor is not None:
            start = self._checked(self.ancestor)
            moved = offsets + (self.flat(mean).double() - self.flat(start).double())
            from_ancestor = moved.norm(dim=1)
        cosines = (
            torch.nn.functional.normalize(moved, dim=1)
            @ torch.nn.functional.normalize(moved, dim=1).T
        )
        cosines.fill_diagonal_(math.inf)
        least = cosines.min(1).values if len(self) > 1 else torch.full((1,), math.nan)
        norms = [float(self.flat(state).double().norm()) for state in self.states()]
        return pd.DataFrame(
            {
                "member": [member.name for member in self],
                "norm": norms,
                "distance": distance.tolist(),
                "cosine": least.tolist(),
                "from_ancestor": from_ancestor.tolist(),
            }
        )

    @cached_property
    def epochs_total(self) -> float:
        """Epochs of training that all members took together; shared ones count once."""
        shared: dict[str, float] = {}
        for name, epochs in (member.trunk for member in self if member.trunk is not None):
            shared[name] = max(epochs, shared.get(name, 0.0))  # of a chain, up to its last member
        return sum(member.epochs for member in self) + sum(shared.values())


def state_key(state: Mapping[str, Tensor]) -> str:
    """Content key of a state dict.

    Parameters
    ----------
    state : mapping of str to Tensor

    Returns
    -------
    str
        32 hexadecimal digits; equal names, types and numbers share it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _returning(state: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: state


def check_weights(where: str, weights: Any, count: int) -> Tensor:
    """One weight for each member, summing to 1.

    Parameters
    ----------
    where : str
        What they are for, for the message.
    weights : array_like, shape (N,)
        May be negative (extrapolation).
    count : int
        N.

    Returns
    -------
    Tensor of float64, shape (N,)

    Raises
    ------
    NQMError
        If there are not N finite numbers whose sum is 1.
    """
    try:
        given = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise NQMError(f"{where}: weights must be numbers; got {weights!r:.60}") from None
    if given.shape != (count,):
        raise NQMError(
            f"{where}: weights must be {count} numbers, one a member; got shape "
            f"{tuple(given.shape)}"
        )
    if not bool(given.isfinite().all()) or abs(float(given.sum()) - 1.0) > 1e-6:
        raise NQMError(
            f"{where}: weights must be finite and sum to 1; got sum {float(given.sum()):g}"
        )
    return given
