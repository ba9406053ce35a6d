"""Ctrl-C and SIGTERM: one line, the exit code of the signal, and no process left running.

Files on disk are complete at any time, so a process may end at any time.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds after a signal in which the process must end.
GRACE = 5.0
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


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
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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
    finally:
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
    raise Interrupted(number)


def _watch(ours: socket.socket) -> None:
    """End the process if the main thread does not: it may be inside compiled code."""
    asked: signal.Signals | None = None
    try:
        while data := ours.recv(1):
            if data[0] not in _WORDS:
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
