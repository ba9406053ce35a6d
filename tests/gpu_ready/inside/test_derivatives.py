"""Second derivatives of every family of models on a GPU, as the bridge measures them.

CuDNN's recurrent layers and fused attention have no second derivatives: a kernel of theirs that is
left in the pass raises an error here.
"""

from __future__ import annotations

import pytest
import torch
from full_size import state
from meter import gpu

from neural.curvature import risk as risks
from neural.curvature.risk import EmpiricalRisk

WIDE = 'model.name="wrn-10-1"'
FAMILIES = {
    "enwik8_lstm_rank1": ("data.length=5",),
    "transformer_python_docs": (),
    "cifar10_bn": (WIDE,),
    "cifar100_rank1": (WIDE,),
    "cifar10_hypernet": ('model.name="hyper_wrn-10-1"',),
    "cifar10_q75_fast": (),
}
QUICK = "enwik8_lstm_rank1"


@pytest.mark.parametrize(
    "recipe",
    [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != QUICK)],
)
def test_products_stay_on_the_gpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Labels and losses are numbers, which are unknown here.
    monkeypatch.setattr(risks, "check_batches", lambda *_: None)
    monkeypatch.setattr(EmpiricalRisk, "check", lambda _: None)
    with gpu() as meter:
        train_state = state(recipe, *FAMILIES[recipe])
        inputs, targets = next(train_state.task.stream.epoch(0))
        risk = EmpiricalRisk(train_state.model, [(inputs[:4], targets[:4])], "all")
        vector = torch.ones_like(risk.weights)
        for product in (risk.hessian_product, risk.ggn_product, risk.output_slopes):
            meter.clear()
            product(vector)
            assert meter.launched > 0
            # Torch's forward derivatives ask the meta device, which holds no numbers, for shapes.
            assert not [name for name in meter.waits if "-> meta" not in name]
