"""Federated rounds: accuracy and the clients' drift."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from figures.style import axes_or_new, look
from nqm.table import label


def over_rounds(table: pd.DataFrame, *, column: str = "accuracy", ax: Axes | None = None) -> Axes:
    """Draw one column of the history against rounds.

    Parameters
    ----------
    table : DataFrame
        Columns round and `column`; with a column arm, a line for the mean of each arm.
    column : str
    ax : Axes, optional

    Returns
    -------
    Axes
    """
    ax = axes_or_new(ax)
    arms = list(dict.fromkeys(table["arm"])) if "arm" in table else [""]
    for i, arm in enumerate(arms):
        rows = table[table["arm"] == arm] if "arm" in table else table
        mean = rows.groupby("round")[column].mean()
        own = {name: value for name, value in look(i).items() if name != "marker"}
        ax.plot(mean.index, mean, label=arm, gid=f"mean {arm}", **own)
    ax.set(xlabel="rounds", ylabel=label(column))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if "arm" in table:
        # Above the axes: curves may be anywhere within.
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return ax
