"""REPAIR: hidden units of an average get the mean and deviation of those that were averaged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neural.combine.rescale import rescale
from neural.late_phase.averaging import recompute_statistics
from neural.models import build
from nqm.errors import NQMError
from tests.tiny_nets import state_of
from tests.tolerances import JUMP, agree

State = dict[str, Tensor]
WEIGHTS = (0.3, 0.7)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    yield
    torch.set_default_dtype(torch.float32)


def members(model: nn.Module) -> tuple[list[State], State]:
    """Two sets of weights, with statistics of their own, and their weighted mean."""
    states = [
        {
            name: torch.randn_like(value).abs() + 0.1 if name.endswith("var")
            else torch.randn_like(value) if value.is_floating_point() else value.clone()
            for name, value in model.state_dict().items()
        }
        for _ in WEIGHTS
    ]  # fmt: skip
    return states, mean_of(states)


def mean_of(states: list[State]) -> State:
    one, other = states
    return {
        n: WEIGHTS[0] * one[n] + WEIGHTS[1] * other[n] if one[n].is_floating_point() else one[n]
        for n in one
    }


def data(*shape: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches of unequal size."""
    return [(torch.randn(rows, *shape), torch.zeros(rows)) for rows in (40, 23)]


def outputs_of(model: nn.Module, state: State, path: str, batches: list) -> Tensor:
    """All outputs of one layer, in evaluation mode."""
    seen: list[Tensor] = []
    model.load_state_dict(state, strict=True)
    model.eval()
    layer = model.get_submodule(path)
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    hook.remove()
    return torch.cat(seen)


def check(model: nn.Module, paths: dict[str, tuple[int, ...]], batches: list) -> nn.Module:
    """Means and deviations over the given axes are those interpolated, by NumPy."""
    states, merged = members(model)
    result = rescale(model, states, WEIGHTS, merged, batches)
    after = state_of(result)
    for path, axes in paths.items():
        ends = [outputs_of(model, state, path, batches).numpy() for state in states]
        found = outputs_of(model, after, path, batches).numpy()
        for moment in (np.mean, np.std):
            wanted = sum(w * moment(end, axis=axes) for w, end in zip(WEIGHTS, ends, strict=True))
            agree(moment(found, axis=axes), wanted, JUMP)
    touched = {f"{path}.{name}" for path in paths for name in ("weight", "bias")}
    assert {n for n in merged if not torch.equal(after[n], merged[n])} == touched
    return result


def test_layers_of_a_perceptron():
    model = build("mlp", classes=3, hidden=(7, 5), dropout=0.2)
    check(model, {"features.1": (0,), "features.4": (0,)}, data(3, 8, 8))


def test_convolutions_and_a_linear_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    check(model, {"0": (0, 2, 3), "3": (0, 2, 3), "6": (0,)}, data(3, 10, 10))


def test_normalised_networks_are_rescaled_behind_the_normalisation():
    model = build("mlp", classes=3, hidden=(7,), norm="layer")
    check(model, {"features.2": (0,)}, data(3, 8, 8))
    model = build("digits_cnn", classes=3, width=4, norm="group")
    check(model, {f"features.{i}": (0, 2, 3) for i in (1, 4, 8)}, data(3, 8, 8))
    maps = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.LayerNorm([5, 6, 6]), nn.ReLU(), nn.Conv2d(5, 2, 6),
        nn.Flatten(),
    )  # fmt: skip
    check(maps, {"1": (0, 2, 3)}, data(3, 8, 8))


class Pooled(nn.Module):
    """Pooling by functions between a convolution without bias and its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.GroupNorm(1, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(nn.functional.max_pool2d(self.conv(x), 2))
        return torch.log_softmax(self.last(torch.relu(x).mean((2, 3))), -1)


def test_functions_between_a_layer_and_its_normalisation_are_seen_through():
    check(Pooled(), {"norm": (0, 2, 3)}, data(3, 8, 8))


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("resnet8", ["bn1", *(f"layer{s}.0.bn{i}" for s in (1, 2, 3) for i in (1, 2))]),
        # Its convolutions end in sums, which a normalisation reads: those stay as they are.
        ("wrn-10-1", [*(f"group{s}.0.bn{i}" for s in (1, 2, 3) for i in (1, 2)), "bn"]),
    ],
)
def test_residual_networks(name, norms):
    model = build(name, classes=3, norm="group")
    check(model, dict.fromkeys(norms, (0, 2, 3)), data(3, 8, 8))


def test_first_layer_in_closed_form():
    """Rows of unit variance white data: the deviation of a unit is the length of its weights."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.tensor(
        np.linalg.qr(np.c_[np.ones(20), np.random.default_rng(0).normal(size=(20, 4))])[0]
    )
    x = x[:, 1:] * 20**0.5  # columns of mean 0, variance 1, uncorrelated
    states, merged = members(model)
    result = rescale(model, states, WEIGHTS, merged, [(x, torch.zeros(20))])
    lengths = [state["0.weight"].norm(dim=1) for state in states]
    length = WEIGHTS[0] * lengths[0] + WEIGHTS[1] * lengths[1]
    mean = merged["0.weight"]
    agree(result[0].weight.detach(), length[:, None] * mean / mean.norm(dim=1, keepdim=True), JUMP)
    agree(result[0].bias.detach(), merged["0.bias"], JUMP)


def test_one_member_of_weight_one_is_given_back_bit_for_bit():
    for dtype in (torch.float32, torch.float64):
        model = build("mlp", classes=3, hidden=(7, 5)).to(dtype)
        state = {n: torch.randn_like(v) for n, v in state_of(model).items()}
        batches = [(x.to(dtype), y) for x, y in data(3, 8, 8)]
        for states, weights in (([state], [1.0]), ([state, state_of(model)], [1.0, 0.0])):
            result = rescale(model, states, weights, state, batches)
            assert all(torch.equal(v, state[n]) for n, v in result.state_dict().items())


def test_batchnorm_gets_new_statistics_and_nothing_else():
    model = build("digits_cnn", classes=3, width=4)
    states, merged = members(model)
    batches = data(3, 8, 8)
    result = rescale(model, states, WEIGHTS, merged, batches)
    expected = build("digits_cnn", classes=3, width=4)
    expected.load_state_dict(merged)
    recompute_statistics(expected, batches)
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in result.state_dict().items())
    # By hand for the first layer: the mean over batches of the batch means.
    first = [nn.functional.conv2d(x, merged["features.0.weight"], padding=1) for x, _ in batches]
    means = torch.stack([one.mean((0, 2, 3)) for one in first])
    agree(result.features[1].running_mean, means.mean(0), JUMP)


def test_nothing_that_is_given_changes():
    model = build("mlp", classes=3, hidden=(7,)).train()
    states, merged = members(model)
    before = [dict(s) for s in (state_of(model), *map(_copied, states), _copied(merged))]
    result = rescale(model, iter(states), WEIGHTS, merged, data(3, 8, 8))
    for kept, now in zip(before, (model.state_dict(), *states, merged), strict=True):
        assert all(torch.equal(kept[n], now[n]) for n in now)
    assert type(result) is type(model)
    assert result.training
    model.load_state_dict(result.state_dict(), strict=True)


def _copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def test_a_unit_that_never_varies_is_moved_and_not_blown_up():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    states, _ = members(model)
    states[1]["0.weight"][0] = -WEIGHTS[0] / WEIGHTS[1] * states[0]["0.weight"][0]
    merged = mean_of(states)
    merged["0.weight"][0] = 0.0  # opposite weights cancel
    result = rescale(model, states, WEIGHTS, merged, data(4))
    assert (result[0].weight[0] == 0).all()
    x = torch.cat([x for x, _ in data(4)])
    assert all(value.isfinite().all() for value in result.state_dict().values())
    assert result(x).isfinite().all()


def test_without_hidden_layers_nothing_is_to_be_rescaled():
    for model, shape in ((build("mlp", classes=3, hidden=()), (3, 8, 8)), (nn.Linear(4, 2), (4,))):
        states, merged = members(model)
        result = rescale(model, states, WEIGHTS, merged, data(*shape))
        assert all(torch.equal(v, merged[n]) for n, v in result.state_dict().items())


class Shifted(nn.Module):
    """A shift that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + self.shift)


REFUSED = {
    "no bias": (
        nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2)),
        r"0 \(Linear\) has no weight and bias",
    ),
    "no affine": (
        nn.Sequential(
            nn.Linear(4, 3), nn.LayerNorm(3, elementwise_affine=False), nn.ReLU(), nn.Linear(3, 2)
        ),
        r"1 \(LayerNorm\) has no weight and bias",
    ),
    "no shift": (
        nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3), nn.ReLU(), nn.Linear(3, 2)),
        r"1 \(RMSNorm\) has no weight and bias",
    ),
    "recurrent": (
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LSTM(3, 3)),
        r"2 \(LSTM\) is not a layer",
    ),
    "parameter outside": (Shifted(), "shift is used outside of a layer"),
    "shared": (
        nn.Sequential(*[nn.Linear(4, 4), nn.ReLU()] * 2, nn.Linear(4, 2)),
        "one tensor|used twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_take_it_are_refused(case):
    model, said = REFUSED[case]
    model = model.double()
    states, merged = members(model)
    with pytest.raises(NQMError, match=said):
        rescale(model, states, WEIGHTS, merged, data(4))


def test_mistakes_are_named():
    model = build("mlp", classes=3, hidden=(7,))
    states, merged = members(model)
    batches = data(3, 8, 8)
    with pytest.raises(NQMError, match=r"weights must sum to 1; got 0\.9"):
        rescale(model, states, [0.4, 0.5], merged, batches)
    with pytest.raises(NQMError, match=r"weights\[0\] must lie in .*; got -0.5"):
        rescale(model, states, [-0.5, 1.5], merged, batches)
    for some in (states[:1], states + states):
        with pytest.raises(NQMError, match="2 weights for another number of states"):
            rescale(model, some, WEIGHTS, merged, batches)
    with pytest.raises(NQMError, match=r"use list\(batches\)"):
        rescale(model, states, WEIGHTS, merged, iter(batches))
    with pytest.raises(NQMError, match="there is no batch"):
        rescale(model, states, WEIGHTS, merged, [])
    wide = state_of(build("mlp", classes=3, hidden=(8,)))
    with pytest.raises(NQMError, match="of member 1 does not fit"):
        rescale(model, [states[0], wide], WEIGHTS, merged, batches)
    with pytest.raises(NQMError, match="of the average does not fit"):
        rescale(model, states, WEIGHTS, wide, batches)
    lstm = build("lstm_lm", classes=3, hidden=4, embedding=2)
    with pytest.raises(NQMError, match=r"^rescale: embedding "):
        rescale(lstm, [lstm.state_dict()], [1.0], lstm.state_dict(), batches)
