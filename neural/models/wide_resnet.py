"""Wide residual nets (Zagoruyko & Komodakis 2016), the CIFAR network of the late-phase paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neural.models.layers import (
    Norm,
    blocks_per_group,
    check_image_model,
    conv1x1,
    conv3x3,
    initialise_kaiming,
    make_norm,
    pool,
)
from nqm.errors import check_integer


class PreactivationBlock(nn.Module):
    """Norm-ReLU-conv-norm-ReLU-(dropout)-conv, added to its input.

    Parameters
    ----------
    norm1, conv1, norm2, conv2 : Module
        Layers of the branch; they are arguments, so that a hypernetwork can supply the
        convolutions.
    shortcut : Module, optional
        1x1 convolution of the *activated* input, where the shape changes; None: the input is added
        as it is.
    dropout : float
        Dropout probability; 0 adds no layer.
    """

    def __init__(
        self,
        norm1: nn.Module,
        conv1: nn.Module,
        norm2: nn.Module,
        conv2: nn.Module,
        shortcut: nn.Module | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.bn1, self.conv1, self.bn2 = norm1, conv1, norm2
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv2
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Apply the residual block.

        Parameters
        ----------
        x : Tensor, shape (N, inputs, H, W)

        Returns
        -------
        Tensor, shape (N, outputs, H', W')
            The size that the convolutions give.
        """
        active = torch.relu(self.bn1(x))
        y = self.dropout(torch.relu(self.bn2(self.conv1(active))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        branch: Tensor = self.conv2(y)
        return shortcut + branch


class WideResNet(nn.Module):
    """Pre-activation WRN-depth-width: groups of 16 w, 32 w, 64 w channels, strides 1, 2, 2.

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    depth : int
        6 n + 4: n blocks in each of three groups.
    width : int
        Factor on the channels of the groups. The stem always has 16.
    dropout : float
        Rate between the two convolutions of every block (the WRN paper used 0.3).
    norm : {"batch", "group"}
        Normalisation.
    groups : int, optional
        Of a GroupNorm; by default groups of 8 channels.

    Raises
    ------
    NQMError
        If an option is unknown or out of range.

    Notes
    -----
    Convolutions have no bias, the output layer has one. Convolutions and output layer start
    Kaiming normal (fan in, gain sqrt 2), biases at 0. WRN-28-10 has 36,479,194 parameters for 10
    classes, 17,952 of them BatchNorm and 6,410 in the output layer.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 3,
        depth: int = 28,
        width: int = 10,
        dropout: float = 0.0,
        norm: Norm = "batch",
        groups: int | None = None,
    ) -> None:
        super().__init__()
        check_image_model("wrn", classes, channels, dropout)
        check_integer("wrn.width", width, 1)
        blocks = blocks_per_group("wrn", depth, 4)

        def block(inputs: int, outputs: int, stride: int) -> PreactivationBlock:
            return PreactivationBlock(
                make_norm(norm, inputs, groups),
                conv3x3(inputs, outputs, stride),
                make_norm(norm, outputs, groups),
                conv3x3(outputs, outputs),
                conv1x1(inputs, outputs, stride) if inputs != outputs else None,
                dropout,
            )

        def group(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            rest = (block(outputs, outputs, 1) for _ in range(blocks - 1))
            return nn.Sequential(block(inputs, outputs, stride), *rest)

        self.conv1 = conv3x3(channels, 16)
        self.group1 = group(16, 16 * width, 1)
        self.group2 = group(16 * width, 32 * width, 2)
        self.group3 = group(32 * width, 64 * width, 2)
        self.bn = make_norm(norm, 64 * width, groups)
        self.linear = nn.Linear(64 * width, classes)
        initialise_kaiming(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Parameters
        ----------
        images : Tensor, shape (N, channels, H, W)

        Returns
        -------
        Tensor, shape (N, classes)
        """
        x = self.group3(self.group2(self.group1(self.conv1(images))))
        logits: Tensor = self.linear(pool(torch.relu(self.bn(x))))
        return logits
