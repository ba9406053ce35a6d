"""The generalised Gauss-Newton matrix, against Jacobians and the closed form of the softmax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from neural.bridge.config import Training
from neural.bridge.measure_smoothing import measure_descent, measure_smoothing
from neural.curvature import ggn
from neural.curvature.cache import Cache, fingerprint
from neural.curvature.local_quadratic import measure_local
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import leading_pairs
from neural.late_phase.reparametrize import add_rank1
from neural.models import build
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, tanh_risk
from tests.tolerances import IDENTITY, agree

DECAY = 0.01


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = build("mlp", classes=3, channels=1, size=2, hidden=[4], activation="tanh")
    return model, torch.randn(14, 1, 2, 2), torch.randint(3, (14,))


def batchnorm() -> tuple[nn.Module, Tensor, Tensor]:
    model = build("digits_cnn", classes=3, channels=1, width=2)
    for _ in range(3):  # statistics of its own
        model(2.0 + torch.randn(20, 1, 8, 8))
    return model, torch.randn(14, 1, 8, 8), torch.randint(3, (14,))


def text() -> tuple[nn.Module, Tensor, Tensor]:
    model = build("transformer_lm", classes=5, context=6, width=4, heads=1, layers=1)
    return model, torch.randint(5, (14, 6)), torch.randint(5, (14, 6))


def recurrent() -> tuple[nn.Module, Tensor, Tensor]:
    model = build("lstm_lm", classes=5, embedding=3, hidden=2)
    add_rank1(model, "lstm.*")
    return model, torch.randint(5, (14, 6)), torch.randint(5, (14, 6))


KINDS = {
    "mlp": (mlp, "all"),
    "convolutions and BatchNorm": (batchnorm, "all"),
    "late-phase coordinates": (batchnorm, "batchnorm+head"),
    "text, fewer weights than entries of an output": (text, "head"),
    "text, more weights": (text, "layernorm+head"),
    "text, rank-1 factors of an LSTM": (recurrent, "rank1"),
}


def landscape_of_kind(kind: str) -> EmpiricalRisk:
    torch.manual_seed(0)
    make, select = KINDS[kind]
    model, x, y = make()
    x = x.double() if x.is_floating_point() else x
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    return EmpiricalRisk(model.double(), batches, select, weight_decay=DECAY, curvature="ggn")


@pytest.fixture(params=KINDS)
def risk(request: pytest.FixtureRequest) -> EmpiricalRisk:
    return landscape_of_kind(request.param)


def written_out(risk: EmpiricalRisk) -> Tensor:
    """J' H J of all outputs at once, H = diag(q) - q q' of every softmax q, and the decay."""
    x = torch.cat([x for x, _ in risk.batches])
    names, shapes = zip(*risk.shapes.items(), strict=True)

    def outputs(w: Tensor) -> Tensor:
        parts = torch.split(w, [shape.numel() for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        found: Tensor = functional_call(risk.model.eval(), named, (x,))
        return found.flatten(0, -2)

    q = outputs(risk.weights).softmax(-1).detach()
    h = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    j = jacrev(outputs)(risk.weights).detach()
    return (
        torch.einsum("ncp,ncd,ndq->pq", j, h, j) / len(q) + DECAY * torch.eye(j.shape[2]).double()
    )


def test_it_is_the_product_of_jacobians(risk: EmpiricalRisk) -> None:
    expected = written_out(risk)
    found = risk.ggn()
    assert found.dtype == torch.float64
    agree(found, expected, 1e-11)
    v = torch.randn_like(risk.weights)
    agree(risk.ggn_product(v), expected @ v, 1e-11)
    agree(risk.curvature_matrix(), expected, 1e-11)
    agree(risk.curvature_product(v), expected @ v, 1e-11)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_any_number_of_rows_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    risk = landscape_of_kind("late-phase coordinates")
    monkeypatch.setattr(ggn, "JACOBIAN_ROWS", rows)
    agree(risk.ggn(), written_out(risk), 1e-11)


def test_of_a_linear_model_it_is_the_hessian() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(20, 4, dtype=torch.double), torch.randint(3, (20,))
    model = nn.Sequential(nn.Linear(4, 3)).double()
    risk = EmpiricalRisk(model, [(x, y)], curvature="ggn")
    agree(risk.ggn(), risk.hessian(), IDENTITY)
    q = model(x).softmax(1).detach()
    h = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    closed = torch.einsum("ncd,ni,nj->cidj", h, x, x).reshape(12, 12) / 20
    agree(risk.ggn()[:12, :12], closed, IDENTITY)


def test_of_another_loss() -> None:
    """Outputs that are linear in the weights, a quadratic loss: Jacobians and H are constants."""
    bowl = Bowl((3.0, 1.0, -0.4), away=0.7)
    agree(bowl.risk.ggn(), bowl.hessian, IDENTITY)


def test_away_from_a_linear_model_it_is_not_the_hessian() -> None:
    risk = landscape_of_kind("mlp")
    away = (risk.ggn() - risk.hessian()).norm()
    assert away > 0.1 * risk.hessian().norm()


@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 30.0))
def test_it_has_no_negative_eigenvalue(seed: int, size: float) -> None:
    risk = landscape_of_kind("mlp")
    generator = torch.Generator().manual_seed(seed)
    w = size * torch.randn(risk.size, generator=generator, dtype=torch.double)
    values = torch.linalg.eigvalsh(risk.at(w).ggn())
    assert values[0] > DECAY - 1e-12 * values[-1]


def test_the_model_is_left_as_it_is() -> None:
    risk = landscape_of_kind("late-phase coordinates")
    risk.model.train()
    before = {name: value.clone() for name, value in risk.model.state_dict().items()}
    found = [risk.ggn(), risk.ggn_product(torch.ones_like(risk.weights))]
    assert not any(one.requires_grad for one in found)
    assert risk.model.training
    for name, value in risk.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in risk.model.parameters())


# --- everything that asks for curvature ----------------------------------------------------------


def test_eigenpairs_are_its_own() -> None:
    risk = landscape_of_kind("mlp")
    values = torch.linalg.eigvalsh(written_out(risk)).flip(0).numpy()
    agree(leading_pairs(risk, 3).values, values[:3], 1e-7)
    risk.curvature = "hessian"
    assert abs(leading_pairs(risk, 1).values[0] - values[0]) > 0.01 * values[0]


@pytest.mark.parametrize("eigenpairs", [None, 4])
def test_a_local_model_of_it(eigenpairs: int | None, tmp_path: Path) -> None:
    risk = landscape_of_kind("mlp")
    dense, slope = written_out(risk).numpy(), risk.gradient().numpy()
    values = np.linalg.eigvalsh(dense)[::-1]
    settings = {"noise_samples": 1, "lanczos_steps": 3}
    cache = Cache(tmp_path)
    local = measure_local(risk, eigenpairs, cache=cache, **settings)
    agree(local.pairs.values, values[:eigenpairs], 1e-9)
    h, _, g = local.points()
    assert g @ h == pytest.approx(slope @ dense @ slope, rel=1e-9)
    assert local.negative_share() == (0.0, 0.0)
    risk.curvature = "hessian"
    other = measure_local(risk, eigenpairs, cache=cache, **settings)
    assert other.pairs.values[0] != pytest.approx(values[0], rel=0.01)  # kept apart
    # Averages over a scatter of size 0 are those of the checkpoint, for either kind.
    for kind, found in (("ggn", local), ("hessian", other)):
        risk.curvature = kind
        still = measure_smoothing(
            risk, measure_descent(risk, found, Training(1e-9, 1, 1)), displacements=1
        )
        assert np.abs(still.width.curvature).max() < 1e-6 * values[0]


def test_the_key_tells_the_kinds_apart() -> None:
    risk = tanh_risk(quick=False)
    key = fingerprint(risk)
    risk.curvature = "ggn"
    assert fingerprint(risk) != key


def test_an_unknown_kind_is_refused() -> None:
    risk = tanh_risk(quick=False)
    with pytest.raises(NQMError, match="curvature 'ggm' is unknown; did you mean 'ggn'"):
        EmpiricalRisk(risk.model, risk.batches, curvature="ggm")
