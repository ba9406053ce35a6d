"""Models as folders: what is written, what loads it again, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neural import LatePhase, export_model, load_exported
from neural.data import evaluation_batches, load, load_images
from neural.evaluate import classification_metrics
from neural.models import build
from neural.training.experiment import run_experiment
from neural.training.export import export_run
from neural.training.load_run import reopen
from nqm import NQMError
from nqm.cli import main
from tests.tiny_nets import net
from tests.tiny_runs import CNN, LATE, recipe

MLP: dict[str, Any] = {"name": "mlp", "classes": 3, "channels": 2, "size": 4, "hidden": [5]}
IMAGES: dict[str, Any] = {
    "kind": "images", "mean": [0.5, 0.25], "std": [0.2, 0.4], "size": [4, 4],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    arms = {
        "late": {"late_phase": LATE},
        "swa": {"average": {"method": "swa", "start_epoch": 1}},
    }
    run_experiment(recipe(arms, model=CNN), out, seeds=[0])
    return out


def pixels(rows: int = 3) -> Tensor:
    return torch.randint(256, (rows, 2, 4, 4), dtype=torch.uint8)


# ------------------------------------------------------------------ of a run


@pytest.mark.parametrize(("arm", "weights"), [("late", "averaged"), ("swa", "swa")])
def test_a_run_is_served_as_it_was_measured(arm: str, weights: str, runs: Path, tmp_path: Path):
    """From the bytes of the test images: logits, accuracy and all metrics of the run's table."""
    words = ["neural", "export", str(runs / arm / "seed0"), "--out", str(tmp_path / "served"),
             "--license", "cc-by-4.0", "--format", "pt2"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    served = load_exported(tmp_path / "served")
    digits = load_images("digits")
    test = digits.test.subset(60)
    inputs = served.prepare(test.pixels)
    (expected, labels), = evaluation_batches(test, 60, digits.mean, digits.std)  # fmt: skip
    assert torch.equal(inputs, expected)
    with torch.no_grad():
        logits = served.model(inputs)
        assert torch.equal(logits, reopen(runs / arm / "seed0").model.eval()(inputs))
        program = torch.export.load(tmp_path / "served" / "model.pt2").module()
        torch.testing.assert_close(program(inputs), logits)
    found = classification_metrics(logits, labels)
    assert served.metrics.keys() == found.keys()
    for name, value in served.metrics.items():
        # Sums over other batches, and an error of calibration that jumps where a bin ends.
        assert value == pytest.approx(found[name], rel=1e-5), name
    assert served.labels == tuple("0123456789")
    assert served.config["weights"] == weights
    assert served.config["training"]["train"]["epochs"] == 3
    front, _, text = (tmp_path / "served" / "README.md").read_text()[4:].partition("\n---\n")
    assert "license: cc-by-4.0" in front.replace('"', "")
    assert f"the single model `{weights}`" in text
    assert "(first 60 test examples)" in text
    yaml = pytest.importorskip("yaml")
    stated = yaml.safe_load(front)
    assert (stated["license"], stated["pipeline_tag"]) == ("cc-by-4.0", "image-classification")
    (result,) = stated["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == served.metrics


def test_a_member_of_a_run(runs: Path, tmp_path: Path):
    opened = reopen(runs / "late" / "seed0")
    assert opened.late is not None
    served = load_exported(export_run(runs / "late" / "seed0", tmp_path / "one", member=2))
    for name, value in opened.late.member(2).state_dict().items():
        assert torch.equal(served.model.state_dict()[name], value)
    from nqm.table import read_table

    table = read_table(runs / "late" / "seed0" / "result.parquet")
    own = table[(table["weights"] == "member") & (table["member"] == 2)]
    assert served.metrics == dict(zip(own["metric"], own["value"], strict=True))
    with pytest.raises(NQMError, match="has no members; leave --member out"):
        export_run(runs / "swa" / "seed0", tmp_path / "two", member=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_text_model_of_a_run(tmp_path: Path):
    text = recipe(
        {"base": {}}, data={"name": "python_docs", "batch_size": 4, "length": 8,
                            "train_examples": 200, "test_examples": 50},
        model={"name": "lstm_lm", "hidden": 6, "embedding": 4}, train={"epochs": 1, "lr": 0.1},
    )  # fmt: skip
    run_experiment(text, tmp_path / "run", seeds=[0])
    run = tmp_path / "run" / "base" / "seed0"
    served = load_exported(export_run(run, tmp_path / "text", formats=["pt2"]))
    data: Any = load("python_docs")
    raw, numbered = bytes(data.test[:40].tolist()), data.compact().test[:40]
    assert torch.equal(served.prepare(raw), numbered[None].long())
    assert torch.equal(served.prepare(raw.decode()), numbered[None].long())
    with torch.no_grad():
        expected = reopen(run).model.eval()(numbered[None].long())
        assert torch.equal(served.model(served.prepare(raw)), expected)
        # Torch unrolls a recurrent layer: the program is one of eight symbols, those of training.
        assert "any number of rows, each of 8 symbols" in (tmp_path / "text/README.md").read_text()
        program = torch.export.load(tmp_path / "text" / "model.pt2").module()
        torch.testing.assert_close(program(numbered[None, :8].long()), expected[:, :8])
    with pytest.raises(NQMError, match=r"text has the byte b'\\x00', which did not occur"):
        served.prepare(b"a\0")
    with pytest.raises(NQMError, match="text must be str or bytes; got list"):
        served.prepare([1, 2])


# ------------------------------------------------------------------ of a loop of one's own


class Tied(nn.Module):
    """One weight under two names, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(x)).relu())


@pytest.mark.parametrize("make", [net, Tied])
def test_a_model_of_ones_own(make: Callable[[], nn.Module], tmp_path: Path):
    torch.manual_seed(0)
    single = LatePhase(make(), 3, "norm", noise=0.5).averaged()
    with torch.no_grad():
        single.train()(torch.randn(6, 4))  # statistics of its own
    out = export_model(
        single, tmp_path / "own", formats=["pt2"], example=lambda n: torch.randn(n, 4)
    )
    torch.manual_seed(1)
    served = load_exported(out, make())
    x = torch.randn(7, 4)
    with torch.no_grad():
        expected = single.eval()(x)
        assert torch.equal(served.model(x), expected)
        torch.testing.assert_close(torch.export.load(out / "model.pt2").module()(x), expected)
    assert served.preprocessing is None
    with pytest.raises(NQMError, match=rf"give load_exported model={type(single).__name__}\("):
        load_exported(out)
    with pytest.raises(NQMError, match=rf"holds the weights of a {type(single).__name__}; got a M"):
        load_exported(out, build(**MLP))
    with pytest.raises(NQMError, match="exported without preprocessing"):
        served.prepare(x)


def test_images_are_prepared_by_hand():
    """(value / 255 - mean) / std of each channel, one image or several, tensors or arrays."""
    from neural.serving.preprocessing import prepared

    given = pixels()
    expected = (given.numpy() / 255 - np.reshape([0.5, 0.25], (2, 1, 1))) / np.reshape(
        [0.2, 0.4], (2, 1, 1)
    )
    for one in (given, given.numpy()):
        np.testing.assert_allclose(prepared(IMAGES, one), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prepared(IMAGES, given[0]), expected[:1], rtol=1e-5, atol=1e-6)
    for wrong, told in (
        (given.float(), r"images must be a tensor or array of uint8.*; got torch\.float32"),
        (given[:, :1], r"images must be \(N, 2, 4, 4\), as in training; got \(3, 1, 4, 4\)"),
        ([1], "got list"),
    ):
        with pytest.raises(NQMError, match=told):
            prepared(IMAGES, wrong)


def test_a_program_of_a_transformer_takes_texts_of_any_length(tmp_path: Path):
    made = {"name": "transformer_lm", "classes": 9, "layers": 1, "width": 8, "heads": 2}
    model = build(**made)
    text = {"kind": "text", "symbols": list(b"abcdefghi")}
    out = export_model(model, tmp_path / "t", architecture=made, preprocessing=text,
                       formats=["pt2"])  # fmt: skip
    assert "any number of rows, of any length" in (out / "README.md").read_text()
    given = load_exported(out).prepare("badge")
    assert given.tolist() == [[1, 0, 3, 6, 4]]
    with torch.no_grad():
        program = torch.export.load(out / "model.pt2").module()
        torch.testing.assert_close(program(given), model.eval()(given))


# ------------------------------------------------------------------ strict


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export_model(build(**MLP), tmp_path / "mlp", architecture=MLP, preprocessing=IMAGES)


def state_changed(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        first = next(iter(state))
        for what, value in changes.items():
            name = first if what == "first" else what
            if value is None:
                del state[name]
            else:
                state[name] = value
        save_file(state, folder / "model.safetensors")

    return edit


def config_changed(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        kept = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), "safetensors is missing; ex"),
    "weights cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0"), "safetensors is damaged"
    ),
    "a name missing": (state_changed(first=None), "does not fit MLP: '.*' is missing"),
    "a name too many": (
        state_changed(more=torch.zeros(1)), "it holds 'more', which the model does not have"
    ),
    "another name": (
        state_changed(first=None, more=torch.zeros(1)), r"is missing \(1 missing, 1 unexpected\)"
    ),
    "a shape": (state_changed(first=torch.zeros(9)), r"has shape \(9,\), not"),
    "a kind": (
        state_changed(first=torch.zeros(5, dtype=torch.long)), r"(has shape|is torch\.int64, not)"
    ),
    "another architecture": (
        config_changed(architecture={**MLP, "hidden": [6]}), r"does not fit MLP: .* has shape"
    ),
    "no architecture of ours": (
        config_changed(architecture={**MLP, "name": "mpl"}), "unknown model 'mpl'; did you mean"
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "not an exported model: it holds no"),
    "config cut": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "config of another library": (config_changed(architecture=...), "it has no 'architecture'"),
    "preprocessing": (
        config_changed(preprocessing={"kind": "images", "mean": [0.5]}),
        "preprocessing of images has the entries mean, size, std; got mean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_told_in_one_line(name: str, folder: Path):
    damage, told = DAMAGES[name]
    damage(folder)
    with pytest.raises(NQMError, match=told) as error:
        load_exported(folder)
    assert "\n" not in str(error.value)


class Fixed(nn.Module):
    """Reads a number of its input: no program of any number of rows has that."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.sum())


class Rows(nn.Module):
    """Gives other logits for other numbers of rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0 if len(x) == 2 else x


REFUSED: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "licence": (net(), {"license": "Apache 2"}, "license must be an identifier .*; got 'Apache 2'"),
    "format": (net(), {"formats": ["tflite"]}, "format must be one of pt2, onnx; got 'tflite'"),
    "no example": (net(), {"formats": ["pt2"]}, "formats need example"),
    "architecture": (
        net(), {"architecture": MLP}, "architecture .* is not that of the model: .*missing"
    ),
    "preprocessing": (net(), {"preprocessing": {"kind": "sound"}}, "kind must be one of images"),
    "std": (
        net(), {"preprocessing": {**IMAGES, "std": [0.0, 1.0]}}, "std > 0, and size be"
    ),
    "a number of the input": (
        Fixed(), {"formats": ["pt2"], "example": lambda n: torch.randn(n, 4)},
        r"format pt2: Fixed cannot be written \(",
    ),
    "other rows": (
        Rows(), {"formats": ["pt2"], "example": lambda n: torch.ones(n, 4)},
        r"format pt2: (Rows cannot be written|the program's logits of 5 rows are not the model's)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_leaves_nothing(name: str, tmp_path: Path):
    model, options, told = REFUSED[name]
    with pytest.raises(NQMError, match=told) as error:
        export_model(model, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(NQMError, match="out exists; move it away"):
        export_model(net(), tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "x.safetensors", "--license", "mit"], "--license is for a folder; got --out x."),
        (["--out", "x.safetensors", "--format", "pt2"], "--format is for a folder"),
        (["--out", "x.onnx"], "must end in .safetensors"),
        (["--out", "x", "--for", "mergekit", "--license", "mit"], "--license is for exporting one"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], told: str, runs: Path):
    done = CliRunner().invoke(main, ["neural", "export", str(runs / "late" / "seed0"), *words])
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_onnx_is_the_model(tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = {"name": "resnet8", "classes": 3, "channels": 2}
    model = build(**made)
    images = {**IMAGES, "size": [8, 8]}
    with torch.no_grad():  # statistics of its own
        model(torch.randn(6, 2, 8, 8))
    out = export_model(model, tmp_path / "m", preprocessing=images, formats=["onnx"])
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 2, 8, 8)
    (found,) = session.run(None, {"inputs": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is not None, reason="onnx is there")
def test_onnx_names_its_extra(tmp_path: Path):
    with pytest.raises(NQMError, match=r"format onnx needs onnx\w*: pip install .*\[onnx\]"):
        export_model(net(), tmp_path / "out", formats=["onnx"], example=lambda n: torch.ones(n, 4))


@pytest.mark.parametrize("resize", [None, 40])
def test_image_processors_of_transformers_do_the_same(resize: int | None, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from neural.data.folder import evaluation_view
    from neural.serving.preprocessing import prepared

    images = {
        "kind": "images", "mean": [0.5, 0.3, 0.2], "std": [0.2, 0.4, 0.3], "size": [32, 32],
    } | ({} if resize is None else {"resize": resize})  # fmt: skip
    out = export_model(net(), tmp_path / "m", preprocessing=images)
    processor = transformers.AutoImageProcessor.from_pretrained(str(out))
    shape = (32, 32, 3) if resize is None else (57, 80, 3)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 5, 5), shape[:2], mode="bicubic").clamp(0, 1)  # fmt: skip
    array = (255 * smooth[0].permute(1, 2, 0)).byte().numpy()
    view = array
    if resize is not None:
        view = np.asarray(evaluation_view(Image.fromarray(array), 32, resize))
    expected = prepared(images, torch.from_numpy(view.copy()).permute(2, 0, 1))
    found = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    # One of 255 steps of brightness, where rounding after a resize differs.
    assert (found - expected).abs().max() <= (1e-5 if resize is None else 1.01 / 255 / 0.2)
