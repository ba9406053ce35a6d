"""What a bridge says in words, on tables made up for it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from neural.bridge.comparison import COLUMNS
from neural.bridge.verdict import along_slope, rank_order, verdict
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from tests.tiny_risks import Bowl

TEST_COLUMNS = [name for name in COLUMNS if "test" in name]


@pytest.fixture(scope="module")
def local() -> LocalQuadratic:
    return measure_local(Bowl((2.0, 0.7, 0.2), away=0.5).risk, None)


def cells(lr: float, ratios: tuple[float, ...], **changes: object) -> pd.DataFrame:
    """One training as `compare` gives it, one K for each ratio."""
    predicted = 1.0 / lr
    rows: dict[str, object] = {
        "way": "runs", "lr": lr, "momentum": 0.0, "batch_size": 8, "sampling": "shuffled",
        "steps": 10, "members": range(1, 1 + len(ratios)), "weights": "iterate",
        "predicted": predicted, "measured": predicted * np.array(ratios), "error": 0.1,
        "predicted_rise": predicted, "measured_rise": predicted * np.array(ratios),
        "ratio": ratios, "ratio_error": 0.1, "descent": 0.0, "noise_free": 0.0, "cross": 0.0,
        "floor": 0.5, "excess": 10.0, "curvature_change_part": 0.0, "effective_runs": 1.0,
        "noise_growth": np.nan, "kink_fraction": 0.0, "nonsmooth_excess": 0.0, "log2_slope": 0.0,
        "noise_change_on_path": np.nan, "plain": np.nan, "plain_error": np.nan,
        "predicted_gain": 2.0, "gain": [np.nan, 3.0, 3.0][: len(ratios)], "gain_error": 0.1,
    }  # fmt: skip
    rows |= dict.fromkeys(TEST_COLUMNS, np.nan)
    return pd.DataFrame(rows).assign(**changes)[COLUMNS]


def test_the_verdict_counts(local: LocalQuadratic) -> None:
    # Every table has its rows numbered from 0, as they are put together.
    table = pd.concat(
        [
            cells(0.1, (1.0, 1.1)),
            cells(0.2, (0.7, 1.3), floor=0.0),
            cells(0.2, (0.9, 8.0), weights="ema", floor=9.0),
            cells(0.4, (3.0, -1.0)),
            cells(0.8, (9.0, 9.0), predicted_rise=np.nan, excess=np.inf),
        ]
    )
    lines = verdict(table, local)
    # 1, 1.1 and 0.9; 0.7 and 1.3 are three errors off.
    assert lines[0].startswith("Do not trust: ")
    assert "within 25% or two standard errors, in 3 of 8 cells that decide" in lines[0]
    least = "Least training loss predicted: lr = 0.4, B = 8, K = 1; change +2.5, measured +7.5."
    assert lines[1] == least
    curvature = "Largest curvature 2; plain SGD is stable up to lr = 1 "
    assert sum(line.startswith(curvature) for line in lines) == 1
    assert sum(line.startswith("0.0% of the noise and 0.0% of the squared") for line in lines) == 1
    told = "1, 2 and 4 of 6 rises within a factor 1.05, 1.2 and 1.5 (averages over time apart)."
    assert told in lines
    assert "Where lr h_max <= 0.5: measured rise over predicted 0.70 to 1.30." in lines
    assert "ema: where lr h_max <= 0.5: measured rise over predicted 0.90 to 8.00." in lines
    sure = "less than two standard errors in 3 of 8 cells, averages over time included"
    assert sum(sure in line and "is 10% of the prediction" in line for line in lines) == 1
    assert "runs, lr = 0.1, B = 8: beyond K = 20 the floor is most of the loss." in lines
    assert "runs, lr = 0.2, B = 8: no K reaches the floor." in lines
    # Predicted 10, 5, 2.5 twice; measured 10, 3.5, 7.5 and 11, 6.5, -2.5. Of 15 pairs three are
    # predicted alike, and 3.5 < 6.5 < 7.5 is not what is predicted of 5, 5 and 2.5.
    right = sum(line.startswith("Rank order of K and lr right in 10 of 15 pairs") for line in lines)
    assert right == 1
    saves = "Gain by averaging (loss of one run less that of K): measured over predicted 1.50"
    assert f"{saves} to 1.50." in lines
    assert not any("Test losses" in line or "Cost" in line for line in lines)
    assert not any("scatter" in line or "Unreliable" in line for line in lines)
    alone = verdict(cells(0.1, (1.0,), test_loss=0.3), local)
    assert "Test losses are in the table; there is no prediction of them." in alone
    late = cells(0.1, (1.0, 1.0), test_loss=[0.3, 0.4], predicted_test_loss=0.35)
    assert "Test loss: measured less predicted -0.05 to +0.05." in verdict(late, local)


def test_what_averaging_saves_of_the_test_loss(local: LocalQuadratic) -> None:
    gains: dict[str, object] = {
        "predicted_test_gain": [np.nan, 0.2, 0.4], "test_gain": [np.nan, 0.24, -0.1],
        "test_gain_error": [np.nan, 0.01, 0.1], "test_loss": 1.0,
    }  # fmt: skip
    table = pd.concat(
        [
            cells(0.1, (1.0, 1.0, 1.0), **gains),
            cells(0.1, (1.0,), weights="swa", predicted_test_gain=-0.1, test_gain=-0.3,
                  test_gain_error=0.05),
        ]
    )  # fmt: skip
    lines = verdict(table, local)
    assert (
        "Test loss of a single run less that of the mean of 3 runs: +0.4 to +0.4 predicted."
    ) in lines
    assert (
        "Test loss of a single run less that of swa of one run: -0.1 to -0.1 predicted."
    ) in lines
    (told,) = [line for line in lines if line.startswith("What averaging saves of the test loss")]
    # Ratios 1.2, -0.25 and 3; of the three signs one is wrong, in a cell one error from 0.
    assert "sign right in 2 of 3 cells, in 2 of the 2 that are two standard errors from 0" in told
    assert "size within 25% in 1" in told
    assert not any("there is no prediction" in line for line in lines)
    alone = verdict(table.assign(test_gain=np.nan), local)
    assert not any("What averaging saves of the test" in line for line in alone)


def test_only_cells_within_the_range_of_the_theory_count(local: LocalQuadratic) -> None:
    near = cells(0.1, (1.0, 1.1), noise_growth=0.4)
    scattered = cells(0.2, (1.0, 9.0), noise_growth=0.41)
    descending = cells(0.4, (1.0, 1.1), noise_change_on_path=-0.9)
    pushed = cells(0.5, (1.0, 9.0), cross=[-0.41 * 2.0, 0.41 * 2.0])  # of a rise of 2
    assert list(along_slope(pushed)) == [True, True]
    assert not along_slope(pushed.assign(cross=-0.39 * 2.0)).any()
    lines = verdict(pd.concat([near, scattered, descending, pushed]), local)
    assert lines[0].startswith("Trust: ")
    assert lines[2].startswith("4 of 8 cells are within the range of the theory")
    assert any(line.startswith("2, 4 and 4 of 4 rises within") for line in lines)
    assert any(line.startswith("Unreliable") for line in lines)
    told = verdict(scattered.assign(test_gain=1.0, predicted_test_gain=-1.0), local)
    assert told[0].startswith("Do not trust this prediction: the learning rates are too high")
    assert told[1].startswith("No cell is within the range of the theory")
    assert not any("rises within a factor" in line or "sign right" in line for line in told)
    (first, *_) = verdict(pushed, local)
    assert "too far from a minimum" in first
    assert "bridge.minimise=300" in first
    assert not any("range of the theory" in line for line in verdict(near, local))


def test_the_first_line_says_whether_to_trust(local: LocalQuadratic) -> None:
    for ratios, error, word in (
        ((1.2, 1.2, 1.0), 0.01, "Trust: "),
        ((1.5, 1.2, 1.0), 0.01, "Trust in part: "),
        ((1.5, 1.5, 1.0), 0.01, "Do not trust: "),
        ((1.5, 1.5, 1.0), 0.3, "Trust: "),  # within two standard errors
        ((1.5, 1.5, 1.0), 0.51, "Not decided: "),
        ((1.5, 1.5, 1.0), np.nan, "Not decided: "),
        ((np.nan, np.nan, np.nan), np.nan, "Not tried by training. 3 of 3 cells"),
    ):
        assert verdict(cells(0.1, ratios, ratio_error=error), local)[0].startswith(word)


def test_rank_order_counts_what_is_sure() -> None:
    table = pd.DataFrame(
        {"predicted": [1.0, 2.0, 3.0], "measured": [1.0, 1.1, 0.0], "error": [0.1, 0.1, 0.1]}
    )
    # The first two are one standard error apart; the third is below both.
    assert rank_order(table) == (0, 2)
    assert rank_order(table.assign(predicted=-table["predicted"])) == (2, 2)
    assert rank_order(table.assign(error=np.nan)) == (0, 0)
    assert rank_order(table.assign(error=10.0)) == (0, 0)


def test_best_rates_and_cost_are_stated(local: LocalQuadratic) -> None:
    best = pd.DataFrame(
        {
            "way": "runs", "batch_size": 8, "members": [1, 4, 16, 64],
            "predicted": [np.nan, 7.0, 7.0, 0.2], "measured": [0.1, 7.0, 7.0, np.nan],
        }
    )  # fmt: skip
    cost = pd.DataFrame({"stage": ["one", "other"], "seconds": [0.1, 3.0], "epochs": [0.4, 12.34]})
    lines = verdict(cells(0.1, (1.0, 1.1)), local, best, cost)
    assert "runs, B = 8, K = 1: best lr predicted to be the lowest, 0.1 measured." in lines
    assert "runs, B = 8, K = 64: best lr 0.2 predicted, measured best not within the grid." in lines
    assert not any("lr 7" in line for line in lines), "only the ends are told"
    told = "Cost in epochs, gradients of all training examples: one 0.4, other 12.3."
    assert told in lines
    both = verdict(cells(0.1, (1.0,)), local, best.assign(predicted=0.1, measured=0.15))
    assert "runs, B = 8, K = 1: best lr 0.1 predicted, 0.15 measured, ratio 1.50." in both
    untrained = verdict(cells(0.1, (np.nan,)), local, best.assign(predicted=0.1, measured=np.nan))
    assert "runs, B = 8, K = 1: best lr 0.1 predicted." in untrained


def test_noise_that_feeds_itself_is_told(local: LocalQuadratic) -> None:
    calm = pd.concat(
        [cells(0.1, (1.0, 1.1), noise_growth=-0.1), cells(0.2, (1.0,), noise_growth=0.4)]
    )
    told = "The scatter of the weights is predicted to change their noise by -10% to +40%."
    assert told in verdict(calm, local)
    assert not any("Kinks" in line for line in verdict(calm, local))
    told = "Kinks of the loss add 7% to curvature along the stiffest directions"
    assert f"{told}." in verdict(calm.assign(kink_fraction=0.07), local)
    many = verdict(calm.assign(kink_fraction=0.23), local)
    assert any("add 23%" in line and "the floor is not predicted" in line for line in many)
    assert not any("Unreliable" in line for line in verdict(calm, local))
    edge = calm.assign(noise_growth=3e30)
    assert any("change their noise by +3e+30 times." in line for line in verdict(edge, local))
    wild = pd.concat(
        [
            calm,
            cells(0.4, (1.0, 2.0), noise_growth=1.0),
            cells(0.2, (1.0,), noise_growth=0.6, batch_size=4),
        ]
    )
    told = (
        "Unreliable (noise predicted to change by more than 40%, beyond the validity of first "
        "order): lr = 0.4 at B = 8, lr = 0.2 at B = 4."
    )
    assert verdict(wild, local).count(told) == 1


def test_noise_that_fades_on_the_way_is_told(local: LocalQuadratic) -> None:
    table = pd.concat(
        [
            cells(0.1, (1.0, 1.1), noise_change_on_path=-0.2),
            cells(0.2, (1.0,), noise_change_on_path=0.1),
        ]
    )
    assert "On the noise-free path the noise changes by -20% to +10%." in verdict(table, local)
