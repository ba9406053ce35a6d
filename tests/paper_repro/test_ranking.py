"""The ranking at equal data: every method pays the same, claims can fail, the figure shows them."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from figures import ranking as panels
from nqm.algorithms import SGD
from nqm.problems.quadratic import Problem
from nqm.tuning.stability import stability_edge
from paper_repro import ranking as study
from paper_repro.study import GROUPS, Scale, find


@pytest.fixture(scope="module")
def table():
    return study.compute(Scale.SMOKE)


def artist(ax, gid):
    (line,) = [line for line in ax.lines if line.get_gid() == gid]
    return line.get_xydata()


def test_it_is_a_group_of_its_own():
    assert find("ranking") is study
    assert list(GROUPS["ranking"]) == ["ranking"]
    assert "ranking" not in GROUPS["all"]


@pytest.mark.parametrize("scale", Scale)
def test_every_program_costs_the_budget(scale):
    s = study.settings(scale)
    for method in study.methods(s).values():
        for build in filter(None, (method.program, method.twin)):
            program = build(0.1)
            assert program.examples([program.steps])[0] == s.examples


def test_problems_share_their_largest_curvature_and_size():
    s = study.settings(Scale.FULL)
    problems = study.problems(s)
    assert len(problems) == 6
    for problem in problems.values():
        assert problem.curvature.max() == 1.0
        assert problem.multiplicity.sum() == s.directions


def test_sgd_row_by_the_textbook_formula(table):
    """Loss h / 2 (a^2n + lr^2 v / B (1 - a^2n) / (1 - a^2)), a = 1 - lr h, and its least value."""
    s = study.settings(Scale.SMOKE)
    h = 1.0 / np.arange(1, s.directions + 1)
    n = s.examples // s.batch_size
    rows = table[(table["method"] == "sgd") & (table["kind"] == "exact")].set_index("noise")
    for noise, scale in s.noise_scale:

        def loss(lr, scale=scale):
            a2 = (1 - lr * h) ** 2
            spread = lr**2 * scale * h / s.batch_size * (1 - a2**n) / (1 - a2)
            return 0.5 * np.sum(h * (a2**n + spread))

        row = rows.loc[noise]
        assert row["loss"] == pytest.approx(loss(row["lr"]), rel=1e-10)
        # No rate on a fine grid of its own does better than the rate found.
        grid = np.geomspace(1e-3, 1.0, 2001) * stability_edge(Problem([1.0], 0.0), SGD())
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.nanmin([loss(lr) for lr in grid])
        assert row["loss"] <= least * (1 + 1e-5)


def test_claims_hold_and_can_fail(table):
    assert all(claim.passed for claim in study.claims(table))
    sampled = table["kind"] == "sample"
    for rows, column, expected in (
        (sampled, "loss", 1),
        (table["method"] == "polyak", "bound", 1),
        (table["method"] == "late_phase", "twin", 1),
        (table["method"] == "swa", "examples", 1),
        ((table["method"] == "ensemble") & ~sampled, "loss", 3),
    ):
        wrong = table.copy()
        wrong.loc[rows, column] *= {"bound": 20.0}.get(column, 0.1 if expected == 3 else 1.5)
        failed = sum(not claim.passed for claim in study.claims(wrong))
        assert failed >= expected


def test_bound_by_the_posterior_of_all_examples(table):
    """1/2 sum h / (1 + N h^2 / v) from a start of variance 1, whatever the method."""
    s = study.settings(Scale.SMOKE)
    h = 1.0 / np.arange(1, s.directions + 1)
    for noise, scale in s.noise_scale:
        bounds = table[table["noise"] == noise]["bound"]
        expected = 0.5 * np.sum(h / (1.0 + s.examples * h / scale))
        np.testing.assert_allclose(bounds, expected, rtol=1e-12)


def test_order_is_by_mean_rank_and_ties_share():
    rows = [
        {"method": method, "spectrum": "a", "noise": noise, "kind": "exact", "loss": loss}
        for noise, losses in {"small": (4, 1, 3, 3), "large": (4, 2, 3, 1)}.items()
        for method, loss in zip(("sgd", "b", "c", "d"), losses, strict=True)
    ]
    # Ranks: b 1 and 2, c 2.5 and 3, d 2.5 and 1.
    table = pd.DataFrame(rows)
    assert panels.order(table) == ["b", "d", "c", "sgd"]
    assert panels.ratios(table).loc["b"].tolist() == [0.25, 0.5]


def test_panel_shows_the_table():
    names = ["sgd", "sgd_linear", "ema"]
    exact = pd.DataFrame({"method": names, "kind": "exact", "loss": [2.0, 1.0, 0.5], "stderr": 0.0})
    drawn = exact.assign(kind="sample", loss=[2.2, 1.1, 0.4], stderr=0.1)
    table = pd.concat([exact, drawn]).assign(label="name", family="mean over time", bound=0.3)
    ax = panels.panel(table, ["ema", "sgd", "sgd_linear"])
    np.testing.assert_allclose(artist(ax, "ema"), [[0.25, 0]])
    np.testing.assert_allclose(artist(ax, "sgd"), [[1.0, 1]])
    np.testing.assert_allclose(artist(ax, "ema/sample"), [[0.2, 0]])
    np.testing.assert_allclose(artist(ax, "honest")[:, 0], 0.5)
    np.testing.assert_allclose(artist(ax, "bound")[:, 0], 0.15)
    (container,) = [c for c in ax.containers if c[0].get_gid() == "ema/sample"]
    (segment,) = container[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], 0.2 + 1.96 * 0.05 * np.array([-1, 1]))
    assert ax.get_ylim() == (2.5, -0.5)  # the first row on top


def test_page_has_a_panel_for_every_problem(table):
    figure = study.draw(table)
    assert isinstance(figure, Figure)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "harmonic, small noise",
        "harmonic, large noise",
    ]
    ratio = panels.ratios(table)
    y = panels.order(table).index("swa")
    for ax, noise in zip(figure.axes, ("small noise", "large noise"), strict=True):
        np.testing.assert_allclose(artist(ax, "swa"), [[ratio.loc["swa", ("harmonic", noise)], y]])
