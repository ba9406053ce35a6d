"""Federated averaging over a network with Flower: one server, and clients that train as ours do.

On one machine, server and clients in processes of their own::

    python docs/examples/flower_clients.py digits_bn --rounds 3 --clients 2 --prox 0.1

On several machines, each with the same recipe and settings, so that all divide the same data::

    python docs/examples/flower_clients.py digits_bn --clients 2 --serve 0.0.0.0:8080
    python docs/examples/flower_clients.py digits_bn --clients 2 --join server:8080 --number 0
    python docs/examples/flower_clients.py digits_bn --clients 2 --join server:8080 --number 1

A client of yours replaces `opened` by its own model, examples and loss. The connection is not
encrypted: for use outside a network that you trust see Flower's pages on TLS.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import numpy as np
import torch
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg
from torch import nn

from neural.clients import Client, make_clients, start_model, train_client
from neural.clients.config import ClientsConfig, check_train
from neural.training.config import RunConfig
from neural.training.recipe import load_recipe
from neural.training.task import Runtime, open_task
from nqm.errors import NQMError

Arrays = list[np.ndarray[Any, Any]]


def to_arrays(model: nn.Module) -> Arrays:
    """All of the state dict: weights, and buffers such as BatchNorm's statistics."""
    return [value.detach().cpu().numpy().copy() for value in model.state_dict().values()]


def set_arrays(model: nn.Module, arrays: Arrays) -> None:
    """Set the state dict; the mean of counters is rounded, as the server knows no integers."""
    state = model.state_dict()
    for value, array in zip(state.values(), arrays, strict=True):
        if not value.is_floating_point():
            array = np.rint(array)
        value.copy_(torch.from_numpy(np.asarray(array)))


class TrainingClient(NumPyClient):
    """A client of Flower that trains as a client of `neural.clients` does.

    FedProx's pull (``config.prox``) is added here, in training: Flower's strategy of that name does
    not change the loss, it only sends its coefficient to the clients.
    """

    def __init__(
        self, model: nn.Module, client: Client, examples: int, run: RunConfig,
        config: ClientsConfig, number: int,
    ):  # fmt: skip
        self.model, self.client, self.examples = model, client, examples
        self.run, self.config, self.number = run, config, number

    def fit(self, parameters: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        """Train for a round; the server weighs the weights by the number of examples."""
        set_arrays(self.model, parameters)
        train_client(
            self.model, self.client, self.config, self.run.train,
            number=self.number, done=int(config["done"]), seed=self.run.seed,
        )  # fmt: skip
        return to_arrays(self.model), self.examples, {}


class KeepingFedAvg(FedAvg):
    """FedAvg that keeps the newest weights, which `start_server` does not return."""

    newest: Arrays

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """See `FedAvg`; a failure of a client ends the rounds."""
        if failures:
            raise RuntimeError(f"{len(failures)} clients failed in round {server_round}")
        # In the order of answers the sum would differ in its last bits from run to run.
        results = sorted(results, key=lambda one: one[1].num_examples)
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.newest = parameters_to_ndarrays(parameters)
        return parameters, metrics


def opened(run: RunConfig, config: ClientsConfig) -> tuple[nn.Module, list[Client], list[int]]:
    """The model at its start, the clients, and how many examples each has."""
    task = open_task(run, Runtime())
    clients = make_clients(run, task, config)
    total = len(task.stream.images)
    return start_model(run, task), clients, [round(one.share * total) for one in clients]


def serve(run: RunConfig, config: ClientsConfig, address: str) -> nn.Module:
    """Run the rounds as their server; returns the model after the last."""
    model, _, _ = opened(run, config)
    strategy = KeepingFedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=config.count,
        min_available_clients=config.count,
        initial_parameters=ndarrays_to_parameters(to_arrays(model)),
        on_fit_config_fn=lambda number: {"done": number - 1},
    )
    start_server(
        server_address=address, config=ServerConfig(num_rounds=config.rounds), strategy=strategy
    )
    set_arrays(model, strategy.newest)
    return model


def join(run: RunConfig, config: ClientsConfig, address: str, number: int) -> None:
    """Take part as a client until the server ends."""
    torch.set_num_threads(1)
    model, clients, examples = opened(run, config)
    one = TrainingClient(model, clients[number], examples[number], run, config, number)
    start_client(server_address=address, client=one.to_client(), insecure=True, max_wait_time=60)


def on_loopback(run: RunConfig, config: ClientsConfig) -> nn.Module:
    """Server here, each client in a process of its own; returns the model after the last round."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=join, args=(run, config, address, k), daemon=True)
        for k in range(config.count)
    ]
    for process in processes:
        process.start()
    try:
        return serve(run, config, address)
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def main() -> None:
    """See the text at the top."""
    parser = argparse.ArgumentParser(description="Federated averaging with Flower")
    parser.add_argument("recipe")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--prox", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("flower.pt"), help="file of the model")
    parser.add_argument("--serve", metavar="ADDRESS")
    parser.add_argument("--join", metavar="ADDRESS")
    parser.add_argument("--number", type=int, default=0, help="of the client that joins")
    given = parser.parse_args()
    try:
        run = next(iter(load_recipe(given.recipe, given.scale, given.set).arms.values()))
        config = ClientsConfig(count=given.clients, rounds=given.rounds, prox=given.prox)
        check_train(run.train)
    except NQMError as error:
        parser.error(str(error))
    if given.join and not 0 <= given.number < given.clients:
        parser.error(f"--number must be in 0..{given.clients - 1}; got {given.number}")
    torch.set_num_threads(1)
    if given.join:
        return join(run, config, given.join, given.number)
    model = serve(run, config, given.serve) if given.serve else on_loopback(run, config)
    torch.save(model.state_dict(), given.out)
    print(given.out)


if __name__ == "__main__":
    main()
