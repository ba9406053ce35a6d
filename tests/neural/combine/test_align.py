"""Networks with permuted hidden units: same function, and recovered by alignment."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from neural.combine.align import ALIGNS, ActivationMatching, Identity, WeightMatching, assign
from neural.combine.permutations import permutations_of
from neural.models import MODELS, build
from nqm.errors import NQMError
from tests.tiny_nets import state_of
from tests.tolerances import IDENTITY

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _double():
    """Double precision, so that a permuted sum differs by rounding alone."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(3)
    yield
    torch.set_default_dtype(torch.float32)


def scramble(model: nn.Module) -> nn.Module:
    """Every bias, scale, shift and statistic its own value, as after training."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model.eval()


def outputs(model: nn.Module, state: State, x: Tensor) -> Tensor:
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(x)


def same_function(model: nn.Module, one: State, other: State, x: Tensor) -> bool:
    expected = outputs(model, one, x)
    gap = (outputs(model, other, x) - expected).abs().max()
    return bool(gap <= IDENTITY * expected.abs().max())


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def images(*, rows: int = 4, side: int = 16) -> Tensor:
    return torch.randn(rows, 3, side, side)


# Permutations by hand, with nothing of the package's own graph.


def permute(state: State, out: dict[str, Tensor], inputs: dict[str, Tensor]) -> State:
    """Rows of the layers in `out` and columns of those in `inputs`, by path of the layer."""
    state = dict(state)
    for path, order in out.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if f"{path}.{name}" in state:
                state[f"{path}.{name}"] = state[f"{path}.{name}"][order]
    for path, order in inputs.items():
        state[f"{path}.weight"] = state[f"{path}.weight"][:, order]
    return state


def permuted_mlp(norm: str) -> tuple[nn.Module, State, Tensor]:
    model = scramble(build("mlp", classes=5, hidden=(16, 12), norm=norm))
    p, q = torch.randperm(16), torch.randperm(12)
    layers = [i for i, m in enumerate(model.features) if m.state_dict()]
    half = len(layers) // 2
    out = {f"features.{i}": p if k < half else q for k, i in enumerate(layers)}
    state = permute(model.state_dict(), out, {f"features.{layers[half]}": p, "linear": q})
    return model, state, images(side=8)


def permuted_flatten() -> tuple[nn.Module, State, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6 * 49, 10), nn.Tanh(), nn.Linear(10, 4),
    )  # fmt: skip
    p, q = torch.randperm(6), torch.randperm(10)
    columns = (49 * p[:, None] + torch.arange(49)).ravel()  # 7 x 7 positions of each channel
    model = scramble(model)
    state = permute(model.state_dict(), {"0": p, "1": p, "5": q}, {"5": columns, "7": q})
    return model, state, images()


def permuted_resnet(norm: str, shortcut: str) -> tuple[nn.Module, State, Tensor]:
    """A ResNet-14: streams of 16, 32, 64 channels, and a hidden width in each of two blocks."""
    options: dict[str, Any] = {"depth": 14, "norm": norm, "shortcut": shortcut}
    model = scramble(build("resnet", classes=5, **options))

    def order(width: int) -> Tensor:
        if norm == "batch":
            return torch.randperm(width)
        groups = torch.stack([torch.randperm(8) for _ in range(width // 8)])
        return (groups + 8 * torch.randperm(width // 8)[:, None]).ravel()

    state = dict(model.state_dict())
    stream = order(16)
    state = permute(state, {"conv1": stream, "bn1": stream}, {})
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in (0, 1):
            path, hidden, before = f"layer{stage}.{block}", order(width), stream
            if stage > 1 and block == 0:
                if shortcut == "B":
                    stream = order(width)
                    state = permute(
                        state,
                        {f"{path}.shortcut.0": stream, f"{path}.shortcut.1": stream},
                        {f"{path}.shortcut.0": before},
                    )
                else:
                    # A quarter of zeros, the old stream, a quarter of zeros; those are free.
                    quarter = width // 4
                    free = torch.cat([torch.arange(quarter), torch.arange(3 * quarter, width)])
                    if norm == "batch":
                        free = free[torch.randperm(2 * quarter)]
                    else:  # their groups of 8
                        free = free.view(-1, 8)[torch.randperm(quarter // 4)].ravel()
                    stream = torch.cat([free[:quarter], quarter + before, free[quarter:]])
            ends = {f"{path}.{name}2": stream for name in ("conv", "bn")}
            inner = {f"{path}.{name}1": hidden for name in ("conv", "bn")}
            state = permute(state, ends | inner, {f"{path}.conv1": before, f"{path}.conv2": hidden})
    return model, permute(state, {}, {"linear": stream}), images()


CASES = {
    "mlp": lambda: permuted_mlp("none"),
    "mlp_batch": lambda: permuted_mlp("batch"),
    "mlp_layer": lambda: permuted_mlp("layer"),
    "flatten": permuted_flatten,
    "resnet_padded": lambda: permuted_resnet("batch", "A"),
    "resnet_projected": lambda: permuted_resnet("batch", "B"),
    "resnet_group_padded": lambda: permuted_resnet("group", "A"),
    "resnet_group_projected": lambda: permuted_resnet("group", "B"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_permuted_copy_is_recovered_exactly(case):
    model, permuted, x = CASES[case]()
    original = state_of(model)
    permuted = {name: value.clone() for name, value in permuted.items()}
    assert not equal(permuted, original)
    assert same_function(model, original, permuted, x), "the permutation made by hand is wrong"
    assert equal(WeightMatching()(model, original, permuted), original)


# Every model of the package.

HANDLED = {
    "resnet": {"depth": 8},
    "wrn": {"depth": 10, "width": 1},
    "pyramidnet": {"depth": 8, "alpha": 9},
    "fast_cnn": {"width": 4},
    "digits_cnn": {},
    "mlp": {"hidden": (8, 6), "dropout": 0.1, "norm": "layer"},
}
REFUSED = {
    "hyper_wrn": ({"depth": 10, "width": 1}, "banks.stem "),
    "lstm_lm": ({}, "embedding "),
    "transformer_lm": ({}, "embedding "),
}
VARIANTS = [
    *HANDLED.items(),
    ("digits_cnn", {"norm": "group", "dropout": 0.2}),
    ("wrn", {"depth": 10, "width": 2, "norm": "group"}),
    ("resnet", {"depth": 8, "width": 12, "norm": "group"}),
    ("resnet", {"depth": 8, "shortcut": "B", "dropout": 0.2}),
]


def test_every_model_is_handled_or_refused():
    assert HANDLED.keys() | REFUSED.keys() == MODELS.keys()
    assert not HANDLED.keys() & REFUSED.keys()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_every_permutation_that_is_found_keeps_the_function(name, options):
    model = scramble(build(name, classes=4, **options))
    x = images(side=8 if name == "mlp" else 20)
    original = state_of(model)
    found = permutations_of(model)
    permuted = found.apply(original, found.random(1))
    moved = [name for name in original if not torch.equal(original[name], permuted[name])]
    # All but counters, and the shift of the output layer, which has no order to lose.
    still = {n for n in original if n.endswith("num_batches_tracked")} | {"linear.bias"}
    assert moved == [n for n in original if n not in still]
    assert same_function(model, original, permuted, x)
    assert equal(WeightMatching()(model, original, permuted), original)


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name):
    options, where = REFUSED[name]
    model = build(name, classes=4, **options)
    with pytest.raises(NQMError, match=f"^align: {where}"):
        WeightMatching()(model, model.state_dict(), model.state_dict())


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    return sorted(group.shape for group in permutations_of(model).groups)


def test_how_many_units_may_change_places():
    """Counted by hand from the architectures."""
    mlp = build("mlp", classes=3, hidden=(7, 5))
    assert sizes(mlp) == [(1, 5), (1, 7)]
    # Padding keeps 16 of 32 and 32 of 64 channels of a stream in the place of the old stream.
    resnet = build("resnet8", classes=3)
    assert sizes(resnet) == sorted([(1, 16), (1, 16), (1, 32), (1, 16), (1, 64), (1, 32)])
    projected = build("resnet8", classes=3, shortcut="B")
    assert sizes(projected) == sorted([(1, 16)] * 2 + [(1, 32)] * 2 + [(1, 64)] * 2)
    assert sizes(build("digits_cnn", classes=3, norm="group")) == [(2, 8), (4, 8), (4, 8)]
    assert sizes(build("mlp", classes=3, hidden=())) == []
    assert sizes(nn.Linear(4, 3)) == []


def test_a_permutation_across_groups_of_groupnorm_is_no_symmetry():
    """So that the restriction is needed, not a matter of taste."""
    model = scramble(build("digits_cnn", classes=3, norm="group"))
    order = torch.arange(16)
    order[[0, 8]] = order[[8, 0]]
    swapped = permute(
        state_of(model), {"features.0": order, "features.1": order}, {"features.3": order}
    )
    assert not same_function(model, state_of(model), swapped, images())


# Networks made for one property each.


class Block(nn.Module):
    """A net with a free middle: `middle` maps (N, 6, H, W) to channels that a Linear reads."""

    def __init__(self, middle: Any, channels: int = 6, **layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.more = nn.ModuleDict(layers)
        self.head = nn.Linear(channels, 4)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.more, torch.relu(self.stem(x))).mean((2, 3)))


def conv(inputs: int = 6, outputs: int = 6, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def padded(x: Tensor, before: int, after: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, before, after))


UNDERSTOOD = {
    "depthwise": (lambda m, x: m["b"](torch.tanh(m["a"](x))), 6, (conv(groups=6), conv())),
    "squeeze": (
        lambda m, x: m["b"](x) * torch.sigmoid(m["a"](functional.adaptive_avg_pool2d(x, 1))),
        6, (conv(), conv()),
    ),
    "itself": (lambda m, x: x + functional.gelu(m["a"](x)) - 0.5 * x, 6, (conv(), conv())),
    "two_paddings": (
        lambda m, x: padded(x, 2, 3) + padded(m["a"](x), 5, 0) + m["b"](x),
        11, (conv(), conv(6, 11)),
    ),
    "overlapping_paddings": (
        lambda m, x: padded(m["a"](x), 0, 2) + padded(m["b"](x), 2, 0),
        8, (conv(), conv()),
    ),
    "padding_read_at_once": (
        lambda m, x: m["b"](functional.gelu(padded(x, 1, 2) + 1.0)) + m["a"](x),
        6, (conv(), conv(9, 6)),
    ),
    "chained": (lambda m, x: m["b"](m["a"](x) + x).relu_() + x, 6, (conv(), conv())),
    "clamped": (lambda m, x: m["b"](m["a"](x).clamp(-1, 0.5) ** 2), 6, (conv(), conv())),
    "prelu": (lambda m, x: m["b"](m["a"](x)), 6, (nn.PReLU(6, init=0.3), conv())),
    "layer_norm_of_maps": (lambda m, x: m["b"](m["a"](x)), 6, (nn.LayerNorm([6, 16, 16]), conv())),
    "instance_norm": (
        lambda m, x: m["b"](m["a"](x)), 6, (nn.InstanceNorm2d(6, affine=True), conv()),
    ),
    "one_group": (lambda m, x: m["b"](m["a"](x)), 6, (nn.GroupNorm(1, 6), conv())),
    "groups_of_two_sizes": (
        lambda m, x: m["b"](torch.tanh(m["a"](x))) , 6, (nn.GroupNorm(2, 6), nn.GroupNorm(3, 6)),
    ),
    "sizes": (lambda m, x: m["b"](m["a"](x).to(x.dtype)) / x.shape[1], 6, (conv(), conv())),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_what_is_understood_keeps_the_function(case):
    middle, channels, (a, b) = UNDERSTOOD[case]
    model = scramble(Block(middle, channels, a=a.double(), b=b.double()))
    original, found, x = state_of(model), permutations_of(model), images()
    for seed in range(5):
        assert same_function(model, original, found.apply(original, found.random(seed)), x)


def test_groups_of_two_sizes_leave_what_both_allow():
    """Halves of 3 and thirds of 2 of six channels: {0, 1} and {4, 5} alone can change places."""
    middle, channels, (a, b) = UNDERSTOOD["groups_of_two_sizes"]
    assert sizes(Block(middle, channels, a=a, b=b)) == [(1, 2), (1, 2)]


class Head(nn.Module):
    """What is done with outputs in the end, a flattening by sizes, and an optional argument."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        self.conv, self.hidden, self.last = conv(3, 6), nn.Linear(6 * 256, 9), nn.Linear(9, 4)
        self.end, self.temperature = end, nn.Parameter(torch.tensor([0.7]))
        self.seen: Any = None

    def forward(self, x: Tensor, scale: float | None = None) -> Any:
        x = torch.relu(self.conv(x if scale is None else scale * x))
        self.seen = x.view(x.size(0), -1)
        return self.end(self, self.last(torch.tanh(self.hidden(self.seen))))


ENDS = {
    "plain": lambda m, x: x,
    "one output": lambda m, x: x[:, 2],
    "sorted": lambda m, x: x.sort(1).values.cumsum(1),
    "temperature": lambda m, x: torch.log_softmax(x / m.temperature, -1),
    "features": lambda m, x: torch.cat([x, m.seen], 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_outputs_stay_in_their_order_whatever_is_done_with_them(end):
    model = scramble(Head(ENDS[end]))
    original, found, x = state_of(model), permutations_of(model), images()
    assert model.seen is None, "the trace ran on the model itself"
    assert same_function(model, original, found.apply(original, found.random(0)), x)
    channels = [] if end == "features" else [(1, 6)]
    assert [group.shape for group in found.groups] == [*channels, (1, 9)]


class Functional(nn.Module):
    """A layer of its own, which the trace sees as a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(4, 5), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.first(x)), self.weight)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(torch.relu(self.again(self.first(x)))))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.first(x))


class Buffered(Scaled):
    def __init__(self) -> None:
        super().__init__()
        del self.scale
        self.register_buffer("scale", torch.ones(4))


class Clamped(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).clamp(max=self.scale))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Deciding())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, output: output.flip(-1))
    return model


def block(middle: Any, channels: int = 6, **layers: nn.Module) -> Block:
    return Block(middle, channels, **layers)


NOT_UNDERSTOOD = {
    "concatenation": (lambda: block(lambda m, x: torch.cat([x, x], 1), 12), "cat"),
    "some channels": (lambda: block(lambda m, x: x[:, :3], 3), "some of the channels"),
    "order reversed": (lambda: block(lambda m, x: x.flip(1)), "flip"),
    "shuffle": (lambda: block(lambda m, x: m["a"](x), a=nn.ChannelShuffle(2)), "more.a "),
    "groups": (lambda: block(lambda m, x: m["a"](x), a=conv(groups=2)), "more.a .*groups=2"),
    "neighbours": (lambda: block(lambda m, x: m["a"](x), a=nn.LocalResponseNorm(2)), "more.a "),
    "largest of all": (lambda: block(lambda m, x: x - x.amax(1, keepdim=True)), "channels"),
    "repeated": (lambda: block(lambda m, x: padded(x, 1, 1).repeat(1, 1, 1, 1), 8), "repeat"),
    "reflected": (
        lambda: block(lambda m, x: functional.pad(x, (0, 0, 0, 0, 1, 1), value=1.0), 8),
        "something else than zeros",
    ),
    "positions mixed": (
        lambda: block(lambda m, x: x.view(-1, 6, 16, 16) + x.transpose(2, 3)), "reshapes",
    ),
    "linear on positions": (
        lambda: block(lambda m, x: m["a"](x), a=nn.Linear(16, 16)), "more.a .*positions",
    ),
    "norm of the last axis": (
        lambda: block(lambda m, x: m["a"](x), a=nn.LayerNorm(16)), "more.a .*all channels",
    ),
    "two shapes": (
        lambda: block(lambda m, x: x + m["a"](x).mean((2, 3))[..., None, None], a=conv()),
        "more|Block",
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2)),
        r"1 \(TransformerEncoderLayer\)",
    ),
    "recurrence": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 3)), r"1 \(LSTM\)"),
    "used twice": (Twice, r"again \(Linear\) is used twice"),
    "one tensor": (tied, "0.weight and 2.weight are one tensor"),
    "hooks": (hooked, r"1 \(ReLU\) has hooks"),
    "parameter outside": (Scaled, "'scale'"),
    "layer of its own": (Functional, "'weight'"),
    "clamped by a buffer": (Clamped, "clamp"),
    "buffer outside": (Buffered, "neither that nor a number"),
    "parametrized": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)
        ),
        r"1 \(ParametrizedLinear\)",
    ),
    "decision": (Branching, r"inner\.1 \(Deciding\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused_in_one_line(case):
    make, said = NOT_UNDERSTOOD[case]
    model = make()
    before, mode = state_of(model), model.training
    with pytest.raises(NQMError, match=said) as caught:
        permutations_of(model)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("align: ")
    assert equal(state_of(model), before)
    assert model.training == mode


def test_no_model_and_weights_without_shape_are_refused():
    with pytest.raises(NQMError, match=r"takes a torch\.nn\.Module"):
        permutations_of("mlp")  # type: ignore[arg-type]
    with pytest.raises(NQMError, match="no shape yet"):
        permutations_of(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))


# The matching itself.


def test_assignment_of_cells_is_the_best_of_all():
    """All 2! (3!)^2 permutations of two cells of three, one by one."""
    rng = np.random.default_rng(0)
    threes = list(itertools.permutations(range(3)))
    allowed = [
        [*(3 * a + i for i in p), *(3 * (1 - a) + i for i in q)]
        for a, p, q in itertools.product((0, 1), threes, threes)
    ]
    assert len(allowed) == 72
    for _ in range(20):
        gain = rng.normal(size=(6, 6))
        best = max(allowed, key=lambda order: gain[range(6), order].sum())
        assert assign(gain, 2).tolist() == best


def distance(one: State, other: State) -> float:
    return sum(float((one[n] - other[n]).square().sum()) for n in one)


def test_one_group_is_matched_as_well_as_can_be():
    """Against all 24 orders of four hidden units of two unrelated networks."""
    model = build("mlp", classes=3, size=2, hidden=(4,))
    for _ in range(5):
        one, other = (
            {n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)
        )
        best = min(
            distance(one, permute(other, {"features.1": order}, {"linear": order}))
            for order in map(torch.tensor, itertools.permutations(range(4)))
        )
        aligned = WeightMatching()(model, one, other)
        assert distance(one, aligned) == pytest.approx(best, rel=IDENTITY)


def test_no_single_group_can_be_improved():
    """Two layers of 4: coordinate descent ends where all orders of one layer alone are worse."""
    model = build("mlp", classes=3, size=2, hidden=(4, 4))
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    for seed in range(5):
        one, other = (
            {n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)
        )
        aligned = WeightMatching(seed)(model, one, other)
        reached = distance(one, aligned)
        assert reached <= distance(one, other)
        for path, reader in (("features.1", "features.3"), ("features.3", "linear")):
            for order in orders:
                rival = permute(aligned, {path: order}, {reader: order})
                assert distance(one, rival) >= reached * (1 - IDENTITY)


def test_a_layer_that_maps_units_to_themselves_is_never_made_worse():
    """The product is quadratic in such a permutation, and the linear gain can mislead."""
    model = Block(lambda m, x: x + m["a"](x), a=conv())
    for seed in range(10):
        one, other = (
            {n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)
        )
        aligned = WeightMatching(seed)(model, one, other)
        assert distance(one, aligned) <= distance(one, other) * (1 + IDENTITY)


def test_the_order_of_a_member_makes_no_difference():
    """One hidden layer has one optimum, whatever the order its units come in."""
    model = build("mlp", classes=3, hidden=(12,))
    one, other = ({n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2))
    order = torch.randperm(12)
    again = permute(other, {"features.1": order}, {"linear": order})
    assert not equal(again, other)
    assert equal(WeightMatching()(model, one, again), WeightMatching()(model, one, other))


@pytest.mark.parametrize("rule", ALIGNS.values())
def test_laws_of_every_alignment(rule):
    """Equal networks stay; numbers only change places; nothing given is changed."""
    model = scramble(build("digits_cnn", classes=3, norm="batch", width=4))
    other = scramble(build("digits_cnn", classes=3, norm="batch", width=4))
    batches = [(images(rows=30), torch.zeros(30))]
    reference, state, own = state_of(model), state_of(other), state_of(model)
    kept = state_of(other)
    assert equal(rule()(model, reference, reference, batches), reference)
    aligned = rule()(model, reference, state, batches)
    assert equal(rule()(model, reference, state, batches), aligned)  # repeatable
    assert equal(state, kept)
    assert equal(state_of(model), own)
    x = images()
    assert same_function(other, kept, aligned, x)
    for name, value in aligned.items():
        assert torch.equal(value.ravel().sort().values, kept[name].ravel().sort().values)


def test_names():
    assert {name: rule.name for name, rule in ALIGNS.items()} == {n: n for n in ALIGNS}
    assert set(ALIGNS) == {"none", "weights", "activations"}
    assert [name for name, rule in ALIGNS.items() if rule.needs_data] == ["activations"]
    with pytest.raises(NQMError, match=r"WeightMatching\.seed must be an integer >= 0; got -1"):
        WeightMatching(-1)


def test_identity_is_for_every_model():
    model = build("lstm_lm", classes=3, hidden=4, embedding=2)
    state = state_of(model)
    assert equal(Identity()(model, {}, state), state)


def test_activations_recover_a_permuted_copy():
    model, permuted, _ = permuted_flatten()
    batches = [(images(rows=20), torch.zeros(20)) for _ in range(3)]
    original = state_of(model)
    assert equal(ActivationMatching()(model, original, permuted, batches), original)


def test_activations_are_matched_by_correlation():
    """Against all 120 orders, by NumPy's correlation of what the last layer reads."""
    model = build("mlp", classes=3, size=3, hidden=(5,))
    one, other = state_of(model), {n: torch.randn_like(t) for n, t in state_of(model).items()}
    # Unit 1 never fires: its correlation counts as 0.
    one["features.1.bias"][1] = -1e9
    x = torch.randn(200, 3, 3, 3)
    hidden = [
        torch.relu(x.flatten(1) @ s["features.1.weight"].T + s["features.1.bias"]).numpy()
        for s in (one, other)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        gain = np.nan_to_num(np.corrcoef(*hidden, rowvar=False)[:5, 5:])
    orders = [list(order) for order in itertools.permutations(range(5))]
    best = max(orders, key=lambda order: gain[range(5), order].sum())
    expected = permute(other, {"features.1": torch.tensor(best)}, {"linear": torch.tensor(best)})
    batches = [(x[:150], torch.zeros(150)), (x[150:], torch.zeros(50))]
    assert equal(ActivationMatching()(model, one, other, batches), expected)


def test_activations_need_data():
    model = build("mlp", classes=3)
    state = state_of(model)
    with pytest.raises(NQMError, match="give batches"):
        ActivationMatching()(model, state, state)
    with pytest.raises(NQMError, match="there is no batch"):
        ActivationMatching()(model, state, state, iter([]))
    broken = [(torch.full((3, 3, 8, 8), torch.nan), torch.zeros(3))]
    with pytest.raises(NQMError, match="not finite"):
        ActivationMatching()(model, state, state, broken)


@pytest.mark.parametrize("rule", [WeightMatching(), ActivationMatching()])
def test_states_of_another_model_are_refused(rule):
    model = build("mlp", classes=3, hidden=(6,))
    state, batches = state_of(model), [(images(side=8), torch.zeros(4))]
    wide = state_of(build("mlp", classes=3, hidden=(7,)))
    with pytest.raises(NQMError, match=r"'features\.1\.weight' of the state .*192\), got \(7,"):
        rule(model, state, wide, batches)
    with pytest.raises(NQMError, match=r"'linear\.bias' of the state .*\(3,\), got float"):
        rule(model, state, state | {"linear.bias": 1.0}, batches)
    with pytest.raises(NQMError, match=r"of the reference .*got nothing"):
        rule(model, {}, state, batches)
    with pytest.raises(NQMError, match=r"'odd' of the state .*expected nothing"):
        rule(model, state, state | {"odd": torch.zeros(1)}, batches)
    with pytest.raises(NQMError, match=r"'linear\.bias' of the state holds numbers that are not"):
        rule(model, state, state | {"linear.bias": torch.full((3,), torch.inf)}, batches)
