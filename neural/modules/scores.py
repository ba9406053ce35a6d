"""How near modules are to a new domain, by text alone: scores, and the weights made of them.

References
----------
Holtermann, C., Frohmann, M., Rekabsaz, N. and Lauscher, A. (2024), "What the Weight?! A unified
framework for zero-shot knowledge composition", Findings of EACL.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from neural.combine.data import Parts
from neural.combine.judge import log_probs
from neural.combine.members import Members
from neural.combine.weigh import Weigh
from neural.late_phase.members import Batch
from nqm.errors import NQMError, check_integer, check_number, check_word

WEIGHTINGS = ("linear", "uniform")


@dataclass(frozen=True, eq=False)
class Sample:
    """Texts, or images, of one domain that scores look at.

    Attributes
    ----------
    texts : tuple of str, length n
        Empty for images.
    vectors : Tensor, shape (n, d)
        A feature vector of each, of any length above 0.
    """

    texts: tuple[str, ...]
    vectors: Tensor

    def __post_init__(self) -> None:
        count = len(self.texts) or len(self.vectors)
        if not count or self.vectors.shape[:1] != (count,):
            raise NQMError(
                f"a sample needs texts and a vector of each; got {len(self.texts)} texts and "
                f"vectors of shape {tuple(self.vectors.shape)}"
            )

    @property
    def joined(self) -> str:
        """All texts as one document.

        Raises
        ------
        NQMError
            If there are none.
        """
        if not self.texts:
            raise NQMError("this score looks at texts, and the sample has none; choose another")
        return "\n".join(self.texts)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that scores may look at; none of it has labels, and none of it is evaluated.

    The symbol after each is a label of a language model, and a part of the text.

    Attributes
    ----------
    domains : tuple of Sample, length N
        Of the domain of each module, in the order of the members.
    target : Sample
        Of the new domain.
    batches : tuple of (inputs, labels)
        The target's texts as the modules take them; labels that are no text are not looked at.
    """

    domains: tuple[Sample, ...]
    target: Sample
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class TextParts(Parts):
    """Parts of a data set, with the evidence of scores.

    Attributes
    ----------
    evidence : Evidence
        Needed by `Scored`.
    """

    evidence: Evidence | None = None


class Score(ABC):
    """A number for each module: higher where its domain is nearer to the target."""

    @abstractmethod
    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules.

        Parameters
        ----------
        members : Members
            One a module.
        evidence : Evidence

        Returns
        -------
        Tensor of float64, shape (N,)
        """

    def linear(self, scores: Tensor) -> Tensor:
        """Weights linear in the scores of the modules that are kept, not yet of sum 1.

        Parameters
        ----------
        scores : Tensor of float64, shape (k,)

        Returns
        -------
        Tensor of float64, shape (k,)
            >= 0.
        """
        return scores


@dataclass(frozen=True)
class Equal(Score):
    """1 for each."""

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score all modules 1; see `Score`."""
        return torch.ones(len(members), dtype=torch.float64)


@dataclass(frozen=True)
class Similarity(Score):
    """Mean cosine between the vectors of a domain's texts and those of the target's, clipped at 0.

    Over all pairs, which is the scalar product of the two mean unit vectors.
    """

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by similarity; see `Score`."""
        middle = _middle(evidence.target)
        cosines = torch.stack([_middle(domain) @ middle for domain in evidence.domains])
        return cosines.clamp(min=0.0)


@dataclass(frozen=True)
class TfIdf(Score):
    """Cosine between two documents: the texts of the domain, and those of the target.

    TF-IDF weights are fitted on the two documents, without English stop words (scikit-learn). Words
    are not stemmed.

    Attributes
    ----------
    characters : int
        Terms are all sequences of up to so many characters, lower case; 0: words.
    """

    characters: int = 0

    def __post_init__(self) -> None:
        check_integer("TfIdf.characters", self.characters, 0)

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by TF-IDF; see `Score`."""
        target = evidence.target.joined
        cosines = []
        for domain in evidence.domains:
            try:
                rows = self._vectorizer().fit_transform([domain.joined, target])
            except ValueError:  # no word is left: nothing in common
                cosines.append(0.0)
                continue
            cosines.append(float((rows[0] @ rows[1].T).toarray()[0, 0]))
        return torch.tensor(cosines, dtype=torch.float64)

    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self.characters:
            return TfidfVectorizer(analyzer="char", ngram_range=(1, self.characters))
        return TfidfVectorizer(stop_words="english")


@dataclass(frozen=True)
class Entropy(Score):
    """Minus the mean entropy of a module's predictions on the target's texts.

    With entropies u the weights of the modules kept are in proportion to ``sum u - u_i``.
    """

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by entropy; see `Score`."""
        means = []
        for state in members.states():
            rows, _ = log_probs(members.with_state(state), lambda: evidence.batches)
            wide = rows.double()
            means.append(-(wide.exp() * wide).sum(1).mean())
        return -torch.stack(means)

    def linear(self, scores: Tensor) -> Tensor:
        """Weights linear in the entropies; see `Score.linear`."""
        return scores - scores.sum()


@dataclass(frozen=True)
class Bayes(Score):
    """Posterior probability of a domain, domains being equally likely beforehand.

    Attributes
    ----------
    length_power : float
        In [0, 1]. Log-likelihoods are divided by ``length ** length_power``: 0 is the posterior of
        independent words or tokens, 1 that of one average word.
    """

    length_power: float = 0.5

    def __post_init__(self) -> None:
        name = f"{type(self).__name__}.length_power"
        check_number(name, self.length_power, low=0.0, high=1.0)

    def posterior(self, log_likelihood: Tensor, lengths: Tensor) -> Tensor:
        """Posterior probability of every domain, for each text.

        Parameters
        ----------
        log_likelihood : Tensor of float64, shape (n, N)
            Of each text under each domain, summed over its words or tokens.
        lengths : Tensor, shape (n,)
            Words or tokens of each text, >= 1.

        Returns
        -------
        Tensor of float64, shape (n, N)
        """
        tempered = log_likelihood / lengths.unsqueeze(1).double() ** self.length_power
        return tempered.softmax(1)


@dataclass(frozen=True)
class Posterior(Bayes):
    """Mean posterior probability of a domain, given a text of the target: Bayes' theorem.

    A text's likelihood is that of its words in a unigram model of the domain, with `prior` counts
    added for every word that any domain has; other words are left out. (The
    cluster-branch-train-merge of Gururangan et al. 2023 averages posteriors exponentially, which
    depends on the texts' order.)

    Attributes
    ----------
    prior : float
        Above 0.
    """

    prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Posterior.prior", self.prior, low=0.0, closed_low=False)

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by posterior probability; see `Score`."""
        from sklearn.feature_extraction.text import CountVectorizer

        count = CountVectorizer()
        documents = [domain.joined for domain in evidence.domains]
        try:
            count.fit(documents)
        except ValueError:  # no word at all
            return torch.full((len(members),), 1.0 / len(members), dtype=torch.float64)
        seen = torch.stack(
            [_totals(count.transform(domain.texts)) + self.prior for domain in evidence.domains]
        )
        words = (seen / seen.sum(1, keepdim=True)).log()
        counts = count.transform(evidence.target.texts)
        return self.posterior(
            torch.from_numpy(counts @ words.numpy().T), _totals(counts.T).clamp(min=1.0)
        ).mean(0)


@dataclass(frozen=True)
class ExpertPosterior(Bayes):
    """Mean posterior probability of a domain, given a window of the target's text.

    A window's likelihood is that of its tokens, summed over all of them, by the language model with
    the domain's module (Gururangan et al. 2023, whose average is exponential).
    """

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by posterior probability; see `Score`."""
        lengths = torch.cat([torch.full((len(y),), y[0].numel()) for _, y in evidence.batches])
        rows = []
        for state in members.states():
            found, tokens = log_probs(members.with_state(state), lambda: evidence.batches)
            each = found.double().gather(1, tokens[:, None])[:, 0]
            rows.append(torch.stack([one.sum() for one in torch.split(each, lengths.tolist())]))
        return self.posterior(torch.stack(rows, 1), lengths).mean(0)


@dataclass(frozen=True)
class Statistics(Score):
    """One over the distance between BatchNorm statistics: a module's own, and the target's in it.

    The distance is ``((m - m')^2 + (s - s')^2) / s^2``, averaged over channels, then over layers:
    m and s are a channel's running mean and standard deviation, m' and s' those of the target's
    images as they pass through the network with the module (the squared Wasserstein distance of
    normal distributions, in units of the module's variance).
    """

    def __call__(self, members: Members, evidence: Evidence) -> Tensor:
        """Score the modules by their statistics; see `Score`."""
        inputs = torch.cat([batch[0] for batch in evidence.batches])
        return torch.tensor(
            [1.0 / _distance(members.with_state(state), inputs) for state in members.states()],
            dtype=torch.float64,
        )


def _distance(model: nn.Module, inputs: Tensor) -> float:
    found: list[float] = []

    def seen(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        mean, variance = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
        rows = args[0].transpose(0, 1).flatten(1)
        apart = (rows.mean(1) - mean).square() + (rows.std(1, correction=0) - variance.sqrt()) ** 2
        found.append(float((apart / variance.clamp(min=1e-12)).mean()))

    layers = [one for one in model.modules() if isinstance(one, _BatchNorm)]
    hooks = [layer.register_forward_pre_hook(seen) for layer in layers]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise NQMError("the score by statistics needs BatchNorm layers, and the network has none")
    return max(sum(found) / len(found), 1e-12)


def _middle(sample: Sample) -> Tensor:
    return normalize(sample.vectors.double(), dim=1).mean(0)


def _totals(counts: object) -> Tensor:
    """Column sums of a sparse matrix."""
    summed = counts.sum(axis=0)  # type: ignore[attr-defined]
    return torch.tensor(summed, dtype=torch.float64).flatten()


#: Name -> score, for classifiers of texts.
SCORES: dict[str, Score] = {
    "uniform": Equal(),
    "similarity": Similarity(),
    "tfidf": TfIdf(),
    "entropy": Entropy(),
    "posterior": Posterior(),
}
#: Name -> score, for language models.
LANGUAGE_SCORES: dict[str, Score] = {
    "uniform": Equal(),
    "similarity": Similarity(),
    "tfidf": TfIdf(),
    "tfidf_characters": TfIdf(4),
    "entropy": Entropy(),
    "posterior": ExpertPosterior(),
}


#: Name -> score, for networks of images.
IMAGE_SCORES: dict[str, Score] = {
    "uniform": Equal(),
    "similarity": Similarity(),
    "statistics": Statistics(),
    "entropy": Entropy(),
}


@dataclass(frozen=True)
class Scored(Weigh):
    """Weights of the modules with the highest scores, the first of equals.

    Attributes
    ----------
    score : Score
    kept : int
        Modules that are kept; 0: all.
    weighting : {"linear", "uniform"}
        Weights in proportion to the score, or equal, over the modules that are kept.
    """

    score: Score = Equal()
    kept: int = 0
    weighting: str = "linear"

    def __post_init__(self) -> None:
        check_integer("Scored.kept", self.kept, 0)
        check_word("Scored.weighting", self.weighting, WEIGHTINGS)

    def __call__(self, members: Members, parts: Parts) -> Tensor:
        """Weigh the modules; see `Weigh`."""
        evidence = parts.evidence if isinstance(parts, TextParts) else None
        if evidence is None:
            raise NQMError("scores need texts to look at; give TextParts with evidence")
        count = len(members)
        if len(evidence.domains) != count:
            raise NQMError(
                f"scores need a sample of texts for each of {count} modules; got "
                f"{len(evidence.domains)}"
            )
        if self.kept > count:
            raise NQMError(f"Scored.kept must be at most the {count} modules; got {self.kept}")
        return selected(self.score, self.score(members, evidence), self.kept, self.weighting)


def selected(score: Score, values: Tensor | Sequence[float], kept: int, weighting: str) -> Tensor:
    """Weights from scores.

    Parameters
    ----------
    score : Score
        Says how weights are linear in scores.
    values : array_like, shape (N,)
    kept : int
        Modules that are kept; 0: all.
    weighting : {"linear", "uniform"}

    Returns
    -------
    Tensor of float64, shape (N,)
        >= 0, summing to 1; equal over the modules kept where all their scores are 0.

    Raises
    ------
    NQMError
        If a score is not finite.
    """
    scores = torch.as_tensor(values, dtype=torch.float64)
    if not bool(scores.isfinite().all()):
        raise NQMError(
            f"{type(score).__name__}: scores must be finite; got {scores.tolist()!s:.80}"
        )
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    chosen = sorted(order[: kept or len(order)])
    linear = (
        score.linear(scores[chosen]) if weighting == "linear" else torch.ones(len(chosen)).double()
    )
    if not float(linear.sum()) > 0.0:
        linear = torch.ones_like(linear)
    weights = torch.zeros_like(scores)
    # One module alone has weight 1 to the last bit.
    weights[chosen] = linear / linear.sum() if len(chosen) > 1 else torch.ones_like(linear)
    assert math.isclose(float(weights.sum()), 1.0, rel_tol=1e-9)
    return weights
