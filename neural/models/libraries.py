"""Models of torchvision and timm by name, with their errors in one line."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from neural.models._torchvision import import_torchvision
from nqm.errors import NQMError, suggest

LIBRARIES = ("torchvision", "timm")
#: Options that may be set: numbers and words of an architecture, and whether its library's own
#: weights are loaded. Others name files, addresses or code, and options come with runs from
#: elsewhere.
OPTIONS: dict[str, tuple[str, ...]] = {
    "torchvision": (
        "weights", "attention_dropout", "aux_logits", "drop_rate", "dropout", "groups",
        "growth_rate", "image_size", "memory_efficient", "replace_stride_with_dilation",
        "representation_size", "stochastic_depth_prob", "transform_input", "width_mult",
        "width_per_group", "zero_init_residual",
    ),
    "timm": (
        "pretrained", "act_layer", "attn_drop_rate", "base_width", "bn_eps", "bn_momentum",
        "cardinality", "channel_multiplier", "class_token", "depth", "depth_multiplier", "depths",
        "dims", "drop_block_rate", "drop_path_rate", "drop_rate", "embed_dim", "global_pool",
        "img_size", "init_values", "mlp_ratio", "norm_layer", "num_heads", "output_stride",
        "patch_drop_rate", "patch_size", "pos_drop_rate", "proj_drop_rate", "qkv_bias",
        "stem_type", "stem_width", "window_size", "zero_init_last",
    ),
}  # fmt: skip


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
        Of the library's model, those in `OPTIONS`. Pretrained weights, fetched where they are not
        in the cache: ``weights="IMAGENET1K_V1"`` (torchvision), ``pretrained=True`` (timm).

    Returns
    -------
    Module

    Raises
    ------
    NQMError
        If the library or the model is unknown, an option is refused, or weights cannot be fetched.
    """
    if library not in LIBRARIES:
        raise NQMError(f"unknown library {library!r} of models{suggest(library, LIBRARIES)}")
    where = f"{library}:{name}"
    _check_options(where, library, options)
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
        with _plain_tensors():
            model: nn.Module = create(name, num_classes=classes, **options)
    # Libraries and their download clients raise what they like; each becomes one line.
    except (TypeError, ValueError, KeyError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = ""
        if isinstance(error, OSError):
            fix = "; weights that are not in the local cache need a network"
        raise NQMError(f"{where} cannot be built: {reason}{fix}") from error
    return model


def _check_options(where: str, library: str, options: dict[str, Any]) -> None:
    """Raise NQMError on an option that is not one of `OPTIONS`, or no plain value."""
    for name, value in options.items():
        if name not in OPTIONS[library]:
            near = suggest(name, OPTIONS[library])
            raise NQMError(f"{where}: option {name!r} cannot be set from a configuration{near}")
        entries = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(one, bool | int | float | str) for one in entries):
            raise NQMError(
                f"{where}: {name} must be a number, a word, true or false, or a list of them; "
                f"got {value!r:.60}"
            )
    if not isinstance(options.get("pretrained", False), bool):
        raise NQMError(f"{where}: pretrained must be true or false; got {options['pretrained']!r}")
    weights = options.get("weights", "")
    if not isinstance(weights, str):
        raise NQMError(f"{where}: weights must be a name, as IMAGENET1K_V1; got {weights!r:.60}")


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Have torch refuse weights that hold anything but tensors, whatever a library asks it for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
