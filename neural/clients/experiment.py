"""Federated rounds on a set of images, kept in a folder.

::

    checkpoint.pt      state after the last complete round; deleted at the end
    history.parquet    one row for each round
    model.pt           the server's model, a plain state dict
    members/           the clients of the last round, and members.json, the list of them
    clients.png, .pdf  accuracy and drift over rounds
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from neural.clients.config import ClientsConfig, ScopeConfig, check_train
from neural.clients.rounds import Client, Round, federated_rounds
from neural.clients.scope import layers
from neural.clients.shards import dirichlet_shards
from neural.data import ImageBatches, Images
from neural.data.sampling import keyed_generator
from neural.training import checkpoint, preflight
from neural.training.build import make_model
from neural.training.config import EvaluateConfig, RunConfig, describe, differing
from neural.training.run_folder import check_no_run
from neural.training.task import DTYPES, Runtime, Task, open_task
from nqm import __version__, keys
from nqm.errors import NQMError
from nqm.files import locked, replacing
from nqm.progress import Progress
from nqm.table import Stamp, finished, write_table

#: Purpose of the clients' seeds, which belongs to their key.
_STREAM = 3
#: Tensors of the weights' size beside the clients': server, start, mean, gradients, momentum.
_HELD = 5


def make_clients(run: RunConfig, task: Task, config: ClientsConfig) -> list[Client]:
    """Divide a run's training images among clients.

    Parameters
    ----------
    run : RunConfig
        Gives minibatches, augmentation and seed.
    task : Task
        Its data.
    config : ClientsConfig
        Number of clients, and how they differ.

    Returns
    -------
    list of Client
        Shares are in proportion to examples.

    Raises
    ------
    NQMError
        If the data are not images in memory, or cannot be divided.
    """
    stream = task.stream
    if not isinstance(stream, ImageBatches):
        raise NQMError(
            f"clients need a set of images in memory; {task.label} is read otherwise; choose "
            "another data.name"
        )
    images = stream.images
    shards = dirichlet_shards(
        images, config.count, config.dirichlet, seed=run.seed, least=config.least_examples
    )
    made = []
    for k, index in enumerate(shards):
        at = index.to(images.pixels.device)
        part = ImageBatches(
            Images(images.pixels[at], images.labels[at]),
            run.data.batch_size,
            mean=stream.mean.tolist(),
            std=stream.std.tolist(),
            augment=stream.augment,
            cutout=stream.cutout,
            sampling=stream.sampling,
            seed=keyed_generator(run.seed, _STREAM, k).initial_seed() >> 1,
            device=images.pixels.device,
            dtype=stream.dtype,
            memory_format=stream.memory_format,
        )
        made.append(Client(len(index) / len(images), part, task.loss))
    return made


def run_clients(
    run: RunConfig,
    config: ClientsConfig,
    out: str | Path,
    *,
    scope: ScopeConfig | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Train by federated rounds; killed rounds go on, finished ones are only read.

    Parameters
    ----------
    run : RunConfig
        Data, model and SGD of the clients. The rate is a function of local epochs;
        ``train.epochs``, ``average`` and all but the batch size of ``evaluate`` are not used.
    config : ClientsConfig
    out : str or Path
        Folder for the results.
    scope : ScopeConfig, optional
        Scope alignment.
    runtime : Runtime, optional
        Device and folder of data files; one CPU by default.
    progress : callable, optional
        Called as ``progress("rounds", fraction)``.

    Returns
    -------
    DataFrame
        One row for each round: round, accuracy and nll of the server's model on the test set,
        drift, server_step and scope_kl (see `neural.clients.rounds.Round`), epochs_total (passes
        over all training examples so far) and, with ``barrier``, mean_member_nll and barrier.

    Raises
    ------
    NQMError
        If something does not fit, before the first round; or the folder holds other results.
    """
    runtime, out = runtime or Runtime(), Path(out)
    check_train(run.train)
    if run.late_phase is not None:
        raise NQMError("late_phase: clients have no late-phase members; choose an arm without")
    check_no_run(out)
    # Only test metrics are measured, and there is no average over time.
    evaluate = EvaluateConfig(batch_size=run.evaluate.batch_size)
    run = replace(run, average=None, evaluate=evaluate)
    stamp = _stamp(run, config, scope)
    target = out / "history.parquet"
    if target.exists() and (table := finished(target, stamp)) is not None:
        return table
    task = open_task(run, runtime)
    clients = make_clients(run, task, config)
    model = start_model(run, task, runtime)
    _check(run, runtime, task, clients, model, config, scope)
    finished(target, stamp)  # makes the folder, or says why it cannot
    with locked(out, folder=True):
        rows = federated_rounds(
            model, clients, config, run.train,
            scope=scope, seed=run.seed, after=_After(task, config, clients, out),
            path=out / "checkpoint.pt", key=stamp.key, progress=progress,
        )  # fmt: skip
        table = pd.DataFrame(rows)
        table["epochs_total"] = table["epochs_total"].cumsum()
        checkpoint.save(out / "model.pt", model.state_dict())
        write_table(target, table, stamp.metadata())
        (out / "checkpoint.pt").unlink(missing_ok=True)
    return table


def _stamp(run: RunConfig, config: ClientsConfig, scope: ScopeConfig | None) -> Stamp:
    """Identity of the results: what they depend on, without what is not used."""
    used = replace(run, train=replace(run.train, epochs=1))
    parts = {"clients": config} | ({"scope": scope} if scope is not None else {})
    key = keys.key(differing(used) | {n: keys.differing(part) for n, part in parts.items()})
    stated = {n: part for n, part in describe(used).items() if n != "evaluate"}
    del stated["train"]["epochs"]
    return Stamp(key, __version__, stated | {n: asdict(part) for n, part in parts.items()})


def start_model(run: RunConfig, task: Task, runtime: Runtime | None = None) -> nn.Module:
    """Make the server's model of the first round.

    Parameters
    ----------
    run : RunConfig
        Gives architecture, precision and seed.
    task : Task
        Its data.
    runtime : Runtime, optional
        Device and folder of checkpoints; one CPU by default.

    Returns
    -------
    Module
    """
    runtime = runtime or Runtime()
    torch.manual_seed(run.seed)
    model = make_model(run.model, task, root=runtime.root)
    model = model.to(runtime.device, DTYPES[run.train.precision])
    if run.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


class _After:
    """Measure the server's model after a round, and keep the last round's clients."""

    def __init__(self, task: Task, config: ClientsConfig, clients: Sequence[Client], out: Path):
        self.task, self.config, self.clients, self.out = task, config, clients, out

    def __call__(self, model: nn.Module, made: Round) -> Mapping[str, float]:
        score = self.task.score(model)
        part = math.fsum(self.clients[k].share for k in made.clients)
        row = {
            "accuracy": score.accuracy, "nll": score.loss,
            "epochs_total": part * self.config.local_epochs,
        }  # fmt: skip
        if self.config.barrier:
            server = {n: value.clone() for n, value in model.state_dict().items()}
            losses = [self._nll(model, state) for state in (*made.states, made.mean)]
            model.load_state_dict(server)
            row["mean_member_nll"] = math.fsum(
                q * loss for q, loss in zip(made.shares, losses, strict=False)
            )
            row["barrier"] = max(0.0, losses[-1] - row["mean_member_nll"])
        if made.number == self.config.rounds:
            self._write_members(made)
        return row

    def _nll(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> float:
        model.load_state_dict(state)
        return self.task.score(model).loss

    def _write_members(self, made: Round) -> None:
        folder = self.out / "members"
        folder.mkdir(exist_ok=True)
        entries = []
        local = self.config.local_epochs
        for k, state in zip(made.clients, made.states, strict=True):
            name = f"client{k}"
            checkpoint.save(folder / f"{name}.pt", state)
            share = self.clients[k].share
            # In passes over all examples; the rounds before are shared by all clients.
            trunk = (made.number - 1) * local * self.config.participants / self.config.count
            entries.append(
                {"name": name, "file": f"{name}.pt", "epochs": local * share, "trunk": trunk,
                 "share": share}
            )  # fmt: skip
        with replacing(folder / "members.json") as stream:
            stream.write(json.dumps(entries, indent=1).encode())


def _check(
    run: RunConfig,
    runtime: Runtime,
    task: Task,
    clients: Sequence[Client],
    model: nn.Module,
    config: ClientsConfig,
    scope: ScopeConfig | None,
) -> None:
    """Refuse what could fail during the rounds."""
    preflight.check_run(run, runtime, task)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held = config.participants + config.control * config.count + _HELD
    if (needed := held * weights) > (limit := preflight.memory(runtime.device)):
        raise NQMError(
            f"clients.count = {config.count} takes {needed / 2**30:,.1f} GiB, as all clients' "
            f"weights are held, and there are {limit / 2**30:,.1f} GiB; lower it"
        )
    if scope is not None and not layers(model):
        raise NQMError(f"scope: {run.model.name} has no trainable weight with two dimensions")
    preflight.rehearse(run, runtime, task, {})
    _check_last_batches(run, clients, model)


def _check_last_batches(run: RunConfig, clients: Sequence[Client], model: nn.Module) -> None:
    """Run each client's smallest minibatch: BatchNorm cannot train on one number a channel."""
    sizes: dict[int, int] = {}
    for k, client in enumerate(clients):
        assert isinstance(client.stream, ImageBatches)
        last = client.stream.plan.slices()[-1]
        sizes.setdefault(last.stop - last.start, k)
    state = {n: value.clone() for n, value in model.state_dict().items()}
    for size in sorted(sizes)[:1]:
        inputs, targets = next(iter(clients[sizes[size]].stream.epoch(0)))
        model.train()
        try:
            clients[sizes[size]].loss(model(inputs[:size]), targets[:size])
        except Exception as error:  # a model may raise errors of many kinds
            reason = " ".join(str(error).split())
            raise NQMError(
                f"the last minibatch of client {sizes[size]} has {size} of its "
                f"{len(clients[sizes[size]].stream.images)} examples, on which "  # type: ignore[attr-defined]
                f"{run.model.name} cannot train ({reason:.80}); change data.batch_size or seed"
            ) from None
        finally:
            model.load_state_dict(state)


def draw(table: pd.DataFrame, out: Path, title: str) -> list[Path]:
    """Draw accuracy and drift over rounds, as PNG and PDF.

    Parameters
    ----------
    table : DataFrame
        Result of `run_clients`.
    out : Path
        Folder for ``clients.png`` and ``clients.pdf``.
    title : str

    Returns
    -------
    list of Path
        The files.
    """
    from figures import clients as pictures
    from figures import style

    with style.context():
        figure = style.new_figure(style.PAGE, 2.2)
        left, right = figure.subplots(1, 2)
        pictures.over_rounds(table, column="accuracy", ax=left)
        pictures.over_rounds(table, column="drift", ax=right)
    return style.finish(figure, out / "clients", title)


def words(table: pd.DataFrame, config: ClientsConfig) -> list[str]:
    """Say in a line or two how the rounds ended.

    Parameters
    ----------
    table : DataFrame
        Result of `run_clients`.
    config : ClientsConfig

    Returns
    -------
    list of str
    """
    last: Any = table.iloc[-1]
    lines = [
        f"round {last['round']:.0f} of {config.rounds}: accuracy {last['accuracy']:.4f}, nll "
        f"{last['nll']:.4f}, drift {last['drift']:.4g}"
    ]
    if last["round"] < config.rounds or not math.isfinite(last["nll"]):
        lines.append("diverged: the weights are not finite; lower train.lr or clients.server_lr")
    if last.get("barrier", 0.0) > 0:
        lines.append(f"the clients' mean is worse than its mean client by {last['barrier']:.4f}")
    return lines
