"""Late-phase members on a shared base, on quadratics whose Hessian couples members and base.

The reference is the literal recursion of the joint second moments of the base and all K members.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from neural.bridge import BridgeConfig, Plan, compare, measure, predict
from neural.bridge.config import Training
from neural.bridge.scatter import covariance, displacements
from neural.bridge.sgd_chains import minibatches, train_late_phase
from neural.bridge.shared_base import SharedBaseQuadratic, mean_model, member_mask, risk_of_mean
from neural.curvature.local_quadratic import measure_local
from neural.curvature.minimise import minimise
from neural.curvature.risk import EmpiricalRisk
from neural.late_phase.reparametrize import RankOne, add_rank1
from nqm.errors import NQMError
from nqm.gamma import base_scale
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import agree

CURVATURE = [2.0, 1.0, 0.6, 0.3, 0.1]
TRAINING = Training(0.2, 4, 40)
#: Measures what `compare` needs on a quadratic; there, averages and forces are zero.
CONFIG = BridgeConfig(
    eigenpairs=0,
    displacements=2,
    averaging_displacements=0,
    lr_times_sharpness=(0.3,),
    batch_sizes=(4,),
    steps=12,
)


def joint_moments(
    bowl: Bowl, training: Training, members: int, gamma: str | float, ratio: float, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Covariances of the mean model and of a member, from the second moments of all weights.

    The state is (theta, phi_1, ..., phi_K); member k has the weights J_k z.
    """
    p, n_own = len(bowl.hessian), int(own.sum())
    size = p - n_own + members * n_own
    maps = []
    for k in range(members):
        j = np.zeros((p, size))
        j[np.flatnonzero(~own), np.arange(p - n_own)] = 1.0
        first = p - n_own + k * n_own
        j[np.flatnonzero(own), np.arange(first, first + n_own)] = 1.0
        maps.append(j)
    rate = np.zeros(size)
    rate[: p - n_own] = base_scale(gamma, members)
    rate[p - n_own :] = ratio
    # Of gradient k only the member's own rows and the base's are used: J_k' picks them.
    pull = [training.lr * rate[:, None] * j.T for j in maps]
    step = np.eye(size) - sum(a @ bowl.hessian @ j for a, j in zip(pull, maps, strict=True))
    noise = sum(a @ bowl.noise @ a.T for a in pull) / training.batch_size
    z = np.zeros((size, size))
    for _ in range(training.steps):
        z = step @ z @ step.T + noise
    mean = sum(maps) / members
    return mean @ z @ mean.T, maps[0] @ z @ maps[0].T


def shared(
    risk: EmpiricalRisk, select: str, members: int, gamma: str | float, ratio: float
) -> tuple[EmpiricalRisk, SharedBaseQuadratic]:
    mask = member_mask(risk, select)
    own = risk_of_mean(risk, mask, members, gamma, ratio)
    apart = measure_local(own.rescaled(mask.to(own.weights)), None)
    return own, SharedBaseQuadratic.of(measure_local(own, None), apart, members)


@pytest.mark.parametrize(
    ("select", "members", "gamma", "ratio"),
    [
        ("name:second", 3, "mean", 1.0),
        ("name:first", 4, "mean", 1.0),
        ("name:second", 3, "sum", 0.5),
        ("name:first", 2, 0.2, 2.0),
        ("name:second", 5, 0.0, 1.0),  # the base stands still
        ("all", 3, "mean", 1.0),
    ],
)
def test_scatter_is_that_of_the_joint_moments(
    select: str, members: int, gamma: str | float, ratio: float
) -> None:
    bowl = Bowl(CURVATURE)
    own, local = shared(bowl.risk, select, members, gamma, ratio)
    mask = member_mask(bowl.risk, select)
    mean, member = joint_moments(bowl, TRAINING, members, gamma, ratio, mask.numpy())
    scale = np.ones(len(mask)) if own.frame is None else own.frame[1].numpy()

    def weights(values: np.ndarray) -> np.ndarray:
        turn = scale[:, None] * local.pairs.vectors
        return np.asarray(turn @ values @ turn.T)

    agree(weights(covariance(mean_model(local), TRAINING)) / members, mean, 1e-9)
    agree(weights(covariance(local, TRAINING)), member, 1e-9)
    draw, rng = displacements(local, TRAINING), np.random.default_rng(0)
    drawn = scale * np.array([draw(rng, None) for _ in range(4000)])
    # A sample covariance has the standard error sqrt((S_ii S_jj + S_ij^2) / n).
    spread = np.sqrt((np.outer(np.diag(member), np.diag(member)) + member**2) / 4000)
    assert (np.abs(drawn.T @ drawn / 4000 - member) <= 5.0 * spread + 1e-15).all()


def test_a_shared_base_scatters_less_than_independent_runs() -> None:
    bowl = Bowl(CURVATURE)
    _, local = shared(bowl.risk, "name:first", 8, "mean", 1.0)
    single = covariance(mean_model(local), TRAINING)
    assert np.trace(covariance(local, TRAINING)) < 0.5 * np.trace(single)
    assert np.linalg.eigvalsh(covariance(local, TRAINING) - single / 8).min() > -1e-12


@pytest.mark.parametrize(
    ("select", "gamma", "ratio", "momentum", "eigenpairs"),
    [
        ("name:second", "mean", 1.0, 0.0, 0),
        ("name:second", "sum", 0.5, 0.0, 0),
        ("name:first", "sum", 2.0, 0.5, 0),
        ("name:second", "sum", 0.5, 0.0, 2),
    ],
)
def test_late_phase_itself_does_what_is_predicted(
    select: str, gamma: str, ratio: float, momentum: float, eigenpairs: int
) -> None:
    # With momentum, descent is predicted at the effective rate only.
    bowl = Bowl(CURVATURE, away=0.0 if momentum else 0.4)
    bowl.risk.weight_decay = 0.05
    plan = Plan((2, 3), 12, 2, late_phase=select, gamma=gamma, member_lr_ratio=ratio)
    config = replace(CONFIG, momentum=momentum, eigenpairs=eigenpairs)
    measured = measure(bowl.risk, config, plan=plan)
    test = bowl.risk.on(bowl.risk.batches)
    table = compare(measured, plan, test=test).table
    assert list(table["members"]) == [2, 2, 2, 3, 3, 3]
    assert list(table["weights"]) == 2 * ["iterate", "swa", "ema"]
    assert (table["plain_error"] > 0.01 * table["predicted_rise"]).all()
    if eigenpairs == 0:  # less the control variate every run of a quadratic does what is expected
        agree(table["measured"], table["predicted"], 1e-9)
        if momentum == 0.0:
            agree(table["noise_free"], table["descent"], 1e-9)
    else:  # beyond the eigenpairs the noise is known from six random draws
        agree(table["measured_rise"], table["predicted_rise"], 0.02)
    assert table["predicted_gain"].isna().all(), "members are no runs by themselves"
    # A test loss that is a function of the weights is given the weights, not the coordinates.
    called = predict(measured, plan, test=lambda w: test.loss(w)).table
    agree(called["predicted_test_loss"], table["predicted_test_loss"], 1e-9)


def test_the_force_is_that_of_the_members_scatter() -> None:
    """1/2 T:S of the smooth loss, with S that of a member: for K = 8 far below that of a run."""
    bowl = Bowl(CURVATURE, cubic=0.02)
    plan = Plan((8,), 8, late_phase="name:first")
    config = replace(CONFIG, displacements=400, steps=40)
    (gaussian,) = measure(bowl.risk, config, plan=plan).gaussians
    mask = member_mask(bowl.risk, "name:first").numpy()
    _, member = joint_moments(bowl, gaussian.training, 8, "mean", 1.0, mask)
    force = np.mean(gaussian.drift.force_top, axis=0)
    expected = 0.5 * np.einsum("ijk,jk", bowl.third, member)
    found = gaussian.drift.local.pairs.vectors @ force
    # 400 draws: a sample covariance is within some 5 to 10 %; a single run's force is twice this.
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)


def test_rescaled_coordinates_obey_the_chain_rule() -> None:
    risk = tanh_risk(quick=False)
    rng = torch.Generator().manual_seed(1)
    scale = torch.rand(risk.size, generator=rng, dtype=torch.double) + 0.5
    scale[3] = 0.0
    moved = risk.rescaled(scale)
    u = torch.randn(risk.size, generator=rng, dtype=torch.double)
    at = risk.weights + scale * u
    agree(moved.loss(u), risk.loss(at), 1e-12)
    agree(moved.gradient(u), scale * risk.gradient(at), 1e-10)
    here, there = moved.at(u), risk.at(at)
    agree(here.hessian(), scale[:, None] * there.hessian() * scale, 1e-9)
    agree(here.ggn(), scale[:, None] * there.ggn() * scale, 1e-9)
    agree(here.hessian_product(u), here.hessian() @ u, 1e-9)
    agree(here.ggn_product(u), here.ggn() @ u, 1e-9)
    gradients = torch.cat(list(there.example_gradients()))
    agree(torch.cat(list(here.example_gradients())), gradients * scale, 1e-10)
    # Rescaling twice multiplies the scales, around the weights of the second time.
    again = here.rescaled(scale)
    agree(again.loss(0.1 * u), risk.loss(at + 0.1 * scale**2 * u), 1e-12)
    agree(again.model_weights(again.coordinates(at + scale)), at + scale, 1e-12)


def factored() -> EmpiricalRisk:
    """A small net with rank-1 factors on both layers, 40 examples, weight decay."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    add_rank1(model)
    x = torch.randn(40, 3).double()
    y = (x + 0.7 * torch.randn(40, 3).double()).argmax(1)
    return EmpiricalRisk(model, [(x, y)], weight_decay=0.01)


def test_rank_one_members_are_averaged_in_their_factors() -> None:
    """Against members stepped by hand: ((x * r) W') * s + b, W and b shared, s and r their own."""
    risk, training, members = factored(), Training(0.3, 8, 5), 3
    (x, y), *_ = risk.batches
    plain = dict(risk.model.named_parameters())
    names = {id(p): n for n, p in plain.items()}
    factors = {
        n
        for m in risk.model.modules()
        if isinstance(m, RankOne)
        for p in m.parameters()
        for n in [names[id(p)]]
    }
    base = {n: p.detach().clone() for n, p in plain.items() if n not in factors}
    own = [{n: plain[n].detach().clone() for n in factors} for _ in range(members)]
    draws = [minibatches(40, training, (7, k)) for k in range(members)]

    def output(w: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        for layer in ("0", "2"):
            chain = f"{layer}.parametrizations.weight"
            s, r = w[f"{chain}.0.s"], w[f"{chain}.0.r"]
            inputs = ((inputs * r) @ w[f"{chain}.original"].T) * s + w[f"{layer}.bias"]
            inputs = torch.tanh(inputs) if layer == "0" else inputs
        return inputs

    for _ in range(training.steps):
        slopes = []
        for k, draw in enumerate(draws):
            w = {n: v.clone().requires_grad_() for n, v in (base | own[k]).items()}
            index = next(draw)
            decay = 0.005 * sum(v.square().sum() for v in w.values())
            (nn.functional.cross_entropy(output(w, x[index]), y[index]) + decay).backward()
            slopes.append({n: v.grad for n, v in w.items()})
        base = {n: v - 0.3 * sum(g[n] for g in slopes) / members for n, v in base.items()}
        own = [{n: v - 0.3 * g[n] for n, v in w.items()} for w, g in zip(own, slopes, strict=True)]
    mean = base | {n: sum(w[n] for w in own) / members for n in factors}
    expected = torch.cat([mean[n].flatten() for n in risk.shapes])
    ((_, found),) = train_late_phase(risk, training, members, "rank1", [5], seed=7)
    agree(found, expected, 1e-12)
    decay = 0.005 * float(expected.square().sum())
    loss = float(nn.functional.cross_entropy(output(mean, x), y)) + decay
    agree(risk.loss(found), loss, 1e-12)


def test_rank_one_members_do_what_is_predicted() -> None:
    risk = minimise(factored(), 40)
    plan = Plan((2, 4), 32, 2, late_phase="rank1")
    config = BridgeConfig(
        eigenpairs=0,
        displacements=12,
        averaging_displacements=1,
        lr_times_sharpness=(0.2,),
        batch_sizes=(8,),
        steps=40,
    )
    table = compare(measure(risk, config, plan=plan), plan).table
    off = (table["ratio"] - 1.0).abs()
    # Three standard errors of the measurement, and a twentieth for what is beyond leading order.
    assert (off < 3.0 * table["ratio_error"] + 0.05).all()
    assert (table["ratio_error"][table["weights"] == "iterate"] < 0.05).all()


def test_members_beyond_the_selected_weights_stay_as_they_are() -> None:
    """The loss is a function of the head, and the biases of other layers are replicated too."""
    whole = factored()
    risk = EmpiricalRisk(whole.model, whole.batches, "name:2.bias", weight_decay=0.01)
    assert member_mask(risk, "name:*bias").tolist() == [True] * 3
    training = Training(0.3, 8, 5)
    ((_, own),) = train_late_phase(risk, training, 2, "name:2.bias", [5])
    ((_, more),) = train_late_phase(risk, training, 2, "name:*bias", [5])
    assert not torch.equal(own, risk.weights)
    assert torch.equal(own, more)


def test_members_whose_average_is_no_mean_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    nn.utils.parametrizations.spectral_norm(model[0])
    x, y = torch.randn(8, 2).double(), torch.arange(8) % 2
    plan = Plan((2,), 4, late_phase="name:0.*")
    with pytest.raises(NQMError, match=r"computes '0\.parametrizations.* anew from the mean"):
        measure(EmpiricalRisk(model, [(x, y)]), CONFIG, plan=plan)
    with pytest.raises(NQMError, match="'bias' replicates none of the weights that the loss"):
        member_mask(EmpiricalRisk(model, [(x, y)], "name:2.weight"), "bias")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NQMError, match="late-phase members; set late_phase"):
        Plan(gamma="sum")
    for wrong in (0.0, 1e300):
        with pytest.raises(NQMError, match="member_lr_ratio"):
            Plan((2,), late_phase="all", member_lr_ratio=wrong)
    with pytest.raises(NQMError, match="gamma must"):
        Plan((2,), late_phase="all", gamma=1e300)
    bowl = Bowl(CURVATURE)
    measured = measure(bowl.risk, CONFIG)
    with pytest.raises(NQMError, match="give `measure` the same plan"):
        predict(measured, Plan((2,), late_phase="all"))
    late = Plan((2,), 4, late_phase="name:first")
    with pytest.raises(NQMError, match="give `measure` the same plan"):
        predict(measure(bowl.risk, CONFIG, plan=late), Plan((1, 2)))
