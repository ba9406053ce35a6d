"""What the stages of a bridge cost, in epochs of the training of the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from neural.curvature import Landscape
from nqm.table import replacing

if TYPE_CHECKING:
    import pandas as pd


class Cost:
    """Wall time of stages over that of one gradient of all training examples.

    Parameters
    ----------
    landscape : Landscape
        Its gradient is timed: the quickest of three.
    share : float
        Of the training set's examples, that are in the landscape.
    kept : Path
        Where stages leave what they found. One that leaves nothing new had been done before.
    key : str
        Of the configuration. What it has spent is written into `kept`, so that a process that
        goes on after another counts both; what a stage had spent when it was killed is lost.
    """

    def __init__(self, landscape: Landscape, share: float, kept: Path, key: str):
        self.landscape, self.share, self.kept = landscape, share, kept
        self.path = kept / f"cost-{key[:16]}.json"
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            self.seconds = json.loads(self.path.read_text())

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a stage, or a part of one; parts add up."""
        before, start = self._count(), perf_counter()
        yield
        spent = perf_counter() - start if self._count() > before else 0.0
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        if spent:
            with replacing(self.path) as stream:
                stream.write(json.dumps(self.seconds).encode())

    def _count(self) -> int:
        return sum(1 for _ in self.kept.rglob("*.npz"))

    def table(self) -> pd.DataFrame:
        """Columns stage, seconds, epochs; 0 of a stage that another configuration has done."""
        import pandas as pd

        epoch = min(_seconds(self.landscape) for _ in range(3)) / self.share
        rows = [(stage, spent, spent / epoch) for stage, spent in self.seconds.items()]
        return pd.DataFrame(rows, columns=["stage", "seconds", "epochs"])


def _seconds(landscape: Landscape) -> float:
    start = perf_counter()
    landscape.gradient()
    return perf_counter() - start
