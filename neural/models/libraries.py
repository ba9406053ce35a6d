"""Models of torchvision and timm by name, with their errors in one line."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from neural.compat import import_torchvision
from nqm.errors import NQMError, suggest

LIBRARIES = ("torchvision", "timm")


def build_from_library(
    library: str, name: str, *, classes: int, channels: int, **options: Any
) -> nn.Module:
    """A model of torchvision or timm.

    Parameters
    ----------
    library : {"torchvision", "timm"}
        Where to look.
    name : str
        As the library spells it: ``resnet50``, ``densenet161``.
    classes, channels : int
        Outputs, and channels of the images (torchvision: 3).
    **options
        Of the library's model. Pretrained weights, fetched where they are not in the cache:
        ``weights="IMAGENET1K_V1"`` (torchvision), ``pretrained=True`` (timm).

    Raises
    ------
    NQMError
        If the library or the model is unknown, an option is refused, or weights cannot be fetched.
    """
    if library not in LIBRARIES:
        raise NQMError(f"unknown library {library!r} of models{suggest(library, LIBRARIES)}")
    where = f"{library}:{name}"
    torchvision = import_torchvision()  # also for timm, which imports it
    if library == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
        create = torchvision.models.get_model
        if channels != 3:
            raise NQMError(f"{where} takes images of 3 channels; got channels={channels}; use timm")
    else:
        try:
            timm = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            raise NQMError(
                "timm is not installed; run: pip install 'late-phase-nqm[vision]'"
            ) from error
        known, create = timm.list_models(), timm.create_model
        options["in_chans"] = channels
    weights = options.get("weights")
    if library == "torchvision" and isinstance(weights, str) and name in known:
        choices = torchvision.models.get_model_weights(name).__members__
        if weights not in choices:
            raise NQMError(f"{where} has no weights {weights!r}{suggest(weights, choices)}")
    # timm spells pretrained weights as a tag after the name: resnet50.a1_in1k.
    if name.partition(".")[0] not in known:
        # The few nearest: the whole list of either library is hundreds of names.
        near = suggest(name, known)
        raise NQMError(f"unknown model {where!r}{near if near.startswith('; did') else ''}")
    try:
        model: nn.Module = create(name, num_classes=classes, **options)
    # Libraries and their download clients raise what they like; each becomes one line.
    except (TypeError, ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = ""
        if isinstance(error, OSError):
            fix = "; weights that are not in the local cache need a network"
        raise NQMError(f"{where} cannot be built: {reason}{fix}") from error
    return model
