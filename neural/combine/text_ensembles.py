"""Shallow, semi and deep ensembles of text classifiers (Tyagi et al. 2023), against equal weights.

Texts are split as in cross-validation: every text is tested once, by members that were trained on
other texts and weights that were chosen on yet others. Comparisons with equal weights are paired by
text, given these members; that the training sets overlap is not part of their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.combine.cells import Arrays, Cells, described
from neural.combine.gate import GateConfig, fit_gate
from neural.combine.pool import POOLS
from neural.combine.studies import kept_table
from neural.combine.text_members import (
    FEATURES,
    TEXT_MEMBERS,
    Seen,
    embed_texts,
    fitted_log_probs,
    text_features,
)
from neural.combine.weigh import Accuracy, Best, ByScore, InverseLoss
from neural.data.opinions import DOMAINS, SDIST, Opinions, load_opinions
from neural.evaluate import (
    Score,
    accuracy,
    classification_metrics,
    kappa,
    kappa_matrix,
    macro_f1,
    mcnemar,
    nll,
    paired_bootstrap,
)
from neural.evaluate.intervals import MOST_RESAMPLES
from neural.evaluate.metrics import losses
from neural.evaluate.temperature import fit_temperature
from nqm import keys
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the table, in order.
TABLE = (
    "rule", "member", "members", "accuracy", "macro_f1", "kappa", "nll", "nll_tuned",
    "temperature", "ece", "brier", "mean_member_nll", "ambiguity", "passes", "selected_on",
    "accuracy_gain", "accuracy_gain_low", "accuracy_gain_high", "mcnemar_p",
    "nll_gain", "nll_gain_low", "nll_gain_high",
    "nll_tuned_gain", "nll_tuned_gain_low", "nll_tuned_gain_high", "strength", "predicted_from",
)  # fmt: skip
#: Rule -> objective of its gate. "learned" sees nothing: its weights are the same for all texts;
#: "semi" sees the text, the others outside knowledge as well.
GATES = {
    "learned": "log_score",
    "semi": "log_score",
    "deep": "log_score",
    "deep_reward": "reward",
    "deep_reinforce": "reinforce",
}
#: Rule -> weights by held-out scores.
BY_SCORE: dict[str, ByScore] = {
    "best": Best(),
    "shallow": Accuracy(),
    "inverse_loss": InverseLoss(),
}
#: Texts whose vectors are one cell.
_CHUNK = 1000
#: Why no loss is predicted: the surrogate needs members with weights in one space.
PREDICTED = "none"


@dataclass(frozen=True)
class GatesConfig:
    """Settings of the study: the table ``[gates]``.

    Attributes
    ----------
    domain : str
        ``films``, ``tweets``, ``amazon`` or ``nyt``.
    margin : float
        Texts whose mean sentiment is not farther than this from 0 are left out.
    texts : int
        So many of the others are used, chosen by `seed`; 0: all.
    splits : int
        Parts of which each is the test set once.
    held_out : float
        Share of the other texts on which strengths, weights, gates and temperatures are chosen.
    members : tuple of str
        Classifiers (`neural.combine.text_members.TEXT_MEMBERS`).
    controls : tuple of str
        Classifiers that are reported beside, and are in no ensemble.
    features : tuple of str
        What the gates see (`neural.combine.text_members.FEATURES`).
    side : tuple of str
        What deep gates see as well: knowledge from elsewhere.
    penalty, strengths, folds, steps, lr
        Of the gates, see `neural.combine.gate.GateConfig`.
    baseline : str
        Rule that the others are compared with: ``ensemble`` (equal weights), ``best``, ``learned``
        or another.
    level : float
        Coverage of intervals.
    resamples : int
        Of the bootstrap.
    seed : int
        Of splits, folds, draws and resamples.
    """

    domain: str = "films"
    margin: float = 0.5
    texts: int = 0
    splits: int = 5
    held_out: float = 0.2
    members: tuple[str, ...] = ("words", "characters", "bayes", "hashed")
    controls: tuple[str, ...] = ("joint",)
    features: tuple[str, ...] = ("constant", "confidence", "length", "topics")
    side: tuple[str, ...] = ("lexicon",)
    penalty: float = 1.0
    strengths: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0)
    folds: int = 5
    steps: int = 200
    lr: float = 0.05
    baseline: str = "ensemble"
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("GatesConfig.domain", self.domain, tuple(DOMAINS))
        check_number("GatesConfig.margin", self.margin, low=0.0, high=4.0, closed_high=False)
        check_integer("GatesConfig.texts", self.texts, 0)
        check_integer("GatesConfig.splits", self.splits, 2)
        check_number(
            "GatesConfig.held_out", self.held_out, low=0.0, high=1.0,
            closed_low=False, closed_high=False,
        )  # fmt: skip
        known: dict[str, tuple[str, ...]] = {
            "members": tuple(TEXT_MEMBERS),
            "controls": tuple(TEXT_MEMBERS),
            "features": tuple(FEATURES),
            "side": tuple(FEATURES),
        }
        for name, roster in known.items():
            for value in getattr(self, name):
                check_word(f"GatesConfig.{name}", value, roster)
        for one, two in (("members", "controls"), ("features", "side")):
            both = (*getattr(self, one), *getattr(self, two))
            twice = sorted({name for name in both if both.count(name) > 1})
            if twice:
                raise NQMError(f"GatesConfig: {one} and {two} name {twice[0]!r} twice")
        if len(self.members) < 2:
            raise NQMError(f"GatesConfig.members must name two at least; got {list(self.members)}")
        check_word("GatesConfig.baseline", self.baseline, ("ensemble", *BY_SCORE, *GATES))
        check_number(
            "GatesConfig.level", self.level, low=0.0, high=1.0, closed_low=False, closed_high=False
        )
        check_integer("GatesConfig.resamples", self.resamples, 1)
        if self.resamples > MOST_RESAMPLES:
            raise NQMError(
                f"GatesConfig.resamples must be at most {MOST_RESAMPLES:,}; got {self.resamples:,}"
            )
        self.gate("semi")

    def gate(self, rule: str) -> GateConfig:
        """Settings of one rule's gate.

        Parameters
        ----------
        rule : str
            Of `GATES`.

        Returns
        -------
        GateConfig
        """
        return GateConfig(
            GATES[rule], self.penalty, self.strengths, self.folds, self.steps, self.lr, self.seed
        )


@dataclass
class _Rows:
    """One rule's predictions, each split's test texts behind those of the split before."""

    members: int
    selected_on: str
    log_probs: list[Tensor] = field(default_factory=list)
    tuned: list[Tensor] = field(default_factory=list)
    log_temperature: list[float] = field(default_factory=list)
    mean_member: list[Tensor] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)


def compare_gates(
    opinions: Opinions,
    config: GatesConfig | None = None,
    *,
    cells: Cells | None = None,
    root: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare ways of weighing text classifiers.

    Parameters
    ----------
    opinions : Opinions
        All sentences of a domain.
    config : GatesConfig, optional
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    root : Path or str, optional
        Folder of all data, for features that need some.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    table : DataFrame
        One row a rule, with the columns `TABLE`; gains are over ``config.baseline``, positive where
        the rule is better.

        - ``rule``: ``member``; ``mean_member``; ``control``, in no ensemble; ``best``, the member
          that held-out accuracy chooses; ``ensemble``, with equal weights; ``shallow``, by held-out
          accuracy; ``inverse_loss``; ``learned``, the same for all texts, by the log score;
          ``semi``, ``deep`` and with other objectives ``deep_reward`` and ``deep_reinforce``, with
          gates.
        - ``predicted_from`` is ``none``: `neural.combine.surrogate` expands the loss about the mean
          of the members' weights, and these members have no common weights.
    agreement : DataFrame
        Columns first, second and kappa: every two members, the ensemble, the ``label``, and people
        (``rater``: one against the mean of the others; ``panel``: half against the other half).

    Raises
    ------
    NQMError
        If there are too few texts.
    """
    config = config or GatesConfig()
    made = _Study(opinions, config, cells or Cells(), root)
    return made.tables(progress)


class _Study:
    """One call of `compare_gates`."""

    def __init__(
        self, opinions: Opinions, config: GatesConfig, cells: Cells, root: Path | str | None
    ):
        self.config, self.cells, self.root = config, cells, root
        self.opinions = _chosen(opinions.decided(config.margin), config)
        self.vectors = np.empty((0, 0), np.float32)
        self.splits = list(_splits(self.opinions.labels, config))
        self.about_texts = {
            "data": SDIST.md5, "domain": opinions.domain, "margin": config.margin,
            "texts": config.texts, "texts_seed": config.seed if config.texts else 0,
        }  # fmt: skip
        self.about = {
            **self.about_texts, "splits": config.splits, "held_out": config.held_out,
            "seed": config.seed,
        }  # fmt: skip

    def tables(self, progress: Progress | None) -> tuple[pd.DataFrame, pd.DataFrame]:
        import pandas as pd

        config = self.config
        names = (*config.members, *config.controls)
        if self._needs_vectors():
            self.vectors = self._vectors(progress)
        more = counted(progress, "splits", float(len(self.splits) * (len(names) + len(GATES))))
        made: dict[tuple[str, str], _Rows] = {}
        for split in range(len(self.splits)):
            each = {}
            for name in names:
                each[name] = self._member(split, name)
                more(1)
            labels = self._labels(split)
            for name in names:
                rule = "member" if name in config.members else "control"
                rows = made.setdefault((rule, name), _Rows(1, "held_out"))
                _add(rows, each[name], labels, None)
            inside = [each[name] for name in config.members]
            for rule, (weights, strength) in self._weights(split, inside, labels, more).items():
                rows = made.setdefault((rule, ""), _Rows(len(inside), _selected_on(rule)))
                pooled = {
                    part: POOLS["probabilities"]([one[part] for one in inside], weights[part])
                    for part in ("held_out", "test")
                }
                _add(rows, pooled, labels, (inside, weights["test"], strength))
        order = torch.from_numpy(np.concatenate([test for _, _, test in self.splits]))
        labels_all = self.opinions.labels[order]
        base = made[config.baseline, ""]
        table = pd.DataFrame([*_finished(made, base, labels_all, config)], columns=list(TABLE))
        return table, self._agreement(made, labels_all)

    def _needs_vectors(self) -> bool:
        """Whether somebody needs the texts' vectors."""
        config = self.config
        members = (TEXT_MEMBERS[name] for name in (*config.members, *config.controls))
        named = "minilm" in (*config.features, *config.side)
        return named or any(member.vectors is None for member in members)

    def _vectors(self, progress: Progress | None) -> NDArray[np.float32]:
        """Vectors of all texts, in their order."""
        more = counted(progress, "vectors", float(len(self.opinions)))
        made = []
        for start in range(0, len(self.opinions), _CHUNK):
            texts = self.opinions.texts[start : start + _CHUNK]
            what = {"kind": "text_vectors", "start": start, "about": self.about_texts}
            made.append(self.cells.get(what, partial(_embedded, texts))["v"])
            more(len(texts))
        return np.concatenate(made)

    def _parts(self, split: int) -> dict[str, NDArray[np.int64]]:
        return dict(zip(("train", "held_out", "test"), self.splits[split], strict=True))

    def _texts(self, split: int) -> dict[str, list[str]]:
        return {
            name: [self.opinions.texts[i] for i in index]
            for name, index in self._parts(split).items()
        }

    def _labels(self, split: int) -> dict[str, Tensor]:
        every = self.opinions.labels
        return {name: every[torch.from_numpy(i)] for name, i in self._parts(split).items()}

    def _member(self, split: int, name: str) -> dict[str, Tensor]:
        """A member's log-probabilities on held-out and test texts."""
        member = TEXT_MEMBERS[name]

        def make() -> Arrays:
            given: Mapping[str, Any] = self._texts(split)
            if member.vectors is None:
                given = {part: self.vectors[index] for part, index in self._parts(split).items()}
            found = fitted_log_probs(member, given, self._labels(split))
            return {part: rows.numpy() for part, rows in found.items()}

        what = {"kind": "text_member", **_identity(name), "split": split, "about": self.about}
        return {part: torch.from_numpy(rows) for part, rows in self.cells.get(what, make).items()}

    def _weights(
        self,
        split: int,
        each: Sequence[Mapping[str, Tensor]],
        labels: Mapping[str, Tensor],
        more: Any,
    ) -> dict[str, tuple[dict[str, Tensor], float]]:
        """Rule -> weights on held-out and test texts, and the strength of its pull."""
        count = len(each)
        equal = torch.full((count,), 1.0 / count, dtype=torch.float64)
        held = [one["held_out"] for one in each]
        truth = labels["held_out"]
        scores = [Score(nll(rows, truth), accuracy(rows, truth)) for rows in held]
        fixed = {"ensemble": equal, **{n: one.of_scores(scores) for n, one in BY_SCORE.items()}}
        found = {n: ({"held_out": w, "test": w}, math.nan) for n, w in fixed.items()}
        for rule in GATES:
            cell = self._gate(split, rule, each, truth)
            weights = {part: torch.from_numpy(cell[part]) for part in ("held_out", "test")}
            found[rule] = weights, float(cell["strength"])
            more(1)
        return found

    def _gate(
        self, split: int, rule: str, each: Sequence[Mapping[str, Tensor]], truth: Tensor
    ) -> Arrays:
        config = self.config
        seen_by = {"learned": ("constant",), "semi": config.features}
        names = seen_by.get(rule, (*config.features, *config.side))
        settings = config.gate(rule)

        def make() -> Arrays:
            texts = self._texts(split)
            both = [torch.cat([one["held_out"], one["test"]]) for one in each]
            parts = self._parts(split)
            asked = np.concatenate([parts["held_out"], parts["test"]])
            seen = Seen(
                texts["train"], [*texts["held_out"], *texts["test"]], both,
                lambda: (self.vectors[parts["train"]], self.vectors[asked]), self.root,
            )  # fmt: skip
            features = text_features(names, seen)
            count = len(truth)
            held = [one["held_out"] for one in each]
            gate, apart = fit_gate(held, truth, features[:count], settings)
            return {
                "held_out": apart.numpy(), "test": gate(features[count:]).numpy(),
                "strength": np.array(gate.strength),
            }  # fmt: skip

        members = [_identity(name) for name in config.members]
        what = {"kind": "text_gate", "members": members, "features": list(names),
                "gate": described(settings), "split": split, "about": self.about}  # fmt: skip
        return self.cells.get(what, make)

    def _agreement(self, made: Mapping[tuple[str, str], _Rows], labels: Tensor) -> pd.DataFrame:
        import pandas as pd

        names = [*self.config.members, "ensemble"]
        each = [
            torch.cat(made["ensemble" if n == "ensemble" else "member",
                           "" if n == "ensemble" else n].log_probs)
            for n in names
        ]  # fmt: skip
        truth = torch.nn.functional.one_hot(labels, each[0].shape[1]).double() * 2.0
        found = kappa_matrix([*each, truth], labels)
        names.append("label")
        rows = [
            {"first": one, "second": two, "kappa": float(found[i, j])}
            for i, one in enumerate(names)
            for j, two in enumerate(names)
        ]
        people = human_kappa(self.opinions, self.config.seed)
        rows += [{"first": one, "second": "label", "kappa": v} for one, v in people.items()]
        return pd.DataFrame(rows)


def human_kappa(opinions: Opinions, seed: int = 0) -> dict[str, float]:
    """How far people agree on the sign of a sentence's sentiment, as Cohen's kappa.

    Parameters
    ----------
    opinions : Opinions
    seed : int
        Of the raters that are drawn.

    Returns
    -------
    dict of str to float
        ``rater``: one rater of each text against the sign of the others' mean, where the rater is
        not neutral; ``rater_or_neutral``: the same with neutral as an answer of its own, which
        is never right; ``panel``: the sign of one half of the raters' mean against that of the
        other half.
    """
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(seed)
    one, others, half, rest = [], [], [], []
    for row in opinions.ratings.numpy():
        votes = rng.permutation(row[~np.isnan(row)])
        if len(votes) < 2:
            raise NQMError("human_kappa needs two raters of every text at least")
        middle = len(votes) // 2
        one.append(np.sign(votes[0]))
        others.append(np.sign(votes[1:].mean()))
        half.append(np.sign(votes[:middle].mean()))
        rest.append(np.sign(votes[middle:].mean()))
    rater, truth, a, b = (np.array(x, dtype=np.int64) for x in (one, others, half, rest))
    told = truth != 0
    firm, both = told & (rater != 0), (a != 0) & (b != 0)
    return {
        "rater": float(cohen_kappa_score(rater[firm], truth[firm])),
        "rater_or_neutral": float(cohen_kappa_score(rater[told], truth[told])),
        "panel": float(cohen_kappa_score(a[both], b[both])),
    }


def run_gates(
    config: GatesConfig,
    out: Path,
    *,
    root: Path | str | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """`compare_gates`, kept in a folder; a killed study goes on.

    Parameters
    ----------
    config : GatesConfig
    out : Path
        Folder for ``gates.parquet``, ``agreement.parquet``, their picture, and ``cells`` of parts
        that are done.
    root : Path or str, optional
        Folder of all data; see `neural.data.load_opinions`.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    table : DataFrame
    lines : list of str
        What the table shows, and the files.

    Raises
    ------
    NQMError
        If the folder holds a run or another study, or data are missing.
    """
    from neural.combine.plots import draw_gates

    opinions = load_opinions(config.domain, root)
    stated = {"gates": asdict(config), "data": SDIST.md5}
    keyed = {"gates": keys.differing(config)}
    found: list[tuple[pd.DataFrame, pd.DataFrame]] = []

    def part(index: int) -> pd.DataFrame:
        if not found:
            cells = Cells(out / "cells")
            found.append(compare_gates(opinions, config, cells=cells, root=root, progress=progress))
        return found[0][index]

    table = kept_table(out, "gates", stated, keyed, lambda: part(0))
    agreement = kept_table(out, "agreement", stated, keyed, lambda: part(1))
    files = [out / "gates.parquet", out / "agreement.parquet"]
    count = len(_chosen(opinions.decided(config.margin), config))
    base = _name(config.baseline)
    title = f"{count:,} {DOMAINS[config.domain]}: agreement, and gains over {base}"
    files += draw_gates(table, agreement, out, title)
    return table, [*_words(table, agreement, base), *map(str, files)]


def _chosen(opinions: Opinions, config: GatesConfig) -> Opinions:
    """The texts in use."""
    count = config.texts or len(opinions)
    if count > len(opinions):
        raise NQMError(f"gates.texts must be at most {len(opinions)}; got {config.texts}")
    if count < len(opinions):
        g = torch.Generator().manual_seed(config.seed)
        kept = torch.randperm(len(opinions), generator=g)[:count].sort().values
        texts = tuple(opinions.texts[i] for i in kept.tolist())
        opinions = Opinions(opinions.domain, texts, opinions.means[kept], opinions.ratings[kept])
    labels = opinions.labels
    fewest = int(torch.bincount(labels, minlength=2).min())
    # Each class in each fold of each part.
    needed = 5 * config.splits
    if fewest < needed:
        raise NQMError(
            f"{fewest} of {len(opinions)} texts are of the rarer class, and {config.splits} splits "
            f"need {needed}; use more texts or fewer splits"
        )
    return opinions


def _splits(
    labels: Tensor, config: GatesConfig
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Indices of training, held-out and test texts, with the classes in equal shares."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    y = labels.numpy()
    folds = StratifiedKFold(config.splits, shuffle=True, random_state=config.seed)
    for others, test in folds.split(y, y):
        try:
            train, held = train_test_split(
                others, test_size=config.held_out, stratify=y[others], random_state=config.seed
            )
        except ValueError as error:
            raise NQMError(
                f"gates.held_out = {config.held_out:g} of {len(others)} texts leaves no text "
                f"of a class on one side ({error})"
            ) from None
        yield np.sort(train), np.sort(held), test


def _identity(name: str) -> dict[str, Any]:
    """What a member's predictions depend on, beside the texts."""
    return {"member": name, "strengths": list(TEXT_MEMBERS[name].strengths)}


def _embedded(texts: Sequence[str]) -> Arrays:
    return {"v": embed_texts(texts)}


def _selected_on(rule: str) -> str:
    return "none" if rule == "ensemble" else "held_out"


def _add(
    rows: _Rows,
    found: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    pooled: tuple[Sequence[Mapping[str, Tensor]], Tensor, float] | None,
) -> None:
    """Append one split."""
    test = found["test"]
    temperature = fit_temperature(found["held_out"], labels["held_out"])
    rows.log_probs.append(test)
    rows.tuned.append((test.double() / temperature).log_softmax(-1))
    rows.log_temperature.append(math.log(temperature))
    own = losses(test, labels["test"])
    if pooled is None:
        rows.mean_member.append(own)
        return
    inside, weights, strength = pooled
    each = torch.stack([losses(one["test"], labels["test"]) for one in inside], 1)
    # A member of weight 0 does not count, be its loss infinite.
    rows.mean_member.append(torch.where(weights > 0, weights * each, 0.0).sum(1))
    rows.strength.append(strength)


def _finished(
    made: Mapping[tuple[str, str], _Rows], base: _Rows, labels: Tensor, config: GatesConfig
) -> Iterator[dict[str, Any]]:
    """Rows of the table."""
    reference = torch.cat(base.log_probs)
    single = [torch.cat(rows.log_probs) for (rule, _), rows in made.items() if rule == "member"]
    for place, ((rule, member), rows) in enumerate(made.items()):
        if place == len(single):
            each = torch.stack([losses(one, labels) for one in single])
            yield {
                "rule": "mean_member", "member": "", "members": len(single),
                "accuracy": float(np.mean([accuracy(one, labels) for one in single])),
                "nll": float(each.mean()), "mean_member_nll": float(each.mean()),
                "ambiguity": 0.0, "passes": 1, "selected_on": "held_out",
                "predicted_from": PREDICTED,
            }  # fmt: skip
        found, tuned = torch.cat(rows.log_probs), torch.cat(rows.tuned)
        metrics = classification_metrics(found, labels)
        mean = float(torch.cat(rows.mean_member).mean())
        passes = 1 if rule == "best" else rows.members
        row: dict[str, Any] = {
            "rule": rule, "member": member, "members": passes, **metrics,
            "macro_f1": macro_f1(found, labels), "kappa": kappa(found, labels),
            "nll_tuned": nll(tuned, labels),
            "temperature": math.exp(float(np.mean(rows.log_temperature))),
            "mean_member_nll": mean, "ambiguity": mean - metrics["nll"], "passes": passes,
            "selected_on": rows.selected_on,
            "strength": _geometric(rows.strength), "predicted_from": PREDICTED,
        }  # fmt: skip
        if rows is not base:
            row["mcnemar_p"] = mcnemar(found, reference, labels).p_value
            gains = {
                "accuracy": (_right(found, labels), _right(reference, labels)),
                "nll": (-losses(found, labels), -losses(reference, labels)),
                "nll_tuned": (
                    -losses(tuned, labels), -losses(torch.cat(base.tuned), labels)
                ),
            }  # fmt: skip
            for name, (a, b) in gains.items():
                apart = paired_bootstrap(
                    a.tolist(), b.tolist(), config.level, resamples=config.resamples,
                    seed=config.seed,
                )  # fmt: skip
                row |= {
                    f"{name}_gain": apart.mean, f"{name}_gain_low": apart.low,
                    f"{name}_gain_high": apart.high,
                }  # fmt: skip
        yield row


def _right(log_probs: Tensor, labels: Tensor) -> Tensor:
    return (log_probs.argmax(1) == labels).double()


def _geometric(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values)))) if values else math.nan


def _name(rule: str) -> str:
    return "equal weights" if rule == "ensemble" else rule.replace("_", " ")


def _words(table: pd.DataFrame, agreement: pd.DataFrame, base: str) -> list[str]:
    """What the table shows, in sentences."""
    lines = []
    told = table["rule"].isin(["ensemble", "best", "shallow", *GATES])
    for _, row in table[told & table["accuracy_gain"].notna()].iterrows():
        low, high = row["accuracy_gain_low"], row["accuracy_gain_high"]
        side = "above" if low > 0 else "below" if high < 0 else "within noise of"
        lines.append(
            f"{_name(row['rule'])}: accuracy {row['accuracy_gain']:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"(McNemar p = {row['mcnemar_p']:.2g}), {side} {base}; "
            f"nll lower by {row['nll_gain']:.4f}, tuned by {row['nll_tuned_gain']:.4f}"
        )
    people = agreement[(agreement["second"] == "label")].set_index("first")["kappa"]
    lines.append(
        f"kappa with the label: ensemble {people['ensemble']:.3f}, one rater "
        f"{people['rater']:.3f} ({people['rater_or_neutral']:.3f} with neutral answers), half of "
        f"the raters {people['panel']:.3f}"
    )
    return lines
