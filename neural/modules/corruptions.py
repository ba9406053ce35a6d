"""Leave one corruption out: BatchNorm layers and head for each kind of corrupted image.

The trunk is trained on clean images. A module is what late-phase weights of kind
``batchnorm+head`` are: BatchNorm's weights and statistics, and the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neural.combine.cells import Arrays, Cells
from neural.combine.config import CombineConfig
from neural.combine.members import Member, Members, State, state_key
from neural.combine.pool import POOLS
from neural.combine.studies import kept_table
from neural.data import ImageData, evaluation_batches, load_images
from neural.data.sampling import keyed_generator
from neural.evaluate import CORRUPTIONS, corrupt
from neural.late_phase.members import Batch
from neural.late_phase.select import select
from neural.models import build
from neural.modules.composition import compositions
from neural.modules.data import split
from neural.modules.networks import Examples, FitConfig, train_weights
from neural.modules.report import reported, settings_key
from neural.modules.scores import IMAGE_SCORES, Evidence, Sample, TextParts
from nqm.errors import NQMError, check_integer, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Purposes of random draws, which belong to their keys.
_SPLIT, _START, _TRUNK, _MODULE = range(4)
#: Images that are evaluated together.
_ROWS = 500


@dataclass(frozen=True)
class CorruptionsConfig:
    """Settings of the experiment: the table ``[modules]`` with ``task = "corruptions"``.

    Attributes
    ----------
    task : {"corruptions"}
    data : str
        Labelled images (`neural.data.DATASETS`), small enough for memory.
    model : str
        Network with BatchNorm, as in recipes.
    corruptions : tuple of str
        Of `neural.evaluate.CORRUPTIONS`; each is left out once.
    severity : int
        From 1 to 5.
    splits : int
        Independent draws of all parts and of the trunk's start.
    train, held_out, sample, test : int
        Images on which trunk (clean) and modules (corrupted) are trained; by which training is
        stopped (of the target: on which the best module is chosen, and temperatures are tuned);
        which scores and new statistics look at; which are evaluated.
    lr, epochs, patience, batch_size
        Of trunk and modules; see `neural.modules.networks.FitConfig`.
    scores : tuple of str
        Of `neural.modules.scores.IMAGE_SCORES`.
    pools : tuple of str
        How predictions are pooled.
    predict : bool
        Whether losses are predicted from derivatives at the mean of the modules.
    seed : int
    """

    task: str = "corruptions"
    data: str = "digits"
    model: str = "digits_cnn"
    corruptions: tuple[str, ...] = (
        "gaussian_noise", "impulse_noise", "gaussian_blur", "contrast", "brightness", "fog",
    )  # fmt: skip
    severity: int = 5
    splits: int = 3
    train: int = 800
    held_out: int = 200
    sample: int = 200
    test: int = 500
    lr: float = 3e-3
    epochs: int = 20
    patience: int = 3
    batch_size: int = 32
    scores: tuple[str, ...] = tuple(IMAGE_SCORES)
    pools: tuple[str, ...] = tuple(POOLS)
    predict: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("CorruptionsConfig.task", self.task, ("corruptions",))
        rosters = (("corruptions", CORRUPTIONS), ("scores", IMAGE_SCORES), ("pools", POOLS))
        for name, known in rosters:
            values = getattr(self, name)
            for value in values:
                check_word(f"CorruptionsConfig.{name}", value, tuple(known))
            if len(set(values)) < len(values):
                raise NQMError(f"CorruptionsConfig.{name} names one twice: {list(values)}")
        if len(self.corruptions) < 3:
            raise NQMError(
                "CorruptionsConfig.corruptions must be three at least: one is left out, and two "
                f"are combined; got {list(self.corruptions)}"
            )
        for name in ("severity", "splits", "train", "held_out", "sample", "test"):
            check_integer(f"CorruptionsConfig.{name}", getattr(self, name), 1)
        if self.severity > 5:
            raise NQMError(f"CorruptionsConfig.severity must lie in 1..5; got {self.severity}")
        check_integer("CorruptionsConfig.seed", self.seed, 0)
        self.fit  # noqa: B018 -- its checks

    @property
    def fit(self) -> FitConfig:
        """Training of trunk and modules."""
        return FitConfig(self.lr, self.epochs, self.patience, self.batch_size)


@dataclass(frozen=True, eq=False)
class _Domain:
    """All images with one corruption, normalised."""

    name: str
    images: Examples = field(repr=False)

    def part(self, index: Tensor) -> Examples:
        return Examples(self.images.inputs[index], self.images.labels[index])

    def batches(self, index: Tensor) -> list[Batch]:
        return [(one.inputs, one.labels) for one in map(self.part, torch.split(index, _ROWS))]


def _domains(data: ImageData, config: CorruptionsConfig) -> list[_Domain]:
    """Clean images first, then those of every corruption."""
    sets = [part for part in (data.train, data.test) if part is not None]
    pixels, labels = torch.cat([s.pixels for s in sets]), torch.cat([s.labels for s in sets])

    def made(name: str, pixels: Tensor) -> _Domain:
        images = type(data.test)(pixels, labels)
        rows = [x for x, _ in evaluation_batches(images, _ROWS, data.mean, data.std, "cpu")]
        return _Domain(name, Examples(torch.cat(rows), labels))

    severity, seed = config.severity, config.seed
    corrupted = [made(name, corrupt(pixels, name, severity, seed)) for name in config.corruptions]
    return [made("clean", pixels), *corrupted]


def compare_corruption_modules(
    data: ImageData,
    config: CorruptionsConfig,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Combine the modules of all corruptions but one for that one; each in turn, in each split.

    Parameters
    ----------
    data : ImageData
    config : CorruptionsConfig
    cells : Cells, optional
        Where the tables of single targets are kept; in memory by default.
    progress : callable, optional
        Called as ``progress("modules", share)``.

    Returns
    -------
    DataFrame
        See `neural.modules.compare_modules`. A row ``, new statistics`` has BatchNorm statistics of
        the target's sample, which has no labels.

    Raises
    ------
    NQMError
        If there are too few images, the network has no BatchNorm, or training diverges.
    """
    import pandas as pd

    cells = cells or Cells()
    if not data.classes:
        raise NQMError(f"modules.data {data.name!r} has no labels; choose another")
    clean, *domains = _domains(data, config)
    sizes = config.train, config.held_out, config.sample, config.test
    count = len(clean.images)
    splits = [
        split(data.name, count, sizes, config.seed, _SPLIT, number)
        for number in range(config.splits)
    ]
    about: dict[str, Any] = {
        "config": settings_key(config, "splits"),
        "data": state_key({"x": clean.images.inputs, "y": clean.images.labels}),
    }
    more = counted(progress, "modules", float(config.splits * len(domains)))
    tables = []
    for number, parts in enumerate(splits):

        def arrays(number: int = number, parts: list[Tensor] = parts) -> Arrays:
            return _packed(_split_table(data, clean, domains, parts, number, config, more))

        cell = cells.get({"kind": "split", "split": number, **about}, arrays)
        tables.append(pd.DataFrame(cell))
    return pd.concat(tables, ignore_index=True)


def _packed(table: pd.DataFrame) -> Arrays:
    """A table as arrays without Python objects."""
    columns = {str(name): table[name].to_numpy() for name in table}
    return {name: v.astype(np.str_) if v.dtype == object else v for name, v in columns.items()}


def _split_table(
    data: ImageData, clean: _Domain, domains: Sequence[_Domain], parts: Sequence[Tensor],
    number: int, config: CorruptionsConfig, more: Any,
) -> pd.DataFrame:  # fmt: skip
    """All models for all targets in one split."""
    import pandas as pd

    train, held_out, _, _ = parts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(config.seed, _START, number).initial_seed() >> 1)
        net = build(config.model, classes=data.classes, channels=data.shape[0])
    chosen = select(net, "batchnorm+head").parameters
    names = [name for name, _ in net.named_parameters()]
    key = config.seed, number
    start, _ = train_weights(net, names, clean.part(train), clean.part(held_out), config.fit,
                             keyed_generator(*key, _TRUNK))  # fmt: skip
    net.load_state_dict(start)
    net.eval()
    made = []
    for k, domain in enumerate(domains):
        state, epochs = train_weights(
            net, chosen, domain.part(train), domain.part(held_out), config.fit,
            keyed_generator(*key, _MODULE, k),
        )  # fmt: skip
        made.append(Member(domain.name, partial(dict, state), epochs))
    tables = []
    for target in range(len(domains)):
        table = _one(net, start, domains, made, target, parts, config)
        table.insert(0, "split", number)
        table.insert(1, "target", domains[target].name)
        tables.append(table)
        more(1)
    return pd.concat(tables, ignore_index=True)


def _one(net: nn.Module, start: State, domains: Sequence[_Domain], made: Sequence[Member],
         target: int, parts: Sequence[Tensor],
         config: CorruptionsConfig) -> pd.DataFrame:  # fmt: skip
    """All models for one target in one split."""
    others = [k for k in range(len(domains)) if k != target]
    _, held_out, sample, test = parts
    own = domains[target]
    members = Members(net, [made[k] for k in others], Member("no_module", lambda: start))

    def seen(domain: _Domain) -> Sample:
        return Sample((), _features(net, domain.part(sample).inputs))

    evidence = Evidence(
        tuple(seen(domains[k]) for k in others), seen(own), tuple(own.batches(sample))
    )
    judged = TextParts(
        lambda: own.batches(test),
        train=lambda: own.batches(sample),
        held_out=lambda: own.batches(held_out),
        evidence=evidence,
    )
    return compositions(
        members,
        judged,
        {name: IMAGE_SCORES[name] for name in config.scores},
        CombineConfig(pools=config.pools, repair=("none", "statistics"), predict=config.predict),
    )


def _features(net: nn.Module, inputs: Tensor) -> Tensor:
    """What the output layer of the trunk sees."""
    found: list[Tensor] = []
    head = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    hook = head.register_forward_pre_hook(lambda layer, args: found.append(args[0]))
    try:
        with torch.no_grad():
            net(inputs)
    finally:
        hook.remove()
    return found[0].flatten(1)


def run_corruption_modules(
    config: CorruptionsConfig,
    out: Path,
    *,
    root: Path | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """`compare_corruption_modules` on images by name, kept in a folder; a killed run goes on.

    Parameters
    ----------
    config : CorruptionsConfig
    out : Path
    root : Path, optional
        Folder of all data.
    progress : callable, optional

    Returns
    -------
    summary : DataFrame
    lines : list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If data are missing, or the folder holds another run.
    """

    def made() -> pd.DataFrame:
        data, cells = load_images(config.data, root), Cells(out / "cells")
        return compare_corruption_modules(data, config, cells=cells, progress=progress)

    stated, keyed = {"modules": asdict(config)}, {"modules": settings_key(config)}
    return reported(kept_table(out, "modules", stated, keyed, made), out)
