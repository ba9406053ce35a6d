"""A small causal transformer over bytes or other small alphabets."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nqm.errors import NQMError, check_integer, check_number, suggest

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class TransformerBlock(nn.Module):
    """Causal self-attention, then a perceptron, each on the normalised input and added to it.

    Parameters
    ----------
    width : int
        Length of a symbol's vector.
    heads : int
        Number of attention heads; it divides `width`.
    norm : {"layer", "rms"}
        Kind of normalisation.
    dropout : float
        Dropout probability, in attention and of both branches.
    """

    def __init__(self, width: int, heads: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm1 = NORMS[norm](width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = NORMS[norm](width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        """Apply causal self-attention.

        Parameters
        ----------
        x : Tensor, shape (B, L, width)
            Normalised input.

        Returns
        -------
        Tensor, shape (B, L, width)
        """
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.rate if self.training else 0.0
        )
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and perceptron, each added to its input.

        Parameters
        ----------
        x : Tensor, shape (B, L, width)

        Returns
        -------
        Tensor, shape (B, L, width)
        """
        x = x + self.dropout(self.attend(self.norm1(x)))
        y: Tensor = self.dropout(self.down(functional.gelu(self.up(self.norm2(x)))))
        return x + y


class TransformerLanguageModel(nn.Module):
    """Pre-norm decoder with learned positions (Radford et al. 2019), output layer of its own.

    Parameters
    ----------
    classes : int
        Symbols of the alphabet.
    context : int
        Longest input.
    width, heads, layers : int
        Length of a symbol's vector, attention heads (they divide it), blocks.
    norm : {"layer", "rms"}
        LayerNorm, or RMSNorm without a shift.
    dropout : float
        Rate on the attention, on each branch and on the embedding.

    Raises
    ------
    NQMError
        If an option is unknown or out of range.

    Notes
    -----
    Linear maps and embeddings start normal with standard deviation 0.02, the two maps that end a
    branch with ``0.02 / sqrt(2 layers)``; biases at 0.
    """

    def __init__(
        self,
        *,
        classes: int,
        context: int = 256,
        width: int = 128,
        heads: int = 4,
        layers: int = 4,
        norm: Literal["layer", "rms"] = "layer",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"classes": classes, "context": context, "width": width}
        for name, value in (sizes | {"heads": heads, "layers": layers}).items():
            check_integer(f"transformer_lm.{name}", value, 1)
        check_number("transformer_lm.dropout", dropout, low=0, high=1, closed_high=False)
        if width % heads:
            raise NQMError(f"transformer_lm.heads must divide width={width}; got {heads}")
        if norm not in NORMS:
            raise NQMError(
                f"transformer_lm.norm must be 'layer' or 'rms'; got {norm!r}"
                f"{suggest(str(norm), NORMS)}"
            )
        self.context = context
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, norm, dropout) for _ in range(layers))
        )
        self.norm = NORMS[norm](width)
        self.linear = nn.Linear(width, classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith((".out", ".down"))
                std = 0.02 / (2 * layers) ** 0.5 if ends_branch else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def features(self, tokens: Tensor) -> Tensor:
        """What the output layer sees at every position.

        Parameters
        ----------
        tokens : Tensor, shape (B, L)
            Symbol numbers.

        Returns
        -------
        Tensor, shape (B, L, width)

        Raises
        ------
        NQMError
            If L exceeds the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise NQMError(
                f"transformer_lm reads at most context={self.context} symbols; got {length}"
                "; cut the text or raise the context"
            )
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.position(positions))
        y: Tensor = self.norm(self.blocks(x))
        return y

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next symbol at every position.

        Parameters
        ----------
        tokens : Tensor, shape (B, L)
            Symbol numbers.

        Returns
        -------
        Tensor, shape (B, L, classes)
        """
        logits: Tensor = self.linear(self.features(tokens))
        return logits
