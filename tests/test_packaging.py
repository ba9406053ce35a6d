"""What the package asks for, and the files that name versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    stated = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in stated}


def bounds(requirements: list[str]) -> dict[str, str]:
    stated = [re.fullmatch(r"([\w.-]+)>=([\d.]+)", one) for one in requirements]
    return {one[1].lower(): one[2] for one in stated if one is not None}


def test_lowest_versions_are_the_bounds() -> None:
    own = f"{PROJECT['name']}[figures]"
    assert own in EXTRAS["test"]
    needed = [*PROJECT["dependencies"], *EXTRAS["figures"], *EXTRAS["test"]]
    needed.remove(own)
    assert pinned("constraints-lowest.txt") == bounds(needed)
    assert len(bounds(needed)) == len(needed), "a requirement without a lower bound"


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_tested_versions_lie_within_the_bounds(extra: str) -> None:
    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))

    tested = pinned("constraints.txt")
    for name, bound in bounds(EXTRAS[extra] if extra else PROJECT["dependencies"]).items():
        if name in tested:  # not all extras are installed for the tests
            assert number(tested[name]) >= number(bound), name


def test_classifiers_name_the_pythons_that_are_allowed() -> None:
    named = [
        int(match[1])
        for one in PROJECT["classifiers"]
        if (match := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", one))
    ]
    assert PROJECT["requires-python"] == f">=3.{named[0]}"
    assert named == list(range(named[0], named[0] + len(named)))


def test_pages_install_from_the_clone() -> None:
    """No index has the package: `pip install` of its name works where it is installed already."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            if re.search(r"pip install \S*late-phase-nqm", line):
                assert "adds an extra" in line or "is installed" in line, f"{page.name}: {line}"
