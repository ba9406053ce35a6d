"""One merged model or one ensemble, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neural.combine.align import ALIGNS, aligned
from neural.combine.data import Parts, Source
from neural.combine.judge import log_probs, repaired
from neural.combine.members import Members, check_weights
from neural.combine.pool import POOLS
from neural.combine.repair import REPAIRS, Nothing
from neural.combine.rules import RULES, Merge, given
from neural.evaluate.predict import Batches
from nqm.errors import NQMError
from nqm.runs.toml import lookup


def merge(
    members: Members,
    rule: str | Merge = "uniform",
    *,
    weights: Sequence[float] | None = None,
    align: str = "none",
    repair: str | None = None,
    parts: Parts | None = None,
) -> nn.Module:
    """One model of many, by their weights.

    Parameters
    ----------
    members : Members
    rule : str or Merge
        A name of `neural.combine.rules.RULES`, or a rule.
    weights : sequence of float, optional
        Of the members, summing to 1, instead of a rule.
    align : {"none", "weights", "activations"}
        How hidden units are put into the first member's order before merging.
    repair : {"statistics", "rescale", "none"}, optional
        By default BatchNorm statistics are recomputed if there are several members and
        ``parts.train`` is given.
    parts : Parts, optional
        Data, as the rule and the repair need them.

    Returns
    -------
    Module
        Of the members' own class, in evaluation mode.

    Raises
    ------
    NQMError
        If the rule lacks what it needs, or the members cannot be merged.
    """
    if weights is not None:
        rule = given(tuple(check_weights("merge", weights, len(members)).tolist()))
    made: Merge = lookup("rule", rule, RULES) if isinstance(rule, str) else rule
    data = parts or Parts(test=list)
    members = aligned(members, lookup("align", align, ALIGNS)(), data)
    merged = made(members, data)
    if repair is None:
        repair = "statistics" if len(members) > 1 and data.train is not None else "none"
    fix = lookup("repair", repair, REPAIRS)
    return repaired(members, merged.state, fix, data, merged.weights)


def ensemble(
    members: Members,
    batches: Batches | Source,
    *,
    weights: Sequence[float] | None = None,
    pool: str = "probabilities",
) -> Tensor:
    """Pooled predictions of all members, one of them in memory at a time.

    Parameters
    ----------
    members : Members
    batches : list of (inputs, labels), or callable that makes them
        Read once for each member.
    weights : sequence of float, optional
        Of the members, >= 0, summing to 1; equal by default.
    pool : {"probabilities", "logits"}

    Returns
    -------
    Tensor of float64, shape (n, C)
        Log-probabilities.

    Raises
    ------
    NQMError
        If `batches` can be read once only, or the weights do not fit.
    """
    if not callable(batches) and iter(batches) is batches:
        raise NQMError("ensemble: batches are read once a member; give a list or a callable")
    source: Source = batches if callable(batches) else lambda: batches
    count = len(members)
    share = torch.full((count,), 1.0 / count, dtype=torch.float64)
    if weights is not None:
        share = check_weights("ensemble", weights, count)
    rows = (
        log_probs(repaired(members, state, Nothing(), Parts(test=source)), source)[0]
        for state in members.states()
    )
    pooled: Tensor = lookup("pool", pool, POOLS)(rows, share)
    return pooled
