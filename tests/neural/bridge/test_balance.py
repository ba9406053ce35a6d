"""The force balance at the displaced mean, on a loss whose third derivatives are all there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neural.bridge.balance import balance_work, balanced
from neural.bridge.config import Training
from neural.bridge.drift import Drift, measure_drift
from neural.curvature.lanczos import LanczosNodes
from neural.curvature.local_quadratic import LocalQuadratic, measure_local
from tests.tiny_risks import Bowl
from tests.tolerances import agree

COUNT = 4


@pytest.fixture(scope="module")
def bowl() -> Bowl:
    return Bowl((2.0, 0.7, 0.2), examples=60, cubic=1.0)


def force(drift: Drift, half: int) -> np.ndarray:
    """In the weights' coordinates."""
    rest = drift.force_rest[half].apply(np.ones_like)
    return np.asarray(drift.local.pairs.vectors @ drift.force_top[half] + rest)


def bent(bowl: Bowl, moved: np.ndarray) -> np.ndarray:
    """Change of the mean gradient by a displacement m, beyond H m: 1/2 T:mm, whatever scatters."""
    return np.asarray(0.5 * np.einsum("ijk,j,k->i", bowl.third, moved, moved))


@pytest.mark.parametrize("eigenpairs", [None, 1])
def test_a_settled_mean_balances_the_measured_gradient(bowl: Bowl, eigenpairs: int | None) -> None:
    training = Training(0.2, 8, 4000)
    local = measure_local(bowl.risk, eigenpairs, lanczos_steps=3)
    drift = measure_drift(bowl.risk, local, training, displacements=COUNT, lanczos_steps=3)
    told: list[int] = []
    found = balanced(
        bowl.risk, drift, local, np.zeros(3), displacements=COUNT, lanczos_steps=3,
        progress=told.append,
    )  # fmt: skip
    for half, moved in enumerate(drift.displacement_twice(training)):
        extra = bent(bowl, moved)
        assert np.abs(extra).max() > 0.005 * np.abs(force(drift, half)).max()
        # Along the eigenpairs exactly; beyond them a force counts as one of flat directions.
        agree(force(found, half) - force(drift, half), extra, 0.02)
        top = local.pairs.vectors.T @ extra
        agree(found.force_top[half] - drift.force_top[half], top, 1e-8)
    assert sum(told) >= balance_work(COUNT, 60) == 24


def test_a_force_that_grows_with_the_displacement_counts_half_in_flat_directions() -> None:
    """The displacement grows in proportion to time there."""
    bowl = Bowl((1e-4, 1e-5), examples=60, cubic=0.1)
    training = Training(0.5, 8, 200)
    local = measure_local(bowl.risk, None)
    drift = measure_drift(bowl.risk, local, training, displacements=COUNT)
    # Without scatter the force is at full strength from the first step on.
    still = replace(local, noise=np.zeros((2, 2)), noise_trace=0.0)
    drift = replace(drift, local=still)
    found = balanced(bowl.risk, drift, still, np.zeros(2), displacements=COUNT)
    for half, moved in enumerate(drift.displacement_twice(training)):
        agree(force(found, half) - force(drift, half), 0.5 * bent(bowl, moved), 2e-2)


def test_the_curvature_of_the_scatter_counts(bowl: Bowl) -> None:
    """A drift that is told of too little curvature gets the force that is missing."""
    training = Training(0.2, 8, 4000)
    local = measure_local(bowl.risk, None)
    drift = measure_drift(bowl.risk, local, training, displacements=COUNT)

    def of(curvature: LocalQuadratic) -> tuple[Drift, list[np.ndarray]]:
        other = replace(drift, local=curvature)
        return other, list(other.displacement_twice(training))

    softer = replace(local, pairs=replace(local.pairs, values=0.9 * local.pairs.values))
    other, moved = of(softer)
    found = balanced(bowl.risk, other, local, np.zeros(3), displacements=COUNT)
    for half in (0, 1):
        missing = 0.1 * bowl.risk.hessian().numpy() @ moved[half] + bent(bowl, moved[half])
        agree(force(found, half) - force(other, half), missing, 1e-8)


def test_without_a_force_nothing_changes() -> None:
    bowl = Bowl((2.0, 0.7), examples=40)
    local = measure_local(bowl.risk, None)
    training = Training(0.2, 8, 30)
    drift = measure_drift(bowl.risk, local, training, displacements=2)
    empty = LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((2, 0)))
    drift = replace(drift, force_top=(np.zeros(2), np.zeros(2)), force_rest=(empty, empty))
    found = balanced(bowl.risk, drift, local, np.zeros(2), displacements=2)
    assert np.abs(found.force_top).max() == 0.0
