"""What may import what, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nqm

ROOT = Path(nqm.__file__).parents[1]
PACKAGES = ("nqm", "neural", "figures", "paper_repro")
#: package -> project modules it may import; nothing may import paper_repro.
ALLOWED = {
    "nqm": ("nqm",),
    "figures": ("figures", "nqm.table"),
    "neural": ("neural", "figures", "nqm"),
    "paper_repro": ("paper_repro", "figures", "neural", "nqm"),
}


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: -node.level]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from nqm import table` imports nqm.table; `from nqm.table import X` does not
            # import a module nqm.table.X, but the prefix rule below treats both alike.
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", [p for p in PACKAGES if (ROOT / p).is_dir()])
def test_only_the_allowed_edges(package):
    assert files(package)
    for path in files(package):
        for name in imported(path):
            if name.split(".")[0] not in PACKAGES:
                continue
            fits = [name == ok or name.startswith(ok + ".") for ok in ALLOWED[package]]
            assert any(fits), f"{path.relative_to(ROOT)} imports {name}"


def test_nqm_names_no_heavy_library():
    for path in files("nqm"):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"torch", "matplotlib", "seaborn"}, path.name


def test_the_walk_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "figures" / "sub" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import nqm.table as t\nfrom nqm import problem\nfrom . import other\n"
        "from ..style import ink\ndef f():\n    import torch\n"
    )
    assert imported(path) == {
        "nqm.table", "nqm.problem", "figures.sub.other", "figures.style.ink", "torch",
    }  # fmt: skip


def fresh(code: str) -> str:
    """Output of `code` in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def test_import_is_light():
    """`import nqm` alone loads no numerics; all that is public loads no torch and no plots."""
    heavy = "('torch', 'matplotlib', 'seaborn')"
    loaded = f"import sys; print([m for m in {heavy} if m in sys.modules])"
    assert fresh(f"import nqm; {loaded}") == "[]"
    everything = "import nqm; [getattr(nqm, name) for name in dir(nqm)]"
    assert fresh(f"{everything}; {loaded}") == "[]"
    assert fresh("import nqm, sys; print('numba' in sys.modules)") == "False"


def test_every_public_name_resolves_and_is_explained():
    names = dir(nqm)
    assert set(nqm.__all__) <= set(names)
    for name in names:
        value = getattr(nqm, name)
        if name not in ("ROSTER", "__version__"):  # data; the roster's members are explained below
            own = value.__doc__ or ""
            assert own.strip(), f"nqm.{name} has no docstring"
            # A dataclass without one is given its signature.
            assert not own.startswith(f"{name}("), f"nqm.{name} has no docstring of its own"
    for name, member in nqm.ROSTER.items():
        assert member.__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match=r"attribute.*sgd"):
        nqm.sgd  # noqa: B018


def test_every_module_says_what_it_is():
    for package in PACKAGES:
        for path in files(package):
            assert ast.get_docstring(ast.parse(path.read_text())), path.relative_to(ROOT)
