"""Advice on a network that has no bridge: the measurement, and the command on a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from neural.bridge.advise import advise
from neural.bridge.config import BridgeConfig, Plan, Training
from neural.bridge.descent_path import DescentPath, follow_descent
from neural.bridge.iterate_averages import Running
from neural.bridge.pipeline import load_config
from neural.bridge.probe import Probe
from neural.bridge.quick import SETTINGS, cost_in_runs, measure_for_advice
from neural.bridge.sgd_chains import noise_free
from neural.curvature.risk import EmpiricalRisk
from neural.training.experiment import run_experiment
from nqm.cli import main
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, quadratic, scatter, slide, tanh_risk
from tests.tiny_runs import recipe

CURVATURE = (2.0, 0.7, 0.2)


def test_on_a_quadratic_every_rate_is_predicted_from_one_measurement() -> None:
    """The prediction is descent plus half the trace of H times the weights' covariance."""
    bowl = Bowl(CURVATURE, away=0.02)  # noise decides, and not descent
    config, _ = load_config(None, [*SETTINGS, "bridge.eigenpairs=0", "bridge.steps=60"])
    plan = Plan(members=(1, 4), runs=4, records=1)
    table = measure_for_advice(bowl.risk, config, plan)
    iterate = table[table["weights"] == "iterate"]
    assert len(iterate) == 6 * 2
    slope = bowl.gradient().numpy()
    for _, row in iterate.iterrows():
        moved = slide(slope, bowl.hessian, row["lr"], 60)
        spread = scatter(bowl.hessian, bowl.noise, row["lr"], 32, 60)
        excess = 0.5 * float(np.trace(bowl.hessian @ spread))
        assert row["predicted_rise"] == pytest.approx(excess / row["members"], rel=1e-7)
        # Descent is followed in few gradients, as a flow.
        assert row["descent"] == pytest.approx(quadratic(slope, bowl.hessian, moved), rel=0.02)
        assert abs(row["noise_growth"]) < 1e-8, "the noise is the same everywhere"
        assert abs(row["noise_change_on_path"]) < 1e-8
    assert sorted(iterate["lr"].unique() * 2.0) == pytest.approx(
        [2.0**-i for i in range(5, -1, -1)]
    )
    assert table["measured"].isna().all()


def test_slope_and_noise_are_those_of_all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minimum of the loss of some examples is none of the loss of all."""
    bowl = Bowl(CURVATURE)
    (x, y), *_ = bowl.risk.batches
    split = EmpiricalRisk(
        bowl.risk.model, [(x[:16], y[:16]), (x[16:], y[16:])], loss=bowl.risk.example_loss
    )
    config = BridgeConfig(
        eigenpairs=2, noise_samples=1, lanczos_steps=3, displacements=2,
        averaging_displacements=1, lr_times_sharpness=(0.1, 0.2), steps=10,
    )  # fmt: skip
    seen: list[int] = []
    product = EmpiricalRisk.hessian_product

    def counted(risk: EmpiricalRisk, v: object) -> object:
        seen.append(risk.examples)
        return product(risk, v)  # type: ignore[arg-type]

    monkeypatch.setattr(EmpiricalRisk, "hessian_product", counted)
    table = measure_for_advice(split, config, Plan(members=(1,), runs=1, records=1))
    # The first batch, the stiffest example alone, and the two on which every risk is checked.
    assert set(seen) == {1, 2, 16}
    assert (table["descent"].abs() < 1e-10).all(), "the checkpoint is the minimum of all examples"


def test_rates_that_one_example_makes_unstable_are_left_out() -> None:
    """Every example of the bowl has curvature 2; drawn twice of two, lr = 1 is the edge."""
    settings = [*SETTINGS, "bridge.eigenpairs=0", "bridge.steps=20", "bridge.batch_sizes=[2]"]
    config, _ = load_config(None, [*settings, "bridge.lr_times_sharpness=[0.5,1.9,1.99]"])
    risk, plan = Bowl(CURVATURE, away=0.3).risk, Plan(members=(1,), runs=1, records=1)
    assert measure_for_advice(risk, config, plan)["lr"].nunique() == 3
    one = replace(config, batch_sizes=(1,))
    assert measure_for_advice(risk, one, plan)["lr"].unique() == pytest.approx([0.25])
    with pytest.raises(NQMError, match="no training is predicted: every rate is unstable"):
        measure_for_advice(risk, replace(one, lr_times_sharpness=(1.9,)), plan)


def short_bowl(away: float = 6.0) -> tuple[Bowl, BridgeConfig, Plan]:
    settings = [*SETTINGS, "bridge.eigenpairs=0", "bridge.steps=160", "bridge.batch_sizes=[8]"]
    config, _ = load_config(None, [*settings, "bridge.lr_times_sharpness=[0.1,0.2,0.4]"])
    return Bowl(CURVATURE, away=away), config, Plan((1, 4), 4, 1)


def test_noise_is_scaled_from_short_runs() -> None:
    """Of 96 runs, one eighth of the steps: the excess is about that of the covariance at the end.

    The rate in the middle is not tried: its noise is that of a neighbour, in proportion to lr. By
    descent alone the lowest ends above it.
    """
    bowl, config, plan = short_bowl()
    told: list[tuple[str, float]] = []
    table = measure_for_advice(
        bowl.risk, config, plan, lambda stage, share: told.append((stage, share)), 128
    )
    alone = table[(table["weights"] == "iterate") & (table["members"] == 1)].set_index("lr")
    assert alone.index.to_numpy()[:3] * 2.0 == pytest.approx([0.1, 0.2, 0.4])
    low, alone = alone.iloc[0], alone.iloc[1:3]
    assert np.isnan(low["probe_runs"])
    assert low["predicted"] == low["descent"] > alone["predicted"].min()
    assert (alone["probe_runs"] == 128).all()
    assert (alone["probe_steps"] == 20).all()
    assert (alone["probe_left"] == 0).all()
    assert alone["probe_lr"].to_numpy() * 2.0 == pytest.approx([0.4, 0.4])
    slope = bowl.gradient().numpy()
    for lr, row in alone.iterrows():
        spread = scatter(bowl.hessian, bowl.noise, float(lr), 8, 160)  # type: ignore[arg-type]
        excess = 0.5 * float(np.trace(bowl.hessian @ spread))
        assert row["excess"] == pytest.approx(excess, rel=0.9), "5 standard errors, and the law"
        moved = slide(slope, bowl.hessian, float(lr), 160)  # type: ignore[arg-type]
        assert row["descent"] == pytest.approx(quadratic(slope, bowl.hessian, moved), rel=0.02)
        assert row["predicted"] == pytest.approx(row["descent"] + row["floor"] + row["excess"])
        assert row["floor"] >= 0.0
    stages = {stage.partition(",")[0].partition(" to ")[0] for stage, _ in told}
    assert {"short runs", "descent"} <= stages


def test_the_cost_is_told_in_runs_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all examples are counted, those of short runs are known: an eighth of each."""
    bowl, config, plan = short_bowl()
    counted: list[int] = []
    gradient = EmpiricalRisk.loss_and_gradient

    def count(risk: EmpiricalRisk, *at: Any) -> Any:
        counted.append(risk.examples)
        return gradient(risk, *at)

    monkeypatch.setattr(EmpiricalRisk, "loss_and_gradient", count)
    monkeypatch.setattr("neural.bridge.short_runs.probe", shorts(0.15, []))
    measure_for_advice(bowl.risk, config, plan, None, 4)
    rates = (0.05, 0.1, 0.2)
    usual, most = cost_in_runs(bowl.risk.examples, replace(config, lr_times_sharpness=rates), 4)
    taken = sum(counted) / (160 * 8)
    assert taken == pytest.approx(usual - 3 * 4 / 8, rel=0.35)
    assert taken + 4 * 4 / 8 < most


def shorts(left_from: float, seen: list[float]) -> Any:
    """Short runs that leave at some rates, and have next to no noise at the others."""

    def probe(risk: EmpiricalRisk, trainings: list[Training], *_: Any) -> list[Probe]:
        seen.extend(each.lr for each in trainings)
        losses = dict.fromkeys(("iterate", "swa", "ema"), (-1.0 + 1e-9, -1.0))
        short = [replace(each, steps=20) for each in trainings]
        return [Probe(each, 4, int(each.lr >= left_from), losses) for each in short]

    return probe


@pytest.mark.parametrize(
    ("left_from", "tried", "best"),
    [
        (0.15, [0.4, 0.2, 0.05, 0.1], 0.1),  # the highest left, and the one below it is tried
        (0.09, [0.4, 0.2, 0.05, 0.1], 0.05),
        (0.3, [0.4, 0.2, 0.05], 0.2),
        (0.7, [0.4, 0.2, 0.05], 0.4),  # twice the highest
    ],
)
def test_rates_are_tried_from_the_highest_on(
    left_from: float, tried: list[float], best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where noise hardly counts, the highest rate at which no run leaves is the best."""
    bowl, config, plan = short_bowl(away=30.0)
    seen: list[float] = []
    monkeypatch.setattr("neural.bridge.short_runs.probe", shorts(left_from, seen))
    table = measure_for_advice(bowl.risk, config, plan, None, 4)
    assert seen == pytest.approx(tried)
    left = table[table["lr"] >= left_from * 0.999]
    assert left["predicted"].isna().all()
    assert (left["probe_left"] == 1).all()
    found = advise(table)
    assert found.basis == "short runs"
    assert found.lr == pytest.approx(best)
    rests = [words for words in found.words if words.startswith("This rests on 4 short runs of 20")]
    assert len(rests) == 1
    assert "steps at this rate" in rests[0]
    # Without noise the fall of the rate below is 99 % of it and more; of the lowest there is none.
    safer = [words for words in found.words if words.startswith("Safer and hardly worse: at lr")]
    assert bool(safer) == (best > 0.06)
    assert not safer or f"at lr = {0.5 * best:.3g} " in safer[0]
    told = [words for words in found.words if words.startswith("Too high: at lr = ")]
    assert bool(told) == (left_from <= max(tried))
    beyond = any("the highest of the reliable rates" in words for words in found.words)
    assert beyond == (not told)


def test_a_single_rate_that_was_asked_for_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    bowl, config, plan = short_bowl()
    seen: list[float] = []
    monkeypatch.setattr("neural.bridge.short_runs.probe", shorts(9.0, seen))
    alone = replace(config, lr_times_sharpness=(0.4,))
    assert measure_for_advice(bowl.risk, alone, plan, None, 4)["lr"].nunique() == 1
    assert seen == pytest.approx([0.2])


def test_without_a_rate_at_which_runs_stay_there_is_no_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bowl, config, plan = short_bowl()
    seen: list[float] = []
    monkeypatch.setattr("neural.bridge.short_runs.probe", shorts(0.0, seen))
    with pytest.raises(NQMError, match="no training is predicted"):
        measure_for_advice(bowl.risk, config, plan, None, 4)
    assert seen == pytest.approx([0.4, 0.2, 0.05]), "the lowest left as well"


def test_a_path_of_descent_is_continued() -> None:
    risk = tanh_risk()
    whole = follow_descent(risk, 80.0, 1.0)
    known = follow_descent(risk, 10.0, 1.0)
    longer = follow_descent(risk, 80.0, 1.0, known=known)
    np.testing.assert_allclose(longer.times, whole.times, rtol=1e-12)
    assert (longer.weights - whole.weights).abs().max() < 1e-12
    assert (longer.slopes - whole.slopes).abs().max() < 1e-12
    assert follow_descent(risk, 5.0, 1.0, known=known) is known


@pytest.mark.parametrize("power", [0.6, 0.0, -1.3])
def test_a_fall_is_continued_as_a_power_of_time(power: float) -> None:
    """The loss c - t^power, of a power 0 c - log t; also where it rises, and where it runs away."""
    times = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    with np.errstate(divide="ignore"):
        losses = -np.log(times) if not power else -np.sign(power) * times**power
    none = torch.zeros(5, 1)
    path = DescentPath(times, none, none, losses, 0)
    end = np.log(11.0) if not power else np.sign(power) * 11.0**power
    assert path.fall(11.0) == pytest.approx(losses[-1] + end, rel=1e-12)
    assert path.fall(4.0) == 0.0
    assert replace(path, losses=-losses).fall(11.0) == 0.0
    assert replace(path, losses=-(times**3)).fall(8.0) == pytest.approx(2 * (64 - 8))


def test_a_positive_loss_falls_relatively_and_stays_positive() -> None:
    """The logarithm c - t^power; beyond a constant slope of it, exponentially in time."""
    times = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    path = DescentPath(times, torch.zeros(5, 1), torch.zeros(5, 1), np.exp(-(times**0.7)), 0)
    assert path.losses[-1] - path.fall(50.0) == pytest.approx(np.exp(-(50.0**0.7)), rel=1e-9)
    path = replace(path, losses=np.exp(-0.01 * times**3))
    assert path.losses[-1] - path.fall(16.0) == pytest.approx(np.exp(-0.01 * (64 + 6 * 56)))


@pytest.mark.parametrize(("part", "explained"), [(0.3, 0.3), (1.5, 1.0), (-0.2, 0.0)])
def test_a_mean_that_lags_is_as_far_as_descent_at_a_lower_rate(
    part: float, explained: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean that is behind by a part of what half of the rate is: at the end by the same part.

    At half of the rate of the short runs it is half of that part. The rest is the floor, with the
    square of the rate, since the noise of the bowl is the same everywhere.
    """
    bowl, config, plan = short_bowl(away=30.0)
    path = follow_descent(bowl.risk, 16.0, 2.0)

    def descended(lr: float, steps: int) -> float:
        return bowl.risk.loss(path.mean(Training(lr, 8, steps), steps))

    def behind(lr: float, steps: int) -> float:
        return descended(0.5 * lr, steps) - descended(lr, steps)

    def probe(risk: EmpiricalRisk, trainings: list[Training], *_: Any) -> list[Probe]:
        found = []
        for each in trainings:
            mean, excess = descended(each.lr, 20) + part * behind(each.lr, 20), 9.0
            losses = dict.fromkeys(("iterate", "swa", "ema"), (mean + excess, mean + excess / 3))
            left = int(each.lr > 0.3)
            found.append(Probe(replace(each, steps=20), 4, left, {} if left else losses))
        return found

    monkeypatch.setattr("neural.bridge.short_runs.probe", probe)
    table = measure_for_advice(bowl.risk, config, plan, None, 4)
    one = table[(table["weights"] == "iterate") & (table["members"] == 1)]
    row = one[one["lr"].sub(0.1).abs() < 1e-9].iloc[0]  # descent is followed to its end
    assert row["probe_lr"] == pytest.approx(0.2)
    assert row["excess"] == pytest.approx(4.5, rel=1e-6)
    assert row["cross"] == pytest.approx(0.5 * explained * behind(0.1, 160), rel=1e-6)
    rest = 0.25 * (max(part, 0.0) - explained) * behind(0.2, 20)
    assert row["floor"] == pytest.approx(rest, rel=1e-6, abs=1e-9)


def test_descent_ends_early_where_it_may_take_no_more_gradients() -> None:
    risk = tanh_risk()
    whole = follow_descent(risk, 80.0, 1.0)
    part = follow_descent(risk, 80.0, 1.0, most=whole.work - 1)
    assert part.work < whole.work
    np.testing.assert_array_equal(part.times, whole.times[:-1])
    assert torch.equal(part.weights, whole.weights[:-1])
    assert len(follow_descent(risk, 80.0, 1.0, most=0).times) == 4
    assert follow_descent(risk, 80.0, 1.0, most=whole.work).losses[-1] == whole.losses[-1]


def test_the_noise_is_not_measured_where_descent_alone_decides() -> None:
    """From far away the lowest rate falls less than the others are predicted to reach."""
    bowl = Bowl(CURVATURE, away=30.0)
    config, _ = load_config(None, [*SETTINGS, "bridge.eigenpairs=0", "bridge.steps=60"])
    table = measure_for_advice(bowl.risk, config, Plan((1, 4), 4, 1))
    low = table[table["lr"] == table["lr"].min()]
    assert low["predicted_rise"].isna().all()
    assert (low["predicted"] == low["descent"]).all()
    assert low["predicted"].min() > table.loc[table["predicted_rise"] > 0, "predicted"].min()
    assert not any("lowest of the" in words for words in advise(table).words)


def test_late_phase_members_are_refused() -> None:
    plan = Plan((2,), runs=4, late_phase="all")
    with pytest.raises(NQMError, match=r"plan\.late_phase: advice is for independent runs"):
        measure_for_advice(Bowl(CURVATURE).risk, replace(BridgeConfig(), steps=5), plan)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_experiment(recipe({"base": {}}), out, seeds=[0])
    return out / "base" / "seed0"


def test_the_command_measures_a_run(run: Path) -> None:
    words = ["neural", "advise", str(run), "--select", "head", "--steps", "20", "--members", "3"]
    words += ["--batch-size", "10", "--set", "bridge.weight_decay=0.1"]
    words += ["--set", "bridge.lr_times_sharpness=[0.01,0.02]"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("- Train 20 steps at lr = ")
    cost, more = done.stderr.strip().splitlines()
    assert cost.startswith("This costs about as much as ")
    assert cost.endswith(" at most.")
    assert more.startswith("That is more than the 3 runs that may be averaged; --set ")
    assert "B = 10, and " in done.stdout
    assert "This rests on " in done.stdout
    alone = CliRunner().invoke(main, [*words, "--probe-runs", "0"])
    assert "This rests on the prediction alone: nothing was trained at this rate." in alone.stdout


def test_epochs_are_those_of_the_run_and_the_answer_may_be_json(run: Path) -> None:
    """100 examples in four minibatches of 32: an epoch has 128 places, 12.8 steps of 10."""
    words = ["neural", "advise", str(run), "--select", "head", "--epochs", "2", "--json"]
    words += ["--batch-size", "10", "--set", "bridge.weight_decay=0.1"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["words"][0].startswith("Train 26 steps at lr = ")
    assert found["batch_size"] == 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--members", "0"], "members must be an integer >= 1; got 0"),
        (["--worth", "-1"], "worth must lie in (0, inf); got -1"),
        (["--steps", "-3"], "steps must be an integer >= 0; got -3"),
        (["--epochs", "0"], "epochs must lie in (0, inf); got 0"),
        (["--epochs", "2", "--steps", "9"], "steps = 9 and epochs = 2 say the same; give one"),
        (["--set", "bridge.eigenpair=3"], "eigenpair"),
        (["--probe-runs", "2"], "probe_runs must be 0 or at least 3"),
        (["--probe-runs", "-2"], "probe_runs must be an integer >= 0; got -2"),
        (
            ["--probe-runs", "4", "--set", "bridge.optimizer='adam'"],
            "probe_runs must be 0 with optimizer = 'adam'",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    run: Path, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural.bridge.pipeline.open_target", None)
    done = CliRunner().invoke(main, ["neural", "advise", str(run), *words])
    assert done.exit_code == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_settings_of_a_bridge_that_is_measured_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["neural", "advise", str(tmp_path), "--steps", "5"])
    assert done.exit_code == 2
    assert "bridge.steps cannot be changed" in done.stderr
    assert "give its run" in done.stderr


def test_averages_are_predicted_where_the_noise_is_predicted_to_vanish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "neural.bridge.prediction.expected_excess", lambda *settings: np.zeros(len(settings[3]))
    )
    config, _ = load_config(None, [*SETTINGS, "bridge.eigenpairs=0", "bridge.steps=60"])
    plan = Plan(members=(1, 4), runs=4, records=1)
    table = measure_for_advice(Bowl(CURVATURE, away=0.3).risk, config, plan)
    assert np.isfinite(table["predicted"]).all()
    assert (table["effective_runs"] == 1.0).all()


@pytest.mark.slow
def test_far_from_a_minimum_the_descent_is_that_of_the_loss() -> None:
    """Compared with gradient descent itself; the quadratic of the checkpoint says a multiple."""
    risk = tanh_risk(quick=False)
    far = risk.at(1.5 * risk.weights)
    config, _ = load_config(None, [*SETTINGS, "bridge.steps=200"])
    plan = Plan(members=(1,), runs=1, records=1)
    table = measure_for_advice(far, config, plan)
    for _, row in table.iterrows():
        training = Training(float(row["lr"]), 32, 200)
        averages = Running(plan.averages(training), far.weights)
        (end,) = noise_free(far, training, [200], seen=averages)
        losses = {name: far.loss(mean) for name, mean in averages.values.items()}
        expected = (losses | {"iterate": end})[row["weights"]] - far.loss()
        assert row["descent"] == pytest.approx(expected, rel=0.05)
