"""The code in README and docs is executed, so that it cannot rot."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from figures import journeys
from nqm.cli import main
from paper_repro.cli import plot

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages whose blocks are one session (see `figures.journeys`).
JOURNEYS = sorted((ROOT / "docs").glob("journey_*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.stem}-{index}", text)
        for page in PAGES
        if page not in JOURNEYS
        for index, (kind, text) in enumerate(FENCE.findall(page.read_text()))
        if kind == language
    ]


def needs_torch(text: str) -> None:
    """Skip what is about `neural` where PyTorch is not installed."""
    if re.search(r"\b(neural|torch)\b", text):
        pytest.importorskip("torch")


def ids(block: tuple[str, str]) -> str:
    return block[0]


def printed() -> dict[str, str]:
    """By the name of a Python block, the ``text`` block that follows it: what it prints."""
    told = {}
    for page in PAGES:
        fences = FENCE.findall(page.read_text())
        for index, (one, two) in enumerate(itertools.pairwise(fences)):
            if (one[0], two[0]) == ("python", "text"):
                told[f"{page.stem}-{index}"] = two[1]
    return told


@pytest.mark.parametrize("block", blocks("python"), ids=ids)
def test_python_blocks_run(block: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    needs_torch(block[1])
    exec(compile(block[1], block[0], "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert out == printed().get(block[0], out), "make gallery puts what is printed into the page"


def commands() -> list[str]:
    """Every command that a page gives, once."""
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    given = [line.split("  #")[0].strip() for line in lines if line.startswith("nqm ")]
    return list(dict.fromkeys(given))


#: What trains the run that the pages call RUN, and the folder that they call OUT; where that is.
TRAIN = "nqm neural train digits_bn"
PLACE = "out/neural/digits_bn-full/"
#: Run as a user does, in a process of its own; the others here, where all is imported already.
FROM_A_SHELL = "nqm list"
#: The bridge's command in seconds.
SMALL_BRIDGE = ["--threads", "1", "--examples", "60", "--members", "2"]
SMALL_BRIDGE += itertools.chain.from_iterable(
    ("--set", setting)
    for setting in (
        "bridge.eigenpairs=4", "bridge.noise_samples=1", "bridge.lanczos_steps=3",
        "bridge.displacements=2", "bridge.averaging_displacements=1", "bridge.steps=20",
        "bridge.lr_times_sharpness=[0.2]", "plan.runs=4", "plan.records=1",
    )
)  # fmt: skip


def call(words: list[str]) -> str:
    """What `nqm` prints, which must not fail."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, what the pages call RUN."""
    out = tmp_path_factory.mktemp("runs")
    call([*shlex.split(TRAIN)[1:], "--scale", "smoke", "--threads", "1", "--out", str(out)])
    return out / "late_phase" / "seed0"


def small(words: list[str]) -> list[str]:
    """The same command in seconds."""
    if words[:2] == ["neural", "train"]:
        return [*words, "--scale", "smoke", "--threads", "1"]
    if words[:2] == ["neural", "bridge"]:
        return words + SMALL_BRIDGE
    if words[0] in ("figure", "reproduce"):
        return [*words, "--scale", "smoke"]
    return words


@pytest.mark.parametrize("command", commands())
def test_commands_run(
    command: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_torch(command)
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    monkeypatch.chdir(tmp_path)
    if command == TRAIN:
        assert (request.getfixturevalue("trained") / "result.parquet").exists()
        return
    words = shlex.split(command)[1:]
    for index, word in enumerate(words):
        if word.partition("#")[0] == "RUN":
            words[index] = word.replace("RUN", str(request.getfixturevalue("trained")))
        elif word.startswith(PLACE):
            out = request.getfixturevalue("trained").parents[1]
            words[index] = str(out / word.removeprefix(PLACE))
        elif word == "OUT" and words[:2] != ["neural", "train"]:
            words[index] = str(request.getfixturevalue("trained").parents[1])
    words = small(words)
    if words[0] in ("figure", "reproduce"):
        words += ["--out", str(tmp_path / "out")]
    if words[0] == "plot":
        monkeypatch.setitem(main.commands, "plot", plot)
        call(["sweep", "docs/examples/sweep.toml", "--out", words[1]])
    if command == FROM_A_SHELL:
        shell = [str(Path(sys.executable).with_name("nqm")), *words]
        out = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    else:
        out = call(words)
    if "--json" in words:
        keys = {"columns", "rows"} if words[:2] != ["neural", "show"] else {"recipe", "arms"}
        assert keys <= set(json.loads(out))


@pytest.mark.parametrize("path", JOURNEYS, ids=lambda path: path.stem)
def test_journeys_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in one folder; commands in seconds, into the folder of full ones."""
    page = path.read_text()
    page = page.replace("for seed in range(3)", "for seed in range(1)")  # in seconds
    needs_torch(page)
    monkeypatch.chdir(tmp_path)

    def run(words: Sequence[str]) -> None:
        words = small(list(words))
        if words[:2] == ["neural", "bridge"]:
            words += ["--set", "bridge.minimise=0", "--set", "plan.runs=8"]
        if words[:2] == ["neural", "train"] and "--out" not in words:
            words += ["--out", f"out/neural/{Path(words[2]).stem}-full"]
        call(words)

    assert journeys.walk(page, run) == page, "python -m figures.journeys puts in what is printed"
    drawn = journeys.pictures(page)
    assert drawn
    for picture, file in drawn.items():
        assert (path.parent / picture).exists()
        assert Path(file).exists()


def test_the_commands_that_are_special_are_on_the_pages() -> None:
    assert {TRAIN, FROM_A_SHELL} <= set(commands())


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_toml_blocks_are_the_examples_or_valid() -> None:
    import tomllib

    for name, text in blocks("toml"):
        assert tomllib.loads(text), name


def test_the_reference_lists_every_public_name() -> None:
    import neural
    import nqm

    for package in (nqm, neural):
        page = (ROOT / "docs" / "reference" / f"{package.__name__}.rst").read_text()
        listed = re.findall(r"^   ([A-Za-z]\w*)$", page, re.MULTILINE)
        listed += re.findall(r"^\.\. data:: (\w+)$", page, re.MULTILINE)
        assert len(listed) == len(set(listed))
        packages = {name for name in listed if (ROOT / package.__name__ / name).is_dir()}
        assert set(listed) - packages == set(package.__all__) - {"__version__"}


def test_settings_of_the_bridge_are_all_listed() -> None:
    """By their names and defaults; a setting without one has an empty cell."""
    import tomllib

    pytest.importorskip("torch")
    from neural.bridge.config import BridgeConfig, Plan

    page = (ROOT / "docs" / "bridge.md").read_text()
    rows = re.findall(
        r"^\| `((?:bridge|plan)\.\w+)` \| (?:`(.*?)`)? ?\| (.+\.) \|$", page, re.MULTILINE
    )
    listed = {name: tomllib.loads(f"x = {text}")["x"] if text else None for name, text, _ in rows}
    stated = {}
    for table, kind in (("bridge", BridgeConfig), ("plan", Plan)):
        for field in dataclasses.fields(kind):
            plain = list(field.default) if isinstance(field.default, tuple) else field.default
            stated[f"{table}.{field.name}"] = plain
    assert list(listed) == list(stated)
    assert listed == stated


def test_settings_and_rules_of_combining_are_all_listed() -> None:
    import tomllib

    pytest.importorskip("torch")
    from neural.combine.config import CombineConfig
    from neural.combine.rules import RULES
    from neural.combine.text_ensembles import GatesConfig

    page = (ROOT / "docs" / "combining.md").read_text()
    text = (ROOT / "docs" / "combining_text.md").read_text()
    for section, config, where in (("combine", CombineConfig, page), ("gates", GatesConfig, text)):
        setting = rf"^\| `{section}\.(\w+)` \| `(.*?)` \| .+\. \|$"
        rows = re.findall(setting, where, re.MULTILINE)
        listed = {name: tomllib.loads(f"x = {text}")["x"] for name, text in rows}
        stated = {
            field.name: list(field.default) if isinstance(field.default, tuple) else field.default
            for field in dataclasses.fields(config)
        }
        assert listed == stated
    rules = page.partition("## Rules")[2].partition("Options of a rule")[0]
    first = [row.split("|")[1] for row in rules.splitlines() if row.startswith("| `")]
    assert [name for cell in first for name in re.findall(r"`(\w+)`", cell)] == list(RULES)


def test_the_bridges_that_were_measured_can_be_asked_for(tmp_path: Path) -> None:
    import tomllib

    pytest.importorskip("torch")
    from neural.bridge.pipeline import load_config

    named = [
        (name, text)
        for name, text in blocks("toml")
        if name.startswith(("bridge_digits-", "bridge_images-", "bridge_networks-"))
    ]
    texts = [text for _, text in named if "[problem]" not in text]
    assert len(texts) == 7
    path = tmp_path / "bridge.toml"
    for text in texts:
        path.write_text(text)
        stated = tomllib.loads(text)
        for name, found in zip(("bridge", "plan"), load_config(path), strict=True):
            for key, value in stated.pop(name).items():
                there = getattr(found, key)
                assert (list(there) if isinstance(there, tuple) else there) == value
        assert not stated
