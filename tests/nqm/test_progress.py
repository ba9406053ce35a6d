"""Progress of work that is counted, by an estimate or exactly."""

import math

import pytest

from nqm.progress import Lines, counted, duration, limited, times


def test_an_exact_count_reaches_1_and_an_estimate_does_not() -> None:
    shares: dict[str, list[float]] = {"exact": [], "estimate": []}
    for stage, exact in (("exact", True), ("estimate", False)):
        more = counted(lambda name, share: shares[name].append(share), stage, 4, exact=exact)
        more(1)
        more(3)
    assert shares == {"exact": [0.25, 1.0], "estimate": [0.25, 0.99]}


def test_work_is_counted_without_anything_to_tell() -> None:
    counted(None, "cells", 4)(1)


def test_work_of_several_kinds_is_counted_in_one_unit() -> None:
    shares: list[float] = []
    more = counted(lambda _, share: shares.append(share), "averages", 8.0)
    more(2)
    three_each = times(more, 3)
    assert three_each is not None
    three_each(1)
    assert shares == [0.25, 0.625]
    assert times(None, 3) is None


def test_a_part_that_takes_longer_than_expected_leaves_the_others_their_share() -> None:
    shares: list[float] = []
    whole = counted(lambda _, share: shares.append(share), "third derivatives", 10.0)
    for most, counts in ((4, (3, 3, 3)), (5, (1,))):
        part = limited(whole, most)
        for count in counts:
            part(count)
        part(most)
    assert shares == [0.3, 0.4, 0.4, 0.4, 0.5, 0.9]


def test_lines_say_the_stage_its_share_and_the_time_left() -> None:
    now = 0.0
    said: list[str] = []
    lines = Lines(said.append, clock=lambda: now)
    # A stage within the first two seconds, one of 40 seconds at even pace, and one after it.
    moments = [(0.0, "curvature", 0.0), (1.0, "curvature", 0.9)]
    moments += [(1.0 + k, "training", k / 40) for k in range(41)]
    moments += [(41.5, "drift", 0.5), (42.0, "drift", 1.0)]
    for now, stage, share in moments:  # noqa: B007  the clock reads it
        lines(stage, share)
    assert [text.split(" ", 1)[1] for text in said] == [
        "training: 2 %",  # too little to tell the pace from
        "training: 28 %, about 0:29 left",
        "training: 52 %, about 0:19 left",
        "training: 78 %, about 0:09 left",
        "drift: 50 %",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"),
        (86399, "23:59:59"), (2 * 86400 + 3 * 3600 + 600, "2 d 03:10"), (math.nan, ""),
        (math.inf, ""),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
