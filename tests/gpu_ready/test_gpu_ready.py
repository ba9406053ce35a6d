"""Every line that would break, stall or lie on a GPU is found without one.

The checks are in `inside`. They run in a process of their own, in which a stand-in for CUDA (see
`stand_in.cpp`) is loaded before torch::

    python -m pytest --confcutdir tests/gpu_ready/inside tests/gpu_ready/inside
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

INSIDE = Path(__file__).parent / "inside"
ROOT = INSIDE.parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the stand-in for CUDA")
@pytest.mark.skipif(find_spec("torch") is None, reason="it is for torch")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_ready_for_a_gpu(which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-m", which, "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, "--confcutdir", str(INSIDE), str(INSIDE)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
