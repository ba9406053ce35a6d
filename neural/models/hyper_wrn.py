"""Wide residual nets whose convolutions are mixtures of shared templates.

A convolution's weight is ``sum_j e_j T_j``: templates T_j are shared by all convolutions of a bank
and the embedding e is the layer's own (a linear hypernetwork; Savarese & Maire 2019, and the
hypernetwork variant of von Oswald et al. 2021). The embeddings are the late-phase weights; their
names end in ``.embedding``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from neural.models.layers import blocks_per_group, check_image_model, initialise_kaiming, pool
from neural.models.wide_resnet import PreactivationBlock
from nqm.errors import NQMError, check_integer

STEM_TEMPLATES = 10


class TemplateBank(nn.Module):
    """Templates (T, outputs, inputs, kernel, kernel), Kaiming normal by the fan in of one template.

    Parameters
    ----------
    templates, outputs, inputs, kernel : int
        Number of templates, and the shape of one.
    """

    def __init__(self, templates: int, outputs: int, inputs: int, kernel: int) -> None:
        super().__init__()
        shape = (templates, outputs, inputs, kernel, kernel)
        for name, value in zip(("templates", "outputs", "inputs", "kernel"), shape, strict=False):
            check_integer(f"TemplateBank.{name}", value, 1)
        self.templates = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.templates, std=(2 / (inputs * kernel**2)) ** 0.5)

    def forward(self, embedding: Tensor) -> Tensor:
        """Mix the templates to the weight of a convolution.

        Parameters
        ----------
        embedding : Tensor, shape (C, T)
            Row c mixes the weight that acts on the c-th group of `inputs` input channels.

        Returns
        -------
        Tensor, shape (outputs, C * inputs, kernel, kernel)
        """
        _, outputs, inputs, kernel, _ = self.templates.shape
        last = self.templates.permute(0, 1, 3, 4, 2)
        if last.is_contiguous():  # see `channels_last_`: the weight has that layout without a copy
            chunks = embedding @ last.flatten(1)
            weight = chunks.view(-1, outputs, kernel, kernel, inputs).permute(1, 2, 3, 0, 4)
            return weight.reshape(outputs, kernel, kernel, -1).permute(0, 3, 1, 2)
        chunks = embedding @ self.templates.flatten(1)
        weight = chunks.view(-1, outputs, inputs, kernel, kernel).transpose(0, 1)
        return weight.reshape(outputs, -1, kernel, kernel)

    def channels_last_(self) -> None:
        """Store the templates so that mixed weights have the channels-last layout."""
        last = self.templates.data.permute(0, 1, 3, 4, 2).contiguous()
        self.templates.data = last.permute(0, 1, 4, 2, 3)


class TemplateConv2d(nn.Module):
    """A convolution without bias whose weight is mixed from the templates of a bank.

    Parameters
    ----------
    bank : TemplateBank
        Shared. It is *not* registered here: the model registers each bank once, so that a state
        dict holds each template once.
    embedding : Tensor
        Initial embedding (C, T): one row for each stretch of ``bank`` inputs.
    stride : int
        Of the convolution; the size is kept otherwise (odd kernels).

    Raises
    ------
    NQMError
        If the embedding does not have one column for each template.
    """

    def __init__(self, bank: TemplateBank, embedding: Tensor, *, stride: int = 1) -> None:
        super().__init__()
        templates = bank.templates.shape[0]
        if embedding.ndim != 2 or embedding.shape[1] != templates:
            raise NQMError(
                f"embedding must have shape (chunks, {templates}); got {tuple(embedding.shape)}"
            )
        self._bank = (bank,)  # a tuple hides the module from registration
        self.embedding = nn.Parameter(embedding.detach().clone())
        self.stride = stride

    @property
    def weight(self) -> Tensor:
        """The weight as mixed now, (outputs, inputs, kernel, kernel)."""
        mixed: Tensor = self._bank[0](self.embedding)
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the mixed weight.

        Parameters
        ----------
        x : Tensor, shape (N, inputs, H, W)

        Returns
        -------
        Tensor, shape (N, outputs, H', W')
            H' = ceil(H / stride), and the same for W.
        """
        weight = self.weight
        return functional.conv2d(x, weight, stride=self.stride, padding=weight.shape[-1] // 2)


def orthogonal_embeddings(chunks: int, templates: int) -> Tensor:
    """Draw the initial embeddings of all layers of a bank.

    The matrix with one *column* for each embedding is drawn (semi-)orthogonal and divided by the
    mean norm of its columns: embeddings then have unit length on average, and a mixed weight the
    variance of the templates.

    Parameters
    ----------
    chunks : int
        Number of embeddings.
    templates : int
        Length of an embedding.

    Returns
    -------
    Tensor, shape (chunks, templates)
        Orthogonal rows if chunks <= templates, else orthogonal columns.
    """
    columns = nn.init.orthogonal_(torch.empty(templates, chunks))
    length: Tensor = torch.linalg.vector_norm(columns, dim=0).mean()
    return (columns / length).T


class HyperWideResNet(nn.Module):
    """WRN-depth-width with all convolutions mixed from template banks.

    Parameters
    ----------
    classes, channels : int
        Outputs, and channels of the images.
    depth : int
        6 n + 4: n blocks in each of three groups.
    width : int
        Factor on the channels of the groups.

    Raises
    ------
    NQMError
        If an option is out of range.

    Notes
    -----
    Banks, with their numbers of templates at n = 4 (WRN-28): stem 10; first convolution of group
    1, 2 n - 1 = 7; rest of group 1, 2 (2 n - 1) = 14; groups 2 and 3, 14 each; 1x1 shortcuts, 7
    each. From the rest of group 1 on a template covers half of the input channels of the group's
    inner convolutions, which is all of the first one's in groups 2 and 3: inner convolutions have
    two rows of embedding, all others one. BatchNorm and output layer are ordinary.

    WRN-28-10 so has 49 rows and 654 embedding weights, and 35,844,320 weights of templates. The
    figures often quoted, 42 rows, 556 and 37.46 M (37,457,120), belong to a version whose
    templates in the rest of group 1 cover all input channels: 7 rows of 14 fewer, and templates
    of 160 x 160 instead of 160 x 80. The halved form is the one the paper states.
    """

    def __init__(
        self, *, classes: int, channels: int = 3, depth: int = 28, width: int = 10
    ) -> None:
        super().__init__()
        check_image_model("hyper_wrn", classes, channels)
        check_integer("hyper_wrn.width", width, 1)
        blocks = blocks_per_group("hyper_wrn", depth, 4)
        inner = 2 * blocks - 1  # convolutions of a group but the first
        self.banks = nn.ModuleDict()

        def share(
            name: str, bank: TemplateBank, chunks: Sequence[int], strides: Sequence[int]
        ) -> Iterator[TemplateConv2d]:
            """Convolutions that share a bank, which is registered as `name`."""
            self.banks[name] = bank
            embeddings = orthogonal_embeddings(sum(chunks), bank.templates.shape[0])
            parts = torch.split(embeddings, list(chunks))
            return (
                TemplateConv2d(bank, part, stride=stride)
                for part, stride in zip(parts, strides, strict=True)
            )

        def group(index: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
            name = f"group{index}"
            half = TemplateBank(2 * inner, outputs, outputs // 2, 3)
            if 2 * inputs == outputs:
                chunks, strides = [1, *[2] * inner], [stride, *[1] * inner]
                convs = share(name, half, chunks, strides)
            else:
                first = TemplateBank(inner, outputs, inputs, 3)
                convs = iter(
                    [
                        *share(f"{name}_first", first, [1], [stride]),
                        *share(name, half, [2] * inner, [1] * inner),
                    ]
                )
            shortcut: nn.Module | None = None
            if inputs != outputs:
                bank = TemplateBank(inner, outputs, inputs, 1)
                (shortcut,) = share(f"{name}_shortcut", bank, [1], [stride])
            return nn.Sequential(
                *(
                    PreactivationBlock(
                        nn.BatchNorm2d(outputs if k else inputs),
                        next(convs),
                        nn.BatchNorm2d(outputs),
                        next(convs),
                        None if k else shortcut,
                        0.0,
                    )
                    for k in range(blocks)
                )
            )

        stem = TemplateBank(STEM_TEMPLATES, 16, channels, 3)
        (self.conv1,) = share("stem", stem, [1], [1])
        self.group1 = group(1, 16, 16 * width, 1)
        self.group2 = group(2, 16 * width, 32 * width, 2)
        self.group3 = group(3, 32 * width, 64 * width, 2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.linear = nn.Linear(64 * width, classes)
        initialise_kaiming(self.linear)

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
