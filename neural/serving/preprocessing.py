"""From images or text to inputs of a model, by what its folder states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural.data.augment import normalise
from nqm.errors import NQMError

#: Kind of preprocessing -> its entries.
KINDS = {"images": {"mean", "std", "size"}, "text": {"symbols"}}
#: Kind -> entries that it may have besides: the shorter side, pixels, to which an image is scaled
#: before its central part is cut; symbols of a window in training.
MORE = {"images": {"resize"}, "text": {"length"}}


def check_preprocessing(preprocessing: Mapping[str, Any] | None) -> None:
    """Check that preprocessing is complete.

    Parameters
    ----------
    preprocessing : mapping or None
        See `neural.export_model`.

    Raises
    ------
    NQMError
        If an entry is missing, unknown, or of the wrong form.
    """
    if preprocessing is None:
        return
    if not isinstance(preprocessing, Mapping) or preprocessing.get("kind") not in KINDS:
        raise NQMError(
            f"preprocessing.kind must be one of {', '.join(KINDS)}; got {preprocessing!r:.80}"
        )
    kind = preprocessing["kind"]
    given, known = set(preprocessing) - {"kind"} - MORE[kind], KINDS[kind]
    if given != known:
        raise NQMError(
            f"preprocessing of {kind} has the entries {', '.join(sorted(known))}; "
            f"got {', '.join(sorted(given)) or 'none'}"
        )
    if kind == "images":
        mean, std, size = (tuple(preprocessing[name]) for name in ("mean", "std", "size"))
        if len(mean) != len(std) or not mean or min(std) <= 0.0 or len(size) != 2:
            raise NQMError(
                "preprocessing: mean and std must have one number for each channel, std > 0, and "
                f"size be (height, width); got {mean}, {std} and {size}"
            )


def prepared(preprocessing: Mapping[str, Any] | None, inputs: Any) -> Tensor:
    """Make inputs of a model.

    Parameters
    ----------
    preprocessing : mapping or None
        See `neural.export_model`.
    inputs : Tensor, ndarray, str or bytes
        See `neural.serving.folder.Exported.prepare`.

    Returns
    -------
    Tensor
        On the CPU.

    Raises
    ------
    NQMError
        If there is no preprocessing, or the inputs do not fit it.
    """
    if preprocessing is None:
        raise NQMError("this model was exported without preprocessing; give its inputs to `model`")
    if preprocessing["kind"] == "text":
        return _symbols(preprocessing["symbols"], inputs)
    return _images(preprocessing, inputs)


def _images(preprocessing: Mapping[str, Any], inputs: Any) -> Tensor:
    pixels = torch.from_numpy(inputs) if isinstance(inputs, np.ndarray) else inputs
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
        got = str(pixels.dtype) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise NQMError(f"images must be a tensor or array of uint8, 0 to 255; got {got}")
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    shape = (len(preprocessing["mean"]), *preprocessing["size"])
    if tuple(pixels.shape[1:]) != shape:
        raise NQMError(
            f"images must be (N, {', '.join(map(str, shape))}), as in training; "
            f"got {tuple(pixels.shape)}"
        )
    return normalise(pixels.cpu(), preprocessing["mean"], preprocessing["std"])


def _symbols(symbols: list[int], inputs: Any) -> Tensor:
    if not isinstance(inputs, str | bytes):
        raise NQMError(f"text must be str or bytes; got {type(inputs).__name__}")
    raw = inputs.encode() if isinstance(inputs, str) else inputs
    number = {byte: k for k, byte in enumerate(symbols)}
    unknown = sorted(set(raw) - set(number))
    if unknown:
        raise NQMError(
            f"text has the byte {bytes(unknown[:1])!r}, which did not occur in the training text"
        )
    return torch.tensor([[number[byte] for byte in raw]], dtype=torch.int64)


def sample(preprocessing: Mapping[str, Any] | None) -> Callable[[int], Tensor] | None:
    """Make a function of a number of rows that makes random inputs.

    Parameters
    ----------
    preprocessing : mapping or None
        See `neural.export_model`.

    Returns
    -------
    callable or None
        None without preprocessing.
    """
    if preprocessing is None:
        return None
    generator = torch.Generator().manual_seed(0)

    def images(rows: int) -> Tensor:
        shape = (rows, len(preprocessing["mean"]), *preprocessing["size"])
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return normalise(pixels, preprocessing["mean"], preprocessing["std"])

    def text(rows: int) -> Tensor:
        shape = (rows, preprocessing.get("length", 16))
        return torch.randint(len(preprocessing["symbols"]), shape, generator=generator)

    return images if preprocessing["kind"] == "images" else text


def image_processor(preprocessing: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Content of ``preprocessor_config.json``, which image processors of transformers read.

    Parameters
    ----------
    preprocessing : mapping or None
        See `neural.export_model`.

    Returns
    -------
    dict of str to object, or None
        None for anything but images.
    """
    if preprocessing is None or preprocessing["kind"] != "images":
        return None
    height, width = preprocessing["size"]
    size, resize = {"height": height, "width": width}, preprocessing.get("resize")
    constants = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }
    if resize is None:
        return {"image_processor_type": "ViTImageProcessor", "do_resize": False, "size": size} | (
            constants
        )
    # The one that scales the shorter side and cuts the central square; 2 is PIL's bilinear.
    cut = {"do_center_crop": True, "crop_size": size, "do_resize": True, "resample": 2}
    scaled = {"size": {"shortest_edge": resize}}
    return {"image_processor_type": "CLIPImageProcessor"} | cut | scaled | constants
