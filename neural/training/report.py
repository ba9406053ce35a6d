"""Test metrics of every model that results from a run.

The table is tidy: one row per (weights, member, data, metric). Column `weights` names the model:

============  ====================================================================================
iterate       the model as trained, without late-phase weights
averaged      the mean of the late-phase members: the paper's single model
swa, ema      the average over time (of the members' mean, if there are any), with BatchNorm
              statistics recomputed; the names of `neural.training.averages.AVERAGES`
member        one member, whose number is in the column `member`
ensemble      mean prediction of the members
snapshot      one snapshot (see `neural.training.snapshots`), `member` says which
mc_dropout    mean prediction over dropout masks
============  ====================================================================================

Of snapshots there are ``snapshot_soup``, the mean of their weights with BatchNorm statistics
recomputed, and ``snapshot_ensemble``, their mean prediction. For models in which they may differ
from these, there are ``averaged_outputs`` and ``swa_outputs`` (BatchNorm averaged as in the
official code), ``averaged_product`` and ``swa_product`` (rank-1 factors averaged as matrices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from neural import evaluate
from neural.data import Images, load_images
from neural.late_phase.duplicate import duplicate
from neural.late_phase.members import LatePhase
from neural.late_phase.reparametrize import fold
from neural.training.averages import single_models
from neural.training.config import EvaluateConfig, RunConfig
from neural.training.distributed import Parts
from neural.training.snapshots import soup
from neural.training.state import TrainState
from neural.training.task import Task
from nqm.errors import NQMError

#: Relative sizes of the weight noise under which the rise of the loss is measured.
NOISES = (0.01, 0.02, 0.05, 0.1, 0.2)
#: Minibatches that give the average its BatchNorm statistics during training.
FEW = 20
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Result of a run.

    Attributes
    ----------
    table : DataFrame
        Columns weights, member (-1: none), data, metric, value.
    model : dict of str to Tensor
        State dict of the single model, without reparametrisations.
    late : dict of str to Tensor, optional
        State dict of base and members.
    predictions : dict of str to ndarray
        ``labels`` of the test set, shape (N,), and log-probabilities of every single model, shape
        (N, C), by its name; empty for text.
    """

    table: pd.DataFrame
    model: dict[str, Tensor]
    late: dict[str, Tensor] | None
    predictions: dict[str, NDArray[Any]]


def during(train_state: TrainState, epoch: int) -> Row:
    """Evaluate a run during training, and start a new mean of its training loss.

    Parameters
    ----------
    train_state : TrainState
        State of the run.
    epoch : int
        Number of epochs done.

    Returns
    -------
    dict of str to object
        One row of the history: epoch, step and examples done, lr, mean training loss since the last
        row, weights, spread of the members, test loss (nats) and test accuracy; of a run with an
        average over time from its start on also average_loss and average_accuracy. BatchNorm
        statistics of the average are those of `FEW` minibatches there, and of all at the end. In
        cycles of snapshots also distance, that of the weights from where the cycles began.
    """
    late = train_state.late
    model = train_state.model if late is None else late.averaged()
    score = train_state.task.score(model)
    return (
        {
            "epoch": epoch,
            "step": train_state.done,
            "examples": train_state.done * train_state.run.data.batch_size,
            "lr": float(train_state.optimizer.param_groups[0]["lr"]),
            "train_loss": train_state.take_mean_loss(),
            "weights": "iterate" if late is None else "averaged",
            "spread": 0.0 if late is None else late.spread(),
            "loss": score.loss,
            "accuracy": score.accuracy,
        }
        | _average_during(train_state)
        | _distance(train_state)
    )


def _distance(train_state: TrainState) -> Row:
    return {} if train_state.origin is None else {"distance": train_state.distance()}


def _average_during(train_state: TrainState) -> Row:
    """Test loss and accuracy of the average so far; it and the training stay as they are."""
    average = train_state.run.average
    if average is None or train_state.average is None:
        return {}
    models = average.models(duplicate(train_state.average), _parts(train_state, FEW))
    score = train_state.task.score(models[average.method])
    return {"average_loss": score.loss, "average_accuracy": score.accuracy}


def check(train_state: TrainState) -> None:
    """Check before training that `final` can measure what the run asks for.

    Parameters
    ----------
    train_state : TrainState
        State of the run.

    Raises
    ------
    NQMError
        If corruptions are asked for and the images are not in memory, or MC-dropout and the model
        has no dropout.
    """
    task, settings = train_state.task, train_state.run.evaluate
    if settings.corruptions and task.images is None:
        raise NQMError(f"evaluate.corruptions needs images in memory; {task.label} has none")
    dropout = any(isinstance(layer, _DropoutNd) for layer in train_state.model.modules())
    if settings.mc_dropout and not dropout:
        raise NQMError(
            "evaluate.mc_dropout needs a model with dropout; set model.dropout or leave it out"
        )


def final(
    train_state: TrainState,
    ood: Mapping[str, Images],
    snapshots: Sequence[Callable[[], Mapping[str, Tensor]]] = (),
) -> Report:
    """Measure all metrics at the end of a run.

    Parameters
    ----------
    train_state : TrainState
        State at the end of training.
    ood : mapping of str to Images
        Result of `ood_images`.
    snapshots : sequence of callable
        Each returns the plain state dict of one snapshot.

    Returns
    -------
    Report
    """
    task, late = train_state.task, train_state.late
    models = _models(train_state)
    kept = train_state.run.snapshots is not None
    if kept:  # under torchrun the first process alone reads them, and all compute statistics
        states = (read() for read in snapshots)
        models["snapshot_soup"] = soup(
            fold(duplicate(train_state.model)), states, _parts(train_state)
        )
    rows: list[Row] = []
    predicted: dict[str, tuple[Tensor, Tensor]] = {}
    for name, model in models.items():
        metrics, logits_and_labels = _metrics(model, task)
        rows += _named(name, metrics)
        if logits_and_labels is not None:
            predicted[name] = logits_and_labels
    if late is not None:
        rows += _members(late, task)
    if snapshots:
        rows += _snapshots(models["snapshot_soup"], snapshots, task)
    primary = single_name(train_state.run)
    model = models[primary]
    extra = beyond(model, late, task, train_state.run.evaluate, ood)
    rows += [{"weights": primary, "member": -1} | row for row in extra]
    predictions = {name: z.log_softmax(-1).numpy() for name, (z, _) in predicted.items()}
    if predicted:
        predictions["labels"] = predicted[primary][1].numpy()
    plain = fold(duplicate(model)).state_dict()
    return Report(
        pd.DataFrame(rows), plain, None if late is None else late.state_dict(), predictions
    )


def single_name(run: RunConfig) -> str:
    """Name of a run's single model in its results.

    Parameters
    ----------
    run : RunConfig
        The run.

    Returns
    -------
    str
        An entry of the column ``weights``.
    """
    if run.snapshots is not None:
        return "snapshot_soup"
    if run.average is not None:
        return run.average.method
    return "iterate" if run.late_phase is None else "averaged"


def _models(train_state: TrainState) -> dict[str, nn.Module]:
    """Models of a run by their names in the results: from the weights, and from its average."""
    name = "iterate" if train_state.late is None else "averaged"
    models = single_models(train_state.trained, name)
    average = train_state.run.average
    if average is not None and train_state.average is not None:
        models |= average.models(train_state.average, _parts(train_state))
    return models


def _parts(train_state: TrainState, most: int | None = None) -> Parts:
    """Training data, at most so many minibatches, in an order that training did not have."""
    stream, epoch = train_state.task.stream, train_state.run.train.epochs
    weights = [stream.plan.weight(batch) for batch in range(len(stream))][:most]
    return Parts(lambda: islice(stream.epoch(epoch), most), train_state.runtime.world, weights)


def _metrics(model: nn.Module, task: Task) -> tuple[dict[str, float], tuple[Tensor, Tensor] | None]:
    """Test metrics and, for images, logits and labels."""
    if task.channels == 0:
        score = task.score(model)
        bits = evaluate.bits_per_character(score.loss)
        return {"accuracy": score.accuracy, "nll": score.loss, "bpc": bits}, None
    logits, labels = evaluate.predict(model, task.test())
    return evaluate.classification_metrics(logits, labels), (logits, labels)


def test_metrics(model: nn.Module, task: Task) -> dict[str, float]:
    """Measure the test metrics of one model.

    Parameters
    ----------
    model : Module
        The model.
    task : Task
        Gives the test set.

    Returns
    -------
    dict of str to float
        Value by name of the metric: accuracy, nll (nats), brier and ece; for text accuracy, nll and
        bpc (bits per character).
    """
    return _metrics(model, task)[0]


def _members(late: LatePhase, task: Task) -> list[Row]:
    """Test metrics of every member, and of the ensemble of their predictions."""
    if task.channels == 0:
        rows = []
        for k in range(late.members):
            rows += _named("member", _metrics(late.member(k), task)[0], member=k)
        return rows
    logits, labels = evaluate.predict_members(late, late.members, task.test())
    rows = []
    for k, own in enumerate(logits):
        rows += _named("member", evaluate.classification_metrics(own, labels), member=k)
    mean = evaluate.ensemble_log_probs(logits)
    return rows + _named("ensemble", evaluate.classification_metrics(mean, labels))


def _snapshots(
    model: nn.Module, snapshots: Sequence[Callable[[], Mapping[str, Tensor]]], task: Task
) -> list[Row]:
    """Every snapshot by itself, and the ensemble of their predictions."""
    rows, logits, labels = [], [], None
    one = duplicate(model)
    for k, read in enumerate(snapshots):
        one.load_state_dict(read())
        measured, predicted = _metrics(one, task)
        rows += _named("snapshot", measured, member=k)
        if predicted is not None:
            logits.append(predicted[0])
            labels = predicted[1]
    if labels is None:  # of text
        return rows
    mean = evaluate.ensemble_log_probs(torch.stack(logits))
    return rows + _named("snapshot_ensemble", evaluate.classification_metrics(mean, labels))


def _named(weights: str, metrics: dict[str, float], member: int = -1) -> list[Row]:
    return [
        {"weights": weights, "member": member, "data": "test", "metric": name, "value": value}
        for name, value in metrics.items()
    ]


def beyond(
    model: nn.Module,
    late: LatePhase | None,
    task: Task,
    settings: EvaluateConfig,
    ood: Mapping[str, Images],
) -> Iterator[Row]:
    """Measure what is asked for beside the test metrics.

    That is MC-dropout, detection of other data sets, robustness, flatness, and the loss on the line
    from a member to the average.

    Parameters
    ----------
    model : Module
        The single model.
    late : LatePhase, optional
        Base and members.
    task : Task
        Gives the test set.
    settings : EvaluateConfig
        What to measure.
    ood : mapping of str to Images
        Result of `ood_images`.

    Yields
    ------
    dict of str to object
        One row: data, metric, value and, for MC-dropout, weights.

    Raises
    ------
    NQMError
        If corruptions are asked for and the images are not in memory.
    """
    if settings.mc_dropout:
        logits, labels = evaluate.mc_dropout(model, task.test(), settings.mc_dropout)
        mean = evaluate.ensemble_log_probs(logits)
        yield from _named("mc_dropout", evaluate.classification_metrics(mean, labels))
    if ood:
        inside = evaluate.entropy_score(evaluate.predict(model, task.test())[0])
    for name, images in ood.items():
        assert task.normalised is not None  # checked by `ood_images`
        logits, _ = evaluate.predict(model, task.normalised(images))
        outside = evaluate.entropy_score(logits)
        for metric, value in evaluate.ood_metrics(inside, outside).items():
            yield {"data": name, "metric": metric, "value": value}
    if settings.corruptions:
        yield from _corrupted(model, task)
    if settings.flatness:
        rises = evaluate.loss_rise(model, lambda m: task.score(m).loss, NOISES)
        for rise in rises:
            yield {"data": f"noise {rise.sigma:g}", "metric": "loss_rise", "value": rise.mean}
    if settings.line and late is not None:
        ends = late.member(0).state_dict(), late.averaged().state_dict()
        plain = fold(duplicate(late.model))
        line = evaluate.loss_line(plain, *ends, task.score)
        for t, loss in zip(line.position, line.loss, strict=True):
            yield {"data": f"line {t:g}", "metric": "nll", "value": float(loss)}


def rows_beyond(settings: EvaluateConfig) -> int:
    """Estimate the number of rows of `beyond`, by which its progress is told.

    Parameters
    ----------
    settings : EvaluateConfig
        What to measure.

    Returns
    -------
    int
    """
    images = 70 if settings.corruptions else 0  # 14 kinds at 5 severities
    few = len(settings.ood) + bool(settings.mc_dropout) + bool(settings.flatness) + settings.line
    return images + 4 * few


def ood_images(task: Task, names: Iterable[str], root: Path | None) -> dict[str, Images]:
    """Load test images of other data sets.

    Parameters
    ----------
    task : Task
        Gives the shape that the images must have.
    names : iterable of str
        Names of the data sets.
    root : Path, optional
        Folder of the data files.

    Returns
    -------
    dict of str to Images
        Test images by name of the data set.

    Raises
    ------
    NQMError
        If a data set is missing, the task's images are not in memory, or a data set's images have
        another shape.
    """
    sets = {}
    for name in names:
        if task.images is None or task.normalised is None:
            raise NQMError(f"evaluate.ood needs images in memory; {task.label} has none")
        images = sets[name] = load_images(name, root).test
        if images.pixels.shape[1:] != task.images.pixels.shape[1:]:
            raise NQMError(
                f"evaluate.ood {name!r} holds images of {tuple(images.pixels.shape[1:])}, the task "
                f"of {tuple(task.images.pixels.shape[1:])} (channels, height, width)"
            )
    return sets


def _corrupted(model: nn.Module, task: Task) -> Iterator[Row]:
    """Accuracy under every corruption and severity."""
    if task.images is None or task.normalised is None:
        raise NQMError(f"evaluate.corruptions needs images in memory; {task.label} has none")
    for name in evaluate.CORRUPTIONS:
        for severity in range(1, 6):
            pixels = evaluate.corrupt(task.images.pixels, name, severity)
            images = Images(pixels, task.images.labels)
            score = task.score(model, task.normalised(images))
            yield {"data": f"{name} {severity}", "metric": "accuracy", "value": score.accuracy}
