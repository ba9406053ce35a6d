"""The figures of Zhang et al. 2019: claims hold at smoke scale, can fail; pictures show tables."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from figures import zhang2019 as panels
from nqm.problems.spectra import harmonic
from paper_repro import cli
from paper_repro.study import GROUPS, STUDIES, ZHANG2019, Scale, find
from paper_repro.zhang2019.common import (
    bound,
    model,
    preconditioned,
    rounded_down,
    slow_momenta,
    turning_point,
)


@pytest.fixture(scope="module")
def tables():
    return {name: find(name).compute(Scale.SMOKE) for name in ZHANG2019}


@pytest.mark.parametrize("name", ZHANG2019)
def test_every_figure(tables, name):
    study, table = find(name), tables[name]
    assert len(re.findall(r"\.(?:\s|$)", study.SUMMARY)) == 2  # two sentences
    claims = study.claims(table)
    assert len(claims) >= 5
    assert [claim for claim in claims if not claim.passed] == []
    before = table.copy()
    assert isinstance(study.draw(table), Figure)
    pd.testing.assert_frame_equal(table, before)


#: What would be wrong with a table: a column, and by which factor.
WRONG = {
    "zhang2019_training": ("closed", 1.01),
    "zhang2019_targets": ("loss_before", 0.5),
    "zhang2019_rate": ("lr", 1.3),
    "zhang2019_schedules": ("direct", 1.001),
    "zhang2019_momentum": ("loss_before", 0.5),
    "zhang2019_effective_rate": ("effective_lr", 1.3),
    "zhang2019_ema": ("loss", 1.001),
    "zhang2019_scheduled_steps": ("loss", 1.1),
}


@pytest.mark.parametrize("name", ZHANG2019)
def test_claims_can_fail(tables, name):
    column, factor = WRONG[name]
    table = tables[name].copy()
    rows = table["kind"] != "solved"
    table.loc[rows, column] *= factor
    assert not all(claim.passed for claim in find(name).claims(table))


def test_steps_at_the_bound_are_noticed(tables):
    for name in ("zhang2019_rate", "zhang2019_momentum", "zhang2019_ema"):
        table = tables[name].copy()
        table.loc[table["kind"] == "exact", "step"] *= 0.01
        failed = [claim.text for claim in find(name).claims(table) if not claim.passed]
        assert any("n / (2 C B)" in text for text in failed)


def test_groups_are_pages_of_their_own(tmp_path):
    assert GROUPS["all"] is STUDIES
    assert GROUPS["zhang2019"] is ZHANG2019
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    arguments = ["zhang2019_ema", "--scale", "smoke", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.reproduce, arguments)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "zhang2019_ema.html").read_text()
    assert "Zhang et al. 2019: which algorithmic choices" in page
    assert "late-phase" not in page
    assert [path.name for path in tmp_path.glob("*.html")] == ["zhang2019_ema.html"]


# ------------------------------------------------------------------ the shared pieces


def test_the_notebooks_binning_loses_what_was_measured():
    """100 edges, curvature rounded down: trace 3.9 % short, 16 bins empty."""
    binned = rounded_down(model(10_000))
    h = harmonic(10_000)
    assert binned.directions == 100 - 16
    assert binned.multiplicity.sum() == 10_000
    trace = float(binned.multiplicity @ binned.curvature)
    assert trace / h.sum() - 1 == pytest.approx(-0.039, abs=0.0005)


def test_preconditioners_leave_the_loss_alone():
    plain, *others = preconditioned(model(50))
    for g, problem in zip((0.25, 0.5, 0.75), others, strict=True):
        assert problem.initial_loss == pytest.approx(plain.initial_loss, rel=1e-12)
        np.testing.assert_allclose(problem.curvature, plain.curvature ** (1 - g))
        np.testing.assert_allclose(problem.noise_variance, plain.curvature ** (1 - g))


def test_small_things():
    assert slow_momenta(6).tolist() == pytest.approx([0, 0.9, 0.99, 0.999, 0.9999, 0.99999])
    assert bound(model(10_000), 0.01, [4, 64])["step"].tolist() == [125_000.0, 7812.5]
    rows = pd.DataFrame({"examples": [40.0, 80.0], "step": [10.0, 5.0]})
    assert turning_point(rows) == 8.0


# ------------------------------------------------------------------ the pictures


def line(ax, gid):
    (found,) = [artist for artist in ax.lines if artist.get_gid() == gid]
    return found


def test_steps_are_drawn_with_a_gap_where_nothing_was_reached():
    table = pd.DataFrame({
        "batch_size": [4.0, 1.0, 2.0, 1.0], "step": [2.0, 8.0, np.nan, 1.5],
        "series": ["SGD"] * 3 + ["bound"], "exponent": [0.0] * 3 + [np.nan],
        "kind": ["exact"] * 3 + ["bound"],
    })  # fmt: skip
    ax = panels.steps(table)
    np.testing.assert_array_equal(line(ax, "SGD/0").get_xdata(), [1, 2, 4])
    np.testing.assert_array_equal(line(ax, "SGD/0").get_ydata(), [8, np.nan, 2])
    np.testing.assert_array_equal(line(ax, "bound").get_ydata(), [1.5])


def test_methods_and_preconditioners_are_told_apart(tables):
    table = tables["zhang2019_momentum"]
    ax = panels.steps(table)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["no preconditioner", "$h^{-0.5}$", "with momentum", "SGD, constant rate",
                      "bound"]  # fmt: skip
    assert line(ax, "SGD/0").get_color() == line(ax, "momentum/0").get_color()
    assert line(ax, "SGD/0").get_color() != line(ax, "SGD/0.5").get_color()
    assert line(ax, "SGD/0").get_linestyle() != line(ax, "momentum/0").get_linestyle()
    effective = tables["zhang2019_effective_rate"]
    rows = effective[(effective["series"] == "momentum") & (effective["exponent"] == 0)]
    rows = rows.sort_values("batch_size")
    ax = panels.effective_rates(effective)
    np.testing.assert_allclose(
        line(ax, "momentum/0").get_ydata(), rows["lr"] / (1 - rows["momentum"])
    )
    ax = panels.memories(effective[effective["series"] == "momentum"])
    np.testing.assert_allclose(line(ax, "momentum/0").get_ydata(), 1 - rows["momentum"])


def test_targets_and_training_curves_show_their_rows(tables):
    table = tables["zhang2019_targets"]
    rows = table[(table["kind"] == "exact") & (table["target"] == 0.1)].sort_values("batch_size")
    ax = panels.targets(table[table["kind"] == "exact"])
    np.testing.assert_array_equal(line(ax, "0.1").get_ydata(), rows["step"])
    scaling = line(ax, "0.1/scaling")
    np.testing.assert_allclose(np.ptp(scaling.get_xdata() * scaling.get_ydata()), 0, atol=1e-6)
    table = tables["zhang2019_training"]
    ax = panels.training_curves(table)
    floor = table[(table["kind"] == "floor") & (table["lr"] == 0.1)]["loss"].item()
    assert set(line(ax, "0.1/floor").get_ydata()) == {floor}
    assert line(ax, "0.1").get_ydata()[-1] == pytest.approx(floor, rel=1e-9)


def test_schedules_are_stairs():
    table = pd.DataFrame({
        "begin": [0, 10], "length": [10, 30], "lr": [2.0, 0.5], "batch_size": 16, "step": 40,
    })  # fmt: skip
    (stairs,) = panels.schedules(table).patches
    np.testing.assert_array_equal(stairs.get_data().values, [2.0, 0.5])
    np.testing.assert_array_equal(stairs.get_data().edges, [0, 10, 40])
    (stairs,) = panels.schedules(table, share=True).patches
    np.testing.assert_allclose(stairs.get_data().edges, [0, 0.25, 1])
