"""Put the hidden units of one network into the order of another, before weights are averaged.

Two networks trained from different starts can be the same function with hidden units in another
order. Their mean is then a worse network than either; the mean after alignment need not be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from neural.combine.data import Parts
from neural.combine.members import Members
from neural.combine.permutations import (
    CONVOLUTIONS,
    Axis,
    Ints,
    Permutations,
    check_state,
    permutations_of,
)
from neural.evaluate.predict import Batches, evaluating
from neural.late_phase.duplicate import duplicate
from nqm.errors import NQMError, check_integer

State = Mapping[str, Tensor]
Floats = NDArray[np.float64]
#: Gains below this share of the largest possible objective are rounding.
ROUNDING = 1e-12


class Align(ABC):
    """A rule that orders the hidden units of one network like those of another.

    Attributes
    ----------
    name : str
        In tables and options. A class attribute.
    needs_data : bool
        Whether batches must be given. A class attribute.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, model: nn.Module, reference: State, state: State, batches: Batches | None = None
    ) -> dict[str, Tensor]:
        """State dict of the same function, with units in the order of the reference.

        Parameters
        ----------
        model : Module
            The architecture; its own weights do not matter, and it does not change.
        reference, state : mapping of str to Tensor
            State dicts of `model`. They do not change.
        batches : iterable of (inputs, targets), optional
            Data. Targets are not used.

        Returns
        -------
        dict of str to Tensor
            The numbers of `state`, bit for bit, in another order; with biases and buffers.

        Raises
        ------
        NQMError
            If the model's hidden units cannot be permuted (`permutations_of`), or a state dict is
            not the model's.
        """


@dataclass(frozen=True)
class Identity(Align):
    """No alignment."""

    name: ClassVar[str] = "none"

    def __call__(
        self, model: nn.Module, reference: State, state: State, batches: Batches | None = None
    ) -> dict[str, Tensor]:
        """`state` as it is; see `Align`."""
        return dict(state)


@dataclass(frozen=True)
class WeightMatching(Align):
    """The permutation with the smallest distance between the weights (Ainsworth et al. 2022).

    Coordinate descent: for one group of units after the other, the best permutation with all others
    held is a linear assignment, solved exactly; until no group gains. It is run from the order as
    it is, and from an order found layer by layer from the input; the smaller distance counts. Which
    of several local minima is found depends on the order of the groups.

    Attributes
    ----------
    seed : int
        Of the order in which groups are visited.

    Notes
    -----
    The distance is that of all parameters; buffers follow. A permuted copy of the reference whose
    units have distinct weights is recovered exactly: the order layer by layer finds it.

    A permutation must respect the groups of GroupNorm: units change places within their group, and
    whole groups do where every layer has the same ones; best for both by an assignment of
    assignments.

    References
    ----------
    Ainsworth, Hayase & Srinivasa (2022). Git Re-Basin: merging models modulo permutation
    symmetries. arXiv 2209.04836, algorithm 1.
    """

    name: ClassVar[str] = "weights"

    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("WeightMatching.seed", self.seed, 0)

    def __call__(
        self, model: nn.Module, reference: State, state: State, batches: Batches | None = None
    ) -> dict[str, Tensor]:
        """See `Align`; `batches` are not used."""
        permutations = permutations_of(model)
        _check_states(model, reference, state)
        pair = _Pair(permutations, *_parameters(model, permutations, reference, state))
        found: list[tuple[float, Ints]] = []
        for start in (pair.layer_by_layer(), permutations.identity()):
            source = pair.descend(start, np.random.default_rng(self.seed))
            found.append((pair.product(source), source))
        (best, source), (other, alternative) = found
        if other > best + pair.rounding:
            source = alternative
        return permutations.apply(state, source)


@dataclass(frozen=True)
class ActivationMatching(Align):
    """The permutation with the largest correlation between hidden activations.

    For every group of units the summed correlation, over the inputs of the layers that read them,
    is made as large as it can be: one linear assignment for each (Li et al. 2016; Ainsworth et al.
    2022, section 3.1). A unit that is constant on the data has correlation 0 with all others.
    """

    name: ClassVar[str] = "activations"
    needs_data: ClassVar[bool] = True

    def __call__(
        self, model: nn.Module, reference: State, state: State, batches: Batches | None = None
    ) -> dict[str, Tensor]:
        """See `Align`; `batches` are needed, a few hundred examples do.

        Raises
        ------
        NQMError
            Also if there is no batch.
        """
        if batches is None:
            raise NQMError(
                "align: activations are matched on data, and none is given; give batches, or align "
                "by 'weights'"
            )
        permutations = permutations_of(model)
        _check_states(model, reference, state)
        readers = [axis for axis in permutations.axes if axis.reads is not None]
        moments = _moments(model, (reference, state), readers, batches)
        source = permutations.identity()
        for group in permutations.groups:
            gain = np.zeros((group.size, group.size))
            for axis, moment in zip(readers, moments, strict=True):
                places = _places(permutations.size, axis, group)
                if places is not None:
                    gain += moment.correlation()[np.ix_(places, places)]
            source[group.ravel()] = group.ravel()[assign(gain, len(group))]
        return permutations.apply(state, source)


#: Every alignment by name.
ALIGNS: Mapping[str, type[Align]] = MappingProxyType(
    {rule.name: rule for rule in (Identity, WeightMatching, ActivationMatching)}
)


def aligned(members: Members, align: Align, parts: Parts) -> Members:
    """Members whose hidden units are in the order of the first one's.

    Parameters
    ----------
    members : Members
    align : Align
    parts : Parts
        Needs `train` if the rule needs data.

    Returns
    -------
    Members
        Each computes what the member computed. They are held in memory.

    Raises
    ------
    NQMError
        If the units cannot be permuted, or data are missing.
    """
    if isinstance(align, Identity):
        return members
    train = parts.required("train", f"align = {align.name!r}") if align.needs_data else None
    permutations_of(members.model)  # refused before any member is read
    reference = members.state(0)

    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return align(members.model, reference, state, None if train is None else train())

    return members.mapped(change)


def assign(gain: Floats, cells: int = 1) -> Ints:
    """Best assignment of sources to places, exactly.

    Parameters
    ----------
    gain : ndarray, shape (n, n)
        ``gain[i, j]``: what is gained if source j takes place i.
    cells : int
        Equal stretches of the places: sources of one cell stay in one cell.

    Returns
    -------
    ndarray of int, shape (n,)
        Source of every place.
    """
    if cells == 1:
        return np.asarray(linear_sum_assignment(gain, maximize=True)[1], dtype=np.int64)
    size = len(gain) // cells
    blocks = gain.reshape(cells, size, cells, size).swapaxes(1, 2)
    # Within a pair of cells the best assignment does not depend on the other pairs.
    inner = [[assign(blocks[a, b]) for b in range(cells)] for a in range(cells)]
    rows = np.arange(size)
    outer = assign(
        np.array(
            [[blocks[a, b][rows, inner[a][b]].sum() for b in range(cells)] for a in range(cells)]
        )
    )
    return np.concatenate([b * size + inner[a][b] for a, b in enumerate(outer)])


def _check_states(model: nn.Module, *states: State) -> None:
    """Raise NQMError unless both are state dicts of the model, of finite parameters."""
    for whose, state in zip(("the reference", "the state"), states, strict=True):
        check_state("align", model, state, whose)
        for name, _ in model.named_parameters():
            if not state[name].isfinite().all():
                raise NQMError(f"align: {name!r} of {whose} holds numbers that are not finite")


def _parameters(
    model: nn.Module, permutations: Permutations, reference: State, state: State
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters with units, in double precision and real."""
    used = {axis.tensor for axis in permutations.axes}
    names = [name for name, _ in model.named_parameters() if name in used]
    real = [
        {name: torch.view_as_real(one[name]) if one[name].is_complex() else one[name]
         for name in names}
        for one in (reference, state)
    ]  # fmt: skip
    first, second = (
        {name: one[name].detach().to(real[0][name].device, torch.float64) for name in names}
        for one in real
    )
    return first, second


def _places(size: int, axis: Axis, group: Ints) -> Ints | None:
    """Channels of an axis where the units of a group are; None if they are not on it."""
    place = np.full(size, -1)
    place[axis.units] = np.arange(len(axis.units))
    places: Ints = place[group.ravel()]
    return places if (places >= 0).all() else None


@dataclass(frozen=True)
class _Pair:
    """Parameters of the reference and of the state, and their inner product under permutations."""

    permutations: Permutations
    reference: Mapping[str, Tensor]
    state: Mapping[str, Tensor]

    @cached_property
    def rounding(self) -> float:
        """A difference of inner products that means nothing."""
        norms = [
            sum(float(t.square().sum()) for t in one.values())
            for one in (self.reference, self.state)
        ]
        return ROUNDING * float(np.sqrt(norms[0] * norms[1]))

    def product(self, source: Ints) -> float:
        """Inner product with the permuted state: the larger, the nearer."""
        moved = self.permutations.apply(self.state, source)
        return sum(float((self.reference[n] * moved[n]).sum()) for n in moved)

    def gain(self, axes: Iterable[tuple[Axis, Ints]], source: Ints) -> Floats:
        """What each assignment of a group's units adds to the product, other axes permuted."""
        total: Tensor | float = 0.0
        for axis, places in axes:
            name, at = axis.tensor, torch.from_numpy(places)
            moved = self.permutations.apply({name: self.state[name]}, source, fixed=axis)[name]
            rows = [
                one.movedim(axis.axis, 0).reshape(len(axis.units), -1)[at.to(one.device)]
                for one in (self.reference[name], moved)
            ]
            total = total + rows[0] @ rows[1].T
        return np.asarray(total.cpu() if isinstance(total, Tensor) else total, dtype=np.float64)

    def axes_of(self, group: Ints) -> list[tuple[Axis, Ints]]:
        """Axes of parameters on which a group is, and where."""
        found = []
        for axis in self.permutations.axes:
            places = _places(self.permutations.size, axis, group)
            if places is not None and axis.tensor in self.reference:
                found.append((axis, places))
        return found

    def layer_by_layer(self) -> Ints:
        """A start: each group by those weights alone whose other units are in order already."""
        source = self.permutations.identity()
        ordered = np.ones(self.permutations.size, dtype=bool)
        for group in self.permutations.groups:
            ordered[group] = False
        for group in self.permutations.groups:
            settled = [
                (axis, places)
                for axis, places in self.axes_of(group)
                if all(
                    ordered[other.units].all()
                    for other in self.permutations.axes
                    if other.tensor == axis.tensor and other is not axis
                )
            ]
            if settled:
                units = group.ravel()
                source[units] = units[assign(self.gain(settled, source), len(group))]
            ordered[group] = True
        return source

    def descend(self, source: Ints, rng: np.random.Generator) -> Ints:
        """Improve one group after the other until none gains."""
        source = source.copy()
        groups = [(group, self.axes_of(group)) for group in self.permutations.groups]
        improved = True
        while improved:
            improved = False
            for k in rng.permutation(len(groups)):
                group, axes = groups[k]
                units = group.ravel()
                gain = self.gain(axes, source)
                if gain.ndim != 2:  # no parameter: nothing to match
                    continue
                candidate = source.copy()
                candidate[units] = units[assign(gain, len(group))]
                if (candidate == source).all():
                    continue
                # With a group on both axes of a weight the product is quadratic in its permutation.
                if self._of(axes, candidate) > self._of(axes, source) + self.rounding:
                    source, improved = candidate, True
        return source

    def _of(self, axes: Iterable[tuple[Axis, Ints]], source: Ints) -> float:
        names = {axis.tensor for axis, _ in axes}
        part = {name: self.state[name] for name in names}
        return _Pair(self.permutations, self.reference, part).product(source)


class _Moments:
    """Running sums of two activations, and their correlation."""

    def __init__(self) -> None:
        self.rows = 0
        self.origin: list[Tensor] = []

    def update(self, pair: list[Tensor]) -> None:
        """Take in activations of both networks, shape (rows, channels) each."""
        if not self.origin:
            # Sums of squares about a typical value lose no digits to a large mean.
            self.origin = [one.mean(0) for one in pair]
            self.sums = [torch.zeros_like(one) for one in self.origin]
            self.squares = [torch.zeros_like(one) for one in self.origin]
            self.products = torch.zeros(pair[0].shape[1], pair[1].shape[1]).to(pair[0])
        x, y = (one - start for one, start in zip(pair, self.origin, strict=True))
        self.rows += len(x)
        self.products += x.T @ y
        for k, one in enumerate((x, y)):
            self.sums[k] += one.sum(0)
            self.squares[k] += one.square().sum(0)

    def correlation(self) -> Floats:
        """Correlation of every channel of the first with every one of the second network."""
        n = self.rows
        covariance = self.products / n - torch.outer(self.sums[0], self.sums[1]) / n**2
        sd = [
            (square / n - (total / n).square()).clamp(min=0).sqrt()
            for square, total in zip(self.squares, self.sums, strict=True)
        ]
        # What varies by no more than rounding does not vary.
        inverse = [
            torch.where(one > ROUNDING * start.abs(), 1 / one, 0.0)
            for one, start in zip(sd, self.origin, strict=True)
        ]
        value: Floats = (covariance * torch.outer(*inverse)).cpu().numpy()
        if not np.isfinite(value).all():
            raise NQMError("align: hidden activations on these batches are not finite")
        return value


def _moments(
    model: nn.Module, states: tuple[State, State], readers: list[Axis], batches: Batches
) -> list[_Moments]:
    """Moments of the inputs of layers, under both sets of weights."""
    inputs: list[dict[str, Tensor]] = [{}, {}]
    copies = []
    for seen, state in zip(inputs, states, strict=True):
        copy = duplicate(model)
        copy.load_state_dict(dict(state), strict=True)
        for axis in readers:
            layer = copy.get_submodule(str(axis.reads))
            layer.register_forward_pre_hook(_remember(seen, str(axis.reads)))
        copies.append(copy)
    moments = [_Moments() for _ in readers]
    device = next(iter(copies[0].parameters())).device if readers else None
    some = False
    for x, _ in batches:
        some = True
        for copy in copies:
            with evaluating(copy):
                copy(x.to(device))
        for axis, moment in zip(readers, moments, strict=True):
            layer = model.get_submodule(str(axis.reads))
            moment.update([_rows(seen[str(axis.reads)], layer, axis) for seen in inputs])
    if not some:
        raise NQMError("align: there is no batch; an iterator is empty after its first use")
    return moments


def _remember(seen: dict[str, Tensor], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[path] = args[0]

    return hook


def _rows(x: Tensor, layer: nn.Module, axis: Axis) -> Tensor:
    """Activations as (examples and positions, channels), in double precision."""
    if type(layer) in CONVOLUTIONS:
        x = x.movedim(1, -1)
    elif axis.block > 1:
        x = x.reshape(-1, len(axis.units), axis.block).movedim(-1, -2)
    return x.reshape(-1, len(axis.units)).detach().double()
