"""A network of the user's own, by the name of its class: ``package.module:Class``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nqm.errors import NQMError, suggest


def build_own(module: str, name: str, *, classes: int, channels: int, **options: Any) -> nn.Module:
    """Make a network of a class that is found by its name.

    The module is imported, from the current folder too, which runs its code: open runs of such
    networks only where the module is one's own.

    Parameters
    ----------
    module, name : str
        Module, and class in it: a subclass of `torch.nn.Module`.
    classes, channels : int
        Passed on as ``classes`` and ``channels`` if the class has arguments of these names.
    **options
        Other arguments of the class.

    Returns
    -------
    Module

    Raises
    ------
    NQMError
        If the module or class is not found, or does not take the arguments.
    """
    where = f"{module}:{name}"
    if not all(part.isidentifier() for part in module.split(".")):
        raise NQMError(
            f"model {where!r} must be package.module:Class, timm:NAME or torchvision:NAME"
        )
    try:
        with _from_here():
            loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise NQMError(f"model {where}: {module} needs {error.name}, not installed") from error
        if "." not in module:
            raise NQMError(
                f"unknown library {module!r} of models, and no such module is installed or in the "
                f"current folder{suggest(module, ('torchvision', 'timm'))}"
            ) from error
        raise NQMError(
            f"model {where}: there is no module {module}, neither installed nor in the current "
            "folder"
        ) from error
    except Exception as error:  # of the module's own code
        reason = " ".join(str(error).split())
        raise NQMError(
            f"model {where}: {module} cannot be imported: {type(error).__name__}: {reason:.150}"
        ) from error
    kind = getattr(loaded, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        known = [n for n, v in vars(loaded).items()
                 if isinstance(v, type) and issubclass(v, nn.Module)]  # fmt: skip
        raise NQMError(f"model {where}: {module} has no network {name!r}{suggest(name, known)}")
    parameters = inspect.signature(kind).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options if not takes_all else ():
        if option not in parameters:
            raise NQMError(f"{where} has no option {option!r}{suggest(option, list(parameters))}")
    given = {"classes": classes, "channels": channels}
    given = {n: v for n, v in given.items() if n in parameters or takes_all}
    try:
        made: nn.Module = kind(**given, **options)
    except Exception as error:  # of the class's own code
        reason = " ".join(str(error).split())
        raise NQMError(f"{where} cannot be built: {type(error).__name__}: {reason:.200}") from error
    return made


@contextmanager
def _from_here() -> Iterator[None]:
    """Search modules in the current folder too, after all other places."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.reverse()
            sys.path.remove(here)
            sys.path.reverse()
