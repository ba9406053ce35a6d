"""Kinks of a loss, where their density is known, and a smooth loss, which has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_landscapes import Plain, tanh_landscape
from torch import Tensor

from neural.curvature import Landscape
from neural.kinks import measure_kinks
from neural.local_model import measure
from neural.smoothing import Kinks, Smoothing, measure_smoothing
from nqm.errors import NQMError

CURVATURE, JUMP, SPREAD = (4.0, 2.0, 1.0), (0.3, 0.5, 0.2), 3.0
LR, SIZE, STEPS = 0.1, 4.0, 100


def creased(curvature: tuple[float, ...] = CURVATURE) -> Landscape:
    """Example n has the loss 1/2 w' H w + sum_i J_i |w_i - x_ni|, x normal around the checkpoint.

    Scatter meets 2 J_i p(0) of kinks for a length, p the density of x_i, wherever it is narrow
    beside `SPREAD`; the second derivatives at a point are H.
    """
    x = SPREAD * torch.from_numpy(np.random.default_rng(1).standard_normal((20_000, 3)))
    h, jump = torch.tensor(curvature).double(), torch.tensor(JUMP).double()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        off, w = output.unbind(1)
        return (0.5 * h * w**2 + jump * off.abs()).sum(1)

    zero = torch.zeros(3, dtype=torch.double)
    targets = torch.zeros(len(x), dtype=torch.long)
    return Landscape(Plain(zero[:1].clone(), zero[1:].clone()), [(x, targets)], loss=loss)


def smoothed(landscape: Landscape, pairs: int | None, samples: int = 1) -> Smoothing:
    local = measure(landscape, pairs, draws=2, products=2)
    return measure_smoothing(landscape, local, LR, SIZE, STEPS, samples=samples)


@pytest.mark.parametrize("pairs", [None, 2])
def test_kinks_are_counted(pairs: int | None, tmp_path: Path) -> None:
    landscape = creased()
    smoothing = smoothed(landscape, pairs)
    assert np.abs(smoothing.width.curvature).max() < 1e-9, "second derivatives do not see them"
    found = [measure_kinks(landscape, smoothing, samples=60, folder=tmp_path) for _ in range(2)]
    density = 1.0 / (SPREAD * np.sqrt(2.0 * np.pi))
    added = 2.0 * np.array(JUMP) * density
    # 20,000 of them: 2,660 p(0) d in a width d of 0.05, some four percent at one end alone.
    kept = slice(None) if pairs is None else slice(0, pairs)
    np.testing.assert_allclose(found[0].pairs, added[kept], rtol=0.1)
    if pairs is None:
        assert found[0].rest == 0.0, "no pair is flat, and there is nothing else"
    else:
        assert found[0].rest == pytest.approx(added[2], rel=0.1)
    np.testing.assert_array_equal(found[0].pairs, found[1].pairs)
    # Seen by the scatter, the curvature has them, whatever its size; the smooth part has not.
    seen = replace(smoothing, kinks=found[0])
    assert smoothing.creased() == 0.0
    assert seen.creased() == pytest.approx(found[0].pairs.sum() / sum(CURVATURE[kept]), rel=1e-6)
    for rate in (LR, 0.3 * LR):
        local = seen.at(rate, SIZE)
        expected = np.array(CURVATURE)[kept] + found[0].pairs
        np.testing.assert_allclose(local.pairs.values, expected, rtol=1e-9)
        for draw, before in zip(local.draws, smoothing.local.draws, strict=True):
            np.testing.assert_allclose(draw.values, before.values + found[0].rest, rtol=1e-9)
    assert seen.share(LR, SIZE, STEPS) == pytest.approx(0.0, abs=1e-12)


def test_flat_directions_share_one_value() -> None:
    landscape = creased((4.0, 0.02, 0.01))
    smoothing = smoothed(landscape, None)
    found = measure_kinks(landscape, smoothing, samples=60)
    added = 2.0 * np.array(JUMP) / (SPREAD * np.sqrt(2.0 * np.pi))
    size = np.diag(smoothing.local.scatter(LR, SIZE, STEPS))
    shared = (added * size)[1:].sum() / size[1:].sum()
    np.testing.assert_allclose(found.pairs, [added[0], shared, shared], rtol=0.15)
    assert found.pairs[1] == found.pairs[2] == found.rest


def test_a_smooth_loss_has_none() -> None:
    landscape = tanh_landscape()
    smoothing = measure_smoothing(landscape, measure(landscape, None), 0.02, SIZE, 30, samples=8)
    found = measure_kinks(landscape, smoothing, samples=60)
    whole = np.abs(smoothing.local.pairs.values).sum()
    assert abs(found.pairs.sum()) < 0.01 * whole


def test_nothing_to_look_at_is_refused() -> None:
    landscape = tanh_landscape()
    with pytest.raises(NQMError, match="samples must be"):
        measure_kinks(landscape, smoothed(landscape, 4), samples=0)


def test_kinks_of_nothing_change_nothing() -> None:
    smoothing = smoothed(tanh_landscape(), 4)
    none = Kinks(np.zeros(4), 0.0)
    seen = replace(smoothing, kinks=none).at(LR, SIZE)
    before = smoothing.at(LR, SIZE)
    np.testing.assert_array_equal(seen.pairs.values, before.pairs.values)
    np.testing.assert_array_equal(seen.draws[0].values, before.draws[0].values)
