"""Members written for mergekit: what is in the files, and what is refused before any is written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

from neural.combine import Members
from neural.combine.export import METHODS, for_mergekit
from neural.combine.members import Member
from nqm import NQMError
from nqm.cli import main


def states(count: int) -> tuple[nn.Module, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A network with BatchNorm, members that saw different numbers of batches, and an ancestor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    made = {}
    for k in range(count + 1):
        state = {n: torch.randn_like(v) if v.is_floating_point() else torch.tensor(7 * k)
                 for n, v in model.state_dict().items()}  # fmt: skip
        made[f"run {k}"] = state
    start = made.pop("run 0")
    return model, made, start


def members(count: int = 2, *, ancestor: bool = True) -> Members:
    model, made, start = states(count)
    return Members.of_states(model, made, start if ancestor else None)


def test_ties_of_two_with_their_ancestor(tmp_path: Path) -> None:
    _, made, start = states(2)
    files = for_mergekit(members(), tmp_path / "mk", "ties", settings={"density": 0.3})
    assert [file.name for file in files] == [
        "member0.safetensors", "member1.safetensors", "ancestor.safetensors", "mergekit.yaml",
    ]  # fmt: skip
    for file, state in zip(files, [*made.values(), start], strict=False):
        written = load_file(file)
        assert written.keys() == state.keys()
        for name, value in written.items():
            # mergekit wants whole numbers to be equal in all its inputs: the largest, 14 batches.
            expected = torch.tensor(14) if name == "1.num_batches_tracked" else state[name]
            assert torch.equal(value, expected), name
    assert files[-1].read_text().splitlines()[1:] == [
        "merge_method: ties",
        "base_model: ancestor.safetensors",
        "dtype: float32",
        "parameters:",
        "  lambda: 1.0",
        "models:",
        '  - model: member0.safetensors  # "run 1"',
        "    parameters:",
        "      weight: 1.0",
        "      density: 0.3",
        '  - model: member1.safetensors  # "run 2"',
        "    parameters:",
        "      weight: 1.0",
        "      density: 0.3",
    ]


def test_linear_takes_weights_and_no_ancestor(tmp_path: Path) -> None:
    files = for_mergekit(members(ancestor=False), tmp_path, weights=(0.75, 0.25))
    text = files[-1].read_text()
    assert not (tmp_path / "ancestor.safetensors").exists()
    assert "base_model" not in text
    assert [line.split()[1] for line in text.splitlines() if "weight:" in line] == ["0.75", "0.25"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_file_is_yaml_with_numbers(method: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    count = METHODS[method].count[1] or 3
    content = yaml.safe_load(for_mergekit(members(count), tmp_path, method)[-1].read_text())
    assert content["merge_method"] == method
    assert len(content["models"]) == count
    tables = [content.get("parameters", {}), *(m.get("parameters", {}) for m in content["models"])]
    assert all(isinstance(v, int | float) for table in tables for v in table.values())
    based = {"ancestor": "ancestor.safetensors", "first": "member0.safetensors", "": None}
    assert content.get("base_model") == based[METHODS[method].base]
    if "tol" in content.get("parameters", {}):
        assert content["parameters"]["tol"] == 1e-5


@pytest.mark.parametrize("method", sorted(METHODS))
def test_mergekit_itself_takes_the_files(method: str, tmp_path: Path) -> None:
    tool = shutil.which("mergekit-pytorch")
    if tool is None:
        pytest.skip("mergekit-pytorch is not installed; it wants an environment of its own")
    made = members(METHODS[method].count[1] or 3)
    for_mergekit(made, tmp_path, method)
    subprocess.run([tool, "mergekit.yaml", "merged"], cwd=tmp_path, check=True, capture_output=True)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == made.state(0).keys()


def tied() -> Members:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = model.state_dict()
    return Members.of_states(model, [state, state], state)


def spectral() -> Members:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    state = model.state_dict()
    return Members.of_states(model, [state, state], state)


def masked() -> Members:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    return Members.of_states(model, [model.state_dict()] * 2)


class _Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(2, 2)})


def factors() -> Members:
    model = nn.Sequential(_Factors())
    return Members.of_states(model, [model.state_dict()] * 2)


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (members(ancestor=False), {"method": "ties"}, "give --ancestor"),
        (members(3), {"method": "slerp"}, "exactly 2 members; got 3"),
        (members(1), {"method": "model_stock"}, "at least 2 members; got 1"),
        (members(), {"method": "tise"}, "did you mean 'ties'"),
        (members(), {"method": "slerp", "weights": (0.5, 0.5)}, "takes no weights"),
        (members(), {"weights": (0.5, 0.6)}, "sum to 1"),
        (members(), {"settings": {"density": 0.5}}, "no parameter 'density'"),
        (members(), {"method": "ties", "settings": {"density": 1.5}}, "density"),
        (members(), {"method": "ties", "settings": {"lambda": float("nan")}}, "lambda"),
        (tied(), {"method": "dare_ties"}, "tied weight"),
        (spectral(), {}, "spectral normalisation"),
        (masked(), {}, "'mask' holds numbers that are not finite"),
        (factors(), {}, "factor of a low-rank update"),
    ],
)
def test_what_is_refused(
    made: Members, options: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(NQMError) as told:
        for_mergekit(made, tmp_path / "mk", **options)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "mk").exists()


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(NQMError, match="not an empty folder"):
        for_mergekit(members(), tmp_path)
    with pytest.raises(NQMError, match="not an empty folder"):
        for_mergekit(members(), tmp_path / "mine.txt")


def test_odd_names_stay_in_their_comment(tmp_path: Path) -> None:
    model, made, _ = states(1)
    odd = Members(model, [Member("a\nmodels: []", lambda: made["run 1"])])
    text = for_mergekit(odd, tmp_path)[-1].read_text()
    assert text.count("models:") == 2
    assert json.dumps("a\nmodels: []") in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "--out", "c.safetensors"], "one RUN is exported at a time; got 2"),
        (["a", "--method", "ties", "--out", "c.safetensors"], "--method is for exporting with"),
        (["a", "--for", "mergekit", "--member", "1", "--out", "c"], "RUN#members"),
        (["a", "--for", "mergekit", "--set", "density", "--out", "c"], "NAME=NUMBER"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["neural", "export", *words])
    assert done.exit_code != 0
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
