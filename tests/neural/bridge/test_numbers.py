"""The numbers of one small bridge, so that a change of the code alone does not change them.

This is a guard of a refactoring: the tables in ``data/`` were written by our own code, last when
negative curvature began to count as zero in scatter and drift. They are no
reference values of the theory (those are in the other tests of the bridge). A change that means
to change numbers writes new tables and says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits

from neural.bridge.api import compare, measure
from neural.bridge.best_lr import best_lrs
from neural.bridge.config import BridgeConfig, Plan
from neural.curvature.risk import EmpiricalRisk
from neural.models import build

DATA = next(one for one in Path(__file__).parents if one.name == "tests") / "data"
#: Roundings of other processors' instructions, over some hundred steps and products.
TOLERANCE = 1e-9
#: Of columns that are small differences of larger numbers, of which rounding leaves fewer digits.
CANCELLING = dict.fromkeys(("cross", "predicted_rise", "ratio"), 1e-8)
CANCELLING |= dict.fromkeys(("error", "ratio_error", "gain_error", "plain_error"), 1e-6)


def digits() -> EmpiricalRisk:
    """172 weights of a tanh network on 120 digits of 4 x 4 pixels, near a minimum."""
    data = load_digits()
    x = torch.from_numpy(data.images[:120] / 16.0)[:, None]
    x = torch.nn.functional.avg_pool2d(x, 2)
    y = torch.from_numpy(data.target[:120])
    rng = np.random.default_rng(0)
    options = {"channels": 1, "size": 4, "hidden": [6], "activation": "tanh"}
    model = build("mlp", classes=10, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.3, parameter.shape)))
    found = EmpiricalRisk(model, [(x, y)], weight_decay=0.01)
    weights = found.weights.clone()
    for _ in range(150):
        weights -= 0.3 * found.gradient(weights)
    return found.at(weights)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    config = BridgeConfig(
        eigenpairs=0, displacements=4, averaging_displacements=1,
        lr_times_sharpness=(0.125, 0.25, 0.5), batch_sizes=(8, 16), steps=24,
    )  # fmt: skip
    plan = Plan(members=(1, 2, 4), runs=4, records=2)
    measured = measure(digits(), config)
    found = compare(measured, plan)
    best = best_lrs(found.table, measured.gaussians, records=plan.records)
    return {"table": found.table, "course": found.course, "best": best}


@pytest.mark.parametrize("name", ["table", "course", "best"])
def test_the_numbers_are_those_before(tables: dict[str, pd.DataFrame], name: str) -> None:
    before = pd.read_csv(DATA / f"bridge_digits_{name}.csv")
    found = tables[name]
    added = {name for name in found if "test_" in name} - {"test_loss"}  # no test loss is given
    assert found[list(added)].isna().all(axis=None)
    assert set(before.columns) == set(found.columns) - {"way", "sampling"} - added
    assert len(found) == len(before)
    assert "weights" not in before or list(found["weights"]) == list(before["weights"])
    for column in before.columns.drop("weights", errors="ignore"):
        np.testing.assert_allclose(
            found[column].astype(float), before[column].astype(float),
            rtol=CANCELLING.get(column, TOLERANCE), err_msg=column,
        )  # fmt: skip
