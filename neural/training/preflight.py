"""Checks of a run before its first step of training.

`check_size` counts weights without allocating them, `check_cycles` counts minibatches, and
`rehearse` does everything that the run will do once, on a few examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from neural.data import Images
from neural.data.sampling import EpochPlan
from neural.late_phase.members import Batch
from neural.late_phase.ready import is_recurrent
from neural.late_phase.select import select
from neural.training import report
from neural.training.build import make_model
from neural.training.config import RunConfig
from neural.training.snapshots import plain_state
from neural.training.state import TrainState
from neural.training.task import DTYPES, Runtime, Stream, Task
from nqm.errors import NQMError, NQMWarning
from nqm.limits import available_memory

#: Largest number of rows of a rehearsed minibatch.
ROWS = 4
#: Least number of tensors of the weights' size in training: weights, gradients, momentum.
HELD = 3


def check_run(run: RunConfig, runtime: Runtime, task: Task) -> None:
    """Check that a run can be trained, without large allocations and without running the model.

    Parameters
    ----------
    run : RunConfig
        The run.
    runtime : Runtime
        Gives the device.
    task : Task
        Its data.

    Raises
    ------
    NQMError
        If the late phase completes no cycle, the memory is too small, a selection matches no
        weight, a fused pass would have to be compiled, torch cannot compile, BatchNorm cannot be
        synchronised, or the GPU has no bfloat16.
    """
    late = run.late_phase
    if run.train.compile and late is not None and late.fused:
        raise NQMError(
            "train.compile does not compile the pass of late_phase.fused; set one of them to false"
        )
    if run.train.sync_batchnorm and runtime.world > 1:
        # Processes with parts of different sizes would not run the layers equally often.
        for name, used in (
            ("train.compile", run.train.compile),
            ("late_phase.fused", late is not None and late.fused),
            ("train.micro_batches", run.train.micro_batches > 1),
        ):
            if used:
                raise NQMError(f"train.sync_batchnorm does not work with {name}; leave one out")
    if run.train.precision == "bfloat16" and runtime.device.type == "cuda":
        _check_bfloat16(runtime.device)
    check_cycles(run, len(task.stream))
    check_size(run, runtime, task)
    if run.train.compile:
        check_compiler(runtime.device)


def _check_bfloat16(device: torch.device) -> None:
    """Raise NQMError if a GPU has no bfloat16, which torch would emulate slowly or refuse."""
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NQMError(
            f"train.precision = 'bfloat16' needs a GPU that has it, of compute capability 8.0 or "
            f"newer; {torch.cuda.get_device_name(device)} has none; set it to 'float32'"
        )


@cache
def check_compiler(device: torch.device) -> None:
    """Check that torch compiles for a device, by one small function.

    Parameters
    ----------
    device : device
        Where it runs.

    Raises
    ------
    NQMError
        If it does not, e.g. as there is no C++ compiler, or no Triton for a GPU.
    """
    try:
        torch.compile(lambda x: x.sin() + 1.0)(torch.ones(2, device=device))
    except Exception as error:  # of a compiler, a library or a driver
        reason = " ".join(str(error).split())
        raise NQMError(
            f"train.compile: torch cannot compile for {device} here ({reason:.150}); install a C++ "
            "compiler, and Triton for a GPU, or set it to false"
        ) from None


def check_cycles(run: RunConfig, batches: int) -> None:
    """Check that the members complete a cycle, and the average is over one if there is an average.

    Parameters
    ----------
    run : RunConfig
        The run.
    batches : int
        Number of minibatches of an epoch.

    Raises
    ------
    NQMError
        If there are more members than minibatches for a cycle, or an average of every step starts
        after the last cycle.
    """
    late, average = run.late_phase, run.average
    if late is None:
        return
    carries = late.leftover == "carry"
    available = (run.train.epochs - late.start_epoch) * batches if carries else batches
    if late.members > available:
        span = f"from epoch {late.start_epoch} on" if carries else "of an epoch"
        raise NQMError(
            f"late_phase.members must be at most the {available} minibatches {span}, or no "
            f"cycle is ever complete and the base stops; got {late.members}; lower it, or "
            "data.batch_size"
        )
    if average is not None and average.every_step:
        start = late.start_epoch * batches
        end = run.train.epochs * batches
        last = start + (end - start) // late.members * late.members if carries else end
        if last <= average.start_epoch * batches:
            raise NQMError(
                "average.start_epoch must lie before the last complete cycle of all members, at "
                f"minibatch {last} of {end}; got {average.start_epoch}, minibatch "
                f"{average.start_epoch * batches}"
            )


def check_size(run: RunConfig, runtime: Runtime, task: Task) -> None:
    """Check that the training state fits the memory, selections match, and the model compiles.

    Parameters
    ----------
    run, runtime, task
        See `check_run`.

    Raises
    ------
    NQMError
        If the memory is too small, a selection matches no weight, or recurrent layers would have to
        be compiled, or run in bfloat16 on a GPU.
    """
    late = run.late_phase
    with _named(run, "built"), torch.device("meta"):
        model = make_model(without_weights(run).model, task, start=False)
    if is_recurrent(model):
        if run.train.compile:
            raise NQMError(
                f"train.compile does not compile the recurrent layers of {run.model.name}, which "
                "have kernels of their own; leave it out"
            )
        if run.train.precision == "bfloat16" and runtime.device.type == "cuda":
            raise NQMError(  # whatever the type of autocast
                f"train.precision = 'bfloat16' would run the recurrent layers of {run.model.name} "
                "in float16 on a GPU, by torch's autocast for cuDNN, where small gradients vanish; "
                "use 'float32', which is TF32 there"
            )
    if runtime.world > 1 and runtime.rank == 0:
        _tell_parts(run, runtime, model)
    item = torch.empty((), dtype=DTYPES[run.train.precision]).element_size()
    count = sum(p.numel() for p in model.parameters())
    if run.train.no_decay:
        select(model, run.train.no_decay)
    members = 0
    if late is not None:
        chosen = select(model, late.select).parameters
        members = late.members * sum(model.get_parameter(name).numel() for name in chosen)
    limit = memory(runtime.device)
    needed = HELD * item * (count + members)
    if needed > limit:
        raise NQMError(
            f"{run.model.name} has {count:,} weights"
            + (f", its {late.members:,} members {members:,} more" if late is not None else "")
            + f": training them takes {needed / 2**30:,.1f} GiB at least, and there are "
            f"{limit / 2**30:,.1f} GiB; ask for less"
        )
    counts = [part.members for part in (late, run.snapshots) if part is not None]
    draws = max(run.evaluate.mc_dropout, *counts, 0)
    if task.images is not None and (logits := 8 * draws * len(task.images) * task.classes) > limit:
        raise NQMError(
            f"the predictions of {draws:,} models for {len(task.images):,} test images take "
            f"{logits / 2**30:,.1f} GiB, and there are {limit / 2**30:,.1f} GiB; lower "
            "evaluate.mc_dropout, late_phase.members, snapshots.members or data.test_examples"
        )


def _tell_parts(run: RunConfig, runtime: Runtime, model: nn.Module) -> None:
    """Warn that BatchNorm sees a part of each minibatch."""
    if run.train.sync_batchnorm or not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return
    size = run.data.batch_size
    warnings.warn(
        f"BatchNorm takes its statistics from the {size // runtime.world} of {size} examples that "
        f"each of {runtime.world} processes has; with train.sync_batchnorm = true from all",
        NQMWarning,
        stacklevel=2,
    )


def memory(device: torch.device) -> int:
    """Memory that a process may use on a device.

    Parameters
    ----------
    device : torch.device
        A GPU or the CPU.

    Returns
    -------
    int
        Bytes: the memory of the GPU, or that of the host, or the process's limit if it is smaller.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return available_memory()


def rehearse(
    run: RunConfig,
    runtime: Runtime,
    task: Task,
    ood: Mapping[str, Images],
    *,
    whole: bool = False,
) -> None:
    """Do everything that the run will do once, on a few examples and at learning rate 0.

    Parameters
    ----------
    run, runtime, task
        See `check_run`.
    ood : mapping of str to Images
        Result of `neural.training.report.ood_images`.
    whole : bool
        Train on a whole minibatch, in pieces and compiled as the run says, instead of a few rows.

    Raises
    ------
    NQMError
        If any step of training or evaluation fails.
    """
    if whole:
        with _named(run, "built"):
            train_state = TrainState(run, task, runtime)
        few = next(iter(task.stream.epoch(0)))
    else:
        train_state = rehearsed_state(run, runtime, task)
        few = _few(task.stream, run.train.micro_batches)
    report.check(train_state)
    with _named(run, "trained as asked"):
        train_state.try_out(few)
        if not all(bool(p.isfinite().all()) for p in train_state.trained.parameters()):
            return  # the run will diverge, which is no mistake
        test = _rows(next(iter(task.test())), ROWS)
        train_state.task = replace(
            task,
            stream=_Again(few),
            test=lambda: iter([test]),
            images=None if task.images is None else _first(task.images),
        )
        model = train_state.model if train_state.late is None else train_state.late.averaged()
        if not train_state.all_finite(train_state.task.score(model).loss):
            return
        report.during(train_state, 0)
        kept = () if run.snapshots is None else [lambda: plain_state(train_state.model)] * 2
        report.final(train_state, {name: _first(images) for name, images in ood.items()}, kept)


def rehearsed_state(run: RunConfig, runtime: Runtime, task: Task) -> TrainState:
    """Make the training state for a rehearsal.

    Parameters
    ----------
    run, runtime, task
        See `check_run`.

    Returns
    -------
    TrainState
        That of the run, but without compilation and micro-batches, and with two samples of
        MC-dropout at most.

    Raises
    ------
    NQMError
        If the model cannot be built.
    """
    train = replace(run.train, compile=False, micro_batches=1)
    samples = min(run.evaluate.mc_dropout, 2)
    short = replace(run, train=train, evaluate=replace(run.evaluate, mc_dropout=samples))
    with _named(run, "built"):
        return TrainState(short, task, runtime)


@dataclass(frozen=True)
class _Again:
    """A stream of one minibatch."""

    batch: Batch
    plan = EpochPlan(1, 1)

    def __len__(self) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Batch]:
        yield self.batch


def _few(stream: Stream, pieces: int) -> Batch:
    """First rows of a minibatch: as many as the smallest piece of an epoch has, at most `ROWS`."""
    plan = getattr(stream, "plan", None)
    slices = plan.slices(max(0, len(stream) - 2)) if plan is not None else []
    sizes = [ROWS]
    for rows in (piece.stop - piece.start for piece in slices):
        whole = -(-rows // pieces)
        sizes.append(rows % whole or whole)
    return _rows(next(iter(stream.epoch(0))), min(sizes))


def _rows(batch: Batch, count: int) -> Batch:
    return batch[0][:count], batch[1][:count]


def _first(images: Images) -> Images:
    return Images(images.pixels[:ROWS], images.labels[:ROWS])


def without_weights(run: RunConfig) -> RunConfig:
    """Leave out pretrained weights of a library's model, which would be downloaded.

    Parameters
    ----------
    run : RunConfig
        The run.

    Returns
    -------
    RunConfig
    """
    options = {n: v for n, v in run.model.options.items() if n not in ("weights", "pretrained")}
    return replace(run, model=replace(run.model, options=options))


@contextmanager
def _named(run: RunConfig, what: str) -> Iterator[None]:
    """Turn any error of a model or a library inside the block into an NQMError of one line."""
    try:
        yield
    except NQMError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NQMError(
            f"model {run.model.name} cannot be {what}: {type(error).__name__}: {reason:.200}"
        ) from error
