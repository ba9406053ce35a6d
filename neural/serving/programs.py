"""A model as a program that runs without its source: torch.export (.pt2) and ONNX.

Both take inputs that are prepared already, and any number of rows. A written program is run on
another number of rows than it was traced with, and compared with the model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nqm.errors import NQMError

#: Largest difference of logits, relative to their largest size: other kernels in float32.
TOLERANCE = 1e-4
#: Name of a format -> name of its file.
FORMATS = {"pt2": "model.pt2", "onnx": "model.onnx"}
#: Numbers of rows: of the example, and of the comparison.
ROWS, OTHER_ROWS = 2, 5


def check_format(name: str) -> None:
    """Check that a format can be written.

    Parameters
    ----------
    name : str
        One of `FORMATS`.

    Raises
    ------
    NQMError
        If it is unknown, or packages that it needs are not installed.
    """
    if name not in FORMATS:
        raise NQMError(f"format must be one of {', '.join(FORMATS)}; got {name!r}")
    needs = ("onnx", "onnxscript") if name == "onnx" else ()
    for package in needs:
        if find_spec(package) is None:
            raise NQMError(f"format onnx needs {package}: pip install 'late-phase-nqm[onnx]'")


def write(name: str, model: nn.Module, inputs: Callable[[int], Tensor], path: Path) -> str:
    """Write a model as a program, and compare the two.

    Parameters
    ----------
    name : str
        One of `FORMATS`.
    model : Module
        In evaluation mode.
    inputs : callable
        Makes inputs of so many rows.
    path : Path
        File to write.

    Returns
    -------
    str
        What the program takes.

    Raises
    ------
    NQMError
        If the model cannot be written so, or the program computes something else.
    """
    make = _pt2 if name == "pt2" else _onnx
    try:
        with _quiet():
            run = make(model, inputs(ROWS), path)
    except Exception as error:  # whatever the tracer meets in the model
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(
            f"format {name}: {type(model).__name__} cannot be written ({reason:.150})"
        ) from None
    given = inputs(OTHER_ROWS)
    rows = "any number of rows"
    if run is None:
        return rows
    if not _same(model, run, given):
        path.unlink()
        raise NQMError(
            f"format {name}: the program's logits of {OTHER_ROWS} rows are not the model's; the "
            "model may depend on the number of rows"
        )
    if not _is_text(given):
        return rows
    try:
        if _same(model, run, given[:, 1:]):
            return f"{rows}, of any length"
    except Exception:  # whatever the runtime says of a length it was not made for
        pass
    return f"{rows}, each of {given.shape[1]} symbols"


@torch.no_grad()
def _same(model: nn.Module, run: Callable[[Tensor], Tensor], given: Tensor) -> bool:
    """Whether a program's logits are those of the model."""
    expected, found = model(given), run(given)
    near = TOLERANCE * float(expected.abs().max())
    return found.shape == expected.shape and torch.allclose(
        found, expected, rtol=TOLERANCE, atol=near
    )


def _is_text(inputs: Tensor) -> bool:
    return inputs.ndim == 2 and not inputs.is_floating_point()


def _shapes(example: Tensor) -> tuple[dict[int, Any]]:
    """The axes whose length may change; of a text's length the tracer finds out by itself."""
    shapes: dict[int, Any] = {0: torch.export.Dim("rows", min=1)}
    return (shapes | {1: torch.export.Dim.AUTO} if _is_text(example) else shapes,)


def _pt2(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (example,), dynamic_shapes=_shapes(example))
    torch.export.save(program, path)
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _onnx(model: nn.Module, example: Tensor, path: Path) -> Callable[[Tensor], Tensor] | None:
    torch.onnx.export(
        model,
        (example,),
        path,
        input_names=["inputs"],
        output_names=["logits"],
        dynamic_shapes=_shapes(example),
        external_data=False,
        verbose=False,
    )
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(given: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"inputs": given.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress, warnings and log."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
