"""Derivatives within a stated budget of memory, counted by the tensors that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neural.bridge import from_run
from neural.bridge.config import Training
from neural.bridge.sgd_chains import train_runs
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError
from nqm.limits import check_size, memory_budget, memory_limit
from tests.tolerances import agree

MIB = 2**20
BUDGET = 4 * MIB


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.known:
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def risk(curvature: str) -> EmpiricalRisk:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    x, y = torch.randn(160, 1, 14, 14).double(), torch.randint(3, (160,))
    return EmpiricalRisk(
        model, from_run.fitting(model, [(x, y)], torch.device("cpu")), curvature=curvature
    )


WORK: dict[str, Callable[[EmpiricalRisk], Tensor]] = {
    "gradients": lambda risk: sum(
        (g.square().sum(0) for g in risk.example_gradients()), torch.zeros(risk.size)
    ),
    "matrix": lambda risk: risk.curvature_matrix(),
    "product": lambda risk: risk.curvature_product(torch.ones_like(risk.weights)),
    "runs": lambda risk: next(iter(train_runs(risk, Training(0.1, 16, 1), 16, (1,))))[1],
}


@pytest.mark.filterwarnings("ignore:derivatives of the loss")
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("work", list(WORK))
def test_a_budget_bounds_the_peak_and_changes_rounding_only(work: str, curvature: str) -> None:
    peaks, results = [], []
    for gib in (None, BUDGET / 2**30):
        with memory_budget(gib):
            own = risk(curvature)
            own.check()
            own.example_bytes()
            with Alive() as alive:
                results.append(WORK[work](own))
        peaks.append(alive.peak)
    agree(results[1], results[0], 1e-9)
    assert peaks[1] <= BUDGET < peaks[0]


def test_a_budget_only_lowers_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NQM_MEMORY", "2")
    with memory_budget(0.5):
        assert memory_limit() == 2**29
        with memory_budget(None):
            assert memory_limit() == 2**29
    with memory_budget(3.0):
        assert memory_limit() == 2**31
        with pytest.raises(NQMError, match=r"set NQM_MEMORY \(GiB\) for more"):
            check_size("much", 2**40)
    with memory_budget(1.0), pytest.raises(NQMError, match=r"fewer, or raise --memory \(GiB\)"):
        check_size("much", 2**40, fix="fewer")
    assert memory_limit() == 2**31
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(NQMError, match="memory must"), memory_budget(bad):
            pass
