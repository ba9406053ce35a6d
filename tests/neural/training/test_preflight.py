"""What is told before the first step: sizes, cycles, selections, a rehearsal to the last table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from neural.models import small_cnn
from neural.training import preflight
from neural.training.experiment import dry_run, run_experiment
from neural.training.state import TrainState
from neural.training.task import Runtime
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import read_table
from tests.tiny_runs import CNN, LATE, recipe, tiny, weights


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would fail the test."""

    def step(self: TrainState, batches: Any) -> Any:
        raise AssertionError("training has begun")

    monkeypatch.setattr(TrainState, "step", step)


#: What is wrong with the second arm, and what is said of it; 4 minibatches an epoch.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "selection": ({"late_phase": LATE | {"select": "groupnorm"}}, "'groupnorm' matches nothing"),
    "no_decay": ({"train": {"no_decay": "batchnorm"}}, "'batchnorm' matches nothing"),
    "data": ({"data": {"name": "digts"}}, "unknown data set 'digts'"),
    "option": ({"model": {"name": "mlp", "hiden": [3]}}, "did you mean 'hidden'"),
    "size of an image": ({"model": {"name": "mlp", "size": 7}}, "set model.size = 8"),
    "kind of data": ({"model": {"name": "lstm_lm"}}, "lstm_lm. takes a text"),
    "length of images": ({"data": {"length": 7}}, "data.length would be ignored"),
    "channels": ({"data": {"mean": [0.5, 0.5]}}, "one number for each of 1 channels"),
    "too many": ({"data": {"train_examples": 10**6}}, "train_examples must be at most 1347"),
    "checkpoint": ({"model": {"name": "mlp", "checkpoint": "no.pt"}}, "no.pt: no such file"),
    "weights": ({"model": {"name": "mlp", "hidden": [10**9]}}, "weights.* GiB at least"),
    "compile": (
        {"late_phase": LATE | {"fused": True}, "train": {"compile": True}},
        "train.compile does not compile the pass of late_phase.fused",
    ),
    "compiled LSTM": (
        {"data": {"name": "python_docs", "length": 50}, "model": {"name": "lstm_lm"},
         "train": {"compile": True}},
        "train.compile does not compile the recurrent layers of lstm_lm",
    ),
    "members": (
        {"data": {"batch_size": 1}, "late_phase": LATE | {"members": 10**6}},
        "members must be at most the 200 minibatches from epoch 1 on",
    ),
    "K": ({"late_phase": LATE | {"members": 5, "leftover": "drop"}}, "at most the 4 minibatches"),
    "K of them all": ({"late_phase": LATE | {"members": 9}}, "the 8 minibatches from epoch 1 on"),
    "EMA": (
        {
            "train": {"epochs": 4}, "late_phase": LATE | {"members": 7},
            "average": {"method": "ema", "start_epoch": 3},
        },
        "average.start_epoch must lie before the last complete cycle .* minibatch 11 of 16",
    ),
    "dropout": ({"evaluate": {"mc_dropout": 3}}, "mc_dropout needs a model with dropout"),
    "predictions": (
        {"model": {"name": "mlp", "dropout": 0.5}, "evaluate": {"mc_dropout": 10**12}},
        "predictions of 1,000,000,000,000 models .* GiB",
    ),
    "out of distribution": ({"evaluate": {"ood": ["svnh"]}}, "unknown data set 'svnh'"),
    "one example left over": (
        {"model": {"name": "mlp", "norm": "batch"}, "data": {"batch_size": 33}},
        "more than 1 value per channel",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_of_the_second_arm_is_told_before_the_first_trains(
    kind: str, tmp_path: Path
) -> None:
    changes, words = MISTAKES[kind]
    made = recipe({"first": {}, "second": changes})
    with pytest.raises(NQMError, match=rf"^arm second: .*{words}") as caught:
        run_experiment(made, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_steps")
def test_models_that_give_no_logits_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class TwoHeads(small_cnn.MLP):
        def forward(self, images: Any) -> Any:
            logits = super().forward(images)
            return (logits, logits) if self.training else logits

    monkeypatch.setattr(small_cnn, "MLP", TwoHeads)
    with pytest.raises(NQMError, match="gives a tuple in training, not logits"):
        train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_steps")
def test_what_fails_only_in_the_last_table_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("ema")

    monkeypatch.setattr("neural.training.report.fold", fails)
    with pytest.raises(NQMError, match=r"mlp cannot be trained as asked: KeyError: 'ema'"):
        train(tiny(), tmp_path / "run")


@pytest.mark.parametrize(
    "extra", [{}, {"late_phase": LATE, "average": {"method": "ema", "start_epoch": 1}}]
)
def test_rehearsal_changes_no_number(extra: dict[str, Any], tmp_path: Path) -> None:
    run = tiny(model=CNN | {"dropout": 0.5}, evaluate={"mc_dropout": 3, "flatness": True}, **extra)
    train(run, tmp_path / "with")
    train(run, tmp_path / "without", rehearsed=True)
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("history.parquet", "result.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_run_that_will_diverge_is_not_refused(tmp_path: Path) -> None:
    assert train(tiny(train={"lr": 1e30}), tmp_path / "hot").status == "diverged"
    noisy = tiny(late_phase=LATE | {"noise": 1e38})
    assert train(noisy, tmp_path / "noisy").status == "diverged"


@pytest.mark.parametrize(
    ("batches", "leftover", "members", "epochs", "start"),
    [(3, "carry", 6, 3, 1), (3, "members", 3, 3, 1), (3, "drop", 2, 3, 0), (3, "carry", 9, 3, 0)],
)
def test_cycles_that_fit(
    batches: int, leftover: str, members: int, epochs: int, start: int
) -> None:
    late = {"start_epoch": start, "members": members, "leftover": leftover}
    preflight.check_cycles(tiny(train={"epochs": epochs}, late_phase=late), batches)


def test_memory_is_what_a_process_may_use() -> None:
    import resource

    device = torch.device("cpu")
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert 2**28 < preflight.memory(device) < 2**50
    resource.setrlimit(resource.RLIMIT_AS, (2**40, before[1]))
    try:
        assert preflight.memory(device) <= 2**40
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_weights_are_counted_without_being_made(tmp_path: Path) -> None:
    """8 bytes each in float64, three times: weights, gradients, momentum."""
    # (64 h + h) + (10 h + 10) numbers for a hidden layer of h.
    hidden = 10**8
    gigabytes = 3 * 8 * (75 * hidden + 10) / 2**30
    run = tiny(model={"name": "mlp", "hidden": [hidden]}, train={"precision": "float64"})
    with pytest.raises(NQMError, match=rf"7,500,000,010 weights: .* takes {gigabytes:.1f} GiB"):
        train(run, tmp_path / "run", Runtime())


SWEEP = """
recipe = "digits_bn"
scale = "smoke"
arm = "late_phase"
data.train_examples = 100
data.batch_size = 32
train.epochs = 5
[sweep]
seed = [0, 1]
"""


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    ("axis", "words"),
    [
        ('"late_phase.members" = [2, 30]', "members must be at most the 12 minibatches"),
        ('"late_phase.select" = ["head", "groupnorm"]', "'groupnorm' matches nothing"),
        ('"data.train_examples" = [100, 1000000]', "train_examples must be at most"),
        ('"model.width" = [4, 1000000]', "GiB at least"),
    ],
)
def test_cells_of_a_sweep_are_checked_before_the_first_trains(
    axis: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "s.toml").write_text(SWEEP + axis)
    command = ["neural", "sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "s.csv")]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code == 2
    assert words in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert not list(tmp_path.glob("s.csv.runs/*"))


def test_a_sweep_trains_its_cells(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SWEEP + '"late_phase.members" = [2]')
    command = ["neural", "sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "s.csv")]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code == 0
    table = read_table(tmp_path / "s.csv")
    assert set(table["seed"]) == {0, 1}
    assert (table["status"] == "finished").all()
    assert len(list(tmp_path.glob("s.csv.runs/*/model.pt"))) == 2


@pytest.mark.usefixtures("no_steps")
def test_dry_run_trains_a_whole_minibatch_of_every_arm_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str | None]] = []
    try_out = TrainState.try_out

    def tried(self: TrainState, batch: Any) -> None:
        late = self.run.late_phase
        seen.append((len(batch[0]), None if late is None else late.select))
        before = {n: p.clone() for n, p in self.model.named_parameters()}
        try_out(self, batch)
        for name, p in self.model.named_parameters():
            assert torch.equal(p, before[name])

    monkeypatch.setattr(TrainState, "try_out", tried)
    monkeypatch.chdir(tmp_path)
    words = ["neural", "train", "digits_bn", "--scale", "smoke", "--dry-run"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == [
        "arm base", "arm late_phase",
    ]  # fmt: skip
    assert seen == [(32, None), (32, "batchnorm+head")]
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_steps")
def test_dry_run_tells_the_mistake_of_the_last_arm() -> None:
    made = recipe({"first": {}, "second": {"late_phase": LATE | {"select": "groupnorm"}}})
    with pytest.raises(NQMError, match=r"^arm second: .*'groupnorm' matches nothing"):
        dry_run(made)
    assert dry_run(made, arms=["first"]) == ["first"]


def test_a_missing_compiler_is_told_before_training(
    tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin cxx")

    monkeypatch.setattr(torch, "compile", fails)
    preflight.check_compiler.cache_clear()
    told = r"cannot compile for cpu here \(No working C\+\+ compiler found in cxx\); install a C"
    with pytest.raises(NQMError, match=told):
        train(tiny(train={"compile": True}), tmp_path / "run")
