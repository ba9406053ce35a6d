"""Cache on disk for the results of long measurements, keyed by the loss and the settings."""

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
        The loss.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    state = risk.model.state_dict()
    weights = [risk.weights, *(state[name] for name in sorted(state))]
    for value in [*weights, *content(risk.batches)]:
        if torch.is_tensor(value):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    function = risk.example_loss
    loss = repr(function) if is_dataclass(function) else getattr(function, "__qualname__", "")
    digest.update(repr((sorted(risk.shapes.items()), risk.weight_decay, loss)).encode())
    digest.update(repr((risk.curvature, risk.examples)).encode())
    if risk.curvature_batches is not None:
        digest.update(repr(len(risk.curvature_batches)).encode())
    if risk.undecayed:
        digest.update(repr(sorted(risk.undecayed)).encode())
    ratios = () if risk.decay_ratios is None else (risk.decay_ratios,)
    for part in (*ratios, *(risk.frame or ())):
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """Results of stages as files in a folder; a file is written completely or not at all.

    The key of a result consists of the stage's name, the named values of the call, those of the
    cache, and the version of this package. The entry ``_key`` of a file holds the key, ``_seconds``
    the computing time.

    Attributes
    ----------
    folder : Path or None
        Folder of the files; with None nothing is stored.
    values : dict
        Named values that the keys of all stages contain, e.g. a hash of the loss.
    log : dict of (str, str) to float
        Computing time in seconds of every result so far, by stage and key; for a result that was
        read from a file, the time of its computation.
    """

    folder: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    log: dict[tuple[str, str], float] = field(default_factory=dict)

    def of(self, risk: EmpiricalRisk, **values: Any) -> Cache:
        """The same cache with the loss in its keys.

        Parameters
        ----------
        risk : EmpiricalRisk
            The loss that is measured.
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
        """Read the arrays of a stage from its file, or compute and write them.

        Parameters
        ----------
        stage : str
            Name of the stage; the file's name begins with it.
        compute : callable
            Takes no argument and returns arrays by name.
        **values
            Everything that the result depends on, beside the values of the cache: numbers, strings,
            or dataclasses of them.

        Returns
        -------
        dict of str to ndarray
            Arrays by name.

        Raises
        ------
        NQMError
            If the file is damaged.
        TypeError
            If a value is of another kind.
        """
        full_key = _plain({"stage": stage, "version": __version__} | self.values | values)
        text, key = json.dumps(full_key, sort_keys=True), content_key(full_key)[:16]
        path = None if self.folder is None else self.folder / f"{stage}-{key}.npz"
        if path is not None and path.exists():
            known = _read(path)
            known.pop("_key")
            self.log[stage, key] = float(known.pop("_seconds"))
            return known
        start = perf_counter()
        arrays = {name: _as_read(values) for name, values in compute().items()}
        seconds = perf_counter() - start
        self.log[stage, key] = self.log.get((stage, key), 0.0) + seconds
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                np.savez(stream, _key=np.array(text), _seconds=np.array(seconds), **arrays)
        return arrays


def _as_read(values: Any) -> Any:
    """An array with its entries in the order in memory that it has when it is read from a file.

    By another order sums are rounded in another way, and work that was stopped and goes on would
    give other numbers than work that was not.
    """
    values = np.asanyarray(values)
    return values if values.flags.forc else np.ascontiguousarray(values)


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
    """Convert a value to the plain values that a key is made of.

    A dataclass becomes the name of its class and the fields that differ from their defaults; values
    of None are left out. Thus a setting that is added later changes no key.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {"class": type(value).__name__} | differing(value, _plain)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} cannot stand in a key")
