"""Soups and ensembles against the number of their members."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neural.combine.cells import Cells, described
from neural.combine.config import CombineConfig
from neural.combine.data import Parts
from neural.combine.judge import Judge, repaired
from neural.combine.mean import mean_state
from neural.combine.members import Members
from neural.combine.pool import POOLS
from neural.combine.repair import REPAIRS, Nothing, has_statistics
from neural.combine.rules import RULES
from neural.evaluate import classification_metrics
from neural.evaluate.temperature import tuned_nll
from nqm.errors import NQMError
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: Columns of the table, in order.
GROWTH = (
    "rule", "space", "members", "repair", "data", "accuracy", "nll", "nll_tuned", "temperature",
    "ece", "brier",
)  # fmt: skip


def growth(
    members: Members,
    parts: Parts,
    config: CombineConfig | None = None,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Judge the uniform soup and the ensembles of the first k members, for every k.

    Parameters
    ----------
    members : Members
        At least two; their order is that of the table.
    parts : Parts
        Data; `held_out` for temperatures, if there is some.
    config : CombineConfig, optional
        Gives pools, and the repair of soups: the first of ``config.repair``.
    cells : Cells, optional
        Where parts of the work are kept, those of `neural.combine.compare` among them; in memory
        by default.
    progress : callable, optional
        Called repeatedly as ``progress("growth", share)``.

    Returns
    -------
    DataFrame
        One row for each model and set of data, with the columns `GROWTH`. ``rule`` is ``member``
        (that of number ``members`` alone), ``uniform`` or ``ensemble``; ``members`` is k.

    Raises
    ------
    NQMError
        If there is one member only.
    """
    import pandas as pd

    if len(members) < 2:
        raise NQMError(f"growing needs at least two members; got {len(members)}")
    config = config or CombineConfig()
    name = config.repair[0]
    if name == "statistics" and not has_statistics(members.model):
        name = "none"
    judged = parts.judged()
    sets = judged if parts.held_out is None else {**judged, "held_out": parts.held_out}
    judge = Judge(sets, cells or Cells())
    more = counted(progress, "growth", 2.0 * len(members))
    keys = [members.key(i) for i in range(len(members))]
    uniform = described(RULES["uniform"])
    each: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []

    def add(rule: str, space: str, repair: str, found: dict[str, Tensor]) -> None:
        about = {"rule": rule, "space": space, "members": len(each), "repair": repair}
        rows.extend({**about, **row} for row in _judged(found, judge, judged))

    def single(index: int) -> nn.Module:
        return repaired(members, members.state(index), Nothing(), parts)

    def soup(first: Members, share: Tensor) -> nn.Module:
        return repaired(first, mean_state(first), REPAIRS[name], parts, share)

    for index in range(len(members)):
        key: dict[str, Any] = {"kind": "member", "member": keys[index], "repair": Nothing().name}
        each.append(judge(key, partial(single, index)))
        more(1)
        add("member", "weights", "none", each[-1])
        share = torch.full((index + 1,), 1.0 / (index + 1), dtype=torch.float64)
        key = {"kind": "merged", "rule": uniform, "members": keys[: index + 1], "repair": name}
        found = judge(key, partial(soup, members.chosen(range(index + 1)), share))
        more(1)
        add("uniform", "weights", name, found)
        for pool in config.pools:
            pooled = {part: POOLS[pool]((one[part] for one in each), share) for part in sets}
            add("ensemble", pool, "none", pooled)
    return pd.DataFrame(rows, columns=list(GROWTH))


def _judged(found: dict[str, Tensor], judge: Judge, judged: Any) -> Iterator[dict[str, Any]]:
    """Metrics of one model on every set, temperatures from the held-out one."""
    held = None
    if "held_out" in found:
        held = found["held_out"], judge.labels["held_out"]
    for data in judged:
        labels = judge.labels[data]
        tuned, temperature = tuned_nll(found[data], labels, held)
        yield {
            "data": data,
            **classification_metrics(found[data], labels),
            "nll_tuned": tuned,
            "temperature": temperature,
        }
