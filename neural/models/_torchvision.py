"""torchvision beside a CPU build of torch, where its import fails by itself."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

from nqm.errors import NQMError

#: Operators whose schemas live in torchvision's compiled part, which a CPU torch cannot load.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: Declarations vanish with the object that made them, so it is kept for the life of the process.
_KEPT: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring first what a CPU build of torch leaves undeclared.

    The wheels on the package index are linked against CUDA. Beside a CPU build their compiled part
    does not load, and the import stops at "operator torchvision::nms does not exist". Models,
    data sets and transforms do not need that part: with the schemas declared they work, and so do
    the libraries that import torchvision themselves (timm, torchmetrics); call this before them.
    The compiled operators and image decoders stay missing. Where the plain import succeeds nothing
    else happens.

    Returns
    -------
    ModuleType
        ``torchvision``.

    Raises
    ------
    NQMError
        If torchvision is not installed, or cannot be imported for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            raise NQMError(
                "torchvision is not installed; run: pip install 'late-phase-nqm[vision]'"
            ) from error
        if "torchvision::nms does not exist" not in str(error) or _KEPT:
            reason = str(error).strip().partition("\n")[0]
            raise NQMError(
                f"torchvision cannot be imported beside torch {torch.__version__} ({reason})"
                "; install the two versions released together"
            ) from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _KEPT.append(library)
    return importlib.import_module("torchvision")
