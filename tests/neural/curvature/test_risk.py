"""Curvature and gradient noise of networks, against dense derivatives and closed forms."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.utils._python_dispatch import TorchDispatchMode

from neural.curvature import gradient_noise
from neural.curvature.cache import fingerprint
from neural.curvature.example_losses import cross_entropy
from neural.curvature.examples import EachRow
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Density, binned, density, leading_pairs
from neural.models import build
from nqm.errors import NQMError
from nqm.runs.interrupts import Interrupted, interruptible
from tests.tiny_risks import tanh_risk
from tests.tolerances import IDENTITY, SIGMAS, agree

DECAY = 0.01


def tanh_net() -> nn.Module:
    return build("mlp", classes=3, channels=1, size=4, hidden=[6], activation="tanh").double()


def batchnorm_net() -> nn.Module:
    model = build("digits_cnn", classes=3, channels=1, width=2).double()
    model.train()
    for _ in range(5):
        model(torch.randn(20, 1, 8, 8, dtype=torch.double))
    return model


@pytest.fixture(params=["tanh, all", "batchnorm, late-phase coordinates"])
def risk(request: pytest.FixtureRequest) -> EmpiricalRisk:
    torch.manual_seed(0)
    whole = request.param.startswith("tanh")
    model, side = (tanh_net(), 4) if whole else (batchnorm_net(), 8)
    x = torch.randn(30, 1, side, side, dtype=torch.double)
    y = torch.randint(3, (30,))
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    select = "all" if whole else "batchnorm+head"
    return EmpiricalRisk(model, batches, select, weight_decay=DECAY)


def whole_loss(risk: EmpiricalRisk, w: torch.Tensor) -> torch.Tensor:
    """The mean loss written out, all data in one batch."""
    x = torch.cat([x for x, _ in risk.batches])
    y = torch.cat([y for _, y in risk.batches])
    named, place = {}, 0
    for name, shape in risk.shapes.items():
        named[name] = w[place : place + shape.numel()].view(shape)
        place += shape.numel()
    risk.model.eval()
    output = functional_call(risk.model, named, (x,))
    return nn.functional.cross_entropy(output, y) + 0.5 * DECAY * w.square().sum()


def test_loss_slope_and_curvature_are_those_of_the_whole(risk: EmpiricalRisk) -> None:
    w = risk.weights
    assert risk.loss() == pytest.approx(float(whole_loss(risk, w).detach()), rel=IDENTITY)
    slope = torch.func.grad(lambda w: whole_loss(risk, w))(w).detach()
    agree(risk.gradient(), slope, IDENTITY)
    assert risk.loss_and_gradient()[0] == pytest.approx(risk.loss(), rel=IDENTITY)
    dense = hessian(lambda w: whole_loss(risk, w))(w).detach()
    agree(risk.hessian(), dense, 1e-11)
    v = torch.randn_like(w)
    agree(risk.hessian_product(v), dense @ v, 1e-11)
    elsewhere = w + 0.1 * torch.ones_like(w)
    agree(risk.loss(elsewhere), float(whole_loss(risk, elsewhere).detach()), IDENTITY)


def test_third_derivatives_are_the_change_of_the_curvature(risk: EmpiricalRisk) -> None:
    v, u = (torch.randn_like(risk.weights) for _ in range(2))
    step = 1e-6  # a ReLU's kinks lie further away
    bent = []
    for sign in (1.0, -1.0):
        w = risk.weights + sign * step * u
        h = hessian(lambda w: whole_loss(risk, w))(w)
        bent.append((v @ h @ v).detach())
    assert float(risk.third(v) @ u) == pytest.approx(
        float(bent[0] - bent[1]) / (2 * step), rel=1e-5
    )


def test_curvature_of_the_first_batches_alone() -> None:
    whole = tanh_risk(quick=False)
    few = whole.with_curvature_of(1)
    first = EmpiricalRisk(whole.model, whole.batches[:1], weight_decay=whole.weight_decay)
    v = torch.linspace(-1.0, 1.0, whole.size, dtype=torch.double)
    moved = whole.weights + 0.1
    torch.testing.assert_close(few.curvature_product(v), first.hessian() @ v)
    torch.testing.assert_close(few.at(moved).curvature_product(v), first.at(moved).hessian() @ v)
    torch.testing.assert_close(few.gradient(), whole.gradient(), rtol=0.0, atol=0.0)
    assert few.examples == whole.examples
    test = few.on(whole.batches)  # on other data it is all of those
    torch.testing.assert_close(test.curvature_product(v) + 0.01 * v, whole.hessian() @ v)
    assert fingerprint(few) != fingerprint(whole)
    assert fingerprint(whole.with_curvature_of(2)) == fingerprint(whole)
    with pytest.raises(NQMError, match="batches must be an integer >= 1; got 0"):
        whole.with_curvature_of(0)


def test_all_examples_in_one_batch_are_the_same_loss() -> None:
    whole = tanh_risk(quick=False)
    one = whole.with_curvature_of(1).in_one_batch()
    assert [len(y) for _, y in one.batches] == [40]
    assert one.loss() == pytest.approx(whole.loss(), rel=1e-12)
    torch.testing.assert_close(one.gradient(), whole.gradient())
    v = torch.linspace(-1.0, 1.0, whole.size, dtype=torch.double)
    few = whole.with_curvature_of(1).curvature_product(v)
    torch.testing.assert_close(one.curvature_product(v), few)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_products_together_are_those_one_by_one(curvature: str) -> None:
    risk = tanh_risk(quick=False)
    risk.curvature = curvature
    rows = torch.randn(5, risk.size, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    done: list[int] = []
    torch.testing.assert_close(
        risk.curvature_products(rows, done.append), rows @ risk.curvature_matrix().to(rows)
    )
    assert sum(done) == 5
    torch.testing.assert_close(
        risk.curvature_products(rows[:1]), rows[:1] @ risk.curvature_matrix().to(rows)
    )


def test_products_are_right_where_torch_is_wrong_in_batches(monkeypatch: Any) -> None:
    risk = tanh_risk()
    risk.check()
    together = EachRow.__call__

    def wrong(each: EachRow, *args: Tensor) -> Any:
        return together(each, *args) * (2.0 if each.together else 1.0)

    monkeypatch.setattr(EachRow, "__call__", wrong)
    rows = torch.eye(risk.size, dtype=torch.double)[:4]
    each = torch.stack([risk.hessian_product(v) for v in rows])
    torch.testing.assert_close(risk.curvature_products(rows), each)
    found = risk.example_products(rows[0].expand_as)
    torch.testing.assert_close(found, each[0] - risk.weight_decay * rows[0])


def test_products_of_examples_are_those_of_each_alone() -> None:
    risk = tanh_risk()
    inputs, targets = (torch.cat(parts) for parts in zip(*risk.batches, strict=True))
    expected = torch.zeros_like(risk.weights)
    for n, gradient in enumerate(torch.cat(list(risk.example_gradients()))):
        alone = EmpiricalRisk(risk.model, [(inputs[n : n + 1], targets[n : n + 1])])
        expected += alone.hessian_product(gradient.square()) / risk.examples
    torch.testing.assert_close(risk.example_products(torch.square), expected)


def test_the_model_is_left_as_it_is(risk: EmpiricalRisk) -> None:
    risk.model.train()
    before = {name: value.clone() for name, value in risk.model.state_dict().items()}
    risk.hessian_product(torch.ones_like(risk.weights))
    list(risk.example_gradients())
    assert risk.model.training
    for name, value in risk.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in risk.model.parameters())


def test_noise_is_the_covariance_of_the_examples_gradients(risk: EmpiricalRisk) -> None:
    gradients = torch.cat(list(risk.example_gradients()))
    mean = gradients.mean(0) + DECAY * risk.weights
    agree(mean, risk.gradient(), IDENTITY)
    c = np.cov(gradients.numpy(), rowvar=False, ddof=0)
    agree(gradient_noise.covariance(risk), c, IDENTITY)
    assert gradient_noise.trace(risk) == pytest.approx(np.trace(c), rel=1e-11)
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((risk.size, 4)))[0]
    agree(gradient_noise.covariance(risk, vectors), vectors.T @ c @ vectors, 1e-11)


def test_weighted_slopes_are_draws_of_the_noise(risk: EmpiricalRisk) -> None:
    gradients = torch.cat(list(risk.example_gradients()))
    some = torch.randn(30, dtype=torch.double)
    agree(risk.weighted_gradient(some), some @ gradients, 1e-11)
    # Orthonormal weights of mean 0: the covariance that random ones of variance 1 / (N - 1) have.
    frame = np.linalg.qr(np.column_stack([np.ones(30), np.eye(30)[:, 1:]]))[0][:, 1:] / np.sqrt(29)
    slopes = [risk.weighted_gradient(torch.from_numpy(w.copy())).numpy() for w in frame.T]
    together = sum(np.outer(s, s) for s in slopes)
    agree(together, np.cov(gradients.numpy(), rowvar=False), 1e-10)


def test_derivatives_are_taken_elsewhere(risk: EmpiricalRisk) -> None:
    before = risk.weights.clone()
    w = before + 0.1 * torch.randn_like(before)
    moved = risk.at(w)
    assert moved.loss() == pytest.approx(float(whole_loss(risk, w).detach()), rel=IDENTITY)
    dense = hessian(lambda w: whole_loss(risk, w))(w).detach()
    agree(moved.hessian(), dense, 1e-11)
    agree(moved.third(before), torch.func.grad(
        lambda w: before @ hessian(lambda w: whole_loss(risk, w))(w) @ before
    )(w).detach(), 1e-9)  # fmt: skip
    slopes = torch.cat(list(moved.example_gradients()))
    agree(slopes.mean(0) + DECAY * w, moved.gradient(), IDENTITY)
    assert torch.equal(risk.weights, before)


def test_the_mean_loss_of_a_minibatch(risk: EmpiricalRisk) -> None:
    (x, y), w = risk.batches[0], risk.weights
    with risk.evaluating():
        small = risk.mean_loss(w, (x, y))
    alone = EmpiricalRisk(risk.model, [(x, y)], list(_names(risk)))
    assert float(small.detach()) == pytest.approx(alone.loss(), rel=IDENTITY)
    assert alone.weight_decay == 0.0


def _names(risk: EmpiricalRisk) -> list[str]:
    return [f"name:{name}" for name in risk.shapes]


def test_evaluation_mode_ends_as_it_began(risk: EmpiricalRisk) -> None:
    model = risk.model.train()
    first = next(iter(model.children()))
    first.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    inside = []

    def fail() -> None:
        inside.extend(module.training for module in model.modules())
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), risk.evaluating():
        fail()
    assert inside
    assert not any(inside)
    assert [module.training for module in model.modules()] == modes


def test_the_largest_eigenpairs(risk: EmpiricalRisk) -> None:
    values = np.linalg.eigvalsh(risk.hessian().numpy())
    found = leading_pairs(risk, 4)
    room = 1e-9 * np.abs(values).max()
    assert (np.abs(found.values - values[::-1][:4]) < found.residuals + room).all()
    assert (found.residuals < 0.01 * np.abs(values).max()).all()
    agree(found.vectors.T @ found.vectors, np.eye(4), 1e-8)


def test_the_density_has_the_moments_of_the_rest(risk: EmpiricalRisk) -> None:
    h = risk.hessian()
    values = np.linalg.eigvalsh(h.numpy())
    known = leading_pairs(risk, 3)
    rest = values[:-3]
    # Products with H have a test of their own; those with the matrix are quick.
    risk.hessian_product = lambda v: h @ v  # type: ignore[method-assign]
    each = []
    for seed in range(25):
        one = density(risk, known, probes=1, steps=3, seed=seed)
        assert one.counts.sum() == pytest.approx(len(rest), rel=1e-9)
        each.append([one.counts @ one.values, one.counts @ one.values**2])
    error = np.std(each, axis=0, ddof=1) / np.sqrt(len(each))
    gap = np.mean(each, axis=0) - [rest.sum(), (rest**2).sum()]
    assert (np.abs(gap) < SIGMAS * error).all()
    whole = density(risk, known, probes=1, steps=40)
    assert whole.values.max() <= rest.max() + 1e-6
    assert whole.values.min() >= rest.min() - 1e-6


def test_binning_keeps_count_and_trace() -> None:
    rng = np.random.default_rng(1)
    spectrum = Density(np.sort(rng.standard_normal(200)), rng.random(200))
    for bins in (1, 7, 1000):
        few = binned(spectrum, bins)
        assert len(few.values) <= bins
        assert few.counts.sum() == pytest.approx(spectrum.counts.sum(), rel=IDENTITY)
        assert few.trace == pytest.approx(spectrum.trace, rel=1e-9, abs=1e-9)


def test_power_laws() -> None:
    h = np.geomspace(1e-3, 10.0, 20)
    law = gradient_noise.fit_power_law(h, 3.0 * h**1.5)
    assert (law.scale, law.exponent) == pytest.approx((3.0, 1.5), rel=1e-10)
    flat = np.where(h < 0.02 * 10.0, 1e-20, 3.0 * h**1.5)  # weight decay alone
    assert gradient_noise.noise_exponent(h, flat) == pytest.approx(1.5, rel=1e-10)
    assert np.isnan(gradient_noise.noise_exponent(h[:1], flat[:1]))
    with pytest.raises(NQMError, match="two stiff directions"):
        gradient_noise.fit_power_law(np.array([1.0, -1.0]), np.array([1.0, 1.0]))


def test_the_noise_scale_is_unbiased() -> None:
    rng = np.random.default_rng(2)
    g, c = np.array([0.5, -0.2, 0.1]), np.array([2.0, 1.0, 0.5])
    sizes, count = (4.0, 32.0), 4000

    def squares(size: float) -> np.ndarray:
        draws = g + rng.standard_normal((count, 3)) * np.sqrt(c / size)
        return (draws**2).sum(1)

    small, large = squares(sizes[0]), squares(sizes[1])
    scale = gradient_noise.noise_scale(small, large, sizes)
    spread = np.hypot(small.std(), large.std()) / np.sqrt(count) / (1 / 4 - 1 / 32)
    assert abs(scale.trace - c.sum()) < SIGMAS * spread
    assert scale.value == pytest.approx(c.sum() / (g @ g), rel=0.2)
    with pytest.raises(NQMError, match="sizes must be positive and increasing"):
        gradient_noise.noise_scale(small, large, (32.0, 4.0))


def test_text_losses_are_means_over_the_window() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.double)
    targets = torch.randint(7, (2, 5))
    expected = [nn.functional.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)]
    agree(cross_entropy(logits, targets), torch.stack(expected), IDENTITY)


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0])
def test_a_model_that_is_sure_of_its_labels_is_sound(scale: float) -> None:
    """The gradient, p - y times the rest, has then no digits left in single precision."""
    torch.manual_seed(0)
    model = build("mlp", classes=3, channels=1, size=4, hidden=[64, 64])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale ** (1 / 3) * 2.0)
    x = torch.randn(8, 1, 4, 4)
    EmpiricalRisk(model, [(x, model(x).argmax(1))]).check()


def test_a_landscape_needs_data() -> None:
    with pytest.raises(NQMError, match="needs data"):
        EmpiricalRisk(tanh_net(), [])


def test_slopes_of_a_saturated_network_are_no_fault() -> None:
    """Probabilities of 1 - 1e-13 have a gradient of 1e-13, right to the rounding of 1 alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        apart = (logits[:, 0] - logits[:, 1]).abs().min()
        model[2].weight *= 30.0 / apart
        model[2].bias *= 30.0 / apart
    EmpiricalRisk(model, [(x, model(x).argmax(1))]).check()


class SignalAt(TorchDispatchMode):
    """Send the process a signal at one of torch's operations, counted from 1."""

    def __init__(self, at: int, number: signal.Signals):
        super().__init__()
        self.at, self.number, self.count = at, number, 0

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(self.number)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("products", [1, 2])
def test_an_interrupt_inside_a_derivative_stays_an_interrupt(products: int) -> None:
    """TorchScript turns any exception within some derivatives into a RuntimeError of its own."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    risk = EmpiricalRisk(nn.Linear(4, 3).double(), [(x, y)])
    risk.check()
    v = torch.randn(risk.size).double()
    rows = EachRow(risk.hessian_product)  # more than one product goes through `vmap`

    def work() -> Any:
        return risk.hessian_product(v) if products == 1 else rows(torch.stack([v] * products))

    with SignalAt(0, signal.SIGTERM) as counted:
        work()
    for at in range(1, counted.count + 1, 7):
        with pytest.raises(Interrupted) as told, interruptible(), SignalAt(at, signal.SIGTERM):
            work()
        assert told.value.code == 128 + signal.SIGTERM


def test_a_ctrl_c_inside_a_derivative_stays_one() -> None:
    """Python's own handler, as in a notebook: torch states the interrupt in its message."""
    torch.manual_seed(0)
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    told = "The following operation failed in the TorchScript interpreter.\n"
    told += "RuntimeError: KeyboardInterrupt: <EMPTY MESSAGE>\n\nAt:\n  torch/_functorch/vmap.py"

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError(told)

    risk = EmpiricalRisk(nn.Linear(4, 3).double(), [(x, y)], loss=loss)
    with pytest.raises(KeyboardInterrupt):
        risk.gradient()
    rows = EachRow(lambda row: loss(row, row))
    with pytest.raises(KeyboardInterrupt):
        rows(x)
