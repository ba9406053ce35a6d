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
#: room of `neural` -> rooms it may import; the lower ones are libraries that know no recipe.
ROOMS = {
    "batches": (),
    "late_phase": ("batches",),
    "data": (),
    "models": (),
    "evaluate": ("batches",),
    "serving": ("data", "models"),
    "curvature": ("late_phase", "evaluate"),
    "training": ("late_phase", "data", "models", "evaluate", "serving"),
    "quadratic": ("late_phase", "training"),
    "bridge": ("curvature", "late_phase", "data", "training"),
    "combine": ("curvature", "data", "evaluate", "late_phase", "models", "training"),
    "clients": ("data", "training"),
    "modules": ("combine", "data", "evaluate", "late_phase", "models", "training"),
    "cli": ("data", "late_phase", "models", "training"),
}
#: package -> project modules it may import; nothing may import paper_repro.
ALLOWED = {
    "nqm": ("nqm",),
    "figures": ("figures", "nqm.errors", "nqm.table"),
    "neural": ("neural", "figures", "nqm"),
    "paper_repro": ("paper_repro", "figures", "neural", "nqm"),
}
#: File -> modules that it may import besides: the controls draw, when they are shown.
EXCEPTIONS = {"nqm/explorer/widgets.py": ("figures",)}


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
            allowed = ALLOWED[package] + EXCEPTIONS.get(path.relative_to(ROOT).as_posix(), ())
            fits = [name == ok or name.startswith(ok + ".") for ok in allowed]
            assert any(fits), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_neural_know_only_those_below(room):
    inside = [path for path in files("neural") if path.relative_to(ROOT / "neural").parts[0]
              in (room, f"{room}.py")]  # fmt: skip
    assert inside
    for path in inside:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "neural" and len(parts) > 1 and parts[1] in ROOMS:
                fits = parts[1] == room or parts[1] in ROOMS[room]
                assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_is_listed():
    rooms = {path.relative_to(ROOT / "neural").parts[0].removesuffix(".py")
             for path in files("neural")}  # fmt: skip
    assert rooms - {"__init__"} == set(ROOMS)


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


def test_commands_are_where_what_they_run_is():
    """The group loads them when they are asked for, and their files load nothing but click."""
    from neural.cli import COMMANDS

    assert set(COMMANDS.values()) == {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files("neural") if path.name == "cli.py" and path.parent != ROOT / "neural"
    }  # fmt: skip
    show = "from neural.cli import neural; neural(['--help'], standalone_mode=False)"
    heavy = "('torch', 'numpy', 'pandas', 'scipy', 'tqdm')"
    shown = fresh(f"{show}; import sys; print([m for m in {heavy} if m in sys.modules])")
    assert shown.endswith("[]")
    for name, module in COMMANDS.items():
        assert f"\n  {name} " in shown
        one = f"from neural.cli import neural; neural(['{name}', '--help'], standalone_mode=False)"
        ours = "sorted(m for m in sys.modules if m.startswith('neural.') and m.endswith('.cli'))"
        assert fresh(f"{one}; import sys; print({ours})").endswith(
            f"{sorted(['neural.cli', module])}"
        )


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


def test_the_page_of_the_tree_names_what_is_there():
    """Folders and files of `nqm` and `neural` that docs/architecture.md lists."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.partition("```text\n")[2].partition("figures/")[0]
    package, seen = "", 0
    for line in tree.splitlines():
        if not line.startswith(" "):
            package = line.strip().removesuffix("/")
            continue
        first, *names = line.replace("...", "").split()
        here = ROOT / package
        if first.endswith("/") and names and not names[0].endswith("/") and package:
            here, listed = here / first, names
        else:
            listed = [first, *names]
        if not here.is_dir() or "," in line or "the " in line or "one file" in line:
            assert here.is_dir(), line
            continue
        for name in listed:
            seen += 1
            assert (here / name).is_dir() or (here / f"{name}.py").is_file(), f"{here.name}/{name}"
    assert seen > 50
