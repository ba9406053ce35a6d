"""Training from a checkpoint, against `torch.optim.SGD` and literal loops."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from neural.bridge import sgd_chains as chains
from neural.bridge.config import SAMPLING, Training
from neural.bridge.sgd_chains import (
    group_losses,
    minibatches,
    noise_free,
    runs_together,
    train_late_phase,
    train_runs,
)
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, quadratic, slide, tanh_risk
from tests.tolerances import IDENTITY, JUMP, agree


def data(risk: EmpiricalRisk) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*risk.batches, strict=True))
    return x, y


def named(risk: EmpiricalRisk, w: Tensor) -> dict[str, Tensor]:
    parts = w.split([shape.numel() for shape in risk.shapes.values()])
    shapes = risk.shapes.items()
    return {name: p.view(shape) for (name, shape), p in zip(shapes, parts, strict=True)}


def slope(risk: EmpiricalRisk, w: Tensor, index: Tensor) -> Tensor:
    """Of cross-entropy and weight decay on a minibatch, by plain autograd."""
    x, y = data(risk)
    w = w.clone().requires_grad_()
    output = functional_call(risk.model, named(risk, w), (x[index],))
    loss = nn.functional.cross_entropy(output, y[index])
    loss = loss + 0.5 * risk.weight_decay * w.square().sum()
    return torch.autograd.grad(loss, w)[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_run_is_torchs_sgd(momentum: float, sampling: str) -> None:
    risk = tanh_risk()
    training = Training(0.1, 8, 12, momentum, sampling)
    found = dict(train_runs(risk, training, 3, (5, 12), seed=4))
    assert list(found) == [5, 12]
    for run in range(3):
        w = nn.Parameter(risk.weights.clone())
        optimizer = torch.optim.SGD([w], 0.1, momentum)
        for step, index in enumerate(islice(minibatches(40, training, (4, run)), 12), 1):
            w.grad = slope(risk, w.detach(), index)
            optimizer.step()
            if step in found:
                agree(found[step][run], w.detach(), 1e-11)


def test_one_by_one_as_together(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = tanh_risk()
    training = Training(0.1, 8, 10, 0.5)
    together = dict(train_runs(risk, training, 6, (10,)))[10]
    for number in (0, 4 * risk.size):  # alone; four together, then two
        monkeypatch.setattr(chains, "STACKED", number)
        agree(together, dict(train_runs(risk, training, 6, (10,)))[10], IDENTITY)


def test_runs_together_by_weights_and_convolutions() -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 100))
    assert runs_together(EmpiricalRisk(wide, [(x, y)]), 4, 32) == 32
    convolutions = nn.Sequential(nn.Conv2d(1, 100, 3), nn.Flatten(), nn.Linear(3600, 2))
    assert runs_together(EmpiricalRisk(convolutions, [(x, y)], "head"), 4, 32) == 1
    assert runs_together(EmpiricalRisk(convolutions[:1], [(x, y)]), 4, 32) == 32
    large = nn.Sequential(nn.Flatten(), nn.Linear(64, 10_000))
    few = chains.STACKED // 650_000
    assert runs_together(EmpiricalRisk(large, [(x, y)]), 4, 32) == few
    assert runs_together(EmpiricalRisk(large, [(x, y)]), 4, 2) == 2


def test_diverged_runs_take_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on as if alone, and nothing is computed for those that diverged."""
    bowl = Bowl([2.0, 0.5], away=0.3, cubic=4.0)
    training, runs = Training(0.6, 4, 60), 8
    together = dict(train_runs(bowl.risk, training, runs, (60,)))[60]
    monkeypatch.setattr(chains, "STACKED", 0)
    calls: list[int] = []
    steps = torch.zeros(runs, dtype=torch.long)
    hook = bowl.risk.model.register_forward_hook(lambda *_: calls.append(1))

    def count(_: int, weights: Tensor) -> None:
        nonlocal steps
        steps += weights.isfinite().all(1)

    alone = dict(train_runs(bowl.risk, training, runs, (60,), seen=count))[60]
    hook.remove()
    alive = alone.isfinite().all(1)
    assert 0 < int(alive.sum()) < runs
    assert torch.equal(together.isfinite().all(1), alive)
    agree(together[alive], alone[alive], JUMP)
    assert len(calls) <= int(steps.sum()) + runs + 20  # `check` and one last step of each


def test_runs_are_their_seeds() -> None:
    risk, training = tanh_risk(), Training(0.1, 8, 4)

    def run(count: int, seed: int) -> Tensor:
        return next(iter(train_runs(risk, training, count, (4,), seed=seed)))[1]

    assert torch.equal(run(4, 1), run(4, 1))
    # More runs do not change the first; no two are the same.
    agree(run(2, 1), run(4, 1)[:2], IDENTITY)
    assert len(torch.cat([run(4, 1), run(4, 2)]).unique(dim=0)) == 8
    before = risk.weights.clone()
    run(2, 0)
    assert torch.equal(risk.weights, before)


def test_the_model_trains_in_evaluation_mode_and_is_left_as_it_was() -> None:
    risk = tanh_risk()
    risk.model.append_dropout = nn.Dropout(0.9)  # type: ignore[assignment]
    risk.model.train()
    modes = []
    risk.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    for _ in train_runs(risk, Training(0.1, 8, 2), 2, (2,)):
        pass
    assert modes
    assert not any(modes)
    assert risk.model.training


def test_progress_counts_minibatches() -> None:
    told: list[int] = []
    risk, training = tanh_risk(), Training(0.1, 8, 4)
    list(train_runs(risk, training, 3, (2, 4), progress=told.append))
    assert sum(told) == 3 * 4
    told.clear()
    list(train_late_phase(risk, training, 2, "head", (2, 4), progress=told.append))
    assert sum(told) == 2 * 4


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_all_examples_at_once_are_noise_free(momentum: float) -> None:
    risk = tanh_risk()
    training = Training(0.2, 40, 9, momentum, "shuffled")
    at = (1, 4, 9)
    calm = noise_free(risk, training, at)
    found = [risk.loss(w[0]) for _, w in train_runs(risk, training, 1, at)]
    agree(found, calm, 1e-11)


def test_the_noise_free_path_of_a_quadratic_is_known() -> None:
    bowl = Bowl([2.0, 0.5, 0.1], away=1.0)
    risk, at = bowl.risk, (1, 3, 20)
    g = risk.gradient().numpy()
    start = risk.loss()
    expected = [start + quadratic(g, bowl.hessian, slide(g, bowl.hessian, 0.3, t)) for t in at]
    agree(noise_free(risk, Training(0.3, 1, 20), at), expected, 1e-11)
    # Two steps of heavy ball, written out.
    first = -0.3 * g
    second = first - 0.3 * (0.5 * g + g + bowl.hessian @ first)
    found = noise_free(risk, Training(0.3, 1, 2, 0.5), (2,))
    agree(found, [start + quadratic(g, bowl.hessian, second)], 1e-11)


def test_shuffled_epochs_hold_every_example_once() -> None:
    training = Training(0.1, 6, 1, sampling="shuffled")
    batches = minibatches(24, training, (0, 0))
    epochs = [torch.cat(list(islice(batches, 4))) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(24))
    assert not torch.equal(epochs[0], epochs[1])


def test_draws_with_replacement_are_uniform() -> None:
    batches = minibatches(10, Training(0.1, 50, 1), (0, 3))
    counts = torch.bincount(torch.cat(list(islice(batches, 200))), minlength=10).numpy()
    # Chi-squared with 9 degrees of freedom: mean 9, variance 18.
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 9.0 + 4.5 * np.sqrt(18.0)
    assert len(next(batches).unique()) <= 10


@pytest.mark.parametrize("size", [7, 40])
def test_an_epoch_must_be_whole_minibatches(size: int) -> None:
    training = Training(0.1, size, 3, sampling="shuffled")
    with pytest.raises(NQMError, match="that divides the 40 examples, in two minibatches or more"):
        list(train_runs(tanh_risk(), training, 2, (3,)))


def test_divergence_is_an_infinite_loss() -> None:
    risk, training = Bowl([2.0, 0.5]).risk, Training(100.0, 4, 200)
    for found in (
        [w for _, w in train_runs(risk, training, 2, (2, 200))],
        [w[None] for _, w in train_late_phase(risk, training, 2, "all", (2, 200))],
    ):
        losses = group_losses(risk.loss, found, 1)
        assert np.isfinite(losses[:, 0]).all()
        assert np.isposinf(losses[:, 1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1; got 2.5"),
        ({"lr": 0.0}, r"lr must lie in \(0, inf\); got 0.0"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\); got 1.5"),
        ({"sampling": "shufled"}, "did you mean 'shuffled'"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(NQMError, match=message):
        Training(**({"lr": 0.1, "batch_size": 4, "steps": 3} | changes))  # type: ignore[arg-type]


def test_losses_of_groups() -> None:
    rng = np.random.default_rng(0)
    snapshots = [torch.from_numpy(rng.standard_normal((7, 3))) for _ in range(2)]
    found = group_losses(lambda w: float(w.square().sum()), snapshots, 3)
    expected = [
        [float((s[a : a + 3].sum(0) / 3.0).square().sum()) for s in snapshots] for a in (0, 3)
    ]
    agree(found, expected, IDENTITY)
    assert group_losses(lambda w: float(w[0]), snapshots, 1).shape == (7, 2)
    for bad in (np.inf, np.nan):
        assert np.isposinf(group_losses(lambda w, bad=bad: bad, snapshots, 3)).all()


# --- late-phase members --------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("select", ["all", "head"])
def test_members_are_trained_literally(select: str, momentum: float) -> None:
    risk = tanh_risk()
    training, members = Training(0.1, 8, 6, momentum), 3
    found = dict(train_late_phase(risk, training, members, select, (2, 6), seed=5))
    names = list(risk.shapes)
    replicated = torch.cat(
        [
            torch.full((shape.numel(),), select == "all" or name.startswith(_head(risk)))
            for name, shape in risk.shapes.items()
        ]
    )
    assert names
    assert bool(replicated.any())
    assert bool(replicated.all()) == (select == "all")
    w = risk.weights.repeat(members, 1)
    v = torch.zeros_like(w)
    draws = [minibatches(40, training, (5, k)) for k in range(members)]
    for step in range(1, 7):
        g = torch.stack([slope(risk, w[k], next(draws[k])) for k in range(members)])
        # The base takes the mean of the members' slopes, a member its own.
        g = torch.where(replicated, g, g.mean(0))
        v = momentum * v + g
        w = w - training.lr * v
        if step in found:
            agree(found[step], w.mean(0), JUMP)


def _head(risk: EmpiricalRisk) -> str:
    return [n for n, m in risk.model.named_modules() if isinstance(m, nn.Linear)][-1] + "."


def test_members_start_where_the_landscape_is() -> None:
    risk = tanh_risk()
    moved = risk.at(risk.weights + 0.5)
    kept = moved.weights.clone()
    training = Training(0.1, 8, 1)
    _, found = next(iter(train_late_phase(moved, training, 2, "all", (1,))))
    draws = [minibatches(40, training, (0, k)) for k in range(2)]
    g = torch.stack([slope(risk, kept, next(draw)) for draw in draws]).mean(0)
    agree(found, kept - 0.1 * g, 1e-11)
    assert torch.equal(moved.weights, kept)


def test_only_some_weights_decay() -> None:
    """Without slopes from the data, a decayed weight is multiplied by 1 - lr decay every step."""
    whole = tanh_risk()
    flat = EmpiricalRisk(
        whole.model,
        whole.batches,
        loss=lambda output, _: 0.0 * output.sum(1),
        weight_decay=0.5,
        no_decay="bias",
    )
    kept = [
        flat.weights.new_full((shape.numel(),), 1.0 if name.endswith("bias") else 0.95**3)
        for name, shape in flat.shapes.items()
    ]
    expected, training = flat.weights * torch.cat(kept), Training(0.1, 8, 3)
    _, members = next(iter(train_late_phase(flat, training, 2, "head", (3,))))
    _, runs = next(iter(train_runs(flat, training, 2, (3,))))
    agree(members, expected, JUMP)
    agree(runs, expected.repeat(2, 1), JUMP)


def test_only_the_landscapes_weights_move() -> None:
    whole = tanh_risk()
    head = EmpiricalRisk(whole.model, whole.batches, "head")
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    _, w = next(iter(train_late_phase(head, Training(0.1, 8, 3), 2, "head", (3,))))
    assert len(w) == head.size
    assert not torch.equal(w, head.weights)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@pytest.mark.parametrize("together", [0, 5000])
def test_training_a_part_keeps_no_graph(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "STACKED", together)
    whole = tanh_risk()
    part = EmpiricalRisk(whole.model, whole.batches, "head")
    assert part.size < whole.size
    seen: list[Tensor] = []
    found = train_runs(part, Training(0.1, 4, 2), 5, [2], seen=lambda _, w: seen.append(w))
    assert [step for step, _ in found] == [2]
    assert [w.requires_grad for w in seen] == [False, False]
