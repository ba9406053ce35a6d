"""A picture of any table: what is chosen, what is drawn, and what is refused."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from figures.columns import Choice, Columns, swept, where
from figures.columns import resolve as resolve_columns
from figures.plot import plot, t_interval
from nqm.cli import main
from nqm.errors import NQMError
from nqm.runs.sweep import Sweep
from nqm.table import write_table
from paper_repro.cli import plot as command

ARMS = ("base", "late_phase", "swa")


def history(epochs: int = 20, seeds: int = 3) -> pd.DataFrame:
    """Loss 1 / epoch + seed, the same for all arms but for 10 x the number of the arm."""
    rows = [
        {"arm": arm, "seed": seed, "epoch": epoch, "step": 7 * epoch, "lr": 0.1 / epoch,
         "train_loss": 1.0, "weights": "iterate", "loss": 10 * i + seed + 1 / epoch,
         "accuracy": 0.5 + 0.01 * seed}
        for i, arm in enumerate(ARMS) for seed in range(seeds) for epoch in range(1, epochs + 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def results() -> pd.DataFrame:
    """Metric = number of the arm + seed; every arm has the iterate, the last one SWA too."""
    rows = [
        {"arm": arm, "seed": seed, "status": "finished", "weights": weights, "member": -1,
         "data": "test", "metric": metric, "value": i + seed + 100.0 * (metric == "nll")}
        for i, arm in enumerate(ARMS) for seed in range(4) for metric in ("accuracy", "nll")
        for weights in (("iterate", "averaged") if arm == "swa" else ("iterate",))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def swept_table() -> pd.DataFrame:
    base = {"problem": {"curvature": [1.0], "noise_variance": 1.0},
            "phase": [{"algorithm": "late_phase", "members": 2, "lr": 0.1, "steps": 5}],
            "record": {"at": [2, 5]}}  # fmt: skip
    return Sweep(base, {"phase.0.members": [1, 2, 4], "phase.0.lr": [0.01, 0.1, 0.2, 0.3]}).run()


AXES = ["members", "lr"]


def resolve(table: pd.DataFrame, asked: Choice, axes: Any = ()) -> Choice:
    return resolve_columns(table, asked, Columns.of(table, axes))


def choice_of(table: pd.DataFrame, axes: Any = (), **asked: Any) -> dict[str, str]:
    return resolve(table, Choice(**asked), axes).columns


def test_what_is_chosen(swept_table: pd.DataFrame) -> None:
    assert choice_of(history()) == {"x": "epoch", "y": "loss", "hue": "arm"}
    assert choice_of(history(), y="accuracy")["hue"] == "arm"
    assert choice_of(swept_table, AXES) == {"x": "lr", "y": "loss", "hue": "members"}
    assert choice_of(swept_table, AXES, x="step") == {
        "x": "step", "y": "loss", "hue": "members", "col": "lr",
    }  # fmt: skip
    assert choice_of(swept_table, AXES, kind="heatmap") == {
        "x": "members",
        "y": "lr",
        "hue": "loss",
    }
    found = choice_of(results())
    assert found == {"x": "arm", "y": "value", "col": "metric", "hue": "weights"}
    one_run = swept_table[(swept_table["lr"] == 0.1) & (swept_table["members"] == 2)]
    assert choice_of(one_run.drop(columns=AXES)) == {"x": "step", "y": "loss"}
    spectrum = pd.DataFrame({"curvature": [1.0, 0.5, 0.1], "noise_variance": [1.0, 2.0, 3.0]})
    assert resolve(spectrum, Choice()).kind == "scatter"
    assert choice_of(spectrum) == {"x": "curvature", "y": "noise_variance"}


def test_axes_of_a_sweep_are_found_by_their_keys() -> None:
    table = pd.DataFrame({"lr": [1], "sweep.kind": [1], "phase.0.steps": [1], "members": [1]})
    keys = ["phase.1.lr, phase.1.members", "kind", "phase.0.steps", "gone"]
    assert swept(table, keys) == ["lr", "members", "sweep.kind", "phase.0.steps"]


def test_a_mean_over_seeds_and_nothing_else() -> None:
    (ax,) = plot(history(epochs=20), Choice(logy=False)).axes
    means = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    expected = [[10 * i + 1 + 1 / e for e in range(1, 21)] for i in range(3)]
    np.testing.assert_allclose(means, expected)
    # seeds 0, 1, 2 at epoch 1: mean 2, sd 1, so half a width of 4.302653 / sqrt(3)
    corners = ax.collections[0].get_paths()[0].vertices
    first = corners[corners[:, 0] == 1.0, 1]
    half = 4.302652729696142 / np.sqrt(3)
    np.testing.assert_allclose([first.min(), first.max()], [2 - half, 2 + half])


def test_the_interval_is_student_t() -> None:
    assert np.isnan(t_interval([1.0])).all()
    low, high = t_interval([1.0, np.nan, 3.0])
    # n = 2: mean 2, sd sqrt(2), t(0.975, 1) = 12.7062047
    np.testing.assert_allclose([low, high], [2 - 12.7062047, 2 + 12.7062047], rtol=1e-8)


def test_rows_that_differ_otherwise_are_never_averaged(swept_table: pd.DataFrame) -> None:
    wide = pd.concat([swept_table.assign(batch_size=b, noise=n, decay=d)
                      for b in (1, 2) for n in (0.1, 0.2) for d in (0.5, 0.9)])  # fmt: skip
    axes = [*AXES, "batch_size", "noise", "decay"]
    with pytest.raises(NQMError, match=r"differ in decay \(0.5, 0.9\).*--where decay=VALUE"):
        resolve(wide, Choice(x="lr"), axes)
    kept = where(wide, [("noise", "0.1"), ("decay", "0.9")])
    assert len(kept) == len(swept_table) * 2
    assert choice_of(kept, axes, x="lr") == {
        "x": "lr", "y": "loss", "hue": "members", "col": "batch_size",
    }  # fmt: skip
    cells = Choice(kind="heatmap", x="lr", y="members", col="batch_size")
    with pytest.raises(NQMError, match="cells would average over decay"):
        resolve(where(wide, [("noise", "0.1")]), cells, axes)


def test_without_time_on_an_axis_the_last_time_counts(swept_table: pd.DataFrame) -> None:
    with pytest.warns(UserWarning, match="drawn is the last step of each case"):
        (ax,) = plot(swept_table, None, AXES).axes
    last = swept_table[swept_table["step"] == 5]
    drawn = {tuple(line.get_ydata()) for line in ax.lines}
    for _, rows in last.groupby("members"):
        assert tuple(rows["loss"]) in drawn
    assert {len(line) for line in drawn} == {4}
    with pytest.warns(UserWarning, match="last step"):
        heat = plot(swept_table, Choice(kind="heatmap", x="members", y="lr"), AXES)
    cells = heat.axes[0].collections[0].get_array()
    wide = last.pivot(index="lr", columns="members", values="loss").sort_index(ascending=False)
    np.testing.assert_array_equal(np.ravel(cells), wide.to_numpy().ravel())
    with pytest.warns(UserWarning, match="last epoch"):
        # A scheduled rate changes with time and is no setting.
        final = plot(history(), Choice(x="arm"))
    points = [line.get_xdata()[0] for line in final.axes[0].lines if len(line.get_xdata()) == 3]
    assert points == [pytest.approx(1.05)]


@pytest.mark.parametrize("axes", [AXES, []])
def test_cases_of_unlike_length_are_not_averaged(axes: list[str]) -> None:
    """At equal data the steps differ by the members, and tell them apart where none are shown."""
    rows = [
        {"members": k, "lr": lr, "step": step, "examples": 12.0, "loss": k + lr}
        for k in (1, 2, 4) for lr in (0.1, 0.2, 0.3, 0.4) for step in (0, 12 // k)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert choice_of(table, axes, x="lr")["hue"] == "members"
    with pytest.warns(UserWarning, match="last step"):
        (ax,) = plot(table, Choice(x="lr"), axes).axes
    drawn = {tuple(np.round(np.asarray(line.get_ydata(), dtype=float), 9)) for line in ax.lines}
    assert {tuple(np.round(k + np.array([0.1, 0.2, 0.3, 0.4]), 9)) for k in (1, 2, 4)} <= drawn


def test_curves_are_told_apart_without_colour() -> None:
    table = history()
    figure = plot(table)
    (ax,) = figure.axes
    styles = {line.get_linestyle() + str(line._unscaled_dash_pattern) for line in ax.lines}
    assert len(styles) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "arm", "base", "late phase", "swa",
    ]  # fmt: skip
    assert ax.get_xlabel() == "epochs"
    assert ax.get_ylabel() == "cross-entropy (nats)"
    many = pd.concat([history(2, 1).assign(arm=f"{i}") for i in range(12)])
    many = many.drop_duplicates(["arm", "epoch"])
    handles = plot(many).legends[0].legend_handles[1:]
    assert len({(h.get_color(), str(h._unscaled_dash_pattern)) for h in handles}) == 12
    assert len({h.get_color() for h in handles}) == 12


def test_panels_of_metrics_have_their_own_axes() -> None:
    figure = plot(results())
    assert [ax.get_title() for ax in figure.axes] == ["accuracy", "negative log-likelihood (nats)"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "base", "late phase", "swa",
    ]  # fmt: skip
    low, _ = figure.axes[1].get_xlim()
    assert low > 90 > figure.axes[0].get_xlim()[1]
    one = plot(where(results(), [("metric", "nll")]))
    assert one.axes[0].get_xlabel() == "negative log-likelihood (nats)"


def test_names_from_elsewhere_are_no_formulas_and_stay_apart() -> None:
    names = ["a_b", "a b", "$x{", "y" * 90]
    table = pd.DataFrame({"way": names, "$cost{": [1.0, 2.0, 3.0, 4.0]})
    figure = plot(table)
    figure.savefig(io.BytesIO())
    (ax,) = figure.axes
    shown = [text.get_text() for text in ax.get_yticklabels()]
    assert shown[:3] == ["a b", "a b", r"\$x{"]
    assert len(shown[3]) < 60
    assert ax.get_xlabel() == r"\$cost{"


def test_what_cannot_be_drawn_is_said() -> None:
    table = history(3)
    table.loc[0, "loss"] = np.inf
    with pytest.warns(UserWarning, match="1 rows without a finite loss"):
        plot(table)
    with pytest.warns(UserWarning, match="27 rows with x <= 0 are not on the logarithmic axis"):
        plot(pd.concat([history(3).assign(x=0.0), history(3).assign(x=1.0)]),
             Choice(x="x", hue="arm", col="epoch", style="seed", logx=True))  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"x": "epohc"}, "--x: no column 'epohc'; did you mean 'epoch'"),
        ({"hue": "nothing_like_it"}, "--hue: no column.*arm"),
        ({"x": "loss", "y": "loss"}, "--x and --y are both loss"),
        ({"y": "arm"}, "--y arm holds texts.*loss"),
        ({"kind": "pie"}, "--kind.*line"),
        ({"kind": "heatmap", "logx": True}, "--logx has no meaning in a heatmap"),
        ({"kind": "heatmap", "hue": "arm", "x": "epoch", "y": "seed"}, "--hue arm holds texts"),
        ({"x": "arm", "logx": True, "hue": "epoch"}, "arm holds texts"),
    ],
)
def test_a_wrong_choice_is_one_line(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message):
        plot(history(3), Choice(**asked))


def test_a_wrong_condition_is_one_line() -> None:
    with pytest.raises(NQMError, match="no row has 'bass'; it has base, late phase, swa"):
        where(history(3), [("arm", "bass")])
    with pytest.raises(NQMError, match="'x' is no number"):
        where(history(3), [("epoch", "x")])
    with pytest.raises(NQMError, match="no rows"):
        plot(history(3).iloc[:0])
    with pytest.raises(NQMError, match=r"--col name has 30 values, more than 24"):
        plot(pd.DataFrame({"name": [f"{i}" for i in range(30)], "x": range(30), "loss": 1.0}),
             Choice(x="x", col="name"))  # fmt: skip


def test_members_of_a_run_count_as_one_draw() -> None:
    """Two members of each seed: the mean of 5 seeds and its interval, not of 10 rows."""
    rows = [
        {"arm": "a", "seed": seed, "weights": weights, "member": member, "data": "test",
         "metric": "accuracy", "value": seed + (weights == "member") + 0.5 * member}
        for seed in range(5) for weights in ("averaged", "member")
        for member in ((0, 1) if weights == "member" else (-1,))
    ]  # fmt: skip
    figure = plot(pd.DataFrame(rows), Choice(x="weights"))
    (ax,) = figure.axes
    low, high = t_interval([seed + 1.25 for seed in range(5)])
    ends = sorted(float(x) for line in ax.lines for x in np.ravel(line.get_xdata()))
    assert min(abs(end - low) for end in ends) < 1e-9
    assert min(abs(end - high) for end in ends) < 1e-9
    assert "mean of 5 seeds;" in figure.texts[0].get_text()


def test_an_ensemble_over_seeds_is_no_further_seed() -> None:
    found = results()
    pooled = found[found["seed"] == 0].assign(seed=-1, weights="deep_ensemble_iterate")
    figure = plot(pd.concat([found, pooled]), Choice(col="metric", hue="weights"))
    assert "mean of 4 seeds" in figure.texts[0].get_text()


def test_a_history_goes_on_with_the_average_of_its_members() -> None:
    table = history(6)
    table.loc[table["epoch"] > 3, "weights"] = "averaged"
    (ax,) = plot(table).axes
    assert len([line for line in ax.lines if len(line.get_xdata()) == 6]) >= len(ARMS)


def test_the_result_of_one_run_has_a_row_for_each_metric() -> None:
    one = results()[lambda rows: (rows["arm"] == "base") & (rows["seed"] == 0)]
    (ax,) = plot(one).axes
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["accuracy", "negative log-likelihood (nats)"]


def test_a_path_between_models_is_a_line() -> None:
    rows = [
        {"path": path, "t": t, "data": data, "accuracy": 0.5 + t / 10}
        for path in ("curve", "line") for t in (0.0, 0.25, 0.5, 1.0) for data in ("train", "test")
    ]  # fmt: skip
    figure = plot(pd.DataFrame(rows))
    assert [ax.get_title() for ax in figure.axes] == ["train", "test"]
    assert all(len(ax.lines[0].get_xdata()) == 4 for ax in figure.axes)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(main.commands, "plot", command)
    return lambda *words: CliRunner().invoke(main, ["plot", *map(str, words)])


def test_the_command_writes_one_picture_whole(run: Any, tmp_path: Path) -> None:
    table = tmp_path / "history.csv"
    write_table(table, history(3), {})
    done = run(table)
    assert done.exit_code == 0, done.output
    picture = tmp_path / "history.png"
    assert done.output.strip() == str(picture)
    with Image.open(picture) as image:
        assert image.text["Title"] == "nqm plot history.csv"
        assert image.width > 500
    first = picture.read_bytes()
    assert run(table).exit_code == 0
    assert picture.read_bytes() == first
    for ending, times in (("pdf", 1), ("svg", 2)):
        out = tmp_path / f"one.{ending}"
        assert len({(run(table, "--out", out).exit_code, out.read_bytes())
                    for _ in range(times)}) == 1  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.csv", "history.png", "one.pdf", "one.svg",
    ]  # fmt: skip


def test_the_command_replaces_no_other_file(run: Any, tmp_path: Path) -> None:
    table = tmp_path / "history.csv"
    write_table(table, history(3), {})
    other = tmp_path / "history.png"
    other.write_bytes(b"mine")
    for words, message in (
        ((table,), "was not drawn by nqm plot"),
        ((table, "--out", tmp_path / "a.jpg"), "must end in .png, .pdf, .svg"),
        ((table, "--where", "arm"), "--where must be COLUMN=VALUE; got arm"),
        ((tmp_path / "none.csv",), "none.csv"),
        ((table, "--x", "nope", "--out", tmp_path / "a.png"), "no column 'nope'"),
    ):
        done = run(*words)
        assert done.exit_code == 2, done.output
        assert done.output.startswith("error: ")
        assert done.output.count("\n") == 1
        assert message in done.output
    assert other.read_bytes() == b"mine"


def test_seaborn_is_loaded_when_a_picture_is_drawn() -> None:
    code = "import figures.plot, sys; print('seaborn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
