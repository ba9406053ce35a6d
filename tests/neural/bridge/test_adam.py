"""Adam as heavy ball in other coordinates, against Adam written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neural.bridge import BridgeConfig, Plan, compare, measure
from neural.bridge.adam import preconditioned, second_moments
from neural.bridge.config import Training
from neural.bridge.sgd_chains import minibatches, train_runs
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import agree

CURVATURE = [2.0, 1.0, 0.6, 0.3, 0.1]
CONFIG = BridgeConfig(
    eigenpairs=0,
    displacements=2,
    averaging_displacements=0,
    lr_times_sharpness=(0.1,),
    batch_sizes=(8,),
    steps=80,
    momentum=0.9,
    optimizer="adam",
)


def simulated(bowl: Bowl, lr: float, config: BridgeConfig, chains: int) -> tuple[float, float]:
    """Mean loss after Adam's steps, and its standard error; v starts at E g^2 at the minimum."""
    rng, size = np.random.default_rng(5), config.batch_sizes[0]
    inputs = bowl.risk.batches[0][0].numpy()
    v = np.tile(np.diag(bowl.noise) / size, (chains, 1))
    w, m = np.zeros((chains, len(bowl.hessian))), np.zeros((chains, len(bowl.hessian)))
    for _ in range(config.steps):
        centre = inputs[rng.integers(len(inputs), size=(chains, size))].mean(1)
        g = (w - centre) @ bowl.hessian
        m = config.momentum * m + (1 - config.momentum) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        w = w - lr * m / (np.sqrt(v) + config.eps)
    loss = 0.5 * np.einsum("ci,ij,cj->c", w, bowl.hessian, w)
    return float(loss.mean()), float(loss.std() / np.sqrt(chains))


def test_second_moments_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    risk, cache = Bowl(CURVATURE).risk, Cache(tmp_path)
    first = preconditioned(risk, CONFIG, cache)
    agree(first.frame[1].numpy(), preconditioned(risk, CONFIG).frame[1].numpy(), 1e-12)
    monkeypatch.setattr(EmpiricalRisk, "example_gradients", None)
    again = preconditioned(risk, CONFIG, cache)
    assert torch.equal(first.frame[1], again.frame[1])


@pytest.mark.parametrize(("momentum", "eps"), [(0.9, 1e-8), (0.0, 1e-8), (0.5, 0.3)])
def test_the_prediction_is_what_adam_does(momentum: float, eps: float) -> None:
    bowl = Bowl(CURVATURE)
    config = replace(CONFIG, momentum=momentum, eps=eps)
    measured = measure(bowl.risk, config)
    plan = Plan((1, 4), 64, 1)
    table = compare(measured, plan).table
    iterate = table[table["weights"] == "iterate"].set_index("members")
    (training,) = {gaussian.training for gaussian in measured.gaussians}
    loss, error = simulated(bowl, training.effective_lr, config, 4000)
    predicted = iterate.loc[1, "predicted"]
    assert error < 0.03 * loss
    # v also contains the squared slope where the weights scatter, which the prediction leaves out:
    # at a tenth of the sharpness some 2 % of v.
    assert abs(loss - predicted) < 3.0 * error + 0.03 * predicted
    assert ((iterate["ratio"] - 1.0).abs() < 3.0 * iterate["ratio_error"] + 0.03).all()


def test_second_moments_are_those_of_minibatches() -> None:
    risk = tanh_risk()
    each = torch.cat(list(risk.example_gradients()))
    generator = torch.Generator().manual_seed(2)
    decay = risk.decay_gradient(risk.weights)
    index = torch.randint(risk.examples, (20000, 1), generator=generator)
    squares = (each[index].mean(1) + decay).square()
    found = second_moments(risk, 1)
    error = squares.std(0) / np.sqrt(len(squares))
    assert ((found - squares.mean(0)).abs() < 5.0 * error).all()
    moved = preconditioned(risk, replace(CONFIG, batch_sizes=(1,)))
    scale = 1.0 / (found.sqrt() + 1e-8)
    agree(moved.gradient(), scale.sqrt() * risk.gradient(), 1e-12)


def test_adam_itself_is_trained() -> None:
    """The weights after three steps, written out; no bias is corrected."""
    risk, training = tanh_risk(), Training(0.02, 1, 3, 0.5, optimizer="adam", beta2=0.99, eps=1e-4)
    own = preconditioned(risk, replace(CONFIG, batch_sizes=(1,), eps=1e-4))
    v, m = second_moments(risk, 1), torch.zeros_like(risk.weights)
    w, draw = risk.weights, minibatches(risk.examples, training, (1, 0))
    for _ in range(3):
        g = torch.cat(list(risk.at(w).example_gradients()))[next(draw)].mean(0)
        g = g + risk.decay_gradient(w)
        m, v = 0.5 * m + 0.5 * g, 0.99 * v + 0.01 * g**2
        w = w - 0.04 * m / (v.sqrt() + 1e-4)
    ((_, found),) = train_runs(own, training, 1, [3], seed=1)
    agree(own.model_weights(found[0]), w, 1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta2": 0.9}, "second moments move within the 80 steps"),
        ({"beta2": 0.99, "steps": 5000}, "second moments move within the 5000 steps"),
        ({"batch_sizes": (8, 16)}, "batch_sizes must have one entry"),
        ({"sampling": "shuffled"}, "with replacement' only"),
        ({"optimizer": "sgd", "beta2": 0.99}, "set optimizer = 'adam'"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"beta2": 1.0}, "beta2"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_what_is_not_predicted_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(NQMError, match=message):
        replace(CONFIG, **wrong)  # type: ignore[arg-type]


def test_networks_whose_second_moments_do_not_rest_are_refused() -> None:
    with pytest.raises(NQMError, match=r"the slope is 9[0-9]% of the squared gradient"):
        measure(Bowl(CURVATURE, away=100.0).risk, CONFIG)
    with pytest.raises(NQMError, match="independent runs; drop late_phase"):
        measure(Bowl(CURVATURE).risk, CONFIG, plan=Plan((2,), late_phase="name:first"))
    risk = tanh_risk(quick=False)
    risk.batches = [(torch.zeros_like(x), y) for x, y in risk.batches]  # the first layer is idle
    with pytest.raises(NQMError, match="weights has no noise"):
        measure(risk, CONFIG)
