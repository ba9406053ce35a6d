"""Rated sentences: what is read from a small archive, the published counts, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from neural.data.catalog import data_root
from neural.data.fetch import File
from neural.data.opinions import DOMAINS, SDIST, load_lexicon, load_opinions, read_opinions
from nqm.errors import NQMError
from tests.tiny_opinions import packed, write_opinions

TRUTH = "1\t1.5\tA caf\u00e9 to ''love''.\r\n2\t-0.5\tMeh\r\n3\t-3.0\tAwful"
RATED = "1\t1.5\t0.5\t[1, 2]\r\n2\t-0.5\t0.5\t[0, -1, -1, 0]\r\n3\t-3.0\t1.0\t[-2, -4]"


def test_texts_means_and_ratings_of_a_small_archive(tmp_path):
    found = read_opinions(write_opinions(tmp_path, TRUTH, RATED), "tweets")
    assert found.texts == ("A caf\u00e9 to ''love''.", "Meh", "Awful")
    assert found.means.tolist() == [1.5, -0.5, -3.0]
    assert found.labels.tolist() == [1, 0, 0]
    assert found.ratings.nan_to_num(9).tolist() == [[1, 2, 9, 9], [0, -1, -1, 0], [-2, -4, 9, 9]]
    decided = found.decided()  # a mean of exactly .5 is neutral
    assert decided.texts == ("A caf\u00e9 to ''love''.", "Awful")
    assert decided.labels.tolist() == [1, 0]
    assert decided.ratings.shape == (2, 4)
    assert len(found.decided(0.0)) == 3
    with pytest.raises(NQMError, match=r"margin 3\.5 leaves none of 3 sentences"):
        found.decided(3.5)
    with pytest.raises(NQMError, match="margin must lie in"):
        found.decided(-0.1)


@pytest.mark.parametrize(
    ("truth", "rated", "says"),
    [
        (TRUTH.replace("\tMeh", ""), RATED, "line 2 has 2 fields, not 3"),
        (TRUTH, RATED.replace("[1, 2]", "[1, 2"), "cannot be read"),
        (TRUTH, RATED.partition("\r\n")[2], "3 texts and ratings of 2"),
        (TRUTH, RATED.replace("1\t", "7\t", 1), "cannot be read"),
        (TRUTH.replace("1.5", "5.5"), RATED, "outside"),
        (TRUTH, RATED.replace("-4", "-5"), "outside"),
        (TRUTH.replace("-3.0", "nan"), RATED, "outside"),
        (TRUTH, RATED.replace("[1, 2]", "[]"), "a text has no rating"),
        ("", "", "no sentence"),
    ],
)
def test_damaged_content_is_told_in_one_line(tmp_path, truth, rated, says):
    with pytest.raises(NQMError, match=says) as caught:
        read_opinions(write_opinions(tmp_path, truth, rated), "tweets")
    assert "\n" not in str(caught.value)
    assert SDIST.name in str(caught.value)


def test_damaged_archives_are_told_in_one_line(tmp_path):
    path = write_opinions(tmp_path, TRUTH, RATED)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"nothing", b"", packed({"other": b"1"})):
        path.write_bytes(raw)
        with pytest.raises(NQMError, match=r"cannot be read .*; delete it and run again") as caught:
            read_opinions(path, "tweets")
        assert "\n" not in str(caught.value)
    # Another file under the published name is refused by its checksum.
    with pytest.raises(NQMError, match="is damaged or another file"):
        load_opinions("tweets", tmp_path)


def test_the_lexicon(tmp_path, monkeypatch):
    write_opinions(tmp_path, TRUTH, RATED)
    monkeypatch.setattr("neural.data.opinions.SDIST", File(SDIST.name))
    found = load_lexicon(tmp_path)
    assert found["lovely"] == 2.5
    assert found["awful"] == -2.5
    (tmp_path / SDIST.name).write_bytes(packed({"other": b"1"}))
    with pytest.raises(NQMError, match="cannot be read"):
        load_lexicon(tmp_path)


def test_missing_file_names_the_command_that_fetches_it(tmp_path):
    with pytest.raises(NQMError) as caught:
        load_opinions("films", tmp_path)
    command = "pip download --no-binary :all: --no-deps vaderSentiment==3.3.2 -d"
    assert f"run `{command} {tmp_path / 'opinions'}`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_domain_is_named(tmp_path):
    for call in (load_opinions, lambda name, root: read_opinions(Path(root), name)):
        with pytest.raises(NQMError, match=r"is unknown; did you mean .films"):
            call("film", tmp_path)


@pytest.mark.skipif(
    not any((data_root() / place / SDIST.name).exists() for place in ("opinions", ".")),
    reason=f"{SDIST.name} is not in NQM_DATA",
)
@pytest.mark.parametrize(
    # Hutto & Gilbert 2014, section 3.2, and the counts beyond half a point.
    ("domain", "count", "decided", "raters"),
    [
        ("tweets", 4200, 3362, 20),
        ("amazon", 3708, 2943, 20),
        ("films", 10605, 10043, 15),
        ("nyt", 5190, 2788, 20),
    ],
)
def test_published_counts(domain, count, decided, raters):
    assert domain in DOMAINS
    found = load_opinions(domain)
    assert (len(found), len(found.decided())) == (count, decided)
    assert int((~found.ratings.isnan()).sum(1).min()) == raters
    # The published mean is that of the published ratings, but for one tweet in twenty.
    apart = (found.ratings.double().nanmean(1) - found.means).abs() > 1e-6
    assert int(apart.sum()) <= (210 if domain == "tweets" else 0)
    assert not any("\u00c3" in text or text != text.strip("\r\n") for text in found.texts)
