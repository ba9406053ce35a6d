"""Federated rounds: FedAvg, FedProx, SCAFFOLD and FedExP, with or without scope alignment.

A round: every participating client starts with the server's weights, trains on its own examples,
and sends its weights back; the server steps to their mean, weighted by examples. Of what papers
leave open:

- Clients train by SGD with momentum 0 at the start of each round, and none is averaged.
- Buffers (BatchNorm's statistics) are averaged as weights are, by a full step; integers (counters)
  are those of the round's first client.
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
        mean = weighted_mean(states, shares)
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
        return weighted_mean(self.controls, [client.share for client in self.clients])

    def _train(self, k: int, common: State) -> State:
        """Train the model as client k; returns the mean of its gradients if there are controls."""
        client, config = self.clients[k], self.config
        origin = {n: p.detach().clone() for n, p in self.trainable.items()} if config.prox else {}
        gathered = {n: torch.zeros_like(p) for n, p in self.trainable.items()} if common else {}
        own = self.controls[k] if common else {}
        strength = 0.0 if self.scope is None else self.scope.strength
        optimizer = make_optimizer(self.model, self.train)
        steps = 0
        self.model.train()
        with _seeded(self.device, self.seed, self.done, _TRAIN, k):
            for index in range(config.local_epochs):
                epoch = self.done * config.local_epochs + index
                set_lr(optimizer, float(self.train.lr(epoch)))
                for inputs, targets in client.stream.epoch(epoch):
                    optimizer.zero_grad()
                    loss = client.loss(self.model(inputs), targets)
                    torch.autograd.backward(loss)
                    for name, p in self.trainable.items():
                        if p.grad is None:
                            continue
                        if strength and name in self.targets:
                            pull = divergence_gradient(p.detach(), self.targets[name])
                            p.grad.add_(pull, alpha=strength)
                        if gathered:
                            gathered[name] += p.grad
                            p.grad += common[name] - own[name]
                        if origin:
                            p.grad.add_(p.detach() - origin[name], alpha=config.prox)
                    optimizer.step()
                    steps += 1
        return {name: total / steps for name, total in gathered.items()}

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


def weighted_mean(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> State:
    """Average state dicts with weights; sums are in double precision.

    Parameters
    ----------
    states : sequence of mapping of str to Tensor
        With the same names and shapes.
    shares : sequence of float
        Weights, which sum to one.

    Returns
    -------
    dict of str to Tensor
        Tensors of integers are those of the first.
    """
    made = {}
    for name, first in states[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            made[name] = first.clone()
            continue
        wide = torch.promote_types(first.dtype, torch.float64)
        total = first.to(wide) * shares[0]
        for state, share in zip(states[1:], shares[1:], strict=True):
            total += state[name].to(wide) * share
        made[name] = total.to(first.dtype)
    return made


def _copy(state: Mapping[str, Tensor]) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed torch's own draws, e.g. dropout's, for a block; they go on after it as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield
