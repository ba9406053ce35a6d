"""What runs cost, against counts by hand and against runs; and the command that prints it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from neural.data import StreamData, TextData, load
from neural.data.catalog import SIZES, Size
from neural.training.cost import (
    Cost,
    count_pass,
    estimate,
    hours,
    network,
    shares,
    side_by_side,
    size_of,
)
from neural.training.recipe import load_recipe
from neural.training.show import describe_recipe, overview
from neural.training.state import TrainState
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from tests.tiny_runs import LATE, recipe, tiny

DIGITS = SIZES["digits"]


def flops(**sections: Any) -> float:
    """FLOPs of training on one example."""
    run = tiny(**sections)
    size = size_of(run)
    return count_pass(network(run, size), run, size).flops / run.data.batch_size


def test_flops_of_a_perceptron_by_hand() -> None:
    # 64 -> 8 -> 10: forward and the weights' gradients take all products, gradients of inputs
    # those of the second layer only, as images have none.
    first, second = 64 * 8, 8 * 10
    assert flops() == 2 * (2 * (first + second) + second)


def test_flops_of_a_convolutional_net_by_hand() -> None:
    # 3x3 convolutions 1 -> 16 and 16 -> 32 on 8x8, 32 -> 32 on 4x4 after pooling, 32 -> 10.
    first = 9 * 1 * 16 * 64
    others = 9 * 16 * 32 * 64 + 9 * 32 * 32 * 16 + 32 * 10
    for pieces in (1, 2):
        found = flops(model={"name": "digits_cnn"}, train={"micro_batches": pieces})
        assert found == 2 * (2 * (first + others) + others)


@pytest.mark.parametrize("length", [12, 100])
def test_flops_of_an_lstm_by_hand(length: int) -> None:
    # At each of L symbols 4 gates of 7 units from 5 inputs and 7 units, then 7 -> symbols. The
    # first state is a constant, so that its product has no gradient with respect to the state.
    run = tiny(
        data={"name": "wikitext2_bytes", "length": length, "train_examples": None,
              "test_examples": None},
        model={"name": "lstm_lm", "embedding": 5, "hidden": 7},
    )  # fmt: skip
    size = size_of(run)
    found = count_pass(network(run, size), run, size).flops / run.data.batch_size
    at_each = 4 * 7 * (5 + 7) + 7 * size.classes
    assert found == pytest.approx(2 * 3 * at_each * length, rel=4 * 7 * 7 / at_each / length)


def test_what_is_saved_by_hand() -> None:
    # Of 32 rows in float32: images (64), the ReLU's result (8) and the logits' softmax (10),
    # and the labels in int64. Weights are not saved again.
    run = tiny()
    assert count_pass(network(run, DIGITS), run, DIGITS).saved == pytest.approx(
        32 * (64 + 8 + 10) * 4 + 32 * 8,
        abs=16,  # the loss's own sum of weights
    )


@pytest.mark.parametrize("leftover", ["carry", "members", "drop"])
def test_steps_are_those_of_the_run(
    leftover: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = TrainState.step

    def counted(self: TrainState, batches: Any) -> Any:
        sizes.append(len(batches) if self.late is not None else 0)
        return step(self, batches)

    monkeypatch.setattr(TrainState, "step", counted)
    late = LATE | {"leftover": leftover}
    train(tiny(late_phase=late), tmp_path / "run")
    moved = sum(size in (0, LATE["members"]) for size in sizes)
    cost = estimate(recipe({"a": {"late_phase": late}}))["a"]
    assert (cost.steps, cost.minibatches) == (moved, 4)
    assert cost.selected == 8 * 10 + 10


def test_shared_epochs_count_once() -> None:
    costs = estimate(recipe({"base": {}, "late": {"late_phase": LATE}}))
    assert (costs["base"].epochs, costs["late"].epochs) == (3, 2)
    assert costs["late"].flops * 3 == costs["base"].flops * 2


def test_memory_of_weights_and_state() -> None:
    def memory(**sections: Any) -> int:
        return estimate(recipe({"a": {}}, **sections))["a"].memory

    weights = 64 * 8 + 8 + 8 * 10 + 10
    plain = memory()
    adam = {"optimizer": "adam"}
    assert memory(train={"momentum": 0.0}) == plain - 4 * weights
    assert memory(train=adam) == plain + 4 * weights
    head = 8 * 10 + 10  # weights, gradients and momentum of each of three members
    late = estimate(recipe({"a": {"late_phase": LATE}}))["a"].memory
    assert late == plain + 3 * 3 * 4 * head


def test_hours() -> None:
    cost = Cost(0, 0, 0, 0, 0, 0, int(989e12 * 900), 0, 0)
    assert hours([cost, cost], "bfloat16", 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_data(name: str) -> None:
    try:
        data = load(name, download=False)
    except NQMError:
        pytest.skip(f"no data of {name}")
    if isinstance(data, TextData):
        data = data.compact()
        assert SIZES[name] == Size(len(data.train), len(data.test), data.symbols)
    elif isinstance(data, StreamData):
        counts = (len(data.train.labels), len(data.test.labels), data.classes)
        assert SIZES[name] == Size(*counts, (3, 224, 224), streamed=True)
    else:
        assert data.train is not None
        assert SIZES[name] == Size(len(data.train), len(data.test), data.classes, data.shape)


def test_selections_mean_the_weights_of_the_network() -> None:
    run = load_recipe("cifar10_bn").arms["late_phase"]
    found = shares(network(run, size_of(run)))
    assert found["head"] == ("linear.weight", "linear.bias")
    # 12 blocks with two BatchNorms each and one at the end, scale and shift.
    assert len(found["batchnorm"]) == 2 * (2 * 12 + 1)
    assert "groupnorm" not in found


def test_networks_are_built_without_memory() -> None:
    run = load_recipe("cifar10_bn").arms["base"]
    model = network(run, size_of(run))
    assert all(p.device == torch.device("meta") for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 36_479_194  # Zagoruyko and Komodakis


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    path = Path(__file__).parents[3] / "docs" / "tables" / "recipe_costs.csv"
    with path.open(newline="") as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    names = ("cifar10_bn", "digits_bn", "imagenet_resnet50")
    for row in overview("full", 0.25, None, *names).to_dict("records"):
        assert rows[str(row["recipe"])] == row


def test_show_prints_it(tmp_path: Path) -> None:
    def call(*words: str) -> str:
        done = CliRunner().invoke(main, ["neural", "show", *words])
        assert done.exit_code == 0, done.output
        return done.stdout

    out = call("digits_bn", "--set", "late_phase.members=7")
    assert "late_phase.members = 7" in out
    assert "head: 330 weights" in out
    content = json.loads(call("digits_bn", "--json"))
    expected = describe_recipe(load_recipe("digits_bn"), 0.25)
    assert content == json.loads(json.dumps(expected))
    assert content["total"]["flops"] == 5 * sum(arm["flops"] for arm in content["arms"].values())


def test_mistakes_of_show_are_one_line() -> None:
    for words, told in (
        (("digits_bm",), "no recipe is called 'digits_bm'"),
        (("digits_bn", "--all"), "leave out RECIPE"),
        (("digits_bn", "--csv", "x.csv"), "leave out RECIPE"),
        (("digits_bn", "--set", "late_phase.select=groupnorm"), "arm late_phase: select: 'groupn"),
        (("digits_bn", "--set", "data.train_examples=9999999"), "must be at most 1347"),
    ):
        done = CliRunner().invoke(main, ["neural", "show", *words])
        message = str(done.exception) if isinstance(done.exception, NQMError) else done.output
        assert done.exit_code != 0
        assert told in message


@pytest.mark.parametrize(
    ("name", "scale", "seeds", "cores", "expected"),
    [
        ("digits_bn", "full", 5, 3, 3),
        ("digits_bn", "full", 2, 16, 2),
        ("digits_bn", "smoke", 2, 2, 1),  # over before a process has started
        ("cifar10_bn", "full", 5, 16, None),  # large: threads of one process
    ],
)
def test_small_nets_train_side_by_side(
    name: str, scale: str, seeds: int, cores: int, expected: int | None
) -> None:
    assert side_by_side(load_recipe(name, scale), seeds, cores) == expected


def test_processes_are_limited_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neural.training.cost.available_memory", lambda: 5 * 2**30)
    assert side_by_side(load_recipe("digits_bn"), 5, 16) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [((), (2, 1)), (("--threads", "1"), (1, 1)), (("--workers", "3"), (3, None))],
)
def test_train_chooses_processes_unless_it_is_told(
    words: tuple[str, ...],
    expected: tuple[int, int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    threads: list[int] = []

    def run(*_: Any, workers: int, **__: Any) -> None:
        asked.append(workers)
        raise NQMError("enough")

    monkeypatch.setattr("neural.training.experiment.run_experiment", run)
    monkeypatch.setattr("neural.training.cost.side_by_side", lambda *_: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    CliRunner().invoke(main, ["neural", "train", "digits_bn", "--device", "cpu", *words])
    assert (asked, threads) == ([expected[0]], [] if expected[1] is None else [expected[1]])
