"""``nqm neural modules`` on invented texts, with hashed words for features."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from neural.data.opinions import Opinions
from neural.modules import data as texts_of_domains
from nqm.cli import main
from nqm.table import read_table

SMALL = [
    "modules.encoder=hashing", "modules.splits=2", "modules.train=24", "modules.held_out=12",
    "modules.sample=8", "modules.test=16", "modules.rank=2", "modules.epochs=2",
    'modules.domains=["tweets","amazon","films"]',
    'modules.scores=["uniform","similarity","entropy"]',
]  # fmt: skip


def invented(domain: str, root: Path | None = None) -> Opinions:
    """Sixty-four different texts, half of them good."""
    words = {"tweets": "lol", "amazon": "phone", "films": "plot"}[domain]
    texts = [f"{words} {'good' if i % 2 else 'bad'} word{i}" for i in range(64)]
    means = torch.tensor([2.0 if i % 2 else -2.0 for i in range(64)], dtype=torch.float64)
    return Opinions(domain, tuple(texts), means, means[:, None].float())


@pytest.fixture(autouse=True)
def _invented_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_of_domains, "load_opinions", invented)


def call(out: Path, *settings: str) -> Result:
    words = itertools.chain.from_iterable(("--set", one) for one in (*SMALL, *settings))
    command = ["neural", "modules", *words, "--out", str(out), "--threads", "1"]
    return CliRunner().invoke(main, command)


def test_the_table_has_every_way_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    done = call(tmp_path / "a")
    assert done.exit_code == 0, done.output
    table = read_table(tmp_path / "a" / "modules.parquet")
    assert set(table["target"]) == {"tweets", "amazon", "films"}
    one = table[(table["split"] == 0) & (table["target"] == "films")]
    kept = {(row.score, row.kept, row.weighting, row.space) for row in one.itertuples()}
    for space in ("weights", "probabilities", "logits"):
        assert ("uniform", 2, "uniform", space) in kept
        assert {(score, k, how, space) for score in ("similarity", "entropy")
                for k, how in ((1, "uniform"), (2, "linear"))} <= kept  # fmt: skip
    assert set(one.loc[one["score"] == "member", "member"]) == {"tweets", "amazon"}
    # One module alone is the same whatever is averaged, and is one of the members.
    first = one[(one["score"] == "similarity") & (one["kept"] == 1)]
    assert first["nll"].max() - first["nll"].min() < 1e-6
    single = one.loc[one["score"] == "member", "nll"]
    assert (single - first["nll"].iloc[0]).abs().min() < 1e-6
    # Cells are kept: the same table, and no module is trained again.
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "cells").iterdir()}
    (tmp_path / "a" / "modules.parquet").unlink()
    assert call(tmp_path / "a").exit_code == 0
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "cells").iterdir()}
    assert read_table(tmp_path / "a" / "modules.parquet").equals(table)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modules.train=60", "take 96 examples, and tweets has 64; lower one of them"),
        ('modules.domains=["tweets","nyt"]', "must be three at least"),
        ('modules.scores=["tf"]', "modules.scores 'tf' is unknown"),
        ("modules.encoder=bert", "modules.encoder 'bert' is unknown"),
        ("modules.kept=2", "kept"),
        ("modules.lr=0", "lr"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, setting: str, message: str) -> None:
    done = call(tmp_path, setting)
    assert done.exit_code != 0
    told = done.output or str(done.exception)
    assert message in told
    assert "Traceback" not in told
