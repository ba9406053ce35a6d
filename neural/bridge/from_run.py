"""The empirical risk of a run: its loss on a fixed part of its training data, augmentation off."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from neural.curvature.checks import check_forward
from neural.curvature.example_losses import SmoothedCrossEntropy, cross_entropy
from neural.curvature.memory import PASSES, kept_bytes
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import BatchNormRisk, grouped
from neural.data import TextData, evaluation_batches, evaluation_windows
from neural.data.images import ImageData
from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.members import Batch
from neural.training.config import RunConfig
from neural.training.task import Runtime, load_data
from nqm.errors import NQMError, NQMWarning, check_integer
from nqm.limits import memory_limit

#: Number of examples that are evaluated together.
BATCH = 512
#: Largest number of weights for which derivatives are computed in double precision.
DOUBLE = 5000


def risk_of_run(  # noqa: PLR0913 - options, by keyword
    run: RunConfig,
    model: nn.Module,
    runtime: Runtime,
    *,
    select: str | Iterable[str] = "all",
    examples: int | None = None,
    weight_decay: float | None = None,
    curvature: str = "hessian",
    group: int | None = None,
    batch_size: int | None = None,
) -> EmpiricalRisk:
    """Training loss of a run's model as a function of its weights.

    BatchNorm statistics are recomputed on the risk's own data. Derivatives are taken in evaluation
    mode, except that BatchNorm uses the statistics of its group if `group` is given.

    Parameters
    ----------
    run : RunConfig
        Gives the data, label smoothing, the weight decay, and the weights without decay.
    model : Module
        Its BatchNorm statistics, precision and device are changed in place.
    runtime : Runtime
        Gives the device and the folder of data files.
    select : str or iterable of str
        Weights that the loss is a function of; see `neural.late_phase.select.select`.
    examples : int, optional
        Number of training examples, spread over the classes as evenly as possible and the same for
        every seed; all by default. For a text, windows of the run's length.
    weight_decay : float, optional
        Weight decay in the loss; by default that of the run.
    curvature : {"hessian", "ggn"}
        See `EmpiricalRisk`.
    group : int, optional
        Number of examples that share BatchNorm statistics, as in training. The result is then a
        `BatchNormRisk`, whose examples are such groups.
    batch_size : int, optional
        Number of examples that are evaluated together; by default `BATCH`, or fewer if derivatives
        would not fit the memory otherwise, with a warning that tells their number. It changes
        results by rounding only.

    Returns
    -------
    EmpiricalRisk

    Raises
    ------
    NQMError
        If the data do not fit into memory, or the loss cannot be measured (`EmpiricalRisk.check`).
    """
    dtype = torch.float64 if sum(p.numel() for p in model.parameters()) <= DOUBLE else torch.float32
    batches = [
        (x.to(dtype) if x.is_floating_point() else x, y)
        for x, y in training_batches(run, runtime, examples, batch_size or BATCH)
    ]
    model.to(runtime.device, dtype)
    check_forward(model, batches[0])
    recompute_statistics(model, batches)
    decay = run.train.weight_decay if weight_decay is None else weight_decay
    smoothing = run.train.label_smoothing
    loss = SmoothedCrossEntropy(smoothing) if smoothing else cross_entropy
    kind = EmpiricalRisk if group is None else BatchNormRisk
    model.eval()
    if group is not None:
        batches = grouped(batches, group)
    elif batch_size is None:
        batches = fitting(model, batches, runtime.device)
    risk = kind(
        model,
        batches,
        select,
        loss=loss,
        weight_decay=decay,
        no_decay=run.train.no_decay,
        curvature=curvature,
    )
    risk.check()
    return risk


def fitting(model: nn.Module, batches: list[Batch], device: torch.device) -> list[Batch]:
    """Split batches so that derivatives of the loss fit the memory.

    Parameters
    ----------
    model : Module
        On the device of the batches.
    batches : list of (inputs, targets)
    device : torch.device

    Returns
    -------
    list of (inputs, targets)
        The same examples in the same order.

    Warns
    -----
    NQMWarning
        If they are split.
    """
    budget = memory_limit()
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 2
    largest = max(len(x) for x, _ in batches)
    few = batches[0][0][:2].clone()
    each = PASSES * kept_bytes(model, lambda: model(few)) / len(few)
    if largest * each <= budget:
        return batches
    count = max(1, int(budget / each))
    warnings.warn(
        f"derivatives of the loss are computed for {count} examples at a time: {largest} would "
        f"take about {largest * each / 2**30:.1f} GiB, and {budget / 2**30:.1f} GiB are allowed",
        NQMWarning,
        stacklevel=2,
    )
    parts = (zip(torch.split(x, count), torch.split(y, count), strict=True) for x, y in batches)
    return [pair for of_batch in parts for pair in of_batch]


def training_batches(
    run: RunConfig, runtime: Runtime, examples: int | None, batch_size: int
) -> list[Batch]:
    """Load the first training examples of a run, in a fixed order, without augmentation.

    Parameters
    ----------
    run : RunConfig
        Gives the data set, its part and its normalisation.
    runtime : Runtime
        Gives the device and the folder of data files.
    examples : int, optional
        Number of examples, at least 2; all by default. For a text, windows of the run's length.
    batch_size : int
        Number of examples of a batch; the last one may be smaller.

    Returns
    -------
    list of (inputs, targets)
        On the runtime's device.

    Raises
    ------
    NQMError
        If there are fewer than two examples, or the data set is neither small images nor a text.
    """
    if examples is not None:
        check_integer("examples", examples, 2)
    data = load_data(run.data, runtime.root)
    if isinstance(data, TextData):
        data = data.compact()
        length = run.data.length
        symbols = None if examples is None else min(examples, len(data.train)) * length
        text = data.train[: run.data.train_examples][:symbols]
        windows = len(text) // length
        seen, following = next(
            evaluation_windows(text[: windows * length], windows, length, runtime.device)
        )
        inputs, targets = (torch.split(symbols, batch_size) for symbols in (seen, following))
        return list(zip(inputs, targets, strict=True))
    if not isinstance(data, ImageData) or data.train is None:
        raise NQMError(
            f"data.name {run.data.name!r} does not fit into memory as a risk's data; choose a "
            "set of small images or a text"
        )
    train = data.train
    if run.data.train_examples is not None:
        train = train.subset(run.data.train_examples)
    if examples is not None and examples < len(train):
        train = train.subset(examples)
    mean, std = run.data.mean or data.mean, run.data.std or data.std
    return list(evaluation_batches(train, batch_size, mean, std, runtime.device))
