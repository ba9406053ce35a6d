"""Flatness and straight lines on quadratic "networks", where everything is known."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neural.evaluate import Score, interpolate, loss_line, loss_rise
from nqm.errors import NQMError
from tests.tiny_nets import state_of
from tests.tolerances import IDENTITY, SIGMAS, agree, within_error

CURVATURE = torch.tensor([3.0, 1.0, 0.1, 0.02], dtype=torch.float64)


class Bowl(nn.Module):
    """Loss 1/2 sum h w^2, with a buffer that a careless loss function moves."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def loss(self) -> float:
        return float((0.5 * CURVATURE * self.w.detach() ** 2).sum() + self.offset)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# --- flatness --------------------------------------------------------------------------------


def test_rise_on_a_quadratic():
    model, sigma, samples = Bowl([1.0, -2.0, 0.5, 4.0]), 0.2, 2000
    state = state_of(model)
    (got,) = loss_rise(model, Bowl.loss, [sigma], samples)
    # Of 1/2 h w^2 (1 + s e)^2 the mean over +-e rises by s^2 / 2 h w^2 e^2: in expectation by
    # s^2 / 2 sum h w^2, with variance s^4 / 2 sum (h w^2)^2, as var e^2 = 2.
    power = CURVATURE * model.w.detach() ** 2
    mean = 0.5 * sigma**2 * float(power.sum())
    error = math.sqrt(float((power**2).sum()) * sigma**4 / 2 / samples)
    assert abs(got.mean - mean) < SIGMAS * error
    # The kurtosis of e^2 is 15, so the standard error is known to sqrt(14 / samples) / 2 = 4 %.
    assert got.standard_error == pytest.approx(error, rel=0.04 * SIGMAS)
    agree(got.loss, 0.5 * float(power.sum()), IDENTITY)
    assert same(model, state)


def test_each_draw_is_shared_by_all_sigmas():
    model = Bowl([1.0, 1.0, 1.0, 1.0])
    one, tenth = loss_rise(model, Bowl.loss, [1.0, 0.1], 20)
    agree(tenth.rises, 0.01 * np.array(one.rises), 1e-9)  # a difference of losses near 2
    assert np.std(one.rises) > 0
    assert loss_rise(model, Bowl.loss, [0.1], 20) == [tenth]


def test_a_slope_adds_no_noise():
    model = Bowl([1.0, -2.0, 0.5, 4.0])
    (got,) = loss_rise(model, lambda m: float(m.w.sum()), [0.3], 5)
    agree([1 + r for r in got.rises], [1] * 5, IDENTITY)


def test_overflow_is_a_result():
    (got,) = loss_rise(Bowl([1.0] * 4), lambda m: math.inf if m.w[0] > 1 else 0.0, [0.1], 3)
    assert got.mean == math.inf
    assert math.isnan(got.standard_error)


def test_no_noise_no_rise_and_seeds_differ():
    model = Bowl([1.0, 2.0, 3.0, 4.0])
    (nothing,) = loss_rise(model, Bowl.loss, [0.0], 3)
    assert nothing.rises == (0, 0, 0)
    assert nothing.standard_error == 0
    first, again, other = (loss_rise(model, Bowl.loss, [0.1], 3, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other
    assert math.isnan(loss_rise(model, Bowl.loss, [0.1], 1)[0].standard_error)


def test_only_named_parameters_get_noise():
    model = nn.Linear(2, 2)
    seen: list[tuple[bool, bool]] = []
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()

    def loss(m: nn.Linear) -> float:
        seen.append((torch.equal(m.weight, weight), torch.equal(m.bias, bias)))
        return 0.0

    loss_rise(model, loss, [0.1], 2, names=["bias"])
    assert seen == [(True, True)] + 4 * [(True, False)]


def test_statistics_stay_unless_recomputed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    state, norm = state_of(model), model[1]
    means: list[torch.Tensor] = []

    def loss(m: nn.Module) -> float:
        means.append(norm.running_mean.clone())
        return nn.functional.cross_entropy(m(x), y).item()  # train mode: moves the statistics

    loss_rise(model, loss, [0.1], 2)
    assert all(torch.equal(m, state["1.running_mean"]) for m in means), "draws leak statistics"
    assert same(model, state)
    assert norm.training
    means.clear()

    def recompute(m: nn.Module) -> None:
        norm.reset_running_stats()
        m(x)

    loss_rise(model, loss, [0.1], 2, recompute=recompute)
    assert len({tuple(m.tolist()) for m in means}) == 1 + 2 * 2
    assert same(model, state)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_weights_come_back_after_an_exception(fails_at):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state, calls = state_of(model), 0
    model[1].eval()

    def loss(m: nn.Module) -> float:
        nonlocal calls
        calls += 1
        m.train()(torch.randn(8, 3))
        if calls == fails_at:
            raise KeyError("out of memory, say")
        return 0.0

    with pytest.raises(KeyError):
        loss_rise(model, loss, [0.5], 3)
    assert same(model, state)
    assert [m.training for m in model] == [True, False]
    calls = 0
    with pytest.raises(KeyError):
        loss_line(model, state, {n: v + 1 for n, v in state.items()}, loss)
    assert same(model, state)


def test_batches_stand_for_their_cross_entropy():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    batches = [
        (torch.randn(5, 3), torch.randint(4, (5,))),
        (torch.randn(2, 3), torch.tensor([0, 3])),
    ]
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    got = loss_rise(model, batches, [0.1], 2)
    expected = loss_rise(model, lambda m: nn.functional.cross_entropy(m(x), y).item(), [0.1], 2)
    assert got[0].rises == pytest.approx(expected[0].rises, abs=1e-6)
    with pytest.raises(NQMError, match=r"use list\(batches\)"):
        loss_rise(model, iter(batches), [0.1], 2)


def test_flatness_mistakes_are_named():
    model = Bowl([1.0] * 4)
    with pytest.raises(NQMError, match="sigma"):
        loss_rise(model, Bowl.loss, [-0.1])
    with pytest.raises(NQMError, match="samples"):
        loss_rise(model, Bowl.loss, [0.1], 0)
    with pytest.raises(NQMError, match="got v"):
        loss_rise(model, Bowl.loss, [0.1], names=["v"])


# --- lines -----------------------------------------------------------------------------------


def ends(a: list[float], b: list[float]) -> tuple[dict, dict]:
    return Bowl(a).state_dict(), Bowl(b).state_dict()


def test_line_on_a_quadratic():
    model = Bowl([9.0] * 4)
    state = state_of(model)
    a, b = [1.0, -2.0, 0.5, 4.0], [-1.0, 3.0, 0.0, 2.0]
    got = loss_line(model, *ends(a, b), Bowl.loss)
    h, a, b = CURVATURE.numpy(), np.array(a), np.array(b)
    expected = [0.5 * h @ ((1 - t) * a + t * b) ** 2 for t in got.position]
    agree(got.loss, expected, IDENTITY)
    # Convex: below the chord by t (1 - t) / 2 sum h (a - b)^2, so the ends are the maximum.
    assert got.barrier == 0
    assert np.isnan(got.accuracy).all()
    assert same(model, state)


def test_barrier_between_two_minima():
    model = Bowl([0.0] * 4)
    got = loss_line(
        model,
        *ends([1.0, 0, 0, 0], [-1.0, 0, 0, 0]),
        # Minima at w = +-1, the second 0.2 higher: at t = 1/2 the loss is 1 + 0.1.
        lambda m: Score(float((m.w[0] ** 2 - 1) ** 2 + 0.1 * (1 - m.w[0])), float(m.w[0])),
        positions=(0, 0.25, 0.5, 1),
    )
    agree(got.barrier, 1.0, IDENTITY)
    agree(got.accuracy, [1, 0.5, 0, -1], IDENTITY)


@given(
    a=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    b=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_a_concave_loss_has_the_barrier_of_its_middle(a, b):
    got = loss_line(Bowl([0.0] * 4), *ends(a, b), lambda m: -m.loss())
    gap = float((CURVATURE * torch.tensor(np.subtract(a, b)) ** 2).sum())
    # Midpoint of the chord minus the value there: sum h (a - b)^2 / 8 (float64 cancellation).
    assert got.barrier == pytest.approx(gap / 8, rel=1e-9, abs=1e-9)


def test_buffers_move_along_or_stay():
    model = Bowl([0.0] * 4)
    with torch.no_grad():
        model.offset.fill_(100.0)
    start, end = ends([0.0] * 4, [0.0] * 4)
    end = {**end, "offset": end["offset"] + 8, "calls": end["calls"] + 7}
    seen: list[int] = []

    def loss(m: Bowl) -> float:
        seen.append(int(m.calls))
        return m.loss()

    moved = loss_line(model, start, end, loss, positions=(0, 0.25, 1))
    agree(moved.loss, [0, 2, 8], IDENTITY)
    assert seen == [0, 0, 7], "a counter comes from the nearer end"
    agree(loss_line(model, start, end, loss, buffers=False).loss, [100] * 11, IDENTITY)


def test_recompute_runs_everywhere():
    model = Bowl([0.0] * 4)

    def recompute(m: Bowl) -> None:
        m.offset += 1

    got = loss_line(
        model, *ends([0.0] * 4, [0.0] * 4), Bowl.loss, buffers=False, recompute=recompute
    )
    agree(got.loss, [1] * 11, IDENTITY)  # and what it changed at one point does not add up


def test_ends_are_exact_and_interpolation_is_linear():
    rng = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(50, generator=rng) * 10.0**k} for k in (3, -3))
    assert torch.equal(interpolate(a, b, 0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1)["w"], b["w"])
    torch.testing.assert_close(interpolate(a, b, 0.3)["w"], 0.7 * a["w"] + 0.3 * b["w"])


def test_a_model_may_lie_on_its_own_line():
    # State dicts share storage with their model: the line must not overwrite its own end.
    model, other = Bowl([2.0, 0, 0, 0]), Bowl([0.0, 0, 0, 0])
    got = loss_line(model, model.state_dict(), other.state_dict(), Bowl.loss, (0, 0.5, 1))
    agree(got.loss, [6, 1.5, 0], IDENTITY)
    assert model.w[0] == 2


def test_line_mistakes_are_named():
    model = Bowl([0.0] * 4)
    start, end = ends([0.0] * 4, [1.0] * 4)
    for positions in ((0, 0.5), (0, 0.6, 0.4, 1), (0.5,), (0, 0, 1)):
        with pytest.raises(NQMError, match="increase from 0 to 1"):
            loss_line(model, start, end, Bowl.loss, positions)
    short = copy.copy(end)
    del short["w"]
    with pytest.raises(NQMError, match=r"the end's 'w' .* got nothing"):
        loss_line(model, start, short, Bowl.loss)
    with pytest.raises(NQMError, match=r"the start's 'w' .* expected \(4,\), got \(3,\)"):
        loss_line(model, {**start, "w": torch.zeros(3)}, end, Bowl.loss)


class Complex(nn.Module):
    """Its loss is |z|^2 of one complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.tensor([3.0 + 4.0j], dtype=torch.complex128))


def test_a_complex_weight_is_two_real_ones() -> None:
    def loss(model: nn.Module) -> float:
        return float(model.get_parameter("z").abs().square())

    model = Complex()
    (rise,) = loss_rise(model, loss, [0.1], 2000)
    # |z + noise|^2 - |z|^2 = 0.1^2 (9 eps^2 + 16 eps'^2) on average over +eps and -eps.
    within_error(rise.mean, 0.25, rise.standard_error)
    assert model.z.item() == 3 + 4j
    start, end = {"z": torch.tensor([1 + 2j])}, {"z": torch.tensor([3 - 2j])}
    agree(torch.view_as_real(interpolate(start, end, 0.25)["z"]), [[1.5, 1.0]], 1e-6)
    whole = nn.Module()
    whole.register_parameter("n", nn.Parameter(torch.tensor([1]), requires_grad=False))
    with pytest.raises(NQMError, match="must include a weight of real or complex numbers"):
        loss_rise(whole, lambda model: 0.0, [0.1])
