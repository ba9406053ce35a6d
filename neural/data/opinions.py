"""Sentences of four kinds with the opinion that people hear in them (Hutto & Gilbert 2014).

Each sentence was rated by 15 people or more from -4 (extremely negative) to 4 (extremely
positive). The ratings are part of the source package of vaderSentiment 3.3.2 (MIT licence), in an
archive that is read without being unpacked to disk.

References
----------
Hutto, C. J. and Gilbert, E. (2014), "VADER: a parsimonious rule-based model for sentiment analysis
of social media text", Eighth International Conference on Weblogs and Social Media (ICWSM-14).
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor

from neural.data.catalog import data_root
from neural.data.fetch import File, Store
from neural.data.formats import damaged
from nqm.errors import NQMError, check_number, check_word

#: The source package, as published, which pip fetches; of a wheel the ratings are no part.
SDIST = File(
    "vaderSentiment-3.3.2.tar.gz",
    md5="a04f43dfcc57119bcabaa12f356c8c40",
    command="pip download --no-binary :all: --no-deps vaderSentiment==3.3.2 -d",
)
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"

#: Name of a domain -> what it holds.
DOMAINS: dict[str, str] = {
    "tweets": "tweets",
    "amazon": "sentences of Amazon reviews",
    "films": "sentences of film reviews",
    "nyt": "sentences of New York Times editorials",
}
_STEMS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "films": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Opinions:
    """Sentences of one domain, with what people think of them.

    Attributes
    ----------
    domain : str
        One of `DOMAINS`.
    texts : tuple of str, length n
    means : Tensor of float64, shape (n,)
        Mean sentiment in [-4, 4], as published beside the text. For one tweet in twenty it is
        not the mean of the published ratings; everywhere else it is.
    ratings : Tensor of float32, shape (n, R)
        Of each rater, a whole number from -4 to 4; NaN behind the last rater of a text. Raters are
        anonymous: a column is not one person.
    """

    domain: str
    texts: tuple[str, ...]
    means: Tensor
    ratings: Tensor

    def __len__(self) -> int:
        """Sentences."""
        return len(self.texts)

    @property
    def labels(self) -> Tensor:
        """1 for a mean above 0, else 0; int64, shape (n,)."""
        return (self.means > 0).long()

    def decided(self, margin: float = 0.5) -> Opinions:
        """The sentences that are not neutral.

        Parameters
        ----------
        margin : float
            Sentences with ``|mean| <= margin`` are left out.

        Returns
        -------
        Opinions

        Raises
        ------
        NQMError
            If `margin` is not in [0, 4), or no sentence is left.
        """
        check_number("margin", margin, low=0.0, high=4.0, closed_high=False)
        kept = self.means.abs() > margin
        if not bool(kept.any()):
            raise NQMError(f"margin {margin:g} leaves none of {len(self)} sentences; lower it")
        texts = tuple(compress(self.texts, kept.tolist()))
        return Opinions(self.domain, texts, self.means[kept], self.ratings[kept])


def load_opinions(domain: str, root: Path | str | None = None) -> Opinions:
    """Load all sentences of one domain.

    Parameters
    ----------
    domain : {"tweets", "amazon", "films", "nyt"}
        4,200 tweets, 3,708 sentences of Amazon reviews, 10,605 of film reviews, 5,190 of New York
        Times editorials.
    root : Path or str, optional
        Folder of all data; else the environment variable NQM_DATA, else
        ``~/.cache/late-phase-nqm``. ``vaderSentiment-3.3.2.tar.gz`` is searched in
        ``root/opinions`` and in the root itself.

    Returns
    -------
    Opinions

    Raises
    ------
    NQMError
        For an unknown domain, or a file that is missing or damaged.
    """
    check_word("domain", domain, tuple(DOMAINS))
    path = Store(data_root(root), "opinions").get(SDIST)
    return read_opinions(path, domain)


def load_lexicon(root: Path | str | None = None) -> dict[str, float]:
    """Load the sentiment that people hear in a word by itself.

    Parameters
    ----------
    root : Path or str, optional
        See `load_opinions`.

    Returns
    -------
    dict of str to float
        Mean of ten ratings in [-4, 4], by word or emoticon in lower case; about 7,500.

    Raises
    ------
    NQMError
        If the file is missing or damaged.
    """
    path = Store(data_root(root), "opinions").get(SDIST)
    try:
        with tarfile.open(path, "r:gz") as outer:
            lines = _content(outer, _LEXICON).decode("utf-8-sig").split("\n")
        rows = [line.split("\t") for line in lines if line.strip()]
        return {row[0].lower(): float(row[1]) for row in rows}
    except Exception as error:  # a damaged archive makes a reader stumble in any way
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from error


def read_opinions(path: Path, domain: str) -> Opinions:
    """Read one domain from the source package.

    Parameters
    ----------
    path : Path
        ``vaderSentiment-3.3.2.tar.gz``.
    domain : str
        One of `DOMAINS`.

    Returns
    -------
    Opinions

    Raises
    ------
    NQMError
        If the domain is unknown or the archive is damaged.
    """
    check_word("domain", domain, tuple(DOMAINS))
    try:
        truth, raters = _members(path, _STEMS[domain])
        return _joined(domain, truth, raters)
    except NQMError:
        raise
    except Exception as error:  # a damaged archive makes a reader stumble in any way
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from error


def _members(path: Path, stem: str) -> tuple[bytes, bytes]:
    """The files of mean scores and of ratings."""
    with tarfile.open(path, "r:gz") as outer, _inside(outer) as inner:
        base = f"hutto_ICWSM_2014/{stem}"
        return (
            _content(inner, f"{base}_GroundTruth.txt"),
            _content(inner, f"{base}_anonDataRatings.txt"),
        )


def _inside(outer: tarfile.TarFile) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(_content(outer, _INNER)), mode="r:gz")


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} is no file")
    return stream.read()


def _rows(raw: bytes, columns: int) -> list[list[str]]:
    """Fields between tabs; the files are UTF-8, some with a byte order mark."""
    lines = [line for line in raw.decode("utf-8-sig").split("\r\n") if line]
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != columns:
            raise ValueError(f"line {number} has {len(row)} fields, not {columns}")
    return rows


def _joined(domain: str, truth: bytes, raters: bytes) -> Opinions:
    rated = {row[0]: json.loads(row[3]) for row in _rows(raters, 4)}
    rows = _rows(truth, 3)
    if not rows:
        raise ValueError("it holds no sentence")
    if len(rated) != len(rows):
        raise ValueError(f"{len(rows)} texts and ratings of {len(rated)}")
    if not all(rated.values()):
        raise ValueError("a text has no rating")
    each = [torch.tensor(rated[row[0]], dtype=torch.float32) for row in rows]
    ratings = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=torch.nan)
    means = torch.tensor([float(row[1]) for row in rows], dtype=torch.float64)
    if not bool((means.abs() <= 4).all()) or bool((ratings.abs() > 4).any()):
        raise ValueError("a score is outside [-4, 4]")
    return Opinions(domain, tuple(row[2] for row in rows), means, ratings)
