"""Content keys: what counts, what does not, and what survives a new entry or default."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from nqm import keys
from nqm.algorithms import ROSTER
from nqm.algorithms.optimizers import HeavyBall
from nqm.errors import NQMError
from nqm.keys import difference, differing, omits, omitted
from nqm.program import Phase
from nqm.runs import config
from nqm.runs.sweep import Sweep
from nqm.schedule import SCHEDULES, Linear
from nqm.table import read_table
from tests.key_defaults import check, theory

BASE: dict[str, Any] = {
    "problem": {"curvature": [1.0, 0.5], "noise_variance": 1.0},
    "phase": [
        {"algorithm": "ema", "inner": "heavy_ball", "lr": 0.1, "steps": 20},
        {"algorithm": "late_phase", "members": 4, "lr": 0.01, "steps": 10},
    ],
}


def extended(cls: type, **defaults: Any) -> Any:
    """The class with more entries, or other defaults, as a developer would write it."""
    added = [(name, type(value), field(default=value)) for name, value in defaults.items()]
    return make_dataclass(cls.__name__, added, bases=(cls,), frozen=True)


def changed(**entries: Any) -> dict[str, Any]:
    """The configuration with entries of its first phase changed, or of the top."""
    top = {name: value for name, value in entries.items() if name in ("method", "seed", "record")}
    phase = {name: value for name, value in entries.items() if name not in top}
    return BASE | top | {"phase": [BASE["phase"][0] | phase, BASE["phase"][1]]}


# --- what a key is made of ---------------------------------------------------------------------

SPELLINGS: dict[str, dict[str, Any]] = {
    "a number": changed(lr=1e-1, batch_size=1e0),
    "a default": changed(decay=0.99, batch_size=1, restart=False),
    "a default of another type": changed(batch_size=1.0),
    "a constant schedule": changed(lr={"schedule": "constant", "value": 0.1}),
    "a constant default": changed(batch_size={"schedule": "constant", "value": 1}),
    "an inner algorithm": changed(inner={"algorithm": "heavy_ball"}),
    "its default": changed(inner={"algorithm": "heavy_ball", "momentum": 0.9}),
    "defaults of the top": changed(method="jump", seed=0, record={"quantiles": []}),
    "an empty table": changed(record={}),
    "the start": BASE | {"problem": BASE["problem"] | {"initial_mean": 0, "multiplicity": 1}},
    "a list of whole numbers": BASE | {"problem": BASE["problem"] | {"curvature": [1, 0.5]}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "a rate": changed(lr=0.1000001),
    "an entry": changed(decay=0.9),
    "another inner algorithm": changed(inner="nesterov"),
    "none": changed(inner="sgd"),
    "momentum": changed(inner={"algorithm": "heavy_ball", "momentum": 0.8}),
    "a schedule": changed(lr={"schedule": "linear", "start": 0.1, "end": 0.1, "over": 20}),
    "a method": changed(method="moments"),
    "a seed": changed(seed=1),
    "levels": changed(record={"quantiles": [0.5]}),
    "order": BASE | {"phase": BASE["phase"][::-1]},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_run_has_one_key(name: str) -> None:
    assert config.key(SPELLINGS[name]) == config.key(BASE)
    built = config.build(SPELLINGS[name])
    assert built.program == config.build(BASE).program
    assert built.problem.key() == config.build(BASE).problem.key()


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_has_another_key(name: str) -> None:
    assert config.key(OTHERS[name]) != config.key(BASE)
    assert config.key(OTHERS[name]) not in {config.key(one) for one in SPELLINGS.values()}


def test_kinds_with_equal_entries_differ() -> None:
    found = {config.key(changed(algorithm=name)) for name in ("ema", "swa", "lawa", "rounded")}
    assert len(found) == 4


def test_a_default_of_least_squares() -> None:
    base = {"phase": BASE["phase"][:1], "problem": {"inputs": "gaussian", "curvature": [1.0]}}
    noisy = {**base, "problem": base["problem"] | {"label_noise": 0}}
    assert config.key(noisy) == config.key(base)


def test_entries_beside_a_file_count(tmp_path: Path) -> None:
    """The file may state a start of its own, which a stated default replaces."""
    (tmp_path / "p.csv").write_text("curvature,noise_variance,initial_mean\n1.0,0.5,2.0\n")
    base = {"phase": BASE["phase"], "problem": {"file": "p.csv"}}
    zero = {**base, "problem": {"file": "p.csv", "initial_mean": 0.0}}
    starts = [float(config.build(one, tmp_path).problem.initial_mean[0]) for one in (base, zero)]
    assert starts == [2.0, 0.0]
    assert config.key(base, tmp_path) != config.key(zero, tmp_path)


def test_true_is_not_one() -> None:
    assert keys.same(1, 1.0)
    assert keys.same(0.1, 1e-1)
    assert keys.same((1, 2), [1.0, 2])
    assert not keys.same(1, True)
    assert not keys.same(0, False)
    assert not keys.same(0, None)
    assert keys.key({"a": 1, "b": [2.0]}) == keys.key({"b": [2], "a": 1.0})


@pytest.mark.parametrize(
    "mapping",
    [
        {"phase": 3}, {"phase": [3]}, {"phase": [{"algorithm": "none"}]}, {"problem": 3},
        {"phase": [{"algorithm": ["sgd"], "lr": {}}]}, {"phase": {"0": {"lr": 0.1}}},
        {"problem": {"spectrum": 3, "noise": 1}}, {"record": 3}, {"nonsense": {"a": 1}},
        {"phase": [{"algorithm": "ema", "inner": 3, "lr": {"schedule": 3}, "decay": "a"}]},
    ],
)  # fmt: skip
def test_what_is_no_configuration_has_a_key_of_its_own(mapping: dict[str, Any]) -> None:
    """A key is asked for parts of configurations, and must not fail on them."""
    assert config.without_defaults(mapping) == mapping


# --- a new entry -------------------------------------------------------------------------------


def another_entry_of_a_method(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ROSTER, "heavy_ball", extended(HeavyBall, dampening=0.0))


def another_entry_of_a_phase(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config, "Phase", extended(Phase, warmup=0))


def another_entry_of_a_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config, "Run", extended(config.Run, antithetic=False))


def another_entry_of_a_schedule(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(SCHEDULES, "linear", extended(Linear, power=1.0))


ADDITIONS = [
    another_entry_of_a_method, another_entry_of_a_phase, another_entry_of_a_run,
    another_entry_of_a_schedule,
]  # fmt: skip
LINEAR = {"schedule": "linear", "start": 0.1, "end": 0.01, "over": 20}


@pytest.mark.parametrize("add", ADDITIONS)
def test_a_killed_sweep_goes_on_after_an_entry_was_added(
    add: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"phase.0.lr": [0.1, LINEAR], "phase.1.members": [2, 4]}
    whole, out = tmp_path / "whole.csv", tmp_path / "t.csv"
    Sweep(BASE, axes).run(whole)

    def stop(more: int) -> None:
        counted.append(more)
        if len(counted) == 3:  # what is known, and two cells
            raise InterruptedError

    counted: list[int] = []
    with pytest.raises(InterruptedError):
        Sweep(BASE, axes).run(out, progress=stop)
    add(monkeypatch)
    counted = [0] * 9
    Sweep(BASE, axes).run(out, progress=stop)
    assert counted[9:] == [2, 1, 1], "two cells were known"
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("add", ADDITIONS)
def test_a_new_entry_counts_where_it_is_used(
    add: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch)
    plain, used = changed(lr=LINEAR), changed(lr=LINEAR | {"power": 2.0}, warmup=3)
    used["phase"][0]["inner"] = {"algorithm": "heavy_ball", "dampening": 0.5}
    assert config.key(used | {"antithetic": True}) != config.key(plain)


# --- a default that changes --------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    window: int
    decay: float = 0.99
    noise: float | None = None


def test_a_changed_default_is_stated_and_separates_old_from_new() -> None:
    new = omits(decay=0.99)(extended(Average, decay=0.999))
    assert differing(Average(5)) == differing(new(5, 0.99)) == {"window": 5}
    assert differing(Average(5, 0.999)) == differing(new(5)) == {"window": 5, "decay": 0.999}
    again = omits(noise=None)(extended(new, noise=0.1))  # another one, in a later version
    assert differing(again(5, 0.99, None)) == {"window": 5}
    assert differing(again(5)) == {"window": 5, "decay": 0.999, "noise": 0.1}
    with pytest.raises(TypeError, match="Average has no entry 'decy'"):
        omits(decy=0.99)(Average)


def test_a_changed_default_of_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.key(BASE)
    slow = config.key(changed(inner={"algorithm": "heavy_ball", "momentum": 0.99}))
    monkeypatch.setitem(
        ROSTER, "heavy_ball", omits(momentum=0.9)(extended(HeavyBall, momentum=0.99))
    )
    assert config.key(BASE) == slow, "the name alone now means 0.99"
    stated = changed(inner={"algorithm": "heavy_ball", "momentum": 0.9})
    assert config.key(stated) == before


def test_a_function_has_defaults_too() -> None:
    @omits(power=2.0)
    def harmonic(directions: int, power: float = 1.0, low: float = 0.5) -> None: ...

    assert (omitted(harmonic, "power"), omitted(harmonic, "low")) == (2.0, 0.5)
    assert omitted(harmonic, "directions") is omitted(harmonic, "none") is keys.REQUIRED


def test_no_default_has_changed_unsaid() -> None:
    check("key_defaults_nqm.json", theory())


# --- what differs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "asked", "told"),
    [
        ({"a": {"b": 4}}, {"a": {"b": 8}}, "a.b = 4, you ask for 8"),
        ({"a": {"b": 4}}, {}, "a.b = 4, you ask for none"),
        ({}, {"a": {"b": 4}}, "a.b = none, you ask for 4"),
        ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, "a.1.b = 2, you ask for 3"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "a = [1, 2], you ask for [1, 3]"),
        ({"a": 1}, {"a": True}, "a = 1, you ask for true"),
        ({"a": 1, "b": 2}, {"a": 2, "b": 3}, "a = 1, you ask for 2 (and 1 more entries differ)"),
        ({"f": {"sha256": "1"}}, {"f": {"sha256": "2"}}, "another content of f"),
        ({"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}, None),
    ],
)
def test_the_first_difference_is_told(stated: Any, asked: Any, told: str | None) -> None:
    assert difference(stated, asked) == told


def test_a_refused_table_says_what_differs(tmp_path: Path) -> None:
    axes = {"phase.1.members": [2, 4]}
    Sweep(BASE, axes).run(out := tmp_path / "t.csv")
    kept = out.read_bytes()
    end = "; move it away or use --out OTHER; nothing was overwritten"
    for other, told in (
        (Sweep(changed(decay=0.9), axes), "phase.0.decay = its default, you ask for 0.9"),
        (Sweep(BASE, {"phase.1.members": [2, 8]}), "sweep.phase.1.members = [2, 4], you ask for "),
        # A default that is stated is not what differs.
        (Sweep(changed(restart=False, lr=0.2), axes), "phase.0.lr = 0.1, you ask for 0.2"),
    ):
        with pytest.raises(NQMError) as error:
            other.run(out)
        assert str(error.value).startswith(f"{out} was computed with {told}")
        assert str(error.value).endswith(end)
        assert "more entries" not in str(error.value)
    assert out.read_bytes() == kept
    Sweep(changed(restart=False, batch_size=1.0), axes).run(out)
    assert out.read_bytes() == kept


def test_an_older_journal_without_a_configuration_goes_on(tmp_path: Path) -> None:
    axes = {"phase.1.members": [2, 4]}
    sweep, out = Sweep(BASE, axes), tmp_path / "t.csv"
    journal = Path(f"{out}.journal.jsonl")
    header = {"key": sweep.key, "version": sweep.stamp.version}
    journal.write_text(json.dumps(header) + "\n")
    with pytest.raises(NQMError, match="holds another configuration; move it away"):
        Sweep(changed(lr=0.2), axes).run(out)
    sweep.run(out)
    assert len(read_table(out)) == 2 * 31
