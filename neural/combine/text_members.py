"""Classifiers of short texts that see different things, and what a gate may know of a text.

The classifiers are scikit-learn's. Each has one strength that is chosen on held-out data, so that
none of them is tuned better than the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.combine.gate import confidences
from neural.data.opinions import load_lexicon
from neural.evaluate import nll

#: Leading directions of a text's words, or of its vectors, that a gate sees.
_TOPICS = 16
#: Words that turn the sense of what follows.
_NEGATIONS = ("not", "no", "never", "none", "nothing", "neither", "nor", "without", "hardly")


@dataclass(frozen=True)
class TextMember:
    """A classifier of texts.

    Attributes
    ----------
    about : str
        What it is, one line.
    vectors : callable, optional
        Makes scikit-learn's transformer of texts; it is fitted on the training texts. Without it
        the member is given vectors (`embed_texts`).
    classifier : callable
        Makes scikit-learn's classifier from a strength.
    strengths : tuple of float
        Of which held-out data choose one.
    """

    about: str
    vectors: Callable[[], Any] | None
    classifier: Callable[[float], Any]
    strengths: tuple[float, ...]


def _logistic(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=2000)


def _bayes(strength: float) -> Any:
    from sklearn.naive_bayes import MultinomialNB

    return MultinomialNB(alpha=strength)


def _words() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)


def _characters() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True)


def _counts() -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(binary=True)


def _hashed() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=2**11, alternate_sign=False)


def _joint() -> Any:
    from sklearn.pipeline import FeatureUnion

    return FeatureUnion([("words", _words()), ("characters", _characters())])


#: Inverse penalties of logistic regressions.
_C = (0.3, 1.0, 3.0, 10.0, 30.0)
#: The same where a text has 384 numbers of size 1, and not length 1.
_C_VECTORS = (0.003, 0.01, 0.03, 0.1, 0.3)

#: Name -> member.
TEXT_MEMBERS: dict[str, TextMember] = {
    "words": TextMember("TF-IDF of words and pairs, logistic regression", _words, _logistic, _C),
    "characters": TextMember(
        "TF-IDF of 2 to 5 characters, logistic regression", _characters, _logistic, _C
    ),
    "bayes": TextMember("words that occur, naive Bayes", _counts, _bayes, (0.3, 1.0, 3.0, 10.0)),
    "hashed": TextMember("words hashed to 2,048, logistic regression", _hashed, _logistic, _C),
    "minilm": TextMember(
        "features of all-MiniLM-L6-v2, logistic regression", None, _logistic, _C_VECTORS
    ),
    "joint": TextMember(
        "words and characters in one model, logistic regression", _joint, _logistic, _C
    ),
}


def embed_texts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Features of texts by all-MiniLM-L6-v2, scaled to a mean square of 1.

    Parameters
    ----------
    texts : sequence of str, length n

    Returns
    -------
    ndarray of float32, shape (n, 384)

    Raises
    ------
    NQMError
        If the package of its weights or ``tokenizers`` is missing.
    """
    from neural.models.minilm import embed, load_minilm

    encoder, pieces = load_minilm()
    rows = embed(encoder, pieces(texts))
    # They have length 1; penalties of the classifiers suppose entries of size 1.
    scaled: NDArray[np.float32] = (rows * rows.shape[1] ** 0.5).numpy()
    return scaled


def fitted_log_probs(
    member: TextMember, texts: Mapping[str, Any], labels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Train a member and predict.

    Parameters
    ----------
    member : TextMember
    texts : mapping of str to sequence of str, or to ndarray
        Parts by name, as texts or as vectors; ``train`` and ``held_out`` are among them.
    labels : mapping of str to Tensor
        Of these two at least.

    Returns
    -------
    dict of str to Tensor of float64, shape (n, C)
        Log-probabilities for every part but ``train``.
    """
    train = texts["train"]
    others = {n: part for n, part in texts.items() if n != "train"}
    if member.vectors is not None:
        transformer = member.vectors()
        train = transformer.fit_transform(train)
        others = {n: transformer.transform(part) for n, part in others.items()}
    best: dict[str, Tensor] = {}
    lowest = np.inf
    for strength in member.strengths:
        classifier = member.classifier(strength)
        classifier.fit(train, labels["train"].numpy())
        with warnings.catch_warnings():  # a probability that is 0 has the logarithm -inf
            warnings.simplefilter("ignore", RuntimeWarning)
            found = {
                n: torch.from_numpy(classifier.predict_log_proba(x)) for n, x in others.items()
            }
        loss = nll(found["held_out"], labels["held_out"])
        if loss < lowest:
            lowest, best = loss, found
    return best


# --- what a gate sees ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What features of texts are made from.

    Attributes
    ----------
    train : sequence of str
        Training texts.
    texts : sequence of str, length n
        The texts in question.
    log_probs : sequence of N tensors, shape (n, C)
        Predictions of the members.
    vectors : callable
        Makes the vectors (`embed_texts`) of the training texts and of the texts in question.
    root : Path or str, optional
        Folder of all data.
    """

    train: Sequence[str]
    texts: Sequence[str]
    log_probs: Sequence[Tensor]
    vectors: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]
    root: Path | str | None = None


def _constant(seen: Seen) -> NDArray[np.float64]:
    return np.ones((len(seen.texts), 1))


def _confidence(seen: Seen) -> NDArray[np.float64]:
    """Log-odds of each member's predicted class."""
    return confidences(seen.log_probs).numpy()


def _length(seen: Seen) -> NDArray[np.float64]:
    return np.log1p([[len(text.split())] for text in seen.texts])


def _topics(seen: Seen) -> NDArray[np.float64]:
    """Leading directions of the training texts' words (latent semantic analysis)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.pipeline import make_pipeline

    made = make_pipeline(_words(), TruncatedSVD(_TOPICS, random_state=0)).fit(seen.train)
    return np.asarray(made.transform(seen.texts), dtype=np.float64)


def _lexicon(seen: Seen) -> NDArray[np.float64]:
    """What people hear in its words: positive and negative sums, words rated, negations."""
    lexicon = load_lexicon(seen.root)
    return np.array([_rated(text, lexicon) for text in seen.texts])


def _rated(text: str, lexicon: Mapping[str, float]) -> tuple[float, float, float, float]:
    words = [word.strip(".,;:!?\"'()") for word in text.lower().split()]
    heard = [lexicon[word] for word in words if word in lexicon]
    turns = sum(word in _NEGATIONS or word.endswith("n't") for word in words)
    return (
        sum(v for v in heard if v > 0), -sum(v for v in heard if v < 0), float(len(heard)),
        float(turns),
    )  # fmt: skip


def _embedding(seen: Seen) -> NDArray[np.float64]:
    """Leading directions of the training texts' features by all-MiniLM-L6-v2."""
    from sklearn.decomposition import PCA

    train, texts = seen.vectors()
    made = PCA(_TOPICS, svd_solver="full").fit(train)
    return np.asarray(made.transform(texts), dtype=np.float64)


#: Name -> features of texts that a gate may see.
FEATURES: dict[str, Callable[[Seen], NDArray[np.float64]]] = {
    "constant": _constant,
    "confidence": _confidence,
    "length": _length,
    "topics": _topics,
    "lexicon": _lexicon,
    "minilm": _embedding,
}


def text_features(names: Sequence[str], seen: Seen) -> Tensor:
    """Features of texts, side by side.

    Parameters
    ----------
    names : sequence of str
        Of `FEATURES`.
    seen : Seen

    Returns
    -------
    Tensor of float64, shape (n, F)
    """
    empty = np.empty((len(seen.texts), 0))
    return torch.from_numpy(np.hstack([empty, *(FEATURES[name](seen) for name in names)]))
