"""The command line: the contract for scripts, and every mistake as one line and exit code 2."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from nqm import cli
from nqm.files import locked
from nqm.table import read_metadata, read_table
from tests.nqm.contract import CONTRACT

GRID = """
[sweep]
"phase.0.lr" = [0.1, 0.2, 0.3]
"phase.1.members" = [1, 4]
"""


def textbook() -> tuple[list[float], list[float]]:
    """Losses of the mean model and of the average member, by scalar recursions."""
    loss, member = np.zeros(4), np.zeros(4)
    for h, v in ((1.0, 1.0), (0.5, 0.5), (0.25, 0.25)):
        s = 1.0
        second, spread = [s], [0.0]
        for step in range(1, 201):
            s = (1 - 0.1 * h) ** 2 * s + 0.1**2 * v / 8
            if step in (100, 200):
                second.append(s)
                spread.append(0.0)
        mean_rate = 0.05 + 0.1 * 10 * 0.05
        d = 0.0
        for _ in range(100):
            s = (1 - mean_rate * h) ** 2 * s + mean_rate**2 * v / (10 * 8)
            d = (1 - 0.05 * h) ** 2 * d + 0.05**2 * (v / 8) * (1 - 1 / 10)
        second.append(s)
        spread.append(d)
        loss += 0.5 * h * np.array(second)
        member += 0.5 * h * (np.array(second) + np.array(spread))
    return loss.tolist(), member.tolist()


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "contract.toml"
    path.write_text(CONTRACT)
    return str(path)


@pytest.fixture
def grid(tmp_path: Path) -> str:
    path = tmp_path / "grid.toml"
    path.write_text(CONTRACT + GRID)
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert set(document) == {"columns", "rows"}
    return [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]


def fails(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


# --- the contract ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moments", "jump"])
def test_the_contract(file: str, method: str) -> None:
    table = rows(call("run", file, "--json", "--method", method))
    loss, member_loss = textbook()
    assert [row["step"] for row in table] == [0, 100, 200, 300]
    assert [row["examples"] for row in table] == [0, 800, 1600, 1600 + 100 * 10 * 8]
    assert [row["loss"] for row in table] == pytest.approx(loss, rel=1e-12)
    assert [row["member_loss"] for row in table] == pytest.approx(member_loss, rel=1e-12)
    assert [row["stderr"] for row in table] == [0.0] * 4
    assert [row["status"] for row in table] == ["finished"] * 4


def test_the_contract_by_monte_carlo(file: str) -> None:
    arguments = ["run", file, "--json", "--method", "sample", "--replicas", "2000", "--seed", "7"]
    one = rows(call(*arguments))
    assert one == rows(call(*arguments, "--workers", "3"))
    loss, member_loss = textbook()
    for row, exact, member in zip(one, loss, member_loss, strict=True):
        assert abs(row["loss"] - exact) < 4.5 * row["stderr"]
        assert abs(row["member_loss"] - member) < 4.5 * row["member_stderr"]
        assert row["bias"] is None  # strict JSON has no NaN


def test_the_contract_from_a_shell(file: str) -> None:
    command = [str(Path(sys.executable).with_name("nqm")), "run", file, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["rows"]) == 4


def test_help_and_import_stay_light() -> None:
    heavy = "{'torch', 'matplotlib', 'numba', 'pandas'} & set(sys.modules)"
    for body in ("import nqm", "from nqm.cli import main\nmain(['--help'], standalone_mode=False)"):
        program = f"import sys\n{body}\nsys.exit(str({heavy}) if {heavy} else 0)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", [None, "2"])
def test_a_command_has_one_blas_thread_unless_told(asked: str | None) -> None:
    program = """
import os
from nqm.cli import main
main(["list"], standalone_mode=False)
import scipy.linalg
from threadpoolctl import threadpool_info
blas = [one for one in threadpool_info() if one["internal_api"] == "openblas"]
print(os.environ["OPENBLAS_NUM_THREADS"], all(one["num_threads"] == 1 for one in blas))
"""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    if asked is not None:
        environment["OPENBLAS_NUM_THREADS"] = asked
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told, alone = done.stdout.splitlines()[-1].split()
    assert told == (asked or "1")
    assert asked or alone == "True"


# --- commands --------------------------------------------------------------------------------


def test_a_table_for_people_and_a_file(file: str, tmp_path: Path) -> None:
    shown = call("run", file, "--set", "record.at=[300]", "--quantiles", "0.05,0.95")
    assert shown.exit_code == 0
    assert "loss_q0.05" in shown.stdout.splitlines()[0]
    out = tmp_path / "t.parquet"
    written = call("run", file, "--out", str(out))
    assert written.exit_code == 0
    assert written.stdout == ""
    assert read_table(out)["loss"].tolist() == pytest.approx(textbook()[0], rel=1e-12)
    assert read_metadata(out)["config"]["phase"][0]["lr"] == 0.1


def test_run_never_overwrites_another_table(file: str, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    first = call("run", file, "--out", str(out), "--json")
    kept = out.read_bytes()
    assert call("run", file, "--out", str(out), "--json").stdout == first.stdout
    changed = call("run", file, "--out", str(out), "--set", "phase.0.lr=0.2")
    fails(changed, str(out), "was computed with", "use --out OTHER")
    out.write_bytes(kept[:-20])
    fails(call("run", file, "--out", str(out)), str(out), "not a complete table")
    assert out.read_bytes() == kept[:-20]


def test_diverged_is_a_status(file: str) -> None:
    table = rows(call("run", file, "--json", "--set", "phase.0.lr=1e200"))
    assert [row["status"] for row in table] == ["finished"] + ["diverged"] * 3
    assert table[-1]["loss"] is None


def test_sweep(grid: str, tmp_path: Path) -> None:
    serial, parallel = tmp_path / "a.csv", tmp_path / "b.csv"
    table = rows(call("sweep", grid, "--out", str(serial), "--json"))
    assert len(table) == 3 * 2 * 4
    assert [table[i]["members"] for i in (0, 4, 8)] == [1, 4, 1]
    assert call("sweep", grid, "--out", str(parallel), "--workers", "2").exit_code == 0
    assert serial.read_bytes() == parallel.read_bytes()
    fails(
        call("sweep", grid, "--out", str(serial), "--set", "seed=5"),
        "was computed with seed = its default, you ask for 5; move it away or use --out OTHER",
    )
    for command in ("run", "steady", "tune", "edge", "optimize", "bound", "critical-batch"):
        options = ["--target", "0.1"] if command == "critical-batch" else []
        fails(call(command, grid, *options), "nqm sweep and nqm soup read those")


def test_steady(file: str) -> None:
    (row,) = rows(call("steady", file, "--json"))
    rate, member_rate = 0.1, 0.05
    mean = sum(rate * h / (2 * h - rate * h**2) / 80 * h / 2 for h in (1.0, 0.5, 0.25))
    spread = sum(
        0.9 * member_rate * h / (2 * h - member_rate * h**2) / 8 * h / 2 for h in (1.0, 0.5, 0.25)
    )
    assert row["loss"] == pytest.approx(mean, rel=1e-12)
    assert row["member_loss"] == pytest.approx(mean + spread, rel=1e-12)
    fails(call("steady", file, "--set", "phase.1={algorithm='swa', lr=0.1, steps=100}"), "swa")


def test_steady_of_multiplicative_members_is_twofold(tmp_path: Path) -> None:
    # h = w* = 1, lr = 0.1, v = 0.02, K = 4: the quasi-steady closed form, and the balance point as
    # printed to three digits where the K-law was derived, E u^2 = 6.96e-4.
    file = tmp_path / "late.toml"
    file.write_text(
        "problem = {curvature = [1.0], noise_variance = [0.02], minimum = 1.0}\n"
        "phase = [{algorithm = 'late_phase_multiplicative', members = 4, gamma = 'mean', "
        "lr = 0.1, steps = 9}]\n"
    )
    quasi, long = rows(call("steady", str(file), "--json"))
    assert (quasi["kind"], long["kind"]) == ("first_order", "long_run")
    assert quasi["loss"] == pytest.approx(0.5 * 0.2 * 0.02 / 4 / (2 - 0.2), rel=1e-12)
    assert 2 * long["loss"] == pytest.approx(6.96e-4, abs=0.5e-6)


def test_a_closure_of_multiplicative_members(tmp_path: Path) -> None:
    file = tmp_path / "late.toml"
    file.write_text(
        "problem = {curvature = [1.0], noise_variance = [0.25], minimum = 1.0, "
        "initial_variance = 0.0}\n"
        "phase = [{algorithm = 'late_phase_multiplicative', members = 4, gamma = 'mean', "
        "lr = 0.2, steps = 500}]\nrecord = {at = ['end']}\n"
    )
    (closed,) = rows(call("run", str(file), "--method", "closure", "--json"))
    (drawn,) = rows(call("run", str(file), "--method", "sample", "--replicas", "4000", "--json"))
    (first,) = rows(call("run", str(file), "--json"))
    kinds = [row["kind"] for row in (closed, drawn, first)]
    assert kinds == ["closure", "sample", "first_order"]
    assert abs(closed["loss"] - drawn["loss"]) < 4 * drawn["stderr"] + 0.01 * drawn["loss"]
    assert abs(first["loss"] - drawn["loss"]) > 0.1 * drawn["loss"]
    assert [row["in_range"] for row in (closed, drawn, first)] == [True, True, False]
    command = ["run", str(file), "--method", "closure"]
    fails(call(*command, "--set", "record.quantiles=[0.5]"), "no distribution of the loss")
    fails(call(*command, "--set", "phase.0={algorithm='sgd', lr=0.1, steps=5}"), "method 'jump'")
    squares = "problem={curvature=[1.0], inputs='gaussian'}"
    fails(call(*command, "--set", squares), "does not know least squares")
    swept = tmp_path / "swept.csv"
    sweep = "sweep={'problem.noise_variance'=[1e-4, 0.25]}"
    call("sweep", str(file), "--set", sweep, "--out", str(swept))
    assert read_table(swept)["in_range"].tolist() == [True, False]


ONE = "phase=[{algorithm='sgd', lr=0.1, steps=50, batch_size=8}]"


def test_tune(file: str) -> None:
    arguments = ["tune", file, "--json", "--set", ONE, "--set", "record={}"]
    (best,) = rows(call(*arguments))

    def loss(lr: float, steps: int = 50) -> float:
        total = 0.0
        for h in (1.0, 0.5, 0.25):
            s = 1.0
            for _ in range(steps):
                s = (1 - lr * h) ** 2 * s + lr**2 * h / 8
            total += h * s / 2
        return total

    assert best["loss"] == pytest.approx(loss(best["lr"]), rel=1e-12)
    assert best["loss"] <= min(loss(lr) for lr in np.geomspace(1e-3, 1.9, 300)) * (1 + 1e-6)
    (fast,) = rows(call(*arguments, "--target", "0.05"))
    assert fast["status"] == "reached"
    assert loss(fast["lr"], fast["step"]) <= 0.05 < loss(fast["lr"], fast["step"] - 1)
    fewest = min(
        next((n for n in range(51) if loss(lr, n) <= 0.05), 99) for lr in np.geomspace(0.05, 1, 99)
    )
    assert fast["step"] <= fewest
    fails(call(*arguments, "--target", "1e-9"), "target 1e-09 is below")
    fails(call(*arguments, "--target", "0.05", "--momentum"), "--momentum")
    fails(call(*arguments, "--momentum"), "SGD has no momentum")
    fails(call(*arguments, "--phase", "3"), "phase must lie in 0..0")
    fails(call("tune", file, "--target", "0.05"), "one phase")


def test_tune_the_peak_of_a_schedule(file: str) -> None:
    few = "phase=[{algorithm='sgd', lr={schedule='linear', start=0.2, end=0.0, over=30}, steps=30, "
    few += "batch_size=8}]"
    arguments = ["tune", file, "--json", "--set", few, "--set", "record={}"]
    flat = "problem={curvature=[1.0, 0.05, 0.02], noise_variance=[0.01, 0.0005, 0.0002]}"
    (best,) = rows(call(*arguments, "--set", flat))

    def loss(peak: float) -> float:
        total = 0.0
        for h in (1.0, 0.05, 0.02):
            s = 1.0
            for t in range(30):
                lr = peak * (1 - t / 30)
                s = (1 - lr * h) ** 2 * s + lr**2 * 0.01 * h / 8
            total += h * s / 2
        return total

    assert best["loss"] == pytest.approx(loss(best["lr"]), rel=1e-9)
    assert best["loss"] <= min(loss(peak) for peak in np.geomspace(0.01, 15.0, 2000)) * (1 + 1e-6)
    assert best["lr"] > 2.0  # a few steps beyond the edge pay
    fails(call(*arguments, "--target", "0.05"), "a target needs a constant rate", "Linear")
    empty = few.replace("steps=30", "steps=0")
    fails(call(*arguments[:3], "--set", empty, "--set", "record={}"), "has no steps")


def test_tune_momentum(file: str) -> None:
    few = "phase=[{algorithm='heavy_ball', lr=0.1, steps=9, batch_size=8}]"
    arguments = ["tune", file, "--json", "--set", few, "--set", "record={}"]
    (plain,), (both,) = rows(call(*arguments)), rows(call(*arguments, "--momentum"))
    assert both["loss"] <= plain["loss"]
    assert 0 <= both["momentum"] < 1


def test_list_names_everything() -> None:
    from nqm.algorithms import ROSTER
    from nqm.runs.config import SPECTRA
    from nqm.schedule import SCHEDULES

    shown = call("list").stdout
    for name in (*ROSTER, *SCHEDULES, *SPECTRA, "member_loss"):
        assert f"  {name}" in shown
    assert "heavy_ball(momentum=0.9)" in shown


# --- mistakes --------------------------------------------------------------------------------

MISTAKES = {
    "problem.curvature=[1.0, -1.0, 1.0]": "problem.curvature must be >= 0; got -1",
    "problem.noise_variance=-1": "problem.noise_variance must be >= 0; got -1",
    "problem.noise_variance=[1.0, 2.0]": "2 entries but curvature has 3",
    "problem.curvature=[1.0, nan, 1.0]": "problem.curvature must be finite; got nan",
    "phase.0.lr=0": "phase.0.lr must lie in (0, inf)",
    "phase.1.members=0": "phase.1.members must be an integer >= 1; got 0",
    "phase.0.algorithm=sdg": "did you mean 'sgd'?",
    "phase.0.stepz=3": "phase.0.stepz is not a known key; did you mean 'steps'?",
    "phase.0.steps=2.5": "phase.0.steps must be a whole number; got 2.5",
    "phase.0.lr={schedule='cosne'}": "did you mean 'cosine'?",
    "record.at=[0, 999]": "record.at must lie in 0..300",
    "method=guess": "method 'guess' is unknown",
    "phase.1.algorithm=late_phase_multiplicative": "problem.minimum != 0",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(file: str, override: str) -> None:
    fails(call("run", file, "--json", "--set", override), MISTAKES[override])


def test_files_that_are_not_there_or_not_right(file: str, tmp_path: Path) -> None:
    fails(call("run", str(tmp_path / "none.toml")), "no such file")
    broken = tmp_path / "broken.toml"
    broken.write_text("[problem]\ncurvature = = 1\n")
    fails(call("run", str(broken)), "not valid TOML", "line 2")
    fails(call("run", file, "--out", str(tmp_path / "t.xls")), ".parquet or .csv")
    (tmp_path / "plain").write_text("")
    fails(call("run", file, "--out", str(tmp_path / "plain" / "t.csv")), "cannot write")
    fails(call("sweep", file, "--out", str(tmp_path / "t.csv")), "no [sweep] table")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(file: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    fails(call("run", file, "--out", str(closed / "t.csv")), "not writable")


def test_misuse_of_the_command_line(file: str) -> None:
    fails(call("runn", file), "No such command 'runn'")
    fails(call("run"), "Missing argument")
    fails(call("run", file, "--outt", "t.csv"), "No such option", "nqm run --help")
    fails(call("run", file, "--workers", "0"), "--workers")
    fails(call("run", file, "--quantiles", "2"), "record.quantiles must lie in [1e-12, 1]")


def test_interrupted(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nqm.runs.config.Run.table", interrupted)
    result = call("run", file)
    assert result.exit_code == 128 + signal.SIGINT
    assert result.stderr == "interrupted\n"


# --- plug-ins --------------------------------------------------------------------------------


def test_a_broken_plug_in_does_not_break_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "nqm.nowhere:command", "nqm.commands")
    works = EntryPoint("works", "nqm.cli:list_", "nqm.commands")
    monkeypatch.setattr(cli, "_plugins", lambda: {"broken": broken, "works": works})
    shown = call("--help")
    assert shown.exit_code == 0
    assert "(unavailable: ModuleNotFoundError" in shown.stdout
    assert "algorithm:" in call("works").stdout
    fails(call("broken", "--any"), "nqm broken is unavailable", "nqm.nowhere")


def test_json_is_what_the_table_holds(file: str, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    table = rows(call("run", file, "--json", "--out", str(out)))
    pd.testing.assert_frame_equal(pd.DataFrame(table), read_table(out), check_exact=True)


# --- what nobody thought of ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError("8 TiB"), RecursionError("deep"), OverflowError("x")]
)
def test_what_is_too_much_is_one_line(
    file: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> None:
        raise error

    monkeypatch.setattr("nqm.runs.config.Run.table", raises)
    fails(call("run", file), "more than the machine can do", str(error), "NQM_TRACEBACK=1")
    monkeypatch.setenv("NQM_TRACEBACK", "1")
    assert call("run", file).exception is error


def test_a_message_steers_no_terminal_and_has_an_end(file: str) -> None:
    fails(call("run", file, "--set", "phase.0.algorithm=\x1b[31m\x07"), r"\x1b[31m\x07")
    long = call("run", file, "--set", "phase.0." + "x" * 9000 + "=1")
    fails(long, "is not a known key", " ... ")
    assert len(long.stderr) < 2100


@pytest.mark.parametrize("text", ["0.5]\nfrob=[1", "", "0.5,", "a", "[0.5]"])
def test_quantiles_are_numbers_between_commas(file: str, text: str) -> None:
    fails(call("run", file, "--quantiles", text), "--quantiles must be numbers between commas")


def test_outputs_that_are_none(file: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name, words in (
        (str(tmp_path / "folder.csv"), "is a folder"),
        (str(tmp_path / "pipe.csv"), "is a pipe or a device"),
        ("/", ".parquet or .csv"),
        (str(tmp_path / ("a" * 300 + ".csv")), "cannot write"),
    ):
        fails(call("run", file, "--out", name), words)
    new = tmp_path / "new" / "folder" / "t.csv"
    assert call("run", file, "--out", str(new)).exit_code == 0
    assert [path.name for path in new.parent.iterdir()] == ["t.csv"]


def test_a_second_run_of_one_table_is_refused(file: str, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    with locked(out):
        fails(call("run", file, "--out", str(out)), "is being written by process", str(os.getpid()))
    assert not out.exists()


# --- how it is called ----------------------------------------------------------------------------


def every_command(group: click.Group = cli.main, path: tuple[str, ...] = ()) -> list[Any]:
    """Words and object of all commands."""
    found: list[Any] = []
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if isinstance(command, click.Group):
                found += every_command(command, (*path, name))
            else:
                found.append(((*path, name), command))
    return found


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "nqm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("python -m nqm, version ")


@pytest.mark.parametrize("root", ["/", "//", "/usr/.."])
def test_no_results_go_to_the_root_of_the_file_system(root: str) -> None:
    pytest.importorskip("torch")
    seen = 0
    for words, command in every_command():
        for option in command.params:
            kind = option.type
            if option.name != "out" or not isinstance(kind, click.Path) or kind.file_okay:
                continue
            if not isinstance(option, click.Option):
                continue  # what `nqm neural watch OUT` reads
            seen += 1
            with pytest.raises(click.BadParameter, match="root of the file system"):
                kind.convert(root, option, None)
            assert str(kind.convert("out", option, None)) == "out", words
    assert seen > 8


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["swee"], {"sweep"}),
        (["neural", "wat"], {"watch"}),
        (["run", "--meth"], {"--method"}),
    ],
)
def test_a_shell_completes_commands_and_options(typed: list[str], offered: set[str]) -> None:
    *before, last = typed
    complete = ShellComplete(cli.main, {}, "nqm", "_NQM_COMPLETE")
    assert {item.value for item in complete.get_completions(before, last)} == offered
