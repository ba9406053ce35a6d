"""Averages over time, one in each file, and their names in recipes.

To add one, write a subclass of `Average` in a file here and name it in `AVERAGES`.
"""

from __future__ import annotations

from typing import Any

from neural.training.averages.base import Average, single_models
from neural.training.averages.ema import EMA
from neural.training.averages.swa import SWA

#: ``method`` in a recipe's ``[average]`` -> class.
AVERAGES: dict[str, type[Average[Any]]] = {
    "swa": SWA,
    "ema": EMA,
}

__all__ = ["AVERAGES", "EMA", "SWA", "Average", "single_models"]
