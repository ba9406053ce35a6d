"""Names that become folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nqm.errors import NQMError
from nqm.names import LONGEST, check_folder_names, folder_name


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../up", "a/b", "a\\b", "/abs", ".hidden", "-rf", "~", "a\0b", "a\nb", "a:b",
        "a*", "a?", '"a"', "<a>", "a|b", "a.", "a ", " a", "CON", "nul.txt", "Lpt1", "x" * 101,
        "\u00e9" * 51, "$HOME", "a\u202eb", "\u2025", "a\u2044b",
    ],
)  # fmt: skip
def test_refused(name: str) -> None:
    with pytest.raises(NQMError, match=r"^arm .* becomes the name of a folder and must not "):
        check_folder_names("arm", [name])


@pytest.mark.parametrize(
    "name", ["a", "base", "late_phase", "K=10", "lr 0.1", "_x", "0", "spät", "console", "x" * 100]
)
def test_allowed(name: str) -> None:
    check_folder_names("arm", [name])


@pytest.mark.parametrize(
    "names",
    [["a", "A"], ["ß", "SS"], ["\u00e9", "e\u0301".upper()], ["Results.PARQUET"], ["x", "X"]],
)
def test_names_that_are_one_on_some_file_systems(names: list[str]) -> None:
    with pytest.raises(NQMError):
        check_folder_names("arm", names, ["results.parquet"])


@given(st.text() | st.sampled_from(["/", "..", "../..", "a/../b", "con", " . "]))
def test_any_text_becomes_a_folder_below(text: str) -> None:
    name = folder_name(text, "here")
    check_folder_names("name", [name])
    top = Path("/top/of/all")
    assert (top / name).resolve().parent == top
    assert len(name.encode()) <= LONGEST
    assert folder_name(name, "there") == name
