"""Curves of known problems: forecasts contain the truth, and say what a log leaves open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nqm import (
    EMA,
    SGD,
    Cosine,
    HeavyBall,
    LatePhase,
    Log,
    NQMError,
    Phase,
    Problem,
    Program,
    SignSGD,
    WarmupStableDecay,
    fit_loss_curves,
    solve,
)  # fmt: skip
from nqm.cli import main
from nqm.loss_curves import _correlation, _design
from nqm.problems.spectra import harmonic
from nqm.table import read_table
from tests.tolerances import IDENTITY, JUMP, agree

H = harmonic(60)
TRUE = Problem(H, noise_variance=0.5 * H)
FLOOR, STEPS = 0.3, 1000
AT = np.unique(np.round(np.geomspace(1, STEPS, 60)).astype(int))


def sgd(lr: Any, batch_size: int = 8, **other: Any) -> Program:
    return Program((Phase(SGD(), lr=lr, steps=STEPS, batch_size=batch_size, **other),))


CONSTANT, COSINE = sgd(0.5), sgd(Cosine(0.5, 0.0, over=STEPS))
OTHERS = {
    "lower rate": sgd(0.1),
    "plateau": sgd(WarmupStableDecay(0.5, 0.0, 1, 800, 199)),
    "batch": sgd(0.5, 32),
    "ema": Program((Phase(EMA(decay=0.99), lr=0.5, steps=STEPS, batch_size=8),)),
    "momentum": Program((Phase(HeavyBall(0.8), lr=0.05, steps=STEPS, batch_size=8),)),
    "late phase": Program(
        (
            Phase(SGD(), lr=0.5, steps=500, batch_size=8),
            Phase(LatePhase(members=5, gamma="mean"), lr=0.1, steps=100, batch_size=8),
        )
    ),
}  # fmt: skip


def truth(program: Program, at: Any) -> Any:
    return FLOOR + solve(TRUE, program, list(map(int, at))).loss


def log(program: Program, noise: float = 0.0, seed: int = 0) -> Log:
    error = 1.0 + noise * np.random.default_rng(seed).standard_normal(len(AT))
    return Log(AT, truth(program, AT) * error, program)


def test_columns_are_those_of_sgd_in_closed_form() -> None:
    h, lr, batch, t = np.array([0.2, 1.0]), 0.3, 4, np.array([0, 3, 50])
    program = Program((Phase(SGD(), lr=lr, steps=50, batch_size=batch),))
    q = (1 - lr * h) ** 2
    decay = q ** t[:, None]
    noise = lr**2 / batch * (1 - decay) / (1 - q)
    expected = np.hstack((0.5 * h * decay, 0.5 * h * noise, np.ones((3, 1))))
    agree(_design(h, program, t), expected, JUMP)


@pytest.mark.parametrize("name", OTHERS)
def test_two_schedules_forecast_a_third_program(name: str) -> None:
    program = OTHERS[name]
    at = [program.steps // 2, program.steps]
    table = fit_loss_curves(log(CONSTANT), log(COSINE)).forecast(program, at)
    agree(table["loss"], truth(program, at), 0.02)
    # The log has no noise: what is left is the grid, and what two schedules leave open.
    agree(table["lower"], table["loss"], 0.12)
    agree(table["upper"], table["loss"], 0.12)
    assert (table["lower"] <= table["loss"]).all()
    assert (table["loss"] <= table["upper"]).all()


def test_bands_contain_the_truth() -> None:
    """At 95 %, of 60 forecasts that share noise at least 80 % are inside."""
    inside = []
    for seed in range(10):
        fitted = fit_loss_curves(log(CONSTANT, 0.01, seed), log(COSINE, 0.01, 100 + seed))
        assert 0.005 < fitted.error < 0.02
        for name in ("lower rate", "plateau", "ema"):
            row = fitted.forecast(OTHERS[name], [500, STEPS])
            true = truth(OTHERS[name], [500, STEPS])
            inside += list((row["lower"] <= true) & (true <= row["upper"]))
    assert np.mean(inside) > 0.8


def test_a_constant_rate_does_not_tell_floor_from_noise() -> None:
    """At one rate they are the same curve: the band of a lower rate reaches from 0 to today."""
    one = fit_loss_curves(log(CONSTANT)).forecast(OTHERS["plateau"], [STEPS]).iloc[0]
    two = fit_loss_curves(log(CONSTANT), log(COSINE)).forecast(OTHERS["plateau"], [STEPS]).iloc[0]
    true = float(truth(OTHERS["plateau"], [STEPS])[0])
    assert one["lower"] < 0.1 * true < true < one["upper"]
    assert two["upper"] - two["lower"] < 0.1 * true
    # The curve of the log's own program is known all the same.
    own = fit_loss_curves(log(CONSTANT)).forecast(CONSTANT, [STEPS]).iloc[0]
    assert own["upper"] - own["lower"] < 0.01 * true


def test_the_problem_has_the_losses_of_the_fit() -> None:
    fitted = fit_loss_curves(log(COSINE, 0.01))
    table = fitted.table()
    losses = fitted.floor + solve(fitted.problem, COSINE, AT.tolist()).loss
    agree(table["predicted"], losses, IDENTITY * 1e3)
    assert (table["log"] == 0).all()
    with pytest.raises(NQMError, match="expected losses"):
        solve(fitted.problem, COSINE, [5]).quantiles([0.5])


def test_correlated_residuals_widen_the_band() -> None:
    rng = np.random.default_rng(3)
    white = rng.standard_normal(4000)
    assert _correlation(white) < 1.2
    walk = np.zeros(4000)
    for k in range(1, 4000):
        walk[k] = 0.8 * walk[k - 1] + white[k]
    assert 6.0 < _correlation(walk) < 12.0  # (1 + 0.8) / (1 - 0.8) = 9


@pytest.mark.parametrize(
    ("steps", "losses", "told"),
    [
        (range(5), range(1, 6), "at least 10 records; got 5"),
        (range(20), [1.0] * 19, "equal length"),
        (range(20), [np.nan] * 20, "finite and > 0"),
        (range(20), [-1.0] * 20, "finite and > 0"),
        ([0.5] * 20, [1.0] * 20, "whole numbers"),
        ([3] * 20, [1.0] * 20, "increase"),
        (range(990, 1010), [1.0] * 20, "0 to 1000, the program's; got 990 to 1009"),
    ],
)
def test_wrong_records_are_named(steps: Any, losses: Any, told: str) -> None:
    with pytest.raises(NQMError, match=told):
        Log(list(steps), list(losses), CONSTANT)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(NQMError, match="needs a Log"):
        fit_loss_curves()
    sign = Program((Phase(SignSGD(), lr=0.1, steps=STEPS),))
    with pytest.raises(NQMError, match="SignSGD is not linear"):
        Log(AT, np.ones(len(AT)), sign)
    fitted = fit_loss_curves(log(CONSTANT))
    with pytest.raises(NQMError, match="unstable"):
        fitted.forecast(sgd(50.0), [STEPS])
    with pytest.raises(NQMError, match="level"):
        fitted.forecast(CONSTANT, [STEPS], level=2.0)


def test_the_command_reads_logs_and_forecasts(tmp_path: Path) -> None:
    phase = '[[phase]]\nalgorithm = "sgd"\nbatch_size = 8\nsteps = 1000\n'
    cosine = 'lr = { schedule = "cosine", start = 0.5, end = 0.0, over = 1000 }\n'
    words: list[str] = []
    for name, program, rate in (("a", CONSTANT, "lr = 0.5\n"), ("b", COSINE, cosine)):
        rows = [f"{t},{y!r}" for t, y in zip(AT, truth(program, AT).tolist(), strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["step,loss", *rows]))
        (tmp_path / f"{name}.toml").write_text(phase + rate)
        words += [str(tmp_path / f"{name}.csv"), str(tmp_path / f"{name}.toml")]
    (tmp_path / "c.toml").write_text(phase + "lr = 0.1\n[record]\nat = [500, 1000]\n")
    out, problem = tmp_path / "forecast.csv", tmp_path / "problem.csv"
    command = ["fit", *words, "--forecast", str(tmp_path / "c.toml"), "--out", str(out)]
    done = CliRunner().invoke(main, [*command, "--problem", str(problem)])
    assert done.exit_code == 0, done.output
    table = read_table(out)
    agree(table["loss"], truth(OTHERS["lower rate"], [500, 1000]), 0.02)
    assert list(table["examples"]) == [4000, 8000]

    # The problem that it writes is one for `nqm run`.
    text = '[problem]\nfile = "problem.csv"\n' + (tmp_path / "c.toml").read_text()
    (tmp_path / "run.toml").write_text(text)
    again = tmp_path / "run.csv"
    done = CliRunner().invoke(main, ["run", str(tmp_path / "run.toml"), "--out", str(again)])
    assert done.exit_code == 0, done.output
    floor = table["loss"] - read_table(again)["loss"]
    agree(floor, np.full(2, floor[0]), 1e-6)

    (tmp_path / "a.csv").write_text("step,nll\n1,2\n")
    for wrong, told in ((words[:3], "followed by its PROGRAM"), (words[:2], "no column 'loss'")):
        done = CliRunner().invoke(main, ["fit", *wrong])
        assert done.exit_code == 2
        assert told in done.output
