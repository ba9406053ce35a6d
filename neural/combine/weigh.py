"""One weight for each member: for merging their weights, or for pooling their predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from neural.combine.data import Parts
from neural.combine.judge import judged
from neural.combine.mean import combined
from neural.combine.members import Members, check_weights
from neural.combine.repair import Nothing, Repair, Statistics
from neural.evaluate import Score
from nqm.errors import NQMError, check_word

#: By what members are ordered and soups accepted.
CRITERIA = ("accuracy", "nll")


class Weigh(ABC):
    """A rule that gives each member a weight.

    Attributes
    ----------
    selected_on : {"none", "held_out"}
        Which data it uses. A class attribute.
    """

    selected_on: ClassVar[str] = "none"

    @abstractmethod
    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """Weigh the members.

        Parameters
        ----------
        members : Members
        parts : Parts
            Held-out data are needed where `selected_on` says so.

        Returns
        -------
        Tensor of float64, shape (N,)
            >= 0, summing to 1, unless given otherwise.
        """


@dataclass(frozen=True)
class Uniform(Weigh):
    """1 / N for each."""

    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """Weigh the members equally; see `Weigh`."""
        return torch.full((len(members),), 1.0 / len(members), dtype=torch.float64)


@dataclass(frozen=True)
class Given(Weigh):
    """Weights that the caller states.

    Attributes
    ----------
    weights : tuple of float
        One a member, summing to 1; negative ones extrapolate.
    """

    weights: tuple[float, ...]

    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """The stated weights; see `Weigh`."""
        return check_weights("given", self.weights, len(members))


class ByScore(Weigh):
    """A rule that looks at what each member achieves on held-out data, and at nothing else.

    It thus weighs models of any kind: `of_scores` needs no weights of a network.
    """

    selected_on: ClassVar[str] = "held_out"

    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """Weigh the members by their scores; see `Weigh`."""
        return self.of_scores(_scores(members, parts))

    @abstractmethod
    def of_scores(self, scores: Sequence[Score]) -> Tensor:
        """Weigh members by their held-out scores.

        Parameters
        ----------
        scores : sequence of Score, length N

        Returns
        -------
        Tensor of float64, shape (N,)
            >= 0, summing to 1.
        """


@dataclass(frozen=True)
class Best(ByScore):
    """All weight on the member that is best on held-out data; the first of equals.

    Attributes
    ----------
    criterion : {"accuracy", "nll"}
    """

    criterion: str = "accuracy"

    def __post_init__(self) -> None:
        check_word("Best.criterion", self.criterion, CRITERIA)

    def of_scores(self, scores: Sequence[Score]) -> Tensor:
        """Weigh the best member 1; see `ByScore`."""
        weights = torch.zeros(len(scores), dtype=torch.float64)
        weights[_order(scores, self.criterion)[0]] = 1.0
        return weights


@dataclass(frozen=True)
class Accuracy(ByScore):
    """In proportion to the accuracy on held-out data (Tyagi et al. 2023, shallow ensembles)."""

    def of_scores(self, scores: Sequence[Score]) -> Tensor:
        """Weigh the members by accuracy; equally where all have none. See `ByScore`."""
        each = torch.tensor([s.accuracy for s in scores], dtype=torch.float64)
        return each / each.sum() if each.sum() > 0 else torch.full_like(each, 1.0 / len(each))


@dataclass(frozen=True)
class InverseLoss(ByScore):
    """In proportion to one over the negative log-likelihood on held-out data."""

    def of_scores(self, scores: Sequence[Score]) -> Tensor:
        """Weigh the members by inverse loss; see `ByScore`."""
        losses = torch.tensor([s.loss for s in scores], dtype=torch.float64)
        if not bool((losses > 0).all()):
            raise NQMError(f"inverse loss needs losses above 0; got {float(losses.min()):g}")
        return (1.0 / losses) / (1.0 / losses).sum()


@dataclass(frozen=True)
class Greedy(Weigh):
    """The greedy soup: a running mean that takes a member only if held-out data like it better.

    Members are tried from the best to the worst; one is taken if the criterion *strictly* improves
    (Wortsman et al. 2022, "Model soups", recipe 1).

    Attributes
    ----------
    criterion : {"accuracy", "nll"}
        On few held-out examples accuracies tie often; the loss hardly ever does.
    repair : Repair
        Applied to every candidate before it is judged.
    """

    selected_on: ClassVar[str] = "held_out"

    criterion: str = "accuracy"
    repair: Repair = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        check_word("Greedy.criterion", self.criterion, CRITERIA)

    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """Weigh the members that are taken equally; see `Weigh`."""
        scores = _scores(members, parts)
        first, *others = _order(scores, self.criterion)
        taken, best = [first], scores[first]
        soup = members.state(first)
        for index in others:
            share = 1.0 / (len(taken) + 1)
            trial = combined([(1.0 - share, soup), (share, members.state(index))])
            score = judged(members, trial, self.repair, parts)
            if _better(score, best, self.criterion):
                soup, best = trial, score
                taken.append(index)
        weights = torch.zeros(len(members), dtype=torch.float64)
        weights[taken] = 1.0 / len(taken)
        return weights


def _scores(members: Members, parts: Parts) -> list[Score]:
    """Held-out loss and accuracy of every member as it is."""
    parts.required("held_out", "weighing members by what they achieve")
    return [judged(members, state, Nothing(), parts) for state in members.states()]


def _order(scores: Sequence[Score], criterion: str) -> list[int]:
    """Indices of the members from the best to the worst; equals in their order."""
    signs = [-s.accuracy if criterion == "accuracy" else s.loss for s in scores]
    return sorted(range(len(scores)), key=lambda i: signs[i])


def _better(one: Score, other: Score, criterion: str) -> bool:
    return one.accuracy > other.accuracy if criterion == "accuracy" else one.loss < other.loss


#: Name -> weights of predictions.
WEIGHTS: dict[str, Weigh] = {
    "uniform": Uniform(),
    "accuracy": Accuracy(),
    "inverse_loss": InverseLoss(),
    "best": Best(),
}
