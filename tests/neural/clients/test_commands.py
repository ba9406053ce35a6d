"""``nqm neural clients`` as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

from neural.clients.config import ClientsConfig, load_config
from neural.clients.experiment import make_clients
from neural.combine.mean import weighted_mean
from neural.combine.sources import open_members
from neural.data import ImageBatches
from neural.evaluate import classification_metrics, predict
from neural.training.build import plain_model
from neural.training.recipe import load_recipe
from neural.training.task import Runtime, open_task
from nqm import NQMError
from nqm.cli import main
from nqm.table import read_table, write_table

RECIPE = ("digits_bn", "--scale", "smoke")
SMALL = (
    "--set", "clients.rounds=2", "--set", "clients.count=3", "--set", "data.test_examples=60",
)  # fmt: skip


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["neural", *map(str, words), "--threads", "1"])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clients")
    file = out / "clients.toml"
    file.write_text("[clients]\nbarrier = true\nrounds = 9\n[scope]\nstrength = 0.1\n")
    shown = call("clients", *RECIPE, "--config", file, *SMALL, "--out", out / "a")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("round 2 of 2: accuracy ")
    return out / "a"


def test_the_table_is_of_the_model_that_is_left(done: Path) -> None:
    table = read_table(done / "history.parquet")
    assert list(table["round"]) == [1, 2]
    assert list(table["epochs_total"]) == pytest.approx([1.0, 2.0])
    run = load_recipe("digits_bn", "smoke", ["data.test_examples=60"]).arms["base"]
    task = open_task(run, Runtime())
    model = plain_model(run.model, task)
    model.load_state_dict(torch.load(done / "model.pt", weights_only=True))
    found = classification_metrics(*predict(model, task.test()))
    last = table.iloc[-1]
    assert last["accuracy"] == pytest.approx(found["accuracy"])
    assert last["nll"] == pytest.approx(found["nll"], rel=1e-5)
    # The server has the clients' mean, and this the weights by examples.
    entries = json.loads((done / "members" / "members.json").read_text())
    states = [torch.load(done / "members" / e["file"], weights_only=True) for e in entries]
    name = "linear.weight"
    mean = sum(e["share"] * state[name] for e, state in zip(entries, states, strict=True))
    torch.testing.assert_close(model.state_dict()[name], mean)
    losses = []
    for state in states:
        model.load_state_dict(state)
        losses.append(classification_metrics(*predict(model, task.test()))["nll"])
    mean_loss = sum(e["share"] * loss for e, loss in zip(entries, losses, strict=True))
    assert last["mean_member_nll"] == pytest.approx(mean_loss, rel=1e-5)
    assert last["barrier"] == pytest.approx(max(0.0, found["nll"] - mean_loss), abs=1e-5)


def test_finished_rounds_are_read_and_other_ones_refused(done: Path) -> None:
    before = (done / "history.parquet").stat().st_mtime_ns
    file = done.parent / "clients.toml"
    again = call("clients", *RECIPE, "--config", file, *SMALL, "--out", done)
    assert again.exit_code == 0, again.output
    assert (done / "history.parquet").stat().st_mtime_ns == before
    other = call(
        "clients", *RECIPE, "--config", file, *SMALL, "--set", "clients.prox=1", "--out", done
    )
    assert other.exit_code != 0
    assert "clients.prox" in other.output
    assert "nothing was overwritten" in other.output


def test_the_clients_of_the_last_round_can_be_combined(done: Path) -> None:
    members = call("members", f"{done}/members/*.pt", "--like", "digits_bn", "--scale", "smoke")
    assert members.exit_code == 0, members.output
    assert "client2" in members.output


def test_a_folder_of_rounds_opens_as_its_clients_and_as_its_server(done: Path) -> None:
    """Without a recipe: the folder states architecture and data."""
    opened = open_members([f"{done}#members", done])
    entries = json.loads((done / "members" / "members.json").read_text())
    assert len(entries) == 3
    assert len(opened.members) == 4
    files = [*(done / "members" / entry["file"] for entry in entries), done / "model.pt"]
    for index, file in enumerate(files):
        expected = torch.load(file, weights_only=True)
        state = opened.members.state(index)
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert opened.run is not None
    assert opened.run.model.name == "digits_cnn"
    assert opened.run.data.test_examples == 60
    assert [one.epochs for one in opened.members] == [*(entry["share"] for entry in entries), 2.0]
    # The mean of the clients, weighted by examples, is the server's model.
    mean = weighted_mean(opened.members, [*(entry["share"] for entry in entries), 0.0])
    server = opened.members.state(3)
    assert any(name.endswith("running_var") for name in server)
    for name, value in server.items():
        torch.testing.assert_close(mean[name], value)
    shown = call("members", f"{done}#members")
    assert shown.exit_code == 0, shown.output
    assert "client2" in shown.output


def test_a_table_that_states_no_clients_is_told(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "a")
    write_table(tmp_path / "a" / "history.parquet", pd.DataFrame({"round": [1]}), {})
    with pytest.raises(NQMError, match=r"history\.parquet does not state what clients trained"):
        open_members([f"{tmp_path}/a#members"])


def test_every_client_has_its_own_examples_and_order() -> None:
    run = load_recipe("digits_bn", "smoke").arms["base"]
    task = open_task(run, Runtime())
    clients = make_clients(run, task, ClientsConfig(count=3))
    streams = [one.stream for one in clients]
    assert all(isinstance(one, ImageBatches) for one in streams)
    sizes = [len(one.images) for one in streams]  # type: ignore[attr-defined]
    assert sum(sizes) == 300
    assert [one.share for one in clients] == [size / 300 for size in sizes]
    assert len({one.seed for one in streams}) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("clients.count=0", "clients.count"),
        ("clients.count=31", "clients.count must be at most 30"),
        ("clients.dirichlet=-1", "clients.dirichlet"),
        ("clients.participation=0", "clients.participation"),
        ("clients.participation=1.5", "clients.participation"),
        ("clients.server_lr=0", "clients.server_lr"),
        ("clients.prox=-0.1", "clients.prox"),
        ("clients.mu=1", "clients.mu is not a known key"),
        ("scope.strength=0", "scope.strength must be above 0 unless rescale = true"),
        ("scope.target=end", "scope.target"),
        ("scope.divergence=js", "scope.divergence"),
        ("train.optimizer=adam", "train.optimizer must be 'sgd'"),
        ("train.micro_batches=2", "train.micro_batches would be ignored"),
        ("data.batch_size=0", "data.batch_size"),
        ("model.name=resnet9", "resnet.depth"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, setting: str, message: str) -> None:
    out = call("clients", *RECIPE, "--set", setting, "--out", tmp_path / "a")
    assert out.exit_code != 0
    assert message in out.output
    assert len(out.output.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_what_is_not_used_does_not_matter(done: Path) -> None:
    """Epochs, evaluations during training and other data sets are those of plain training."""
    file = done.parent / "clients.toml"
    unused = ("train.epochs=7", "evaluate.every=3", 'evaluate.ood=["mnist"]', "evaluate.line=true")
    words = [word for setting in unused for word in ("--set", setting)]
    again = call("clients", *RECIPE, "--config", file, *SMALL, *words, "--out", done)
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("round 2 of 2: accuracy ")


def test_more_mistakes(tmp_path: Path) -> None:
    arm = call("clients", *RECIPE, "--arm", "late", "--out", tmp_path / "a")
    assert "has no arm 'late'" in arm.output
    late = call("clients", *RECIPE, "--arm", "late_phase", "--out", tmp_path / "a")
    assert "clients have no late-phase members" in late.output
    with pytest.raises(NQMError, match=r"clients\.server_lr would be ignored"):
        load_config(None, ["clients.extrapolate=true", "clients.server_lr=0.5"])
    with pytest.raises(NQMError, match=r"scope\.target would be ignored"):
        load_config(None, ["scope.strength=0", "scope.rescale=true", "scope.target=fused"])


def test_a_batch_on_which_batchnorm_cannot_train_is_refused_before_the_first_round(
    tmp_path: Path,
) -> None:
    """BatchNorm1d has one number a channel in a minibatch of one image."""
    out = call(
        "clients", *RECIPE, "--set", 'model={name="mlp",norm="batch"}', "--set",
        "clients.least_examples=1", "--set", "data.batch_size=7", "--set", "clients.count=20",
        "--out", tmp_path / "a",
    )  # fmt: skip
    assert out.exit_code != 0
    assert "the last minibatch of client" in out.output
    assert not (tmp_path / "a").exists()
