"""Advice, on tables made up for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from neural.bridge.advise import advise, read_bridge
from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import write_table
from tests.neural.bridge.test_verdict import cells

#: descent = cross = 0, floor 0.5, excess 10: the mean of K runs rises by 0.5 + 10 / K.
ONE = cells(0.1, (1.0, 1.1, 1.0))


def test_it_stops_where_one_more_member_buys_too_little() -> None:
    """10 / K - 10 / (K + 1) is below 1 % of 10.5 from K = 10 on: 10 11 > 95.2 > 9 10."""
    found = advise(ONE, members=64)
    assert (found.lr, found.batch_size, found.weights, found.members) == (0.1, 8, "iterate", 10)
    assert found.change == pytest.approx(0.5 + 10.0 / 10, rel=1e-12)
    assert found.single == pytest.approx(10.5, rel=1e-12)
    assert "Stop at K = 10: one more run would save 0.9% of what noise costs a single run." in (
        found.words
    )
    # 10 / K (K + 1) < 0.1 10.5 from K = 3 on, and a budget ends sooner.
    assert advise(ONE, members=64, worth=0.1).members == 3
    assert advise(ONE, members=2, worth=0.1).members == 2
    assert advise(ONE).members == 3, "the largest K of the table"
    assert any("K = 3 is the most you asked for: one more run would save 7.9%" in w
               for w in advise(ONE).words)  # 10 / 12 over 10.5  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "members", "told"),
    [
        ("iterate", 1, "and take the last weights of a single run."),
        ("swa", 2, "and average the SWA of 2 runs (the mean over the second half of the steps)."),
        ("ema", 1, "and take the EMA of a single run (an exponential mean of steps)."),
    ],
)
def test_what_to_take_is_told_in_words(weights: str, members: int, told: str) -> None:
    found = advise(cells(0.1, (1.0, 1.1), weights=weights), members)
    assert found.words[0] == f"Train 10 steps at lr = 0.1, B = 8, {told}"
    assert found.words[1].startswith("Expected change of the training loss: +")


def test_the_least_loss_of_all_reliable_cells_is_chosen() -> None:
    table = pd.concat(
        [
            ONE,
            cells(0.2, (1.0, 1.1, 1.0), excess=4.0),
            cells(0.2, (1.0, 1.1, 1.0), excess=1.0, weights="swa", effective_runs=4.0),
            cells(0.3, (1.0, 1.0, 1.0), descent=-0.01, excess=6.0),
            # Better than all, if they could be believed:
            cells(0.4, (1.0, 1.0, 1.0), descent=-5.0, noise_growth=0.41),
            cells(0.6, (2.0, 2.0, 2.0), descent=-5.0, ratio_error=0.2),
            cells(0.7, (1.0, 1.0, 1.0), descent=-5.0, predicted=np.nan, excess=np.inf),
        ]
    )
    found = advise(table, members=3)
    assert (found.lr, found.weights, found.members) == (0.2, "swa", 3)
    assert found.single == pytest.approx(4.5, rel=1e-12), "of the last weights at this rate"
    assert "4 of 7 trainings and averages are predicted reliably." in found.words
    # With so large an error training does not contradict what it is twice as high as.
    unsure = table.assign(ratio_error=0.3)
    assert advise(unsure, members=3).lr == 0.6


def test_the_end_of_the_grid_is_told() -> None:
    table = pd.concat([ONE, cells(0.2, (1.0,) * 3, excess=5.0), cells(0.4, (1.0,) * 3)])
    assert not any("beyond" in words for words in advise(table).words)
    low = pd.concat([cells(0.05, (1.0,) * 3, excess=1.0), table])
    assert any("the lowest of the rates" in words for words in advise(low).words)
    high = pd.concat([table, cells(0.8, (1.0,) * 3, excess=1.0)])
    assert any("the highest of the reliable rates" in words for words in advise(high).words)
    assert not any("beyond" in words for words in advise(ONE).words), "there is one only"


@pytest.mark.parametrize(
    ("gain", "error", "told"),
    [
        (0.04, 0.01, "It is predicted to lower the test loss by 0.04 ± 0.01 (K = 3)."),
        (-0.04, 0.01, "It is predicted to raise the test loss by 0.04 ± 0.01 (K = 3)."),
        (-0.04, 0.03, "It is not clear whether it lowers the test loss: by -0.04 ± 0.03."),
        (np.nan, np.nan, "The test loss is not predicted for it."),
    ],
)
def test_the_test_loss_is_told(gain: float, error: float, told: str) -> None:
    table = ONE.assign(predicted_test_gain=[np.nan, 0.9, gain], predicted_test_gain_error=error)
    if np.isnan(gain):
        table = table.assign(predicted_test_gain=np.nan)
    assert told in advise(table).words


def test_it_tells_if_nothing_was_trained() -> None:
    alone = ONE.assign(ratio=np.nan, ratio_error=np.nan, measured=np.nan)
    told = "This rests on the prediction alone: nothing was trained at this rate."
    assert told in advise(alone).words
    assert told not in advise(ONE).words


def test_without_a_reliable_cell_there_is_no_advice(tmp_path: Path) -> None:
    table = ONE.assign(noise_growth=0.9)
    with pytest.raises(NQMError, match="no advice: none of the 1 trainings") as told:
        advise(table)
    assert "\n" not in str(told.value)
    for settings, message in (
        ({"members": 0}, "members must be an integer >= 1; got 0"),
        ({"worth": 0.0}, r"worth must lie in \(0, inf\); got 0"),
    ):
        with pytest.raises(NQMError, match=message):
            advise(ONE, **settings)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["neural", "advise", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds neither a run nor a finished bridge; give a run, or measure first" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    write_table(tmp_path / "bridge.parquet", ONE, {})
    pd.testing.assert_frame_equal(read_bridge(tmp_path), ONE)
    done = CliRunner().invoke(main, ["neural", "advise", str(tmp_path), "--members", "64"])
    assert done.exit_code == 0, done.output
    assert "- Stop at K = 10" in done.stdout
    assert done.stdout.splitlines()[0] == (
        "- Train 10 steps at lr = 0.1, B = 8, and average the last weights of 10 runs."
    )


def test_late_phase_members_are_advised_in_a_number_that_was_measured() -> None:
    """Each K has a cell of its own for every rate; two more, or five, must be worth it."""

    def late(lr: float, predicted: list[float]) -> pd.DataFrame:
        rises = [change + 2.0 for change in predicted]
        return ONE.assign(members=[2, 4, 9], lr=lr, predicted=predicted, predicted_rise=rises)

    unreliable = late(0.4, [-9.0] * 3).assign(noise_growth=0.9)
    table = pd.concat([late(0.1, [8.0, 4.0, 3.5]), late(0.2, [9.0, 3.0, 2.9]), unreliable])
    table = table.assign(way="head")
    found = advise(table)  # (8 - 3) / 2 of 10 for each of two, (3 - 2.9) / 5 of it for five
    assert (found.lr, found.members, found.change, found.single) == (0.2, 4, 3.0, None)
    assert found.words[0].startswith(
        "Train 10 steps at lr = 0.2, B = 8, with 4 late-phase members of head, and take their mean."
    )
    assert "Stop at K = 4: up to 9, one more member buys 0.2% of what noise costs K = 2." in (
        found.words
    )
    assert "This is the highest of the reliable rates: a better one may lie beyond." in found.words
    assert "6 of 9 trainings and averages are predicted reliably." in found.words
    more = advise(table, worth=0.001)
    assert (more.lr, more.members) == (0.2, 9)
    assert "K = 9 is the largest of the reliable K up to 9." in more.words
    averaged = advise(table.assign(weights="swa"))
    assert averaged.words[0].endswith("and take the SWA of their mean.")
    few = advise(table, members=3)
    assert (few.lr, few.members) == (0.1, 2)
    assert "K = 2 is the largest of the reliable K up to 3." in few.words
    with pytest.raises(NQMError, match="members must be at least 2, the smallest K measured; got"):
        advise(table, members=1)
    with pytest.raises(NQMError, match="no advice: none of the 9 trainings"):
        advise(table.assign(noise_growth=0.9))
