"""What a run costs, before it is trained: steps, FLOPs, memory and disk.

The network is built and run on torch's ``meta`` device, which has shapes and no numbers, so that
a ResNet-152 on ImageNet takes seconds on a laptop and no data. FLOPs are those of
`torch.utils.flop_counter`: two for each multiply-add of matrix products and convolutions, forward
and backward; other operations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from neural.data import ImageData, TextData
from neural.data.catalog import SIZES, Size
from neural.late_phase.ready import is_recurrent
from neural.late_phase.select import TERMS, select
from neural.training.build import make_model
from neural.training.config import RunConfig
from neural.training.experiment import jobs
from neural.training.preflight import without_weights
from neural.training.recipe import Recipe
from neural.training.task import DTYPES, Stream, Task, load_data
from nqm.errors import NQMError
from nqm.limits import available_memory

#: Peak rate of an H100 SXM without sparsity, FLOP/s: of BF16, of TF32 (which float32 training uses)
#: and of float64 tensor cores (NVIDIA, H100 datasheet).
H100_PEAK = {"bfloat16": 989e12, "float32": 494.7e12, "float64": 67e12}
#: FLOPs of a minibatch below which a second thread mostly waits for the first.
SMALL = 10**10
#: Minibatches of a seed below which starting a process takes longer than training.
FEW = 300
#: Bytes of a process before it holds a run: Python, torch and the data.
PROCESS = 2**30
#: Symbols of a window at which recurrent layers are counted.
SHORT = 8
#: Tensors of a weight's size in the optimizer's state.
_STATE = {"sgd": 1, "adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over one minibatch.

    Attributes
    ----------
    flops : int
        Of the whole minibatch.
    saved : int
        Bytes of the tensors that are kept between forward and backward pass, in one piece of
        the minibatch.
    """

    flops: int
    saved: int


@dataclass(frozen=True)
class Cost:
    """What one run takes; all but the counts of weights and steps are estimates.

    Attributes
    ----------
    weights, trainable : int
        Numbers of weights of the network, and of those that are trained.
    selected : int
        Number of weights that each late-phase member has of its own; 0 without members.
    minibatches : int
        Number of minibatches of an epoch.
    epochs : int
        Number of epochs that this run trains itself; earlier ones are another run's.
    steps : int
        Number of base steps in them.
    flops : int
        FLOPs of these epochs; evaluation is not counted.
    memory : int
        Bytes of weights, gradients, optimizer state, averages, saved activations and images in
        memory.
    disk : int
        Bytes of the run's files, with two checkpoints while it trains.
    """

    weights: int
    trainable: int
    selected: int
    minibatches: int
    epochs: int
    steps: int
    flops: int
    memory: int
    disk: int


class _NoData:
    """A stream without minibatches."""

    @property
    def plan(self) -> Any:
        raise AssertionError("no minibatch is used")

    def __len__(self) -> int:
        return 0

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("no minibatch is used")


def size_of(run: RunConfig, root: Path | None = None) -> Size:
    """Numbers of examples and classes, and shape, of a run's data.

    Parameters
    ----------
    run : RunConfig
        The run.
    root : Path, optional
        Folder of data files, for sets whose sizes are not published.

    Returns
    -------
    Size
        With the run's numbers of examples.

    Raises
    ------
    NQMError
        If the data set is unknown or missing, or is smaller than the run asks for.
    """
    size = SIZES.get(run.data.name)
    if size is None:
        data = load_data(run.data, root)
        if isinstance(data, TextData):
            data = data.compact()
            size = Size(len(data.train), len(data.test), data.symbols)
        elif isinstance(data, ImageData):
            if data.train is None:
                raise NQMError(f"data.name {run.data.name!r} has no training part")
            size = Size(len(data.train), len(data.test), data.classes, data.shape)
        else:
            counts = (len(data.train.labels), len(data.test.labels), data.classes)
            size = Size(*counts, (3, data.size, data.size), streamed=True)
    for name in ("train", "test"):
        asked = getattr(run.data, f"{name}_examples")
        if asked is not None and asked > getattr(size, name):
            raise NQMError(
                f"data.{name}_examples must be at most {getattr(size, name)}; got {asked}"
            )
    return replace(
        size,
        train=run.data.train_examples or size.train,
        test=run.data.test_examples or size.test,
    )


def network(run: RunConfig, size: Size) -> nn.Module:
    """Build a run's network on the meta device, with its rank-1 or low-rank factors.

    Parameters
    ----------
    run : RunConfig
        The run.
    size : Size
        Of its data.

    Returns
    -------
    Module
        In training mode; its weights have shapes and no numbers.

    Raises
    ------
    NQMError
        If the model or an option is unknown, or a selection matches nothing.
    """
    channels = size.image[0] if size.image else 0
    stream: Stream = _NoData()
    task = Task("", size.classes, channels, stream, lambda: iter(()), run.train.label_smoothing)
    with torch.device("meta"):
        model = make_model(without_weights(run).model, task, start=False)
    if run.late_phase is not None:
        select(model, run.late_phase.select)
    if run.train.no_decay:
        select(model, run.train.no_decay)
    return model.to(DTYPES[run.train.precision]).train()


def shares(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the weights that each selection term means in a model.

    Parameters
    ----------
    model : Module
        The network.

    Returns
    -------
    dict of str to tuple of str
        Term -> names; only terms that match something.
    """
    found = {}
    for term in TERMS:
        try:
            found[term] = select(model, term).parameters
        except NQMError:
            continue
    return found


def count_pass(model: nn.Module, run: RunConfig, size: Size) -> Pass:
    """Count a forward and backward pass over one minibatch, on the meta device.

    Parameters
    ----------
    model : Module
        Result of `network`.
    run : RunConfig
        The run.
    size : Size
        Of its data.

    Returns
    -------
    Pass

    Raises
    ------
    NQMError
        If the network cannot be run on the meta device.
    """
    pieces = run.train.micro_batches
    rows = -(-run.data.batch_size // pieces)
    recurrent = is_recurrent(model)
    length = run.data.length
    try:
        if recurrent and length > 2 * SHORT:
            # Both are linear in the length, and shapes of long windows take a while.
            short, twice = (_count(model, run, size, rows, n) for n in (SHORT, 2 * SHORT))
            flops, saved = (
                a + (b - a) * (length - SHORT) // SHORT for a, b in zip(short, twice, strict=True)
            )
        else:
            flops, saved = _count(model, run, size, rows, length)
    except NQMError:
        raise
    except Exception as error:  # of a model or a library, turned into one line
        reason = " ".join(str(error).split())
        raise NQMError(
            f"model {run.model.name} cannot be counted: {type(error).__name__}: {reason:.200}"
        ) from error
    finally:
        model.zero_grad(set_to_none=True)
    flops = flops * run.data.batch_size // rows
    if run.train.precision == "bfloat16":
        # Autocast keeps a copy of the weights for the backward pass.
        saved = saved // 2 + 2 * sum(p.numel() for p in model.parameters())
    return Pass(flops, saved)


def _count(model: nn.Module, run: RunConfig, size: Size, rows: int, length: int) -> tuple[int, int]:
    """FLOPs, and bytes saved for the backward pass, of so many rows of this length."""
    dtype = DTYPES[run.train.precision]
    with torch.device("meta"):
        y = torch.empty(rows, *(() if size.image else (length,)), dtype=torch.int64)
        x = torch.empty(rows, *size.image, dtype=dtype) if size.image else y
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # By storage: an input and its view, or an output that is saved twice, count once. The
        # tensor is held, so that no other one gets the place of its storage.
        if (place := tensor.untyped_storage()._cdata) not in own:
            kept[place] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
        torch.autograd.backward(loss)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return counter.get_total_flops(), saved


def examples(run: RunConfig, size: Size) -> int:
    """Number of training examples of an epoch: images, or windows of text.

    Parameters
    ----------
    run : RunConfig
        The run.
    size : Size
        Of its data.

    Returns
    -------
    int
    """
    if size.image:
        return size.train
    usable = size.train - run.data.length
    if run.data.sampling == "stream":
        readers = run.data.batch_size
        return usable // readers // run.data.length * readers
    return usable // run.data.length


def estimate(recipe: Recipe, root: Path | None = None) -> dict[str, Cost]:
    """Estimate what every arm of a recipe takes with one seed.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    root : Path, optional
        Folder of data files.

    Returns
    -------
    dict of str to Cost
        By arm. Epochs that an arm has in common with an earlier one are not counted again.

    Raises
    ------
    NQMError
        If an arm cannot be built; the message names the arm.
    """
    costs = {}
    passes: dict[Any, Pass] = {}
    for job in jobs(recipe, recipe.seeds[:1])[0]:
        try:
            size = size_of(job.run, root)
            model = network(job.run, size)
            what = (str(job.run.model), str(job.run.data), job.run.train.precision,
                    job.run.train.micro_batches)  # fmt: skip
            if what not in passes:
                passes[what] = count_pass(model, job.run, size)
        except NQMError as error:
            raise NQMError(f"arm {job.arm}: {error}") from error
        first = 0 if job.start is None else job.start[1]
        costs[job.arm] = _cost(job.run, model, size, passes[what], first)
    return costs


def _cost(run: RunConfig, model: nn.Module, size: Size, one: Pass, first: int) -> Cost:
    """Cost of the epochs of a run from `first` on."""
    late, data = run.late_phase, run.data
    parameters = list(model.parameters())
    weights = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    item = torch.empty((), dtype=DTYPES[run.train.precision]).element_size()
    selected = 0
    if late is not None:
        names = select(model, late.select).parameters
        selected = sum(model.get_parameter(name).numel() for name in names)
    copies = 0 if late is None else late.members * selected
    count = examples(run, size)
    minibatches = -(-count // data.batch_size)
    epochs = run.train.epochs - first
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    state = _STATE[run.train.optimizer] if run.train.optimizer != "sgd" or run.train.momentum else 0
    averages = 0 if run.average is None else weights + copies
    checkpoint = item * (weights + copies + state * (trainable + copies) + averages) + buffers
    saved = one.saved * (late.members if late is not None and late.fused else 1)
    images = 0
    if size.image and not size.streamed:
        pixels = size.image[0] * size.image[1] * size.image[2]
        images = (size.train + size.test) * pixels
    kept = 1 + (0 if run.snapshots is None else run.snapshots.members)
    single = item * weights + buffers
    predictions = 4 * size.test * size.classes * kept if size.image else 0
    return Cost(
        weights=weights,
        trainable=trainable,
        selected=selected,
        minibatches=minibatches,
        epochs=epochs,
        steps=_steps(run, minibatches, first),
        flops=one.flops * count * epochs // data.batch_size,
        memory=checkpoint + item * (trainable + copies) + saved + images,
        disk=2 * checkpoint + kept * single + (single + item * copies if late else 0) + predictions,
    )


def _steps(run: RunConfig, minibatches: int, first: int) -> int:
    """Number of base steps from epoch `first` on; after T0 there is one for each full cycle."""
    late, end = run.late_phase, run.train.epochs
    if late is None:
        return (end - first) * minibatches
    start = max(first, late.start_epoch)
    plain = max(0, late.start_epoch - first) * minibatches
    if late.leftover == "carry":
        return plain + (end - start) * minibatches // late.members
    return plain + (end - start) * (minibatches // late.members)


def hours(costs: Sequence[Cost], precision: str, share: float) -> float:
    """Hours of training on one H100 at a share of its peak rate.

    Parameters
    ----------
    costs : sequence of Cost
        Of the runs.
    precision : {"float32", "bfloat16", "float64"}
        Precision of their computation; float32 is TF32.
    share : float
        Share of the peak, in (0, 1].

    Returns
    -------
    float
    """
    return sum(cost.flops for cost in costs) / (share * H100_PEAK[precision]) / 3600


def side_by_side(recipe: Recipe, seeds: int, cores: int, root: Path | None = None) -> int | None:
    """Number of processes of one thread each that train small nets fastest on a CPU.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    seeds : int
        Number of its seeds.
    cores : int
        Number of processors.
    root : Path, optional
        Folder of data files.

    Returns
    -------
    int or None
        At most one for each seed and processor, as memory allows; 1 if training is over sooner
        than processes start. None if a net is large enough for several threads.

    Raises
    ------
    NQMError
        If an arm cannot be built.
    """
    costs = estimate(recipe, root).values()
    minibatches = sum(cost.epochs * cost.minibatches for cost in costs)
    if sum(cost.flops for cost in costs) > SMALL * minibatches:
        return None
    if minibatches < FEW:
        return 1
    fitting = available_memory() // 2 // (PROCESS + max(cost.memory for cost in costs))
    return max(1, min(seeds, cores, fitting))
