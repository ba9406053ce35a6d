"""BERT's encoder (Devlin et al. 2019), without dropout: for frozen weights and small modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from nqm.errors import NQMError, check_integer


@dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder, by the names of Hugging Face's ``config.json``.

    Attributes
    ----------
    vocab_size : int
        Tokens of the vocabulary; number 0 pads.
    hidden_size : int
        Width of the features.
    num_hidden_layers, num_attention_heads : int
    intermediate_size : int
        Width of the feed-forward blocks.
    max_position_embeddings : int
        Longest sequence.
    layer_norm_eps : float
        Added to the variance in LayerNorm.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in fields(self)[:-1]:
            check_integer(f"BertConfig.{field.name}", getattr(self, field.name), 1)
        if self.hidden_size % self.num_attention_heads:
            raise NQMError(
                f"BertConfig.num_attention_heads must divide hidden_size = {self.hidden_size}; "
                f"got {self.num_attention_heads}"
            )


class BertLayer(nn.Module):
    """One layer: self-attention, then a feed-forward block, each with LayerNorm after its sum.

    Parameters
    ----------
    config : BertConfig
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attended = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        #: What a module may replace: applied to the output of the feed-forward block.
        self.adapter = nn.Identity()
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x : Tensor, shape (B, L, d)
        mask : Tensor of bool, shape (B, 1, 1, L)
            True at tokens that are attended to.

        Returns
        -------
        Tensor, shape (B, L, d)
        """

        def split(rows: Tensor) -> Tensor:
            return rows.view(*rows.shape[:2], self.heads, -1).transpose(1, 2)

        heads = scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x)), attn_mask=mask
        )
        x = self.attention_norm(x + self.attended(heads.transpose(1, 2).flatten(2)))
        made: Tensor = self.norm(x + self.adapter(self.down(gelu(self.up(x)))))
        return made


class BertEncoder(nn.Module):
    """BERT without pooler and output: tokens to one feature vector for each token.

    Parameters
    ----------
    config : BertConfig
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        #: Of the first segment and the second; only the first is used.
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens.

        Parameters
        ----------
        tokens : Tensor of int64, shape (B, L)
            0 pads at the end of a row and is not attended to.

        Returns
        -------
        Tensor, shape (B, L, d)
        """
        mask = (tokens != 0)[:, None, None, :]
        at = torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.norm(self.words(tokens) + self.positions(at) + self.segments.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def sentence(self, tokens: Tensor) -> Tensor:
        """Feature vector of each sentence: the mean over its tokens, of length 1.

        Parameters
        ----------
        tokens : Tensor of int64, shape (B, L)
            With its first and last special token; 0 pads.

        Returns
        -------
        Tensor, shape (B, d)
        """
        real = (tokens != 0).unsqueeze(-1).to(self.words.weight.dtype)
        vectors: Tensor = (self(tokens) * real).sum(1) / real.sum(1)
        length: Tensor = vectors.norm(dim=1, keepdim=True)
        return vectors / length


#: Part of a name in Hugging Face's files -> ours.
_NAMES = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "attention.self.": "",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
    "encoder.layer.": "layers.",
}


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `BertEncoder` from one of Hugging Face's ``BertModel``.

    Parameters
    ----------
    state : mapping of str to Tensor
        The pooler and the numbers of positions are left out.

    Returns
    -------
    dict of str to Tensor
    """

    def renamed(name: str) -> str:
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        return name

    pattern = re.compile(r"(bert\.)?(pooler\..*|embeddings\.position_ids)")
    return {
        renamed(name.removeprefix("bert.")): value
        for name, value in state.items()
        if not pattern.fullmatch(name)
    }


def read_bert(folder: Path) -> BertEncoder:
    """Read an encoder that Hugging Face's libraries saved.

    Parameters
    ----------
    folder : Path
        With ``config.json`` and ``model.safetensors``.

    Returns
    -------
    BertEncoder
        In evaluation mode.

    Raises
    ------
    NQMError
        If a file is missing or is not of a BERT.
    """
    from safetensors.torch import load_file

    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if stated.get("model_type") != "bert" or stated.get("hidden_act") != "gelu":
            raise ValueError(f"model_type {stated.get('model_type')!r} is not 'bert' with gelu")
        known = {field.name for field in fields(BertConfig)}
        model = BertEncoder(BertConfig(**{n: v for n, v in stated.items() if n in known}))
        model.load_state_dict(own_names(load_file(folder / "model.safetensors")))
    except Exception as error:  # a damaged file makes a reader stumble in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(f"{folder} holds no BERT that can be read ({reason:.120})") from None
    return model.eval()
