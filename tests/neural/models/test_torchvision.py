"""torchvision beside a CPU torch, and models taken from torchvision and timm."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from neural.models import _torchvision as compat
from neural.models import build
from nqm import NQMError
from tests.tiny_nets import size

ROOT = Path(compat.__file__).parents[2]
needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed"
)


def python(code: str, *folders: Path) -> str:
    """What a fresh interpreter prints; `folders` come first on its path."""
    start = f"import sys; sys.path[:0] = {[str(folder) for folder in (*folders, ROOT)]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


#: What torchvision does on import: describes an operator its compiled part should have declared.
BROKEN = """
import torch
from torchvision import submodule

@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold):
    return dets

@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold):
    return dets
"""


def fake_torchvision(folder: Path, source: str) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "submodule.py").write_text("print('loaded')\n")


def test_the_cure_on_a_package_broken_in_the_same_way(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, BROKEN)
    printed = python(
        """
try:
    import torchvision
    print("healthy")
except RuntimeError as error:
    print("nms does not exist" in str(error))
from neural.models._torchvision import import_torchvision
module = import_torchvision()
assert import_torchvision() is module is sys.modules["torchvision"]
import gc, torch
gc.collect()
print(torch.ops.torchvision.nms.default._schema)
""",
        tmp_path,
    ).splitlines()
    # The half-loaded submodule is loaded afresh by the second import, and only by that.
    assert printed == [
        "loaded",
        "True",
        "loaded",
        "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ]


@pytest.mark.slow
def test_nothing_happens_beside_a_healthy_torchvision(tmp_path: Path) -> None:
    fake_torchvision(tmp_path, "import torchvision.submodule\n")
    code = (
        "from neural.models import _torchvision as own; own.import_torchvision(); print(own._KEPT)"
    )
    assert python(code, tmp_path).split() == ["loaded", "[]"]


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('undefined symbol\\nmore')",
        pytest.param("raise ImportError('cannot import name')", marks=pytest.mark.slow),
        pytest.param("import torchvision.missing_part", marks=pytest.mark.slow),
    ],
)
def test_versions_that_do_not_fit(tmp_path: Path, source: str) -> None:
    fake_torchvision(tmp_path, source)
    code = """
from neural.models._torchvision import import_torchvision
from nqm import NQMError
try:
    import_torchvision()
except NQMError as error:
    print(error)
"""
    printed = python(code, tmp_path)
    assert printed.startswith(f"torchvision cannot be imported beside torch {torch.__version__} (")
    assert printed.endswith("; install the two versions released together\n")
    assert printed.count("\n") == 1


def test_torchvision_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(NQMError, match=r"pip install 'late-phase-nqm\[vision\]'"):
        compat.import_torchvision()
    with pytest.raises(NQMError, match=r"torchvision is not installed"):
        build("torchvision:resnet18", classes=10)


def test_names_of_the_package_load_neither_library() -> None:
    code = """
from neural.models import MODELS, build
build("resnet8", classes=10)
print([name for name in ("torchvision", "timm") if name in sys.modules])
"""
    assert python(code) == "[]\n"


@pytest.mark.slow
@needs_torchvision
def test_torchvision_and_those_who_import_it() -> None:
    others = [
        name for name in ("timm", "torchmetrics") if importlib.util.find_spec(name) is not None
    ]
    code = f"""
import importlib, torch
from neural.models._torchvision import import_torchvision
torchvision = import_torchvision()
for name in {others!r}:
    importlib.import_module(name)
from torchvision.transforms import v2
flipped = v2.functional.horizontal_flip(torch.arange(3.0).view(1, 1, 3))
print(flipped.flatten().tolist())
"""
    assert python(code) == "[2.0, 1.0, 0.0]\n"


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "published"),
    # "num_params" of the weights' own model cards
    [("resnet50", 25_557_032), ("resnet152", 60_192_808), ("densenet161", 28_681_000)],
)
def test_torchvision_models_have_their_published_sizes(name: str, published: int) -> None:
    assert size(f"torchvision:{name}", classes=1000) == published


@needs_torchvision
def test_torchvision_model_with_other_classes() -> None:
    model = build("torchvision:resnet18", classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features == 7


@needs_torchvision
@needs_timm
def test_timm_model_with_one_channel() -> None:
    model = build("timm:resnet18", classes=7, channels=1).eval()
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 7)


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt50", {}, "unknown model 'torchvision:resnt50'; did you mean 'resnet50'"),
        ("resnet18", {"channels": 1}, "takes images of 3 channels; got channels=1"),
        ("resnet18", {"nope": 1}, "option 'nope' cannot be set from a configuration"),
        ("resnet18", {"weights": "IMAGENET1K"}, "has no weights 'IMAGENET1K'; did you mean"),
        ("resnet18", {"weights": "IMAGENET1K_V1"}, "num_classes.*expected value 1000 but got 10"),
    ],
)
def test_mistakes_with_torchvision_are_one_line(name: str, options: Any, message: str) -> None:
    with pytest.raises(NQMError, match=message) as caught:
        build(f"torchvision:{name}", **{"classes": 10} | options)
    assert "\n" not in str(caught.value)


@needs_torchvision
def test_weights_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_: object, **__: object) -> ModuleType:
        raise OSError("no route\nto host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(NQMError, match=r"no route to host; weights .* need a network$"):
        build("torchvision:resnet18", classes=1000, weights="IMAGENET1K_V1")


@needs_torchvision
@needs_timm
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt18", {}, "unknown model 'timm:resnt18'; did you mean 'resnet18'"),
        ("resnet18.nope", {}, "cannot be built: .*nope"),
        ("resnet18", {"nope": True}, "option 'nope' cannot be set"),
    ],
)
def test_mistakes_with_timm_are_one_line(name: str, options: Any, message: str) -> None:
    with pytest.raises(NQMError, match=message) as caught:
        build(f"timm:{name}", **{"classes": 10} | options)
    assert "\n" not in str(caught.value)
