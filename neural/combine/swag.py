"""SWAG: models drawn from a Gaussian that is fitted to a run's snapshots (Maddox et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neural.combine.data import Parts
from neural.combine.mean import mean_state
from neural.combine.members import Member, Members, State
from neural.combine.repair import Statistics, has_statistics
from neural.data.sampling import keyed_generator
from nqm.errors import NQMError, check_integer, check_number


@dataclass(frozen=True)
class Moments:
    """First and second moments of members' weights.

    Attributes
    ----------
    mean, variance : Tensor of float64, shape (p,)
        The variance is ``mean of squares - mean^2``, at least 0.
    deviations : Tensor of float64, shape (R, p)
        Of the last R members from the mean of all up to theirs, as published.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor


@dataclass(frozen=True)
class SWAG:
    """Draws of ``N(mean, scale (diag(variance) + D'D / (R - 1)))``, D the deviations.

    Attributes
    ----------
    draws : int
        Number of models.
    rank : int
        R, the largest number of deviations.
    scale : float
        1/2 in the paper.
    seed : int
        A draw depends on it and on its own number alone.
    """

    draws: int = 30
    rank: int = 20
    scale: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("SWAG.draws", self.draws, 1)
        check_integer("SWAG.rank", self.rank, 2)
        check_number("SWAG.scale", self.scale, low=0.0)
        check_integer("SWAG.seed", self.seed, 0)

    def moments(self, members: Members) -> Moments:
        """Fit the Gaussian, one member in memory at a time.

        Parameters
        ----------
        members : Members
            Snapshots of one run, in the order of time; at least two.

        Returns
        -------
        Moments

        Raises
        ------
        NQMError
            If there is one member only.
        """
        if len(members) < 2:
            raise NQMError(f"SWAG needs at least two snapshots; got {len(members)}")
        mean = squares = torch.zeros((), dtype=torch.float64)
        deviations: list[Tensor] = []
        for number, state in enumerate(members.states(), start=1):
            flat = members.flat(state).double()
            mean = mean + (flat - mean) / number
            squares = squares + (flat**2 - squares) / number
            deviations = [*deviations, flat - mean][-self.rank :]
        return Moments(mean, (squares - mean**2).clamp(min=0.0), torch.stack(deviations))

    def weights(self, moments: Moments, index: int) -> Tensor:
        """Weights of one draw.

        Parameters
        ----------
        moments : Moments
        index : int
            Number of the draw, from 0.

        Returns
        -------
        Tensor of float64, shape (p,)
        """
        generator = keyed_generator(self.seed, index)
        rank, size = moments.deviations.shape
        own = torch.randn(size, generator=generator, dtype=torch.float64)
        common = torch.randn(rank, generator=generator, dtype=torch.float64)
        move = moments.variance.sqrt() * own
        move += common @ moments.deviations / math.sqrt(rank - 1)
        return moments.mean + math.sqrt(self.scale) * move

    def members(self, base: Members, parts: Parts) -> Members:
        """The draws, as members that are drawn again whenever their weights are read.

        Parameters
        ----------
        base : Members
            Snapshots of one run.
        parts : Parts
            Training data, for the BatchNorm statistics of every draw.

        Returns
        -------
        Members
            Of the same architecture.

        Raises
        ------
        NQMError
            If there is one snapshot only, or BatchNorm without training data.
        """
        if has_statistics(base.model):
            parts.required("train", "SWAG")
        moments, center = self.moments(base), mean_state(base)
        trunk = ("+".join(member.name for member in base), base.epochs_total)
        statistics: dict[int, State] = {}

        def drawn(index: int) -> Callable[[], State]:
            def read() -> State:
                state = base.updated(center, base.named(self.weights(moments, index)))
                if has_statistics(base.model):
                    if index not in statistics:
                        model = base.with_state(state)
                        Statistics()(model, parts, base, None)
                        names = {name for name, _ in model.named_buffers()}
                        statistics[index] = {
                            n: v.clone() for n, v in model.state_dict().items() if n in names
                        }
                    state |= statistics[index]
                return state

            return read

        found = [
            Member(f"SWAG {index}", drawn(index), 0.0, trunk, base[0].source)
            for index in range(self.draws)
        ]
        return Members(base.model, found, base.ancestor)
