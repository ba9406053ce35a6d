"""Locks on outputs, and files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nqm import files
from nqm.errors import NQMError
from nqm.files import is_locked, locked, replacing

HOLDER = """
import sys
from nqm.files import locked
with locked(sys.argv[1], folder=sys.argv[2] == "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(output: Path, kind: str) -> subprocess.Popen[str]:
    """Another process that holds the lock until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(output), kind]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refuses(output: Path, words: str, *, folder: bool = False) -> None:
    with pytest.raises(NQMError, match=words), locked(output, folder=folder):
        pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "new" / "out.csv"
    with holder(output, kind) as process:
        for _ in range(2):
            words = f"{output} is being written by process {process.pid} on {socket.gethostname()};"
            refuses(output, re.escape(words), folder=kind == "folder")
        process.send_signal(signal.SIGKILL)
    files.tidy_lock(output, folder=kind == "folder")  # freed by the crash
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_can_look_whether_there_is_a_writer(tmp_path: Path, kind: str) -> None:
    output, folder = tmp_path / "out", kind == "folder"
    assert not is_locked(output, folder=folder)
    with holder(output, kind) as process:
        assert is_locked(output, folder=folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not is_locked(output, folder=folder)  # its file is still there
    with locked(output, folder=folder):
        assert is_locked(output, folder=folder)
    before = sorted(tmp_path.rglob("*"))
    assert not is_locked(output, folder=folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_who_looks_hinders_no_writer(tmp_path: Path) -> None:
    """A lock file that a killed process left, which another process looks at just now."""
    import fcntl
    import threading

    (tmp_path / ".out.lock").touch()
    with open(tmp_path / ".out.lock", "rb") as stream:
        fcntl.flock(stream.fileno(), fcntl.LOCK_SH)  # as `is_locked` does for a moment
        threading.Timer(0.005, fcntl.flock, (stream.fileno(), fcntl.LOCK_UN)).start()
        with locked(tmp_path / "out"):
            pass


def test_one_process_is_refused_as_well(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        refuses(tmp_path / "a", f"process {os.getpid()} ")
    with locked(tmp_path / "a"):
        pass


def test_where_the_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_flock", lambda stream, shared=False: None)
    assert not is_locked(tmp_path / "a")
    with locked(tmp_path / "a"):
        assert is_locked(tmp_path / "a")
        refuses(tmp_path / "a", r"no such process, delete .*held")
        with replacing(tmp_path / "a") as stream:
            stream.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    refuses(tmp_path / "plain" / "t", r"cannot write .*plain")
    os.mkfifo(tmp_path / ".a.lock")  # to open it would wait for a reader
    assert not is_locked(tmp_path / "a")
    refuses(tmp_path / "a", r"\.a\.lock is a pipe or a device")


def test_left_overs_are_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    target, other = tmp_path / "t.csv", tmp_path / ".u.csv.01234567.tmp"
    (tmp_path / ".t.csv.01234567.tmp").write_text("half")
    other.write_text("half")
    with replacing(target) as first:
        first.write(b"1")
        with replacing(target) as second:
            second.write(b"2")
        assert target.read_bytes() == b"2"
    assert target.read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "t.csv"]


def test_nothing_is_replaced_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "t.csv"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as stream:
        stream.write(b"%d" % (1 // 0))
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    assert target.read_text() == "old"
    with pytest.raises(NQMError, match="cannot write"), replacing(tmp_path / "no" / "t.csv"):
        pass
