"""Members from disk: every place they may come from, and every way that fails."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from neural.combine import Members
from neural.combine.sources import open_members
from neural.training.build import load_weights
from neural.training.load_run import reopen
from neural.training.recipe import load_recipe
from neural.training.train import train
from nqm import NQMError
from tests.tiny_runs import assert_equal


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain runs and one with members, each of an epoch."""
    out = tmp_path_factory.mktemp("runs")
    recipe = load_recipe(
        "digits_bn", "smoke",
        ["train.epochs=2", "late_phase.start_epoch=1", "data.train_examples=160",
         "data.test_examples=60", "average.start_epoch=1"],
    )  # fmt: skip
    from dataclasses import replace

    for seed in (0, 1):
        train(replace(recipe.arms["base"], seed=seed), out / "base" / f"seed{seed}")
    train(recipe.arms["late_phase"], out / "late" / "seed0")
    return out


def state_of(folder: Path) -> dict[str, Tensor]:
    return reopen(folder).model.state_dict()


def test_runs_patterns_and_late_members(runs: Path) -> None:
    opened = open_members([f"{runs}/base/seed*", f"{runs}/late/seed0#members"])
    held, late = opened.members, reopen(runs / "late" / "seed0").late
    assert late is not None
    names = [member.name for member in held]
    assert names == ["base/seed0", "base/seed1", *(f"late/seed0#{k}" for k in range(late.members))]
    for index, folder in enumerate(("base/seed0", "base/seed1")):
        expected = state_of(runs / folder)
        assert all(torch.equal(v, expected[n]) for n, v in held.state(index).items())
    expected = late.member(1).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in held.state(3).items())
    # Two runs of two epochs, and one for all its members.
    assert held.epochs_total == 6.0
    assert [member.epochs_all for member in held] == [2.0] * len(held)


def test_files_in_every_form_are_the_run(runs: Path, tmp_path: Path) -> None:
    folder = runs / "base" / "seed0"
    state = state_of(folder)
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}},
               tmp_path / "trainer.ckpt")  # fmt: skip
    torch.save({f"_orig_mod.{n}": v for n, v in state.items()}, tmp_path / "compiled.pth")
    hub, shards = tmp_path / "hub", tmp_path / "shards"
    hub.mkdir()
    shards.mkdir()
    save_file(state, hub / "model.safetensors")
    names = list(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, some in parts.items():
        save_file({n: state[n] for n in some}, shards / file)
    index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    files = ("plain.safetensors", "plain.pt", "trainer.ckpt", "compiled.pth", "hub", "shards")
    held = open_members([tmp_path / one for one in files], like=folder).members
    assert [member.name for member in held] == list(files)
    for found in held.states():
        assert all(torch.equal(v, state[n]) for n, v in found.items())
    assert held.geometry()["distance"].max() < 1e-5
    own = Members.open(tmp_path / "plain.pt", model=reopen(folder).model)
    assert torch.equal(own.state(0)[names[0]], state[names[0]])


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.half() if v.is_floating_point() else v for n, v in state.items()}


def test_half_precision_members_of_a_single_precision_model(runs: Path, tmp_path: Path) -> None:
    folder = runs / "base" / "seed0"
    state = half(state_of(folder))
    save_file(state, tmp_path / "half.safetensors")
    held = open_members([tmp_path / "half.safetensors", folder]).members
    found = held.state(0)
    assert all(torch.equal(v, state[n].to(v.dtype)) for n, v in found.items())


def spoiled(state: dict[str, Tensor], kind: str) -> dict[str, Any]:
    first = next(iter(state))
    buffer = next(n for n in state if n.endswith("running_var"))
    changed: dict[str, Any] = dict(state)
    if kind == "shape":
        changed[first] = state[first][..., :-1].contiguous()
    elif kind == "missing buffer":
        del changed[buffer]
    elif kind == "extra":
        changed["other.weight"] = torch.zeros(1)
    elif kind == "nan":
        changed[first] = torch.full_like(state[first], torch.nan)
    elif kind == "double":
        changed[first] = state[first].double()
    elif kind == "statistics":
        changed[buffer] = torch.full_like(state[buffer], torch.inf)
    elif kind == "integers":
        changed[first] = state[first].mul(100).to(torch.int8)
    elif kind == "integer statistics":
        changed[buffer] = state[buffer].round().long()
    elif kind == "sparse":
        changed[first] = state[first].to_sparse()
    elif kind == "quantised":
        changed[first] = torch.quantize_per_tensor(state[first], 0.1, 0, torch.qint8)
    elif kind == "meta":
        changed[first] = state[first].to("meta")
    elif kind == "eight bits":
        changed[first] = state[first].to(torch.float8_e4m3fn)
    elif kind == "complex":
        changed[first] = state[first].to(torch.complex64)
    return changed


WORDS = {
    "shape": "has shape",
    "missing buffer": "running_var' is missing",
    "extra": "'other.weight', which the model does not have",
    "nan": "not finite",
    "double": "would lose digits",
    "complex": "would lose digits",
    "statistics": "running_var' holds numbers that are not finite",
    "integers": "holds torch.int8, the model torch.float32",
    "integer statistics": "running_var' holds torch.int64",
    "sparse": "no dense tensor",
    "quantised": "no dense tensor",
    "meta": "no dense tensor",
    "eight bits": "is torch.float8_e4m3fn.*convert",
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's own quantised tensors
@pytest.mark.parametrize("kind", WORDS)
def test_spoiled_members_are_named_in_one_line(runs: Path, tmp_path: Path, kind: str) -> None:
    folder = runs / "base" / "seed0"
    torch.save(spoiled(state_of(folder), kind), tmp_path / "bad.pt")
    held = open_members([folder, tmp_path / "bad.pt"]).members
    with pytest.raises(NQMError, match=f"bad.pt.*{WORDS[kind]}") as error:
        list(held.states())
    assert "\n" not in str(error.value)


def test_a_mask_of_infinities_is_kept() -> None:
    """A buffer may be infinite where the model's own is."""

    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    state = Masked().state_dict()
    assert torch.equal(Members.of_states(Masked(), [state]).state(0)["mask"], state["mask"])
    other = {**state, "mask": torch.tensor([torch.nan, -torch.inf])}
    with pytest.raises(NQMError, match="'mask' holds numbers that are not finite"):
        Members.of_states(Masked(), [other]).state(0)


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_another_program_is_one_line(runs: Path, tmp_path: Path) -> None:
    state = state_of(runs / "base" / "seed0")
    for protocol in (2, 4, 5):
        (tmp_path / "p.pt").write_bytes(pickle.dumps(list(state), protocol=protocol))
        held = open_members([tmp_path / "p.pt"], like=runs / "base" / "seed0").members
        with pytest.raises(NQMError, match=r"p\.pt is not a c.*checkpoint") as error:
            held.state(0)
        assert "\n" not in str(error.value)


class Secret:
    """Not a tensor."""


def test_places_that_hold_no_members(runs: Path, tmp_path: Path) -> None:
    folder = runs / "base" / "seed0"
    torch.save({"w": Secret()}, tmp_path / "pickle.pt")
    (tmp_path / "note.txt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x"}}'
    )
    model = nn.Linear(2, 2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: open_members([tmp_path / "pickle.pt"]), "nothing states the architecture"),
        (lambda: list(open_members([tmp_path / "pickle.pt"], like=folder).members.states()),
         "only tensors and plain values"),
        (lambda: open_members([tmp_path / "note.txt"], like=folder), "ends in .safetensors"),
        (lambda: open_members([tmp_path / "none.pt"], like=folder), "no such file"),
        (lambda: open_members([f"{tmp_path}/x*.pt"], like=folder), "matches this pattern"),
        (lambda: open_members([tmp_path / "empty"], like=folder), "not the folder of a run"),
        (lambda: list(open_members([tmp_path / "index"], like=folder).members.states()),
         "names no file beside it"),
        (lambda: open_members([runs / "base"]), "is an arm"),
        (lambda: open_members([f"{folder}#members"]), "no late-phase members"),
        (lambda: open_members([f"{folder}#snapshots"]), "kept none"),
        (lambda: open_members([f"{folder}#all"]), "members or snapshots"),
        (lambda: open_members([folder, folder]), "given twice"),
        (lambda: open_members([folder], like="no_recipe"), "no_recipe"),
        (lambda: open_members([], model=model), "at least one model"),
        (lambda: open_members([f"{tmp_path}/note.txt#members"], like=folder), "not the folder"),
    ]  # fmt: skip
    for call, words in cases:
        with pytest.raises(NQMError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_runs_on_other_data_are_not_combined(runs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "digits_bn", "smoke",
        ["train.epochs=1", "late_phase.start_epoch=0", "data.train_examples=160",
         "data.test_examples=60", "average.start_epoch=0", "data.mean=[0.1]", "data.std=[0.5]"],
    )  # fmt: skip
    train(recipe.arms["base"], tmp_path / "other")
    with pytest.raises(NQMError, match=r"other data: mean"):
        open_members([runs / "base" / "seed0", tmp_path / "other"])


class Tied(nn.Module):
    """Two layers of one weight, and a normalisation that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.first = self.second = nn.BatchNorm1d(4)


def test_tied_weights_that_safetensors_wrote_once_have_all_their_names(tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps one name of a tensor, as Hugging Face's folders do."""
    nets = [Tied() for _ in range(2)]
    files = [tmp_path / "0.safetensors", tmp_path / "1.pt", tmp_path / "2.safetensors"]
    save_model(nets[0], str(files[0]))
    once = load_file(files[0])
    assert len(once) < len(nets[0].state_dict())
    torch.save({f"module.{name}": value for name, value in once.items()}, files[1])
    half = {n: value.half() if value.is_floating_point() else value for n, value in once.items()}
    save_file(half, files[2])
    members = open_members(files[:2], model=Tied()).members
    for state in members.states():
        assert_equal(state, nets[0].state_dict())
    halves = open_members(files[2:], model=Tied()).members.stored_types()
    assert halves.pop("other.weight") == halves.pop("one.weight") == torch.float16
    load_weights(nets[1], files[1])
    assert_equal(nets[1].state_dict(), nets[0].state_dict())


def test_values_that_differ_under_the_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    net = Tied()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["second.running_mean"] += 1.0
    torch.save(state, tmp_path / "net.pt")
    told = "'second.running_mean' and 'first.running_mean' are one tensor in the model"
    with pytest.raises(NQMError, match=told):
        load_weights(net, tmp_path / "net.pt")
    with pytest.raises(NQMError, match=told):
        open_members([tmp_path / "net.pt"], model=net).members.state(0)
    del state["one.weight"], state["other.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(NQMError, match=r"'one\.weight' is missing"):
        open_members([tmp_path / "less.pt"], model=net).members.state(0)
