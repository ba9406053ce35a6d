"""What a plain install can do, and what it says where an extra is missing."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXAMPLE = str(ROOT / "docs" / "examples" / "late_phase.toml")
#: Imported under another name than the package has.
IMPORTED_AS = {"lazy-loader": "lazy_loader", "scikit-learn": "sklearn", "pillow": "PIL"}

#: Calls `nqm` once for each list of words, where packages of the extras cannot be imported.
CALLS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from nqm.cli import main
for words in {calls}:
    try:
        main(words)
    except SystemExit as done:
        print("exit code", done.code, *words[:2], flush=True)
"""


def packages(requirements: list[str]) -> set[str]:
    """Import names of requirements, without this project's own extras."""
    names = {line.split(">=")[0].split("[")[0] for line in requirements}
    return {IMPORTED_AS.get(name, name) for name in names - {PROJECT["name"]}}


def call(*calls: list[str], absent: set[str]) -> subprocess.CompletedProcess[str]:
    code = CALLS.format(absent=sorted(absent), calls=list(calls))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_nqm_imports_its_dependencies_and_no_others() -> None:
    found: set[str] = set()
    for path in (ROOT / "nqm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    found -= {*sys.stdlib_module_names, "nqm"}
    extras = PROJECT["optional-dependencies"]
    drawn = packages(extras["notebook"]) | {"figures"}  # by the controls, when they are shown
    assert found - packages(extras["cluster"]) - drawn == packages(PROJECT["dependencies"])


def test_a_plain_install_runs_sweeps_settles_and_tunes(tmp_path: Path) -> None:
    extras = packages(
        [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    )
    absent = extras - packages(PROJECT["dependencies"])
    assert {"matplotlib", "jinja2", "seaborn", "sklearn", "torch"} <= absent
    commands = [
        ["run", EXAMPLE, "--out", str(tmp_path / "run.parquet")],
        ["sweep", str(ROOT / "docs/examples/sweep.toml"), "--out", str(tmp_path / "sweep.parquet")],
        ["steady", EXAMPLE],
        ["tune", EXAMPLE, "--phase", "0"],
        ["list"],
    ]
    done = call(*commands, absent=absent)
    assert done.stdout.count("exit code 0") == len(commands), done.stdout + done.stderr
    assert (tmp_path / "run.parquet").stat().st_size > 0


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2", "sklearn"])
def test_pictures_name_their_extra(missing: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    done = call(
        ["figure", "collapse", *out], ["reproduce", "all", *out], ["tables", *out], absent={missing}
    )
    assert done.stdout.count("exit code 2") == 3, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(" needs ")[0] for line in lines] == [
        "error: nqm figure", "error: nqm reproduce", "error: nqm tables",
    ]  # fmt: skip
    for line in lines:
        assert line.endswith(f"needs {missing}: pip install 'late-phase-nqm[figures]'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["matplotlib", "seaborn"])
def test_plot_names_its_extra(missing: str) -> None:
    assert PROJECT["entry-points"]["nqm.commands"]["plot"] == "paper_repro.cli:plot"
    code = CALLS.replace(
        "main\nfor", "main\nfrom paper_repro.cli import plot\nmain.add_command(plot)\nfor"
    )
    code = code.format(absent=[missing], calls=[["plot", "none.csv"]])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (
        done.stderr == f"error: nqm plot needs {missing}: pip install 'late-phase-nqm[figures]'\n"
    )


def test_extras_hold_what_their_commands_need() -> None:
    extras = PROJECT["optional-dependencies"]
    assert packages(extras["figures"]) == {"matplotlib", "jinja2", "seaborn", "sklearn"}
    own = f"{PROJECT['name']}[figures]"
    assert own in extras["neural"], "nqm neural train draws pictures"
    assert own in extras["test"], "make test, make reproduce"
    assert f"{PROJECT['name']}[test]" in extras["dev"]
