"""Weighted means of state dicts, one member in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from neural.combine.members import Members, State, check_weights
from neural.training.weighted_sum import add_weighted
from nqm.errors import NQMError


def mean_state(members: Members) -> State:
    """Mean of all members' weights, each with the same weight.

    Parameters
    ----------
    members : Members

    Returns
    -------
    dict of str to Tensor
        State dict of the mean; see `weighted_mean`.
    """
    return weighted_mean(members, [1.0 / len(members)] * len(members))


def weighted_mean(members: Members, weights: Sequence[float] | Tensor) -> State:
    """Mean of the members' weights with given weights.

    Real numbers are averaged, half precision in float32; of whole numbers (counters, indices) the
    largest is taken. A member of weight 1, all others having 0, is returned bit for bit.

    Parameters
    ----------
    members : Members
    weights : sequence of float, shape (N,)
        Sum to 1; members of weight 0 are not read.

    Returns
    -------
    dict of str to Tensor
        In the types of the model. Vectors of spectral normalisation are those of the mean weight.

    Raises
    ------
    NQMError
        If the weights do not fit, a member cannot be read, or its weights are factors whose mean
        means nothing (LoRA of peft).
    """
    share = check_weights("weighted_mean", weights, len(members)).tolist()
    used = [i for i, w in enumerate(share) if w != 0.0]
    if len(used) > 1:
        refuse_factors(members.weight_names)
    total = combined((share[i], members.state(i)) for i in used)
    return members.updated(total, {}) if len(used) > 1 else total


def combined(terms: Iterable[tuple[float, Mapping[str, Tensor]]]) -> State:
    """Sum of factor times state dict; of whole numbers the largest.

    Parameters
    ----------
    terms : iterable of (float, state dict)
        At least one; all of one architecture.

    Returns
    -------
    dict of str to Tensor
        In the types of the first term.
    """
    others = iter(terms)
    factor, first = next(others)
    total = add_weighted(chain([(factor, first)], others))
    return {
        # A mask of -inf is no number to average.
        name: torch.where(value.isfinite(), value, first[name]).to(first[name].dtype)
        for name, value in total.items()
    }


def refuse_factors(names: Iterable[str]) -> None:
    """Refuse to average factors of low-rank updates.

    Parameters
    ----------
    names : iterable of str
        Of parameters.

    Raises
    ------
    NQMError
        If one is a factor of peft's LoRA.
    """
    factor = next((n for n in names if ".lora_A." in n or ".lora_B." in n), None)
    if factor is not None:
        raise NQMError(
            f"{factor} is a factor of a low-rank update, and the product of mean factors is not "
            "the mean update; merge the updates into the weights first (peft: merge_and_unload)"
        )
