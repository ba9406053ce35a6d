"""``nqm neural modules`` with language models, on invented texts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neural.combine.api import merge
from neural.combine.config import load_section
from neural.combine.members import Members
from neural.combine.rules import Linear
from neural.models.transformer import TransformerLanguageModel
from neural.modules import language
from neural.modules.experiment import ModulesConfig
from neural.modules.language import LanguageConfig, Windows
from neural.modules.networks import Examples, FitConfig, train_lora
from neural.modules.report import claims, summary
from neural.modules.scores import Evidence, ExpertPosterior
from nqm.cli import main
from nqm.table import read_table

WORDS = {
    "wikitext2_bytes": "the ship sailed north ",
    "python_docs": "def f(x): return x ",
    "emails": "dear sir, thank you ",
    "nyt": "the senate voted today ",
}
SMALL = [
    "modules.task=language", 'modules.domains=["python_docs","emails","nyt"]', "modules.context=16",
    "modules.width=8", "modules.heads=2", "modules.layers=1", "modules.trunk_epochs=1",
    "modules.splits=1", "modules.train=8", "modules.held_out=3", "modules.sample=4",
    "modules.test=5", "modules.rank=2", "modules.epochs=1", "modules.predict_examples=2",
    'modules.scores=["uniform","tfidf","tfidf_characters","posterior"]', 'modules.pools=["logits"]',
]  # fmt: skip


def invented(name: str, root: Path | None = None) -> Tensor:
    """A thousand bytes in the words of a domain."""
    order = np.random.default_rng(len(name)).permutation(WORDS[name].split() * 60)
    return torch.frombuffer(bytearray(" ".join(order).encode()[:1000]), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _invented_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "load_text", invented)


def call(out: Path, *settings: str) -> Result:
    words = itertools.chain.from_iterable(("--set", one) for one in (*SMALL, *settings))
    command = ["neural", "modules", *words, "--out", str(out), "--threads", "1"]
    return CliRunner().invoke(main, command)


def test_the_table_has_every_way_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    assert "ensemble of logits: loss at most that of the averaged parameters" in done.output
    table = read_table(tmp_path / "modules.parquet")
    assert set(table["target"]) == {"python_docs", "emails", "nyt"}
    one = table[table["target"] == "nyt"]
    assert {"no_module", "best", "inverse_loss", "member", "mean_member", "uniform", "tfidf",
            "tfidf_characters", "posterior"} == set(one["score"])  # fmt: skip
    assert set(one.loc[one["score"] == "member", "member"]) == {"python_docs", "emails"}
    assert one["predicted"].notna().all()
    # Nothing that is done is done again.
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(cells) == 1 + 3 + 3  # trunk, modules, tables
    (tmp_path / "modules.parquet").unlink()
    assert call(tmp_path).exit_code == 0
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert read_table(tmp_path / "modules.parquet").equals(table)
    # The other task does not take this table for its own.
    other = CliRunner().invoke(main, ["neural", "modules", "--out", str(tmp_path)])
    assert other.exit_code != 0
    assert 'you ask for "opinions"' in other.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modules.test=900", "take 915 examples, and python_docs has 62; lower one of them"),
        ('modules.domains=["nyt","emails"]', "modules.domains must be three at least"),
        ("modules.trunk=nyt", "must not name the trunk's text, 'nyt'"),
        ("modules.trunk=wikitext", "modules.trunk 'wikitext' is unknown"),
        ("modules.task=vision", "modules.task 'vision' is unknown"),
        ("modules.heads=3", "modules.heads must divide width = 8; got 3"),
        ("modules.encoder=minilm", "encoder"),
        ("modules.trunk_lr=0", "modules.trunk_lr"),
        ("modules.trunk_lr=1e30", "lower trunk_lr"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, setting: str, message: str) -> None:
    done = call(tmp_path, setting)
    assert done.exit_code != 0
    told = done.output or str(done.exception)
    assert message in told
    assert "Traceback" not in told


def network(layers: int = 1) -> TransformerLanguageModel:
    torch.manual_seed(0)
    return TransformerLanguageModel(classes=256, context=16, width=8, heads=2, layers=layers).eval()


def test_windows_predict_every_byte_but_the_first_once() -> None:
    text = invented("nyt")
    windows = Windows.of_text("nyt", text, 16)
    assert len(windows) == 62  # (1000 - 1) // 16
    made = windows.examples(torch.arange(62))
    assert torch.equal(made.inputs.flatten(), text[: 62 * 16].long())
    assert torch.equal(made.labels.flatten(), text[1 : 62 * 16 + 1].long())
    assert len(Windows.of_text("nyt", text[:16], 16)) == 0
    assert len(Windows.of_text("nyt", text[:17], 16)) == 1
    net = network()
    sample = windows.sample(torch.tensor([0, 3]), net)
    assert sample.texts == tuple(bytes(text[i : i + 16].tolist()).decode() for i in (0, 48))
    # The output layer is linear: mean logits are those of the mean features.
    logits = net(text[None, 48:64].long())[0].mean(0)
    assert torch.allclose(net.linear(sample.vectors[1]), logits, atol=1e-5)


def test_the_posterior_is_bayes_theorem_on_the_models_own_likelihoods() -> None:
    net = network()
    others = [network().state_dict() | {"linear.bias": torch.randn(256)} for _ in range(2)]
    members = Members.of_states(net, others)
    windows = Windows.of_text("nyt", invented("nyt"), 16)
    index = torch.arange(5)
    whole = windows.examples(index)
    batches = tuple((whole.inputs[part], whole.labels[part]) for part in (slice(0, 3), slice(3, 5)))
    sample = windows.sample(index, net)
    evidence = Evidence((sample, sample), sample, batches)
    likelihoods = []
    for state in others:
        net.load_state_dict(state)
        with torch.no_grad():
            sums = [-cross_entropy(net(x[None])[0], y, reduction="sum") for x, y in
                    zip(whole.inputs, whole.labels, strict=True)]  # fmt: skip
        likelihoods.append([float(one) for one in sums])
    first, second = np.array(likelihoods)
    for power in (0.0, 0.5, 1.0):
        odds = np.exp((second - first) / 16**power)
        expected = np.mean(1.0 / (1.0 + odds))
        found = ExpertPosterior(power)(members, evidence)
        assert float(found[0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)  # float32 logits
        assert float(found.sum()) == pytest.approx(1.0, rel=1e-9)


def test_only_updates_of_low_rank_are_trained_and_their_products_are_averaged() -> None:
    net = network()
    windows = Windows.of_text("nyt", invented("nyt"), 16)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    fit = FitConfig(1e-2, 2, 2, 4)
    states = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        part = windows.examples(torch.arange(20) + 20 * seed)
        state, epochs = train_lora(net, 2, "blocks.*", part, part, fit, generator)
        assert epochs == 2.0
        states.append(state)
        for name, value in state.items():
            moved = value - start[name]
            linear = name.startswith("blocks.") and name.endswith("weight") and value.ndim == 2
            assert (int(torch.linalg.matrix_rank(moved, tol=1e-5)) == 2) if linear else (
                not moved.any()
            ), name  # fmt: skip
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    mean = merge(Members.of_states(net, states), Linear()).state_dict()
    # Two products of rank 2 have a mean of rank 4; a mean of factors would have rank 2.
    name = "blocks.0.qkv.weight"
    assert int(torch.linalg.matrix_rank(mean[name] - start[name], tol=1e-5)) == 4


def test_training_a_classifier_and_a_language_model_is_the_same_for_windows_of_one() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(12, 3, generator=generator), torch.arange(12) % 2
    net = nn.Sequential(nn.Linear(3, 2))
    flat, windowed = Examples(inputs, labels), Examples(inputs[:, None], labels[:, None])
    fit = FitConfig(1e-2, 3, 3, 4)
    first, second = (
        train_lora(net, 1, "*", data, data, fit, torch.Generator().manual_seed(2))[0]
        for data in (flat, windowed)
    )
    assert torch.allclose(first["0.weight"], second["0.weight"], atol=1e-7)
    assert not torch.equal(first["0.weight"], net.state_dict()["0.weight"])


def test_the_report_counts_pairs_and_subtracts_by_split() -> None:
    import pandas as pd

    def row(split: int, score: str, kept: int, space: str, nll: float) -> dict[str, object]:
        return {"split": split, "target": "nyt", "score": score, "kept": kept,
                "weighting": "linear" if score == "tfidf" else "uniform", "space": space,
                "members": kept, "accuracy": 0.5, "nll": nll, "nll_tuned": nll, "predicted": nll,
                "predicted_from": "surrogate"}  # fmt: skip

    table = pd.DataFrame(
        [row(0, "uniform", 2, "weights", 2.0), row(1, "uniform", 2, "weights", 3.0),
         row(0, "uniform", 2, "logits", 1.9), row(1, "uniform", 2, "logits", 3.0),
         row(0, "tfidf", 2, "weights", 2.5), row(1, "tfidf", 2, "weights", 3.1),
         row(0, "tfidf", 2, "logits", 2.6), row(1, "tfidf", 2, "logits", 3.2),
         row(0, "tfidf", 1, "weights", 9.0), row(0, "tfidf", 1, "logits", 9.0)]
    )  # fmt: skip
    (told,) = claims(table)
    assert told.startswith("ensemble of logits: loss at most")
    assert "in 50% of 4 pairs" in told
    means = summary(table).set_index(["score", "kept", "space"])
    assert means.loc[("tfidf", 2, "weights"), "nll_minus_uniform"] == pytest.approx(0.3, rel=1e-9)
    # Two differences, 0.5 and 0.1: half width 12.706 * 0.2828 / sqrt(2).
    half = means.loc[("tfidf", 2, "weights"), "nll_minus_uniform_half"]
    assert half == pytest.approx(12.7062 * 0.2, rel=1e-4)


def test_the_settings_of_the_page_are_read_and_are_the_defaults() -> None:
    examples = Path(__file__).parents[3] / "docs/examples"
    made = load_section(LanguageConfig, "modules", examples / "modules_language.toml")
    assert made == LanguageConfig()
    assert load_section(ModulesConfig, "modules", examples / "modules.toml") == ModulesConfig()
