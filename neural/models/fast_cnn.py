"""A net that learns CIFAR in a few epochs, after the airbench nets of Jordan (2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from neural.models.layers import check_image_model, conv3x3
from nqm.errors import NQMError, check_integer, check_number

#: Side of the patches of the first layer.
PATCH = 2


class FastBlock(nn.Module):
    """Conv, max-pool by 2, norm, GELU, conv, norm, GELU.

    Parameters
    ----------
    inputs, outputs : int
        Channels of input and output.
    momentum : float
        Momentum of the BatchNorm statistics, in PyTorch's sense.
    """

    def __init__(self, inputs: int, outputs: int, momentum: float) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.bn1 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs, momentum=momentum)
        for conv in (self.conv1, self.conv2):
            # The first filters pass their input on; the others keep PyTorch's random start.
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, which halves the size.

        Parameters
        ----------
        x : Tensor, shape (N, inputs, H, W)

        Returns
        -------
        Tensor, shape (N, outputs, H // 2, W // 2)
        """
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.gelu(self.bn1(x))
        return functional.gelu(self.bn2(self.conv2(x)))


class FastCNN(nn.Module):
    """Frozen whitening of 2x2 patches, three blocks of two convolutions, linear output.

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images (at least 17 pixels a side).
    width : int
        Channels of the first block; the other two have four times as many. 64 is the published
        net of 94 % on CIFAR-10; 16 suits a CPU.
    momentum : float
        Of the BatchNorm statistics, in PyTorch's sense. It is large since training is short.
    logit_scale : float
        Constant factor on the logits.
    dropout : float
        Rate on the features before the output layer.

    Raises
    ------
    NQMError
        If an option is out of range.

    Notes
    -----
    Call `whiten_` with training images before training: the filters of the first layer do not
    train (``requires_grad`` is False), its biases do. Unlike the published net, BatchNorm has a
    trainable scale, so that the scale can be a late-phase weight; the output layer has no bias and
    starts with unit variance, as published.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 3,
        width: int = 64,
        momentum: float = 0.4,
        logit_scale: float = 1 / 9,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_image_model("fast_cnn", classes, channels, dropout)
        check_integer("fast_cnn.width", width, 1)
        check_number("fast_cnn.momentum", momentum, low=0, high=1, closed_low=False)
        check_number("fast_cnn.logit_scale", logit_scale, low=0, closed_low=False)
        filters = 2 * channels * PATCH**2
        self.whiten = nn.Conv2d(channels, filters, PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        self.block1 = FastBlock(filters, width, momentum)
        self.block2 = FastBlock(width, 4 * width, momentum)
        self.block3 = FastBlock(4 * width, 4 * width, momentum)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(4 * width, classes, bias=False)
        nn.init.normal_(self.linear.weight)
        self.logit_scale = logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images.

        Parameters
        ----------
        images : Tensor, shape (N, channels, H, W)

        Returns
        -------
        Tensor, shape (N, classes)
        """
        x = functional.gelu(self.whiten(images))
        x = self.block3(self.block2(self.block1(x)))
        features = self.dropout(torch.amax(x, dim=(2, 3)))
        logits: Tensor = self.linear(features)
        return self.logit_scale * logits


@torch.no_grad()
def whiten_(model: FastCNN, images: Tensor, *, eps: float = 5e-4) -> None:
    """Set the first layer of `model` from the 2x2 patches of training images, in place.

    With ``E[p p'] = sum_i l_i v_i v_i'`` over patches p, the filters are
    ``+- v_i / sqrt(l_i + eps)``: their outputs are uncorrelated with mean square
    ``l_i / (l_i + eps)``.

    Parameters
    ----------
    model : FastCNN
        Its ``whiten.weight`` is overwritten.
    images : Tensor
        Images (N, channels, H, W) as the model will see them (normalised); some thousands do.
    eps : float
        Floor of the eigenvalues, in squared units of the images.

    Raises
    ------
    NQMError
        If the images do not have the model's channels, or `eps` is not positive.
    """
    weight = model.whiten.weight
    if images.ndim != 4 or images.shape[1] != weight.shape[1] or min(images.shape[2:]) < PATCH:
        raise NQMError(
            f"images of whiten_ must have shape (N, {weight.shape[1]}, H, W); "
            f"got {tuple(images.shape)}"
        )
    check_number("whiten_.eps", eps, low=0, closed_low=False)
    # (N, channels * 4, positions) in the order of a filter's entries.
    patches = functional.unfold(images.float(), PATCH).double()
    second_moment = torch.einsum("nip,njp->ij", patches, patches)
    second_moment /= patches.shape[0] * patches.shape[2]
    values, vectors = torch.linalg.eigh(second_moment)
    filters = (vectors / torch.sqrt(values + eps)).T.reshape(-1, *weight.shape[1:])
    weight.copy_(torch.cat([filters, -filters]))
