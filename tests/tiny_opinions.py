"""A source package of rated sentences, small and in the published form."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from neural.data.opinions import SDIST

GOOD = ["fine", "lovely", "warm", "clever", "bright", "moving"]
BAD = ["dull", "awful", "cold", "stupid", "bleak", "boring"]
COMMON = ["the", "film", "is", "a", "story", "of", "some", "people", "in", "town"]


def packed(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, raw in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return stream.getvalue()


def write_opinions(folder: Path, truth: str, rated: str, stem: str = "tweets") -> Path:
    inner = packed(
        {
            f"hutto_ICWSM_2014/{stem}_GroundTruth.txt": truth.encode(),
            # One of the published files begins with a byte order mark.
            f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt": b"\xef\xbb\xbf" + rated.encode(),
        }
    )
    rows = [f"{word}\t{sign * 2.5}\t0.5\t[]" for words, sign in ((GOOD, 1), (BAD, -1))
               for word in words]  # fmt: skip
    lexicon = "\n".join(rows)
    path = folder / SDIST.name
    path.write_bytes(
        packed(
            {
                "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
                "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt": lexicon.encode(),
            }
        )
    )
    return path


def sentences(count: int, seed: int = 0) -> tuple[str, str]:
    """Texts and ratings: each text has words of its class, now and then one of the other."""
    rng = np.random.default_rng(seed)
    truth, rated = [], []
    for i in range(count):
        good = i % 2 == 0
        own, other = (GOOD, BAD) if good else (BAD, GOOD)
        words = [*rng.choice(COMMON, 5), *rng.choice(own, 2), *rng.choice([*other, *COMMON], 2)]
        votes = np.clip(rng.normal(1.5 if good else -1.5, 1.0, 6).round(), -4, 4).astype(int)
        mean = votes.mean()
        truth.append(f"{i}\t{mean}\t{' '.join(rng.permutation(words))}")
        rated.append(f"{i}\t{mean}\t1.0\t{votes.tolist()}")
    return "\r\n".join(truth), "\r\n".join(rated)
