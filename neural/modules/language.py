"""Leave one domain out with language models: updates of low rank on one small transformer.

The trunk, a transformer over bytes, is trained on a text of its own; each domain has an update of
low rank of the trunk's linear maps. Parts that are done are kept in ``cells``: the trunk, the
modules, and the table of each target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from neural.combine.cells import Arrays, Cells
from neural.combine.config import CombineConfig
from neural.combine.members import Member, Members, State, state_key
from neural.combine.pool import POOLS
from neural.combine.studies import kept_table
from neural.data import TextData, load
from neural.data.emails import load_emails
from neural.data.opinions import DOMAINS as OPINIONS
from neural.data.opinions import load_opinions
from neural.data.sampling import keyed_generator
from neural.data.text import TextBatches
from neural.late_phase.members import Batch
from neural.models.transformer import TransformerLanguageModel
from neural.modules.composition import compositions
from neural.modules.data import split
from neural.modules.networks import Examples, FitConfig, train_lora
from neural.modules.report import reported, settings_key
from neural.modules.scores import LANGUAGE_SCORES, Evidence, Sample, TextParts
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Texts by name: sets of text of `neural.data`, e-mails, and domains of opinions.
TEXTS = ("wikitext2_bytes", "python_docs", "emails", *OPINIONS)
#: Purposes of random draws, which belong to their keys.
_SPLIT, _START, _MODULE = range(3)
#: Windows that are evaluated together.
_ROWS = 64
#: Settings that trunk and modules do not depend on.
_OF_TABLE = ("splits", "scores", "pools", "predict", "predict_examples")
#: Settings that the trunk alone does not depend on, either.
_OF_MODULE = (
    "domains", "train", "held_out", "sample", "test", "rank", "lr", "epochs", "patience"
)  # fmt: skip
#: Share of the trunk's steps in which its learning rate rises.
_WARM = 0.05


@dataclass(frozen=True)
class LanguageConfig:
    """Settings of the experiment: the table ``[modules]`` with ``task = "language"``.

    Attributes
    ----------
    task : {"language"}
    trunk : str
        Text that the trunk is trained on, of `TEXTS`.
    domains : tuple of str
        Of `TEXTS`, without the trunk's; each is left out once.
    context : int
        Bytes of a window.
    width, heads, layers : int
        Of the trunk.
    trunk_epochs, trunk_lr
        Epochs over the trunk's text and largest learning rate: it rises over the first 5 % of the
        steps and falls to 0 as a cosine.
    splits : int
        Independent draws of all parts of the domains, and of the modules' start.
    train, held_out, sample, test : int
        Windows of a domain on which modules are trained; by which training is stopped (of the
        target: on which the best module is chosen, and temperatures are tuned); which scores look
        at; which are evaluated.
    rank : int
        Of the updates.
    lr, epochs, patience, batch_size
        Of the modules; see `neural.modules.networks.FitConfig`. The trunk has the same batch size.
    scores : tuple of str
        Of `neural.modules.scores.LANGUAGE_SCORES`.
    pools : tuple of str
        How predictions are pooled.
    predict : bool
        Whether losses are predicted from derivatives at the mean of the modules.
    predict_examples : int
        Windows at which the derivatives are taken.
    seed : int
    """

    task: str = "language"
    trunk: str = "wikitext2_bytes"
    domains: tuple[str, ...] = ("python_docs", "emails", "films", "nyt", "tweets")
    context: int = 128
    width: int = 64
    heads: int = 4
    layers: int = 2
    trunk_epochs: int = 1
    trunk_lr: float = 3e-3
    splits: int = 3
    train: int = 384
    held_out: int = 16
    sample: int = 32
    test: int = 48
    rank: int = 8
    lr: float = 3e-3
    epochs: int = 4
    patience: int = 1
    batch_size: int = 16
    scores: tuple[str, ...] = tuple(LANGUAGE_SCORES)
    pools: tuple[str, ...] = tuple(POOLS)
    predict: bool = True
    predict_examples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("LanguageConfig.task", self.task, ("language",))
        check_word("LanguageConfig.trunk", self.trunk, TEXTS)
        for name, known in (("domains", TEXTS), ("scores", LANGUAGE_SCORES), ("pools", POOLS)):
            values = getattr(self, name)
            for value in values:
                check_word(f"LanguageConfig.{name}", value, tuple(known))
            if len(set(values)) < len(values):
                raise NQMError(f"LanguageConfig.{name} names one twice: {list(values)}")
        if len(self.domains) < 3:
            raise NQMError(
                "LanguageConfig.domains must be three at least: one is left out, and two are "
                f"combined; got {list(self.domains)}"
            )
        if self.trunk in self.domains:
            raise NQMError(
                f"LanguageConfig.domains must not name the trunk's text, {self.trunk!r}: it would "
                "be no unseen domain"
            )
        sizes = ("context", "width", "heads", "layers", "trunk_epochs", "splits", "train",
                 "held_out", "sample", "test", "rank", "predict_examples")  # fmt: skip
        for name in sizes:
            check_integer(f"LanguageConfig.{name}", getattr(self, name), 1)
        if self.width % self.heads:
            raise NQMError(
                f"LanguageConfig.heads must divide width = {self.width}; got {self.heads}"
            )
        check_number("LanguageConfig.trunk_lr", self.trunk_lr, low=0.0, closed_low=False)
        check_integer("LanguageConfig.seed", self.seed, 0)
        self.fit  # noqa: B018 -- its checks

    @property
    def fit(self) -> FitConfig:
        """Training of modules."""
        return FitConfig(self.lr, self.epochs, self.patience, self.batch_size)

    def network(self) -> TransformerLanguageModel:
        """The trunk at its start.

        Returns
        -------
        TransformerLanguageModel
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator(self.seed, _START).initial_seed() >> 1)
            return TransformerLanguageModel(
                classes=256, context=self.context, width=self.width, heads=self.heads,
                layers=self.layers,
            )  # fmt: skip


def load_text(name: str, root: Path | None = None) -> Tensor:
    """All bytes of a text.

    Parameters
    ----------
    name : str
        Of `TEXTS`. Sentences and e-mails follow each other, a line apart.
    root : Path, optional
        Folder of all data.

    Returns
    -------
    Tensor of uint8, shape (T,)

    Raises
    ------
    NQMError
        If the name is unknown, or data are missing.
    """
    check_word("text", name, TEXTS)
    if name in OPINIONS or name == "emails":
        texts = load_emails(root) if name == "emails" else load_opinions(name, root).texts
        return torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8)
    data = load(name, root)
    assert isinstance(data, TextData)
    return torch.cat([data.train, data.valid, data.test])


@dataclass(frozen=True, eq=False)
class Windows:
    """A text in windows that follow each other.

    Attributes
    ----------
    name : str
    tokens : Tensor of uint8, shape (n, L + 1)
        The last byte of a window is the first of the next one.
    """

    name: str
    tokens: Tensor = field(repr=False)

    @classmethod
    def of_text(cls, name: str, text: Tensor, length: int) -> Windows:
        """Cut a text.

        Parameters
        ----------
        name : str
        text : Tensor of uint8, shape (T,)
        length : int
            L.

        Returns
        -------
        Windows
        """
        return cls(name, text.unfold(0, length + 1, length) if len(text) > length
                   else text.new_empty(0, length + 1))  # fmt: skip

    def __len__(self) -> int:
        """Windows."""
        return len(self.tokens)

    def examples(self, index: Tensor) -> Examples:
        """Some windows, with the byte after each byte.

        Parameters
        ----------
        index : Tensor of int64, shape (m,)

        Returns
        -------
        neural.modules.networks.Examples
        """
        chosen = self.tokens[index].long()
        return Examples(chosen[:, :-1], chosen[:, 1:])

    def sample(self, index: Tensor, trunk: TransformerLanguageModel) -> Sample:
        """Some windows as texts, with the trunk's mean features.

        Parameters
        ----------
        index : Tensor of int64, shape (m,)
        trunk : TransformerLanguageModel

        Returns
        -------
        Sample
        """
        rows = self.tokens[index, :-1]
        texts = tuple(bytes(row.tolist()).decode("utf-8", "replace") for row in rows)
        with torch.no_grad():
            vectors = torch.cat(
                [trunk.features(part.long()).mean(1) for part in torch.split(rows, _ROWS)]
            )
        return Sample(texts, vectors)


def train_trunk(config: LanguageConfig, text: Tensor) -> State:
    """Train the trunk.

    Parameters
    ----------
    config : LanguageConfig
    text : Tensor of uint8, shape (T,)

    Returns
    -------
    dict of str to Tensor
        State dict of ``config.network()``.

    Raises
    ------
    NQMError
        If the text is too short, or training diverges.
    """
    net = config.network()
    stream = TextBatches(text, config.batch_size, config.context, seed=config.seed)
    optimizer = torch.optim.AdamW(net.parameters(), config.trunk_lr, weight_decay=0.01)
    steps = config.trunk_epochs * len(stream)
    warm = math.ceil(_WARM * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(config.trunk_epochs):
        for inputs, labels in stream.epoch(epoch):
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs).flatten(0, -2), labels.flatten())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if not math.isfinite(float(loss.detach())):
            raise NQMError(f"training the trunk diverged in epoch {epoch + 1}; lower trunk_lr")
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def compare_language_modules(
    trunk: Tensor,
    domains: Sequence[Windows],
    config: LanguageConfig,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Combine the modules of all domains but one for that one; each domain in turn, in each split.

    Parameters
    ----------
    trunk : Tensor of uint8, shape (T,)
        Text that the trunk is trained on.
    domains : sequence of Windows
        Three at least.
    config : LanguageConfig
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called as ``progress("modules", share)``.

    Returns
    -------
    DataFrame
        See `neural.modules.compare_modules`; losses are in nats a byte.

    Raises
    ------
    NQMError
        If a text is too short, or training diverges.
    """
    import pandas as pd

    cells = cells or Cells()
    count = len(domains)
    # A module takes about as long as a target; the trunk as long as some splits.
    more = counted(progress, "modules", float(2 * config.splits * count + 4 * count))
    sizes = config.train, config.held_out, config.sample, config.test
    splits = [
        [split(domain.name, len(domain), sizes, config.seed, _SPLIT, number, k)
         for k, domain in enumerate(domains)]
        for number in range(config.splits)
    ]  # fmt: skip
    digests = [state_key({"x": trunk}), *(state_key({"x": one.tokens}) for one in domains)]
    # More splits go on from those that are there; modules do not depend on what they are used for.
    of_table: dict[str, Any] = {"config": settings_key(config, "splits"), "data": digests}
    of_module: dict[str, Any] = {"config": settings_key(config, *_OF_TABLE), "data": digests}
    of_trunk: dict[str, Any] = {
        "config": settings_key(config, *_OF_TABLE, *_OF_MODULE),
        "data": digests[0],
    }

    def kept(what: dict[str, Any], make: Callable[[], State]) -> State:
        cell = cells.get(what, lambda: {n: v.numpy() for n, v in make().items()})
        return {name: torch.from_numpy(value) for name, value in cell.items()}

    net = config.network().eval()
    start = kept({"kind": "trunk", **of_trunk}, lambda: train_trunk(config, trunk))
    net.load_state_dict(start)
    more(4 * count)
    tables = []
    for number, parts in enumerate(splits):
        states = []
        for k, domain in enumerate(domains):
            what = {"kind": "module", "split": number, "domain": k, **of_module}
            states.append(kept(what, partial(_module, net, domain, parts[k], config, number, k)))
            more(1)
        for target in range(count):
            what = {"kind": "table", "split": number, "target": target, **of_table}
            make = partial(_one, net, domains, parts, states, target, config)
            table = pd.DataFrame(cells.get(what, partial(_packed, make)))
            table.insert(0, "split", number)
            table.insert(1, "target", domains[target].name)
            tables.append(table)
            more(1)
    return pd.concat(tables, ignore_index=True)


def _module(net: TransformerLanguageModel, domain: Windows, parts: Sequence[Tensor],
            config: LanguageConfig, number: int, k: int) -> State:  # fmt: skip
    """A domain's module, added to the trunk's weights."""
    train, held_out = (domain.examples(parts[i]) for i in (0, 1))
    order = keyed_generator(config.seed, _MODULE, number, k)
    state, epochs = train_lora(net, config.rank, "blocks.*", train, held_out, config.fit, order)
    return {**state, "epochs": torch.tensor(epochs)}


def _packed(make: Callable[[], pd.DataFrame]) -> Arrays:
    """A table as arrays without Python objects."""
    table = make()
    columns = {str(name): table[name].to_numpy() for name in table}
    return {name: v.astype(np.str_) if v.dtype == object else v for name, v in columns.items()}


def _one(net: TransformerLanguageModel, domains: Sequence[Windows],
         parts: Sequence[Sequence[Tensor]], states: Sequence[State], target: int,
         config: LanguageConfig) -> pd.DataFrame:  # fmt: skip
    """All models for one target in one split."""
    others = [k for k in range(len(domains)) if k != target]
    start = {name: value.clone() for name, value in net.state_dict().items()}
    made = [
        Member(domains[k].name, partial(_without_epochs, states[k]), float(states[k]["epochs"]))
        for k in others
    ]
    members = Members(net, made, Member("no_module", lambda: start))
    own, at = domains[target], parts[target]

    def batches(part: int) -> list[Batch]:
        chosen = own.examples(at[part])
        return list(
            zip(*(torch.split(x, _ROWS) for x in (chosen.inputs, chosen.labels)), strict=True)
        )

    evidence = Evidence(
        tuple(domains[k].sample(parts[k][2], net) for k in others),
        own.sample(at[2], net),
        tuple(batches(2)),
    )
    return compositions(
        members,
        TextParts(partial(batches, 3), held_out=partial(batches, 1), evidence=evidence),
        {name: LANGUAGE_SCORES[name] for name in config.scores},
        CombineConfig(
            pools=config.pools, repair=("none",), predict=config.predict,
            predict_examples=config.predict_examples,
        ),
        criterion="nll",
    )  # fmt: skip


def _without_epochs(state: State) -> State:
    return {name: value for name, value in state.items() if name != "epochs"}


def run_language_modules(
    config: LanguageConfig, out: Path, *, root: Path | None = None, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """`compare_language_modules` on texts by name, kept in a folder; a killed run goes on.

    Parameters
    ----------
    config : LanguageConfig
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
        domains = [
            Windows.of_text(name, load_text(name, root), config.context) for name in config.domains
        ]
        trunk, cells = load_text(config.trunk, root), Cells(out / "cells")
        return compare_language_modules(trunk, domains, config, cells=cells, progress=progress)

    stated, keyed = {"modules": asdict(config)}, {"modules": settings_key(config)}
    return reported(kept_table(out, "modules", stated, keyed, made), out)
