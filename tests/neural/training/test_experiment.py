"""Experiments: shared beginnings, processes, tables, and what a run reports."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from neural import LatePhase, evaluate
from neural.evaluate import classification_metrics, ensemble_log_probs
from neural.late_phase import reparametrize
from neural.training import experiment, workers
from neural.training.build import make_model
from neural.training.config import RunConfig, build
from neural.training.experiment import jobs, run_experiment
from neural.training.load_run import reopen
from neural.training.plots import draw
from neural.training.recipe import Recipe, load_recipe
from neural.training.state import TrainState
from neural.training.task import Runtime, Task, open_task
from neural.training.train import train
from nqm.cli import main
from nqm.errors import NQMError
from nqm.files import locked
from nqm.table import read_metadata, read_table, write_table
from tests.tiny_runs import CNN, LATE, assert_same_run, mapping, recipe, tiny, value, weights

SWA = {"method": "swa", "start_epoch": 2}

# --- shared beginnings ---------------------------------------------------------------------------

LINE = {"schedule": "piecewise", "values": [0.1, 0.02], "boundaries": [2]}
OTHER = {"schedule": "piecewise", "values": [0.1, 0.05], "boundaries": [2]}


def forked() -> Recipe:
    """Arms that part at different epochs, with dropout and a row every second epoch."""
    return recipe(
        {
            "base": {},
            "base_swa": {"use": ["average"]},
            "late": {"use": ["late_phase"]},
            "late_swa": {"use": ["late_phase", "average"]},
            "early": {"use": ["late_phase"], "late_phase": {"start_epoch": 1}},
            "rate": {"train": {"lr": OTHER}},
            "decay": {"train": {"weight_decay": 0.01}},
            "at once": {"use": ["late_phase"], "late_phase": {"start_epoch": 0}},
            "ema": {"average": {"method": "ema", "start_epoch": 3, "decay": 0.5}},
        },
        model=CNN | {"dropout": 0.3},
        data={"batch_size": 50, "augment": ["crop"]},
        train={"epochs": 4, "lr": LINE},
        late_phase=LATE | {"start_epoch": 3, "members": 2, "noise": 0.1},
        average={"method": "swa", "start_epoch": 3},
        evaluate={"every": 2, "mc_dropout": 1},
        seeds=[5],
    )


def test_jobs_start_where_runs_part() -> None:
    [group] = jobs(forked())
    starts = {job.arm: job.start for job in group}
    assert starts == {
        "base": None,
        "base_swa": ("base", 3),
        "late": ("base", 3),
        "late_swa": ("base", 3),
        "early": ("base", 1),
        "rate": ("base", 2),
        "decay": None,
        "at once": None,
        "ema": ("base", 3),
    }
    assert group[0].keep == (1, 2, 3)
    assert not any(job.keep for job in group[1:])
    assert [job.seed for job in group] == [5] * len(group)


def test_rates_that_move_with_every_step_share_no_part_of_a_schedule() -> None:
    arms = {"a": {}, "b": {"train": {"lr": OTHER}}, "c": {"average": SWA}}
    made = recipe(arms, train={"lr": LINE, "lr_every": "step", "epochs": 3})
    assert [job.start for job in jobs(made)[0]] == [None, None, ("a", 2)]


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"batch_size": 20}}, {"model": {"hidden": [9]}}, {"train": {"momentum": 0.5}},
        {"evaluate": {"every": 2}}, {"train": {"epochs": 4}}, {"train": {"lr": 0.1}},
    ],
    ids=str,
)  # fmt: skip
def test_runs_that_differ_from_the_start_share_nothing(change: dict[str, Any]) -> None:
    assert jobs(recipe({"a": {}, "b": change}))[0][1].start is None


def test_forked_runs_are_the_runs_trained_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = forked()
    steps = 0
    original = TrainState.step

    def counted(self: TrainState, batches: Any) -> Any:
        nonlocal steps
        steps += len(batches)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", counted)
        run_experiment(made, tmp_path / "all")
    # Two batches an epoch: 3 arms of 4 epochs, and the others' ends.
    assert steps == 2 * (3 * 4 + 4 * 1 + 3 + 2)
    for arm, run in made.arms.items():
        alone = tmp_path / arm
        train(replace(run, seed=5), alone)
        assert_same_run(alone, tmp_path / "all" / arm / "seed5")
    assert not list((tmp_path / "all").rglob("epoch*.pt"))


def test_fork_whose_beginning_is_gone_is_trained_whole(tmp_path: Path) -> None:
    made = recipe({"a": {}, "b": {"average": SWA}})
    run_experiment(made, tmp_path, arms=["a"])
    run_experiment(made, tmp_path)
    train(made.arms["b"], tmp_path / "alone")
    assert_same_run(tmp_path / "alone", tmp_path / "b/seed0")


# --- tables --------------------------------------------------------------------------------------


def test_table_is_the_runs_own_and_deep_ensembles(tmp_path: Path) -> None:
    made = recipe(
        {"base": {}, "late": {"use": ["late_phase", "average"]}},
        late_phase=LATE,
        average={"method": "swa", "start_epoch": 1},
        seeds=3,
    )
    table = run_experiment(made, tmp_path)
    assert read_table(tmp_path / "results.parquet").equals(table)
    assert read_metadata(tmp_path / "results.parquet")["recipe"] == "tiny"
    history = read_table(tmp_path / "history.parquet")
    for arm in made.arms:
        for seed in range(3):
            folder = tmp_path / arm / f"seed{seed}"
            own = table[(table["arm"] == arm) & (table["seed"] == seed)]
            assert (own["status"] == "finished").all()
            columns = ["weights", "member", "data", "metric", "value"]
            result = read_table(folder / "result.parquet")
            assert own[columns].reset_index(drop=True).equals(result[columns])
            trained = history[(history["arm"] == arm) & (history["seed"] == seed)]
            expected = read_table(folder / "history.parquet")
            pd.testing.assert_frame_equal(
                trained[expected.columns].reset_index(drop=True), expected
            )
    for arm, name in (("base", "iterate"), ("late", "averaged"), ("late", "swa")):
        kept = [np.load(tmp_path / arm / f"seed{seed}/predictions.npz") for seed in range(3)]
        probabilities = np.mean([np.exp(one[name].astype(np.float64)) for one in kept], axis=0)
        labels = kept[0]["labels"]
        together = table[(table["arm"] == arm) & (table["seed"] == -1)]
        right = probabilities[np.arange(60), labels]
        assert value(together, f"deep_ensemble_{name}", "accuracy") == pytest.approx(
            (probabilities.argmax(1) == labels).mean()
        )
        assert value(together, f"deep_ensemble_{name}", "nll") == pytest.approx(
            -np.log(right).mean(), rel=1e-6
        )
    assert len(set(table[table["seed"] == -1]["weights"])) == 3


def test_some_arms_and_seeds(tmp_path: Path) -> None:
    made = recipe({"a": {}, "b": {"average": SWA}}, seeds=2)
    table = run_experiment(made, tmp_path / "some", arms=["b"], seeds=[7])
    assert set(table["arm"]) == {"b"}
    assert set(table["seed"]) == {7}
    assert [path.name for path in (tmp_path / "some").iterdir() if path.is_dir()] == ["b"]
    alone = tmp_path / "alone"
    train(replace(made.arms["b"], seed=7), alone)
    assert_same_run(alone, tmp_path / "some/b/seed7")
    with pytest.raises(NQMError, match=r"has no arm 'c'; known: a, b"):
        run_experiment(made, tmp_path / "none", arms=["c"])
    with pytest.raises(NQMError, match="seed must be 1 to 10000 different whole numbers from 0"):
        run_experiment(made, tmp_path / "none", seeds=[-1])
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_processes_change_no_number(tmp_path: Path) -> None:
    arms = {"base": {}, "late": {"use": ["late_phase"]}}
    made = recipe(arms, model=CNN, late_phase=LATE, seeds=2)
    shares: list[float] = []
    run_experiment(made, tmp_path / "one")
    run_experiment(
        made, tmp_path / "two", workers=2, progress=lambda _, share: shares.append(share)
    )
    for name in ("results.parquet", "history.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for arm in arms:
        for seed in ("seed0", "seed1"):
            assert_same_run(tmp_path / "one" / arm / seed, tmp_path / "two" / arm / seed)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_processes_compute_as_their_parent_does() -> None:
    before = workers._flags()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    told = workers._flags()
    workers._set_flags(before)
    try:
        workers._set_flags(told)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.benchmark
    finally:
        workers._set_flags(before)
    assert workers._flags() == before


def test_progress_rises_to_one(tmp_path: Path) -> None:
    shares: list[float] = []
    run_experiment(
        recipe({"a": {}, "b": {"average": SWA}}, seeds=2),
        tmp_path,
        progress=lambda stage, share: shares.append(share),
    )
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert shares[-1] == 1.0


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("arms", [["hot", "base"], ["base", "hot"], ["hot"]], ids=str)
def test_diverged_runs_are_rows_and_the_rest_goes_on(tmp_path: Path, arms: list[str]) -> None:
    kinds = {"hot": {"train": {"lr": 1e30}}, "base": {"average": SWA}}
    made = recipe({name: kinds[name] for name in arms}, seeds=2)
    table = run_experiment(made, tmp_path)
    lost = table[table["arm"] == "hot"]
    assert lost["status"].tolist() == ["diverged"] * 2
    assert lost["seed"].tolist() == [0, 1]
    assert lost["value"].isna().all()
    if "base" in arms:
        finished = table[(table["arm"] == "base") & (table["seed"] >= 0)]
        assert (finished["status"] == "finished").all()
        assert finished["value"].notna().all()
        assert set(finished["seed"]) == {0, 1}
    assert read_table(tmp_path / "results.parquet").equals(table)


def test_second_call_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe({"hot": {"train": {"lr": 1e30}}, "late": {"late_phase": LATE}}, seeds=2)
    first = run_experiment(made, tmp_path)
    whole = (tmp_path / "results.parquet").read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("opened a data set")

    monkeypatch.setattr("neural.training.train.open_task", never)
    again = run_experiment(made, tmp_path)
    assert again.equals(first)
    assert (tmp_path / "results.parquet").read_bytes() == whole


def test_results_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    made = recipe({"a": {}})
    other = pd.DataFrame({"x": [1.0]})
    for stamp in ({}, {"key": "k", "version": "v", "recipe": "another"}):
        write_table(tmp_path / "results.parquet", other, stamp)
        with pytest.raises(NQMError, match="nothing was overwritten"):
            run_experiment(made, tmp_path)
        assert read_table(tmp_path / "results.parquet").equals(other)
        assert [path.name for path in tmp_path.iterdir()] == ["results.parquet"]


def test_changed_recipe_is_refused_before_anything_is_lost(tmp_path: Path) -> None:
    run_experiment(recipe({"a": {}}), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(NQMError, match=r"train.lr.value = 0.05, you ask for 0.07"):
        run_experiment(recipe({"a": {}}, train={"lr": 0.07}), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_mistake_is_one_line_in_another_process_too(tmp_path: Path) -> None:
    made = recipe({"a": {}}, data={"train_examples": 10**6}, seeds=2)
    with pytest.raises(NQMError, match=r"^arm a: data.train_examples must be at most") as caught:
        run_experiment(made, tmp_path)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_damaged_run_is_named(tmp_path: Path) -> None:
    made = recipe({"a": {}}, seeds=2)
    run_experiment(made, tmp_path)
    (tmp_path / "a/seed1/result.parquet").write_bytes(b"PAR1")
    with pytest.raises(NQMError, match=r"a/seed1/result.parquet is not a complete table"):
        run_experiment(made, tmp_path)
    (tmp_path / "a/seed1/result.parquet").unlink()
    run_experiment(made, tmp_path)
    shutil.rmtree(tmp_path / "a/seed0")
    table = run_experiment(made, tmp_path)
    assert table["value"].notna().all()


# --- what a run reports --------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "model": CNN | {"dropout": 0.25},
    "late_phase": {"start_epoch": 1, "members": 3, "noise": 0.1},
    "train": {"epochs": 4},
    "evaluate": {"line": True, "flatness": True, "corruptions": True, "ood": ["digits"]},
}


def reopened(run: RunConfig, folder: Path) -> tuple[nn.Module, LatePhase | None, Task]:
    """Model of ``model.pt`` and, from ``late.pt``, base and members; read by hand."""
    task = open_task(run, Runtime())
    model = reparametrize.fold(make_model(run.model, task))
    model.load_state_dict(weights(folder))
    if run.late_phase is None:
        return model, None, task
    base = make_model(run.model, task)
    late = LatePhase(base, run.late_phase.members, run.late_phase.select)
    late.load_state_dict(weights(folder, "late"))
    return model, late, task


def check_metrics(table: pd.DataFrame, name: str, logits: torch.Tensor, labels: Any) -> None:
    probabilities = logits.double().softmax(-1).numpy()
    labels = np.asarray(labels)
    right = probabilities[np.arange(len(labels)), labels]
    assert value(table, name, "accuracy") == pytest.approx(
        (probabilities.argmax(1) == labels).mean()
    )
    assert value(table, name, "nll") == pytest.approx(-np.log(right).mean(), rel=1e-5)
    onehot = np.eye(10)[labels]
    brier = ((probabilities - onehot) ** 2).sum(1).mean()
    assert value(table, name, "brier") == pytest.approx(brier, rel=1e-5)
    assert len(table[(table["weights"] == name) & (table["metric"] == "ece")]) == 1


def test_every_model_is_what_it_is_called(tmp_path: Path) -> None:
    run = tiny(**ALL | {"evaluate": {"mc_dropout": 4}})
    table = train(run, tmp_path).result
    model, late, task = reopened(run, tmp_path)
    assert late is not None
    late.eval()
    batches = list(task.test())
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        members = torch.stack([late(x, member=k) for k in range(3)])
        averaged = late.averaged().eval()(x)
        outputs = late.averaged(batchnorm="outputs").eval()(x)
        assert torch.equal(model.eval()(x), averaged)
    check_metrics(table, "averaged", averaged, y)
    check_metrics(table, "averaged_outputs", outputs, y)
    check_metrics(table, "ensemble", members.double().softmax(-1).mean(0).log(), y)
    for k in range(3):
        expected = classification_metrics(members[k], y)
        for metric, number in expected.items():
            assert value(table, "member", metric, member=k) == pytest.approx(number, rel=1e-5)
    draws, labels = evaluate.mc_dropout(model, task.test(), 4)
    check_metrics(table, "mc_dropout", ensemble_log_probs(draws), labels)
    assert set(table["weights"]) == {
        "averaged", "averaged_outputs", "member", "ensemble", "mc_dropout"
    }  # fmt: skip
    assert set(table["data"]) == {"test"}
    kept = np.load(tmp_path / "predictions.npz")
    assert set(kept) == {"averaged", "averaged_outputs", "labels"}
    np.testing.assert_allclose(kept["averaged"], averaged.log_softmax(-1), atol=1e-5)
    np.testing.assert_array_equal(kept["labels"], y)


@pytest.mark.parametrize("late", [True, False], ids=["late-phase", "plain"])
@pytest.mark.parametrize("method", ["swa", "ema"])
def test_average_over_time_is_the_model_that_counts(
    tmp_path: Path, method: str, late: bool
) -> None:
    sections = {name: ALL[name] for name in ALL if late or name != "late_phase"}
    sections |= {"evaluate": {}, "average": {"method": method, "start_epoch": 2}}
    run = tiny(**sections)
    table = train(run, tmp_path).result
    model, *_, task = reopened(run, tmp_path)
    logits, labels = evaluate.predict(model, task.test())
    check_metrics(table, method, logits, labels)
    assert ("averaged" if late else "iterate") in set(table["weights"])
    same = value(table, "averaged" if late else "iterate", "nll")
    assert same != value(table, method, "nll")
    assert set(np.load(tmp_path / "predictions.npz")) >= {method, "labels"}


@pytest.mark.parametrize("average", [None, SWA], ids=["averaged", "swa"])
def test_what_is_asked_for_beside_test_metrics(
    tmp_path: Path, average: dict[str, Any] | None
) -> None:
    run = tiny(**ALL, **({} if average is None else {"average": average}))
    table = train(run, tmp_path).result
    model, late, task = reopened(run, tmp_path)
    assert late is not None
    assert task.normalised is not None
    primary = "averaged" if average is None else "swa"
    # Out of distribution: the same images as inside, here, so that areas are known.
    inside = evaluate.entropy_score(evaluate.predict(model, task.test())[0])
    images = evaluate_images()
    outside = evaluate.entropy_score(evaluate.predict(model, task.normalised(images))[0])
    pairs = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    assert value(table, primary, "auroc", "digits") == pytest.approx(float(pairs.mean()), rel=1e-6)
    for metric in ("aupr", "fpr95"):
        assert 0.0 <= value(table, primary, metric, "digits") <= 1.0
    # Corruptions: all of them at five severities; one by hand.
    damaged = table[table["data"].str.fullmatch(r"[a-z_]+ [1-5]") & (table["metric"] != "nll")]
    assert len(damaged) == 5 * len(evaluate.CORRUPTIONS)
    assert task.images is not None
    name = next(iter(evaluate.CORRUPTIONS))
    pixels = evaluate.corrupt(task.images.pixels, name, 3)
    score = evaluate.score(model, task.normalised(replace(task.images, pixels=pixels)))
    assert value(table, primary, "accuracy", f"{name} 3") == pytest.approx(score.accuracy)
    # Flatness.
    rises = evaluate.loss_rise(model, list(task.test()), [0.01, 0.2])
    for rise in rises:
        noise = f"noise {rise.sigma:g}"
        assert value(table, primary, "loss_rise", noise) == pytest.approx(
            rise.mean, rel=1e-3, abs=1e-6
        )
    # The line from a member to the average of the members.
    for position, end in ((0, late.member(0)), (1, late.averaged())):
        expected = evaluate.score(end, task.test()).loss
        found = value(table, primary, "nll", f"line {position}")
        assert found == pytest.approx(expected, rel=1e-5)
    assert len(table[table["data"].str.startswith("line ")]) == 11
    assert table["value"].notna().all()


def evaluate_images() -> Any:
    from neural.data import load_images

    return load_images("digits").test


def test_plain_run_has_plain_rows(tmp_path: Path) -> None:
    run = tiny(model=CNN, evaluate={"line": True})
    table = train(run, tmp_path).result
    model, _, task = reopened(run, tmp_path)
    assert set(table["weights"]) == {"iterate"}
    check_metrics(table, "iterate", *evaluate.predict(model, task.test()))
    assert not (tmp_path / "late.pt").exists()
    assert set(np.load(tmp_path / "predictions.npz")) == {"iterate", "labels"}


def test_history_tells_the_model_of_its_time(tmp_path: Path) -> None:
    run = tiny(model=CNN, train={"epochs": 5}, late_phase=LATE | {"start_epoch": 2},
               evaluate={"every": 2})  # fmt: skip
    outcome = train(run, tmp_path)
    history = outcome.history
    assert history["epoch"].tolist() == [2, 4, 5]
    assert history["weights"].tolist() == ["iterate", "averaged", "averaged"]
    assert history["spread"].iloc[0] == 0.0
    assert (history["spread"].iloc[1:] > 0).all()
    last = history.iloc[-1]
    assert last["loss"] == pytest.approx(value(outcome.result, "averaged", "nll"), rel=1e-6)
    assert last["accuracy"] == value(outcome.result, "averaged", "accuracy")
    assert (history["examples"] == 32 * history["step"]).all()


def test_text_is_reported_in_bits(tmp_path: Path) -> None:
    run = build(
        {
            "data": {
                "name": "python_docs", "batch_size": 8, "length": 20, "train_examples": 1700,
                "test_examples": 600,
            },
            "model": {"name": "lstm_lm", "embedding": 6, "hidden": 8, "rank1": "lstm.*"},
            "train": {"epochs": 3, "optimizer": "adam", "lr": 0.02, "weight_decay": 0.0},
            "late_phase": {"start_epoch": 1, "members": 3, "select": "rank1", "noise": 0.1},
            "average": {"method": "swa", "start_epoch": 2},
            "evaluate": {"batch_size": 100, "flatness": True},
        }
    )  # fmt: skip
    outcome = train(run, tmp_path)
    table = outcome.result
    names = {"averaged", "averaged_product", "swa", "swa_product", "member"}
    assert set(table["weights"]) == names
    for name in names - {"member"}:
        assert value(table, name, "bpc") == pytest.approx(value(table, name, "nll") / math.log(2))
    assert outcome.history["loss"].iloc[-1] < outcome.history["loss"].iloc[0] < math.log(256)
    model, *_, task = reopened(run, tmp_path)
    total, count = 0.0, 0
    # The state goes on from window to window: the same as one long window for each reader.
    readers: dict[int, list[Any]] = {}
    for batch in task.test():
        readers.setdefault(len(batch[0]), []).append(batch)
    with torch.no_grad():
        for windows in readers.values():
            x, y = (torch.cat(parts, 1) for parts in zip(*windows, strict=True))
            log_probs = model.eval()(x).double().log_softmax(-1)
            total -= float(log_probs.gather(-1, y[..., None]).sum())
            count += y.numel()
    assert count == 600
    assert value(table, "swa", "bpc") == pytest.approx(total / count / math.log(2), rel=1e-6)
    assert not (tmp_path / "predictions.npz").exists()


def test_text_experiment_has_no_deep_ensemble(tmp_path: Path) -> None:
    sections = {
        "data": {"name": "python_docs", "batch_size": 8, "length": 20, "train_examples": 500,
                 "test_examples": 200},
        "model": {"name": "lstm_lm", "embedding": 4, "hidden": 4},
        "train": {"epochs": 1, "lr": 0.5},
    }  # fmt: skip
    table = run_experiment(recipe({"a": {}}, **sections, seeds=2), tmp_path)
    assert set(table["weights"]) == {"iterate"}
    assert table["value"].notna().all()


def test_bundled_smoke_recipe_runs(tmp_path: Path) -> None:
    made = load_recipe(
        "digits_bn",
        "smoke",
        ["data.train_examples=64", "data.test_examples=40", "late_phase.members=2"],
    )
    table = run_experiment(made, tmp_path)
    assert set(table["arm"]) == set(made.arms)
    assert (table["status"] == "finished").all()
    note = json.loads((tmp_path / next(iter(made.arms)) / "seed0/run.json").read_text())
    assert note["status"] == "finished"
    assert mapping()["data"]["name"] == "digits"


# --- what a user may write -----------------------------------------------------------------------


@pytest.mark.parametrize("title", [r"$\frac{1}$", "5 $ or 6 $", "$", r"x\y", "a_b^c {", "<b>&"])
def test_a_title_is_drawn_as_it_is_written(title: str, tmp_path: Path) -> None:
    metrics = {"weights": "iterate", "member": -1, "data": "test", "metric": "accuracy"}
    results = pd.DataFrame([{"arm": "a", "seed": 0, **metrics, "value": 0.5}])
    history = pd.DataFrame([{"arm": "a", "seed": 0, "epoch": e, "accuracy": 0.5} for e in (1, 2)])
    paths = draw(results, history, tmp_path, title)
    assert [path.stat().st_size > 1000 for path in paths] == [True, True]


@pytest.mark.parametrize(
    ("arguments", "text", "words"),
    [
        (["--device", "meta"], "[arm.a]", "device 'meta' cannot be used"),
        (["--device", "tpu7"], "[arm.a]", "device 'tpu7' cannot be used"),
        (["--device", "cuda:9"], "[arm.a]", "device 'cuda:9' cannot be used"),
        ([], '[arm."../../x"]', "becomes the name of a folder and must not hold '/'"),
        ([], '[arm."."]', "must not begin with '.'"),
        ([], "[arm.a]\n[arm.A]", "'A' and 'a' would be one folder"),
        (["--set", "data.mean=[nan]"], "[arm.a]", "data.mean must be a finite number"),
        (["--set", "data.std=[0.0]"], "[arm.a]", "data.std must lie in"),
        (["--set", "model.hidden=[1000000000]"], "[arm.a]", "GiB at least, and there are"),
        (["--seed", "-1"], "[arm.a]", "seed must be"),
        (["--seed", "1", "--seed", "1"], "[arm.a]", "different whole numbers"),
        (["--seed", str(2**70)], "[arm.a]", "seed must be"),
        (["--set", "seeds=1000000000000"], "[arm.a]", "seeds must be at most 10000"),
    ],
)
def test_mistakes_by_the_command_line(
    arguments: list[str], text: str, words: str, tmp_path: Path
) -> None:
    base = "[data]\nname='digits'\n[model]\nname='mlp'\n[train]\nepochs=1\nlr=0.1\n"
    (tmp_path / "r.toml").write_text(base + text)
    command = ["neural", "train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(main, [*command, "--threads", "1", *arguments])
    assert answer.exit_code == 2
    assert words in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    made = recipe({"base": {}}, train={"epochs": 1})
    asked = 0

    def second(stage: str, share: float) -> None:
        nonlocal asked
        assert stage == "training"
        asked += 1
        if share < 1.0:  # in the middle of a run
            with pytest.raises(NQMError, match="seed0 is being written by process"):
                run_experiment(made, tmp_path / "out")
            with pytest.raises(NQMError, match="seed0 is being written by process"):
                train(made.arms["base"], tmp_path / "out/base/seed0")

    run_experiment(made, tmp_path / "out", progress=second)
    assert asked > 1
    assert not list(tmp_path.rglob(".*"))


def test_jobs_of_different_seeds_share_a_folder(tmp_path: Path) -> None:
    """As the jobs of an array do: the last one's table has the runs of all."""
    made = recipe({"base": {}}, train={"epochs": 1})
    others = iter([11])

    def second(stage: str, share: float) -> None:
        for seed in others:
            run_experiment(made, tmp_path, seeds=[seed])

    run_experiment(made, tmp_path, seeds=[10], progress=second)
    table = run_experiment(made, tmp_path, seeds=[12])
    assert set(table["seed"]) == {-1, 10, 11, 12}
    assert not list(tmp_path.rglob(".*"))


def test_tables_wait_for_another_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe({"base": {}}, train={"epochs": 1})
    monkeypatch.setattr(experiment, "PATIENCE", 0.0)
    with locked(tmp_path, folder=True), pytest.raises(NQMError, match="is being written by"):
        run_experiment(made, tmp_path)
    monkeypatch.setattr(experiment, "PATIENCE", 60.0)
    sleeps = []
    with ExitStack() as stack:
        stack.enter_context(locked(tmp_path, folder=True))

        def sleep(seconds: float) -> None:
            sleeps.append(seconds)
            stack.close()

        monkeypatch.setattr(experiment.time, "sleep", sleep)
        assert not run_experiment(made, tmp_path).empty
    assert len(sleeps) == 1


# --- damaged folders -----------------------------------------------------------------------------


def test_what_is_damaged_in_a_run_is_named(tmp_path: Path) -> None:
    made, run = recipe({"base": {}}, seeds=2), tmp_path / "base" / "seed1"
    whole = run_experiment(made, tmp_path)

    def refused(words: str) -> None:
        with pytest.raises(NQMError, match=words):
            run_experiment(made, tmp_path)

    predictions = run / "predictions.npz"
    kept = predictions.read_bytes()
    for content in (b"", b"\x80junk", kept[:-30]):
        predictions.write_bytes(content)
        refused(r"predictions\.npz holds no predictions")
    arrays = dict(np.load(tmp_path / "base" / "seed0" / "predictions.npz"))
    np.savez(predictions, **(arrays | {"labels": arrays["labels"][1:]}))
    refused("its shapes do not fit")
    predictions.write_bytes(kept)
    for name, column in (("result", "data"), ("history", "epoch")):
        kept = (run / f"{name}.parquet").read_bytes()
        (run / f"{name}.parquet").unlink()
        write_table(run / f"{name}.parquet", pd.DataFrame({"a": ["x"]}), {})
        refused(rf"{name}\.parquet has no column {column}")
        (run / f"{name}.parquet").write_bytes(kept)
    pd.testing.assert_frame_equal(run_experiment(made, tmp_path), whole)
    with pytest.raises(NQMError, match="seed1 is the folder of a run"):
        run_experiment(made, run)


@pytest.mark.parametrize("name", ["run.json", "model.pt"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run_experiment(recipe({"base": {}}, seeds=1), tmp_path)
    run = tmp_path / "base" / "seed0"
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(NQMError, match=f"{name} is a pipe or a device"):
        reopen(run)
