"""Gates against SciPy's optimum, enumerated expectations and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime, minimize
from sklearn.model_selection import KFold
from torch import Tensor

from neural.combine.gate import (
    GateConfig,
    fit_gate,
    reinforce_gradient,
    reward_gradient,
)
from neural.combine.pool import POOLS
from neural.combine.weigh import WEIGHTS, ByScore
from neural.evaluate import Score, nll
from nqm import NQMError
from tests.tolerances import IDENTITY, agree, within_error

N = 400


def members(
    seed: int = 0, sharp: tuple[float, ...] = (2.0, 1.0, 0.2)
) -> tuple[list[Tensor], Tensor]:
    """Three classifiers of three classes that know the label with different certainty."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (N,), generator=g)
    hint = torch.nn.functional.one_hot(labels, 3).double()
    noise = [torch.randn(N, 3, generator=g, dtype=torch.float64) for _ in sharp]
    return [a * hint + 1.5 * e for a, e in zip(sharp, noise, strict=True)], labels


def ones(n: int = N) -> Tensor:
    return torch.ones(n, 1, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["log_score", "reward", "reinforce"])
def test_features_that_are_zero_leave_the_weights_equal(objective):
    rows, labels = members()
    config = GateConfig(objective=objective, steps=5)
    for features in (torch.zeros(N, 2), torch.zeros(N, 0)):
        gate, _ = fit_gate(rows, labels, features, config)
        assert torch.equal(gate(features), torch.full((N, 3), 1 / 3, dtype=torch.float64))
    pooled = POOLS["probabilities"](rows, gate(features))
    equal = POOLS["probabilities"](rows, torch.full((3,), 1 / 3, dtype=torch.float64))
    agree(pooled, equal, IDENTITY)


def test_a_constant_gate_finds_the_best_constant_weights():
    rows, labels = members(sharp=(1.5, 1.2, 0.9))
    gate, _ = fit_gate(rows, labels, ones(), GateConfig(strengths=(0.0,)))

    def loss(weights: np.ndarray) -> float:
        return nll(POOLS["probabilities"](rows, torch.from_numpy(weights)), labels)

    # Minimised over the simplex by another method, with no softmax and no gradient of ours.
    best = minimize(
        loss, np.full(3, 1 / 3), method="SLSQP", bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14},
    )  # fmt: skip
    found = gate(ones(1))[0]
    assert gate.strength == 0.0
    assert np.abs(found.numpy() - best.x).max() < 1e-4  # SLSQP's finite differences
    assert best.fun < loss(np.full(3, 1 / 3)) - 1e-3
    assert best.x.min() > 0.01  # an optimum inside the simplex
    assert nll(POOLS["probabilities"](rows, gate(ones())), labels) <= best.fun + 1e-10


def test_a_gate_learns_which_member_to_trust_where():
    rows, labels = members(sharp=(4.0, 0.0))
    swapped = torch.arange(N) % 2 == 0  # on the even examples the two change places
    first, second = (torch.where(swapped[:, None], *pair) for pair in (rows, rows[::-1]))
    features = torch.stack([torch.ones(N), swapped.float()], 1)
    gate, _ = fit_gate([first, second], labels, features)
    weights = gate(features)
    assert bool((weights[swapped, 0] > 0.9).all())
    assert bool((weights[~swapped, 1] > 0.9).all())
    assert math.isfinite(gate.strength)


def test_noise_as_features_is_left_alone():
    """Members that are equally good: the pull that held-out folds choose is the strongest."""
    rows, labels = members(sharp=(1.0, 1.0, 1.0))
    g = torch.Generator().manual_seed(5)
    features = torch.randn(N, 30, generator=g)
    gate, _ = fit_gate(rows, labels, features)
    assert gate.strength >= 1.0
    assert float((gate(features) - 1 / 3).abs().max()) < 0.2


def test_weights_on_the_held_out_data_come_from_gates_without_the_fold():
    """On what a gate was trained on, its weights look better than they are."""
    rows, labels = members(sharp=(1.0, 1.0, 1.0))
    g = torch.Generator().manual_seed(6)
    features = torch.randn(N, 40, generator=g)
    equal = nll(POOLS["probabilities"](rows, torch.full((3,), 1 / 3, dtype=torch.float64)), labels)
    gate, apart = fit_gate(rows, labels, features, GateConfig(strengths=(0.0,)))
    own = nll(POOLS["probabilities"](rows, gate(features)), labels)
    honest = nll(POOLS["probabilities"](rows, apart), labels)
    assert own < equal - 0.05
    assert honest > equal + 0.05
    # Labels of a fold do not enter its own weights, and do enter the others'.
    _, outside = next(iter(KFold(5, shuffle=True, random_state=0).split(features)))
    changed = labels.clone()
    changed[outside] = (labels[outside] + 1) % 3
    _, again = fit_gate(rows, changed, features, GateConfig(strengths=(0.0,)))
    assert torch.equal(again[outside], apart[outside])
    inside = np.setdiff1d(np.arange(N), outside)
    assert not torch.allclose(again[inside], apart[inside])
    chosen, equally = fit_gate(rows, labels, features)
    if math.isinf(chosen.strength):
        agree(equally.numpy(), np.full((N, 3), 1 / 3), IDENTITY)


def test_a_strong_pull_leaves_equal_weights():
    rows, labels = members()
    gate, _ = fit_gate(rows, labels, ones(), GateConfig(strengths=(1e6,)))
    assert float((gate(ones(1)) - 1 / 3).abs().max()) < 1e-5


def test_scale_and_shift_of_features_do_not_matter():
    rows, labels = members()
    g = torch.Generator().manual_seed(1)
    features = torch.cat([ones(), torch.randn(N, 2, generator=g, dtype=torch.float64)], 1)
    moved = torch.cat([ones(), 1e3 * features[:, 1:] - 7.0], 1)
    config = GateConfig(strengths=(0.01,))
    agree(fit_gate(rows, labels, features, config)[0](features).numpy(),
          fit_gate(rows, labels, moved, config)[0](moved).numpy(), 1e-6)  # fmt: skip


def rewards_and_weights() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, generator=g, dtype=torch.float64)
    return torch.randn(2, 3, generator=g, dtype=torch.float64), logits


def test_the_exact_gradient_of_the_reward_against_finite_differences():
    rewards, logits = rewards_and_weights()
    for one, start in zip(rewards, logits, strict=True):
        slope = approx_fprime(
            start.numpy(), lambda z, r=one: float(torch.from_numpy(z).softmax(-1) @ r), 1e-7
        )
        found = reward_gradient(start.softmax(-1)[None], one[None])[0]
        assert np.abs(found.numpy() - slope).max() < 1e-6


def test_reinforce_is_unbiased_and_noisier_than_the_exact_gradient():
    rewards, logits = rewards_and_weights()
    draws = 40_000
    generator = torch.Generator().manual_seed(3)
    weights = logits.softmax(-1)
    for r, w in zip(rewards, weights, strict=True):
        each = reinforce_gradient(w.expand(draws, 3), r.expand(draws, 3), generator)
        exact = reward_gradient(w[None], r[None])[0]
        error = each.std(0) / math.sqrt(draws)
        within_error(each.mean(0).numpy(), exact.numpy(), error.numpy())
        assert bool((each.std(0) > 0).all())
        # And by enumeration of the three draws, to rounding.
        gain = r - r.mean()
        enumerated = sum(w[k] * gain[k] * (torch.eye(3).double()[k] - w) for k in range(3))
        agree(enumerated.numpy(), exact.numpy(), 1e-12)


def test_the_log_score_has_the_lower_loss_and_reinforce_the_noise():
    """The reward is linear in the weights: its gate leaves the ensemble for its best member."""
    rows, labels = members(sharp=(1.5, 1.2, 0.9))
    made = {
        name: [fit_gate(rows, labels, ones(), GateConfig(name, strengths=(1e-3,), seed=seed))[0]
               for seed in range(4)]
        for name in ("log_score", "reward", "reinforce")
    }  # fmt: skip
    loss = {
        name: [nll(POOLS["probabilities"](rows, gate(ones())), labels) for gate in gates]
        for name, gates in made.items()
    }
    assert len(set(loss["log_score"])) == len(set(loss["reward"])) == 1
    assert len(set(loss["reinforce"])) == 4
    assert loss["log_score"][0] < min(loss["reward"] + loss["reinforce"])
    assert (
        float(made["reward"][0](ones(1)).max()) > 0.9 > float(made["log_score"][0](ones(1)).max())
    )


@pytest.mark.parametrize("objective", ["log_score", "reinforce"])
def test_equal_seeds_give_equal_gates(objective):
    rows, labels = members()
    config = GateConfig(objective=objective, steps=20, seed=3)
    one, two = (fit_gate(rows, labels, ones(), config)[0] for _ in range(2))
    assert torch.equal(one.coefficients, two.coefficients)


def test_weights_by_example_pool_each_example_by_its_own():
    rows, _ = members()
    g = torch.Generator().manual_seed(4)
    weights = torch.rand(N, 3, generator=g, dtype=torch.float64)
    weights[0] = torch.tensor([0.0, 1.0, 0.0])
    weights /= weights.sum(1, keepdim=True)
    rows[0][0] = torch.tensor([0.0, -math.inf, 0.0])  # of weight 0, so that it changes nothing
    for pool in POOLS.values():
        found = pool(rows, weights)
        for i in (0, 1, 17):
            alone = pool([one[i : i + 1] for one in rows], weights[i])
            agree(found[i].exp().numpy(), alone[0].exp().numpy(), 1e-12)


def test_rules_by_score_weigh_models_of_any_kind():
    scores = [Score(0.5, 0.8), Score(1.0, 0.6), Score(2.0, 0.6)]
    expected = {
        "accuracy": [0.4, 0.3, 0.3],
        "inverse_loss": [4 / 7, 2 / 7, 1 / 7],
        "best": [1.0, 0.0, 0.0],
    }
    by_score = {name: one for name, one in WEIGHTS.items() if isinstance(one, ByScore)}
    assert set(by_score) == set(expected)
    for name, one in by_score.items():
        agree(one.of_scores(scores).numpy(), expected[name], IDENTITY)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"objective": "logscore"}, "objective"),
        ({"penalty": -1.0}, "penalty must"),
        ({"strengths": ()}, "strengths must name one"),
        ({"strengths": (math.nan,)}, "strengths must"),
        ({"folds": 1}, "folds must be an integer >= 2"),
        ({"steps": 0}, "steps must be"),
        ({"lr": 0.0}, "lr must"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_named(change, says):
    with pytest.raises(NQMError, match=says):
        GateConfig(**change)


def bad_cases() -> list[tuple[object, str]]:
    rows, labels = members()
    gate, _ = fit_gate(rows, labels, ones(), GateConfig(strengths=(1.0,)))
    nan = rows[0].clone()
    nan[3, 0] = math.nan
    never = torch.full((N, 3), -math.inf)
    never.scatter_(1, (labels[:, None] + 1) % 3, 0.0)
    return [
        (lambda: fit_gate([], labels, ones()), "needs members"),
        (lambda: fit_gate([rows[0][:5]], labels, ones()), r"member 0 has predictions \(5, 3\)"),
        (lambda: fit_gate([nan], labels, ones()), "not a number"),
        (lambda: fit_gate([rows[0].softmax(1)], labels, ones()), "probabilities"),
        (lambda: fit_gate(rows, labels + 1, ones()), r"labels must be whole numbers in 0\.\.2"),
        (lambda: fit_gate(rows, labels, ones(5)), r"shape \(400, 1\); got \(5, 1\)"),
        (lambda: fit_gate(rows, labels, torch.ones(N)), "features must have shape"),
        (lambda: fit_gate(rows, labels, ones() / 0), "features must be finite"),
        (lambda: fit_gate([never], labels, ones()), "probability 0"),
        (lambda: fit_gate([r[:3] for r in rows], labels[:3], ones(3)), "each of 5 folds; got 3"),
        (lambda: gate(torch.ones(4, 2)), r"shape \(n, 1\); got \(4, 2\)"),
        (lambda: POOLS["logits"](rows, torch.full((N, 3), 0.5)), "sum to 1 over the members"),
        (lambda: POOLS["logits"](rows, torch.full((5, 3), 1 / 3)), "weights of 5 examples for 400"),
        (
            lambda: POOLS["logits"](rows, torch.tensor([[1.5, -0.5, 0.0]]).expand(N, 3)),
            "weights must be >= 0; got -0.5",
        ),
    ]


@pytest.mark.parametrize("case", range(len(bad_cases())))
def test_mistakes_are_named_in_one_line(case):
    call, says = bad_cases()[case]
    with pytest.raises(NQMError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
