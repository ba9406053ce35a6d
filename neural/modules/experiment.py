"""Leave one domain out: modules of the others combined for it, in one table.

::

    modules.parquet        one row for each model, target and split
    modules_summary.csv    means over targets and splits, with intervals
    modules.png, .pdf      its picture
    cells/                 parts that are done
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from neural.combine.cells import Cells
from neural.combine.config import CombineConfig
from neural.combine.members import Member, Members, State, state_key
from neural.combine.pool import POOLS
from neural.combine.studies import kept_table
from neural.data.opinions import DOMAINS
from neural.data.sampling import keyed_generator
from neural.late_phase.members import Batch
from neural.modules.composition import compositions
from neural.modules.data import ENCODERS, Domain, load_domains, split
from neural.modules.networks import KINDS, Examples, FitConfig, ModuleNet, train_head, train_module
from neural.modules.report import reported
from neural.modules.scores import SCORES, Evidence, TextParts
from nqm import keys
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Purposes of random draws, which belong to their keys.
_SPLIT, _START, _HEAD, _MODULE = range(4)


@dataclass(frozen=True)
class ModulesConfig:
    """Settings of the experiment: the table ``[modules]``.

    Attributes
    ----------
    task : {"opinions"}
        Language models have settings of their own: `neural.modules.language.LanguageConfig`.
    domains : tuple of str
        Of `neural.data.opinions.DOMAINS`; each is left out once.
    encoder : {"minilm", "hashing"}
        The frozen trunk; ``hashing`` has no trained weights and is for checks.
    margin : float
        Texts with a mean sentiment of at most this size are left out.
    splits : int
        Independent draws of all parts.
    train, held_out, sample, test : int
        Texts of a domain on which modules are trained; by which training is stopped (of the target:
        on which labels may choose, and temperatures are tuned); which scores look at; which are
        evaluated.
    kind : {"bottleneck", "lora"}
    rank : int
        Of the bottleneck or of the update.
    lr, epochs, patience, batch_size
        See `neural.modules.networks.FitConfig`.
    scores : tuple of str
        Of `neural.modules.scores.SCORES`.
    pools : tuple of str
        How predictions are pooled.
    predict : bool
        Whether losses are predicted from derivatives at the mean of the modules.
    seed : int
    """

    task: str = "opinions"
    domains: tuple[str, ...] = tuple(DOMAINS)
    encoder: str = "minilm"
    margin: float = 0.5
    splits: int = 5
    train: int = 1000
    held_out: int = 300
    sample: int = 100
    test: int = 1000
    kind: str = "bottleneck"
    rank: int = 32
    lr: float = 1e-3
    epochs: int = 30
    patience: int = 3
    batch_size: int = 32
    scores: tuple[str, ...] = tuple(SCORES)
    pools: tuple[str, ...] = tuple(POOLS)
    predict: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("ModulesConfig.task", self.task, ("opinions",))
        for name, known in (("domains", DOMAINS), ("scores", SCORES), ("pools", POOLS)):
            values = getattr(self, name)
            for value in values:
                check_word(f"ModulesConfig.{name}", value, tuple(known))
            if len(set(values)) < len(values):
                raise NQMError(f"ModulesConfig.{name} names one twice: {list(values)}")
        if len(self.domains) < 3:
            raise NQMError(
                "ModulesConfig.domains must be three at least: one is left out, and two are "
                f"combined; got {list(self.domains)}"
            )
        check_word("ModulesConfig.encoder", self.encoder, ENCODERS)
        check_word("ModulesConfig.kind", self.kind, KINDS)
        check_number("ModulesConfig.margin", self.margin, low=0.0, high=4.0, closed_high=False)
        for name in ("splits", "train", "held_out", "sample", "test", "rank"):
            check_integer(f"ModulesConfig.{name}", getattr(self, name), 1)
        check_integer("ModulesConfig.seed", self.seed, 0)
        self.fit  # noqa: B018 -- its checks

    @property
    def fit(self) -> FitConfig:
        """Training of heads and modules."""
        return FitConfig(self.lr, self.epochs, self.patience, self.batch_size)


@dataclass
class _Parts:
    """One domain's parts in one split."""

    domain: Domain
    train: Examples
    held_out: Examples
    sample: torch.Tensor
    test: Examples = field(repr=False)


def compare_modules(
    domains: list[Domain],
    config: ModulesConfig,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Combine the modules of all domains but one for that one; each domain in turn, in each split.

    Parameters
    ----------
    domains : list of Domain
        Three at least.
    config : ModulesConfig
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called as ``progress("modules", share)``.

    Returns
    -------
    DataFrame
        Columns of `neural.combine.compare` after ``split``, ``target``, ``score``, ``kept`` and
        ``weighting``. Scores are those of `SCORES`, and ``no_module``, ``best`` (by the target's
        held-out labels), ``inverse_loss`` (likewise), ``member``, ``mean_member``.

    Raises
    ------
    NQMError
        If a domain has too few texts, or training diverges.
    """
    import pandas as pd

    cells = cells or Cells()
    more = counted(progress, "modules", float(config.splits * len(domains)))
    sizes = config.train, config.held_out, config.sample, config.test
    tables = []
    for number in range(config.splits):
        parts = []
        for k, domain in enumerate(domains):
            at = split(domain.name, len(domain.texts), sizes, config.seed, _SPLIT, number, k)
            a, b, c = (domain.examples(at[i]) for i in (0, 1, 3))
            parts.append(_Parts(domain, a, b, at[2], c))
        for target in range(len(domains)):
            table = _one(parts, target, number, config, cells)
            table.insert(0, "split", number)
            table.insert(1, "target", domains[target].name)
            tables.append(table)
            more(1)
    return pd.concat(tables, ignore_index=True)


def _one(
    parts: list[_Parts], target: int, number: int, config: ModulesConfig, cells: Cells
) -> pd.DataFrame:
    """All models for one target in one split."""
    others = [k for k in range(len(parts)) if k != target]
    own = parts[target]
    members = _members(parts, others, (config.seed, number, target), config, cells)
    evidence = Evidence(
        tuple(parts[k].domain.sample(parts[k].sample) for k in others),
        own.domain.sample(own.sample),
        tuple(_batches(own.domain.examples(own.sample))),
    )
    judged = TextParts(
        lambda: _batches(own.test), held_out=lambda: _batches(own.held_out), evidence=evidence
    )
    content = [state_key({"vectors": part.domain.vectors}) for part in parts]
    about = {"keys": content, "split": number, "target": target, **keys.differing(config)}
    return compositions(
        members,
        judged,
        {name: SCORES[name] for name in config.scores},
        CombineConfig(pools=config.pools, repair=("none",), predict=config.predict),
        cells=cells.on(about),
    )


def _members(parts: list[_Parts], others: list[int], key: tuple[int, int, int],
             config: ModulesConfig, cells: Cells) -> Members:  # fmt: skip
    """Modules of all domains but the target's, on a head that is trained without it."""
    width = parts[0].train.inputs.shape[1]
    classes = 1 + max(int(part.train.labels.max()) for part in parts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(*key, _START).initial_seed() >> 1)
        net = ModuleNet(width, classes, config.kind, config.rank)
    about = {"key": key, "trained": keys.differing(config),
             "data": [state_key({"x": part.domain.vectors}) for part in parts]}  # fmt: skip

    def kept(name: str, make: Callable[[], tuple[State, float]]) -> tuple[State, float]:
        def arrays() -> dict[str, np.ndarray]:
            state, epochs = make()
            return {"epochs": np.array(epochs)} | {n: v.numpy() for n, v in state.items()}

        cell = cells.get({"kind": "module", "name": name, **about}, arrays)
        state = {n: torch.from_numpy(v) for n, v in cell.items() if n != "epochs"}
        return state, float(cell["epochs"])

    def joined(name: str) -> Examples:
        several = [getattr(parts[k], name) for k in others]
        return Examples(*(torch.cat([getattr(one, n) for one in several])
                          for n in ("inputs", "labels")))  # fmt: skip

    def head() -> tuple[State, float]:
        return train_head(
            net, joined("train"), joined("held_out"), config.fit, keyed_generator(*key, _HEAD)
        )

    def module(k: int) -> tuple[State, float]:
        part, order = parts[k], keyed_generator(*key, _MODULE, k)
        return train_module(net, part.train, part.held_out, config.fit, order)

    start, _ = kept("head", head)
    net.load_state_dict(start)
    made = []
    for k in others:
        name = parts[k].domain.name
        state, epochs = kept(name, partial(module, k))
        made.append(Member(name, partial(dict, state), epochs))
    return Members(net.requires_grad_(True), made, Member("no_module", lambda: start))


def _batches(examples: Examples, size: int = 500) -> list[Batch]:
    at = range(0, len(examples), size)
    return [(examples.inputs[i : i + size], examples.labels[i : i + size]) for i in at]


def run_modules(
    config: ModulesConfig, out: Path, *, root: Path | None = None, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """`compare_modules` on opinions, kept in a folder; a killed run goes on.

    Parameters
    ----------
    config : ModulesConfig
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
        If data or the encoder are missing, or the folder holds another run.
    """

    def made() -> pd.DataFrame:
        domains = load_domains(config.domains, config.encoder, config.margin, root)
        return compare_modules(domains, config, cells=Cells(out / "cells"), progress=progress)

    stated, keyed = {"modules": asdict(config)}, {"modules": keys.differing(config)}
    return reported(kept_table(out, "modules", stated, keyed, made), out)
