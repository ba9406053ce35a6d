"""The user's own data and network: folders, arrays, saved data sets, classes by name."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from neural.data import ImageData, StreamData, TextData
from neural.models import build as build_model
from neural.training.build import plain_model
from neural.training.config import build
from neural.training.cost import estimate
from neural.training.task import Runtime, load_data, open_task
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from tests.tiny_runs import LATE, mapping, recipe

#: Grey levels of the images of each class; train and test.
LEVELS = {"cat": (40, 60), "dog": (200, 220)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 6), ("val", 3)):
        for name, levels in LEVELS.items():
            place = tmp_path / "pets" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20, 12), (levels[i % 2], 0, 255))
                image.save(place / f"{i}.png")
    return tmp_path / "pets"


def arrays(tmp_path: Path, **changes: Any) -> Path:
    generator = np.random.default_rng(0)
    content = {
        "x_train": generator.integers(0, 256, (24, 8, 8, 3), np.uint8),
        "y_train": np.arange(24) % 4,
        "x_test": generator.integers(0, 256, (8, 8, 8, 3), np.uint8),
        "y_test": np.arange(8) % 4,
    }
    path = tmp_path / "mine.npz"
    np.savez(path, **(content | changes))
    return path


def run_of(path: Path, name: str = "folder", **data: Any) -> Any:
    sections = mapping(train={"epochs": 2}, model={"name": "digits_cnn", "width": 2})
    sections["data"] = {"name": name, "path": str(path), "batch_size": 4, **data}
    return build(sections)


def test_folder_in_memory_has_the_pixels_of_its_files(folder: Path) -> None:
    data = load_data(run_of(folder, size=8).data, None)
    assert isinstance(data, ImageData)
    assert data.train is not None
    assert (len(data.train), len(data.test), data.classes, data.label) == (12, 6, 2, "pets")
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    assert data.train.pixels[0, :, 3, 3].tolist() == [40, 0, 255]
    # Of red: 40, 60, 200 and 220 equally often; blue is constant, and is divided by 1.
    red = np.array([40, 60, 200, 220]) / 255
    assert data.mean == pytest.approx((red.mean(), 0.0, 1.0))
    assert data.std == pytest.approx((red.std(), 1.0, 1.0))


def test_large_images_of_a_folder_are_streamed_at_their_size(folder: Path) -> None:
    run = run_of(folder, size=70)
    data = load_data(run.data, None)
    assert isinstance(data, StreamData)
    x, y = next(iter(open_task(run, Runtime()).stream.epoch(0)))
    assert (tuple(x.shape), y.shape) == ((4, 3, 70, 70), (4,))
    with pytest.raises(NQMError, match=r"data.augment would be ignored \(streamed images"):
        open_task(run_of(folder, size=70, augment=["flip"]), Runtime())


def test_own_data_are_trained_on_and_counted(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, size=8, augment=["crop", "flip"])
    assert train(run, tmp_path / "run").status == "finished"
    data = {"name": "folder", "path": str(folder), "size": 8, "batch_size": 4,
            "train_examples": None, "test_examples": None}  # fmt: skip
    cost = estimate(recipe({"a": {}}, data=data, model={"name": "digits_cnn"}))["a"]
    assert cost.minibatches == 3


@pytest.mark.parametrize("order", ["last", "first", "none"])
def test_arrays_have_any_order_of_axes(order: str, tmp_path: Path) -> None:
    x = np.random.default_rng(1).integers(0, 256, (24, 8, 8, 3), np.uint8)
    given = {"last": x, "first": x.transpose(0, 3, 1, 2), "none": x[..., 0]}[order]
    path = arrays(tmp_path, x_train=given, x_test=given[:8])
    data = load_data(run_of(path, "npz").data, None)
    assert isinstance(data, ImageData)
    assert data.train is not None
    assert data.classes == 4
    expected = x.transpose(0, 3, 1, 2)[:, : 1 if order == "none" else 3]
    assert np.array_equal(data.train.pixels.numpy(), expected)
    assert data.mean[0] == pytest.approx(x[..., 0].mean() / 255)


def saved(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What `datasets` gives for a saved set, without the package."""

    class ClassLabel(SimpleNamespace):
        num_classes = 2

    class Column(SimpleNamespace):
        def __init__(self, decode: bool = True) -> None:
            super().__init__(decode=decode)

    Column.__name__ = "Image"

    class Part:
        def __init__(self, name: str) -> None:
            self.files = sorted((folder / name).rglob("*.png"))
            self.features = {"img": Column(), "fine": ClassLabel()}

        def cast_column(self, name: str, kind: Any) -> Part:
            assert (name, kind.decode) == ("img", False)
            return self

        def __getitem__(self, key: str | int) -> Any:
            if key == "fine":
                return [int(path.parent.name == "dog") for path in self.files]
            assert isinstance(key, int)
            # As in Arrow: the bytes, or the path of a file.
            content = self.files[key].read_bytes() if key % 2 else None
            return {"img": {"bytes": content, "path": str(self.files[key])}}

    module = ModuleType("datasets")
    module.__dict__.update(
        Image=Column, load_from_disk=lambda _: {"train": Part("train"), "test": Part("val")}
    )
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_saved_data_set_equals_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(monkeypatch, folder)
    ours = load_data(run_of(folder, size=8).data, None)
    theirs = load_data(run_of(folder, "huggingface", size=8).data, None)
    assert isinstance(ours, ImageData)
    assert isinstance(theirs, ImageData)
    assert ours.train is not None
    assert theirs.train is not None
    assert torch.equal(ours.train.pixels, theirs.train.pixels)
    assert torch.equal(ours.test.labels, theirs.test.labels)
    assert (ours.mean, ours.classes) == (theirs.mean, theirs.classes)


def test_datasets_is_named_where_it_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NQMError, match="needs the package datasets; run: pip install datasets"):
        load_data(run_of(folder, "huggingface", size=8).data, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "folder"}, "data.path is missing"),
        ({"name": "digits", "path": "a"}, r"data.path would be ignored \(name = 'digits'\)"),
        ({"name": "digits", "size": 32}, "data.size would be ignored"),
        ({"name": "folder", "path": "a", "size": 0}, "data.size must be"),
    ],
)
def test_mistakes_of_the_configuration(data: dict[str, Any], words: str) -> None:
    sections = mapping()
    sections["data"] = data
    with pytest.raises(NQMError, match=words):
        build(sections)


def test_mistakes_of_a_folder(folder: Path, tmp_path: Path) -> None:
    for run, words in (
        (run_of(folder), "data.size is missing"),
        (run_of(tmp_path / "no", size=8), "data.path .*no: no such file or folder"),
        (run_of(folder / "train", size=8), "no folder .*train; it must hold one folder"),
    ):
        with pytest.raises(NQMError, match=words) as caught:
            load_data(run.data, None)
        assert "\n" not in str(caught.value)
    (folder / "val" / "dog").rename(folder / "val" / "fox")
    with pytest.raises(NQMError, match=r"the same class folders; got \['dog', 'fox'\]"):
        load_data(run_of(folder, size=8).data, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": np.zeros((24, 8, 8, 3))}, "x_train must be uint8, 0 to 255; got float64"),
        ({"x_train": np.zeros((24, 3, 8, 3), np.uint8)}, "1 or 3 channels as its last or second"),
        ({"x_train": np.zeros((24, 8, 8, 4), np.uint8)}, "1 or 3 channels"),
        ({"y_train": np.zeros(23, int)}, "y_train must hold one whole number for each image"),
        ({"y_train": np.zeros(24)}, "y_train must hold one whole number"),
        ({"y_test": np.arange(8) - 1}, "y_test must count classes from 0; got -1"),
        ({"y_test": np.arange(8)}, "labels of test must lie in 0 to 3, .* got 0 to 7"),
        ({"x_test": np.zeros((8, 9, 9, 3), np.uint8)}, "must hold images of one shape"),
    ],
)
def test_mistakes_of_arrays(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = run_of(arrays(tmp_path, **changes), "npz")
    with pytest.raises(NQMError, match=words) as caught:
        load_data(run.data, None)
    assert "\n" not in str(caught.value)


def test_arrays_have_a_size(tmp_path: Path) -> None:
    with pytest.raises(NQMError, match=r"data.size would be ignored"):
        load_data(run_of(arrays(tmp_path), "npz", size=8).data, None)


NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, classes, width=3, bad=False):
        if bad:
            raise ValueError("no such net")
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))
"""


def test_own_class_is_found_in_the_current_folder_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets_here.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    model = {"name": "own_nets_here:Net", "width": 5}
    run = build(mapping(model=model, late_phase=LATE))
    assert train(run, tmp_path / "run").status == "finished"
    assert estimate(recipe({"a": {}}, model=model))["a"].weights == 64 * 5 + 5 + 5 * 10 + 10
    assert sys.path == path
    for name, options, words in (
        ("own_nets_here:Net", {"widht": 5}, "no option 'widht'; did you mean 'width'"),
        ("own_nets_here:Net", {"bad": True}, "cannot be built: ValueError: no such net"),
        ("own_nets_here:Nett", {}, "has no network 'Nett'; did you mean 'Net'"),
        ("own_nets_here:nn", {}, "has no network 'nn'"),
        ("os:system", {}, "has no network 'system'"),
        ("no.such:Net", {}, "there is no module no.such, neither installed"),
        ("a b:Net", {}, "must be package.module:Class"),
    ):
        with pytest.raises(NQMError, match=words) as caught:
            build_model(name, classes=10, channels=1, **options)
        assert "\n" not in str(caught.value)


def test_errors_of_an_own_module_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_net_broken.py").write_text("1 / 0\n")
    (tmp_path / "own_net_needs.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NQMError, match="cannot be imported: ZeroDivisionError"):
        build_model("own_net_broken:Net", classes=2)
    with pytest.raises(NQMError, match="own_net_needs needs not_there_at_all"):
        build_model("own_net_needs:Net", classes=2)


def test_every_form_of_a_models_and_data_sets_name_is_listed() -> None:
    done = CliRunner().invoke(main, ["neural", "list"])
    assert done.exit_code == 0
    listed = {line.strip() for line in done.output.splitlines()}
    assert {"timm:NAME", "torchvision:NAME", "package.module:Class", "resnet", "text"} <= listed


# --- text ----------------------------------------------------------------------------------------


def spoken(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


def text_of(path: Path, **data: Any) -> Any:
    sections = mapping(train={"epochs": 2, "optimizer": "adam"})
    sections["data"] = {"name": "text", "path": str(path), "batch_size": 4, "length": 8, **data}
    sections["model"] = {"name": "lstm_lm", "hidden": 6, "embedding": 5}
    return build(sections)


def test_files_of_a_folder_are_one_text_in_the_order_of_their_paths(tmp_path: Path) -> None:
    """Split 90/5/5 per cent, in order; hidden files and folders are not text."""
    for name, content in {
        "b.txt": b"ZY", "a/late.md": "é".encode() + b"w" * 8, "a/early": b"x" * 88,
        ".git/config": b"no", "a/.hidden": b"no",
    }.items():  # fmt: skip
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    whole = b"x" * 88 + "é".encode() + b"w" * 8 + b"ZY"
    data = load_data(text_of(tmp_path / "mine").data, None)
    assert isinstance(data, TextData)
    assert (data.name, data.label, data.symbols) == ("text", "mine", 256)
    parts = [spoken(part) for part in (data.train, data.valid, data.test)]
    assert parts == [whole[:90], whole[90:95], whole[95:]]
    alone = load_data(text_of(tmp_path / "mine" / "b.txt").data, None)
    assert isinstance(alone, TextData)
    assert spoken(alone.train) + spoken(alone.valid) + spoken(alone.test) == b"ZY"


def test_parts_of_a_text_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "2").write_bytes(b"two")
    (tmp_path / "train" / "1").write_bytes(b"one")
    (tmp_path / "test.txt").write_bytes(b"three")
    (tmp_path / "LICENSE").write_bytes(b"free")
    data = load_data(text_of(tmp_path).data, None)
    assert isinstance(data, TextData)
    assert [spoken(p) for p in (data.train, data.valid, data.test)] == [b"onetwo", b"", b"three"]


@pytest.mark.parametrize(
    "model",
    [
        {"name": "lstm_lm", "hidden": 6, "embedding": 5},
        {"name": "transformer_lm", "context": 8, "width": 8, "heads": 2, "layers": 1},
    ],
    ids=lambda model: model["name"],
)
def test_language_models_are_trained_on_own_text(model: dict[str, Any], tmp_path: Path) -> None:
    """One symbol over and over is learnt: less than the log2(3) bits of three symbols at random."""
    (tmp_path / "mine.txt").write_bytes(b"abc" * 400)
    sections = mapping(train={"epochs": 3, "optimizer": "adam", "lr": 0.03})
    sections |= {"model": model, "late_phase": LATE | {"start_epoch": 2, "members": 2}}
    sections["data"] = {"name": "text", "path": str(tmp_path / "mine.txt"), "batch_size": 4}
    sections["data"]["length"] = 8
    run = build(sections)
    assert open_task(run, Runtime()).classes == 3
    found = train(run, tmp_path / "run").result
    (bits,) = found.query("weights == 'averaged' and metric == 'bpc'")["value"]
    assert bits < math.log2(3)


def test_a_model_of_another_kind_of_data_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(b"abc" * 400)
    sections = mapping()
    sections["data"] = {"name": "text", "path": str(tmp_path / "mine.txt")}
    with pytest.raises(NQMError, match=r"'mlp' takes images, and the data are a text; .*lstm_lm"):
        plain_model(build(sections).model, open_task(build(sections), Runtime()))
    reading = build(mapping(model={"name": "lstm_lm"}))
    with pytest.raises(NQMError, match=r"'lstm_lm' takes a text, and the data are images; .*mlp"):
        plain_model(reading.model, open_task(reading, Runtime()))


def test_mistakes_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(b"abc" * 400)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.txt").write_bytes(b"abc")
    (tmp_path / "twice").mkdir()
    for name in ("test", "test.txt", "train"):
        (tmp_path / "twice" / name).write_bytes(b"abc")
    for path, words in {
        "empty": "empty holds no text", "half": "train and test, or neither; test is missing",
        "twice": "only one place may hold the part test; got test, test.txt",
        "none.txt": "data.path .*none.txt: no such file",
    }.items():  # fmt: skip
        with pytest.raises(NQMError, match=words):
            load_data(text_of(tmp_path / path).data, None)
    with pytest.raises(NQMError, match=r"data.size must be left out: a text has none; got 8"):
        load_data(text_of(file, size=8).data, None)
    for settings, words in (
        ({"augment": ["crop"]}, "data.augment"),
        ({"train_examples": 2000}, "data.train_examples must be at most the 1080 bytes"),
        ({"length": 1000}, "the text must have at least 2000 symbols"),
    ):
        with pytest.raises(NQMError, match=words):
            open_task(text_of(file, **settings), Runtime())
