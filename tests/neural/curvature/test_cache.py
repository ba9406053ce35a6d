"""Results on disk: found again by all that they depend on, and by nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqm
from neural.bridge.config import Training
from neural.bridge.iterate_averages import ExponentialMean, TailMean
from neural.curvature import cache as module
from neural.curvature.cache import Cache, fingerprint
from neural.curvature.local_quadratic import measure_local
from nqm.errors import NQMError
from tests.tiny_risks import tanh_risk

TRAINING = Training(0.1, 4, 10)


class Counted:
    """A computation that counts how often it is done."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Any]:
        self.calls += 1
        return {"calls": np.array(self.calls), "matrix": np.arange(6.0).reshape(2, 3)}


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    compute, cache = Counted(), Cache(tmp_path / "not" / "yet")
    first = cache("stage", compute, training=TRAINING, count=3)
    seconds = dict(cache.log)
    again = cache("stage", compute, count=3, training=TRAINING)  # whatever the order
    other = Cache(tmp_path / "not" / "yet")  # as in another process
    third = other("stage", compute, training=TRAINING, count=3)
    assert compute.calls == 1
    for found in (again, third):
        assert found.keys() == first.keys() == {"calls", "matrix"}
        np.testing.assert_array_equal(found["matrix"], first["matrix"])
    assert cache.log == other.log == seconds
    assert [stage for stage, _ in seconds] == ["stage"]


def test_the_file_states_what_it_is_of(tmp_path: Path) -> None:
    risk = tanh_risk()
    cache = Cache(tmp_path).of(risk, seed=7)
    cache("stage", Counted(), training=TRAINING, rate=np.float64(0.5), name=None)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stage-")
    with np.load(path) as content:
        stated = json.loads(str(content["_key"]))
        assert content["_seconds"] == next(iter(cache.log.values())) > 0.0
    assert stated == {
        "stage": "stage", "version": nqm.__version__, "content": fingerprint(risk), "seed": 7,
        "training": {"class": "Training", "lr": 0.1, "batch_size": 4, "steps": 10}, "rate": 0.5,
    }  # fmt: skip


BASE: dict[str, Any] = {"training": TRAINING, "count": 3, "averages": (TailMean(5),)}


@pytest.mark.parametrize(
    "changes",
    [
        {"training": replace(TRAINING, lr=0.1000001)},
        {"training": replace(TRAINING, momentum=0.1)},
        {"training": replace(TRAINING, sampling="shuffled")},
        {"count": 4},
        {"count": None},
        {"averages": (TailMean(6),)},
        {"averages": (ExponentialMean(5, 0.9),)},
        {"another": 1},
    ],
    ids=str,
)
def test_another_value_is_another_result(tmp_path: Path, changes: dict[str, Any]) -> None:
    compute, cache = Counted(), Cache(tmp_path)
    cache("stage", compute, **BASE)
    cache("stage", compute, **BASE | changes)
    assert compute.calls == len(list(tmp_path.iterdir())) == len(cache.log) == 2


def test_another_stage_content_seed_or_version_is_another_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, risk = Counted(), tanh_risk()
    other = risk.at(risk.weights + 1e-9)
    caches = [
        Cache(tmp_path), Cache(tmp_path).of(risk), Cache(tmp_path).of(risk, seed=0),
        Cache(tmp_path).of(risk, seed=1), Cache(tmp_path).of(other, seed=1),
    ]  # fmt: skip
    for cache in caches:
        cache("stage", compute, **BASE)
    caches[0]("other", compute, **BASE)
    monkeypatch.setattr(module, "__version__", "another")
    caches[0]("stage", compute, **BASE)
    assert compute.calls == len(list(tmp_path.iterdir())) == len(caches) + 2


def test_a_log_is_that_of_all_landscapes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.of(tanh_risk())("stage", Counted())
    assert [stage for stage, _ in cache.log] == ["stage"]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_value_that_no_key_can_state_is_refused(tmp_path: Path, keeps: bool) -> None:
    @dataclass(frozen=True)
    class Holds:
        value: object

    cache, compute = Cache(tmp_path if keeps else None), Counted()
    for value in (object(), lambda: 0, np.zeros(3), Holds(np.zeros(2)), Training, tmp_path):
        with pytest.raises(TypeError, match="cannot stand in a key"):
            cache("stage", compute, value=value)
    assert compute.calls == 0
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_kept() -> None:
    compute, cache = Counted(), Cache()
    cache.of(tanh_risk())("stage", compute)
    once = cache.log["stage", next(iter(cache.log))[1]]
    cache("stage", compute)
    assert compute.calls == 2
    assert len(cache.log) == 1
    assert cache.log.popitem()[1] > once  # both cost time


def test_work_that_goes_on_gives_the_same_numbers_to_the_last_bit(tmp_path: Path) -> None:
    """Eigenvectors come out reversed, and products with them are rounded by their order."""
    ordered = np.random.default_rng(0).standard_normal((40, 30))
    given = {"reversed": ordered[:, ::-1], "turned": ordered.T, "cut": ordered[:, 3:9]}
    first, again = (Cache(tmp_path)("stage", lambda: given | {"one": 1.0}) for _ in range(2))
    for name in given:
        assert first[name].strides == again[name].strides
    assert first["one"] == again["one"] == 1.0
    risk = tanh_risk()
    whole = measure_local(risk, 4, cache=Cache(tmp_path / "kept"))
    (kept,) = (tmp_path / "kept").glob("krylov-*")
    kept.unlink()
    later = measure_local(risk, 4, cache=Cache(tmp_path / "kept"))
    for one, other in zip(whole.draws, later.draws, strict=True):
        assert one.vectors.tobytes() == other.vectors.tobytes()


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "unsigned"])
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    compute, cache = Counted(), Cache(tmp_path)
    cache("stage", compute)
    (path,) = tmp_path.iterdir()
    if damage == "unsigned":  # whole, but not written by a cache
        np.savez(path, matrix=np.zeros(3))
    else:
        whole = path.read_bytes()
        cut = {"cut": whole[: len(whole) // 2], "foreign": b"text", "empty": b""}
        path.write_bytes(cut[damage])
    with pytest.raises(NQMError, match=r"is damaged .* remove it, and run again") as told:
        cache("stage", compute)
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value)
    path.unlink()
    assert cache("stage", compute)["calls"] == 2


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no")

    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError):
        cache("stage", fails)
    assert not list(tmp_path.iterdir())
    assert not cache.log
