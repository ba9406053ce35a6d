"""Text streams and evaluation windows on texts whose every symbol can be followed."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from neural.data import TextBatches, TextData, evaluation_windows
from nqm.errors import NQMError


def random_text(length: int) -> Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(0)).byte()


def counting(length: int) -> Tensor:
    """A text in which a symbol tells its position (below 256)."""
    return torch.arange(length).byte()


SAMPLINGS = pytest.mark.parametrize("sampling", ["shuffle", "stream", "replacement"])


@SAMPLINGS
def test_targets_are_the_next_symbols(sampling):
    batches = TextBatches(counting(250), 4, 7, sampling=sampling)
    seen = list(batches.epoch(3))
    assert len(seen) == len(batches) > 1
    for x, y in seen:
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape
        assert x.shape[1] == 7
        assert torch.equal(y, x + 1)
        assert torch.equal(x, x[:, :1] + torch.arange(7))


@given(st.integers(2, 250), st.integers(1, 9), st.integers(1, 8), st.integers(0, 4))
def test_shuffled_windows_tile_the_text_from_a_new_offset(total, length, batch_size, epoch):
    assume(total >= 2 * length)
    batches = TextBatches(counting(total), batch_size, length)
    starts = sorted(int(x) for part, _ in batches.epoch(epoch) for x in part[:, 0])
    assert starts == list(range(starts[0], starts[0] + len(starts) * length, length))
    assert 0 <= starts[0] < length
    # at most an offset and less than two windows are left out
    assert len(starts) >= (total - 1) // length - 1


def test_offsets_reach_every_place_and_epochs_differ():
    batches = TextBatches(counting(200), 8, 5)
    epochs = [torch.cat([x[:, 0] for x, _ in batches.epoch(e)]) for e in range(60)]
    assert {int(starts.min()) for starts in epochs} == set(range(5))
    assert len({tuple(starts.tolist()) for starts in epochs}) == 60


def test_stream_reads_on_from_batch_to_batch():
    text = random_text(1000)
    batches = list(TextBatches(text, 3, 10, sampling="stream").epoch(0))
    for (_, y), (x, _) in itertools.pairwise(batches):
        assert torch.equal(x[:, 0], y[:, -1])  # the next symbol is where the last one ended
    read = torch.cat([x for x, _ in batches], dim=1)
    pieces = text.long().unfold(0, read.shape[1], 1)
    assert all(any(torch.equal(row, piece) for piece in pieces) for row in read)
    assert read.numel() >= 0.9 * 1000


@SAMPLINGS
@pytest.mark.parametrize("start", [0, 2, 5])
def test_resume_is_bit_for_bit(sampling, start):
    def batches() -> TextBatches:
        return TextBatches(random_text(700), 8, 9, sampling=sampling, seed=3)

    whole, rest = list(batches().epoch(1))[start:], list(batches().epoch(1, start=start))
    assert len(whole) == len(rest) > 0
    for (x, y), (x2, y2) in zip(whole, rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@SAMPLINGS
def test_ranks_together_see_the_global_batch(sampling):
    text = random_text(500)
    whole = TextBatches(text, 6, 5, sampling=sampling).epoch(0)
    ranks = [TextBatches(text, 6, 5, sampling=sampling, rank=r, world=2).epoch(0) for r in (0, 1)]
    for (x, _), (a, _), (b, _) in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([a, b]), x)


@given(st.integers(1, 300), st.integers(1, 7), st.integers(1, 40))
def test_evaluation_asks_for_every_symbol_exactly_once(total, batch_size, length):
    text = counting(total) if total <= 256 else random_text(total)
    windows = list(evaluation_windows(text, batch_size, length))
    assert sum(y.numel() for _, y in windows) == total
    assert all(x.shape == y.shape and x.shape[1] <= length for x, y in windows)
    rows = [y for _, y in windows if len(y) == batch_size]
    if rows:  # each row reads its stretch from start to end
        stretches = text[: total - total % batch_size].view(batch_size, -1).long()
        assert torch.equal(torch.cat(rows, dim=1), stretches)
    if total <= 256:
        targets = torch.cat([y.flatten() for _, y in windows])
        assert sorted(targets.tolist()) == list(range(total))
        for x, y in windows:  # the symbol before, and 0 before the first
            assert torch.equal(x, (y - 1).clamp(min=0))


def test_the_first_symbol_is_predicted_from_symbol_0():
    x, y = next(evaluation_windows(torch.tensor([7, 8, 9]).byte(), 1, 2))
    assert (x.tolist(), y.tolist()) == ([[0, 7]], [[7, 8]])


def test_compact_numbers_the_bytes_that_occur():
    parts = [torch.tensor(list(text.encode()), dtype=torch.uint8) for text in ("abca", "d", "zb")]
    data = TextData("t", "T", *parts).compact()
    assert data.symbols == 5
    assert data.train.tolist() == [0, 1, 2, 0]
    assert data.valid.tolist() == [3]
    assert data.test.tolist() == [4, 1]
    assert data.compact().test.equal(data.test)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampling": "strem"}, "unknown sampling 'strem'; did you mean 'stream'"),
        ({"length": 0}, "length must be an integer >= 1"),
        ({"length": 51}, "at least 102 symbols for length 51 and batch_size 4; got 100"),
        ({"length": 25, "sampling": "stream"}, "at least 125 symbols"),
        ({"seed": -2}, "seed must be"),
    ],
)
def test_mistakes_are_named(options, says):
    with pytest.raises(NQMError, match=says):
        TextBatches(random_text(100), 4, **{"length": 5, **options})
    if "at least" in says:  # and the number named is enough
        enough = int(says.split()[2])
        assert len(TextBatches(random_text(enough), 4, **{"length": 5, **options})) >= 1
        with pytest.raises(NQMError):
            TextBatches(random_text(enough - 1), 4, **{"length": 5, **options})
