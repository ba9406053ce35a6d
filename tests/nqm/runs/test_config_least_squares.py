"""Least squares stated in a configuration file, through `nqm run`, `sweep` and `steady`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nqm.cli import main
from nqm.errors import NQMError
from nqm.problems.least_squares import LeastSquares, power_law
from nqm.problems.random_features import random_features, random_features_equivalent
from nqm.problems.spectra import harmonic
from nqm.runs import config
from nqm.runs import toml as declare
from nqm.runs.sweep import Sweep
from tests.nqm.contract import built
from tests.tolerances import IDENTITY, SIGMAS

TEXT = """
[problem]
inputs = "gaussian"
curvature = [1.0, 0.5, 0.1]
label_noise = 0.3
initial_mean = [1.0, -1.0, 2.0]
initial_variance = 0.5

[[phase]]
algorithm = "sgd"
lr = 0.2
batch_size = 4
steps = 40

[record]
at = [0, 1, 40]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "regression.toml"
    file.write_text(TEXT)
    return file


def literal(steps: int, label_noise: float = 0.3, lr: float = 0.2) -> float:
    """Loss by Wick's theorem: m' = (1 - lr h)^2 m + lr^2 / B (h^2 m + h (sum h m + s2))."""
    h, m = np.array([1.0, 0.5, 0.1]), np.array([1.0, 1.0, 4.0]) + 0.5
    for _ in range(steps):
        noise = h**2 * m + h * (h @ m + label_noise)
        m = (1.0 - lr * h) ** 2 * m + lr**2 / 4 * noise
    return float(0.5 * h @ m)


def test_a_file_is_the_problem_it_says(path: Path) -> None:
    stated = LeastSquares([1.0, 0.5, 0.1], 0.3, [1.0, -1.0, 2.0], 0.5)
    found = built(path).problem
    assert isinstance(found, LeastSquares)
    assert found.key() == stated.key()
    base = {"inputs": "gaussian", "label_noise": 0.1}
    spectrum = {"name": "harmonic", "directions": 5}
    cases: list[tuple[dict[str, Any], LeastSquares]] = [
        ({"spectrum": spectrum, "multiplicity": 2.0},
         LeastSquares(harmonic(5), 0.1, multiplicity=2.0)),
        ({"spectrum": {"name": "two_cluster", "outliers": 2, "bulk": 7}},
         LeastSquares([1.0, 0.01], 0.1, multiplicity=[2.0, 7.0])),
        ({"model": {"name": "power_law", "directions": 6, "beta": 0.7}},
         power_law(6, beta=0.7, label_noise=0.1)),
        ({"model": {"name": "random_features", "features": 3, "hidden": 9, "seed": 2}},
         random_features(3, 9, label_noise=0.1, seed=2)),
        ({"model": {"name": "random_features_equivalent", "features": 3, "hidden": 9}},
         random_features_equivalent(3, 9, label_noise=0.1)),
    ]  # fmt: skip
    for table, wanted in cases:
        assert config.build_problem(base | table).key() == wanted.key()


def test_exact_losses_and_monte_carlo(path: Path) -> None:
    wanted = [literal(n) for n in (0, 1, 40)]
    for method in ("jump", "moments"):
        table = built(path, f"method={method}").table()
        np.testing.assert_allclose(table["loss"], wanted, rtol=IDENTITY)
    told: list[int] = []
    run = built(path, "method=sample", "replicas=4000", "record.quantiles=[0.5]")
    drawn = run.table(progress=told.append)
    assert np.all(np.abs((drawn["loss"] - wanted) / drawn["stderr"]) < SIGMAS)
    assert sum(told) == run.work
    assert (drawn["loss_q0.5"] < drawn["loss"]).all()  # a loss is skewed to the right


def test_commands(path: Path, tmp_path: Path) -> None:
    def call(*words: str) -> Any:
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        if done.exit_code:
            return done.stderr
        table = json.loads(done.stdout)
        return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]

    (settled,) = call("steady", str(path), "--json")
    np.testing.assert_allclose(settled["loss"], literal(3000), rtol=1e-9)
    assert settled["status"] == "finished"
    assert call("run", str(path), "--json")[2]["loss"] == pytest.approx(literal(40), rel=IDENTITY)
    (lost,) = call("steady", str(path), "--set", "phase.0.lr=1.9", "--json")
    assert (lost["status"], lost["loss"]) == ("diverged", None)
    message = call("tune", str(path))
    assert message == (
        "error: tune does not know least squares (problem.inputs); sweep phase.0.lr instead\n"
    )
    assert "random_features(features, hidden" in CliRunner().invoke(main, ["list"]).stdout


def test_a_sweep(path: Path) -> None:
    noises, rates = [0.0, 0.3], [0.1, 0.2]
    axes = {"problem.label_noise": noises, "phase.0.lr": rates}
    table = Sweep(declare.load(path), axes).run()
    ends = table[table["step"] == 40]
    wanted = [literal(40, noise, lr) for noise in noises for lr in rates]
    np.testing.assert_allclose(ends["loss"], wanted, rtol=IDENTITY)
    assert ends["case"].nunique() == 4
    with pytest.raises(NQMError, match=r"case 1 .*SignSGD has no exact moments"):
        Sweep(declare.load(path), {"phase.0.algorithm": ["sgd", "sign_sgd"]}).run()


MISTAKES = [
    ("problem.inputs='uniform'", "problem.inputs 'uniform' is unknown; known: gaussian"),
    ("problem.inputs=3", "problem.inputs must be a text; got 3"),
    ("problem.label_noise=-1", "problem.label_noise must lie in [0, inf); got -1"),
    ("problem.label_noise='a'", "problem.label_noise must be a number; got 'a'"),
    ("problem.curvature=[-1.0, 1, 1]", "problem.curvature must be >= 0"),
    ("problem.noise_variance=1", "problem.noise_variance and problem.inputs exclude each other"),
    ("problem.bins=2", "problem.bins and problem.inputs exclude each other"),
    ("problem.model='power_law'", "state the inputs by exactly one of"),
    ("record.quantiles=[0.5]", "record.quantiles: least squares has no exact ones"),
    ("precision='float32'", "precision: least squares is sampled literally"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_in_one_line(path: Path, override: str, message: str) -> None:
    with pytest.raises(NQMError) as caught:
        built(path, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_about_models() -> None:
    def fails(message: str, **table: Any) -> None:
        with pytest.raises(NQMError, match=message):
            config.build_problem(table)

    model = {"name": "power_law", "directions": 4}
    fails("initial_mean follows from problem.model", inputs="gaussian", model=model, initial_mean=1)
    fails("did you mean 'power_law'", inputs="gaussian", model=model | {"name": "power_lw"})
    fails("problem.model.name is missing", inputs="gaussian", model={"directions": 4})
    fails("model.directions must be", inputs="gaussian", model=model | {"directions": 0})
    fails("model.label_noise is not", inputs="gaussian", model=model | {"label_noise": 1})
    fails("label_noise must lie in", inputs="gaussian", model=model, label_noise=-1.0)
    fails('add inputs = "gaussian"', curvature=1.0, noise_variance=1.0, label_noise=0.1)
    fails('add inputs = "gaussian"', model=model, noise_variance=1.0)


def test_what_the_solvers_do_not_have(path: Path) -> None:
    """One line, found before a sweep computes anything."""
    late = 'phase.0={algorithm="late_phase", lr=0.1, steps=40, batch_size=4}'
    for method in ("method=jump", "method=sample"):
        adam = built(path, 'phase.0={algorithm="adam", lr=0.1, steps=40}', method)
        with pytest.raises(NQMError, match="least squares needs a linear method"):
            adam.check()
        built(path, late, method).check()
    with pytest.raises(NQMError, match="needs one gradient per member and step"):
        built(path, 'phase.0={algorithm="federated", lr=0.1, steps=40}').check()
