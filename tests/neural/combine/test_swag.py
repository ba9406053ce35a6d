"""SWAG against its closed form."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neural.combine import Members, compare
from neural.combine.config import CombineConfig
from neural.combine.data import Parts
from neural.combine.swag import SWAG
from nqm import NQMError
from tests.tolerances import IDENTITY, agree

#: Standard errors that a check by draws may be off.
SIGMAS = 5.0


def snapshots(count: int = 5) -> Members:
    """A small linear model on its way, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    states = []
    for _ in range(count):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        states.append(copy.deepcopy(model.state_dict()))
    return Members.of_states(model, states)


def rows(members: Members) -> np.ndarray:
    return np.stack([members.flat(state).numpy() for state in members.states()])


def test_moments_are_those_of_the_snapshots() -> None:
    held = snapshots()
    w = rows(held)
    found = SWAG(rank=3).moments(held)
    agree(found.mean, w.mean(0), IDENTITY)
    agree(found.variance, w.var(0), 1e-10)
    running = np.stack([w[: i + 1].mean(0) for i in range(5)])
    agree(found.deviations, (w - running)[-3:], IDENTITY)


def test_draws_have_the_published_mean_and_covariance() -> None:
    held, draws = snapshots(), 4000
    swag = SWAG(draws=draws, rank=3, scale=0.5, seed=1)
    moments = swag.moments(held)
    drawn = np.stack([swag.weights(moments, i).numpy() for i in range(draws)])
    d = moments.deviations.numpy()
    covariance = 0.5 * (np.diag(moments.variance.numpy()) + d.T @ d / 2)
    center = drawn - moments.mean.numpy()
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(center.mean(0)) < SIGMAS * spread / np.sqrt(draws)).all()
    # Var of the product of two Gaussians: C_ii C_jj + C_ij^2.
    error = np.sqrt((np.outer(spread**2, spread**2) + covariance**2) / draws)
    assert (np.abs(center.T @ center / draws - covariance) < SIGMAS * error).all()


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    held = snapshots()
    parts = Parts(test=lambda: [])
    few, many = (SWAG(draws=n, seed=3).members(held, parts) for n in (2, 4))
    for i in range(2):
        agree(few.flat(few.state(i)), many.flat(many.state(i)), 0.0)
    other = SWAG(draws=2, seed=4).members(held, parts)
    assert not torch.equal(few.flat(few.state(0)), other.flat(other.state(0)))
    assert not torch.equal(few.flat(few.state(0)), few.flat(few.state(1)))


def test_statistics_are_those_of_the_draw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    states = []
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        states.append(copy.deepcopy(model.state_dict()))
    held = Members.of_states(model, states)
    x = torch.randn(50, 3, dtype=torch.float64)
    data: list[tuple[Tensor, Tensor]] = [(x, torch.zeros(50, dtype=torch.int64))]
    drawn = SWAG(draws=2).members(held, Parts(test=lambda: data, train=lambda: data))
    for state in drawn.states():
        hidden = x @ state["0.weight"].T + state["0.bias"]
        agree(state["1.running_mean"], hidden.mean(0), 1e-10)
    with pytest.raises(NQMError, match="SWAG"):
        SWAG(draws=2).members(held, Parts(test=lambda: data))


def test_in_a_comparison() -> None:
    held = snapshots()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 2, generator=g, dtype=torch.float64)
    data = [(x, (x[:, 0] > x[:, 1]).long())]
    table = compare(
        held, Parts(test=lambda: data), CombineConfig(rules=("uniform",), swag=6, held_out=0.0)
    )
    assert list(table.loc[table["rule"] == "member", "member"]) == [f"SWAG {i}" for i in range(6)]
    # Logits are linear in the weights: theory is exact.
    test = table[table["data"] == "test"]
    agree(test["predicted"], test["nll"], 1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draws": 0}, "SWAG.draws"),
        ({"rank": 1}, "SWAG.rank"),
        ({"scale": -1.0}, "SWAG.scale"),
        ({"seed": -1}, "SWAG.seed"),
    ],
)
def test_mistakes_are_told(settings: dict[str, float], words: str) -> None:
    with pytest.raises(NQMError, match=words):
        SWAG(**settings)  # type: ignore[arg-type]


def test_one_snapshot_or_one_draw_is_refused() -> None:
    with pytest.raises(NQMError, match="at least two snapshots; got 1"):
        SWAG().moments(snapshots(1))
    with pytest.raises(NQMError, match=r"swag must be 0, or at least 2 draws; got 1"):
        CombineConfig(swag=1)
