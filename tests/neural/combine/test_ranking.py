"""The order of ways of combining, measured and predicted, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from neural.combine.comparison import OUTSIDE, TABLE
from neural.combine.ranking import RANKING, candidates, ordered, ranking
from nqm import NQMError
from nqm.cli import main
from nqm.table import write_table


def table(measured: list[float], predicted: list[float]) -> pd.DataFrame:
    """One member, the mean member, and a soup a pair of numbers."""
    rows = [("member", "weights", 2.0, 2.0), ("mean_member", "", 2.0, 2.1)]
    rows += [
        (f"rule{i}", "weights", a, b)
        for i, (a, b) in enumerate(zip(measured, predicted, strict=True))
    ]
    made = pd.DataFrame(rows, columns=["rule", "space", "nll", "predicted"])
    return made.assign(
        data="test", members=3, repair="none", mean_member_nll=2.0, predicted_from="surrogate"
    ).reindex(columns=list(TABLE))


def test_pairs_are_counted() -> None:
    # 1.0 < 1.2 < 1.5 as measured; the first two are predicted the other way round.
    assert ordered(table([1.0, 1.2, 1.5], [1.3, 1.1, 1.6])) == (2, 3)
    # 1.0 and 1.009 differ by less than 0.005 * 2.
    assert ordered(table([1.0, 1.009, 1.5], [1.3, 1.1, 1.6])) == (2, 2)
    # A prediction that is the same for both is not right.
    assert ordered(table([1.0, 1.5], [1.2, 1.2])) == (0, 1)


def test_equal_ways_stand_once_and_unpredicted_ways_not_at_all() -> None:
    made = table([1.0, 1.0, 1.5, 1.7], [1.1, 1.1, 1.6, float("nan")])
    assert list(candidates(made)["rule"]) == ["rule0", "rule2"]


def test_what_theory_would_choose() -> None:
    found = ranking({"one": table([1.0, 1.2, 1.5], [1.3, 1.1, 1.6])})
    assert tuple(found.columns) == RANKING
    row = found.iloc[0]
    assert (row["best"], row["best_nll"]) == ("rule0 (none)", 1.0)
    assert (row["chosen"], row["chosen_nll"]) == ("rule1 (none)", 1.2)
    assert (row["right"], row["pairs"], row["members"]) == (2, 3, 3)
    assert row["mean_member_nll"] == 2.0
    with pytest.raises(NQMError, match="short: a ranking needs two predicted ways; got 1"):
        ranking({"short": table([1.0], [1.0])})


def test_the_command(tmp_path: Path) -> None:
    def stored(name: str, made: pd.DataFrame) -> str:
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "compare.parquet", made, {})
        return str(tmp_path / name)

    one = stored("one", table([1.0, 1.2, 1.5], [1.3, 1.1, 1.6]))
    two = stored("two", table([1.0, 1.5], [1.1, 1.2]))
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["neural", "ranking", one, two, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "inside the quadratic range: theory puts 3 of 4 pairs" in done.output
    assert "at most 20.0% above the best" in done.output
    assert "outside" not in done.output
    far = stored("far", table([1.0, 1.5], [1.2, 1.1]).assign(predicted_from=OUTSIDE))
    apart = CliRunner().invoke(main, ["neural", "ranking", one, far]).output
    assert "inside the quadratic range: theory puts 2 of 3 pairs" in apart
    assert "outside the quadratic range: theory puts 0 of 1 pairs" in apart
    assert "at most 50.0% above the best" in apart
    assert {"ranking.csv", "ranking.png", "ranking.pdf"} <= {p.name for p in out.iterdir()}
    again = CliRunner().invoke(main, ["neural", "ranking", one, two, "--out", str(out)])
    assert again.exit_code == 0, again.output

    def refused(*paths: str) -> str:
        result = CliRunner().invoke(main, ["neural", "ranking", *paths])
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1
        return result.output

    assert "two comparisons are called 'one'" in refused(one, one)
    other = stored("other", pd.DataFrame({"lr": [0.1]}))
    assert "it lacks 'rule'" in refused(other)
    assert "missing" in refused(str(tmp_path / "missing"))
    assert "another" in CliRunner().invoke(
        main, ["neural", "ranking", one, "--out", str(out)]
    ).output  # fmt: skip
