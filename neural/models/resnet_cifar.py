"""The residual nets for CIFAR of He et al. 2016, and published weights for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    pad_channels,
    pool,
)
from nqm.errors import NQMError, check_integer, suggest
from nqm.files import check_regular

Shortcut = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Shortcut A: subsampling by the stride, and channels of zeros before and after.

    It has no parameters.

    Parameters
    ----------
    inputs, outputs : int
        Channels of input and output; half of the difference is padded on each side.
    stride : int
        Distance of the pixels that are kept.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.stride = outputs, stride
        self.before = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad the channels.

        Parameters
        ----------
        x : Tensor, shape (N, inputs, H, W)

        Returns
        -------
        Tensor, shape (N, outputs, H', W')
            H' = ceil(H / stride), and the same for W.
        """
        return pad_channels(x[:, :, :: self.stride, :: self.stride], self.outputs, self.before)


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x)`` (He et al. 2016, figure 2).

    Parameters
    ----------
    inputs, outputs : int
        Channels of input and output.
    stride : int
        Stride of the first convolution.
    shortcut : {"A", "B"}
        Shortcut where the shape changes, see `ResNetCifar`.
    norm : str
        Kind of normalisation, as `make_norm` takes it.
    groups : int, optional
        Groups of GroupNorm, as `make_norm` takes them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        shortcut: Shortcut,
        norm: Norm,
        groups: int | None,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = make_norm(norm, outputs, groups)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = make_norm(norm, outputs, groups)
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddedShortcut(inputs, outputs, stride)
        else:
            self.shortcut = nn.Sequential(
                conv1x1(inputs, outputs, stride), make_norm(norm, outputs, groups)
            )

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
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNetCifar(nn.Module):
    """ResNet of depth 6 n + 2 for small images (He et al. 2016, section 4.2).

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    depth : int
        8, 20, 32, 44, 56 or 110 in the paper; any 6 n + 2.
    width : int
        Channels of the first stage; the next two have twice and four times as many.
    shortcut : {"A", "B"}
        Where the shape changes: parameter-free subsampling and zero padding (the paper's choice on
        CIFAR), or a 1x1 convolution with normalisation.
    norm : {"batch", "group"}
        Normalisation; its layers are called ``bn1``, ``bn2`` in either case.
    groups : int, optional
        Of a GroupNorm; by default groups of 8 channels.
    dropout : float
        Rate on the features before the output layer. 0 leaves it out.

    Raises
    ------
    NQMError
        If an option is unknown or out of range.

    Notes
    -----
    Weights start Kaiming normal (fan in), the output layer included. Names of parameters are
    those of the widespread implementation behind the published weights (`load_published`).
    """

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        *,
        classes: int,
        channels: int = 3,
        depth: int = 20,
        width: int = 16,
        shortcut: Shortcut = "A",
        norm: Norm = "batch",
        groups: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_image_model("resnet", classes, channels, dropout)
        check_integer("resnet.width", width, 1)
        blocks = blocks_per_group("resnet", depth, 2)
        if shortcut not in ("A", "B"):
            raise NQMError(
                f"resnet.shortcut must be 'A' or 'B'; got {shortcut!r}"
                f"{suggest(str(shortcut), ('A', 'B'))}"
            )

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inputs, outputs, stride, shortcut, norm, groups)
            rest = (
                BasicBlock(outputs, outputs, 1, shortcut, norm, groups) for _ in range(blocks - 1)
            )
            return nn.Sequential(first, *rest)

        self.conv1 = conv3x3(channels, width)
        self.bn1 = make_norm(norm, width, groups)
        self.layer1 = layer(width, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 4 * width, 2)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(4 * width, classes)
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
        x = torch.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.dropout(pool(x)))
        return logits


def load_published(path: str | Path, depth: int) -> ResNetCifar:
    """A ResNet with CIFAR-10 weights in the format of ``akamaster/pytorch_resnet_cifar10``.

    Its inputs are normalised with the mean (0.485, 0.456, 0.406) and standard deviation
    (0.229, 0.224, 0.225) of ImageNet. Published test accuracy: 91.73 % at depth 20, 92.63 % at 32,
    93.10 % at 44, 93.39 % at 56.

    Parameters
    ----------
    path : str or Path
        A ``.th`` file: a dictionary whose ``state_dict`` has keys that begin with ``module.``.
    depth : int
        Depth of the net it was saved from.

    Returns
    -------
    ResNetCifar

    Raises
    ------
    NQMError
        If the file cannot be read, or is not of this net.
    """
    check_regular(Path(path))
    try:
        # weights_only: a checkpoint from elsewhere must not run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NQMError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged file raises whatever its broken bytes lead to
        raise NQMError(f"{path}: not a PyTorch checkpoint of plain tensors") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise NQMError(f"{path}: expected a dictionary with a 'state_dict'; got none; is it a .th?")
    model = ResNetCifar(classes=10, depth=depth, shortcut="A")
    expected = model.state_dict()
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    # Files saved before PyTorch 0.4.1 have no count of batches; it serves only momentum=None.
    state = {n: v for n, v in expected.items() if n.endswith("num_batches_tracked")} | state
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected
        or not isinstance(state.get(name), Tensor)
        or state[name].shape != expected[name].shape
    )
    if wrong:
        raise NQMError(
            f"{path}: not the weights of a ResNet-{depth} (option A, 10 classes): {len(wrong)} "
            f"tensors missing, unknown or of another shape, first {wrong[0]!r}; check the depth"
        )
    model.load_state_dict(state, strict=True)
    return model
