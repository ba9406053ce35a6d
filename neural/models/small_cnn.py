"""Nets of a few thousand parameters: a convolutional one for 8x8 digits, and the perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from neural.models.layers import (
    Norm,
    check_image_model,
    conv3x3,
    initialise_kaiming,
    make_norm,
    pool,
)
from nqm.errors import NQMError, check_integer, suggest

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class DigitsCNN(nn.Module):
    """Three 3x3 convolutions with normalisation, for images from 4x4 up; made for 8x8 digits.

    Channels ``width``, ``2 width``, ``2 width``; max-pooling by 2 after the second; mean over the
    positions; linear output. The default has 14,458 parameters at 10 classes and 1 channel.

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    width : int
        Channels of the first convolution.
    norm : {"batch", "group"}
        Normalisation.
    dropout : float
        Rate on the features before the output layer.

    Raises
    ------
    NQMError
        If an option is unknown or out of range.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 1,
        width: int = 16,
        norm: Norm = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_image_model("digits_cnn", classes, channels, dropout)
        check_integer("digits_cnn.width", width, 1)
        wide = 2 * width
        self.features = nn.Sequential(
            conv3x3(channels, width), make_norm(norm, width), nn.ReLU(),
            conv3x3(width, wide), make_norm(norm, wide), nn.ReLU(), nn.MaxPool2d(2),
            conv3x3(wide, wide), make_norm(norm, wide), nn.ReLU(),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(wide, classes)
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
        logits: Tensor = self.linear(self.dropout(pool(self.features(images))))
        return logits


class MLP(nn.Module):
    """Multi-layer perceptron on flattened square images.

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    size : int
        Side of the images in pixels: the input has ``channels * size ** 2`` entries.
    hidden : sequence of int
        Widths of the hidden layers; an empty sequence is multinomial logistic regression.
    activation : {"relu", "tanh"}
        Smooth (tanh) suits measurements of curvature.
    norm : {"none", "batch", "layer"}
        Between each hidden linear map and its activation.
    dropout : float
        Rate after each activation.

    Raises
    ------
    NQMError
        If an option is unknown or out of range.

    Notes
    -----
    Weights start normal with variance ``gain ** 2 / fan_in``, gain sqrt 2 before ReLU (He et al.
    2015) and 1 otherwise (LeCun et al. 1998); biases at 0.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int = 1,
        size: int = 8,
        hidden: Sequence[int] = (64,),
        activation: Literal["relu", "tanh"] = "relu",
        norm: Literal["none", "batch", "layer"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_image_model("mlp", classes, channels, dropout)
        check_integer("mlp.size", size, 1)
        for width in hidden:
            check_integer("mlp.hidden", width, 1)
        if activation not in ACTIVATIONS:
            raise NQMError(
                f"mlp.activation must be 'relu' or 'tanh'; got {activation!r}"
                f"{suggest(str(activation), ACTIVATIONS)}"
            )
        norms = {"none": nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        if norm not in norms:
            raise NQMError(
                f"mlp.norm must be 'none', 'batch' or 'layer'; got {norm!r}"
                f"{suggest(str(norm), norms)}"
            )
        self.channels, self.size = channels, size
        layers: list[nn.Module] = [nn.Flatten()]
        widths = (channels * size**2, *hidden)
        for inputs, outputs in pairwise(widths):
            layers.append(nn.Linear(inputs, outputs))
            if norm != "none":
                layers.append(norms[norm](outputs))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(widths[-1], classes)
        hidden_gain = "relu" if activation == "relu" else "linear"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nonlinearity = "linear" if module is self.linear else hidden_gain
                nn.init.kaiming_normal_(module.weight, nonlinearity=nonlinearity)  # type: ignore[arg-type]
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of images.

        Parameters
        ----------
        images : Tensor, shape (N, channels, size, size)
            Or rows of that length, shape (N, channels * size^2).

        Returns
        -------
        Tensor, shape (N, classes)

        Raises
        ------
        NQMError
            If the images have another size.
        """
        wanted = (self.channels, self.size, self.size)
        # Proxies of `torch.fx`, which traces models to align them, have no shape.
        if isinstance(images, Tensor) and images.ndim > 2 and images.shape[1:] != wanted:
            channels, *pixels = images.shape[1:]
            raise NQMError(
                f"an mlp of model.size {self.size} takes images of {self.channels} x {self.size} x "
                f"{self.size}; got {' x '.join(map(str, (channels, *pixels)))}"
                + (f"; set model.size = {pixels[0]}" if len(set(pixels)) == 1 else "")
            )
        logits: Tensor = self.linear(self.features(images))
        return logits
