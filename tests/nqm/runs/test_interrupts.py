"""Signals to real commands: one line, the signal's exit code, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nqm.runs.interrupts import Interrupted, interruptible

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

#: A sweep of some dozen seconds, of small cells.
GRID = """
method = "sample"
replicas = 3_000
problem = {curvature = [1.0], noise_variance = [1.0]}
record = {at = [500]}
phase = [{algorithm = "sgd", lr = 0.1, steps = 500}]
[sweep]
seed = {range = [1, 400, 1]}
"""
RUN = "from nqm.cli import main; main()"


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Ctrl-C reaches the processes started here, even if a shell keeps it from its own jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def alive(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgid = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgid) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def seconds(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def until(condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    """Whether the condition came true; slow machines take their time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def start(code: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=-1, text=True, start_new_session=True)


def lines(folder: Path) -> int:
    """Lines of the journal."""
    path = folder / "t.csv.journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ended(process: subprocess.Popen[str], ready: Callable[[], bool], name: str) -> str:
    """Signal a process that is ready; its messages once it and its children are gone."""
    try:
        assert until(ready)
        assert len(alive(process.pid)) >= 3  # the process, and two workers
        os.kill(process.pid, getattr(signal, name))
        assert until(lambda: not alive(process.pid))
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[1]


@pytest.mark.slow
def test_a_sweep_with_workers_is_terminated(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    process = start(RUN, tmp_path, "sweep", "grid.toml", "--out", "t.csv", "--workers", "2")
    stderr = ended(process, lambda: lines(tmp_path) > 2, "SIGTERM")
    assert (process.returncode, stderr) == (143, "terminated\n")
    # The journal holds the header and whole cells; the last line may be torn.
    content = (tmp_path / "t.csv.journal.jsonl").read_bytes()
    assert content.rpartition(b"\n")[0].count(b'"case"') == lines(tmp_path) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.toml", "t.csv.journal.jsonl"]


#: Two workers that work for ever, as any command has them; each makes a folder when it has started.
WORKING = """
import tempfile, time
from nqm.cli import main
from nqm.runs.executors import processes
@main.command()
def work():
    with processes(2, tempfile.mkdtemp, (None, None, ".")) as pool:
        pool.submit(time.sleep, 1e6)
        pool.submit(time.sleep, 1e6).result()
main(["work"])
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_workers_end_with_their_parent(tmp_path: Path, name: str) -> None:
    process = start(WORKING, tmp_path)
    stderr = ended(process, lambda: len(list(tmp_path.iterdir())) == 2, name)
    assert process.returncode == {"SIGKILL": -9, "SIGINT": 130}[name]
    assert "Traceback" not in stderr
    assert name == "SIGKILL" or stderr == "interrupted\n"


#: Many minutes in C without a look at signals: no handler of Python's can run there.
DEAF = """
import hashlib
from nqm.runs.interrupts import interruptible
with interruptible():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_compiled_code_is_ended_by_the_second_signal() -> None:
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=-1, stderr=-1, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = seconds(process.pid)
        assert until(lambda: seconds(process.pid) > before + 0.2)  # so it is in there
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # two of one kind that are pending at once are one
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert (str(caught.value), caught.value.code) == ("terminated", 143)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
