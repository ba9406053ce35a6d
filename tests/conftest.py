"""Problems shared by the tests, and the settings of the property tests."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from hypothesis import settings

from nqm import Problem

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)
else:
    collect_ignore_glob = [
        "test_neural_*.py", "test_averaging.py", "test_fused.py", "test_late_phase.py",
        "test_bridge_law.py", "test_select.py", "test_recipe*.py", "test_session.py",
        "test_train.py", "test_experiment.py", "test_distributed.py", "test_summary.py",
        "test_curvature.py", "test_local_model.py", "test_drift.py", "test_chains.py",
        "test_bridge*.py", "test_landscapes.py", "test_krylov.py", "test_torch_sample.py",
        "test_smoothing.py", "test_ggn.py", "test_batch_landscape.py",
    ]  # fmt: skip

# Reproducible, and free of timing: the first example of a test may compile a kernel.
settings.register_profile("nqm", deadline=None, derandomize=True, max_examples=30, database=None)
settings.load_profile("nqm")


@pytest.fixture
def problem() -> Problem:
    """Three directions that differ in everything."""
    return Problem(
        curvature=[1.0, 0.3, 0.02],
        noise_variance=[0.5, 2.0, 0.1],
        initial_mean=[1.0, -2.0, 0.5],
        initial_variance=[0.3, 0.7, 1.5],
    )
