"""What the commands do with members on disk: look at them, merge, pool and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from neural.combine.api import ensemble, merge
from neural.combine.data import Parts
from neural.combine.mean import mean_state
from neural.combine.repair import REPAIRS
from neural.combine.rules import RULES
from neural.combine.sources import Opened
from neural.combine.weigh import WEIGHTS
from neural.evaluate import Score, classification_metrics, loss_line, predict, score
from neural.evaluate.line import TENTHS
from neural.training.load_run import write_weights
from neural.training.task import Task
from nqm.errors import NQMError
from nqm.progress import Progress, counted
from nqm.runs.toml import lookup

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


def image_task(opened: Opened) -> Task:
    """Return the data of the members.

    Parameters
    ----------
    opened : Opened

    Returns
    -------
    Task

    Raises
    ------
    NQMError
        If they are a text: a language model has a state.
    """
    assert opened.task is not None  # only a caller's own model comes without
    if opened.task.channels == 0:
        raise NQMError(
            f"{opened.task.label} is a text; combining is for sets of images, where predictions do "
            "not depend on a window before"
        )
    return opened.task


def survey(
    opened: Opened,
    barrier: str | None = None,
    *,
    repair: str = "statistics",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Where members lie, and how good each is.

    Parameters
    ----------
    opened : Opened
    barrier : {"mean", "first"}, optional
        Whether the loss is measured on the straight line from each member to the members' mean, or
        to the first member.
    repair : {"statistics", "none"}
        How models on these lines, the ends included, are repaired before they are judged.
    progress : callable, optional
        Called repeatedly as ``progress("members", share)``.

    Returns
    -------
    DataFrame
        One row a member: the columns of `neural.combine.members.Members.geometry`; accuracy, nll,
        brier and ece on the test set; and with `barrier` the column ``barrier_to_mean`` or
        ``barrier_to_first``, see `neural.evaluate.Line.barrier`.

    Raises
    ------
    NQMError
        If there is but one member, which has no line to another.
    """
    import pandas as pd

    task, members = image_task(opened), opened.members
    if barrier is not None and len(members) == 1:
        raise NQMError(f"a barrier to the {barrier} needs two members; got one")
    more = counted(
        progress, "members", len(members) * (1.0 if barrier is None else 1 + len(TENTHS))
    )
    rows = []
    for state in members.states():
        logits, labels = predict(members.with_state(state), task.test())
        rows.append(classification_metrics(logits, labels))
        more(1)
    table = pd.concat([members.geometry(), pd.DataFrame(rows)], axis=1)
    if barrier is None:
        return table

    parts, end = Parts.of_task(task), mean_state(members) if barrier == "mean" else members.state(0)

    def judge(model: nn.Module) -> Score:
        more(1)
        return score(model, task.test())

    def recompute(model: nn.Module) -> None:
        REPAIRS[repair](model, parts, members, None)

    table[f"barrier_to_{barrier}"] = [
        loss_line(members.with_state(end), state, end, judge, recompute=recompute).barrier
        for state in members.states()
    ]
    return table


def write_merged(
    opened: Opened,
    out: str | Path,
    rule: str = "uniform",
    weights: tuple[float, ...] | None = None,
    *,
    held_out: float = 0.2,
    align: str = "none",
    repair: str = "statistics",
) -> list[str]:
    """Merge members and write the model as safetensors.

    Parameters
    ----------
    opened : Opened
    out : str or Path
        Ends in .safetensors; an existing file is not overwritten.
    rule : str
        A name of `neural.combine.rules.RULES`.
    weights : tuple of float, optional
        Of the members, instead of a rule.
    held_out : float
        Share of the test images on which rules choose.
    align : {"none", "weights", "activations"}
        How hidden units are put into the first member's order.
    repair : {"statistics", "rescale", "none"}

    Returns
    -------
    list of str
        Lines to print: test metrics of the merged model on the images that were not held out, and
        the file. A tensor that all members store in one type, such as half precision, is written
        in it, and judged as written.

    Raises
    ------
    NQMError
        If the file is there already, or the members cannot be merged.
    """
    made = lookup("rule", rule, RULES)
    lookup("repair", repair, REPAIRS)
    share = held_out if weights is None and made.selected_on == "held_out" else 0.0
    parts = Parts.of_task(image_task(opened), held_out=share)
    names = [one.name for one in opened.members]
    about = {"rule": rule, "members": names, "align": align, "repair": repair}

    def model() -> Mapping[str, object]:
        merged = merge(
            opened.members, made, weights=weights, align=align, repair=repair, parts=parts
        )
        types = opened.members.stored_types()
        state = {n: value.to(types[n]) for n, value in merged.state_dict().items()}
        merged.load_state_dict(state)
        logits, labels = predict(merged, parts.test())
        lines.extend(f"{n} {v:.4f}" for n, v in classification_metrics(logits, labels).items())
        return state

    lines: list[str] = []
    lines.append(str(write_weights(out, model, about)))
    return lines


def pooled_metrics(
    opened: Opened, pool: str, weights: tuple[float, ...] | str | None, *, held_out: float = 0.2
) -> dict[str, float]:
    """Test metrics of the members' pooled predictions.

    Parameters
    ----------
    opened : Opened
    pool : {"probabilities", "logits"}
    weights : tuple of float or str, optional
        Of the members, or a name of `neural.combine.weigh.WEIGHTS`; equal by default.
    held_out : float
        Share of the test images on which named weights are chosen; the others are judged.

    Returns
    -------
    dict of str to float

    Raises
    ------
    NQMError
        If the weights do not fit the members, or cannot be chosen.
    """
    members, named = opened.members, weights if isinstance(weights, str) else None
    weigh = None if named is None else lookup("weights", named, WEIGHTS)
    choose = weigh is not None and weigh.selected_on == "held_out"
    parts = Parts.of_task(image_task(opened), held_out=held_out if choose else 0.0)
    share = weights if weigh is None else tuple(weigh(members, parts).tolist())
    assert not isinstance(share, str)
    pooled = ensemble(members, parts.test, weights=share, pool=pool)
    _, labels = predict(members.with_state(members.state(0)), parts.test())
    return classification_metrics(pooled, labels)
