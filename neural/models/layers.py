"""Parts shared by the image models: normalisation, initialisation, the head and its input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nqm.errors import NQMError, check_integer, check_number, suggest

Norm = Literal["batch", "group"]
NORMS = ("batch", "group")


def make_norm(kind: str, channels: int, groups: int | None = None) -> nn.Module:
    """Normalisation of a feature map of `channels` channels, with scale 1 and shift 0.

    Parameters
    ----------
    kind : {"batch", "group"}
        BatchNorm (eps 1e-5, momentum 0.1) or GroupNorm (Wu & He 2018).
    channels : int
        Channels of the input, ``(N, C, H, W)``.
    groups : int, optional
        Groups of a GroupNorm. By default each group has 8 channels, or all when 8 does not
        divide them.

    Returns
    -------
    Module

    Raises
    ------
    NQMError
        If the kind is unknown, or the groups do not divide the channels.
    """
    if kind == "batch":
        if groups is not None:
            raise NQMError(
                "groups belongs to norm='group'; got norm='batch'; leave one of them out"
            )
        return nn.BatchNorm2d(channels)
    if kind == "group":
        if groups is None:
            groups = channels // 8 if channels % 8 == 0 else 1
        check_integer("groups", groups, 1)
        if channels % groups:
            raise NQMError(
                f"groups must divide the {channels} channels of every layer; got {groups}"
                "; leave it out for groups of 8 channels"
            )
        return nn.GroupNorm(groups, channels)
    raise NQMError(f"norm must be 'batch' or 'group'; got {kind!r}{suggest(kind, NORMS)}")


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3x3 convolution without bias, padded by 1.

    Parameters
    ----------
    inputs, outputs : int
        Numbers of input and output channels.
    stride : int
        The output has height and width divided by `stride`, rounded up.

    Returns
    -------
    nn.Conv2d
        The layer, with torch's own initial weights.
    """
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Make a 1x1 convolution without bias: the projection of a shortcut.

    Parameters
    ----------
    inputs, outputs : int
        Numbers of input and output channels.
    stride : int
        The output has height and width divided by `stride`, rounded up.

    Returns
    -------
    nn.Conv2d
        The layer, with torch's own initial weights.
    """
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


def initialise_kaiming(model: nn.Module) -> None:
    """Draw Kaiming normal weights for convolutions and linear layers; set their biases to 0.

    He et al. 2015, eq. 10: standard deviation ``sqrt(2 / fan_in)``.

    Parameters
    ----------
    model : nn.Module
        Model whose ``Conv2d`` and ``Linear`` layers are changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def pad_channels(x: Tensor, channels: int, before: int = 0) -> Tensor:
    """Add channels of zeros before and after the channels of `x`.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Feature maps.
    channels : int
        Number of channels of the result; at least ``C + before``.
    before : int
        Number of zero channels before those of `x`; the others come after.

    Returns
    -------
    Tensor, shape (N, channels, H, W)
        The padded feature maps.
    """
    return nn.functional.pad(x, (0, 0, 0, 0, before, channels - x.shape[1] - before))


def pool(x: Tensor) -> Tensor:
    """Average feature maps over their positions.

    Parameters
    ----------
    x : Tensor, shape (N, C, H, W)
        Feature maps.

    Returns
    -------
    Tensor, shape (N, C)
        Mean of every channel.
    """
    return torch.mean(x, dim=(2, 3))


def blocks_per_group(model: str, depth: int, rule: int) -> int:
    """Return the number n of blocks in each of the three groups of a net of depth ``6 n + rule``.

    Parameters
    ----------
    model : str
        Name of the model, for the message.
    depth : int
        Number of layers; at least ``6 + rule``.
    rule : int
        The constant of the depth rule, 4 for wide ResNets, 2 for CIFAR's ResNets and PyramidNets.

    Returns
    -------
    int
        Blocks of one group, n.

    Raises
    ------
    NQMError
        If the depth is not of that form.
    """
    check_integer(f"{model}.depth", depth, 6 + rule)
    if (depth - rule) % 6:
        below = depth - (depth - rule) % 6
        raise NQMError(
            f"{model}.depth must be 6 n + {rule}; got {depth}; nearest: {below} and {below + 6}"
        )
    return (depth - rule) // 6


def check_image_model(model: str, classes: int, channels: int, dropout: float = 0.0) -> None:
    """Check the arguments that all image models share.

    Parameters
    ----------
    model : str
        Name of the model, for the message.
    classes, channels : int
        Numbers of classes and of image channels; at least 1.
    dropout : float
        Probability to drop an activation, in [0, 1).

    Raises
    ------
    NQMError
        If an argument is out of range.
    """
    check_integer(f"{model}.classes", classes, 1)
    check_integer(f"{model}.channels", channels, 1)
    check_number(f"{model}.dropout", dropout, low=0, high=1, closed_high=False)
