"""Reports of the progress of long work: the type of a callback, and helpers."""

from __future__ import annotations

from collections.abc import Callable

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
