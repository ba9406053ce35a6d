"""``nqm neural modules`` with corrupted images."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from neural.combine.config import load_section
from neural.combine.members import Members
from neural.modules.corruptions import CorruptionsConfig
from neural.modules.networks import Examples, FitConfig, train_weights
from neural.modules.scores import Evidence, Posterior, Sample, Statistics, TfIdf
from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import read_table

SMALL = [
    "modules.task=corruptions", 'modules.corruptions=["contrast","brightness","fog"]',
    "modules.splits=1", "modules.train=40", "modules.held_out=20", "modules.sample=20",
    "modules.test=30", "modules.epochs=1", "modules.predict=false", 'modules.pools=["logits"]',
]  # fmt: skip


def call(out: Path, *settings: str) -> Result:
    words = itertools.chain.from_iterable(("--set", one) for one in (*SMALL, *settings))
    command = ["neural", "modules", *words, "--out", str(out), "--threads", "1"]
    return CliRunner().invoke(main, command)


def test_the_table_has_every_way_with_either_statistics(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.exit_code == 0, done.output
    table = read_table(tmp_path / "modules.parquet")
    assert set(table["target"]) == {"contrast", "brightness", "fog"}
    one = table[table["target"] == "fog"]
    plain = {"no_module", "best", "inverse_loss", "uniform", "similarity", "statistics", "entropy"}
    anew = {f"{name}, new statistics" for name in plain}
    assert set(one["score"]) == plain | anew | {"member", "mean_member"}
    assert set(one.loc[one["score"] == "member", "member"]) == {"contrast", "brightness"}
    averages = one[one["space"] == "weights"].set_index(["score", "kept", "weighting"])["nll"]
    assert averages["no_module"].iloc[0] != averages["no_module, new statistics"].iloc[0]
    (cell,) = (tmp_path / "cells").iterdir()
    when = cell.stat().st_mtime_ns
    (tmp_path / "modules.parquet").unlink()
    assert call(tmp_path).exit_code == 0
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()] == [when]
    assert read_table(tmp_path / "modules.parquet").equals(table)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modules.train=1790", "take 1860 examples, and digits has 1797"),
        ('modules.corruptions=["fog","contrast"]', "modules.corruptions must be three at least"),
        ('modules.corruptions=["mist"]', "modules.corruptions 'mist' is unknown"),
        ("modules.severity=6", "modules.severity must lie in 1..5; got 6"),
        ("modules.model=mlp", "'batchnorm' matches nothing in MLP"),
        ("modules.data=python_docs", "is a text"),
        ("modules.rank=2", "rank"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, setting: str, message: str) -> None:
    done = call(tmp_path, setting)
    assert done.exit_code != 0
    told = done.output or str(done.exception)
    assert message in told
    assert "Traceback" not in told


def test_distance_of_statistics_by_hand() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2)).eval()
    inputs = torch.tensor([[0.0, 1.0], [4.0, 1.0]])  # means 2 and 1, deviations 2 and 0
    states = []
    for mean, variance in (((2.0, 1.0), (4.0, 0.25)), ((0.0, 1.0), (1.0, 1.0))):
        state = dict(net.state_dict())
        state |= {"0.running_mean": torch.tensor(mean), "0.running_var": torch.tensor(variance)}
        states.append(state)
    members = Members.of_states(net, states)
    sample = Sample((), torch.ones(2, 2))
    evidence = Evidence((sample, sample), sample, ((inputs, torch.zeros(2).long()),))
    # (0 + 0) / 4 and (0 + .25) / .25: mean 1/2. (4 + 1) / 1 and (0 + 1) / 1: mean 3.
    np.testing.assert_allclose(Statistics()(members, evidence), [2.0, 1.0 / 3.0], rtol=1e-6)
    for score in (TfIdf(), Posterior()):
        with pytest.raises(NQMError, match="the sample has none"):
            score(members, evidence)
    plain = Members.of_states(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict()])
    with pytest.raises(NQMError, match="needs BatchNorm layers"):
        Statistics()(plain, evidence)


def test_only_chosen_weights_are_trained_and_statistics_follow_the_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    start = {name: value.clone() for name, value in net.state_dict().items()}
    inputs = torch.randn(64, 3) + 2.0
    data = Examples(inputs, (inputs[:, 0] > 2.0).long())
    fit = FitConfig(1e-2, 4, 4, 64)
    chosen = ("1.weight", "1.bias", "2.weight", "2.bias")
    state, epochs = train_weights(net, chosen, data, data, fit, torch.Generator().manual_seed(1))
    assert epochs == 4.0
    assert all(torch.equal(value, start[name]) for name, value in net.state_dict().items())
    assert torch.equal(state["0.weight"], start["0.weight"])
    assert not torch.equal(state["1.weight"], start["1.weight"])
    # Four batches of all data, momentum 0.1: 1 - 0.9^4 of the way from 0 to their mean.
    with torch.no_grad():
        mean = net[0](inputs).mean(0)
    torch.testing.assert_close(state["1.running_mean"], (1 - 0.9**4) * mean, rtol=1e-5, atol=1e-6)


def test_the_settings_of_the_page_are_the_defaults() -> None:
    path = Path(__file__).parents[3] / "docs/examples/modules_corruptions.toml"
    assert load_section(CorruptionsConfig, "modules", path) == CorruptionsConfig()
