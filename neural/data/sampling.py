"""Order and shares of an epoch, as pure functions of (seed, epoch): the root of exact resume."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nqm.errors import NQMError, check_integer, suggest

Sampling = Literal["shuffle", "replacement"]
SAMPLINGS = ("shuffle", "replacement")


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends only on `key`.

    Parameters
    ----------
    *key : int
        Non-negative integers, e.g. (seed, epoch, purpose). Keys that differ give independent
        streams (NumPy's `SeedSequence` mixes them).

    Returns
    -------
    Generator
    """
    # The length belongs to the key: SeedSequence takes (3,) and (3, 0) for the same.
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    # Drawn on the CPU whatever the device, so that a GPU sees the batches a CPU sees.
    return torch.Generator().manual_seed(int(state[0]))


def epoch_order(count: int, sampling: str, generator: torch.Generator) -> Tensor:
    """Indices of one epoch's examples: a permutation, or as many independent draws.

    Parameters
    ----------
    count : int
        Examples in the set.
    sampling : {"shuffle", "replacement"}
        Without or with replacement. Gradient noise is independent from step to step only with.
    generator : torch.Generator

    Returns
    -------
    Tensor
        (count,) int64.
    """
    if sampling == "shuffle":
        return torch.randperm(count, generator=generator)
    return torch.randint(count, (count,), generator=generator)


class EpochPlan:
    """Which positions of an epoch make up each batch, and this rank's share of it.

    Parameters
    ----------
    count : int
        Examples in an epoch.
    batch_size : int
        Examples of a global batch, over all ranks.
    drop_last : bool
        Leave out an incomplete last batch.
    rank, world : int
        Rank r of w takes the r-th of w equal parts of every global batch.

    Raises
    ------
    NQMError
        If a number is out of range, there is no batch at all, or some rank would get none of
        the last batch.
    """

    def __init__(
        self, count: int, batch_size: int, *, drop_last: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        check_integer("world", world, 1)
        check_integer("rank", rank, 0)
        if rank >= world:
            raise NQMError(f"rank must be below world = {world}; got {rank}")
        if batch_size % world:
            raise NQMError(
                f"batch_size must be a multiple of world = {world}, so that all ranks have as "
                f"many examples; got {batch_size}"
            )
        self.count, self.batch_size, self.rank, self.world = count, batch_size, rank, world
        self.batches = count // batch_size if drop_last else -(-count // batch_size)
        if self.batches == 0:
            raise NQMError(
                f"batch_size must be at most the {count} examples there are; got {batch_size}"
            )
        left_over = count - (self.batches - 1) * batch_size
        if left_over < world:
            raise NQMError(
                f"the last batch has {left_over} examples for {world} ranks; "
                "set drop_last=True or change batch_size"
            )

    def slices(self, start: int = 0) -> list[slice]:
        """Positions in the epoch of this rank's share of each batch.

        Parameters
        ----------
        start : int
            Number of the first batch.

        Returns
        -------
        list of slice
            One slice per batch, from batch `start` on.

        Raises
        ------
        NQMError
            If `start` exceeds the number of batches.
        """
        check_integer("start", start, 0)
        if start > self.batches:
            raise NQMError(
                f"start must be at most the {self.batches} batches of an epoch; got {start}"
            )
        parts = []
        for batch in range(start, self.batches):
            low = batch * self.batch_size
            size = min(self.batch_size, self.count - low)
            first, last = (size * r // self.world for r in (self.rank, self.rank + 1))
            parts.append(slice(low + first, low + last))
        return parts

    def weight(self, batch: int) -> float:
        """Factor of the mean loss of this rank's share of a batch.

        The mean over ranks of the weighted losses is then the mean over the batch's examples.

        Parameters
        ----------
        batch : int
            Number of the batch in the epoch.

        Returns
        -------
        float
            World times the share's part of the batch: 1 unless the batch does not divide.
        """
        size = min(self.batch_size, self.count - batch * self.batch_size)
        first, last = (size * r // self.world for r in (self.rank, self.rank + 1))
        return self.world * (last - first) / size


def check_sampling(sampling: str, known: tuple[str, ...] = SAMPLINGS) -> None:
    """Check the name of a way of sampling.

    Parameters
    ----------
    sampling : str
    known : tuple of str
        Permitted names.

    Raises
    ------
    NQMError
        If the name is not among `known`.
    """
    if sampling not in known:
        raise NQMError(f"unknown sampling {sampling!r}{suggest(sampling, known)}")
