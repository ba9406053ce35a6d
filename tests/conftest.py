"""Problems shared by the tests, and the settings of the property tests."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from nqm import Problem
from nqm.runs.executors import share_machine

# A second BLAS thread is a hundred times slower on a busy machine; processes that tests start
# read the variable.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
share_machine()

if find_spec("torch"):
    import torch

    from neural.training._malloc import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
else:  # without PyTorch the theory is tested alone
    needs = re.compile(r"^(import|from) (torch|neural)\b", re.MULTILINE)
    here = Path(__file__).parent
    found = [*here.rglob("test_*.py"), *here.glob("*/**/conftest.py")]
    needy = [path for path in found if needs.search(path.read_text())]
    tests = (path.parent if path.name == "conftest.py" else path for path in needy)
    collect_ignore = [str(path.relative_to(here)) for path in tests]

# Reproducible, and free of timing: the first example of a test may compile a kernel.
settings.register_profile("nqm", deadline=None, derandomize=True, max_examples=30, database=None)
#: Other examples in every run; a failure prints how to have it again.
settings.register_profile("random", settings.get_profile("nqm"), derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "nqm"))


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """With more than one thread every later test is many times slower on a busy machine.

    Numba's own threads, which no kernel here uses, give torch as many once they are started.
    """
    yield
    if (torch := sys.modules.get("torch")) and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
        pytest.fail("this test left torch with more than one thread")


@pytest.fixture
def problem() -> Problem:
    """Three directions that differ in everything."""
    return Problem(
        curvature=[1.0, 0.3, 0.02],
        noise_variance=[0.5, 2.0, 0.1],
        initial_mean=[1.0, -2.0, 0.5],
        initial_variance=[0.3, 0.7, 1.5],
    )
