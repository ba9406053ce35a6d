"""How far long work is: one type of function that is told."""

from __future__ import annotations

from collections.abc import Callable

#: Told the name of a stage and the share of it that is done, from 0 to 1.
Progress = Callable[[str, float], None]

#: An estimate of the work may be too low: a stage is done only when the next one begins.
ALMOST = 0.99


def counted(
    progress: Progress | None, stage: str, expected: float, *, exact: bool = False
) -> Callable[[int], None]:
    """A function that is told how much more of a stage is done, and tells the share.

    Parameters
    ----------
    progress : callable or None
        Nothing is told if None.
    stage : str
        Name of the stage.
    expected : float
        All there is to do, in the units of what is told; an estimate.
    exact : bool
        True if `expected` is no estimate: the share then reaches 1.

    Returns
    -------
    callable
        Takes the number of units done since it was called last.
    """
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(stage, min(done / expected, 1.0 if exact else ALMOST))

    return more


def within(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Progress of one of several equal parts, told as progress of the whole.

    Parameters
    ----------
    progress : callable or None
        Told of the whole.
    index, count : int
        Which part, from 0, and how many there are.

    Returns
    -------
    callable or None
        To be told of the part; None if `progress` is None.
    """
    if progress is None:
        return None
    return lambda stage, share: progress(stage, (index + share) / count)
