"""Results of long measurements on disk, found by what they were measured on and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from neural.curvature.examples import content
from neural.curvature.risk import EmpiricalRisk
from nqm import __version__
from nqm.errors import NQMError
from nqm.files import check_regular
from nqm.keys import differing
from nqm.keys import key as content_key
from nqm.table import replacing


def fingerprint(risk: EmpiricalRisk) -> str:
    """Hash of a loss: weights, data, loss function, number of examples, kind of curvature.

    Parameters
    ----------
    risk : EmpiricalRisk

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    state = risk.model.state_dict()
    held = [risk.weights, *(state[name] for name in sorted(state))]
    for one in [*held, *content(risk.batches)]:
        if torch.is_tensor(one):
            digest.update(one.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(one).encode())
    said = (sorted(risk.shapes.items()), risk.weight_decay, risk.example_loss)
    digest.update(repr((said[0], said[1], getattr(said[2], "__qualname__", ""))).encode())
    digest.update(repr((risk.curvature, risk.examples)).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """Results of stages in a folder, each written whole or not at all.

    A result is found by the stage's name, the named values it was computed with, those of the
    cache, and the version of this package. A file's entries ``_key`` and ``_seconds`` hold all of
    them, and how long it took.

    Attributes
    ----------
    folder : Path or None
        None keeps nothing.
    values : dict
        Named values that every stage has in common, e.g. the content of the loss.
    log : dict of (str, str) to float
        Seconds that every result took when it was computed, by its stage and its key; results
        that were read from a file included.
    """

    folder: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    log: dict[tuple[str, str], float] = field(default_factory=dict)

    def of(self, risk: EmpiricalRisk, **values: Any) -> Cache:
        """The same cache for measurements of one loss.

        Parameters
        ----------
        risk : EmpiricalRisk
        **values
            Further values that all stages depend on, such as a seed.

        Returns
        -------
        Cache
            With the same folder and log.
        """
        if self.folder is None:
            return self
        return replace(self, values={"content": fingerprint(risk)} | values)

    def __call__(
        self, stage: str, compute: Callable[[], dict[str, Any]], **values: Any
    ) -> dict[str, Any]:
        """Arrays of a stage, from its file, or computed and written there.

        Parameters
        ----------
        stage : str
            Name of the stage, the first part of the file's name.
        compute : callable
            Returns arrays by name.
        **values
            All that the result depends on beside the values of the cache: numbers, words, or
            dataclasses of them.

        Returns
        -------
        dict of str to ndarray

        Raises
        ------
        NQMError
            If the file is damaged.
        TypeError
            If a value is none that a key can state.
        """
        stated = _plain({"stage": stage, "version": __version__} | self.values | values)
        text, key = json.dumps(stated, sort_keys=True), content_key(stated)[:16]
        path = None if self.folder is None else self.folder / f"{stage}-{key}.npz"
        if path is not None and path.exists():
            known = _read(path)
            known.pop("_key")
            self.log[stage, key] = float(known.pop("_seconds"))
            return known
        start = perf_counter()
        found = compute()
        seconds = perf_counter() - start
        self.log[stage, key] = self.log.get((stage, key), 0.0) + seconds
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                np.savez(stream, _key=np.array(text), _seconds=np.array(seconds), **found)
        return found


def _read(path: Path) -> dict[str, Any]:
    """All entries of a result's file; NQMError if it cannot be read."""
    check_regular(path)
    try:
        with np.load(path) as content:
            known = dict(content)
        if {"_key", "_seconds"} <= set(known):
            return known
        problem = "it has no _key and _seconds"
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        problem = str(error)
    raise NQMError(f"{path} is damaged ({problem}); remove it, and run again")


def _plain(value: Any) -> Any:
    """A value as a key states it.

    Of a dataclass it is the name of its class, and what differs from the defaults; a value of None
    is left out. So a setting that is added later changes no key.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | differing(value, _plain)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} cannot stand in a key")
