"""The embedded digits are read once: a tenth of a second each time, for hundreds of tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _digits_are_read_once() -> Iterator[None]:
    """Every caller has a copy of its own."""
    import sklearn.datasets

    read = sklearn.datasets.load_digits()

    def load_digits() -> Any:
        return copy.deepcopy(read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", load_digits)
        yield
