"""The task of a run: a stream of training batches, a loss, and a test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neural.data import (
    Data,
    FolderBatches,
    ImageBatches,
    ImageData,
    Images,
    StreamData,
    TextBatches,
    TextData,
    evaluation_batches,
    evaluation_windows,
    load,
)
from neural.data.own import OWN
from neural.data.sampling import EpochPlan
from neural.evaluate import Score, score, score_text
from neural.late_phase.members import Batch
from neural.training.config import DataConfig, RunConfig, refuse_unused
from nqm.errors import NQMError

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}


class Stream(Protocol):
    """Training batches that depend on (seed, epoch, index) alone."""

    @property
    def plan(self) -> EpochPlan:
        """Sizes of the minibatches, and this process's share of each."""

    def __len__(self) -> int:
        """Number of minibatches of an epoch."""

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Batch]:
        """Iterate over the minibatches of an epoch.

        Parameters
        ----------
        epoch : int
            Number of the epoch, from 0.
        start : int
            Number of the first minibatch, from 0.

        Returns
        -------
        iterator of Batch
            Inputs and targets of each minibatch.
        """


@dataclass(frozen=True)
class Runtime:
    """Device, data folder and processes of a training.

    Attributes
    ----------
    device : torch.device
        Device of the computation. Small sets of images are stored on it completely, as bytes.
    root : Path, optional
        Folder of data files; by default that of the environment variable NQM_DATA.
    rank, world : int
        Number of this process, and number of all processes that share every minibatch.
    workers : int
        Number of processes that decode images.
    loggers : tuple of str
        Names of the loggers that are told of a run (see `neural.training.loggers`).
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    root: Path | None = None
    rank: int = 0
    world: int = 1
    workers: int = 0
    loggers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Data and loss of a run.

    Attributes
    ----------
    label : str
        Name of the data set for tables and figures.
    classes : int
        Number of classes; for text, number of symbols.
    channels : int
        Number of channels of an image; 0 for text.
    stream : Stream
        Training batches.
    test : callable
        Returns an iterator over the test batches.
    smoothing : float
        Label smoothing of the loss, in [0, 1].
    normalised : callable, optional
        Makes batches of other `Images` with this data set's normalisation; None for text and for
        images that are read from a folder.
    images : Images, optional
        The test images, if they are in memory.
    """

    label: str
    classes: int
    channels: int
    stream: Stream
    test: Callable[[], Iterator[Batch]]
    smoothing: float
    normalised: Callable[[Images], Iterator[Batch]] | None = None
    images: Images | None = None

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy.

        Parameters
        ----------
        output : Tensor, shape (B, C) or (B, L, C)
            Logits.
        targets : Tensor, shape (B,) or (B, L)
            Class numbers.

        Returns
        -------
        Tensor, shape ()
            In nats.
        """
        # At least in float32, also if the model runs in a lower precision.
        logits = output.to(torch.promote_types(output.dtype, torch.float32)).flatten(0, -2)
        return nn.functional.cross_entropy(
            logits, targets.flatten(), label_smoothing=self.smoothing
        )

    def score(self, model: nn.Module, batches: Iterable[Batch] | None = None) -> Score:
        """Compute mean loss and accuracy; a language model keeps its state between windows.

        Parameters
        ----------
        model : Module
            The model.
        batches : iterable of Batch, optional
            Batches of test data; the test set by default.

        Returns
        -------
        Score
            Loss in nats.
        """
        kind = score_text if self.channels == 0 else score
        return kind(model, self.test() if batches is None else batches)


def load_data(config: DataConfig, root: Path | None) -> Data:
    """Load the data set of a run, one of the catalogue or the user's own.

    Parameters
    ----------
    config : DataConfig
        Its name, and path and size of own data.
    root : Path, optional
        Folder of data files.

    Returns
    -------
    ImageData, StreamData or TextData

    Raises
    ------
    NQMError
        If the data set is unknown, missing or damaged.
    """
    if config.path is None:
        return load(config.name, root)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise NQMError(f"data.path {config.path}: no such file or folder")
    data = OWN[config.name][1](path, config.size)
    # Metrics of a run are named by its data.
    return replace(data, name=config.name)


def open_task(run: RunConfig, runtime: Runtime, data: Data | None = None) -> Task:
    """Open the data, loss and score of a run.

    Parameters
    ----------
    run : RunConfig
        The run.
    runtime : Runtime
        Device, folder of data files, and ranks.
    data : ImageData, StreamData or TextData, optional
        The run's data set, if it is loaded already.

    Returns
    -------
    Task
        Data and loss.

    Raises
    ------
    NQMError
        If the data set is missing, does not fit the run, or would not use one of its settings.
    """
    data = load_data(run.data, runtime.root) if data is None else data
    if isinstance(data, TextData):
        return _text(run, data, runtime)
    if isinstance(data, StreamData):
        return _folder(run, data, runtime)
    return _images(run, data, runtime)


def _images(run: RunConfig, data: ImageData, runtime: Runtime) -> Task:
    settings = run.data
    refuse_unused(settings, "data", ("length",), "images have none")
    if data.train is None:
        raise NQMError(f"data.name {settings.name!r} has no training part; it serves as OOD data")
    # The same images for every seed: runs of different seeds differ by their training only.
    train = _part("train_examples", data.train, settings.train_examples)
    test = _part("test_examples", data.test, settings.test_examples).to(runtime.device)
    layout = torch.channels_last if run.train.channels_last else None
    mean, std = settings.mean or data.mean, settings.std or data.std
    stream = ImageBatches(
        train,
        settings.batch_size,
        mean=mean,
        std=std,
        augment=settings.augment,
        cutout=settings.cutout,
        sampling=settings.sampling,
        seed=run.seed,
        device=runtime.device,
        rank=runtime.rank,
        world=runtime.world,
        dtype=DTYPES[run.train.precision],
        memory_format=layout,
    )

    def normalised(images: Images) -> Iterator[Batch]:
        size = run.evaluate.batch_size
        for x, y in evaluation_batches(images, size, mean, std, runtime.device):
            form = layout or torch.contiguous_format
            yield x.to(DTYPES[run.train.precision], memory_format=form), y

    return Task(
        data.label,
        data.classes,
        data.shape[0],
        stream,
        lambda: normalised(test),
        run.train.label_smoothing,
        normalised,
        test,
    )


def _part(name: str, images: Images, count: int | None) -> Images:
    if count is None:
        return images
    if count > len(images):
        raise NQMError(f"data.{name} must be at most {len(images)}; got {count}")
    return images.subset(count)


def _start(name: str, text: Tensor, count: int | None) -> Tensor:
    if count is not None and count > len(text):
        raise NQMError(f"data.{name} must be at most the {len(text)} bytes there are; got {count}")
    return text[:count]


def _folder(run: RunConfig, data: StreamData, runtime: Runtime) -> Task:
    settings = run.data
    refuse_unused(settings, "data", ("length",), "images have none")
    refuse_unused(
        settings,
        "data",
        ("augment", "cutout"),
        "streamed images are cropped at random and mirrored",
    )
    refuse_unused(settings, "data", ("sampling",), "streamed images are always shuffled")
    refuse_unused(
        settings, "data", ("train_examples", "test_examples"), "all streamed images are used"
    )
    layout = torch.channels_last if run.train.channels_last else None
    shared: dict[str, Any] = {
        "mean": settings.mean or data.mean,
        "std": settings.std or data.std,
        "size": data.size,
        "device": runtime.device,
        "workers": runtime.workers,
        "memory_format": layout,
        "dtype": DTYPES[run.train.precision],
    }
    stream = FolderBatches(
        data.train,
        run.data.batch_size,
        seed=run.seed,
        rank=runtime.rank,
        world=runtime.world,
        **shared,
    )
    test = FolderBatches(
        data.test, run.evaluate.batch_size, train=False, resize=data.resize, **shared
    )
    smoothing = run.train.label_smoothing
    return Task(data.label, data.classes, 3, stream, test.epoch, smoothing)


def _text(run: RunConfig, data: TextData, runtime: Runtime) -> Task:
    settings = run.data
    refuse_unused(settings, "data", ("augment", "cutout", "mean", "std"), "a text has none")
    refuse_unused(run.train, "train", ("channels_last",), "a text has no channels")
    data = data.compact()
    train = _start("train_examples", data.train, settings.train_examples)
    test = _start("test_examples", data.test, settings.test_examples)
    stream = TextBatches(
        train,
        settings.batch_size,
        settings.length,
        seed=run.seed,
        sampling=settings.sampling,
        device=runtime.device,
        rank=runtime.rank,
        world=runtime.world,
    )
    rows = max(1, run.evaluate.batch_size // settings.length)
    return Task(
        data.label,
        data.symbols,
        0,
        stream,
        lambda: evaluation_windows(test, rows, settings.length, runtime.device),
        run.train.label_smoothing,
    )
