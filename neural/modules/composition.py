"""Every way of combining modules for one target, in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from neural.combine.cells import Cells
from neural.combine.comparison import compare
from neural.combine.config import CombineConfig
from neural.combine.members import Members
from neural.combine.rules import Linear, Merge, TaskArithmetic
from neural.combine.weigh import WEIGHTS, Best, Weigh
from neural.modules.scores import Score, Scored, TextParts

if TYPE_CHECKING:
    import pandas as pd


def compositions(
    members: Members,
    parts: TextParts,
    scores: Mapping[str, Score],
    config: CombineConfig,
    *,
    criterion: str = "accuracy",
    cells: Cells | None = None,
) -> pd.DataFrame:
    """Compare all ways of combining modules: by every score, keeping one module, two, or more.

    Parameters
    ----------
    members : Members
        Modules of other domains; the ancestor is the model without a module.
    parts : TextParts
        Of the target, with evidence for the scores.
    scores : mapping of str to Score
        By name; ``uniform`` keeps all modules.
    config : CombineConfig
        Pools, repair and prediction.
    criterion : {"accuracy", "nll"}
        By which ``best`` is chosen on held-out labels.
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.

    Returns
    -------
    DataFrame
        Columns of `neural.combine.compare` after ``score``, ``kept`` and ``weighting``. Scores are
        those of `scores`, with ``, new statistics`` after the name where BatchNorm statistics were
        computed anew, and ``no_module``, ``best`` (by the target's held-out labels),
        ``inverse_loss`` (likewise), ``member``, ``mean_member``.

    Raises
    ------
    NQMError
        If evidence or an ancestor is missing.
    """
    count = len(members)
    rules: dict[str, Merge] = {"no_module": TaskArithmetic(0.0), "best": Linear(Best(criterion))}
    weights: dict[str, Weigh] = {"inverse_loss": WEIGHTS["inverse_loss"]}
    stated = {name: (name, count, "") for name in (*rules, *weights)}
    for name, score in scores.items():
        for kept, weighting in _ways(name, count):
            label = f"{name} {kept} {weighting}"
            stated[label] = name, kept, weighting
            weights[label] = Scored(score, kept, weighting)
    rules |= {name: Linear(weigh) for name, weigh in weights.items()}
    table = compare(members, parts, config, rules=rules, weights=weights, cells=cells)
    names = [rule.removeprefix("ensemble_") for rule in table["rule"]]
    kinds = [stated.get(name, (name, 1, "")) for name in names]
    anew = [", new statistics" if repair == "statistics" else "" for repair in table["repair"]]
    kinds = [(name + more, *rest) for (name, *rest), more in zip(kinds, anew, strict=True)]
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
