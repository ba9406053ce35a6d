"""Tables: exact, deterministic, all or nothing, never overwriting something else."""

import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nqm.errors import NQMError
from nqm.table import COLUMNS, Stamp, finished, label, read_metadata, read_table, write_table

FRAME = pd.DataFrame(
    {
        "step": [0, 1, 2, 3],
        "loss": [0.1 + 0.2, 1e-300, math.inf, math.nan],
        "status": ["finished", "", "NA", "diverged"],
        "case": ["123", "1e5", "00ff", "nan"],
        "at_edge": [True, False, True, False],
    }
)
FORMATS = ["csv", "parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_comes_back_exactly_with_its_metadata(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    metadata = {"key": "abc", "config": {"phase": [{"lr": 0.1}]}}
    write_table(path, FRAME, metadata)
    back = read_table(path)
    pd.testing.assert_frame_equal(back, FRAME, check_exact=True)
    assert read_metadata(path) == metadata
    assert os.listdir(tmp_path) == [path.name]  # no temporary file stays behind


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_float_survives(tmp_path: Path, suffix: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**63, 500, dtype=np.int64)
    values = bits.view(np.float64)
    frame = pd.DataFrame({"loss": values[np.isfinite(values)]})
    write_table(tmp_path / f"t.{suffix}", frame, {})
    back = read_table(tmp_path / f"t.{suffix}")
    assert back["loss"].to_numpy().tobytes() == frame["loss"].to_numpy().tobytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_same_content_is_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    write_table(first, FRAME, {"key": "abc"})
    write_table(second, FRAME, {"key": "abc"})
    assert first.read_bytes() == second.read_bytes()


def test_a_csv_from_elsewhere_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("# measured\ncurvature,noise_variance\n1.0,0.5\n0.5,0.25\n")
    assert read_table(path)["curvature"].tolist() == [1.0, 0.5]
    assert read_metadata(path) == {}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("keep", [0, 1, 40, -40, -2, -1])
def test_a_half_written_file_is_one_clear_line(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"t.{suffix}"
    write_table(path, FRAME, {"key": "abc"})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NQMError) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_table(path, FRAME, {})
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(NQMError, match="3 of 4 rows"):
        read_table(path)


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(NQMError, match="no such file"):
        read_table(tmp_path / "missing.parquet")
    with pytest.raises(NQMError, match=r"must end in \.parquet or \.csv"):
        write_table(tmp_path / "t.xlsx", FRAME, {})
    with pytest.raises(NQMError, match="cannot write"):
        write_table(tmp_path / "nowhere" / "t.csv", FRAME, {})


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_table(path, FRAME, {"key": "old"})
    with pytest.raises(TypeError):
        write_table(path, FRAME, {"key": object()})
    assert read_metadata(path) == {"key": "old"}
    assert os.listdir(tmp_path) == ["t.csv"]


def test_only_the_same_content_counts_as_finished(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert finished(path, Stamp("abc", "1")) is None
    write_table(path, FRAME, {"key": "abc", "version": "1"})
    again = finished(path, Stamp("abc", "1"))
    assert again is not None
    assert len(again) == len(FRAME)
    with pytest.raises(NQMError, match="another configuration"):
        finished(path, Stamp("abd", "1"))
    with pytest.raises(NQMError, match="written by nqm 1, this is 2"):
        finished(path, Stamp("abc", "2"))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(NQMError, match="not written by nqm"):
        finished(path, Stamp("abc", "1"))
    assert path.read_text() == "a,b\n1,2\n"
    assert finished(tmp_path / "new" / "folder" / "t.csv", Stamp("abc", "1")) is None
    write_table(tmp_path / "new" / "folder" / "t.csv", FRAME, {})
    with pytest.raises(NQMError, match="cannot write"):
        finished(path / "t.csv", Stamp("abc", "1"))  # below a file


def test_labels() -> None:
    assert label("step") == "training step (steps)"
    assert label("examples") == "examples"
    assert label("loss_q0.05") == "0.05 quantile of loss"
    assert label("exponent") == "exponent"
    assert all(column.doc and column.label for column in COLUMNS.values())


STAMPS = [
    "[]",
    '{"dtypes": [], "metadata": {}, "rows": 1}',
    '{"dtypes": {"a": 3}, "metadata": {}, "rows": 1}',
    '{"dtypes": {"a": "object"}, "metadata": {}, "rows": 1}',
    '{"dtypes": {"a": "float64"}, "metadata": [1], "rows": 1}',
    '{"dtypes": {"a": "float64"}, "metadata": {}, "rows": true}',
    '{"dtypes": {"a": "float64"}, "metadata": {}, "rows": 2}',
    '{"dtypes": {"b": "float64"}, "metadata": {}, "rows": 1}',
    '{"dtypes": {"a": "bool"}, "metadata": {}, "rows": 1}',
    '{"a": ' + "[" * 9999,
]


@pytest.mark.parametrize("stamp", STAMPS)
def test_a_damaged_stamp_is_one_line(tmp_path: Path, stamp: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"# {stamp}\na\n1.5\n")
    if stamp == "[]":  # a comment of somebody else
        assert read_table(path)["a"].tolist() == [1.5]
        return
    with pytest.raises(NQMError, match=r"t\.csv is not a complete table") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stamp", ["3", "[1]", "null", '"text"'])
def test_a_damaged_stamp_of_a_parquet_file(tmp_path: Path, stamp: str) -> None:
    table = pa.table({"a": [1.5]}).replace_schema_metadata({"nqm": stamp})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(NQMError, match="is not a complete table"):
        read_metadata(tmp_path / "t.parquet")


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_no_file(tmp_path: Path, suffix: str) -> None:
    folder, pipe = tmp_path / f"folder.{suffix}", tmp_path / f"pipe.{suffix}"
    folder.mkdir()
    os.mkfifo(pipe)
    for path, words in ((folder, "is a folder"), (pipe, "is a pipe or a device")):
        for ask in (read_table, read_metadata, lambda p: finished(p, Stamp("k", "0"))):
            with pytest.raises(NQMError, match=words):
                ask(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_does_not_fit(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"t.{suffix}"
    write_table(path, pd.DataFrame({"a": [0.5] * 5000}), {"key": "k"})
    monkeypatch.setenv("NQM_MEMORY", "1e-5")
    with pytest.raises(NQMError, match=r"more than 1e-05 GiB, the limit"):
        read_table(path)


def test_texts_of_every_kind_come_back_also_to_pandas(tmp_path: Path) -> None:
    texts = ["a,b", 'say "x"', "two\nlines", "a\rb", "é\u202e", "#1", " 1 ", "NA", "-", "1e5", "'"]
    frame = pd.DataFrame({"text": texts, "x": np.arange(len(texts)) / 3.0})
    for suffix in FORMATS:
        path = tmp_path / f"t.{suffix}"
        write_table(path, frame, {"key": "k"})
        assert read_table(path)["text"].tolist() == texts
    foreign = pd.read_csv(tmp_path / "t.csv", skiprows=1, keep_default_na=False)
    assert foreign["text"].tolist() == texts
    assert pd.read_parquet(tmp_path / "t.parquet")["text"].tolist() == texts
