"""Labelled texts of several domains, as features of a frozen trunk; split for one experiment."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neural.data.cache import cached
from neural.data.opinions import load_opinions
from neural.data.sampling import keyed_generator
from neural.modules.networks import Examples
from neural.modules.scores import Sample
from nqm.errors import NQMError, check_word

ENCODERS = ("minilm", "hashing")
#: Entries of a vector of hashed words.
HASHED = 384


@dataclass(frozen=True, eq=False)
class Domain:
    """Labelled texts of one domain.

    Attributes
    ----------
    name : str
    texts : tuple of str, length n
    labels : Tensor of int64, shape (n,)
    vectors : Tensor of float32, shape (n, d)
        Features of the frozen trunk, of length 1.
    """

    name: str
    texts: tuple[str, ...]
    labels: Tensor
    vectors: Tensor

    def examples(self, index: Tensor) -> Examples:
        """Some of the texts; features times sqrt(d), so that entries have mean square 1.

        Parameters
        ----------
        index : Tensor of int64, shape (m,)

        Returns
        -------
        neural.modules.networks.Examples
        """
        return Examples(self.vectors[index] * self.vectors.shape[1] ** 0.5, self.labels[index])

    def sample(self, index: Tensor) -> Sample:
        """Some of the texts, without labels.

        Parameters
        ----------
        index : Tensor of int64, shape (m,)

        Returns
        -------
        Sample
        """
        return Sample(tuple(self.texts[i] for i in index.tolist()), self.vectors[index])


def embedded(texts: Sequence[str], encoder: str) -> Tensor:
    """Feature vectors of texts, kept in the user's cache if they took long.

    Parameters
    ----------
    texts : sequence of str
    encoder : {"minilm", "hashing"}
        all-MiniLM-L6-v2; or counts of hashed words, for checks without trained weights.

    Returns
    -------
    Tensor of float32, shape (n, d)
        Of length 1, or 0 for a text without words.

    Raises
    ------
    NQMError
        If the encoder is unknown, or its package is missing.
    """
    check_word("encoder", encoder, ENCODERS)
    if encoder == "hashing":
        from sklearn.feature_extraction.text import HashingVectorizer

        counts = HashingVectorizer(n_features=HASHED).transform(texts)
        return torch.from_numpy(counts.toarray().astype(np.float32))
    from neural.models.minilm import embed, load_minilm

    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest()

    def computed() -> np.ndarray:
        trunk, pieces = load_minilm()
        return embed(trunk, pieces(texts)).numpy().view(np.uint8)

    # The cache holds bytes.
    return torch.from_numpy(cached(f"minilm-{digest}", computed).view(np.float32).copy())


def load_domains(
    names: Sequence[str], encoder: str, margin: float = 0.5, root: Path | None = None
) -> list[Domain]:
    """Opinions of several kinds, without neutral ones; a text that comes twice is taken once.

    Parameters
    ----------
    names : sequence of str
        Of `neural.data.opinions.DOMAINS`.
    encoder : str
        See `embedded`.
    margin : float
        Texts with a mean sentiment of at most this size are left out.
    root : Path, optional
        Folder of all data.

    Returns
    -------
    list of Domain

    Raises
    ------
    NQMError
        If a name is unknown or data are missing.
    """
    made = []
    for name in names:
        opinions = load_opinions(name, root).decided(margin)
        first = {text: i for i, text in reversed(list(enumerate(opinions.texts)))}
        index = sorted(first.values())
        texts = tuple(opinions.texts[i] for i in index)
        made.append(Domain(name, texts, opinions.labels[index], embedded(texts, encoder)))
    return made


def split(name: str, count: int, sizes: Sequence[int], *key: int) -> list[Tensor]:
    """Disjoint parts of a domain's texts, windows or images, drawn at random.

    Parameters
    ----------
    name : str
        Of the domain, for the message.
    count : int
        Examples that it has.
    sizes : sequence of int
        Of the parts.
    *key : int
        Of the draw.

    Returns
    -------
    list of Tensor of int64

    Raises
    ------
    NQMError
        If there are too few.
    """
    if sum(sizes) > count:
        raise NQMError(
            f"train + held_out + sample + test take {sum(sizes)} examples, and {name} has {count}; "
            "lower one of them"
        )
    order = torch.randperm(count, generator=keyed_generator(*key))
    return list(torch.split(order[: sum(sizes)], list(sizes)))
