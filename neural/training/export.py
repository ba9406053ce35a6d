"""Export a finished run as a folder that can be served."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neural.data import FolderBatches, ImageBatches, TextData, load
from neural.serving.folder import export_model
from neural.training.config import RunConfig, describe
from neural.training.load_run import Opened, reopen
from neural.training.report import single_name
from neural.training.task import Runtime
from nqm.errors import NQMError
from nqm.table import read_table


def export_run(
    folder: str | Path,
    out: str | Path,
    *,
    member: int | None = None,
    license: str = "unknown",
    formats: Collection[str] = (),
    root: Path | None = None,
) -> Path:
    """Write a run's single model, or one member, with preprocessing, metrics and a model card.

    Parameters
    ----------
    folder : str or Path
        Folder of a finished run.
    out : str or Path
        Folder to make; an existing one is refused.
    member : int, optional
        Number of the member, from 0; the single model by default.
    license : str
        Identifier of the licence of the weights, as the Hugging Face hub has it.
    formats : collection of {"pt2", "onnx"}
        Programs to write beside the weights.
    root : Path, optional
        Folder of the data files.

    Returns
    -------
    Path
        The folder, for `neural.load_exported`.

    Raises
    ------
    NQMError
        If the run or its data cannot be read, or as `neural.export_model`.
    """
    opened = reopen(folder, Runtime(root=root))
    name = single_name(opened.run)
    model: nn.Module = opened.model
    if member is not None:
        if opened.late is None:
            raise NQMError(f"the run in {folder} has no members; leave --member out")
        model = opened.late.member(member)
    run, task = opened.run, opened.task
    part = run.data.test_examples  # all of them by default
    label = task.label if part is None else f"{task.label} (first {part} test examples)"
    architecture = {
        "name": run.model.name, "classes": task.classes, "channels": task.channels,
        **run.model.options,
    }  # fmt: skip
    return export_model(
        model.eval(),
        out,
        architecture=architecture,
        preprocessing=_preprocessing(opened, root),
        labels=_labels(opened),
        metrics=_metrics(Path(folder), name, member),
        license=license,
        data={"name": run.data.name, "label": label},
        weights=name if member is None else f"member {member}",
        training=describe(run),
        formats=formats,
    )


def _preprocessing(opened: Opened, root: Path | None) -> dict[str, Any]:
    """Constants of training."""
    stream = opened.task.stream
    if isinstance(stream, ImageBatches):
        size = stream.images.pixels.shape[2:]
        return _images(stream.mean, stream.std, size)
    if isinstance(stream, FolderBatches):
        square = (stream.size, stream.size)
        return _images(stream.mean, stream.std, square) | {"resize": stream.resize}
    length = opened.run.data.length
    return {"kind": "text", "symbols": _symbols(opened.run, root), "length": length}


def _images(mean: Tensor, std: Tensor, size: Sequence[int]) -> dict[str, Any]:
    return {"kind": "images", "mean": mean.tolist(), "std": std.tolist(), "size": list(size)}


def _labels(opened: Opened) -> list[str]:
    """Names of the classes; their numbers where the data set has no names."""
    if opened.task.channels == 0:
        return []
    names = getattr(getattr(opened.task.stream, "images", None), "names", None)
    return [str(name) for name in names or range(opened.task.classes)]


def _symbols(run: RunConfig, root: Path | None) -> list[int]:
    data = load(run.data.name, root)
    assert isinstance(data, TextData)
    parts = (data.train, data.valid, data.test)
    return sorted({byte for part in parts for byte in torch.unique(part).tolist()})


def _metrics(folder: Path, name: str, member: int | None) -> dict[str, float]:
    """Test metrics of the model in the run's results."""
    table = read_table(folder / "result.parquet")
    chosen = (table["weights"] == name) if member is None else (table["weights"] == "member")
    chosen &= (table["data"] == "test") & (table["member"] == (-1 if member is None else member))
    rows = table[chosen]
    return dict(zip(rows["metric"], rows["value"].astype(float), strict=True))
