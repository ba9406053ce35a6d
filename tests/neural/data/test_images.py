"""Augmentation against explicit slices and its laws; streams: order, shares, exact resume."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from neural.data import (
    ImageBatches,
    ImageData,
    Images,
    augment_batch,
    evaluation_batches,
)
from neural.data.augment import Draws, crop_and_flip, cut_out, draw
from neural.data.sampling import EpochPlan, keyed_generator
from nqm.errors import NQMError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
#: Least p-value of a test of a distribution; seeds are fixed, so it is never met by chance twice.
LEAST_P = 1e-3


def some_images(count: int, side: int = 8, classes: int = 5) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes)


def stream(images: Images, batch_size: int = 16, **options: object) -> ImageBatches:
    defaults: dict[str, object] = {
        "mean": MEAN, "std": STD, "augment": ["crop", "flip"], "cutout": 3, "seed": 5,
    }  # fmt: skip
    return ImageBatches(images, batch_size, **{**defaults, **options})  # type: ignore[arg-type]


def numbered(count: int) -> Images:
    """Images whose label is their position."""
    return Images(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


def labels_of(batches: ImageBatches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in batches.epoch(epoch, start)]


def plain(images: Images, batch_size: int, **options: object) -> ImageBatches:
    return ImageBatches(images, batch_size, mean=[0.0], std=[1.0], **options)  # type: ignore[arg-type]


# -- augmentation


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_crop_is_a_slice_of_the_padded_image(padding):
    pixels = some_images(40, side=9).pixels[:, :, :, :7]  # height and width differ
    draws = draw(torch.Generator().manual_seed(0), 40, (9, 7), ["crop", "flip"], padding=padding)
    out = crop_and_flip(pixels, draws)
    for i, (top, left, mirrored, *_) in enumerate(draws.table.T.tolist()):
        padded = np.pad(pixels[i].numpy(), ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, top : top + 9, left : left + 7]
        np.testing.assert_array_equal(
            out[i].numpy(), expected[:, :, ::-1] if mirrored else expected
        )


def test_flip_is_an_involution_and_without_names_nothing_moves():
    pixels = some_images(10).pixels
    table = torch.zeros(5, 10, dtype=torch.int64)
    table[2] = torch.arange(10) % 2
    draws = Draws(table, padding=0, cutout=0, moves=True)
    once = crop_and_flip(pixels, draws)
    assert torch.equal(once[1], pixels[1].flip(-1))
    assert torch.equal(once[0], pixels[0])
    assert torch.equal(crop_and_flip(once, draws), pixels)
    assert not draw(torch.Generator(), 10, (8, 8)).table.any()


def test_flips_are_fair_coins_and_offsets_and_holes_are_uniform():
    count = 40_500
    draws = draw(torch.Generator().manual_seed(3), count, (32, 30), ["crop", "flip"], cutout=4)
    top, left, mirrored, row, column = draws.table.numpy()
    assert stats.binomtest(int(mirrored.sum()), count, 0.5).pvalue > LEAST_P
    cells = np.bincount(9 * top + left, minlength=81)  # all 81 pairs, 500 expected in each
    assert len(cells) == 81
    assert stats.chisquare(cells).pvalue > LEAST_P
    for centre, length in ((row, 32), (column, 30)):
        frequency = np.bincount(centre, minlength=length)
        assert len(frequency) == length
        assert stats.chisquare(frequency).pvalue > LEAST_P
    # independent of each other
    table = np.histogram2d(top, mirrored, bins=(9, 2))[0]
    assert stats.chi2_contingency(table).pvalue > LEAST_P


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**16))
def test_cutout_is_a_square_clipped_at_the_border(height, size, seed):
    width = 7
    draws = draw(torch.Generator().manual_seed(seed), 3, (height, width), cutout=size)
    out = cut_out(torch.ones(3, 2, height, width), draws)
    for i, (row, column) in enumerate(draws.table[3:].T.tolist()):
        expected = np.ones((height, width))
        first, left = row - size // 2, column - size // 2
        expected[max(first, 0) : max(first + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert (out[i].numpy() == expected).all()


def test_whole_hole_has_the_area_asked_for():
    table = torch.tensor([[0], [0], [0], [16], [15]])
    out = cut_out(torch.ones(1, 1, 32, 32), Draws(table, 0, 16, moves=False))
    assert (out == 0).sum() == 256
    assert not out[0, 0, 8:24, 7:23].any()


def test_batch_is_normalised_before_the_hole_is_cut():
    pixels = some_images(50).pixels
    out = augment_batch(
        pixels, torch.Generator().manual_seed(0), ["crop", "flip"], mean=MEAN, std=STD, cutout=4
    )
    again = draw(torch.Generator().manual_seed(0), 50, (8, 8), ["crop", "flip"], cutout=4)
    moved = crop_and_flip(pixels, again).double() / 255
    mean, std = (torch.tensor(c).double()[:, None, None] for c in (MEAN, STD))
    hole = out == 0
    torch.testing.assert_close(
        out.double(), torch.where(hole, 0.0, (moved - mean) / std), rtol=1e-5, atol=1e-6
    )
    assert 4 <= hole.sum() / (50 * 3) <= 16  # from a corner's quarter to the whole square
    assert pixels.equal(some_images(50).pixels), "the images themselves were changed"


def test_padding_is_black_before_normalisation():
    white = torch.full((200, 1, 4, 4), 255, dtype=torch.uint8)
    out = augment_batch(white, torch.Generator().manual_seed(0), ["crop"], mean=[0.5], std=[0.25])
    assert set(out.unique().tolist()) == {-2.0, 2.0}  # (0 - .5) / .25 and (1 - .5) / .25


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"augment": ["crp"]}, r"unknown augmentation 'crp'; did you mean 'crop'\?"),
        ({"augment": "crop"}, "sequence of names"),
        ({"augment": ["cutout"]}, "asked for by its size"),
        ({"cutout": -1}, "cutout must be an integer >= 0; got -1"),
        ({"padding": 1.5}, "padding must be an integer"),
        ({"sampling": "shufle"}, "unknown sampling 'shufle'; did you mean 'shuffle'"),
        ({"mean": [0.5]}, "one number for each of 3 channels; got 1 and 3"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"batch_size": 64, "drop_last": True}, "at most the 50 examples there are; got 64"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"batch_size": 16, "world": 3}, "multiple of world = 3"),
        ({"batch_size": 48, "world": 4, "rank": 4}, "rank must be below world = 4; got 4"),
        ({"batch_size": 48, "world": 4}, "last batch has 2 examples for 4 ranks"),
    ],
)
def test_mistakes_are_named_in_one_line(options, says):
    with pytest.raises(NQMError, match=says) as caught:
        stream(some_images(50), **options)
    assert "\n" not in str(caught.value)


def test_resume_past_the_end_is_a_mistake():
    batches = stream(some_images(50))
    assert list(batches.epoch(0, start=4)) == []
    with pytest.raises(NQMError, match="start must be at most the 4 batches of an epoch; got 5"):
        batches.epoch(0, start=5)


# -- streams


@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 3), st.integers(0, 5))
def test_every_epoch_is_a_permutation(count, batch_size, epoch, seed):
    batches = plain(numbered(count), batch_size, seed=seed)
    parts = labels_of(batches, epoch)
    assert sorted(itertools.chain(*parts)) == list(range(count))
    assert len(parts) == len(batches) == -(-count // batch_size)
    assert all(len(part) == batch_size for part in parts[:-1])


def test_epochs_and_seeds_differ_and_repeat():
    images = numbered(60)
    orders = [labels_of(plain(images, 60, seed=s), e)[0] for s in range(3) for e in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert orders[4] == labels_of(plain(images, 60, seed=1), 1)[0]


def test_augmentation_is_new_each_epoch_and_with_each_seed():
    """The same image in the same place of the batch is cropped anew."""
    one = Images(some_images(1).pixels.expand(40, -1, -1, -1), torch.zeros(40, dtype=torch.int64))
    batches = [next(stream(one, 40, seed=s).epoch(e))[0] for s in (0, 1) for e in (0, 1)]
    for a, b in itertools.combinations(batches, 2):
        alike = (a == b).flatten(1).all(1)
        assert alike.sum() < 5  # of 40; 162 views and 64 holes


def test_keys_of_different_length_differ():
    keys = [(3,), (3, 0), (3, 0, 0), (0, 3), (3, 1), (3, 0, 1)]
    drawn = {int(torch.randint(2**62, (), generator=keyed_generator(*key))) for key in keys}
    assert len(drawn) == len(keys)


def test_replacement_draws_uniformly_and_independently():
    batches = plain(numbered(20), 20, sampling="replacement")
    drawn = np.array([labels_of(batches, epoch)[0] for epoch in range(500)])
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=20)).pvalue > LEAST_P
    # Pairs within an epoch: a permutation would never repeat an image.
    same = int((drawn[:, 0] == drawn[:, 1]).sum())
    assert stats.binomtest(same, 500, 1 / 20).pvalue > LEAST_P


def test_drop_last_leaves_out_only_the_incomplete_batch():
    whole = labels_of(plain(numbered(50), 16))
    assert labels_of(plain(numbered(50), 16, drop_last=True)) == whole[:3]
    assert [len(part) for part in whole] == [16, 16, 16, 2]


@pytest.mark.parametrize("sampling", ["shuffle", "replacement"])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resume_is_bit_for_bit(sampling, start):
    images = some_images(50)
    whole = list(stream(images, sampling=sampling).epoch(2))[start:]
    rest = list(stream(images, sampling=sampling).epoch(2, start=start))
    assert len(whole) == len(rest) == 4 - start
    for (x, y), (x2, y2) in zip(whole, rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_global_batch(world):
    images = some_images(51)
    together = list(stream(images, 12).epoch(1))
    ranks = [list(stream(images, 12, rank=r, world=world).epoch(1)) for r in range(world)]
    for j, (x, y) in enumerate(together):
        assert torch.equal(torch.cat([rank[j][0] for rank in ranks]), x)
        assert torch.equal(torch.cat([rank[j][1] for rank in ranks]), y)
        sizes = {len(rank[j][1]) for rank in ranks}
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 6))
def test_shares_cover_every_position_once(count, per_rank, world):
    assume(count >= world)
    assume(not 0 < count % (per_rank * world) < world)  # refused, see above
    plans = [EpochPlan(count, per_rank * world, rank=r, world=world) for r in range(world)]
    covered = [range(count)[part] for plan in plans for part in plan.slices()]
    assert sorted(itertools.chain(*covered)) == list(range(count))


def test_images_follow_their_labels():
    images = some_images(50)
    by_content = {tuple(p.flatten().tolist()): int(y) for p, y in zip(*fields(images), strict=True)}
    batches = stream(images, augment=[], cutout=0, mean=(0, 0, 0), std=(1, 1, 1))
    for x, y in batches.epoch(0):
        pixels = (x * 255).round().byte()
        assert [by_content[tuple(p.flatten().tolist())] for p in pixels] == y.tolist()


def fields(images: Images) -> tuple[torch.Tensor, torch.Tensor]:
    return images.pixels, images.labels


def test_dtype_and_memory_format():
    x, y = next(
        stream(some_images(50), dtype=torch.bfloat16, memory_format=torch.channels_last).epoch(0)
    )
    reference, _ = next(stream(some_images(50)).epoch(0))
    assert x.dtype == torch.bfloat16
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, reference.bfloat16())


def test_evaluation_sees_every_image_once_in_order():
    images = some_images(23)
    batches = list(evaluation_batches(images, 10, MEAN, STD))
    assert [len(y) for _, y in batches] == [10, 10, 3]
    x = torch.cat([x for x, _ in batches])
    mean, std = (torch.tensor(c)[:, None, None] for c in (MEAN, STD))
    torch.testing.assert_close(x, (images.pixels / 255 - mean) / std)
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)


# -- containers


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.data())
def test_subset_is_as_balanced_as_the_classes_allow(sizes, data):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    images = Images(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    n = data.draw(st.integers(1, len(labels)))
    taken = images.subset(n, seed=data.draw(st.integers(0, 9))).labels
    counts = taken.bincount(minlength=len(sizes)).tolist()
    assert sum(counts) == n
    # A class falls short of the fullest by more than one only if it is used up.
    assert all(c >= max(counts) - 1 or c == size for c, size in zip(counts, sizes, strict=True))


def test_subset_depends_on_the_seed_and_takes_each_image_once():
    images = Images(torch.arange(100).byte().view(100, 1, 1, 1), torch.arange(100) % 10)
    one, same, other = (images.subset(30, seed) for seed in (0, 0, 1))
    assert torch.equal(one.pixels, same.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    assert len(one.pixels.unique()) == 30
    assert torch.equal(one.pixels.flatten() % 10, one.labels)
    with pytest.raises(NQMError, match="at most the 100 images"):
        images.subset(101)


def test_wrong_tensors_are_refused():
    with pytest.raises(NQMError, match=r"pixels must be \(N, C, H, W\) uint8; got \(2, 3, 4, 4\)"):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(NQMError, match=r"labels must be \(2,\) int64"):
        Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_shape_of_one_image():
    images = some_images(4, side=6)
    assert ImageData("x", "X", None, images, 5, MEAN, STD).shape == (3, 6, 6)
