"""The one table: members, soups and ensembles side by side, with what theory says of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from neural.combine.align import ALIGNS, aligned
from neural.combine.cells import Arrays, Cells, described
from neural.combine.config import GATE, CombineConfig
from neural.combine.data import Parts, Source
from neural.combine.gate import confidences, fit_gate
from neural.combine.information import spread_examples
from neural.combine.judge import Judge, repaired
from neural.combine.mean import mean_state
from neural.combine.members import Members, State
from neural.combine.pool import POOLS
from neural.combine.repair import REPAIRS, Nothing, Repair, has_statistics
from neural.combine.rules import RULES, Merge, Merged
from neural.combine.surrogate import Surrogate
from neural.combine.swag import SWAG
from neural.combine.weigh import WEIGHTS, Weigh
from neural.evaluate import classification_metrics, nll
from neural.evaluate.metrics import losses
from neural.evaluate.temperature import tuned_nll
from nqm.errors import NQMError
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the table, in order.
TABLE = (
    "rule",
    "space",
    "member",
    "members",
    "repair",
    "data",
    "accuracy",
    "nll",
    "nll_tuned",
    "temperature",
    "ece",
    "brier",
    "mean_member_nll",
    "ambiguity",
    "barrier",
    "passes",
    "bits",
    "epochs_total",
    "selected_on",
    "predicted",
    "predicted_from",
)
#: Values of ``predicted_from``.
SURROGATE, OUTSIDE, NONE = "surrogate", "outside the quadratic range", "none"
#: Said of comparisons whose predictions are to be believed.
INSIDE = "inside the quadratic range"


def compare(
    members: Members,
    parts: Parts,
    config: CombineConfig | None = None,
    *,
    rules: Mapping[str, Merge] | None = None,
    weights: Mapping[str, Weigh] | None = None,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Compare every way of combining members.

    Parameters
    ----------
    members : Members
        At least two.
    parts : Parts
        Data.
    config : CombineConfig, optional
        What is compared.
    rules : mapping of str to Merge, optional
        Rules by name, instead of ``config.rules``.
    weights : mapping of str to Weigh, optional
        Weights of pooled predictions by name, instead of ``config.weights``.
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    DataFrame
        One row for each model and set of data, with the columns `TABLE`:

        - ``rule``: ``member``, ``mean_member``, a rule of `RULES`, or ``ensemble`` (with the name
          of its weights if they are not uniform); ``space``: weights, probabilities or logits.
        - ``mean_member_nll``: loss of the members, averaged by the rule's own weights, or equally;
          ``ambiguity``: how much lower the combined loss is; ``barrier``: how much higher, or 0.
        - ``passes``: forward passes a prediction costs; ``bits``: bits held for each weight of the
          architecture; ``epochs_total``: epochs of training that it took.
        - ``selected_on``: data on which it was chosen (none, train, held_out).
        - ``predicted``: its loss on the test set by `neural.combine.surrogate`, and
          ``predicted_from``: whether that is to be believed; a gate's loss is not predicted.

    Raises
    ------
    NQMError
        If there is one member only, or a rule lacks what it needs; told before any work.
    """
    config = config or CombineConfig()
    chosen = {name: RULES[name] for name in config.rules} if rules is None else dict(rules)
    pooled = (
        {n: WEIGHTS[n] for n in config.weights if n != GATE} if weights is None else dict(weights)
    )
    check_comparable(members, parts, config, chosen)
    if config.swag:
        members = SWAG(config.swag, seed=config.seed).members(members, parts)
    members = aligned(members, ALIGNS[config.align](), parts)
    made = _Comparison(members, parts, config, cells or Cells())
    return made.table(chosen, pooled, progress)


def check_comparable(
    members: Members, parts: Parts, config: CombineConfig, rules: Mapping[str, Merge]
) -> None:
    """Refuse before any work what would fail in its middle.

    Parameters
    ----------
    members : Members
    parts : Parts
    config : CombineConfig
    rules : mapping of str to Merge
        By name.

    Raises
    ------
    NQMError
        If there is one member only, a member cannot be read, or something lacks what it needs.
    """
    if GATE in config.weights:
        parts.required("held_out", "a gate")
    if len(members) < 2:
        raise NQMError(f"comparing needs at least two members; got {len(members)}")
    for name, rule in rules.items():
        for need in rule.needs:
            if need == "ancestor":
                members.ancestor_state(name)
            else:
                parts.required(need, name)
    for state in members.states():  # names, shapes, types, finite numbers
        del state


@dataclass
class _Model:
    """One row of the table to be: a merged model or a pool of predictions."""

    rule: str
    found: Mapping[str, Tensor]
    weights: Tensor | None
    space: str
    repair: str = "none"
    selected_on: str = "none"
    #: Row of the surrogate's offsets, for a merged model that is no weighted mean.
    offset: int | None = None
    #: Loss of the members by data, averaged with weights that differ by example.
    mean_member: Mapping[str, float] | None = None


class _Comparison:
    """One call of `compare`."""

    def __init__(
        self,
        members: Members,
        parts: Parts,
        config: CombineConfig,
        cells: Cells,
    ):
        self.members, self.parts, self.config = members, parts, config
        self.keys = [members.key(i) for i in range(len(members))]
        self.judged = parts.judged()
        self.sets: dict[str, Source] = dict(self.judged)
        if parts.held_out is not None:
            self.sets["held_out"] = parts.held_out
        # Without BatchNorm there are no statistics, and one row is enough.
        without = not has_statistics(members.model)
        names = tuple(
            dict.fromkeys(
                "none" if name == "statistics" and without else name for name in config.repair
            )
        )
        self.repairs = {name: REPAIRS[name] for name in names}
        # Rescaling moves the weights, and the loss is expanded about the plain mean.
        self.first_repair = next((name for name in names if name != "rescale"), "none")
        self.judge = Judge(self.sets, cells)
        self.labels = self.judge.labels
        count = len(members)
        self.uniform = torch.full((count,), 1.0 / count, dtype=torch.float64)
        #: Merged models that are no weighted means: their rules and their weights.
        self.others: list[tuple[Any, Callable[[], State]]] = []

    def table(
        self, rules: Mapping[str, Merge], pooled: Mapping[str, Weigh], progress: Progress | None
    ) -> pd.DataFrame:
        """All rows."""
        import pandas as pd

        count = len(self.members)
        more = counted(progress, "models", float(count + len(rules) * len(self.repairs)))
        each = []
        for index in range(count):
            each.append(self._member(index))
            more(1)
        self.member_nll = {
            name: torch.tensor([nll(one[name], self.labels[name]) for one in each]).double()
            for name in self.sets
        }
        models: list[_Model] = []
        for name, rule in rules.items():
            models += self._merged(name, rule, more)
        models += self._ensembles(each, pooled)
        if GATE in self.config.weights:
            models += self._gated(each)
        surrogate = self._surrogate(progress) if self.config.predict else None
        told = NONE if surrogate is None else OUTSIDE
        if surrogate is not None and surrogate.holds(self.member_nll["test"].tolist()):
            told = SURROGATE
        rows: list[dict[str, Any]] = []
        for index, one in enumerate(each):
            model = _Model("member", one, None, "weights", offset=index)
            predicted = self._predicted(model, surrogate)
            rows += self._rows(model, index=index, predicted=predicted, told=told)
        rows += self._mean_member(surrogate, told)
        for model in models:
            rows += self._rows(model, predicted=self._predicted(model, surrogate), told=told)
        return pd.DataFrame(rows, columns=list(TABLE))

    # --- models ------------------------------------------------------------------------------

    def _member(self, index: int) -> dict[str, Tensor]:
        """A member's log-probabilities on every set."""
        what = {"kind": "member", "member": self.keys[index]}
        return self._on_sets(what, lambda: self.members.state(index), Nothing(), None)

    def _merged(self, name: str, rule: Merge, more: Callable[[int], None]) -> Iterator[_Model]:
        """A rule's model under every repair."""
        what = {"kind": "merged", "rule": described(rule), "members": self.keys}
        made: list[Merged] = []

        def merged() -> Merged:
            if not made:
                made.append(rule(self.members, self.parts))
            return made[0]

        def packed() -> Arrays:
            weights = merged().weights
            return {"weights": np.empty(0) if weights is None else weights.double().numpy()}

        kept = self.judge.cells.on_data({**what, "data": ""}, packed)["weights"]
        weights = torch.from_numpy(kept) if kept.size else None
        offset = None
        if weights is None:
            offset = len(self.members) + len(self.others)
            self.others.append((what["rule"], lambda: merged().state))
        for repair, repairing in self.repairs.items():
            found = self._on_sets(what, lambda: merged().state, repairing, weights)
            yield _Model(name, found, weights, "weights", repair, rule.selected_on, offset)
            more(1)

    def _ensembles(
        self, each: Sequence[Mapping[str, Tensor]], pooled: Mapping[str, Weigh]
    ) -> Iterator[_Model]:
        for name, weigh in pooled.items():
            what = {"kind": "weights", "rule": described(weigh), "members": self.keys}

            def weighed(weigh: Weigh = weigh) -> Arrays:
                return {"weights": weigh(self.members, self.parts).numpy()}

            kept = self.judge.cells.on_data(what, weighed)
            weights = torch.from_numpy(kept["weights"])
            for pool in self.config.pools:
                found = {
                    part: POOLS[pool]((one[part] for one in each), weights) for part in self.sets
                }
                rule = "ensemble" if name == "uniform" else f"ensemble_{name}"
                yield _Model(rule, found, weights, pool, selected_on=weigh.selected_on)

    def _gated(self, each: Sequence[Mapping[str, Tensor]]) -> Iterator[_Model]:
        """Ensembles with a gate's weights, which sees how sure each member is."""
        rows = {part: [one[part] for one in each] for part in self.sets}
        seen = {part: _with_constant(confidences(found)) for part, found in rows.items()}
        gate, apart = fit_gate(rows["held_out"], self.labels["held_out"], seen["held_out"])
        weights = {part: gate(seen[part]) for part in self.judged} | {"held_out": apart}
        mean = {
            part: sum(
                float(weights[part][:, k] @ losses(one, self.labels[part])) / len(one)
                for k, one in enumerate(rows[part])
            )
            for part in self.judged
        }
        for pool in self.config.pools:
            found = {part: POOLS[pool](rows[part], weights[part]) for part in self.sets}
            yield _Model(
                "ensemble_gate", found, None, pool, selected_on="held_out", mean_member=mean
            )

    def _on_sets(
        self,
        what: Mapping[str, Any],
        state: Callable[[], State],
        repair: Repair,
        weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """Log-probabilities of a model on every set; it is built only if one is missing."""
        key = {**what, "repair": repair.name}
        return self.judge(key, lambda: repaired(self.members, state(), repair, self.parts, weights))

    # --- prediction --------------------------------------------------------------------------

    def _surrogate(self, progress: Progress | None) -> Surrogate:
        """Model of the loss about the uniform soup, along the members and the merged models."""
        repair = REPAIRS[self.first_repair]
        soup = {"kind": "merged", "rule": described(RULES["uniform"]), "members": self.keys}
        found = self._on_sets(soup, lambda: mean_state(self.members), repair, self.uniform)

        key = {
            **soup,
            "repair": repair.name,
            "others": [rule for rule, _ in self.others],
            "examples": self.config.predict_examples,
        }

        def build() -> tuple[nn.Module, Tensor, Mapping[str, Tensor]]:
            state = mean_state(self.members)
            origin = self.members.flat(state)
            others = [(self.members.flat(one()) - origin)[None] for _, one in self.others]
            model = repaired(self.members, state, repair, self.parts, self.uniform)
            offsets = torch.cat([self.members.offsets(state), *others])
            return model, offsets, self.members.buffer_offsets(model.state_dict())

        examples = self.config.predict_examples
        return self.judge.surrogate(
            key,
            nll(found["test"], self.labels["test"]),
            build,
            lambda: spread_examples(self.parts.test(), examples),
            progress,
        )

    def _padded(self, weights: Tensor, surrogate: Surrogate) -> Tensor:
        """Weights of the members, and 0 for the merged models that follow them."""
        return torch.cat((weights, weights.new_zeros(surrogate.offsets - len(weights))))

    def _predicted(self, model: _Model, surrogate: Surrogate | None) -> float:
        if surrogate is None or model.mean_member is not None:
            return math.nan
        if model.space in POOLS:
            assert model.weights is not None
            return surrogate.ensemble(self._padded(model.weights, surrogate), model.space)
        if model.rule == "member":
            return surrogate.soup(self._unit(model, surrogate))
        as_origin = model.repair == self.first_repair
        if model.weights is not None and (as_origin or model.repair == "none"):
            weights = self._padded(model.weights, surrogate)
            return surrogate.soup(weights, repaired=model.repair != "none")
        if model.weights is None and as_origin:
            return surrogate.soup(self._unit(model, surrogate), repaired=model.repair != "none")
        return math.nan  # rescaled, or merged statistics of an unknown kind

    def _unit(self, model: _Model, surrogate: Surrogate) -> Tensor:
        """Weight 1 of the model at one offset."""
        assert model.offset is not None
        return torch.eye(surrogate.offsets, dtype=torch.float64)[model.offset]

    # --- rows --------------------------------------------------------------------------------

    def _mean_member(self, surrogate: Surrogate | None, told: str) -> Iterator[dict[str, Any]]:
        predicted = math.nan
        if surrogate is not None:
            predicted = surrogate.mean_member(self._padded(self.uniform, surrogate))
        for data in self.judged:
            mean = float(self.member_nll[data] @ self.uniform)
            test = data == "test"
            yield {
                "rule": "mean_member",
                "space": "",
                "member": "",
                "members": len(self.members),
                "repair": "none",
                "data": data,
                "nll": mean,
                "mean_member_nll": mean,
                "ambiguity": 0.0,
                "barrier": 0.0,
                "passes": 1,
                "bits": self._bits(1),
                "epochs_total": self.members.epochs_total,
                "selected_on": "none",
                "predicted": predicted if test else math.nan,
                "predicted_from": told if test else NONE,
            }

    def _rows(
        self,
        model: _Model,
        *,
        index: int | None = None,
        predicted: float = math.nan,
        told: str = NONE,
    ) -> Iterator[dict[str, Any]]:
        """Rows of one model, a set of data each; `index` is the member's, if it is one."""
        single = None if index is None else self.members[index]
        weights = self.uniform if model.weights is None else model.weights
        used = 1 if single is not None else int((weights != 0).sum())
        passes = used if model.space in POOLS else 1
        held = None
        if "held_out" in model.found:
            held = model.found["held_out"], self.labels["held_out"]
        for data in self.judged:
            found, labels = model.found[data], self.labels[data]
            metrics = classification_metrics(found, labels)
            tuned, temperature = tuned_nll(found, labels, held)
            mean = float(self.member_nll[data] @ weights)
            if model.mean_member is not None:
                mean = model.mean_member[data]
            mean = metrics["nll"] if single is not None else mean
            here = data == "test" and not math.isnan(predicted)
            yield {
                "rule": model.rule,
                "space": model.space,
                "member": "" if single is None else single.name,
                "members": used,
                "repair": model.repair,
                "data": data,
                **metrics,
                "nll_tuned": tuned,
                "temperature": temperature,
                "mean_member_nll": mean,
                "ambiguity": mean - metrics["nll"],
                "barrier": max(0.0, metrics["nll"] - mean),
                "passes": passes,
                "bits": self._bits(passes),
                "epochs_total": self.members.epochs_total if single is None else single.epochs_all,
                "selected_on": model.selected_on,
                "predicted": predicted if here else math.nan,
                "predicted_from": told if here else NONE,
            }

    def _bits(self, models: int) -> int:
        first = next(iter(self.members.model.parameters()))
        return 8 * first.element_size() * models


def _with_constant(features: Tensor) -> Tensor:
    return torch.cat([features.new_ones(len(features), 1), features], 1)
