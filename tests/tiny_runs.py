"""Training runs of a second on the embedded digits, and what tests do with them."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neural import data
from neural.data import ImageBatches
from neural.training import checkpoint
from neural.training.config import RunConfig, build
from neural.training.recipe import Recipe, make_recipe
from nqm.errors import NQMError

#: 100 examples: four batches an epoch, the last of them short.
BATCHES = 4
_BASE: dict[str, Any] = {
    "data": {"name": "digits", "batch_size": 32, "train_examples": 100, "test_examples": 60},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"epochs": 3, "lr": 0.05},
}
LATE: dict[str, Any] = {"start_epoch": 1, "members": 3, "select": "head"}
#: Loaded once, by the server that all processes are forked from: they start in a tenth of a second.
_PRELOADED = [
    "neural.training.experiment", "neural.models.small_cnn", "pyarrow.parquet", "sklearn.datasets",
    "sklearn.metrics", "tiny_runs", "torch._dynamo",
]  # fmt: skip
CNN: dict[str, Any] = {"name": "digits_cnn", "width": 4}


def mapping(**sections: Any) -> dict[str, Any]:
    """The smallest run, with entries of its sections changed; a model is replaced whole."""
    made = copy.deepcopy(_BASE)
    for name, value in copy.deepcopy(sections).items():
        whole = name == "model" or not isinstance(value, dict)
        made[name] = value if whole else made.get(name, {}) | value
    return made


def tiny(**sections: Any) -> RunConfig:
    return build(mapping(**sections))


def recipe(arms: dict[str, Any], **sections: Any) -> Recipe:
    return make_recipe("tiny", {**mapping(**sections), "arm": arms})


def batches(run: RunConfig) -> ImageBatches:
    """The same batches as in the run, put together by hand."""
    digits = data.load_images("digits")
    assert digits.train is not None
    return ImageBatches(
        digits.train.subset(100),
        run.data.batch_size,
        mean=digits.mean,
        std=digits.std,
        seed=run.seed,
        dtype=torch.float64 if run.train.precision == "float64" else torch.float32,
    )


def weights(folder: Path, name: str = "model") -> dict[str, Tensor]:
    return checkpoint.load(folder / f"{name}.pt")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    """Everything two finished runs left, but for what tells their machines."""
    names, others = (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
               if path.is_file() and not path.name.startswith("epoch"))
        for folder in (one, other)
    )  # fmt: skip
    assert names == others
    assert {"model.pt", "history.parquet", "result.parquet", "run.json"} <= set(names)
    for name in names:
        if name.endswith(".pt"):
            assert_equal(weights(one, name[:-3]), weights(other, name[:-3]))
        elif name != "run.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


def value(table: Any, weights: str, metric: str, data: str = "test", member: int = -1) -> float:
    """The one entry of a result."""
    chosen = table[
        (table["weights"] == weights)
        & (table["metric"] == metric)
        & (table["data"] == data)
        & (table["member"] == member)
    ]
    assert len(chosen) == 1, f"{len(chosen)} rows"
    return float(chosen["value"].iloc[0])


def _forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def in_process(target: Callable[..., Any], *args: Any) -> tuple[int | None, Any]:
    """Run ``target(*args)`` in a process of its own; its exit code and what it returned."""
    context = _forkserver()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, target, args))
    process.start()
    theirs.close()
    try:
        returned = ours.recv()
    except EOFError:
        returned = None
    process.join()
    return process.exitcode, returned


def _call(pipe: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(target(*args))
    except NQMError as error:
        pipe.send(str(error))


def together(world: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``target(rank, world, *args)`` in processes started as ``torchrun`` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = _forkserver()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        given = (theirs, _joined, (rank, world, port, target, args))
        processes.append(context.Process(target=_call, args=given))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for ours in pipes:
            assert ours.poll(120), "a process waits for another in vain"
        return [ours.recv() for ours in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _joined(
    rank: int, world: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    from neural.training import distributed

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    return target(*distributed.join(), *args)


def train_until_killed(run: RunConfig, folder: Path, moment: int) -> str:
    """Train, with a checkpoint after every step; SIGKILL at the given one of all moments.

    A moment is before a step, or before or after a file takes or loses its name.
    """
    from neural.training import train as module
    from neural.training.state import TrainState

    module.CHECKPOINT_EVERY = -1.0
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any, **kwargs: Any) -> Any:
            count()
            result = call(*args, **kwargs)
            count()
            return result

        return around

    os.replace, os.unlink = watched(os.replace), watched(os.unlink)
    TrainState.step = watched(TrainState.step)  # type: ignore[method-assign]
    return module.train(run, folder).status
