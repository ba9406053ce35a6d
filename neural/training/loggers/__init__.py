"""Loggers of training runs: those named here, and those of installed packages.

A package adds one by an entry point of the group ``neural.loggers``, which names a class that is
made from a `LoggedRun` and has the methods of `Logger`::

    [project.entry-points."neural.loggers"]
    mine = "my_package:MyLogger"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from neural.training.loggers.base import LoggedRun, Logger
from nqm.errors import NQMError, shown, suggest

GROUP = "neural.loggers"
#: Name -> module and class, and the package that it needs.
LOGGERS = {
    "csv": ("neural.training.loggers.csv", "CsvLogger", ""),
    "tensorboard": ("neural.training.loggers.tensorboard", "TensorBoardLogger", "tensorboard"),
    "wandb": ("neural.training.loggers.wandb", "WandbLogger", "wandb"),
}

Factory = Callable[[LoggedRun], Logger]


def load_logger(name: str) -> Factory:
    """Load the class of a logger.

    Parameters
    ----------
    name : str
        A key of `LOGGERS`, or the name of an entry point of the group ``neural.loggers``.

    Returns
    -------
    callable
        Makes the logger of one run.

    Raises
    ------
    NQMError
        If there is no such logger, or it cannot be loaded.
    """
    if name in LOGGERS:
        module, kind, package = LOGGERS[name]
        try:
            return cast(Factory, getattr(import_module(module), kind))
        except ImportError as error:
            raise NQMError(
                f"--log {name} needs a package ({error!s:.100}): pip install {package}"
            ) from None
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name not in points:
        raise NQMError(f"--log {shown(name)} is no logger{suggest(name, {*LOGGERS, *points})}")
    try:
        return cast(Factory, points[name].load())
    except Exception as error:  # of somebody else's package
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise NQMError(f"--log {name} cannot be loaded: {reason:.200}") from None


def make_loggers(names: Sequence[str], run: LoggedRun) -> list[Logger]:
    """Make the loggers of one run.

    Parameters
    ----------
    names : sequence of str
        See `load_logger`.
    run : LoggedRun
        The run.

    Returns
    -------
    list of Logger

    Raises
    ------
    NQMError
        If one cannot be loaded or made.
    """
    made = []
    for name in names:
        factory = load_logger(name)
        try:
            made.append(factory(run))
        except Exception as error:  # a service that refuses, a full disk
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise NQMError(f"--log {name} cannot start: {reason:.200}") from None
    return made


__all__ = ["GROUP", "LOGGERS", "LoggedRun", "Logger", "load_logger", "make_loggers"]
