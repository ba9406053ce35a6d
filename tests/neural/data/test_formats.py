"""Every published format, on small files made here, and the real sets where they are at hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits

from neural.data import DATASETS, TextData, formats, load, load_images
from neural.data.catalog import data_root
from neural.data.published import FILES
from nqm.errors import NQMError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put files into the root as if they, with their checksums, were the published ones."""

    def put(name: str, *contents: bytes, unpacked: tuple[bytes, ...] = ()) -> None:
        files = []
        for i, (file, content) in enumerate(zip(FILES[name], contents, strict=False)):
            (tmp_path / file.name).write_bytes(content)
            summed = unpacked[i] if unpacked else content
            files.append(replace(file, md5=hashlib.md5(summed).hexdigest()))
        monkeypatch.setitem(FILES, name, (*files, *FILES[name][len(files) :]))

    return put


def random_pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def tar_gz(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def encoded(pixels: np.ndarray, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def python2_pickle(batch: dict[str, object]) -> bytes:
    """What Python 2's cPickle wrote: protocol 2 with byte strings for keys and for array data."""
    data = batch["data"]
    assert isinstance(data, np.ndarray)

    def string(raw: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(raw)) + raw

    out = b"\x80\x02}"
    for key, value in batch.items():
        out += string(key.encode())
        if isinstance(value, np.ndarray):
            out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
            out += b"K\x00\x85" + string(b"b") + b"tR("
            out += b"K\x01" + b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"\x86"
            out += b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR("
            out += b"K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            out += b"\x89" + string(value.tobytes()) + b"tb"
        else:
            assert isinstance(value, list)
            out += b"](" + b"".join(b"K" + bytes([v]) for v in value) + b"e"
        out += b"s"
    return out + b"."


def test_the_pickle_made_here_is_one():
    batch = {"data": random_pixels(2, 4), "labels": [3, 9]}
    content = pickle.loads(python2_pickle(batch), encoding="bytes")
    np.testing.assert_array_equal(content[b"data"], batch["data"])
    assert content[b"labels"] == [3, 9]


@pytest.mark.parametrize("dump", [python2_pickle, lambda batch: pickle.dumps(
    {key.encode(): value for key, value in batch.items()}, protocol=2)])  # fmt: skip
def test_cifar_archives(publish, tmp_path, dump):
    pixels = random_pixels(12, 3, 32, 32)
    labels = list(range(12))
    flat = pixels.reshape(12, 3072)
    order = ("data_batch_5", "test_batch", *(f"data_batch_{i}" for i in (1, 2, 3, 4)))
    names = [f"cifar-10-batches-py/{name}" for name in order]
    rows = [slice(8, 10), slice(10, 12), *(slice(2 * i, 2 * i + 2) for i in range(4))]
    publish("cifar10", tar_gz({
        name: dump({"data": flat[part], "labels": labels[part]})
        for name, part in zip(names, rows, strict=True)
    }))  # fmt: skip
    data = load("cifar10", tmp_path, download=False)
    np.testing.assert_array_equal(data.train.pixels, pixels[:10])
    np.testing.assert_array_equal(data.test.pixels, pixels[10:])
    assert data.train.labels.tolist() == labels[:10]
    assert data.test.labels.tolist() == labels[10:]
    assert (data.label, data.classes, data.shape) == ("CIFAR-10", 10, (3, 32, 32))

    publish("cifar100", tar_gz({
        f"cifar-100-python/{name}": dump(
            {"data": flat[part], "coarse_labels": [0] * 6, "fine_labels": labels[part]}
        )
        for name, part in (("test", slice(6, 12)), ("train", slice(0, 6)))
    }))  # fmt: skip
    data = load("cifar100", tmp_path, download=False)
    np.testing.assert_array_equal(data.train.pixels, pixels[:6])
    assert data.test.labels.tolist() == labels[6:]
    assert data.classes == 100


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize("content", [
    pickle.dumps(_Evil()), pickle.dumps({b"data": _Evil()}), pickle.dumps([1]), b"", b"garbage",
])  # fmt: skip
def test_pickles_run_nothing(content):
    with pytest.raises(NQMError, match=r"a/b cannot be read \(.*\); delete it") as caught:
        formats.unpickle_arrays(io.BytesIO(content), "a/b")
    assert "\n" not in str(caught.value)


def test_an_archive_without_a_batch_is_named(publish, tmp_path):
    publish("cifar100", tar_gz({"cifar-100-python/train": python2_pickle(
        {"data": random_pixels(1, 3072), "fine_labels": [1]})}))  # fmt: skip
    with pytest.raises(NQMError, match="cifar-100-python/test"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files(publish, tmp_path, name):
    arrays = [random_pixels(5, 28, 28), np.arange(5, dtype=np.uint8),
              random_pixels(3, 28, 28), np.arange(3, dtype=np.uint8)]  # fmt: skip
    raw = [idx(array) for array in arrays]
    publish(name, *(gzip.compress(r, 1) for r in raw), unpacked=tuple(raw))
    data = load(name, tmp_path, download=False)
    np.testing.assert_array_equal(data.train.pixels[:, 0], arrays[0])
    np.testing.assert_array_equal(data.test.pixels[:, 0], arrays[2])
    assert data.train.labels.tolist() == list(range(5))
    assert data.shape == (1, 28, 28)


@pytest.mark.parametrize("raw", [b"", b"\0\0\x0d\x01\0\0\0\1abcd", idx(np.zeros(4, "u1"))[:-1]])
def test_broken_idx_files_are_refused(raw):
    with pytest.raises(NQMError, match=r"f\.gz cannot be read"):
        formats.read_idx(raw, "f.gz")


def test_svhn(publish, tmp_path):
    splits = []
    for count in (6, 4):
        pixels = random_pixels(count, 3, 32, 32)
        digits = np.arange(5, 5 + count) % 10
        out = io.BytesIO()
        stored = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        savemat(out, {"X": pixels.transpose(2, 3, 1, 0), "y": stored}, do_compression=True)
        splits.append((pixels, digits, out.getvalue()))
    publish("svhn", splits[0][2], splits[1][2])
    data = load("svhn", tmp_path, download=False)
    for images, (pixels, digits, _) in zip((data.train, data.test), splits, strict=True):
        np.testing.assert_array_equal(images.pixels, pixels)
        assert images.labels.tolist() == digits.tolist()
    (tmp_path / "bad.mat").write_bytes(b"no matlab")
    with pytest.raises(NQMError, match=r"bad\.mat cannot be read"):
        formats.read_svhn(tmp_path / "bad.mat")


@pytest.mark.parametrize("name", ["lsun_resized", "tiny_imagenet_resized"])
def test_odin_archives(publish, tmp_path, name):
    pixels = random_pixels(3, 32, 32, 3)
    members = {f"set/set/{i}.png": encoded(pixels[i], "PNG") for i in (2, 0, 1)}
    publish(name, tar_gz({**members, "set/set/._0.png": b"of a Mac", "set/list.txt": b"0"}))
    data = load(name, tmp_path, download=False)
    np.testing.assert_array_equal(data.test.pixels, pixels.transpose(0, 3, 1, 2))
    assert data.train is None
    assert data.test.labels.tolist() == [-1] * 3


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"a.txt": b""}, "holds no image"),
        ({"a.png": b"broken"}, "a.png cannot be read"),
        ({"a.png": encoded(random_pixels(4, 4, 3), "PNG"),
          "b.png": encoded(random_pixels(5, 4, 3), "PNG")}, r"b.png .*\(3, 5, 4\)"),
    ],
)  # fmt: skip
def test_archives_that_are_no_set_are_refused(tmp_path, members, says):
    (tmp_path / "a.tar.gz").write_bytes(tar_gz(members))
    with pytest.raises(NQMError, match=says):
        formats.read_tar_of_images(tmp_path / "a.tar.gz")


def test_emnist_from_the_official_archive_or_the_pack(publish, tmp_path):
    train, test = random_pixels(4, 28, 28), random_pixels(3, 28, 28)
    np.savez(tmp_path / "emnist_letters_test.npz", x=test, y=np.array([0, 25, 3], np.uint8))
    data = load("emnist_letters", tmp_path, download=False)
    assert data.train is None
    np.testing.assert_array_equal(data.test.pixels[:, 0], test)
    assert data.test.labels.tolist() == [0, 25, 3]

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for part, pixels, labels in (("train", train, [1, 26, 2, 3]), ("test", test, [1, 26, 4])):
            stem = f"gzip/emnist-letters-{part}"
            stored = np.ascontiguousarray(pixels.transpose(0, 2, 1))  # the archive's orientation
            archive.writestr(f"{stem}-images-idx3-ubyte.gz", gzip.compress(idx(stored)))
            values = np.array(labels, np.uint8)
            archive.writestr(f"{stem}-labels-idx1-ubyte.gz", gzip.compress(idx(values)))
    publish("emnist_letters", out.getvalue())
    official = load("emnist_letters", tmp_path, download=False)
    np.testing.assert_array_equal(official.train.pixels[:, 0], train)
    np.testing.assert_array_equal(official.test.pixels, data.test.pixels)
    assert torch.equal(official.test.labels, data.test.labels)


def jpeg_pack(path: Path, count: int) -> np.ndarray:
    """Write a CIFAR-10 JPEG pack of `count` train and 2 test images; how they decode."""
    files = [encoded(random_pixels(32, 32, 3), "JPEG", quality=75) for _ in range(count + 2)]
    # Size and quality are the same, so everything through the start-of-scan segment is.
    header = files[0][: files[0].index(b"\xff\xda") + 14]
    scans = [file[len(header) : -2] for file in files]
    assert all(file.endswith(b"\xff\xd9") and file.startswith(header) for file in files)
    np.savez(
        path, header=np.frombuffer(header, np.uint8), scans=np.frombuffer(b"".join(scans), "u1"),
        lengths=np.array([len(s) for s in scans], np.uint16),
        y_train=np.arange(count, dtype=np.uint8), y_test=np.array([7, 8], np.uint8),
    )  # fmt: skip
    return np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files]).transpose(0, 3, 1, 2)


def test_jpeg_pack_is_decoded_once_and_never_called_cifar10_alone(tmp_path, monkeypatch):
    path = tmp_path / "cifar10_q75_pack.npz"
    decoded = jpeg_pack(path, 5)
    data = load("cifar10_q75", tmp_path)
    assert data.label == "CIFAR-10 (JPEG q75)"
    np.testing.assert_array_equal(data.train.pixels, decoded[:5])
    np.testing.assert_array_equal(data.test.pixels, decoded[5:])
    assert data.test.labels.tolist() == [7, 8]

    cache = Path(os.environ["XDG_CACHE_HOME"]) / "late-phase-nqm" / "decoded"
    (stored,) = cache.iterdir()
    monkeypatch.setattr(formats, "decode_all", lambda *_: pytest.fail("decoded twice"))
    again = load("cifar10_q75", tmp_path)
    assert torch.equal(again.train.pixels, data.train.pixels)
    monkeypatch.undo()

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    stored.write_bytes(stored.read_bytes()[:-10])  # a damaged copy is made anew
    assert torch.equal(load("cifar10_q75", tmp_path).test.pixels, data.test.pixels)
    other = jpeg_pack(path, 5)  # another pack under the same name is not mistaken for the first
    np.testing.assert_array_equal(load("cifar10_q75", tmp_path).test.pixels, other[5:])


def test_without_a_cache_folder_all_works(tmp_path, monkeypatch):
    decoded = jpeg_pack(tmp_path / "cifar10_q75_pack.npz", 3)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    np.testing.assert_array_equal(load("cifar10_q75", tmp_path).train.pixels, decoded[:3])


def test_webp_mosaics(tmp_path):
    arrays, parts = {}, {}
    for part, count in (("train", 7), ("test", 2)):
        images = random_pixels(count, 3, 32, 32)
        columns = 4
        mosaic = np.zeros((-(-count // columns) * 32, columns * 32, 3), np.uint8)
        for i, image in enumerate(images):
            row, column = divmod(i, columns)
            tile = image.transpose(1, 2, 0)
            mosaic[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = tile
        webp = encoded(mosaic, "WEBP", lossless=True)
        arrays[f"webp_{part}"] = np.frombuffer(webp, np.uint8)
        arrays[f"y_{part}"] = np.arange(count, dtype=np.uint8)
        parts[part] = images
    np.savez(tmp_path / "cifar10_lossless_part_webp.npz", **arrays)
    data = load("cifar10_lossless_part", tmp_path)
    np.testing.assert_array_equal(data.train.pixels, parts["train"])
    np.testing.assert_array_equal(data.test.pixels, parts["test"])
    assert data.label == "CIFAR-10 (7 train, 2 test)"


@pytest.mark.parametrize("damage", ["short", "missing", "pickled"])
def test_a_damaged_pack_is_named(tmp_path, damage):
    path = tmp_path / "emnist_letters_test.npz"
    x = random_pixels(2, 28, 28)
    content = {"x": x} if damage == "missing" else {"x": x, "y": np.array([0, 1], object)}
    np.savez(path, **content)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(NQMError, match=r"emnist_letters_test\.npz cannot be read") as caught:
        load("emnist_letters", tmp_path, download=False)
    assert "\n" not in str(caught.value)


def test_enwik8_is_split_90_5_5_in_order(publish, tmp_path):
    raw = bytes(RNG.integers(0, 256, 1000, dtype=np.uint8))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", raw)
    publish("enwik8", out.getvalue(), unpacked=(raw,))
    data = load("enwik8", tmp_path, download=False)
    assert isinstance(data, TextData)
    assert [len(part) for part in (data.train, data.valid, data.test)] == [900, 50, 50]
    assert bytes(torch.cat([data.train, data.valid, data.test]).tolist()) == raw
    assert data.symbols == 256


def test_wikitext2_trains_on_valid_and_says_so(tmp_path):
    (tmp_path / "wikitext2_valid.txt").write_bytes(b"v" * 100)
    (tmp_path / "wikitext2_test.txt").write_bytes(b"t" * 40)
    data = load("wikitext2_bytes", tmp_path)
    parts = [bytes(part.tolist()) for part in (data.train, data.valid, data.test)]
    assert parts == [b"v" * 95, b"v" * 5, b"t" * 40]
    assert "valid" in data.label
    assert "enwik8" not in data.label


# -- embedded sets


def test_digits_are_scikit_learns_every_one_once():
    data = load_images("digits")
    assert (len(data.train), len(data.test), data.shape) == (1347, 450, (1, 8, 8))
    both = torch.cat([data.train.pixels, data.test.pixels])[:, 0].double().numpy() * 16 / 255
    labels = torch.cat([data.train.labels, data.test.labels]).numpy()
    source = load_digits()
    # the grey levels of every image survive, whatever the order
    ours, theirs = (
        sorted((y, *grey.round().astype(int).ravel()) for grey, y in zip(images, of, strict=True))
        for images, of in ((both, labels), (source.images, source.target))
    )
    assert ours == theirs
    share = data.test.labels.bincount() / torch.tensor(np.bincount(source.target))
    assert (share - 450 / 1797).abs().max() < 0.01  # stratified
    scaled = (data.train.pixels / 255 - data.mean[0]) / data.std[0]
    assert abs(float(scaled.mean())) < 1e-5
    assert abs(float(scaled.std()) - 1) < 1e-5
    assert torch.equal(load_images("digits").test.pixels, data.test.pixels)


def test_python_docs_are_text():
    data = load("python_docs")
    text = bytes(torch.cat([data.train, data.valid, data.test]).tolist()).decode()
    assert "assert_stmt" in text
    assert len(data.train) == len(text.encode()) * 90 // 100 > 200_000


# -- names and places


def test_unknown_and_unfit_names():
    with pytest.raises(NQMError, match=r"unknown data set 'cifar1O'; did you mean 'cifar10'\?"):
        load("cifar1O")
    with pytest.raises(NQMError, match="'python_docs' is a text; images in memory are needed"):
        load_images("python_docs")


def test_every_published_file_belongs_to_a_set_and_says_where_it_is():
    assert set(FILES) <= set(DATASETS)
    assert all("\n" not in line and line for line in DATASETS.values())
    for files in FILES.values():
        for file in files:
            assert bool(file.url) == bool(file.md5), file
            assert len(file.md5) in (0, 32)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"fashion_mnist"}))
def test_a_missing_set_is_one_line_that_says_what_to_do(tmp_path, name):
    with pytest.raises(NQMError) as caught:
        load(name, tmp_path, download=False)
    line = str(caught.value)
    assert str(tmp_path) in line
    assert "\n" not in line
    assert any(file.name in line and file.url in line for file in FILES[name])


def test_where_data_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("NQM_DATA", str(tmp_path / "variable"))
    assert data_root(tmp_path) == tmp_path
    assert data_root() == tmp_path / "variable"
    monkeypatch.delenv("NQM_DATA")
    assert data_root() == Path(os.environ["XDG_CACHE_HOME"]) / "late-phase-nqm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data_root() == Path("/home/someone/.cache/late-phase-nqm")


# -- the real sets, where they are at hand


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("fashion_mnist", 60_000, 10_000, 10),
        ("mnist", 60_000, 10_000, 10),
        ("cifar10", 50_000, 10_000, 10),
        ("cifar100", 50_000, 10_000, 100),
        ("cifar10_lossless_part", 8_125, 932, 10),
        ("emnist_letters", None, 20_800, 26),
        ("svhn", 73_257, 26_032, 10),
    ],
)
def test_real_sets_have_their_published_size_and_statistics(name, train, test, classes):
    try:
        data = load_images(name, download=False)
    except NQMError as error:
        pytest.skip(str(error))
    assert len(data.test) == test
    assert data.test.labels.unique().tolist() == list(range(classes))
    if data.train is None:
        return
    assert len(data.train) == (train or 124_800)
    # Means as published; published deviations come by several definitions and are not compared.
    mean = data.train.pixels.double().mean((0, 2, 3)) / 255
    tolerance = 0.01 if name == "cifar10_lossless_part" else 1e-3  # a sixth of the set
    assert (mean - torch.tensor(data.mean)).abs().max() < tolerance
    if name in ("fashion_mnist", "cifar10", "cifar100"):
        assert len(set(data.train.labels.bincount().tolist())) == 1
