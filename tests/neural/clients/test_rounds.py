"""Federated rounds in torch against closed forms on quadratics, and plain SGD; resumed rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nqm
from neural.clients import Client, federated_rounds
from neural.clients.config import ClientsConfig, ScopeConfig
from neural.clients.rounds import Round
from neural.clients.scope import divergence, scope_of
from neural.data.sampling import keyed_generator
from neural.training.config import TrainConfig
from nqm import NQMError
from nqm.schedule import Constant
from tests.tolerances import within_error

LR = 0.2
SHARES = np.array([0.5, 0.3, 0.2])
#: Curvatures and minima of three clients in two directions.
H = np.array([[1.0, 2.0], [0.5, 4.0], [3.0, 1.0]])
M = np.array([[1.0, -2.0], [3.0, 0.5], [-1.0, 1.0]])
#: Rounds until nothing moves: the slowest factor below is 0.75.
LONG = 90


class Point(nn.Module):
    """Weights whose loss is a quadratic of each client's own."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.weight


@dataclass(frozen=True)
class Quadratic:
    """Loss 1/2 h (x - m)^2 + noise x, summed over runs, and its minibatches of noise."""

    h: Tensor
    m: Tensor
    steps: int
    shape: tuple[int, ...]
    sd: float = 0.0
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[tuple[Tensor, Tensor]]:
        generator = keyed_generator(self.seed, epoch)
        for _ in range(start, self.steps):
            noise = self.sd * torch.randn(self.shape, generator=generator, dtype=torch.float64)
            yield noise, noise

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        return (0.5 * self.h * (x - self.m).square()).sum() + (noise * x).sum()


def quadratics(
    h: Any, m: Any, shares: Any, steps: Any, shape: tuple[int, ...], sd: float = 0.0
) -> list[Client]:
    made = []
    for k, share in enumerate(shares):
        one = Quadratic(torch.tensor(h[k]), torch.tensor(m[k]), steps[k], shape, sd, k)
        made.append(Client(float(share), one, one.loss))
    return made


def settings(lr: float = LR, **changes: Any) -> TrainConfig:
    own: dict[str, Any] = {"epochs": 1, "lr": Constant(lr), "momentum": 0.0, "weight_decay": 0.0}
    return TrainConfig(**own | {"precision": "float64"} | changes)


def end(steps: Any = (4, 4, 4), **changes: Any) -> np.ndarray[Any, Any]:
    """Where noise-free rounds end."""
    model = Point(torch.zeros(2, dtype=torch.float64))
    clients = quadratics(H, M, SHARES, steps, (2,))
    config = ClientsConfig(count=3, rounds=changes.pop("rounds", LONG), **changes)
    federated_rounds(model, clients, config, settings())
    return model.weight.detach().numpy()


def weighted(values: Any) -> Any:
    return (SHARES[:, None] * values).sum(0)


@pytest.mark.parametrize("steps", [(1, 1, 1), (4, 4, 4), (6, 1, 3)])
def test_fedavg_ends_where_its_fixed_point_is(steps: tuple[int, ...]) -> None:
    """Sum p (1 - r) m / sum p (1 - r), r = (1 - lr h)^steps; the true minimum at one step."""
    r = (1 - LR * H) ** np.array(steps)[:, None]
    fixed = weighted((1 - r) * M) / weighted(1 - r)
    np.testing.assert_allclose(end(steps), fixed, atol=1e-10)
    if steps == (1, 1, 1):
        np.testing.assert_allclose(fixed, weighted(H * M) / weighted(H), atol=1e-12)


@pytest.mark.parametrize("prox", [0.3, 2.0])
def test_fedprox_ends_where_its_fixed_point_is(prox: float) -> None:
    rho = 1 - LR * (H + prox)
    gain = (1 - rho**4) * H / (H + prox)
    r = rho**4 + (1 - rho**4) * prox / (H + prox)
    fixed = weighted(gain * M) / (1 - weighted(r))
    np.testing.assert_allclose(end(prox=prox), fixed, atol=1e-10)


@pytest.mark.parametrize("steps", [(4, 4, 4), (6, 2, 3)])
def test_scaffold_ends_at_the_minimum_of_the_mean_loss(steps: tuple[int, ...]) -> None:
    minimum = weighted(H * M) / weighted(H)
    np.testing.assert_allclose(end(steps, control=True), minimum, atol=1e-10)
    assert np.abs(end(steps) - minimum).max() > 0.05  # FedAvg's is another


def test_the_servers_step() -> None:
    """One round from 0 moves client k by D_k = (1 - r_k) m_k."""
    r = (1 - LR * H) ** 4
    moves = (1 - r) * M
    mean = weighted(moves)
    np.testing.assert_allclose(end(rounds=1), mean, atol=1e-14)
    np.testing.assert_allclose(end(rounds=1, server_lr=0.7), 0.7 * mean, atol=1e-14)
    np.testing.assert_allclose(end(rounds=1, server_lr=1.5), 1.5 * mean, atol=1e-14)
    step = (SHARES * (moves**2).sum(1)).sum() / (2 * (mean**2).sum())
    assert step > 1  # or the formula is not tried
    np.testing.assert_allclose(end(rounds=1, extrapolate=True), step * mean, atol=1e-13)


def test_a_control_is_option_two_of_the_paper() -> None:
    """control_k - control + (server - x_k) / (steps lr), from the clients' own weights."""
    model = Point(torch.zeros(2, dtype=torch.float64))
    clients = quadratics(H, M, SHARES, (4, 4, 4), (2,))
    rounds: list[Round] = []
    servers = [torch.zeros(2, dtype=torch.float64)]

    def after(model: nn.Module, made: Round) -> dict[str, float]:
        rounds.append(made)
        servers.append(model.weight.detach().clone())  # type: ignore[operator]
        return {}

    config = ClientsConfig(count=3, rounds=4, control=True)
    federated_rounds(model, clients, config, settings(), after=after)
    h, m = torch.tensor(H), torch.tensor(M)
    controls = torch.zeros(3, 2, dtype=torch.float64)
    for server, made in zip(servers, rounds, strict=False):
        common = (torch.tensor(SHARES)[:, None] * controls).sum(0)
        x = server.expand(3, 2).clone()
        for _ in range(4):
            x -= LR * (h * (x - m) - controls + common)
        found = torch.stack([state["weight"] for state in made.states])
        torch.testing.assert_close(found, x, rtol=0, atol=1e-13)
        controls += -common + (server - x) / (4 * LR)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (nqm.Federated, {}),
        (nqm.FedProx, {"prox": 0.5}),
        (nqm.Scaffold, {"control": True}),
    ],
)
def test_noisy_rounds_have_the_moments_of_nqm(method: Any, changes: dict[str, Any]) -> None:
    curvatures = np.array([1.0, 0.6, 1.6])
    curvatures /= SHARES @ curvatures
    shifts = np.array([0.5, -0.8, 0.0])
    shifts[2] = -(SHARES[:2] * curvatures[:2] * shifts[:2]).sum() / (SHARES[2] * curvatures[2])
    h, minimum = np.array([1.0, 0.3]), np.array([1.0, -2.0])
    variance, runs, rounds = 0.8, 4000, 6
    problem = nqm.Problem(
        curvature=h, noise_variance=variance, initial_mean=[1.0, 0.5], initial_variance=0.0,
        minimum=minimum,
    )  # fmt: skip
    own = {"prox": changes["prox"]} if "prox" in changes else {}
    algorithm = method(
        3, 4, curvatures=tuple(curvatures), shifts=tuple(shifts), shares=tuple(SHARES), **own
    )
    at = [4 * k for k in range(1, rounds + 1)]
    law = nqm.solve(problem, nqm.Phase(algorithm, LR, 4 * rounds), at)
    start = torch.tensor(minimum + np.array([1.0, 0.5])).expand(runs, 2)
    clients = quadratics(
        curvatures[:, None] * h, minimum * (1 + shifts[:, None]), SHARES, (4, 4, 4), (runs, 2),
        math.sqrt(variance),
    )  # fmt: skip
    losses: list[np.ndarray[Any, Any]] = []

    def after(model: nn.Module, made: Round) -> dict[str, float]:
        x = model.weight.detach().numpy() - minimum  # type: ignore[operator]
        losses.append((0.5 * h * x**2).sum(1))
        return {}

    config = ClientsConfig(count=3, rounds=rounds, **changes)
    federated_rounds(Point(start), clients, config, settings(), after=after)
    each = np.stack(losses)
    within_error(each.mean(1), law.loss, each.std(1, ddof=1) / math.sqrt(runs))


def test_some_clients_take_part() -> None:
    """The mean is over those that were drawn, with their shares; all are drawn at some time."""
    clients = quadratics(H, M, SHARES, (2, 2, 2), (2,))
    seen: list[Round] = []
    before = np.zeros(2)

    def after(model: nn.Module, made: Round) -> dict[str, float]:
        nonlocal before
        chosen = list(made.clients)
        r = (1 - LR * H[chosen]) ** 2
        part = SHARES[chosen] / SHARES[chosen].sum()
        np.testing.assert_allclose(made.shares, part)
        moved = (part[:, None] * (M[chosen] + r * (before - M[chosen]))).sum(0)
        before = model.weight.detach().numpy().copy()  # type: ignore[operator]
        np.testing.assert_allclose(before, moved, atol=1e-13)
        seen.append(made)
        return {}

    config = ClientsConfig(count=3, rounds=12, participation=0.6)
    model = Point(torch.zeros(2, dtype=torch.float64))
    federated_rounds(model, clients, config, settings(), after=after)
    assert {len(one.clients) for one in seen} == {2}
    assert len({one.clients for one in seen}) == 3


def test_drift_is_the_mean_distance_from_the_mean() -> None:
    clients = quadratics(H, M, SHARES, (4, 4, 4), (2,))
    model = Point(torch.zeros(2, dtype=torch.float64))
    (row,) = federated_rounds(model, clients, ClientsConfig(count=3, rounds=1), settings())
    moves = (1 - (1 - LR * H) ** 4) * M
    away = np.linalg.norm(moves - weighted(moves), axis=1)
    assert row["drift"] == pytest.approx(SHARES @ away, rel=1e-12)


class Net(nn.Module):
    """Dropout, BatchNorm, and two layers with a scope."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(self.dropout(self.norm(self.first(inputs)).relu()))
        return logits


@dataclass(frozen=True)
class Blobs:
    """Random inputs with labels, in minibatches of 6."""

    seed: int
    steps: int = 3

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[tuple[Tensor, Tensor]]:
        generator = keyed_generator(self.seed, epoch)
        for _ in range(start, self.steps):
            inputs = torch.randn(6, 5, generator=generator) + self.seed
            yield inputs, torch.randint(3, (6,), generator=generator)


def net(**options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options)


def blobs(*shares: float) -> list[Client]:
    loss = nn.functional.cross_entropy
    return [Client(share, Blobs(k), loss) for k, share in enumerate(shares)]


@pytest.mark.parametrize("control", [False, True])
def test_one_client_is_plain_sgd_bit_for_bit(control: bool) -> None:
    train = replace(settings(0.05), weight_decay=1e-2, momentum=0.9)
    made = net(dropout=0.0)
    config = ClientsConfig(count=1, rounds=3, local_epochs=2, control=control)
    federated_rounds(made, blobs(1.0), config, train)
    plain = net(dropout=0.0)
    stream = Blobs(0)
    for number in range(3):  # momentum begins anew in each round
        own = torch.optim.SGD(
            plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2
        )
        for epoch in (2 * number, 2 * number + 1):
            for inputs, targets in stream.epoch(epoch):
                own.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(plain(inputs), targets))
                own.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name


class StoppedError(Exception):
    """As if the process was killed between two rounds, or within one."""


def stopping(number: int) -> Any:
    def after(model: nn.Module, made: Round) -> dict[str, float]:
        if made.number == number:
            raise StoppedError
        return {"sum": float(model.first.weight.detach().double().sum())}  # type: ignore[operator, union-attr]

    return after


@pytest.mark.parametrize(
    ("changes", "scope"),
    [
        ({}, None),
        ({"control": True, "participation": 0.5}, None),
        ({"prox": 0.1, "extrapolate": True}, ScopeConfig(0.5, "fused")),
        ({"server_lr": 0.8}, ScopeConfig(0.0, rescale=True)),
    ],
)
def test_stopped_rounds_go_on_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], scope: ScopeConfig | None
) -> None:
    config = ClientsConfig(count=4, rounds=5, **changes)
    shares = (0.4, 0.3, 0.2, 0.1)
    train = settings(momentum=0.5)
    whole = net()
    rows = federated_rounds(whole, blobs(*shares), config, train, scope=scope, after=stopping(9))
    file = tmp_path / "checkpoint.pt"
    for number in (2, 4):
        with pytest.raises(StoppedError):
            federated_rounds(
                net(), blobs(*shares), config, train, scope=scope, after=stopping(number),
                path=file, key="a",
            )  # fmt: skip
    parts = net()
    torch.manual_seed(number)  # torch's own state does not matter
    again = federated_rounds(
        parts, blobs(*shares), config, train, scope=scope, after=stopping(9), path=file, key="a"
    )
    assert again == rows
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name
    with pytest.raises(NQMError, match=r"checkpoint\.pt holds rounds of another configuration"):
        federated_rounds(net(), blobs(*shares), config, train, path=file, key="b")


def test_buffers_are_averaged_by_a_full_step_and_the_largest_counter_is_taken() -> None:
    seen: list[Round] = []
    config = ClientsConfig(count=2, rounds=1, server_lr=0.5)

    def after(model: nn.Module, made: Round) -> dict[str, float]:
        seen.append(made)
        return {}

    model = net()
    start = {n: v.clone() for n, v in model.state_dict().items()}
    first_client, second_client = blobs(0.75, 0.25)
    clients = [first_client, replace(second_client, stream=Blobs(1, steps=4))]
    federated_rounds(model, clients, config, settings(), after=after)
    first, second = seen[0].states
    state = model.state_dict()
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(state[name], 0.75 * first[name] + 0.25 * second[name])
    assert first["norm.num_batches_tracked"] == 3
    assert state["norm.num_batches_tracked"] == 4
    mean = 0.75 * first["last.weight"] + 0.25 * second["last.weight"]
    torch.testing.assert_close(state["last.weight"], (mean + start["last.weight"]) / 2)


def test_rescaled_clients_have_one_scope() -> None:
    """That of the mean of theirs; the direction of each layer's weights stays."""
    plain: list[Round] = []
    scaled: list[Round] = []
    config = ClientsConfig(count=2, rounds=1)
    for rounds, scope in ((plain, None), (scaled, ScopeConfig(0.0, rescale=True))):
        clients = blobs(0.75, 0.25)

        def after(model: nn.Module, made: Round, rounds: list[Round] = rounds) -> dict[str, float]:
            rounds.append(made)
            return {}

        federated_rounds(net(), clients, config, settings(0.5), scope=scope, after=after)
    for name in ("first.weight", "last.weight"):
        own = [scope_of(state[name]) for state in plain[0].states]
        assert abs(float(own[0][1] - own[1][1])) > 1e-3
        sd = math.sqrt(0.75 * float(own[0][1]) ** 2 + 0.25 * float(own[1][1]) ** 2)
        mean = 0.75 * float(own[0][0]) + 0.25 * float(own[1][0])
        for before, state in zip(plain[0].states, scaled[0].states, strict=True):
            found = state[name]
            assert float(found.mean()) == pytest.approx(mean, abs=1e-6)
            assert float(found.std(correction=0)) == pytest.approx(sd, rel=1e-5)
            both = torch.stack([before[name].flatten(), found.flatten()])
            assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(1.0, abs=1e-5)
    for name in ("first.bias", "norm.weight"):
        assert torch.equal(plain[0].states[0][name], scaled[0].states[0][name])
    assert plain[0].scope_kl == scaled[0].scope_kl > 0


def test_a_strong_penalty_keeps_scopes_at_the_start() -> None:
    def distance(scope: ScopeConfig | None) -> float:
        model = net()
        before = scope_of(model.first.weight.detach())
        federated_rounds(
            model, blobs(0.5, 0.5), ClientsConfig(count=2, rounds=6), settings(0.2), scope=scope
        )
        return float((scope_of(model.first.weight.detach()) - before)[1].abs())

    # Radially the penalty has curvature 2 strength / (p s^2), about 1.5 here: well below 2 / lr.
    assert distance(ScopeConfig(1.0, "start")) < 0.5 * distance(None)


def test_a_given_scope_is_reached() -> None:
    def after(scope: ScopeConfig | None) -> torch.Tensor:
        model = net()
        rounds = ClientsConfig(count=2, rounds=40)
        federated_rounds(model, blobs(0.5, 0.5), rounds, settings(0.2), scope=scope)
        return scope_of(model.first.weight.detach())

    target = torch.tensor([0.1, float(after(None)[1]) / 2]).double()
    given = ScopeConfig(1.0, "given", mean=0.1, sd=float(target[1]))
    away = [float(divergence(after(scope).double(), target)) for scope in (None, given)]
    assert away[1] < 0.1 * away[0]
    with pytest.raises(NQMError, match="sd would be ignored"):
        ScopeConfig(target="start", sd=0.1)


def test_weights_that_are_not_finite_end_the_rounds() -> None:
    clients = quadratics(1e200 * H, M, SHARES, (4, 4, 4), (2,))
    model = Point(torch.zeros(2, dtype=torch.float64))
    rows = federated_rounds(model, clients, ClientsConfig(count=3, rounds=9), settings())
    assert 1 <= len(rows) < 9


@pytest.mark.parametrize(
    ("shares", "train", "scope", "message"),
    [
        ((0.5, 0.4), {}, None, "sum to 1; got a sum of 0.9"),
        ((1.0,), {}, None, "clients must be 2"),
        ((0.5, 0.5), {"optimizer": "adam"}, None, "train.optimizer must be 'sgd'"),
        ((0.5, 0.5), {"clip_norm": 1.0}, None, "train.clip_norm would be ignored"),
        ((0.5, 0.5), {"precision": "bfloat16"}, None, "got 'bfloat16'"),
        ((0.5, 0.5), {}, ScopeConfig(), "scope needs a trainable weight with two dimensions"),
    ],
)
def test_refused(
    shares: tuple[float, ...], train: dict[str, Any], scope: ScopeConfig | None, message: str
) -> None:
    model = Point(torch.zeros(2, dtype=torch.float64))
    clients = quadratics(H, M, shares, (1, 1), (2,))
    with pytest.raises(NQMError, match=message):
        federated_rounds(model, clients, ClientsConfig(count=2), settings(**train), scope=scope)
