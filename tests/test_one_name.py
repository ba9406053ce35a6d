"""One quantity has one name: signatures, fields, options, recipes and columns against the table."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from nqm.cli import main

ROOT = Path(__file__).parent.parent
PACKAGES = ("nqm", "neural", "figures", "paper_repro")
TITLE = "## One quantity, one name"
#: What holds the name of a column: the display of a dictionary, list or tuple, or a subscript.
HOLDERS = (ast.Dict, ast.List, ast.Tuple, ast.Subscript)


@cache
def table() -> dict[str, tuple[str, ...]]:
    """Name -> the words it is not called by, as CONTRIBUTING.md states them."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition(TITLE)[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", section, re.MULTILINE)
    return {name: tuple(re.findall(r"`(\w+)`", others)) for name, others in rows}


def names_what_users_may_mean(node: ast.stmt) -> bool:
    """Whether a statement is the list of words that an unknown key may stand for."""
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "LETTERS"


def public(path: Path, root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """(name, where) of parameters of public functions, fields of public classes, and columns."""
    tree = ast.parse(path.read_text())
    where = str(path.relative_to(root))

    def visit(node: ast.AST) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                for entry in child.body:
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                        yield entry.target.id, f"{where}: field of {child.name}"
                yield from visit(child)
            elif isinstance(child, ast.FunctionDef) and (
                not child.name.startswith("_") or child.name == "__init__"
            ):
                given = child.args
                for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                    yield argument.arg, f"{where}: parameter of {child.name}"

    yield from visit(tree)
    said = {
        node for group in tree.body if names_what_users_may_mean(group) for node in ast.walk(group)
    }
    for node in ast.walk(tree):
        if isinstance(node, HOLDERS) and node not in said:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Constant) and isinstance(child.value, str):
                    yield child.value, f"{where}: the text {child.value!r}, as a column or a key"


def options(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    """(name, where) of every option of a command and of the commands below it."""
    context = click.Context(command)
    for parameter in command.params:
        for text in (*parameter.opts, *parameter.secondary_opts):
            yield text.lstrip("-").replace("-", "_"), f"option {text} of {path}"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from options(below, f"{path} {name}")


def keys(value: Any) -> Iterator[str]:
    """Keys of a configuration, at every depth."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield name
            yield from keys(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from keys(entry)


@cache
def used() -> dict[str, list[str]]:
    """Name -> where it is used."""
    found: dict[str, list[str]] = {}
    pairs = [
        pair for package in PACKAGES for path in (ROOT / package).rglob("*.py")
        for pair in public(path)
    ]  # fmt: skip
    pairs += options(main, "nqm")
    for folder in ("neural/recipes", "docs/examples"):
        for path in (ROOT / folder).glob("*.toml"):
            pairs += [(name, path.name) for name in keys(tomllib.loads(path.read_text()))]
    for name, where in pairs:
        found.setdefault(name, []).append(where)
    return found


def test_the_table_is_read_whole() -> None:
    rows = (ROOT / "CONTRIBUTING.md").read_text().partition(TITLE)[2].partition("\n## ")[0]
    assert len(table()) == len(re.findall(r"^\| `", rows, re.MULTILINE)) > 20
    assert all(table().values())
    others = [word for words in table().values() for word in words]
    assert len(set(others)) == len(others)  # a word stands for one quantity
    assert not set(others) & set(table())


@pytest.mark.parametrize("name", table())
def test_a_name_of_the_table_is_in_use(name: str) -> None:
    assert name in used(), f"{name} is used nowhere: strike it from CONTRIBUTING.md"


@pytest.mark.parametrize("name", table())
def test_no_other_name_is_used_for_it(name: str) -> None:
    other = {word: used()[word] for word in table()[name] if word in used()}
    assert not other, f"these are called {name} (CONTRIBUTING.md): {other}"


BREAKING = """
class Result:
    place: int
    _rate: float

class _Private:
    wd: float

def solve(rate, *, n_steps=1):
    learning_rate = rate
    return {"rate": [1.0]}, table[["mu", "loss"]]

def _helper(jobs): ...
"""


def test_the_reader_sees_fields_parameters_and_columns_and_nothing_private(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(BREAKING)
    names = {name for name, _ in public(module, tmp_path)}
    assert names == {"place", "_rate", "rate", "n_steps", "mu", "loss"}


def test_the_reader_sees_options_and_keys() -> None:
    made = click.Group(commands=[click.Command("a", params=[click.Option(["--n-steps", "-x"])])])
    assert {name for name, _ in options(made, "made")} == {"n_steps", "x"}
    assert set(keys(tomllib.loads("a = [{wd = 1}]\n[b.c]\nrate = 2"))) == {
        "a", "wd", "b", "c", "rate",
    }  # fmt: skip
