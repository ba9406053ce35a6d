"""Federated rounds: FedAvg, FedProx, SCAFFOLD and FedExP, with or without scope alignment.

A round: every participating client starts with the server's weights, trains on its own examples,
and sends its weights back; the server steps to their mean, weighted by examples. Of what papers
leave open:

- Clients train by SGD with momentum 0 at the start of each round, and none is averaged.
- Buffers (BatchNorm's statistics) are averaged as weights are, by a full step; of integers
  (counters) the largest is taken. Sums are in double precision.
- A client's control is the mean of its gradients in the round. At a constant rate without momentum
  or decay that is option II of SCAFFOLD, ``control_k - control + (server - x_k) / (steps lr)``. The
  common control is the mean of all clients' controls, weighted by examples.
- FedExP's sums are weighted by examples as well; with M equal clients they are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neural.clients.config import ClientsConfig, ScopeConfig, check_train
from neural.clients.scope import divergence, divergence_gradient, fused, layers, rescaled, scope_of
from neural.data.sampling import keyed_generator
from neural.training import checkpoint
from neural.training.config import TrainConfig
from neural.training.optim import make_optimizer, set_lr
from neural.training.task import Stream
from neural.training.weighted_sum import add_weighted
from nqm.errors import NQMError, check_integer
from nqm.progress import Progress

State = dict[str, Tensor]
#: Purposes of random draws, which belong to their keys.
_DRAW, _TRAIN = 1, 2


@dataclass(frozen=True)
class Client:
    """One client of a federation.

    Attributes
    ----------
    share : float
        Its part of all examples; the shares of all clients sum to one.
    stream : Stream
        Its minibatches. Epoch e of round r (both from 0) is epoch ``r local_epochs + e``.
    loss : callable
        ``loss(model(inputs), targets)``, a scalar.
    """

    share: float
    stream: Stream
    loss: Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Round:
    """What a round leaves beside the server's weights.

    Attributes
    ----------
    number : int
        From 1.
    clients : tuple of int
        Those that took part, increasing.
    shares : tuple of float
        Their weights in the mean, which sum to one.
    states : tuple of dict of str to Tensor
        Their state dicts as the server took them in: rescaled, if the rounds do that.
    mean : dict of str to Tensor
        The mean of `states`.
    drift : float
        Mean distance of the clients' trainable weights from their mean.
    server_step : float
        Step of the server towards the mean.
    scope_kl : float
        Mean divergence, over clients and layers, of the clients' scopes from their mean, before any
        rescaling; NaN if the model has no layer with a scope.
    """

    number: int
    clients: tuple[int, ...]
    shares: tuple[float, ...]
    states: tuple[State, ...]
    mean: State
    drift: float
    server_step: float
    scope_kl: float

    def row(self) -> dict[str, float]:
        """Numbers of the round for a table.

        Returns
        -------
        dict of str to float
        """
        names = ("drift", "server_step", "scope_kl")
        return {"round": self.number} | {name: getattr(self, name) for name in names}


#: Called after each round with the model, which has the server's weights, and the round; returns
#: entries for the round's row.
After = Callable[[nn.Module, Round], Mapping[str, float]]


def federated_rounds(  # noqa: PLR0913 - options, by keyword
    model: nn.Module,
    clients: Sequence[Client],
    config: ClientsConfig,
    train: TrainConfig,
    *,
    scope: ScopeConfig | None = None,
    seed: int = 0,
    after: After | None = None,
    path: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train a model by federated rounds; if they were stopped, go on from the last complete one.

    Parameters
    ----------
    model : Module
        Starts as the server's model, and ends so.
    clients : sequence of Client
        As many as ``config.count``.
    config : ClientsConfig
        Of the rounds.
    train : TrainConfig
        Of the clients' SGD: rate over local epochs, momentum, decay. ``epochs`` is not used.
    scope : ScopeConfig, optional
        Scope alignment.
    seed : int
        Of who takes part and of dropout; the clients' streams have seeds of their own.
    after : callable, optional
        ``after(model, round)``, called after each round; returns entries for its row.
    path : Path, optional
        File of the checkpoint, replaced after each round.
    key : str
        Identity of model, data and settings; a checkpoint with another one is refused.
    progress : callable, optional
        Called as ``progress("rounds", fraction)``.

    Returns
    -------
    list of dict
        For each round: round, drift, server_step, scope_kl (see `Round`), and what `after` gave.
        Fewer than ``config.rounds`` if the weights were no longer finite after the last of them.

    Raises
    ------
    NQMError
        If settings do not fit, or the checkpoint is damaged or another one's.
    """
    check_train(train)
    check_integer("seed", seed, 0)
    if len(clients) != config.count:
        raise NQMError(f"clients must be {config.count}, as clients.count says; got {len(clients)}")
    total = math.fsum(client.share for client in clients)
    if any(client.share <= 0 for client in clients) or abs(total - 1.0) > 1e-9:
        raise NQMError(f"shares of clients must be positive and sum to 1; got a sum of {total:g}")
    if scope is not None and not layers(model):
        raise NQMError("scope needs a trainable weight with two dimensions; the model has none")
    rounds = _Rounds(model, clients, config, train, scope, seed)
    if path is not None and path.exists():
        rounds.load(checkpoint.load(path, rounds.device), path, key)
    while rounds.done < config.rounds and rounds.finite:
        made = rounds.next()
        row = made.row() | dict(after(model, made) if after is not None else {})
        rounds.rows.append(row)
        if path is not None:
            checkpoint.save(path, rounds.state_dict(key))
        if progress is not None:
            progress("rounds", rounds.done / config.rounds)
    return rounds.rows


def train_client(  # noqa: PLR0913 - options, by keyword
    model: nn.Module,
    client: Client,
    config: ClientsConfig,
    train: TrainConfig,
    *,
    number: int,
    done: int,
    seed: int = 0,
    scope: ScopeConfig | None = None,
    targets: Mapping[str, Tensor] | None = None,
    corrections: Mapping[str, Tensor] | None = None,
) -> State:
    """Train a model as one client does in one round.

    Parameters
    ----------
    model : Module
        Starts with the server's weights, and ends with the client's.
    client : Client
        Its examples and loss.
    config : ClientsConfig
        Gives ``local_epochs`` and ``prox``, the pull to the weights with which the model starts.
    train : TrainConfig
        Of the SGD.
    number : int
        Of the client; with `done` and `seed` the key of dropout's draws.
    done : int
        Number of complete rounds.
    seed : int
    scope : ScopeConfig, optional
        Gives the strength of scope alignment.
    targets : mapping of str to Tensor, shape (2,), optional
        Scopes to which layers are pulled.
    corrections : mapping of str to Tensor, optional
        SCAFFOLD's ``common control - own``, added to the gradients of all trainable weights.

    Returns
    -------
    dict of str to Tensor
        Mean of the gradients without corrections and FedProx's pull, by name of the weight; empty
        if there are no corrections.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trainable.values())).device
    origin = {n: p.detach().clone() for n, p in trainable.items()} if config.prox else {}
    gathered = {n: torch.zeros_like(p) for n, p in trainable.items()} if corrections else {}
    strength = 0.0 if scope is None else scope.strength
    pulled = targets if targets is not None and strength else {}
    optimizer = make_optimizer(model, train)
    steps = 0
    model.train()
    with _seeded(device, seed, done, _TRAIN, number):
        for index in range(config.local_epochs):
            epoch = done * config.local_epochs + index
            set_lr(optimizer, float(train.lr(epoch)))
            for inputs, labels in client.stream.epoch(epoch):
                optimizer.zero_grad()
                torch.autograd.backward(client.loss(model(inputs), labels))
                for name, p in trainable.items():
                    if p.grad is None:
                        continue
                    if name in pulled:
                        p.grad.add_(divergence_gradient(p.detach(), pulled[name]), alpha=strength)
                    if corrections:
                        gathered[name] += p.grad
                        p.grad += corrections[name]
                    if origin:
                        p.grad.add_(p.detach() - origin[name], alpha=config.prox)
                optimizer.step()
                steps += 1
    return {name: total / steps for name, total in gathered.items()}


class _Rounds:
    """The server between two rounds."""

    def __init__(
        self,
        model: nn.Module,
        clients: Sequence[Client],
        config: ClientsConfig,
        train: TrainConfig,
        scope: ScopeConfig | None,
        seed: int,
    ):
        self.model, self.clients, self.config, self.train = model, clients, config, train
        self.scope, self.seed = scope, seed
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise NQMError("the model has no trainable weight, so that clients have none to train")
        # A tied weight has several names in the state dict, and is known here by the first.
        firsts = {id(p): n for n, p in self.trainable.items()}
        self.moved = {
            n: firsts[id(p)]
            for n, p in model.named_parameters(remove_duplicate=False)
            if p.requires_grad
        }
        self.buffers = {n for n, _ in model.named_buffers(remove_duplicate=False)}
        self.device = next(iter(self.trainable.values())).device
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.targets = {n: scope_of(p.detach()) for n, p in layers(model).items()}
        if scope is not None and scope.target == "given":
            chosen = torch.tensor([scope.mean, scope.sd])
            self.targets = {n: chosen.to(value) for n, value in self.targets.items()}
        zeros = {n: torch.zeros_like(p) for n, p in self.trainable.items()}
        self.controls = [
            {n: value.clone() for n, value in zeros.items()}
            for _ in (clients if config.control else ())
        ]

    @property
    def finite(self) -> bool:
        return all(bool(p.detach().isfinite().all()) for p in self.trainable.values())

    def state_dict(self, key: str) -> dict[str, Any]:
        return {
            "key": key, "round": self.done, "server": self.model.state_dict(),
            "controls": self.controls, "targets": self.targets, "rows": self.rows,
        }  # fmt: skip

    def load(self, content: Mapping[str, Any], path: Path, key: str) -> None:
        if content.get("key") != key:
            raise NQMError(
                f"{path} holds rounds of another configuration; move it away or use --out OTHER; "
                "nothing was overwritten"
            )
        try:
            self.model.load_state_dict(content["server"])
            self.done, self.rows = content["round"], list(content["rows"])
            self.controls, self.targets = content["controls"], content["targets"]
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise NQMError(f"{path} is damaged ({reason:.80}); delete it and run again") from None

    def next(self) -> Round:
        """Do one round; the model then has the server's new weights."""
        start = _copy(self.model.state_dict())
        chosen = self._drawn()
        part = math.fsum(self.clients[k].share for k in chosen)
        # Divided by a sum of exactly 1 where all take part.
        shares = tuple(self.clients[k].share / part for k in chosen)
        common = self._common_control()
        controls = list(self.controls)
        states = []
        for k in chosen:
            self.model.load_state_dict(start)
            mean_gradient = self._train(k, common)
            if self.config.control:
                controls[k] = mean_gradient
            states.append(_copy(self.model.state_dict()))
        self.controls = controls
        scope_kl = self._scopes(states, shares)
        mean = _mean(states, shares)
        moves = [self._distance(state, start) for state in states]
        step = self._server_step(moves, shares, self._distance(mean, start))
        away = [self._distance(state, mean) for state in states]
        drift = math.fsum(q * d for q, d in zip(shares, away, strict=True))
        self.model.load_state_dict(self._stepped(start, mean, step))
        self.done += 1
        return Round(self.done, chosen, shares, tuple(states), mean, drift, step, scope_kl)

    def _drawn(self) -> tuple[int, ...]:
        count = len(self.clients)
        order = torch.randperm(count, generator=keyed_generator(self.seed, self.done, _DRAW))
        return tuple(sorted(order[: self.config.participants].tolist()))

    def _common_control(self) -> State:
        if not self.config.control:
            return {}
        return _mean(self.controls, [client.share for client in self.clients])

    def _train(self, k: int, common: State) -> State:
        """Train the model as client k; returns the mean of its gradients if there are controls."""
        own = self.controls[k] if common else {}
        return train_client(
            self.model, self.clients[k], self.config, self.train,
            number=k, done=self.done, seed=self.seed,
            scope=self.scope, targets=self.targets,
            corrections={n: common[n] - value for n, value in own.items()},
        )  # fmt: skip

    def _scopes(self, states: list[State], shares: tuple[float, ...]) -> float:
        """Compare the clients' scopes; rescale the clients, and set the next target, if asked."""
        names = list(layers(self.model))
        if not names:
            return math.nan
        scopes = [{n: scope_of(state[n]) for n in names} for state in states]
        common = fused(scopes, shares)
        each = [
            sum(float(divergence(scope[n], common[n])) for n in names) / len(names)
            for scope in scopes
        ]
        if self.scope is not None and self.scope.target == "fused":
            self.targets = common
        if self.scope is not None and self.scope.rescale:
            for state in states:
                for n, first in self.moved.items():
                    if first in common:
                        state[n] = rescaled(state[n], common[first])
        return math.fsum(q * kl for q, kl in zip(shares, each, strict=True))

    def _distance(self, one: State, other: State) -> float:
        squares = (float((one[n] - other[n]).double().square().sum()) for n in self.trainable)
        return math.sqrt(math.fsum(squares))

    def _server_step(
        self, moves: Sequence[float], shares: Sequence[float], mean_move: float
    ) -> float:
        if not self.config.extrapolate:
            return self.config.server_lr
        mean_square = math.fsum(q * move**2 for q, move in zip(shares, moves, strict=True))
        return max(1.0, mean_square / (2.0 * mean_move**2)) if mean_move else 1.0

    def _stepped(self, start: State, mean: State, step: float) -> State:
        """The server's new state: trainable weights by the step, buffers by a full one."""
        made = {}
        for name, value in mean.items():
            if name in self.buffers:
                made[name] = value
            elif name not in self.moved:
                made[name] = start[name]
            else:
                made[name] = value if step == 1.0 else torch.lerp(start[name], value, step)
        return made


def _mean(states: Sequence[State], shares: Sequence[float]) -> State:
    total = add_weighted(zip(shares, states, strict=True), double=True)
    return {name: value.to(states[0][name].dtype) for name, value in total.items()}


def _copy(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed torch's own draws, e.g. dropout's, for a block; they go on after it as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield
