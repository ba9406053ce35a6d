"""What cannot be trained is refused in one line, before a weight has moved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neural import LatePhase, recompute_statistics
from neural.late_phase.members import Batch
from nqm import NQMError

loss = nn.functional.cross_entropy


def minibatch(rows: int) -> Batch:
    torch.manual_seed(rows)
    return torch.randn(rows, 4, 6), torch.randint(3, (rows,))


def net() -> nn.Module:
    """BatchNorm behind a layer that leaves a single value per row and channel."""
    return nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "how",
    [
        lambda late, own, base: late.step([minibatch(8), minibatch(1)], loss, base, own),
        lambda late, own, base: late.step(
            [minibatch(8), minibatch(1)], loss, base, own, fused=True
        ),
        lambda late, own, base: late.step(
            [minibatch(3), minibatch(3)], loss, base, own, micro_batches=2
        ),
        lambda late, own, base: late(minibatch(1)[0], member=0),
        lambda late, own, base: recompute_statistics(late.averaged(), [minibatch(1)]),
    ],
    ids=["step", "fused", "micro_batches", "forward", "recompute_statistics"],
)
@pytest.mark.filterwarnings("ignore:fused")
def test_one_value_per_channel_is_refused(how: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    late = LatePhase(model, 2, "head")
    own = late.optimizer_like(base)
    before = copy.deepcopy(list(late.parameters()))
    with pytest.raises(NQMError, match=r"one value per channel.*drop_last"):
        how(late, own, base)
    for now, then in zip(late.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_another_value_error_of_a_model_is_its_own() -> None:
    class Fussy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise ValueError("Expected something else")

    late = LatePhase(nn.Sequential(nn.Linear(4, 4), Fussy(4, 3)), 2, "head")
    with pytest.raises(ValueError, match="something else"):
        late(torch.randn(2, 4), member=0)
