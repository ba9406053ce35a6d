"""Additive pyramidal residual nets for CIFAR (Han, Kim & Kim 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from neural.models.layers import (
    blocks_per_group,
    check_image_model,
    conv3x3,
    initialise_kaiming,
    pad_channels,
    pool,
)
from nqm.errors import check_number

STEM = 16


class PyramidBlock(nn.Module):
    """BN-conv-BN-ReLU-conv-BN, added to the input padded with channels of zeros (figure 6d).

    Parameters
    ----------
    inputs, outputs : int
        Channels of input and output.
    stride : int
        Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.stride = outputs, stride
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the residual block.

        Parameters
        ----------
        x : Tensor, shape (N, inputs, H, W)

        Returns
        -------
        Tensor, shape (N, outputs, H', W')
            H' = ceil(H / stride), and the same for W.
        """
        y: Tensor = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(torch.relu(self.bn2(y))))
        if self.stride > 1:
            # ceil_mode: an odd side is halved upwards, as the strided convolution does.
            x = functional.avg_pool2d(x, self.stride, ceil_mode=True)
        return y + pad_channels(x, self.outputs)


class PyramidNet(nn.Module):
    """PyramidNet with basic blocks: widths grow linearly from 16 by `alpha` in all (eq. 3).

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    depth : int
        6 n + 2: n blocks in each of three groups, of which the last two halve the size.
    alpha : float
        Widening: block k of the 3 n has ``round(16 + alpha k / (3 n))`` channels.

    Raises
    ------
    NQMError
        If an option is out of range.

    Notes
    -----
    Parameters at depth 110 and 10 classes: 1,772,706 with alpha 48, 3,904,446 with 84, 28,485,477
    with 270 (the paper prints 1.7 M, 3.8 M and 28.3 M).
    Weights start Kaiming normal with fan in, as in the other models here.
    """

    def __init__(
        self, *, classes: int, channels: int = 3, depth: int = 110, alpha: float = 270
    ) -> None:
        super().__init__()
        check_image_model("pyramidnet", classes, channels)
        check_number("pyramidnet.alpha", alpha, low=0)
        per_group = blocks_per_group("pyramidnet", depth, 2)
        blocks = 3 * per_group
        widths = [round(STEM + alpha * k / blocks) for k in range(blocks + 1)]
        self.conv = conv3x3(channels, STEM)
        self.bn = nn.BatchNorm2d(STEM)
        self.blocks = nn.Sequential(
            *(
                PyramidBlock(widths[k], widths[k + 1], 2 if k in (per_group, 2 * per_group) else 1)
                for k in range(blocks)
            )
        )
        self.bn_last = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], classes)
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
        x = self.blocks(self.bn(self.conv(images)))
        logits: Tensor = self.linear(pool(torch.relu(self.bn_last(x))))
        return logits
