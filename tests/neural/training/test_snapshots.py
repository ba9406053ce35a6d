"""Snapshots against loops written by hand and against the theory; killed runs; what is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nqm
from neural import models
from neural.combine.sources import open_members
from neural.data import evaluation_batches, load_images
from neural.evaluate import predict
from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.members import Batch
from neural.quadratic.train import NoiseStream, NoisyQuadratic, draw_start, minibatch_loss
from neural.training import experiment
from neural.training import state as state_module
from neural.training.cycles import cycles
from neural.training.load_run import reopen
from neural.training.results import Finished
from neural.training.run_folder import RunFolder, open_run
from neural.training.snapshots import SnapshotsConfig
from neural.training.state import TrainState
from neural.training.task import Runtime, Task
from neural.training.train import train
from nqm.errors import NQMError
from nqm.schedule import Cosine
from tests.tiny_runs import (
    BATCHES,
    CNN,
    LATE,
    assert_equal,
    assert_same_run,
    batches,
    in_process,
    recipe,
    tiny,
    train_until_killed,
    value,
    weights,
)
from tests.tolerances import agree, within_error

CHAIN = {"kind": "chain", "members": 3, "first_epochs": 2, "cycle_epochs": 1}
STAR = CHAIN | {"kind": "star"}
TRIANGLE = {
    "kind": "triangle", "members": 2, "first_epochs": 1, "cycle_epochs": 2,
    "lr_high": 0.08, "lr_low": 0.02,
}  # fmt: skip
KINDS = {"chain": (CHAIN, 4), "star": (STAR, 4), "triangle": (TRIANGLE, 5)}


def snapshots(folder: Path, count: int) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"members/snapshot{k}.safetensors") for k in range(count)]


# --- against loops written by hand ---------------------------------------------------------------


def by_hand(run: Any, kind: str, *, reset: bool) -> list[dict[str, Tensor]]:
    """Snapshots of a run of four epochs at 0.1, by torch alone; cosine cycles of one epoch."""
    torch.manual_seed(run.seed)
    model = models.build(run.model.name, classes=10, channels=1, **run.model.options).train()
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    stream, kept, first = batches(run), [], None
    for epoch in range(4):
        for i, (inputs, targets) in enumerate(stream.epoch(epoch)):
            rate = 0.1 if epoch < 2 else 0.05 * 0.5 * (1 + math.cos(math.pi * i / BATCHES))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if epoch == 0:
            continue
        kept.append(copy.deepcopy(model.state_dict()))
        first = first or copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if kind == "star":
            model.load_state_dict(first[0])
        if reset:
            optimizer.state.clear()
        elif kind == "star":
            optimizer.load_state_dict(copy.deepcopy(first[1]))
    return kept


@pytest.mark.parametrize("kind", ["chain", "star"])
@pytest.mark.parametrize("reset", [True, False])
def test_snapshots_are_those_of_a_plain_loop(tmp_path: Path, kind: str, reset: bool) -> None:
    settings = CHAIN | {"kind": kind, "lr_scale": 0.5, "reset_optimizer": reset}
    run = tiny(model=CNN, snapshots=settings, train={"lr": 0.1, "epochs": 4, "lr_every": "step"})
    train(run, tmp_path)
    for one, other in zip(snapshots(tmp_path, 3), by_hand(run, kind, reset=reset), strict=True):
        assert_equal(one, other)


def test_rates_of_a_triangle_move_with_every_minibatch() -> None:
    """Garipov et al.: t = (epoch mod c + i / n) / c, down to mid-cycle and up again."""
    rate = SnapshotsConfig(**TRIANGLE | {"cycle_epochs": 4}).cycle(Cosine(0.1, 0.0, 9))
    for step in range(8 * BATCHES):
        t = (step // BATCHES % 4 + step % BATCHES / BATCHES) / 4
        expected = 0.08 * (1 - 2 * t) + 0.02 * 2 * t if t < 0.5 else (
            0.02 * (2 - 2 * t) + 0.08 * (2 * t - 1)
        )  # fmt: skip
        assert rate(1 + step / BATCHES) == pytest.approx(expected, rel=1e-13)


def test_peak_of_a_cycle_is_that_of_the_first_epochs() -> None:
    """Of a warm-up too, whose first rate is not its largest."""
    warm = nqm.schedule.Warmup(4, Cosine(0.4, 0.0, 8))
    largest = max(0.4 * 0.5 * (1 + math.cos(math.pi * t / 8)) * min(1, (t + 1) / 4)
                  for t in range(8))  # fmt: skip
    rate = SnapshotsConfig(kind="chain", members=2, first_epochs=8, cycle_epochs=3, lr_scale=0.5)
    assert rate.cycle(warm)(8) == pytest.approx(0.5 * largest, rel=1e-13)
    assert rate.cycle(warm)(9) == pytest.approx(0.5 * largest * 0.75, rel=1e-13)


def test_triangle_goes_on_with_its_optimizer(tmp_path: Path) -> None:
    """Between two equal rates a triangle is constant: the run is that of plain training."""
    flat = TRIANGLE | {"lr_high": 0.05, "lr_low": 0.05}
    train(tiny(model=CNN, snapshots=flat, train={"epochs": 5}), tmp_path / "triangle")
    train(tiny(model=CNN, train={"epochs": 2}), tmp_path / "plain2")
    train(tiny(model=CNN, train={"epochs": 4}), tmp_path / "plain4")
    for state, epochs in zip(snapshots(tmp_path / "triangle", 2), (2, 4), strict=True):
        assert_equal(state, weights(tmp_path / f"plain{epochs}"))


# --- what a run leaves ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(KINDS))
def finished(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    settings, epochs = KINDS[request.param]
    folder = tmp_path_factory.mktemp("snapshots") / request.param
    train(tiny(model=CNN, snapshots=settings, train={"epochs": epochs}), folder)
    return folder, request.param


def test_rows_are_those_of_the_files(finished: tuple[Path, str]) -> None:
    folder, kind = finished
    run, _ = open_run(folder)
    states = snapshots(folder, KINDS[kind][0]["members"])
    digits = load_images("digits")
    test = list(evaluation_batches(digits.test.subset(60), 60, digits.mean, digits.std))
    probabilities, labels = [], None
    model = models.build("digits_cnn", classes=10, channels=1, width=4)
    table = RunFolder(folder, run).result()
    for k, state in enumerate(states):
        model.load_state_dict(state)
        logits, labels = predict(model.eval(), test)
        probabilities.append(logits.double().softmax(-1))
        nll = nn.functional.cross_entropy(logits.double(), labels)
        assert value(table, "snapshot", "nll", member=k) == pytest.approx(float(nll), rel=1e-6)
    assert labels is not None
    mean = torch.stack(probabilities).mean(0)
    nll = nn.functional.nll_loss(mean.log(), labels)
    assert value(table, "snapshot_ensemble", "nll") == pytest.approx(float(nll), rel=1e-6)
    hits = (mean.argmax(-1) == labels).double().mean()
    assert value(table, "snapshot_ensemble", "accuracy") == pytest.approx(float(hits))

    soup = {
        name: torch.stack([state[name] for state in states]).mean(0)
        for name, _ in model.named_parameters()
    }
    model.load_state_dict(states[0] | soup)
    recompute_statistics(model, batches(run).epoch(run.train.epochs))
    saved = weights(folder)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6)
    logits, _ = predict(model.eval(), test)
    nll = nn.functional.cross_entropy(logits.double(), labels)
    assert value(table, "snapshot_soup", "nll") == pytest.approx(float(nll), rel=1e-4)


def test_members_open_with_what_they_cost(finished: tuple[Path, str]) -> None:
    folder, kind = finished
    members = open_members([f"{folder}#snapshots"]).members
    assert [member.name.partition("#")[2] for member in members] == [
        f"snapshot{k}" for k in range(len(members))
    ]
    # Epochs up to each snapshot: 2 + k; of a star's cycles 2 + 1; in mid-cycle 1 + 1 + 2 k.
    expected = {"chain": [2, 3, 4], "star": [2, 3, 3], "triangle": [2, 4]}[kind]
    assert [member.epochs_all for member in members] == expected
    assert members.epochs_total == 4
    for member, state in zip(members, snapshots(folder, len(members)), strict=True):
        assert_equal(dict(member.read()), state)
    assert_equal(reopen(folder).model.state_dict(), weights(folder))


def test_reparametrised_weights_become_plain(tmp_path: Path) -> None:
    train(
        tiny(model={"name": "mlp", "hidden": [8], "lora": 2}, snapshots=STAR,
             train={"epochs": 4}), tmp_path,
    )  # fmt: skip
    plain = models.build("mlp", classes=10, channels=1, hidden=[8]).state_dict()
    for state in snapshots(tmp_path, 3):
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in plain.items()
        }


def test_cycles_are_evaluated_and_measured_from_where_they_begin(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """At every snapshot but one that other runs may have trained; distances are of weights only."""
    folder, kind = finished
    settings, epochs = KINDS[kind]
    run = tiny(
        model=CNN, snapshots=settings, train={"epochs": epochs}, evaluate={"every": 100}
    )  # fmt: skip
    train(run, tmp_path / "seed0")
    history = RunFolder(tmp_path / "seed0", run).history().set_index("epoch")
    first = settings["first_epochs"]
    if kind == "triangle":
        train(tiny(model=CNN, train={"epochs": first}), tmp_path / "plain")
        origin = weights(tmp_path / "plain")
    else:
        origin = snapshots(folder, 1)[0]
    at = {"chain": [2, 3, 4], "star": [2, 3, 4], "triangle": [2, 4]}[kind]
    assert sorted({*at, epochs} - {first}) == list(history.index)
    model = models.build("digits_cnn", classes=10, channels=1, width=4)
    names = [name for name, _ in model.named_parameters()]
    far = []
    for epoch, state in zip(at, snapshots(folder, len(at)), strict=True):
        gaps = [(state[name].double() - origin[name].double()).flatten() for name in names]
        far.append(float(torch.cat(gaps).norm()))
        if epoch != first:
            assert history.loc[epoch, "distance"] == pytest.approx(far[-1], rel=1e-5)

    table = cycles([Finished("arm", 0, RunFolder(tmp_path / "seed0", run))])
    dots = table[table["row"] == "snapshot"]
    assert dots["distance"].tolist() == pytest.approx(far, rel=1e-5)
    assert dots["step"].tolist() == [BATCHES * epoch for epoch in at]
    result = RunFolder(folder, open_run(folder)[0]).result()
    errors = [1 - value(result, "snapshot", "accuracy", member=k) for k in range(len(at))]
    assert dots["error"].tolist() == errors
    # Lines of cycles begin at distance 0: once, but in each cycle of a star.
    begun = table[(table["row"] == "test") & (table["distance"] == 0.0)]
    steps = {"chain": [first], "star": [first, first, 3], "triangle": [first]}[kind]
    assert begun["step"].tolist() == [BATCHES * epoch for epoch in steps]
    rates = table[table["row"] == "schedule"].set_index("step")["lr"]
    assert rates[: first * BATCHES - 1].to_numpy() == pytest.approx(0.05)
    if kind == "triangle":
        assert rates[BATCHES * 2.0] == pytest.approx(0.02)
    else:
        # One epoch is a cycle, and the rate moves once an epoch: it stays at its peak.
        assert rates[first * BATCHES :].to_numpy() == pytest.approx(0.05)


# --- killed, shared, in the way ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["star", "triangle"])
def test_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    settings, epochs = KINDS[kind]
    if kind == "star":
        settings = settings | {"reset_optimizer": False}  # so that the centre holds all it can
    run = tiny(model=CNN, snapshots=settings, train={"epochs": epochs})
    train(run, tmp_path / "whole")
    for moment in (45, 20):  # once after the first snapshot, then from there
        code, _ = in_process(train_until_killed, run, tmp_path / "killed", moment)
        assert code == -9
    train(run, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_arms_that_begin_alike_are_the_runs_they_are_alone(tmp_path: Path) -> None:
    arms = {
        "base": {},
        "chain": {"use": ["snapshots"]},
        "star": {"use": ["snapshots"], "snapshots": {"kind": "star", "reset_optimizer": False}},
    }
    made = recipe(arms, model=CNN, snapshots=CHAIN, train={"epochs": 4})
    (group,) = experiment.jobs(made)
    assert [job.start for job in group] == [None, ("base", 2), ("base", 2)]
    table = experiment.run_experiment(made, tmp_path / "together")
    assert {"snapshot_soup", "snapshot_ensemble", "snapshot"} <= set(table["weights"])
    for arm in arms:
        train(made.arms[arm], tmp_path / arm)
        assert_same_run(tmp_path / arm, tmp_path / "together" / arm / "seed0")


def test_a_lost_snapshot_is_told_when_the_run_goes_on(tmp_path: Path) -> None:
    run = tiny(model=CNN, snapshots=CHAIN, train={"epochs": 4})
    code, _ = in_process(train_until_killed, run, tmp_path / "run", 45)
    assert code == -9
    lost = tmp_path / "run/members/snapshot0.safetensors"
    lost.unlink()
    with pytest.raises(NQMError, match=r"snapshot0\.safetensors is missing; delete .* run again"):
        train(run, tmp_path / "run")


def test_list_is_written_at_the_end_only(tmp_path: Path) -> None:
    run = tiny(model=CNN, snapshots=CHAIN, train={"epochs": 4, "lr": 1e30})
    assert train(run, tmp_path).status == "diverged"
    assert not (tmp_path / "members/members.json").exists()


# --- refused before the first step ---------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"kind": "stars"}, ("snapshots.kind 'stars' is unknown; did you mean 'star'?",)),
    ({"members": 0}, ("snapshots.members",)),
    ({"members": 10**9}, ("snapshots.members", "10000")),
    ({"members": 4}, ("train.epochs must be 5", "got 4")),
    ({"first_epochs": 0}, ("snapshots.first_epochs",)),
    ({"cycle_epochs": 0}, ("snapshots.cycle_epochs",)),
    ({"lr_scale": 0.0}, ("snapshots.lr_scale",)),
    ({"lr_scale": 1.7e308}, ("snapshots.lr_scale times 20",)),
    ({"lr_high": 0.1}, ("snapshots.lr_high would be ignored", "lr_scale")),
    (TRIANGLE | {"lr_high": 0.01}, ("snapshots.lr_high must be at least lr_low, 0.02",)),
    (TRIANGLE | {"cycle_epochs": 3}, ("snapshots.cycle_epochs must be even", "got 3")),
    (TRIANGLE | {"lr_scale": 2.0}, ("snapshots.lr_scale would be ignored",)),
    (TRIANGLE | {"reset_optimizer": False}, ("snapshots.reset_optimizer would be ignored",)),
    (TRIANGLE, ("train.epochs must be 5", "got 4")),
    ({"kind": "triangle", "cycle_epochs": 2, "lr_low": 0.1}, ("snapshots.lr_high is missing",)),
]


@pytest.mark.parametrize(("settings", "told"), REFUSED)
def test_refused(settings: dict[str, Any], told: tuple[str, ...]) -> None:
    with pytest.raises(NQMError) as caught:
        tiny(snapshots=CHAIN | settings, train={"epochs": 4, "lr": 20.0})
    assert "\n" not in str(caught.value)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"), [("late_phase", LATE), ("average", {"method": "swa", "start_epoch": 1})]
)
def test_nothing_else_is_made_of_the_same_run(name: str, part: dict[str, Any]) -> None:
    with pytest.raises(NQMError, match=f"snapshots and {name} exclude each other"):
        tiny(snapshots=CHAIN, train={"epochs": 4}, **{name: part})


def test_run_without_snapshots_has_none_to_open(tmp_path: Path) -> None:
    train(tiny(), tmp_path)
    assert "snapshots" not in json.loads((tmp_path / "run.json").read_text())["config"]
    with pytest.raises(NQMError, match="this run kept none"):
        open_members([f"{tmp_path}#snapshots"])


# --- against the theory --------------------------------------------------------------------------

PROBLEM = nqm.Problem(
    curvature=[1.0, 0.3, 0.05],
    noise_variance=[0.4, 0.2, 0.1],
    initial_mean=[1.0, -2.0, 4.0],
    initial_variance=0.05,
)
RUNS, EPOCH, CYCLE, MEMBERS = 4000, 4, 3, 3


class Quadratic:
    """A stream of noise: minibatches of one example."""

    def __init__(self) -> None:
        self.noise = NoiseStream(PROBLEM, RUNS, 1)

    def __len__(self) -> int:
        return EPOCH

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Batch]:
        yield from self.noise.draw(EPOCH - start)


class QuadraticTask(Task):
    def loss(self, output: Tensor, targets: object = None) -> Tensor:
        return minibatch_loss(output, targets)


@pytest.mark.parametrize("kind", ["chain", "star"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_soups_of_a_quadratic_are_those_of_the_theory(
    monkeypatch: pytest.MonkeyPatch, kind: str, momentum: float
) -> None:
    lr = {"schedule": "cosine", "start": 0.4, "end": 0.0, "over": CYCLE}
    run = tiny(
        snapshots={"kind": kind, "members": MEMBERS, "first_epochs": CYCLE, "cycle_epochs": CYCLE},
        train={"epochs": CYCLE * MEMBERS, "lr": lr, "lr_every": "step", "momentum": momentum,
               "nesterov": False, "weight_decay": 0.0, "precision": "float64"},
    )  # fmt: skip
    model = NoisyQuadratic(PROBLEM, draw_start(PROBLEM, RUNS, 2))
    model.phi.requires_grad_(False)
    monkeypatch.setattr(state_module, "make_model", lambda *args, **more: model)
    stream = Quadratic()
    task = QuadraticTask("quadratic", 1, 1, stream, lambda: iter([]), 0.0)
    train_state = TrainState(run, task, Runtime())
    kept: list[np.ndarray] = []
    for epoch in range(run.train.epochs):
        for batch in stream.epoch(epoch):
            train_state.step([batch])
            if (state := train_state.snapshot()) is not None:
                kept.append(state["theta"].numpy() - PROBLEM.minimum)
    assert len(kept) == MEMBERS

    steps = EPOCH * CYCLE
    method = nqm.HeavyBall(momentum) if momentum else nqm.SGD()
    cycle = nqm.Program([nqm.Phase(method, lr=Cosine(0.4, 0.0, steps), batch_size=1, steps=steps)])
    theory = {
        "chain": nqm.Soup.of_snapshots(PROBLEM, cycle, MEMBERS),
        "star": nqm.Soup.of_star(PROBLEM, cycle, MEMBERS),
    }
    x = np.stack(kept)  # (M, runs, d)
    single = np.eye(MEMBERS)
    choices = [theory[kind].uniform(), *single]
    losses = np.stack([np.einsum("m,mrd->rd", w, x) ** 2 @ PROBLEM.weight for w in choices])
    error = losses.std(1, ddof=1) / math.sqrt(RUNS)
    within_error(losses.mean(1), [theory[kind].loss(w) for w in choices], error)
    other = theory["star" if kind == "chain" else "chain"]
    assert abs(other.loss(other.uniform()) - losses[0].mean()) > 10 * error[0]
    agree(theory[kind].loss(single[0]), other.loss(single[0]), 1e-12)
