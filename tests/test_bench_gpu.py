"""The GPU benchmark runs to its end without a GPU, and states no number then."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from nqm.table import read_table


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_benchmark_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "matrix_rate", lambda *_: 1e12)
    before = torch.get_float32_matmul_precision()
    gpu.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "images/s" not in printed
    assert "TFLOP/s" not in printed
    with (tmp_path / "gpu.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["what"] for row in rows if row["part"] == "training"] == [
        f"wrn-10-1, {precision}, {kind}" for kind in gpu.KINDS for precision in ("bfloat16", "TF32")
    ]
    assert [row["what"] for row in rows if row["part"] == "seeds"] == [
        f"fast net, {arm}" for arm in ("base", "swa", "late_phase")
    ]
    assert {value for row in rows for name, value in row.items()
            if name not in ("part", "what")} == {"", "not measured"}  # fmt: skip
    assert torch.get_float32_matmul_precision() == before
    table = read_table(tmp_path / "fast" / "results.parquet")
    assert set(table.loc[table["weights"] == "swa", "seed"]) >= {0, 1}


def test_without_time_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "matrix_rate", lambda *_: 1e12)
    bench = gpu.Bench(torch.device("cpu"), 0.0, tmp_path)
    gpu.training(bench)
    gpu.many_seeds(bench)
    assert capsys.readouterr().out.count("no time was left") == 2 * len(gpu.KINDS)
    assert not list(tmp_path.iterdir())


def test_the_recurrent_part_without_a_gpu(tmp_path: Path) -> None:
    bench = gpu.Bench(torch.device("cpu"), 1.0, tmp_path)
    gpu.recurrent(bench)
    assert [row["what"] for row in bench.rows] == [
        "gradient on the card", "base", "sequential", "fused"
    ]  # fmt: skip
    assert {value for row in bench.rows for name, value in row.items()
            if name not in ("part", "what")} == {"not measured"}  # fmt: skip
