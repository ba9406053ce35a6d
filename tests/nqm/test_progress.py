"""Progress of work that is counted, by an estimate or exactly."""

from nqm.progress import counted


def test_an_exact_count_reaches_1_and_an_estimate_does_not() -> None:
    shares: dict[str, list[float]] = {"exact": [], "estimate": []}
    for stage, exact in (("exact", True), ("estimate", False)):
        more = counted(lambda name, share: shares[name].append(share), stage, 4, exact=exact)
        more(1)
        more(3)
    assert shares == {"exact": [0.25, 1.0], "estimate": [0.25, 0.99]}


def test_work_is_counted_without_anything_to_tell() -> None:
    counted(None, "cells", 4)(1)
