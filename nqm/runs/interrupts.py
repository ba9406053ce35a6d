"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and no process left running.

Files on disk are complete at any time, so a process may end at any time. Work that takes days stops
at its next checkpoint instead (`stops_later`): a batch system sends SIGTERM or SIGUSR1 before it
takes the machine away, and runs the command again if the exit code says so.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds after a signal in which the process must end.
GRACE = 5.0
#: Exit code of work that has written a checkpoint and asks to be run again: EX_TEMPFAIL of
#: sysexits.h.
AGAIN = 75
_LATER = (signal.SIGTERM, signal.SIGUSR1)
#: The first signal since `stops_later` began, if any, and whether one is running.
_asked: signal.Signals | None = None
_waits = False
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
#: How compiled code states an interrupt that ended Python code which it had called.
_WRAPPED = re.compile(r"^RuntimeError: KeyboardInterrupt\b", re.MULTILINE)
#: What the running `interruptible` block has raised, if anything.
_raised: Interrupted | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    Attributes
    ----------
    code : int
        Exit code: 128 plus the number of the signal, as in shells.
    """

    def __init__(self, number: int):
        super().__init__(_WORDS[signal.Signals(number)])
        self.code = 128 + number


class Stopped(Interrupted):
    """Work ended at a checkpoint because a signal asked for it; it can be continued."""

    def __init__(self, number: int):
        super().__init__(signal.SIGTERM)
        name = signal.Signals(number).name
        self.args = (f"stopped by {name}; the same command continues from its checkpoint",)
        self.code = AGAIN


@contextmanager
def stops_later() -> Iterator[None]:
    """Note SIGTERM and SIGUSR1 inside the block, which asks `stop_asked` when it can stop.

    Further ones are ignored: batch systems repeat them. In a thread this does nothing.

    Yields
    ------
    None
    """
    global _waits
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _LATER}
    note_signals()
    try:
        yield
    finally:
        _waits = False
        for number, handler in before.items():
            signal.signal(number, handler)


def note_signals() -> None:
    """As `stops_later`, to the end of the process, e.g. of a worker."""
    global _asked, _waits
    _asked, _waits = None, True
    for number in _LATER:
        signal.signal(number, _note)


def stop_asked() -> bool:
    """Tell whether a signal has asked the work inside `stops_later` to stop.

    Returns
    -------
    bool
    """
    return _asked is not None


def stop() -> None:
    """End the work.

    Raises
    ------
    Stopped
        Always; the command then exits with `AGAIN`.
    """
    raise Stopped(_asked or signal.SIGTERM)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = _asked or signal.Signals(number)


def let_through(error: Exception) -> None:
    """Raise an interrupt again that compiled code has turned into an error of its own.

    TorchScript, in which some of torch's derivatives are written, turns every exception of the
    Python code that it calls into a RuntimeError, which may or may not state it.

    Parameters
    ----------
    error : Exception
        What the compiled code raised.

    Raises
    ------
    KeyboardInterrupt
        If the cause was an interrupt; `Interrupted` if it was raised inside `interruptible`.
    """
    if _raised is not None:
        raise _raised from None
    if _WRAPPED.search(str(error)):  # of Python's own handler
        raise KeyboardInterrupt from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` at the first signal; end the process at the second, or after `GRACE`.

    Only the main thread receives signals; in another thread this does nothing.

    Yields
    ------
    None

    Raises
    ------
    Interrupted
        On Ctrl-C or SIGTERM.
    """
    global _raised
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _raised = None
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watch = threading.Thread(target=_watch, args=(ours,), daemon=True)
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in _WORDS}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watch.start()
    try:
        for number in before:
            signal.signal(number, _raise)
        yield
    except Exception as error:
        let_through(error)
        raise
    finally:
        _raised = None
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        theirs.close()  # which ends the thread
        watch.join()
        ours.close()


def end_at_once() -> None:
    """Let the next signal end the process without a message, because it is ending already."""
    for number in _WORDS:
        signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    global _raised
    _raised = Interrupted(number)
    raise _raised


def _watch(ours: socket.socket) -> None:
    """End the process if the main thread does not: it may be inside compiled code."""
    asked: signal.Signals | None = None
    try:
        while data := ours.recv(1):
            if data[0] not in _WORDS or (_waits and data[0] in _LATER):
                continue
            if asked is not None:
                break
            asked = signal.Signals(data[0])
            ours.settimeout(GRACE)
        else:
            return
    except TimeoutError:
        pass
    assert asked is not None
    os.write(2, f"{_WORDS[asked]}\n".encode())
    os._exit(128 + asked)
