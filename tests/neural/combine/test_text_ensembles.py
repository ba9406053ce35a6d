"""Ensembles of text classifiers: against scikit-learn by hand, resume, people, and the command."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split

from neural.combine import text_ensembles
from neural.combine.cells import Cells
from neural.combine.config import load_section
from neural.combine.text_ensembles import GatesConfig, compare_gates, human_kappa
from neural.combine.text_members import FEATURES, Seen, text_features
from neural.data import Opinions
from neural.data.fetch import File
from neural.data.opinions import SDIST, read_opinions
from nqm import NQMError
from nqm.cli import main
from nqm.table import read_table
from tests.tiny_opinions import GOOD, sentences, write_opinions
from tests.tolerances import agree

COUNT = 160
CONFIG = GatesConfig(
    domain="tweets", splits=2, members=("bayes", "hashed"), controls=(),
    features=("constant", "confidence", "length"), side=("lexicon",), folds=3, steps=20,
    resamples=50,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("opinions")
    write_opinions(made, *sentences(COUNT))
    return made


@pytest.fixture(autouse=True)
def own_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small archive has another checksum than the published one."""
    monkeypatch.setattr("neural.data.opinions.SDIST", File(SDIST.name))


@pytest.fixture(scope="module")
def opinions(folder: Path) -> Opinions:
    return read_opinions(folder / SDIST.name, "tweets")


@pytest.fixture(scope="module")
def found(opinions: Opinions, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neural.data.opinions.SDIST", File(SDIST.name))
        return compare_gates(opinions, CONFIG, root=folder)


def row(table: pd.DataFrame, rule: str, member: str = "") -> pd.Series:
    return table[(table["rule"] == rule) & (table["member"] == member)].iloc[0]


def test_a_member_and_the_equal_ensemble_by_hand(opinions, found):
    """The same splits and classifiers from scikit-learn alone."""
    decided = opinions.decided()
    texts, y = np.array(decided.texts, dtype=object), decided.labels.numpy()
    rows, truth, right = [], [], []
    for others, test in StratifiedKFold(2, shuffle=True, random_state=0).split(texts, y):
        train, held = train_test_split(others, test_size=0.2, stratify=y[others], random_state=0)
        train, held = np.sort(train), np.sort(held)
        vectors = HashingVectorizer(n_features=2048, alternate_sign=False)
        tried = [
            LogisticRegression(C=c, max_iter=2000).fit(vectors.transform(texts[train]), y[train])
            for c in (0.3, 1.0, 3.0, 10.0, 30.0)
        ]
        inside = vectors.transform(texts[held])
        best = min(tried, key=lambda m: log_loss(y[held], m.predict_proba(inside)))
        rows.append(best.predict_proba(vectors.transform(texts[test])))
        truth.append(y[test])
        right.append(test)
    assert sorted(np.concatenate(right)) == list(range(len(y)))  # each text once
    p, labels = np.concatenate(rows), np.concatenate(truth)
    mine = row(found[0], "member", "hashed")
    agree(mine["nll"], log_loss(labels, p), 1e-9)
    assert mine["accuracy"] == (p.argmax(1) == labels).mean()
    assert mine["kappa"] == pytest.approx(cohen_kappa_score(labels, p.argmax(1)), abs=1e-12)


def test_rows_and_what_each_was_chosen_on(found):
    table, _ = found
    rules = ["member", "member", "mean_member", "ensemble", "best", "shallow", "inverse_loss",
             "learned", "semi", "deep", "deep_reward", "deep_reinforce"]  # fmt: skip
    assert list(table["rule"]) == rules
    equal = row(table, "ensemble")
    assert equal["selected_on"] == "none"
    assert math.isnan(equal["accuracy_gain"])
    others = table[~table["rule"].isin(["ensemble", "mean_member"])]
    assert set(others["selected_on"]) == {"held_out"}
    for name in ("accuracy", "nll", "nll_tuned"):
        sign = 1 if name == "accuracy" else -1
        agree(others[f"{name}_gain"], sign * (others[name] - equal[name]), 1e-9)
        assert (others[f"{name}_gain_low"] <= others[f"{name}_gain"] + 1e-12).all()
        assert (others[f"{name}_gain_high"] >= others[f"{name}_gain"] - 1e-12).all()
    assert (table["ambiguity"] >= -1e-12).all()  # a mixture is never worse than its mean member
    mean = table[table["rule"] == "member"]["nll"].mean()
    agree(row(table, "mean_member")["nll"], mean, 1e-12)
    agree(equal["mean_member_nll"], mean, 1e-12)
    assert list(table["passes"]) == [1, 1, 1, 2, 1, 2, 2, 2, 2, 2, 2, 2]
    assert set(table["predicted_from"]) == {"none"}


def test_gains_over_another_baseline_are_differences(opinions, folder, found):
    config = replace(CONFIG, baseline="learned")
    table, _ = compare_gates(opinions, config, root=folder)
    base = row(table, "learned")
    assert math.isnan(base["accuracy_gain"])
    for rule in ("ensemble", "deep"):
        one = row(table, rule)
        assert one["nll"] == row(found[0], rule)["nll"]
        assert one["nll_gain"] == pytest.approx(base["nll"] - one["nll"], abs=1e-12)


def test_a_killed_study_goes_on_with_what_is_done(opinions, folder, found, tmp_path, monkeypatch):
    cells = Cells(tmp_path / "cells")
    fitted = text_ensembles.fitted_log_probs
    calls = []

    def counting(*given: object) -> object:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fitted(*given)

    monkeypatch.setattr(text_ensembles, "fitted_log_probs", counting)
    with pytest.raises(KeyboardInterrupt):
        compare_gates(opinions, CONFIG, cells=cells, root=folder)
    again = compare_gates(opinions, CONFIG, cells=cells, root=folder)
    assert len(calls) == 5  # two were kept; the third was killed and came again, with the fourth
    for one, other in zip(again, found, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_vectors_are_made_once_and_given_to_member_and_gate(
    opinions, folder, tmp_path, monkeypatch
):
    """With the number of good words as its vector the member and the gate know the answer."""
    made = []

    def embed(texts: list[str]) -> np.ndarray:
        made.extend(texts)
        good = [sum(word in GOOD for word in text.split()) for text in texts]
        return np.stack([good, np.ones(len(texts))], 1).astype(np.float32).repeat(8, 1)

    monkeypatch.setattr(text_ensembles, "embed_texts", embed)
    monkeypatch.setattr(text_ensembles, "_CHUNK", 100)
    config = GatesConfig(**{**vars(CONFIG), "members": ("hashed", "minilm"), "side": ("minilm",)})
    cells = Cells(tmp_path)
    table, _ = compare_gates(opinions, config, cells=cells, root=folder)
    assert made == list(opinions.decided().texts)
    assert row(table, "member", "minilm")["accuracy"] > 0.9
    compare_gates(opinions, config, cells=cells, root=folder)
    assert len(made) == len(opinions.decided())


def test_features_of_a_text(folder):
    seen = Seen(
        ("lovely town", "a dull town", "a town", "town lovely"), ("Not lovely, but DULL!", "town"),
        [torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [-math.inf, 0.0]])],
        lambda: (np.eye(4, 20, dtype=np.float32), np.eye(2, 20, dtype=np.float32)), folder,
    )  # fmt: skip
    assert text_features(["constant"], seen).tolist() == [[1.0], [1.0]]
    # Log-odds of two classes are the difference of their logits; certainty is cut at 20.
    agree(text_features(["confidence"], seen).numpy(), [[1.0, 0.0], [3.0, 20.0]], 1e-6)
    agree(text_features(["length"], seen).numpy(), np.log([[5.0], [2.0]]), 1e-12)
    # Good, bad, words that were rated, negations.
    assert text_features(["lexicon"], seen).tolist() == [[2.5, 2.5, 2, 1], [0, 0, 0, 0]]
    assert text_features([], seen).shape == (2, 0)
    assert set(FEATURES) == {"constant", "confidence", "length", "topics", "lexicon", "minilm"}


def test_people_by_hand():
    nan = math.nan
    ratings = torch.tensor([[2.0, 1, 3, nan], [-1, -2, -1, -1], [3, 3, 0, nan], [-4, -2, -2, nan]])
    opinions = Opinions("tweets", tuple("abcd"), ratings.nanmean(1).double(), ratings)
    for seed in range(6):
        people = human_kappa(opinions, seed)
        assert people["rater"] == 1.0  # nobody's sign is another's opposite
        assert people["panel"] == 1.0
        assert people["rater_or_neutral"] in (1.0, pytest.approx(cohen_kappa_score(
            [1, -1, 0, -1], [1, -1, 1, -1])))  # fmt: skip
    found = {human_kappa(opinions, seed)["rater_or_neutral"] for seed in range(20)}
    assert len(found) == 2  # the neutral rater is drawn now and then
    with pytest.raises(NQMError, match="two raters"):
        human_kappa(Opinions("tweets", ("a",), torch.ones(1).double(), torch.ones(1, 1)))


def call(*words: object) -> str:
    done = CliRunner().invoke(main, ["neural", "gates", *map(str, words), "--threads", "1"])
    return done.stdout if done.exit_code == 0 else f"exit {done.exit_code}: {done.output}"


def test_the_command_writes_tables_and_a_picture(folder, found, tmp_path):
    settings = tmp_path / "gates.toml"
    settings.write_text(
        "[gates]\ndomain = 'tweets'\nsplits = 2\nmembers = ['bayes', 'hashed']\ncontrols = []\n"
        "features = ['constant', 'confidence', 'length']\nfolds = 3\nsteps = 20\n"
    )
    words = ("--config", settings, "--set", "gates.resamples=50", "--data", folder, "--out",
             tmp_path / "out")  # fmt: skip
    told = call(*words)
    assert "kappa with the label: ensemble" in told
    for name in ("gates.parquet", "agreement.parquet", "gates.png", "gates.pdf"):
        assert (tmp_path / "out" / name).exists(), told
        assert name in told
    table = read_table(tmp_path / "out" / "gates.parquet")
    agree(table["nll"], found[0]["nll"], 1e-12)
    assert call(*words) == told  # read, not computed
    assert "gates.seed = 0, you ask for 1" in call(*words, "--set", "gates.seed=1")


def test_the_settings_of_the_page_are_read():
    path = Path(__file__).parents[3] / "docs/examples/gates.toml"
    config = load_section(GatesConfig, "gates", path)
    assert config.members == ("words", "characters", "bayes", "minilm")
    assert config.side == ("lexicon", "minilm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("gates.domain=film", "domain"),
        ("gates.members=['words']", "members must name two at least"),
        ("gates.members=['word','bayes']", "did you mean 'words'"),
        ("gates.controls=['bayes']", "members and controls name 'bayes' twice"),
        ("gates.side=['length']", "features and side name 'length' twice"),
        ("gates.held_out=1", "held_out must"),
        ("gates.splits=1", "splits must be"),
        ("gates.splits=40", "40 splits need 200; use more texts or fewer splits"),
        ("gates.texts=10000", "texts must be at most"),
        ("gates.strengths=[]", "strengths must name one"),
        ("gates.held_out=0.001", "held_out = 0.001"),
        ("gates.folds=1000", "each of 1000 folds"),
        ("gates.level=1", "level must"),
        ("gates.baseline=equal", "baseline"),
        ("gates.resamples=100000000", "resamples must be at most 1,000,000"),
        ("gates.foo=1", "foo"),
    ],
)
def test_mistakes_are_named_in_one_line(folder, tmp_path, change, says):
    told = call(
        "--set", "gates.domain=tweets", "--set", "gates.members=['bayes','hashed']", "--set",
        "gates.controls=[]", "--set", "gates.features=['constant','length']", "--set", change,
        "--data", folder, "--out", tmp_path,
    )  # fmt: skip
    assert told.startswith("exit 2"), told
    assert says in told
    assert len(told.strip().splitlines()) == 1, told


def test_missing_data_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "neural.data.opinions.SDIST",
        File(SDIST.name, "http://127.0.0.1:9/x", command=SDIST.command),
    )
    told = call("--data", tmp_path, "--out", tmp_path / "out")
    assert SDIST.command in told
    assert len(told.strip().splitlines()) == 1
