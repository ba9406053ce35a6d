"""The independent trainings of a bridge in several processes, which fill its cache.

A process does with one training what `measure`, `predict` and `compare` would do, and keeps every
result in the cache. The bridge then finds all of them there. Its tables are therefore the same for
any number of processes, and a bridge that is killed continues from what is finished.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neural.bridge.api import WITHOUT_NOISE, Options, parts_of, store_part, store_training
from neural.bridge.comparison import minibatches_of, training_work
from neural.bridge.config import BridgeConfig, Plan
from neural.bridge.drift import passes_at_displacements
from neural.bridge.held_out import DISPLACEMENTS
from neural.curvature.cache import Cache
from neural.curvature.examples import input_rows
from neural.curvature.risk import TOGETHER, EmpiricalRisk
from neural.late_phase.rows import arguments
from neural.training.cost import PROCESS, SMALL
from neural.training.task import Task
from neural.training.workers import run_in_workers
from nqm.errors import NQMError
from nqm.limits import memory_limit
from nqm.progress import Progress

#: Minibatches of all trainings below which starting processes takes longer than the trainings.
FEW = 10_000


@dataclass(frozen=True)
class Bridged:
    """What all processes of a bridge need.

    Attributes
    ----------
    risk : EmpiricalRisk
        The network's training loss.
    test : EmpiricalRisk
        Its test loss.
    config : BridgeConfig
        What is measured, and which trainings are predicted.
    plan : Plan
        How many runs are trained, and which averages are evaluated.
    folder : Path
        Folder of the cache.
    """

    risk: EmpiricalRisk
    test: EmpiricalRisk
    config: BridgeConfig
    plan: Plan
    folder: Path

    def options(self, progress: Progress | None = None) -> Options:
        """Arguments of the stages, with a cache of this process."""
        cache = Cache(self.folder)
        return Options(config=self.config, seed=self.plan.seed, cache=cache, progress=progress)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Index of the part and of its training (`store_training`), for all trainings."""
        parts = parts_of(self.plan, **self.options())
        return [
            (part, training)
            for part, (_, options) in enumerate(parts)
            for training in range(len(options["config"].trainings(1.0)))
        ]


def fill_cache(
    bridged: Bridged, workers: int, device: torch.device, progress: Progress | None = None
) -> None:
    """Compute all results of a bridge's trainings in several processes.

    Parameters
    ----------
    bridged : Bridged
        The bridge; slope, curvature and noise at the checkpoint are in its cache.
    workers : int
        Number of processes.
    device : torch.device
        The CPU, or the first of the GPUs that the processes take in turn.
    progress : callable, optional
        Called with the name of a stage and the fraction of it that is done.

    Raises
    ------
    NQMError
        If the network cannot be sent to another process, a process ends unexpectedly, or a stage
        raises it.
    """
    try:
        content = pickle.dumps(bridged)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise NQMError(
            f"the network cannot be sent to other processes ({reason:.120}); use --workers 1"
        ) from None
    cells = len(bridged.cells)
    parts = bridged.cells[-1][0] + 1
    if parts == 1:
        store_part(bridged.risk, bridged.plan, 0, **bridged.options(progress))
    else:
        together = min(workers, parts)
        run_in_workers(partial(_part, content), parts, together, device, "averages", progress)
    stage = f"{cells} trainings, {workers} at a time"
    run_in_workers(partial(_cell, content), cells, min(workers, cells), device, stage, progress)


def _part(content: bytes, index: int, device: torch.device, progress: Progress) -> None:
    bridged: Bridged = pickle.loads(content)
    store_part(bridged.risk, bridged.plan, index, **bridged.options(progress))


def _cell(content: bytes, index: int, device: torch.device, progress: Progress) -> None:
    bridged: Bridged = pickle.loads(content)
    part, training = bridged.cells[index]
    store_training(
        bridged.risk,
        bridged.plan,
        part,
        training,
        test=bridged.test,
        train=bridged.config.train,
        **bridged.options(_joined(_work(bridged), progress)),
    )


def _work(bridged: Bridged) -> dict[str, float]:
    """Work of the stages of one training, about, in gradients of all examples."""
    config, plan, examples = bridged.config, bridged.plan, bridged.risk.examples
    tested = bridged.test.examples / examples
    kinds = 1 + len(plan.averages(config.trainings(1.0)[0]))
    at_displacements = passes_at_displacements(config.displacements, examples)
    work = {
        WITHOUT_NOISE: float(config.steps),
        "third derivatives": at_displacements + 2.0 * TOGETHER * config.lanczos_steps,
        "test loss": 2.0 * kinds * min(config.displacements, DISPLACEMENTS) * tested,
    }
    if config.train:
        training = config.trainings(1.0)[0]
        work["train"] = training_work(training, plan, bridged.risk, bridged.test) / examples
    return work


def _joined(work: dict[str, float], progress: Progress) -> Progress:
    """Report the share of all work from that of the stages, which come one after the other."""
    names, total = list(work), sum(work.values())

    def told(stage: str, share: float) -> None:
        if stage.endswith(WITHOUT_NOISE):  # of one rate, which it names
            stage = WITHOUT_NOISE
        if stage in work:
            before = sum(work[name] for name in names[: names.index(stage)])
            progress(stage, (before + share * work[stage]) / total)

    return told


def side_by_side(model: nn.Module, task: Task, config: BridgeConfig, plan: Plan) -> int | None:
    """Number of processes of one thread each that compute a small net's bridge fastest on a CPU.

    Parameters
    ----------
    model : Module
        The network.
    task : Task
        Its data.
    config, plan
        The bridge.

    Returns
    -------
    int or None
        At most one for each training and processor, as memory allows; 1 if the trainings are over
        sooner than processes start. None if the net is large
        enough for several threads.
    """
    inputs, targets = next(iter(task.test()))
    tensors, make = input_rows(inputs, len(targets))
    args, kwargs = arguments(make([tensor[:2] for tensor in tensors]))
    counter = FlopCounterMode(display=False)
    # Of weights without gradients: the counter fails on views of a parameter under `no_grad`.
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    was = model.training
    with counter, torch.no_grad():
        torch.func.functional_call(model.eval(), weights, args, kwargs)
    model.train(was)
    # A backward pass takes twice as many as the forward pass.
    each = 3.0 * counter.get_total_flops() / min(2, len(targets))
    if each * max(config.batch_sizes) * (config.batchnorm_group or 1) > SMALL:
        return None
    trainings = config.trainings(1.0)
    cells = len(trainings) * (1 if plan.late_phase is None else len(plan.members))
    if config.train and len(trainings) * config.steps * minibatches_of(plan) < FEW:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cells, cores or 1, memory_limit() // PROCESS))
