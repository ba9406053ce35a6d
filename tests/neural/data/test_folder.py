"""Streamed images: folders and packs, crops against torchvision, exact resume, damage."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from neural.data import FolderBatches, ImageFolder, ImagePack, load
from neural.data import folder as streaming
from neural.data.folder import decoded
from neural.models._torchvision import import_torchvision
from nqm.errors import NQMError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_P = 1e-3


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of four images, of several sizes, formats and modes."""
    for label, name in enumerate(("n03", "n01", "n02")):
        folder = tmp_path / "val" / name
        folder.mkdir(parents=True)
        for i in range(4):
            image = picture(60 + 13 * i, 80 - 9 * i, seed=10 * label + i)
            if i == 1:
                image = image.convert("L")
            image.save(folder / f"{i}.{('png', 'JPEG', 'jpg', 'webp')[i]}")
        (folder / "notes.txt").write_text("no image")
    return tmp_path / "val"


def stream(images: ImageFolder | ImagePack, **options: object) -> FolderBatches:
    defaults: dict[str, object] = {"mean": MEAN, "std": STD, "size": 32, "resize": 40, "seed": 7}
    return FolderBatches(images, 5, **{**defaults, **options})  # type: ignore[arg-type]


def test_labels_are_ranks_of_sorted_folder_names(tree):
    images = ImageFolder.scan(tree)
    assert images.names == ("n01", "n02", "n03")
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [path.parent.name for path in images.paths] == [images.names[y] for y in images.labels]
    assert all(path.suffix != ".txt" for path in images.paths)


def test_test_batches_hold_every_image_in_order_as_torchvision_crops_it(tree):
    transforms = import_torchvision().transforms
    view = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32),
                               transforms.ToTensor(), transforms.Normalize(MEAN, STD)])  # fmt: skip
    images = ImageFolder.scan(tree)
    batches = list(stream(images, train=False).epoch())
    assert [len(y) for _, y in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)
    expected = torch.stack([view(Image.open(path).convert("RGB")) for path in images.paths])
    torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected)


def test_training_view_is_torchvisions_crop_of_the_box_drawn():
    crop = import_torchvision().transforms.functional.resized_crop
    mirrored = 0
    for seed in range(20):
        image = picture(90, 70, seed)
        left, top, right, bottom = streaming.random_crop_box(
            90, 70, torch.Generator().manual_seed(seed)
        )
        view = streaming.training_view(image, 24, torch.Generator().manual_seed(seed))
        # torchvision's default here is bilinear, as ours
        expected = np.asarray(crop(image, top, left, bottom - top, right - left, [24, 24]))
        flipped = np.array_equal(np.asarray(view), expected[:, ::-1])
        assert flipped or np.array_equal(np.asarray(view), expected)
        mirrored += flipped
    assert 0 < mirrored < 20


@pytest.mark.parametrize("size", [(500, 375), (400, 100), (50, 700)])
def test_crop_boxes_are_distributed_as_torchvisions(size):
    width, height = size
    transform = import_torchvision().transforms.RandomResizedCrop
    blank = Image.new("RGB", size)
    generator = torch.Generator().manual_seed(2)
    ours = np.array([streaming.random_crop_box(width, height, generator) for _ in range(3000)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2] <= width).all()
    assert (ours[:, 3] <= height).all()
    ours[:, 2:] -= ours[:, :2]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        boxes = [transform.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in boxes])
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b, method="asymp").pvalue > LEAST_P


def test_flips_are_fair():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    views = [np.asarray(streaming.training_view(ramp, 8, generator)) for _ in range(600)]
    mirrored = sum(bool(view[0, 0, 0] > view[0, -1, 0]) for view in views)
    assert stats.binomtest(mirrored, 600, 0.5).pvalue > LEAST_P


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_resume_is_bit_for_bit(tree, start):
    images = ImageFolder.scan(tree)
    whole = list(stream(images).epoch(4))[start:]
    rest = list(stream(images).epoch(4, start=start))
    assert len(whole) == len(rest) == 3 - start
    for (x, y), (x2, y2) in zip(whole, rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_workers_and_ranks_change_nothing(tree):
    images = ImageFolder.scan(tree)
    one = list(stream(images).epoch(0))
    for (x, y), (x2, y2) in zip(one, stream(images, workers=2).epoch(0), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    whole = FolderBatches(images, 4, mean=MEAN, std=STD, size=32).epoch(0)
    ranks = [FolderBatches(images, 4, mean=MEAN, std=STD, size=32, rank=r, world=2).epoch(0)
             for r in (0, 1)]  # fmt: skip
    for (x, _), (a, _), (b, _) in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([a, b]), x)


def test_workers_leave_signals_to_the_process_that_trains(tree):
    """A batch system signals all processes; without images the training could not stop itself."""
    kept = stream(ImageFolder.scan(tree), workers=1)
    before = set(multiprocessing.active_children())
    next(kept.epoch(0))
    own = set(multiprocessing.active_children()) - before
    assert own
    for process, number in itertools.product(own, (signal.SIGTERM, signal.SIGUSR1)):
        subprocess.run(["kill", f"-{number.value}", str(process.pid)], check=True)
    assert len(list(kept.epoch(1))) == 3
    assert all(process.is_alive() for process in own)


@pytest.mark.parametrize(
    "use",
    [
        "list(images.epoch(0))",
        "left = images.epoch(0), images.epoch(1); [next(each) for each in left]",
        "raise ValueError",
    ],
)
def test_a_script_that_used_workers_ends(tree, use):
    """Python sends SIGTERM to all processes at exit and waits for them."""
    program = f"""
from pathlib import Path
from neural.data import FolderBatches, ImageFolder
tree, grey = ImageFolder.scan(Path({str(tree)!r})), (0.5, 0.5, 0.5)
images = FolderBatches(tree, 5, mean=grey, std=grey, size=32, resize=40, workers=1)
first = images.epoch(0)
next(first)
{use}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.returncode == ("raise" in use)


def test_an_epoch_is_a_permutation_and_views_are_new_each_time(tree):
    images = ImageFolder.scan(tree)
    numbered = ImageFolder(images.paths, torch.arange(12), images.names)
    views = []
    for epoch in (0, 1):
        batches = list(stream(numbered).epoch(epoch))
        y = torch.cat([y for _, y in batches])
        assert sorted(y.tolist()) == list(range(12))
        views.append(torch.cat([x for x, _ in batches])[y.argsort()])
    assert not any(torch.equal(a, b) for a, b in zip(*views, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_stay_and_an_epoch_that_is_left_is_forgotten(tree, workers):
    """A rehearsal takes one batch of an epoch, and evaluation may run beside training."""
    images = ImageFolder.scan(tree)
    kept = stream(images, workers=workers)
    rng = torch.get_rng_state()
    first = next(kept.epoch(0))
    processes = set(multiprocessing.active_children())
    beside = kept.epoch(1)
    seen = [next(beside)]
    within = list(kept.epoch(2))  # while the other one goes on
    seen += list(beside)
    again = list(kept.epoch(0, start=0))
    assert processes <= set(multiprocessing.active_children())
    assert len(processes) >= workers
    for found, epoch in ((within, 2), (seen, 1), (again, 0), ([first], 0)):
        for (x, y), (x2, y2) in zip(found, stream(images).epoch(epoch), strict=False):
            assert torch.equal(x, x2)
            assert torch.equal(y, y2)
    assert len(within) == len(seen) == len(again) == 3
    assert torch.equal(torch.get_rng_state(), rng)  # dropout draws what it would have drawn


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(tree, workers):
    bad = tree / "n02" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(NQMError, match="cannot be read") as caught:
        list(stream(ImageFolder.scan(tree), workers=workers).epoch(0))
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_are_named(tree, tmp_path):
    with pytest.raises(NQMError, match=r"no folder .*nowhere"):
        ImageFolder.scan(tmp_path / "nowhere")
    (tree / "n04").mkdir()
    with pytest.raises(NQMError, match="n04 holds no image"):
        ImageFolder.scan(tree)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NQMError, match="one folder of images for each class; got none"):
        ImageFolder.scan(tmp_path / "empty")
    (tree / "n04").rmdir()
    with pytest.raises(NQMError, match="resize must be an integer >= 32; got 20"):
        stream(ImageFolder.scan(tree), resize=20)


def pack(path: Path, count: int, side: int = 48) -> list[np.ndarray]:
    """Write a pack; the images as they decode."""
    encoded, decoded = [], []
    for i in range(count):
        out = io.BytesIO()
        picture(side, side, i).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
        decoded.append(np.asarray(Image.open(out)))
    np.savez(
        path, jpeg=np.frombuffer(b"".join(encoded), np.uint8),
        lengths=np.array([len(e) for e in encoded], np.uint32), y=np.arange(count, dtype=np.int16),
        name=np.array([f"class {i}" for i in range(count)]),
    )  # fmt: skip
    return decoded


def test_a_pack_streams_like_a_folder(tmp_path):
    decoded = pack(tmp_path / "imagenet_sample_224_q90.npz", 6, side=224)
    data = load("imagenet_sample", tmp_path)
    assert data.classes == 6
    batches = FolderBatches(data.test, 4, mean=(0, 0, 0), std=(1, 1, 1), train=False,
                            resize=data.resize)  # fmt: skip
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(), strict=True))
    assert y.tolist() == list(range(6))
    np.testing.assert_allclose(255 * x.permute(0, 2, 3, 1).numpy(), np.stack(decoded), atol=1e-4)


def test_imagenet32_averages_boxes(tmp_path):
    decoded = pack(tmp_path / "imagenet_sample_224_q90.npz", 3, side=224)
    data = load("imagenet32", tmp_path)
    means = np.stack(decoded).reshape(3, 32, 7, 32, 7, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(data.test.pixels.numpy(), means, atol=1.001)  # two roundings
    assert data.train is None
    assert set(data.test.labels.tolist()) == {-1}


def test_a_pack_that_does_not_add_up_is_refused(tmp_path):
    pack(tmp_path / "p.npz", 3)
    content = dict(np.load(tmp_path / "p.npz"))
    content["lengths"][1] += 1
    np.savez(tmp_path / "p.npz", **content)
    with pytest.raises(NQMError, match=r"p\.npz cannot be read .*lengths add up to"):
        ImagePack.open(tmp_path / "p.npz")


def test_imagenet_by_name(tree, tmp_path):
    home = tmp_path / "imagenet"
    home.mkdir()
    with pytest.raises(NQMError, match=r"imagenet needs .*train and .*val"):
        load("imagenet", tmp_path)
    for part in ("train", "val"):
        (home / part).symlink_to(tree)
    data = load("imagenet", tmp_path)
    assert (data.classes, len(data.train.labels), data.resize) == (3, 12, 256)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_have_the_pixels_of_pillow(subsampling, progressive):
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    for size in ((37, 53, 3), (64, 64, 3), (1, 9, 3)):
        content = io.BytesIO()
        pixels = rng.integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(
            content, "JPEG", quality=75, subsampling=subsampling, progressive=progressive
        )
        with Image.open(content) as opened:
            expected = np.array(opened.convert("RGB"))
        assert np.array_equal(np.array(decoded(content.getvalue())), expected)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG")])
def test_other_images_are_decoded_by_pillow(mode, kind):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).convert(mode)
    content = io.BytesIO()
    image.save(content, kind)
    with Image.open(content) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(np.array(decoded(content.getvalue())), expected)


def test_half_a_jpeg_is_an_error():
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        decoded(content.getvalue()[:-60])
