"""Models by name: ``build("resnet20", classes=10)``."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from nqm.errors import NQMError, suggest
from nqm.keys import REQUIRED, omitted

__all__ = ["MODELS", "Family", "build"]


@dataclass(frozen=True)
class Family:
    """A family of models: its class, and the options in its name.

    Parameters
    ----------
    module, name : str
        Module in `neural.models`, and class; imported when a model is first built.
    description : str
        One line about the family.
    sizes : tuple of str
        Options set by numbers at the end of the name: ``wrn-28-10`` is depth 28, width 10.
    images : bool
        Whether the input is images (N, channels, H, W); else symbols (B, L).
    """

    module: str
    name: str
    description: str
    sizes: tuple[str, ...] = ()
    images: bool = True

    def load(self) -> type[nn.Module]:
        """Import the class.

        Returns
        -------
        type
            Class of the models.
        """
        loaded: type[nn.Module] = getattr(
            importlib.import_module(f"neural.models.{self.module}"), self.name
        )
        return loaded

    def options(self) -> tuple[str, ...]:
        """Return the names of the options that `build` accepts.

        Returns
        -------
        tuple of str
            Without ``classes`` and ``channels``.
        """
        names = inspect.signature(self.load()).parameters
        return tuple(name for name in names if name not in ("classes", "channels"))


#: Every family of this package by name.
MODELS: Mapping[str, Family] = MappingProxyType(
    {
        "resnet": Family(
            "resnet_cifar", "ResNetCifar", "CIFAR ResNet, as resnet8 .. resnet110", ("depth",)
        ),
        "wrn": Family("wide_resnet", "WideResNet", "wide ResNet, as wrn-28-10", ("depth", "width")),
        "pyramidnet": Family(
            "pyramidnet", "PyramidNet", "PyramidNet, as pyramidnet-110-270", ("depth", "alpha")
        ),
        "hyper_wrn": Family(
            "hyper_wrn",
            "HyperWideResNet",
            "wide ResNet with template banks, as hyper_wrn-28-10",
            ("depth", "width"),
        ),
        "fast_cnn": Family("fast_cnn", "FastCNN", "fast CIFAR net with a whitening first layer"),
        "digits_cnn": Family("small_cnn", "DigitsCNN", "14,000 parameters, for 8x8 digits"),
        "mlp": Family("small_cnn", "MLP", "multi-layer perceptron"),
        "lstm_lm": Family("lstm", "LSTMLanguageModel", "LSTM language model", images=False),
        "transformer_lm": Family(
            "transformer", "TransformerLanguageModel", "causal transformer", images=False
        ),
    }
)


#: Other forms of a model's name, and a line about each.
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "torchvision:NAME": "classifiers of torchvision, as torchvision:resnet50 (extra vision); "
        "names: torchvision.models.list_models()",
        "timm:NAME": "models of timm, as timm:resnet18 (extra vision); names: timm.list_models()",
        "package.module:Class": "a class of your own, found where Python finds modules",
    }
)


def family_of(name: str) -> Family | None:
    """Find the family of a model.

    Parameters
    ----------
    name : str
        As `build` takes it.

    Returns
    -------
    Family or None
        None for a model of another library, and for an unknown name.
    """
    match = re.fullmatch(_NAME, name)
    return MODELS.get(match[1]) if match else None


def option_defaults(name: str) -> dict[str, Any]:
    """Defaults of a model's options, as keys of runs leave them out.

    Parameters
    ----------
    name : str
        As `build` takes it.

    Returns
    -------
    dict of str to Any
        Empty for a model of another library, and for an unknown name.
    """
    family = family_of(name)
    if family is None:
        return {}
    made: Any = family.load()
    found = {option: omitted(made, option) for option in family.options()}
    return {option: value for option, value in found.items() if value is not REQUIRED}


#: A family and sizes: ``wrn-28-10``.
_NAME = r"([a-z_]+)((?:-?\d+)*)"
#: Every layer is an object, made before anything is counted.
DEEPEST = 10_000


def _check_kind(where: str, value: Any, hint: Any) -> None:
    """Raise NQMError unless a word is a word and a list a list; models check their numbers."""
    if get_origin(hint) is Sequence and not isinstance(value, list | tuple):
        raise NQMError(f"{where} must be a list; got {value!r:.60}")
    if get_origin(hint) is Literal and not isinstance(value, str):
        words = ", ".join(map(repr, get_args(hint)))
        raise NQMError(f"{where} must be one of {words}; got {value!r:.60}")


def build(name: str, *, classes: int, channels: int = 3, **options: Any) -> nn.Module:
    """A freshly initialised model.

    Parameters
    ----------
    name : str
        A key of `MODELS`, with sizes after it where the family takes them (``resnet20``,
        ``wrn-28-10``); ``torchvision:NAME`` or ``timm:NAME`` for a model of those libraries; or
        ``package.module:Class`` for a class of one's own.
    classes : int
        Outputs: classes of images, symbols of a text.
    channels : int
        Channels of the images; language models have none and ignore it.
    **options
        Options of the class, listed by ``MODELS[family].options()``.

    Returns
    -------
    nn.Module
        Maps images (N, channels, H, W) to logits (N, classes), or symbols (B, L) to logits
        (B, L, classes). Its last ``nn.Linear`` in order of registration is the output layer.

    Raises
    ------
    NQMError
        If the name or an option is unknown, or a value out of range.

    Examples
    --------
    >>> sum(p.numel() for p in build("resnet20", classes=10).parameters())
    269722
    """
    library, colon, rest = name.partition(":")
    if colon and rest.isidentifier() and library not in ("torchvision", "timm"):
        from neural.models.own import build_own

        return build_own(library, rest, classes=classes, channels=channels, **options)
    if colon:
        from neural.models.libraries import build_from_library

        return build_from_library(library, rest, classes=classes, channels=channels, **options)
    match = re.fullmatch(_NAME, name)
    family = MODELS.get(match[1]) if match else None
    if match is None or family is None:
        known = [*MODELS, "resnet20", "wrn-28-10"]
        raise NQMError(f"unknown model {name!r}{suggest(name, known)}")
    family_name = match[1]
    numbers = [int(number) for number in re.findall(r"\d+", match[2])]
    if len(numbers) > len(family.sizes):
        form = "".join(f"-{size.upper()}" for size in family.sizes)
        raise NQMError(f"unknown model {name!r}; expected {match[1]}{form}")
    sizes = dict(zip(family.sizes, numbers, strict=False))
    known_options = family.options()
    for option in options:
        if option not in known_options:
            raise NQMError(f"{name} has no option {option!r}{suggest(option, known_options)}")
        if option in sizes:
            raise NQMError(
                f"{option} of {name} is already {sizes[option]} by its name; got {option}="
                f"{options[option]!r}; leave one out"
            )
    hints = get_type_hints(family.load().__init__)
    for option, value in options.items():
        _check_kind(f"{family_name}.{option}", value, hints[option])
    for option in ("depth", "layers"):
        if isinstance(value := (options | sizes).get(option), int) and value > DEEPEST:
            raise NQMError(f"{family_name}.{option} must be at most {DEEPEST}; got {value!s:.40}")
    images = {"channels": channels} if family.images else {}
    return family.load()(classes=classes, **images, **sizes, **options)
