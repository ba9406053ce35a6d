"""Adam as heavy ball in other coordinates, against Adam written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from neural.bridge import BridgeConfig, Measured, Plan, compare, measure
from neural.bridge.adam import preconditioned, second_moments
from neural.bridge.config import Training
from neural.bridge.quick import measure_for_advice
from neural.bridge.sgd_chains import minibatches, noise_free, train_runs
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


def adamw(risk: EmpiricalRisk, training: Training, chains: int, weight_decay: float) -> np.ndarray:
    """Weights after `torch.optim.AdamW` on minibatches of the risk's examples, (chains, p).

    Its second moments begin at their stationary value, its momentum where the decay alone moves
    nothing.
    """
    plain = risk.decaying(torch.zeros_like(risk.weights))
    v = second_moments(plain, training.batch_size)
    w = torch.nn.Parameter(risk.weights.repeat(chains, 1))
    betas = (training.momentum, training.beta2)
    options = {"eps": training.eps, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([w], training.effective_lr, betas, **options)
    optimizer.state[w] = {
        "step": torch.tensor(1e9),
        "exp_avg": -weight_decay * (v.sqrt() + training.eps) * w.detach(),
        "exp_avg_sq": v.expand_as(w).clone(),
    }
    draws = [minibatches(risk.examples, training, (1, c)) for c in range(chains)]
    for _ in range(training.steps):
        w.grad = torch.stack(
            [
                torch.cat(list(plain.at(own).example_gradients()))[next(draw)].mean(0)
                for own, draw in zip(w.detach(), draws, strict=True)
            ]
        )
        optimizer.step()
    return w.detach().numpy()


def test_adamw_itself_is_trained() -> None:
    risk = tanh_risk(weight_decay=0.7)
    training = Training(0.02, 2, 4, 0.5, optimizer="adamw", beta2=0.99, eps=1e-4)
    config = replace(CONFIG, optimizer="adamw", batch_sizes=(2,), eps=1e-4)
    own = preconditioned(risk, config)
    ((_, found),) = train_runs(own, training, 2, [4], seed=1)
    agree(own.model_weights(found), adamw(risk, training, 2, 0.7), 1e-9)


def bowl_with_decay(weight_decay: float) -> Bowl:
    bowl = Bowl(CURVATURE, away=0.1)
    bowl.risk.weight_decay = weight_decay
    return bowl


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_of_adamw_is_heavy_ball_on_the_decayed_loss(momentum: float) -> None:
    """With all examples in a batch and second moments that never change, AdamW written out."""
    wd, bowl = 0.3, bowl_with_decay(0.3)
    config = replace(CONFIG, optimizer="adamw", momentum=momentum, batch_sizes=(1,))
    own = preconditioned(bowl.risk, config)
    (training,) = config.trainings(5.0)
    scale = own.frame[1].numpy() ** 2
    w, m = bowl.risk.weights.numpy(), -wd / scale * bowl.risk.weights.numpy()
    for _ in range(training.steps):
        m = momentum * m + (1.0 - momentum) * bowl.hessian @ w
        w = w - training.effective_lr * (wd * w + scale * m)
    seen: list[torch.Tensor] = []
    noise_free(own, training, [training.steps], seen=lambda _, at: seen.append(at))
    left_out = training.effective_lr * wd / (1.0 - momentum) if momentum else 1e-12
    agree(own.model_weights(seen[-1]), w, left_out)
    decayed = bowl.hessian + wd * np.diag(1.0 / scale)
    loss = 0.5 * float(bowl.risk.weights.numpy() @ decayed @ bowl.risk.weights.numpy())
    rest = EmpiricalRisk(bowl.risk.model, bowl.risk.batches, loss=bowl.risk.example_loss)
    constant = rest.loss(torch.zeros_like(rest.weights))
    assert own.loss() == pytest.approx(loss + constant, rel=1e-12)


def test_the_prediction_is_what_adamw_does() -> None:
    """Decay half as strong as the smallest curvature, from a place that it pulls to the minimum."""
    bowl = bowl_with_decay(0.05)
    measured = measure(bowl.risk, replace(CONFIG, optimizer="adamw"))
    table = compare(measured, Plan((1, 8), 256, 1)).table
    iterate = table[table["weights"] == "iterate"]
    assert (iterate["descent"] < 0.0).all()
    assert ((iterate["ratio"] - 1.0).abs() < 3.0 * iterate["ratio_error"] + 0.03).all()
    (training,) = {gaussian.training for gaussian in measured.gaussians}
    agree(measured.local.pairs.values.sum() - own_trace(bowl, measured), 5 * 0.05, 1e-9)
    assert training.optimizer == "adamw"


def own_trace(bowl: Bowl, measured: Measured) -> float:
    """Trace of the loss's own Hessian in the coordinates of Adam."""
    return float(np.diag(bowl.hessian) @ measured.risk.frame[1].numpy() ** 2)


def test_fast_decay_is_refused() -> None:
    with pytest.raises(NQMError, match=r"weight_decay = 50 .* lower bridge.weight_decay"):
        measure(bowl_with_decay(50.0).risk, replace(CONFIG, optimizer="adamw"))


def test_every_batch_size_has_coordinates_of_its_own() -> None:
    """A bridge of two batch sizes is one of each; rates are relative to each one's curvature."""
    risk, plan = Bowl(CURVATURE).risk, Plan((1, 2), 4, 1)
    both = replace(CONFIG, lr_times_sharpness=(0.1, 0.2), batch_sizes=(8, 32))
    table = compare(measure(risk, both), plan).table
    assert table["lr"].nunique() == 3
    for size, rates in ((8, (0.1, 0.2)), (32, (0.1,))):
        own = replace(both, lr_times_sharpness=rates, batch_sizes=(size,))
        expected = compare(measure(risk, own), plan).table
        found = table[table["batch_size"] == size].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    with pytest.raises(NQMError, match="one entry for advice"):
        measure_for_advice(risk, both, plan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta2": 0.9}, "second moments move within the 80 steps"),
        ({"beta2": 0.99, "steps": 5000}, "second moments move within the 5000 steps"),
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
