"""Text as bytes: what is loaded, the training stream, and the windows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neural.data.sampling import EpochPlan, check_sampling, epoch_order, keyed_generator
from nqm.errors import NQMError, check_integer


@dataclass(frozen=True)
class TextData:
    """A text by the name it is loaded under, one symbol to a byte.

    Attributes
    ----------
    name, label : str
        For the command line, and for tables and figures.
    train, valid, test : Tensor
        (T,) uint8 symbols, in order.
    symbols : int
        Size of the alphabet: 256, or the number of those that occur after `compact`.
    """

    name: str
    label: str
    train: Tensor
    valid: Tensor
    test: Tensor
    symbols: int = 256

    def compact(self) -> TextData:
        """Renumber the symbols: keep only bytes that occur in train, valid or test, in byte order.

        enwik8 has 205 such bytes; published models count their parameters with this alphabet.

        Returns
        -------
        TextData
        """
        parts = (self.train, self.valid, self.test)
        # Counting, since torch.unique sorts: 5 s for enwik8.
        counts = [torch.bincount(part, minlength=256) for part in parts]
        occurring = torch.stack(counts).sum(0).nonzero().flatten()
        number = torch.zeros(256, dtype=torch.uint8)
        number[occurring] = torch.arange(len(occurring), dtype=torch.uint8)
        train, valid, test = (number[part.int()] for part in parts)
        return replace(self, train=train, valid=valid, test=test, symbols=len(occurring))


class TextBatches:
    """The training stream of a text: windows of `length` symbols and the symbols after each.

    Parameters
    ----------
    tokens : Tensor
        (T,) uint8; moved to `device` once.
    batch_size : int
        Windows of a global batch, over all ranks.
    length : int
        Symbols of a window.
    seed : int
    sampling : {"shuffle", "stream", "replacement"}
        "shuffle": the text is cut into windows from an offset that is new each epoch, and an
        epoch is a permutation of them. "replacement": windows start anywhere, independently.
        "stream": `batch_size` readers start at equal distances and read on from batch to batch,
        so that a recurrent state can be carried over; the epoch's offset is their start.
    drop_last : bool
        Leave out an incomplete last batch; a stream never has one.
    device : torch.device or str
    rank, world : int
        Rank r of w gets the r-th of w parts of every global batch.

    Raises
    ------
    NQMError
        For an unknown name, a number out of range or a text that is too short.
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        tokens: Tensor,
        batch_size: int,
        length: int,
        *,
        seed: int = 0,
        sampling: str = "shuffle",
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_sampling(sampling, ("shuffle", "stream", "replacement"))
        check_integer("batch_size", batch_size, 1)
        check_integer("length", length, 1)
        check_integer("seed", seed, 0)
        # Whatever the offset in [0, length), so many symbols with a successor remain.
        usable = len(tokens) - length
        windows = usable // length
        if sampling == "stream":
            self.reader = usable // batch_size
            windows = self.reader // length * batch_size
        if windows < 1:
            needed = length * (batch_size + 1 if sampling == "stream" else 2)
            raise NQMError(
                f"the text must have at least {needed} symbols for length {length} and batch_size "
                f"{batch_size}; got {len(tokens)}"
            )
        self.plan = EpochPlan(windows, batch_size, drop_last=drop_last, rank=rank, world=world)
        self.tokens = tokens.to(device)
        self.length, self.sampling, self.seed = length, sampling, seed

    def __len__(self) -> int:
        """Batches of one epoch."""
        return self.plan.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of an epoch, from batch `start` on.

        A run that resumes at batch `start` gets the same batches, bit for bit, as one without a
        break.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start : int
            Number of batches already done.

        Returns
        -------
        iterator of (Tensor, Tensor)
            (B, length) int64 symbols, and the symbol after each.

        Raises
        ------
        NQMError
            If `epoch` is not a whole number from 0 on.
        """
        check_integer("epoch", epoch, 0)
        return self._batches(epoch, self.plan.slices(start))

    def _batches(self, epoch: int, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        starts = self._starts(keyed_generator(self.seed, epoch)).to(self.tokens.device)
        within = torch.arange(self.length + 1, device=self.tokens.device)
        for part in parts:
            windows = self.tokens[starts[part][:, None] + within].long()
            yield windows[:, :-1], windows[:, 1:]

    def _starts(self, generator: torch.Generator) -> Tensor:
        """First symbol of every window of an epoch, in the order in which they are read."""
        windows = self.plan.count
        if self.sampling == "replacement":
            return torch.randint(len(self.tokens) - self.length, (windows,), generator=generator)
        offset = torch.randint(self.length, (), generator=generator)
        if self.sampling == "stream":
            steps = torch.arange(self.plan.batches) * self.length
            readers = torch.arange(self.plan.batch_size) * self.reader
            return (offset + steps[:, None] + readers).flatten()
        return offset + epoch_order(windows, "shuffle", generator) * self.length


def evaluation_windows(
    tokens: Tensor, batch_size: int, length: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows in which every symbol of the text is to be predicted exactly once.

    `batch_size` readers each read an equal stretch from its start to its end, so a recurrent state
    may be carried from one batch to the next while the number of rows stays the same. The fewer
    than `batch_size` symbols that are left over follow as batches of one row. The very first
    symbol is predicted from symbol 0.

    Parameters
    ----------
    tokens : Tensor
        (T,) uint8.
    batch_size : int
        Readers.
    length : int
        Symbols of a window; the last one of a stretch may be shorter.
    device : torch.device or str

    Yields
    ------
    (Tensor, Tensor)
        (B, L) int64 symbols seen, and the symbol after each. Sums over all batches, divided by T,
        are means over the text: batches differ in size.
    """
    check_integer("batch_size", batch_size, 1)
    check_integer("length", length, 1)
    seen = torch.cat([tokens.new_zeros(1), tokens[:-1]])
    stretch = len(tokens) // batch_size
    whole = stretch * batch_size
    for low, high, rows in ((0, whole, batch_size), (whole, len(tokens), 1)):
        if high == low:
            continue
        x, y = (part[low:high].view(rows, -1) for part in (seen, tokens))
        for j in range(0, x.shape[1], length):
            window = (part[:, j : j + length].to(device).long() for part in (x, y))
            yield next(window), next(window)
