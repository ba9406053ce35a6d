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
