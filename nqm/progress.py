"""Reports of the progress of long work: the type of a callback, and helpers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import datetime

#: Called with the name of a stage and the share of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]

#: Largest share that is reported inside a stage, because the estimate of its work may be too low.
ALMOST = 0.99


def counted(
    progress: Progress | None, stage: str, expected: float, *, exact: bool = False
) -> Callable[[int], None]:
    """Turn counts of units of work into reports of the share of a stage that is done.

    Parameters
    ----------
    progress : callable or None
        Called with the stage and the share; nothing is reported if None.
    stage : str
        Name of the stage.
    expected : float
        Units of the whole stage; an estimate unless `exact`.
    exact : bool
        True if `expected` is no estimate: the share then reaches 1.

    Returns
    -------
    callable
        Takes the number of units done since its last call.
    """
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(stage, min(done / expected, 1.0 if exact else ALMOST))

    return more


def limited(progress: Callable[[int], None], most: int) -> Callable[[int], None]:
    """Count a part of the work of `counted` up to what is expected of this part, and no further.

    Parameters
    ----------
    progress : callable
        Takes numbers of units.
    most : int
        Units that are expected of the part.

    Returns
    -------
    callable
        Takes the number of units done since its last call; called with `most`, it ends the part.
    """
    done = 0

    def more(count: int) -> None:
        nonlocal done
        before, done = done, min(done + count, most)
        progress(done - before)

    return more


def times(progress: Callable[[int], None] | None, units: int) -> Callable[[int], None] | None:
    """Count each piece of work as several units of `counted`, where pieces of another kind are one.

    Parameters
    ----------
    progress : callable or None
        Takes numbers of units.
    units : int
        Units of one piece.

    Returns
    -------
    callable or None
        Takes numbers of pieces; None if `progress` is None.
    """
    return None if progress is None else lambda count: progress(units * count)


def within(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Report the progress of one of several equal parts as progress of the whole.

    Parameters
    ----------
    progress : callable or None
        Called with the stage and the share of the whole.
    index, count : int
        Number of the part, from 0, and number of parts.

    Returns
    -------
    callable or None
        Takes the stage and the share of the part; None if `progress` is None.
    """
    if progress is None:
        return None
    return lambda stage, share: progress(stage, (index + share) / count)


def duration(seconds: float) -> str:
    """Write a length of time.

    Parameters
    ----------
    seconds : float
        The time; NaN if not known.

    Returns
    -------
    str
        As ``0:42``, ``3:07:10`` or ``2 d 03:10``; empty if not known.
    """
    if not math.isfinite(seconds):
        return ""
    hours, minutes = divmod(round(seconds) // 60, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{round(seconds) % 60:02d}"
    return f"{minutes}:{round(seconds) % 60:02d}"


class Lines:
    """Tell the progress of long work in lines, where there is no terminal for a bar.

    There is no line in the first two seconds; then one at the beginning of each stage, and within
    a stage one in ten seconds at most, with its share. When a twentieth of the stage has been
    seen, the time that is left is told too, about, by the pace so far.

    Parameters
    ----------
    write : callable
        Takes one line.
    clock : callable
        Returns the time in seconds.
    """

    FIRST, EVERY, KNOWN = 2.0, 10.0, 0.05

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._write, self._clock = write, clock
        self._begun = clock()
        self._stage: str | None = None
        self._told = -math.inf
        self._origin = (self._begun, 0.0)

    def __call__(self, stage: str, share: float) -> None:
        """Report a stage and the share of it that is done, from 0 to 1.

        Parameters
        ----------
        stage, share
            See `Progress`.
        """
        now = self._clock()
        new = stage != self._stage
        if new:
            self._stage, self._origin, self._told = stage, (now, share), -math.inf
        if now - self._begun < self.FIRST or now - self._told < self.EVERY:
            return
        self._told = now
        begun, at = self._origin
        seen = share - at
        left = (now - begun) / seen * (1.0 - share) if seen >= self.KNOWN else math.nan
        said = f", about {text} left" if (text := duration(left)) else ""
        self._write(f"{datetime.now():%H:%M:%S} {stage}: {100 * share:.0f} %{said}")
