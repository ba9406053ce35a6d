"""Loads the stand-in for CUDA before anything loads torch."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import meter  # noqa: E402, F401
import torch  # noqa: E402

torch.set_num_threads(1)
