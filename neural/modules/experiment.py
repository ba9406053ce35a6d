"""Leave one domain out: modules of the others combined for it, in one table.

::

    modules.parquet        one row for each model, target and split
    modules_summary.csv    means over targets and splits, with intervals
    modules.png, .pdf      its picture
    cells/                 parts that are done
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from neural.combine.cells import Cells
from neural.combine.comparison import SURROGATE, compare
from neural.combine.config import CombineConfig
from neural.combine.members import Member, Members, State, state_key
from neural.combine.pool import POOLS
from neural.combine.rules import RULES, Linear, Merge, TaskArithmetic
from neural.combine.survey import kept_table
from neural.combine.weigh import WEIGHTS, Weigh
from neural.data.opinions import DOMAINS
from neural.data.sampling import keyed_generator
from neural.evaluate.intervals import mean_interval
from neural.late_phase.members import Batch
from neural.modules.data import ENCODERS, Domain, load_domains, split
from neural.modules.networks import KINDS, Examples, FitConfig, ModuleNet, train_head, train_module
from neural.modules.scores import SCORES, Evidence, Scored, TextParts
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
            at = split(domain, sizes, config.seed, _SPLIT, number, k)
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
    rules: dict[str, Merge] = {"no_module": TaskArithmetic(0.0), "best": RULES["best"]}
    weights: dict[str, Weigh] = {"inverse_loss": WEIGHTS["inverse_loss"]}
    stated = {name: (name, len(others), "") for name in (*rules, *weights)}
    for name in config.scores:
        for kept, weighting in _ways(name, len(others)):
            label = f"{name} {kept} {weighting}"
            stated[label] = name, kept, weighting
            weights[label] = Scored(SCORES[name], kept, weighting)
    rules |= {name: Linear(weigh) for name, weigh in weights.items()}
    content = [state_key({"vectors": part.domain.vectors}) for part in parts]
    about = {"keys": content, "split": number, "target": target, **keys.differing(config)}
    table = compare(
        members,
        judged,
        CombineConfig(pools=config.pools, repair=("none",), predict=config.predict),
        rules=rules,
        weights=weights,
        cells=cells,
        about=about,
    )
    names = [rule.removeprefix("ensemble_") for rule in table["rule"]]
    kinds = [stated.get(name, (name, 1, "")) for name in names]
    for at, column in enumerate(("score", "kept", "weighting")):
        table.insert(at, column, [kind[at] for kind in kinds])
    return table.drop(columns=["rule", "repair", "data", "bits"])


def _ways(score: str, count: int) -> Iterator[tuple[int, str]]:
    """Numbers of modules kept and weightings that differ from each other."""
    if score == "uniform":
        yield count, "uniform"
        return
    for kept in range(1, count + 1):
        if kept < count:
            yield kept, "uniform"
        if kept > 1:
            yield kept, "linear"


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


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over targets, then over splits, with 95 % intervals over splits.

    Parameters
    ----------
    table : DataFrame
        See `compare_modules`.

    Returns
    -------
    DataFrame
        One row for each way of combining: score, kept, weighting, space, then mean and half width
        of accuracy, nll, nll_tuned, mean predicted loss, and the share of predictions that are to
        be believed. Splits share texts, so that intervals are too narrow rather than too wide.
    """
    import pandas as pd

    rows = []
    by = ["score", "kept", "weighting", "space"]
    # A member of another name for each target: their mean.
    for key, group in table.groupby(by, sort=False):
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for name in ("accuracy", "nll", "nll_tuned"):
            values = group.groupby("split")[name].mean().dropna()
            found = mean_interval(values.tolist()) if len(values) else None
            row[name] = found.mean if found else math.nan
            row[f"{name}_half"] = found.half_width if found else math.nan
        row["predicted"] = group["predicted"].mean()
        row["believed"] = float((group["predicted_from"] == SURROGATE).mean())
        rows.append(row)
    return pd.DataFrame(rows)


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
    files : list of str

    Raises
    ------
    NQMError
        If data or the encoder are missing, or the folder holds another run.
    """

    def made() -> pd.DataFrame:
        domains = load_domains(config.domains, config.encoder, config.margin, root)
        return compare_modules(domains, config, cells=Cells(out / "cells"), progress=progress)

    stated, keyed = {"modules": asdict(config)}, {"modules": keys.differing(config)}
    table = kept_table(out, "modules", stated, keyed, made)
    means = summary(table)
    target = out / "modules_summary.csv"
    means.to_csv(target, index=False)
    return means, [str(out / "modules.parquet"), str(target), *map(str, draw(means, out))]


def draw(means: pd.DataFrame, out: Path) -> list[Path]:
    """Draw the summary, as PNG and PDF.

    Parameters
    ----------
    means : DataFrame
        See `summary`.
    out : Path

    Returns
    -------
    list of Path
    """
    from figures import modules as pictures
    from figures import style

    with style.context():
        figure = style.new_figure(style.PAGE, 4.6)
        axes = figure.subplots(1, 2, sharey=True)
        pictures.scores(means, column="accuracy", ax=axes[0])
        pictures.scores(means, column="nll_tuned", ax=axes[1])
        for ax in axes:  # rows fill the panels
            ax.get_legend().remove()
        shown = axes[0].get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower center", ncols=4)
    return style.save(figure, out / "modules", {"table": "modules_summary"})
