"""How often theory puts ways of combining into the right order."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from nqm.errors import NQMError

if TYPE_CHECKING:
    import pandas as pd

#: Columns of `ranking`, in order.
RANKING = (
    "comparison",
    "members",
    "mean_member_nll",
    "best",
    "best_nll",
    "chosen",
    "chosen_nll",
    "pairs",
    "right",
    "predicted_from",
)
#: Two ways are told apart if their losses differ by this share of the mean member's loss.
ROOM = 0.005


def candidates(table: pd.DataFrame) -> pd.DataFrame:
    """Rows between which one chooses: merged models and ensembles with a prediction.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.comparison.compare`.

    Returns
    -------
    DataFrame
        Those of the test set. Ways that are one model (all held-out choices may fall on one member)
        stand once.
    """
    test = table[(table["data"] == "test") & table["predicted"].notna()]
    combined = test[~test["rule"].isin(["member", "mean_member"])]
    return combined.drop_duplicates(["nll", "predicted"])


def ordered(table: pd.DataFrame) -> tuple[int, int]:
    """Count the pairs that theory puts into the right order.

    Parameters
    ----------
    table : DataFrame
        See `neural.combine.comparison.compare`.

    Returns
    -------
    right, pairs : int
        Of those whose measured losses differ by more than `ROOM` of the mean member's.
    """
    rows = candidates(table)
    apart = ROOM * rows["mean_member_nll"].mean()
    right = pairs = 0
    values = list(zip(rows["nll"], rows["predicted"], strict=True))
    for (a, predicted_a), (b, predicted_b) in combinations(values, 2):
        if abs(a - b) > apart:
            pairs += 1
            right += (a - b) * (predicted_a - predicted_b) > 0
    return right, pairs


def ranking(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Measured and predicted choice between ways of combining, a row a comparison.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Name -> table of `neural.combine.comparison.compare`.

    Returns
    -------
    DataFrame
        Columns `RANKING`: ``best`` has the lowest measured loss, ``chosen`` the lowest predicted
        one (``chosen_nll`` is measured as well); ``right`` of ``pairs`` are in the right order.

    Raises
    ------
    NQMError
        If a table has no two predicted ways.
    """
    import pandas as pd

    made = []
    for name, table in tables.items():
        rows = candidates(table)
        if len(rows) < 2:
            raise NQMError(f"{name}: a ranking needs two predicted ways; got {len(rows)}")
        best = rows.sort_values("nll", kind="stable").iloc[0]
        chosen = rows.sort_values("predicted", kind="stable").iloc[0]
        mean = table[(table["rule"] == "mean_member") & (table["data"] == "test")].iloc[0]
        right, pairs = ordered(table)
        made.append(
            {
                "comparison": name,
                "members": mean["members"],
                "mean_member_nll": mean["nll"],
                "best": _way(best),
                "best_nll": best["nll"],
                "chosen": _way(chosen),
                "chosen_nll": chosen["nll"],
                "pairs": pairs,
                "right": right,
                "predicted_from": rows["predicted_from"].iloc[0],
            }
        )
    return pd.DataFrame(made, columns=list(RANKING))


def _way(row: pd.Series) -> str:
    kind = row["repair"] if row["space"] == "weights" else row["space"]
    return f"{row['rule']} ({kind})"
