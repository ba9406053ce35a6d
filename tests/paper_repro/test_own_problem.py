"""Figures of the user's own problem: right by scaling laws, and never in place of the paper's."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nqm.cli import main
from nqm.errors import NQMError
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import Problem
from nqm.problems.spectra import harmonic
from nqm.table import read_metadata
from paper_repro import switch
from paper_repro.build import build
from paper_repro.study import (
    GROUPS,
    ON_ANY,
    OWN_ONLY,
    Z_LIMIT,
    Scale,
    find,
    listed,
    on_problem,
)

NAMES = [name for group in GROUPS.values() for name in group]


def test_the_paper_s_problem_gives_the_paper_s_table() -> None:
    h = harmonic(switch.settings(Scale.SMOKE).directions)
    own = switch.compute_on(Problem(h, h, initial_mean=1.0, initial_variance=0.0), Scale.SMOKE)
    assert own.equals(switch.compute(Scale.SMOKE))


def test_rates_are_in_units_of_the_largest_curvature() -> None:
    """With h -> c h and v -> c^2 v at rates over c the weights are the same, the loss c times."""
    h, c = np.array([1.0, 0.3, 0.05]), 7.0
    one = switch.compute_on(Problem(h, 0.2 * h), Scale.SMOKE)
    other = switch.compute_on(Problem(c * h, 0.2 * c**2 * h), Scale.SMOKE)
    exact = one["kind"] == "exact"
    np.testing.assert_allclose(other["lr"], one["lr"] / c, rtol=1e-12)
    np.testing.assert_allclose(other["loss"][exact], c * one["loss"][exact], rtol=1e-9)
    assert (one["directions"] == 3).all()


def test_the_floors_of_any_problem_are_those_of_the_closed_form() -> None:
    """SGD at B = 1 settles at 1/2 sum m lr v / (2 - lr h)."""
    problem = Problem([4.0, 1.0, 0.0], [0.3, 0.2, 0.0], multiplicity=[2, 1, 1])
    table = on_problem("zhang2019_training", problem)(Scale.SMOKE)
    floor = table[table["kind"] == "floor"].set_index("lr")["loss"]
    for lr in floor.index:
        expected = 0.5 * (2 * lr * 0.3 / (2 - 4 * lr) + lr * 0.2 / (2 - lr))
        assert floor[lr] == pytest.approx(expected, rel=1e-9)
    assert max(floor.index) == pytest.approx(1.0 / 4.0)


#: Directions of several multiplicities; the flat one has no loss.
MIXED = Problem([4.0, 1.0, 0.2, 0.0], [0.3, 0.2, 0.1, 0.0], multiplicity=[2, 1, 3, 1])


def _floor(lr: float, examples: float) -> float:
    """SGD on `MIXED` settles at sum m lr v / (2 (2 - lr h) B) over the curved directions."""
    terms = ((2, 4.0, 0.3), (1, 1.0, 0.2), (3, 0.2, 0.1))
    return sum(m * lr * v / (2.0 * (2.0 - lr * h) * examples) for m, h, v in terms)


def test_the_steady_state_of_any_problem_is_that_of_sgd_at_lambda() -> None:
    table = on_problem("steady_state", MIXED)(Scale.SMOKE)
    assert "multiplicative" not in set(table["model"])
    mean = table[(table["series"] == "mean model") & (table["kind"] == "exact")]
    assert set(mean["lr"]) == {0.15 / 4.0, 0.45 / 4.0}
    for _, row in mean.iterrows():
        assert row["loss"] == pytest.approx(_floor(2.0 * row["lr"], row["members"]), rel=1e-9)
    run = table[table["kind"] == "sample"]
    keys = ["series", "members", "lr"]
    both = run.merge(table[table["kind"] == "exact"], on=keys, suffixes=("", "_exact"))
    assert len(both) == len(run) > 10
    assert (abs(both["loss"] - both["loss_exact"]) < Z_LIMIT * both["stderr"]).all()
    assert len(find("steady_state").draw(table).axes) == 3


def test_every_setting_of_any_problem_lies_on_the_curve_of_sgd() -> None:
    table = on_problem("collapse", MIXED)(Scale.SMOKE)
    curve = table[table["kind"] == "curve"].iloc[::60]
    for _, row in curve.iterrows():
        assert row["loss"] == pytest.approx(_floor(row["effective_lr"], 1.0), rel=1e-9)
    for _, row in table[table["kind"] == "exact"].iterrows():
        expected = _floor(row["effective_lr"], row["members"] * row["batch_size"])
        assert row["loss"] == pytest.approx(expected, rel=1e-9)


def test_what_takes_long_is_not_simulated() -> None:
    """A direction of curvature 1e-6 settles after millions of cycles: theory stands alone."""
    slow = Problem([1.0, 1e-6], [0.1, 1e-7])
    for name in ("collapse", "steady_state"):
        table = on_problem(name, slow)(Scale.SMOKE)
        assert "sample" not in set(table["kind"])
        assert find(name).draw(table).axes


@pytest.mark.parametrize("name", ["zhang2019_targets", "zhang2019_schedules", "zhang2019_ema"])
def test_steps_to_a_target_do_not_depend_on_units(name: str) -> None:
    """With h -> c h and v -> c^2 v at rates over c the weights are the same, the loss c times."""
    c, h = 8.0, np.array([1.0, 0.5, 0.125])
    one = on_problem(name, Problem(h, 0.25 * h))(Scale.SMOKE)
    other = on_problem(name, Problem(c * h, 0.25 * c**2 * h))(Scale.SMOKE)
    exact = (one["kind"] == "exact").to_numpy()
    np.testing.assert_allclose(other["step"], one["step"], rtol=1e-9)
    np.testing.assert_allclose(other["target"][exact], c * one["target"][exact], rtol=1e-9)
    np.testing.assert_allclose(other["lr"][exact], one["lr"][exact] / c, rtol=1e-6)


def test_the_reference_of_any_problem_is_the_posterior_s() -> None:
    """After N examples a direction's mean is known to v / (h^2 N): sum m v / h / (2 N) of loss."""
    table = on_problem("zhang2019_rate", MIXED)(Scale.SMOKE)
    target = table["target"].dropna().iloc[0]
    known = 2 * 0.3 / 4.0 + 0.2 / 1.0 + 3 * 0.1 / 0.2
    line = table[table["kind"] == "bound"]
    np.testing.assert_allclose(line["step"], known / (2.0 * target * line["batch_size"]))
    assert (table["edge"] == 2.0 / 4.0).all()


def test_a_target_needs_a_loss_at_the_start() -> None:
    settled = Problem([1.0, 0.5], 0.1, initial_variance=0.0)
    with pytest.raises(NQMError, match="needs a loss at the start"):
        on_problem("zhang2019_ema", settled)(Scale.SMOKE)


def test_every_figure_is_of_any_problem_or_says_why_not() -> None:
    assert set(NAMES) == {*ON_ANY, *OWN_ONLY}
    assert not set(ON_ANY) & set(OWN_ONLY)
    problem = Problem([1.0, 0.5], 0.1)
    for name in NAMES:
        assert hasattr(find(name), "compute_on") == (name in ON_ANY)
        if name in ON_ANY:
            assert on_problem(name, problem)
            continue
        with pytest.raises(NQMError, match=rf"{name}.*own problem only \(.+\).*ranking"):
            on_problem(name, problem)
    with pytest.raises(NQMError, match="got a LeastSquares"):
        on_problem("switch", LeastSquares([1.0, 0.5], 0.1))  # type: ignore[arg-type]
    with pytest.raises(NQMError, match="curvature > 0"):
        on_problem("switch", Problem([0.0], 0.1))


def test_files_of_another_problem_have_another_name(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("curvature,noise_variance\n2,1\n0.5,0.2\n")
    given = ["--set", f"problem.file={tmp_path / 'my.csv'}"]
    words = ["figure", "switch", "--scale", "smoke", "--out", str(tmp_path), *given]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "its claims are not of this problem" in result.output
    key = Problem([2.0, 0.5], [1.0, 0.2]).key()
    stem = f"switch-{key[:8]}"
    names = {f"{stem}.{kind}" for kind in ("parquet", "png", "pdf")}
    assert {path.name for path in tmp_path.iterdir()} == {"my.csv", *names}
    assert read_metadata(tmp_path / f"{stem}.parquet")["problem"] == key
    # Drawn again from its table it keeps its name.
    words = ["switch", "--table", str(tmp_path / f"{stem}.parquet"), "--out", str(tmp_path)]
    assert stem in CliRunner().invoke(main, ["figure", *words]).output
    assert {path.name for path in tmp_path.iterdir()} == {"my.csv", *names}
    again = build("switch", Scale.SMOKE, tmp_path, Problem([2.0, 0.5], [1.0, 0.2]))
    assert again.reused
    assert again.claims == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["directions=5"], "--set changes the problem only.*directions=5"),
        (["problem.file=none.csv"], "none.csv"),
        (["problem.curvature=[1.0, 0.1]"], "noise"),
        (["problem.curvatur=[1.0]"], "curvatur"),
    ],
)
def test_a_wrong_problem_is_one_line(given: list[str], message: str, tmp_path: Path) -> None:
    words = [word for one in given for word in ("--set", one)]
    result = CliRunner().invoke(main, ["figure", "switch", *words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert message.partition(".*")[0] in result.output
    assert not (tmp_path / "out").exists()


def test_the_list_has_every_figure() -> None:
    assert list(listed()) == NAMES
    assert all(len(text) > 30 for text in listed().values())
    assert [name for name, text in listed().items() if "problem.file" in text] == [
        name for name in NAMES if name in ON_ANY
    ]


def test_nqm_list_shows_what_other_packages_add(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (where,) = project["entry-points"]["nqm.lists"].values()
    module, _, function = where.partition(":")
    point = EntryPoint("figures", f"{module}:{function}", "nqm.lists")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    shown = CliRunner().invoke(main, ["list"]).output
    for name, text in listed().items():
        assert f"\n  {name}: {text}" in shown.partition("\nfigures:")[2]
