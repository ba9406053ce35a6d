"""Layers in plain operations: what torch's kernels give, and derivatives by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from neural.curvature import gradient_noise
from neural.curvature.plain_kernels import plain_kernels
from neural.curvature.risk import EmpiricalRisk
from neural.models import build
from nqm.errors import NQMError
from tests.tolerances import IDENTITY, agree

#: Of central differences in double precision, at a step of 1e-5 of a direction of length 1.
DIFFERENCES = 1e-6


def both_ways(function: Callable[[], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors of a result by torch's own kernels, and by plain operations."""
    own = function()
    with plain_kernels():
        plain = function()
    return list(flat(own)), list(flat(plain))


def flat(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        yield tree.detach()
    else:
        for one in tree:
            yield from flat(one)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["", "bidirectional", "batch_first", "one text"])
def test_recurrent_layers_are_torchs(kind: Any, bias: bool, way: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"bias": bias, "num_layers": 2}
    if way in ("bidirectional", "batch_first"):
        options[way] = True
    if kind is nn.RNN and way:
        options["nonlinearity"] = "relu"
    shape = (5, 3) if way == "one text" else (5, 6, 3)
    x = torch.randn(shape, dtype=torch.double)
    sizes = (0, 2) if kind is nn.LSTM else (0,)
    for size in sizes:
        layer = kind(3, 4, **options, **({"proj_size": size} if size else {})).double()
        rows = () if way == "one text" else (5,) if way == "batch_first" else (6,)
        count = 4 if way == "bidirectional" else 2
        hidden = torch.randn(count, *rows, size or 4, dtype=torch.double)
        cell = torch.randn(count, *rows, 4, dtype=torch.double)
        state = (hidden, cell) if kind is nn.LSTM else hidden
        for given in (None, state):
            own, plain = both_ways(lambda layer=layer, given=given: layer(x, given))
            assert [one.shape for one in own] == [one.shape for one in plain]
            for one, other in zip(own, plain, strict=True):
                agree(other, one, IDENTITY)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells_are_torchs(kind: Any, bias: bool) -> None:
    torch.manual_seed(0)
    cell, x = kind(3, 4, bias).double(), torch.randn(6, 3, dtype=torch.double)
    for one, other in zip(*both_ways(lambda: cell(x)), strict=True):
        agree(other, one, IDENTITY)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": nn.LayerNorm((3, 4)),
    "layer norm, no shift": nn.LayerNorm(4, bias=False),
    "layer norm, plain": nn.LayerNorm(4, elementwise_affine=False),
    "instance norm": nn.InstanceNorm1d(3, affine=True),
    "instance norm, running": nn.InstanceNorm1d(3, track_running_stats=True).eval(),
    "weight norm": parametrizations.weight_norm(nn.Linear(4, 2)),
    "weight norm, columns": parametrizations.weight_norm(nn.Linear(4, 2), dim=1),
    "weight norm, whole": parametrizations.weight_norm(nn.Linear(4, 2), dim=None),
    "prelu": nn.PReLU(),
    "prelu, channels": nn.PReLU(3),
    "glu": nn.GLU(),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_torchs(name: str) -> None:
    torch.manual_seed(0)
    layer = OTHERS[name]
    if isinstance(layer, nn.Module):
        layer.double()
    x = torch.randn(2, 3, 4, dtype=torch.double)
    for one, other in zip(*both_ways(lambda: layer(x)), strict=True):
        assert one.shape == other.shape
        agree(other, one, IDENTITY)


def test_settings_are_given_back() -> None:
    def settings() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        flash, math = cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()
        return torch.backends.mha.get_fastpath_enabled(), flash, math

    before = settings()
    with plain_kernels():
        assert settings() == (False, False, True)
    assert settings() == before


# --- derivatives ---------------------------------------------------------------------------------


class Net(nn.Module):
    """Some layer, and a linear one on the mean over what it gives for every symbol."""

    def __init__(self, layer: nn.Module, width: int = 6):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        z: Tensor = self.head(y.tanh().flatten(1, -2).mean(1))
        return z


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, activation="gelu")


class ChannelsLast(nn.GroupNorm):
    """A normalisation of images in the layout that torch gives them on most processors."""

    def __init__(self) -> None:
        super().__init__(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        image = x.movedim(-1, 1)[:, :, None].to(memory_format=torch.channels_last)
        return super().forward(image)[:, :, 0].movedim(1, -1)


class Gathered(nn.Module):
    """An embedding whose first row pads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, 6, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rows((x[..., 0] * 2.0).long().clamp(0, 3))
        return y


NETS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Net(nn.MultiheadAttention(6, 2, batch_first=True)),
    "encoder": lambda: Net(encoder()),
    "lstm": lambda: Net(nn.LSTM(6, 3, batch_first=True, bidirectional=True)),
    "gru": lambda: Net(nn.GRU(6, 6, batch_first=True)),
    "rnn": lambda: Net(nn.RNN(6, 6, batch_first=True)),
    "lstm, projected": lambda: Net(nn.LSTM(6, 8, batch_first=True, proj_size=6)),
    "weight-normed lstm": lambda: Net(
        parametrizations.weight_norm(nn.LSTM(6, 6, batch_first=True), "weight_hh_l0")
    ),
    "weight norm": lambda: Net(parametrizations.weight_norm(nn.Linear(6, 6))),
    "layer norm": lambda: Net(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))),
    "instance norm": lambda: Net(nn.Sequential(nn.Linear(6, 6), nn.InstanceNorm1d(5, affine=True))),
    "group norm, channels last": lambda: Net(ChannelsLast()),
    "prelu": lambda: Net(nn.Sequential(nn.Linear(6, 6), nn.PReLU())),
    "glu": lambda: Net(nn.Sequential(nn.Linear(6, 12), nn.GLU())),
    "padded embedding": lambda: Net(Gathered()),
}


def of_net(name: str) -> EmpiricalRisk:
    torch.manual_seed(0)
    x, y = torch.randn(5, 5, 6, dtype=torch.double), torch.randint(3, (5,))
    return EmpiricalRisk(NETS[name]().double(), [(x[:2], y[:2]), (x[2:], y[2:])])


def direction(risk: EmpiricalRisk) -> Tensor:
    v = torch.randn_like(risk.weights)
    if "layer.rows.weight" in risk.shapes:  # the row that pads is a constant
        v[:6] = 0.0
    return v / v.norm()


def central(of: Callable[[Tensor], Any], w: Tensor, v: Tensor) -> Any:
    step = 1e-5
    return (of(w + step * v) - of(w - step * v)) / (2.0 * step)


@pytest.mark.parametrize("name", NETS)
def test_derivatives_are_differences(name: str) -> None:
    risk = of_net(name)
    w, v, u = risk.weights, direction(risk), direction(risk)
    slope = risk.gradient()
    assert float(slope @ v) == pytest.approx(central(risk.loss, w, v), abs=DIFFERENCES)
    product = risk.hessian_product(v)
    expected = central(risk.gradient, w, v)
    assert float((product - expected).norm()) <= DIFFERENCES * float(expected.norm())
    bent = float(risk.third(v) @ u)
    expected = central(lambda w: float(v @ risk.at(w).hessian_product(v)), w, u)
    assert bent == pytest.approx(expected, abs=DIFFERENCES * float(risk.third(v).norm()))
    # Examples by themselves: each an empirical risk of its own.
    each = torch.cat(list(risk.example_gradients()))
    alone = [
        risk.on([(x[i : i + 1], y[i : i + 1])]).gradient()
        for x, y in risk.batches
        for i in range(len(y))
    ]
    agree(each, torch.stack(alone), 1e-11)
    c = torch.stack(alone)
    assert gradient_noise.trace(risk) == pytest.approx(
        float(c.var(0, correction=0).sum()), rel=1e-10
    )


@pytest.mark.parametrize("name", ["attention", "lstm", "gru", "prelu", "weight norm"])
def test_gauss_newton_is_the_product_of_differences(name: str) -> None:
    risk = of_net(name)
    w, v = risk.weights, direction(risk)
    x = torch.cat([x for x, _ in risk.batches])

    def output(w: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(w, list(risk.model.parameters()))
        with torch.no_grad():
            found: Tensor = risk.model.eval()(x)
        return found

    along = central(output, w.clone(), v)
    q = output(w.clone()).softmax(1)
    bent = q * along - q * (q * along).sum(1, keepdim=True)  # H of a softmax, times the change
    expected = float((along * bent).sum()) / len(x)
    assert float(v @ risk.ggn_product(v)) == pytest.approx(expected, rel=1e-5)
    assert float(v @ risk.ggn() @ v) == pytest.approx(expected, rel=1e-5)


SMALL = {"context": 6, "width": 4, "heads": 2, "layers": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("transformer_lm", SMALL | {"norm": "layer"}),
        ("transformer_lm", SMALL | {"norm": "rms"}),
        ("lstm_lm", {"embedding": 3, "hidden": 4, "layers": 2, "dropout": 0.2}),
    ],
)
def test_language_models(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build(name, classes=5, **options).double()
    x = torch.randint(5, (4, 6))
    risk = EmpiricalRisk(model, [(x, x.roll(-1, 1))])
    v = direction(risk)
    expected = central(risk.gradient, risk.weights, v)
    error = (risk.hessian_product(v) - expected).norm() / expected.norm()
    assert float(error) <= DIFFERENCES


# --- what is refused -----------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), 3), batch_first=True)
        y: Tensor = self.lstm(packed)[1][0][0][:, None]
        return y


class Stopped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Straight(nn.Linear):
    """Rounding that is let through backwards, as in training for few bits."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (y.round() - y).detach()


class Unrecorded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)  # type: ignore[operator]
        return x


class Diverged(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        nn.init.constant_(self.bias, math.nan)


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().neg().log()


class Sampled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        grid = x[:, :, None, :2].tanh()
        y: Tensor = functional.grid_sample(x[:, None], grid, align_corners=False)
        return y.squeeze(3).expand(-1, 5, -1).mT.repeat(1, 1, 2)[..., :6]


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (Packed, "packed sequence"),
        (lambda: Stopped(6, 6), "not the derivative of its loss"),
        (lambda: Straight(6, 6), "not the derivative of its loss"),
        (lambda: Unrecorded(6, 6), "not the derivative of its loss"),
        (Random, "random in evaluation mode"),
        (Diverged, r"layer.1.bias holds NaN or infinite numbers"),
        (Undefined, r"its loss on the 4 measured examples is nan"),
        (Counting, r"changes its 'layer.1.seen' in evaluation mode"),
        (lambda: nn.BatchNorm1d(5, track_running_stats=False), "depends on the others"),
        (Sampled, "second derivatives torch cannot compute"),
    ],
)
def test_what_has_no_derivatives_is_refused(layer: Callable[[], nn.Module], told: str) -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(6, 6), layer())).double()
    risk = EmpiricalRisk(model, [(torch.randn(4, 5, 6).double(), torch.randint(3, (4,)))])
    with pytest.raises(NQMError, match=told) as said:
        risk.check()
    assert "\n" not in str(said.value)
    with pytest.raises(NQMError, match=told):
        gradient_noise.trace(risk)


def test_a_branch_on_values_goes_one_example_after_the_other() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([row if float(row.sum()) > 0.0 else row.square() for row in x])

    torch.manual_seed(0)
    model = Net(nn.Sequential(Branch(), nn.Linear(6, 6))).double()
    risk = EmpiricalRisk(model, [(torch.randn(4, 5, 6).double(), torch.randint(3, (4,)))])
    v = direction(risk)
    expected = central(risk.gradient, risk.weights, v)
    assert float((risk.hessian() @ v - expected).norm()) <= DIFFERENCES
    each = torch.cat(list(risk.example_gradients()))
    agree(each.mean(0), risk.gradient(), 1e-11)


def test_nothing_that_a_forward_pass_notes_down_is_left() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale: Tensor | None = None
            self.last = torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = x.new_full((6,), 2.0)
            self.last = x * self.scale
            return self.last

    torch.manual_seed(0)
    noting = Noting()
    model = Net(nn.Sequential(nn.Linear(6, 6), noting)).double()
    risk = EmpiricalRisk(model, [(torch.randn(4, 5, 6).double(), torch.randint(3, (4,)))])
    last = noting.last
    list(risk.example_gradients())
    risk.hessian_product(risk.weights)
    assert noting.scale is None
    assert noting.last is last
