"""Write a model as a folder, and load it again.

The folder has the form of the Hugging Face hub::

    model.safetensors          weights, under the names of the architecture
    config.json                architecture, preprocessing, labels, metrics, how it was trained
    preprocessor_config.json   of images, as image processors of transformers read it
    README.md                  the model card
    model.pt2, model.onnx      programs, where they are asked for
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neural.models import build
from neural.serving import programs
from neural.serving.card import card
from neural.serving.preprocessing import check_preprocessing, image_processor, prepared, sample
from nqm import __version__
from nqm.errors import NQMError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
#: Options of models of other libraries that fetch weights, which are replaced anyway.
FETCH = ("weights", "pretrained")
#: Entries of ``config.json`` that are read.
ENTRIES = ("name", "architecture", "architectures", "preprocessing", "labels", "metrics")


@dataclass(frozen=True)
class Exported:
    """A model from a folder that `export_model` has written.

    Attributes
    ----------
    model : Module
        In evaluation mode, on the CPU.
    preprocessing : mapping or None
        See `export_model`.
    labels : tuple of str
        Names of the classes, in the order of the logits; empty if there are none.
    metrics : mapping of str to float
        As stated when it was exported.
    config : mapping
        All of ``config.json``.
    """

    model: nn.Module
    preprocessing: Mapping[str, Any] | None
    labels: tuple[str, ...]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]

    def prepare(self, inputs: Any) -> Tensor:
        """Make inputs of the model.

        Parameters
        ----------
        inputs : Tensor, ndarray, str or bytes
            Images (N, C, H, W) or (C, H, W) as uint8, of the size of training; or one text.

        Returns
        -------
        Tensor
            (N, C, H, W) in float32, or (1, L) symbols; on the CPU.

        Raises
        ------
        NQMError
            If the model has no preprocessing, or the inputs do not fit it.
        """
        return prepared(self.preprocessing, inputs)


def export_model(  # noqa: PLR0913 - options, by keyword
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "",
    architecture: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    license: str = "unknown",
    data: Mapping[str, str] | None = None,
    weights: str = "",
    training: Mapping[str, Any] | None = None,
    formats: Collection[str] = (),
    example: Callable[[int], Tensor] | None = None,
) -> Path:
    """Write a model as a folder that `load_exported` loads and that the Hugging Face hub takes.

    Parameters
    ----------
    model : Module
        A plain module, e.g. ``late.averaged()``.
    folder : str or Path
        Folder to make; an existing one is refused.
    name : str
        Title of the model card; the name of the folder by default.
    architecture : mapping, optional
        Arguments of `neural.models.build`: ``name``, ``classes``, and perhaps ``channels`` and
        options. Without it, `load_exported` must be given a module.
    preprocessing : mapping, optional
        Of images: ``{"kind": "images", "mean": (...), "std": (...), "size": (height, width)}``,
        constants in units of full brightness; ``"resize"`` is the shorter side before the centre
        is cut, where images are of any size. Of a text: ``{"kind": "text", "symbols": (...)}``,
        the byte of each symbol; ``"length"`` is that of a window in training.
    labels : sequence of str
        Names of the classes, in the order of the logits.
    metrics : mapping of str to float, optional
        Measured on the test set.
    license : str
        Identifier of the licence of the weights, as the hub has it, e.g. ``"apache-2.0"``.
    data : mapping, optional
        ``name`` and ``label`` of the data set.
    weights : str
        Which of a run's models it is, e.g. ``"averaged"``.
    training : mapping, optional
        How it was trained; values that JSON can hold.
    formats : collection of {"pt2", "onnx"}
        Programs to write beside the weights: `torch.export`, and ONNX (extra ``onnx``). They take
        prepared inputs of any number of rows.
    example : callable, optional
        Makes inputs of so many rows, on the CPU, for `formats`; by default from `preprocessing`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    NQMError
        If the folder exists, an argument does not fit, the architecture does not make such a model,
        or a program cannot be written or computes something else.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise NQMError(f"{folder} exists; move it away or choose another name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise NQMError(
            "license must be an identifier of the Hugging Face hub, e.g. apache-2.0, mit, "
            f"cc-by-4.0 or other; got {license!r}"
        )
    check_preprocessing(preprocessing)
    for one in formats:
        programs.check_format(one)
    example = sample(preprocessing) if example is None else example
    if formats and example is None:
        raise NQMError("formats need example, a function of a number of rows, or preprocessing")
    if architecture is not None:
        architecture = {n: value for n, value in architecture.items() if n not in FETCH}
    twin = None if architecture is None else build(**architecture)
    state = {n: value.detach().cpu() for n, value in model.state_dict().items()}
    if twin is not None and (reason := misfit(state, twin)):
        raise NQMError(f"architecture {architecture} is not that of the model: {reason}")
    config = {
        "name": name or folder.name,
        "architecture": None if architecture is None else dict(architecture),
        "architectures": [type(model).__name__],
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "labels": list(labels),
        "num_labels": len(labels),
        "id2label": {str(k): label for k, label in enumerate(labels)},
        "metrics": {n: float(value) for n, value in (metrics or {}).items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": None if data is None else dict(data),
        "weights": weights,
        "training": None if training is None else dict(training),
        "license": license,
        "library": f"late-phase-nqm {__version__}",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(made, model, state, config, formats, example)
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def _write(
    folder: Path,
    model: nn.Module,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    formats: Collection[str],
    example: Callable[[int], Tensor] | None,
) -> None:
    from safetensors.torch import save

    files = {WEIGHTS: "the weights", CONFIG: "architecture, preprocessing, labels, metrics"}
    # Tied weights share memory, which safetensors refuses.
    tensors = {n: value.contiguous().clone() for n, value in state.items()}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(_json(config))
    if (processor := image_processor(config["preprocessing"])) is not None:
        (folder / "preprocessor_config.json").write_text(_json(processor))
        files["preprocessor_config.json"] = "preprocessing of images, for transformers"
    for one in formats:
        assert example is not None
        what = {"pt2": "`torch.export.load(...).module()`", "onnx": "ONNX"}[one]
        path = folder / programs.FORMATS[one]
        takes = programs.write(one, _on_cpu(model), example, path)
        files[path.name] = f"{what}: prepared inputs -> logits; {takes}"
    (folder / "README.md").write_text(card(config, config["license"], files))


def _on_cpu(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def load_exported(folder: str | Path, model: nn.Module | None = None) -> Exported:
    """Load a model from a folder that `export_model` or ``nqm neural export`` has written.

    Parameters
    ----------
    folder : str or Path
        The folder.
    model : Module, optional
        A module of the class that was exported, whose weights are replaced. By default it is made
        by the architecture that the folder states.

    Returns
    -------
    Exported
        Model, preprocessing, labels and metrics.

    Raises
    ------
    NQMError
        If the folder is none of these, a file is damaged, the module is of another class, or names,
        shapes or kinds of the weights differ in anything.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from neural import export_model, load_exported
    >>> from neural.models import build
    >>> made = {"name": "mlp", "classes": 3, "channels": 1, "size": 4, "hidden": [8]}
    >>> out = Path(tempfile.mkdtemp()) / "small"
    >>> images = {"kind": "images", "mean": [0.5], "std": [0.25], "size": [4, 4]}
    >>> _ = export_model(build(**made), out, architecture=made, preprocessing=images)
    >>> served = load_exported(out)
    >>> served.model(served.prepare(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))).shape
    torch.Size([2, 3])
    """
    folder = Path(folder)
    config = _config(folder)
    kind = config["architectures"][0]
    if model is None:
        if config["architecture"] is None:
            raise NQMError(
                f"{folder} holds a {kind}, which is not made by name; give load_exported "
                f"model={kind}(...)"
            )
        model = build(**config["architecture"])
    elif not isinstance(model, nn.Module) or type(model).__name__ != kind:
        raise NQMError(f"{folder} holds the weights of a {kind}; got a {type(model).__name__}")
    state = _read(folder / WEIGHTS)
    if reason := misfit(state, model):
        raise NQMError(f"{folder / WEIGHTS} does not fit {kind}: {reason}")
    model.load_state_dict(state)
    return Exported(
        model.eval(),
        config["preprocessing"],
        tuple(config["labels"]),
        config["metrics"],
        config,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise NQMError(f"{folder} is not an exported model: it holds no {CONFIG}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NQMError(f"{path} cannot be read ({error!s:.100}); export the model again") from None
    missing = [entry for entry in ENTRIES if not isinstance(config, dict) or entry not in config]
    if missing:
        raise NQMError(
            f"{path} is not that of an exported model: it has no {missing[0]!r}; "
            "nqm neural export writes one"
        )
    check_preprocessing(config["preprocessing"])
    return dict(config)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise NQMError(f"{path} is missing; export the model again")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise NQMError(f"{path} is damaged ({error!s:.100}); export the model again") from None
    return state


def misfit(state: Mapping[Any, Any], model: nn.Module) -> str | None:
    """Tell in what a state dict differs from that of a model.

    Parameters
    ----------
    state : mapping
        What should be a state dict of the model.
    model : Module
        The model.

    Returns
    -------
    str or None
        The first difference, and the numbers of missing and unexpected names; None if it fits.
    """
    expected = model.state_dict()
    reasons = [_difference(name, state, expected) for name in {**expected, **state}]
    first = next(filter(None, reasons), None)
    if first is None:
        return None
    missing, unexpected = len(expected.keys() - state.keys()), len(state.keys() - expected.keys())
    counts = f" ({missing} missing, {unexpected} unexpected)" if missing + unexpected > 1 else ""
    return first + counts


def _difference(name: Any, state: Mapping[Any, Any], expected: Mapping[str, Tensor]) -> str | None:
    if not isinstance(name, str) or name not in expected:
        return f"it holds {name!r}, which the model does not have"
    if name not in state:
        return f"{name!r} is missing"
    value, own = state[name], expected[name]
    if not isinstance(value, Tensor):
        return f"{name!r} holds a {type(value).__name__}, no tensor"
    if value.shape != own.shape:
        return f"{name!r} has shape {tuple(value.shape)}, not {tuple(own.shape)}"
    real = value.is_floating_point() == own.is_floating_point()
    if not real or value.is_complex() != own.is_complex():
        return f"{name!r} is {value.dtype}, not {own.dtype}"
    return None
