"""Low-precision draws: their distribution in closed form, and the second-order law."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from neural.combine.cells import Cells
from neural.combine.config import load_section
from neural.combine.data import Parts
from neural.combine.low_precision import (
    LOW_PRECISION,
    ROUNDINGS,
    LowPrecisionConfig,
    SeededRounding,
    low_precision,
    rounded_axes,
)
from neural.combine.members import Members
from neural.curvature.risk import EmpiricalRisk
from nqm import NQMError
from nqm.cli import main
from nqm.table import read_table
from tests.tolerances import SIGMAS

BITS = 4
LEVELS = 7


def layer(rows: int = 3, columns: int = 50) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(columns, rows)
    with torch.no_grad():
        model.weight[1] = 0.0
    return model


def base(model: nn.Module | None = None) -> Members:
    model = layer() if model is None else model
    return Members.of_states(model, {"one": model.state_dict()})


def drawn(rounding: str, draws: int, seed: int = 0, name: str = "weight") -> Tensor:
    """Weights of all draws, shape (draws, rows, columns)."""
    held = SeededRounding(BITS, rounding=rounding, draws=draws, seed=seed).members(base())
    return torch.stack([state[name].double() for state in held.states()])


def pitch_and_fraction(tensor: bool = False) -> tuple[Tensor, Tensor]:
    w = layer().weight.detach().double()
    pitch = (w.abs().max() if tensor else w.abs().amax(1, keepdim=True)) / LEVELS
    return pitch, torch.where(pitch > 0, (w / pitch) % 1.0, 0.0)


@pytest.mark.parametrize("rounding", ["stochastic", "antithetic", "gaussian"])
def test_draws_are_unbiased_and_of_the_stated_variance(rounding: str) -> None:
    """The variance is D^2 f (1 - f); standard errors from the fourth moments."""
    draws = 1600
    made = drawn(rounding, draws)
    pitch, f = pitch_and_fraction()
    w = layer().weight.detach().double()
    variance = pitch**2 * f * (1 - f)
    error = made - w
    # Pairs are negatively correlated, which makes the error of the mean smaller only.
    assert bool((error.mean(0).abs() <= SIGMAS * (variance / draws).sqrt() + 1e-7).all())
    fourth = 3 * variance**2
    if rounding != "gaussian":
        fourth = pitch**4 * f * (1 - f) * ((1 - f) ** 3 + f**3)
    # Both of a pair may have the same square.
    spread = (2 * (fourth - variance**2).clamp(min=0) / draws).sqrt()
    room = SIGMAS * spread + 1e-6 * pitch**2
    assert bool(((error.square().mean(0) - variance).abs() <= room).all())


def test_antithetic_pairs_have_their_closed_form() -> None:
    """Variance of a pair's mean: D^2 [f (1 - f) - min(f, 1 - f)^2] / 2, half of two draws'."""
    draws = 1600
    pairs = drawn("antithetic", draws).view(draws // 2, 2, 3, 50).mean(1)
    pitch, f = pitch_and_fraction()
    least = torch.minimum(f, 1 - f)
    expected = pitch**2 * (f * (1 - f) - least**2) / 2
    measured = (pairs - layer().weight.detach().double()).square().mean(0)
    # Of all weights together; a pair's mean is off by 0 or half a pitch, at most.
    error = (measured - expected).sum() / expected.sum()
    top = 0.25 * float(pitch.max()) ** 2
    assert abs(float(error)) < SIGMAS * math.sqrt(
        top * float(expected.sum()) / (draws // 2)
    ) / float(expected.sum())
    assert float(expected.sum()) == pytest.approx(
        float((pitch**2).sum() * 50) / 24, rel=0.2
    )  # mean of f (1 - f) is 1/6, of min^2 1/12


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("rounding", ["stochastic", "antithetic", "nearest"])
def test_members_lie_on_the_grid_beside_the_weight(rounding: str, granularity: str) -> None:
    rule = SeededRounding(BITS, granularity, rounding, draws=2)
    w = layer().weight.detach().double()
    pitch, _ = pitch_and_fraction(granularity == "tensor")
    room = 0.5 if rounding == "nearest" else 1.0
    for state in rule.members(base()).states():
        steps = torch.where(pitch > 0, state["weight"].double() / pitch, 0.0)
        torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-5)
        assert float(steps.abs().max()) <= LEVELS + 1e-5
        assert bool(((state["weight"].double() - w).abs() <= room * pitch + 1e-7).all())
        assert torch.equal(state["weight"][1], torch.zeros(50))  # a channel of zeros
        assert torch.equal(state["bias"], layer().bias)


def test_the_largest_weight_of_a_channel_stays() -> None:
    w = layer().weight.detach()
    for state in SeededRounding(2, draws=2).members(base()).states():
        largest = w.abs().argmax(1)
        for row in (0, 2):
            assert state["weight"][row, largest[row]] == w[row, largest[row]]


def test_nearest_is_one_draw_and_has_no_chance() -> None:
    made = [SeededRounding(BITS, rounding="nearest", seed=s).members(base()) for s in (0, 1)]
    assert [len(one) for one in made] == [1, 1]
    assert made[0].key(0) == made[1].key(0)


def test_a_draw_is_its_seed_and_number() -> None:
    few, many = drawn("stochastic", 2), drawn("stochastic", 5)
    assert torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(few, drawn("stochastic", 2, seed=1))
    held = SeededRounding(BITS, draws=2).members(base())
    assert held.key(1) == SeededRounding(BITS, draws=2).members(base()).key(1)


def test_biases_norms_and_tied_weights() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm([3, 3]),
            "conv": nn.Conv2d(2, 3, 3),
            "turned": nn.ConvTranspose2d(2, 3, 3),
            "batch": nn.BatchNorm2d(3),
            "table": nn.Embedding(5, 4),
            "head": nn.Linear(4, 5, bias=False),
        }
    )
    model["head"].weight = model["table"].weight
    assert rounded_axes(model) == {"conv.weight": 0, "turned.weight": 1, "table.weight": 0}
    (state,) = SeededRounding(3, draws=1).members(base(model)).states()
    assert torch.equal(state["head.weight"], state["table.weight"])
    top = model["turned"].weight.abs().amax((0, 2, 3)) / 3
    steps = state["turned.weight"] / top[None, :, None, None]
    torch.testing.assert_close(steps, steps.round(), rtol=0.0, atol=1e-5)


def test_bits_that_are_held() -> None:
    """3 x 50 weights on a grid with 3 pitches, and 3 biases."""
    model = layer()
    assert SeededRounding(4).held_bits(model, 8) == pytest.approx(
        (8 * 4 * 150 + 32 * (3 + 3)) / 153
    )
    tensor = SeededRounding(4, granularity="tensor").held_bits(model, 8)
    assert tensor == pytest.approx((8 * 4 * 150 + 32 * (1 + 3)) / 153)
    noise = SeededRounding(4, rounding="gaussian").held_bits(model, 8)
    assert noise == pytest.approx(32 * (8 * 150 + 3) / 153)


# --- the law -------------------------------------------------------------------------------------


def problem() -> tuple[nn.Linear, list[tuple[Tensor, Tensor]]]:
    """A softmax regression, of which all derivatives are known."""
    torch.manual_seed(1)
    model = nn.Linear(6, 3).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    y = (model(x) + torch.randn(200, 3)).argmax(1)
    return model, [(x[:120], y[:120]), (x[120:], y[120:])]


def study(draws: int = 32, bits: int = 5, **more: object) -> object:
    model, batches = problem()
    config = LowPrecisionConfig(bits=(bits,), draws=draws, **more)  # type: ignore[arg-type]
    return low_precision(base(model), Parts(test=lambda: batches), config)


def test_the_law_of_members_and_ensembles() -> None:
    """Member: L + tr(H S) / 2; ambiguity: (1 - 1/K) tr(F S) / 2, derivatives written out."""
    model, batches = problem()
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    p = model(x).detach().softmax(1)
    w = model.weight.detach()
    pitch = w.abs().amax(1, keepdim=True) / 15
    f = (w / pitch) % 1.0
    s = pitch**2 * f * (1 - f)
    h = torch.einsum("nc,nj->cj", p * (1 - p), x**2) / len(x)
    g = (p - nn.functional.one_hot(y, 3)) ** 2
    second = torch.einsum("nc,nj->cj", g, x**2) / len(x)
    rise, gain = float((h * s).sum()) / 2, float((second * s).sum()) / 2
    table = study(rounding=("stochastic", "gaussian")).set_index(["rule", "rounding", "members"])  # type: ignore[attr-defined]
    loss = table.loc[("float", "", 1), "nll"]
    for rounding in ("stochastic", "gaussian"):
        mean = table.loc[("mean_member", rounding, 32)]
        pooled = table.loc[("ensemble", rounding, 32)]
        soup = table.loc[("weight_mean", rounding, 32)]
        # 32 draws of 18 weights: sums of 18 squares scatter by sqrt(2 / 18 / 32) = 6 %; slopes of
        # the loss, which vanish in the mean only, and higher orders add to it.
        assert pooled["ambiguity"] == pytest.approx((1 - 1 / 32) * gain, rel=0.25)
        # These very draws are predicted better than their distribution is.
        assert mean["predicted"] - loss == pytest.approx(mean["nll"] - loss, abs=0.02 * gain)
        assert pooled["predicted_ambiguity"] == pytest.approx(pooled["ambiguity"], rel=0.03)
        assert soup["predicted"] == pytest.approx(soup["nll"], abs=0.02 * gain)
        assert mean["predicted_from"] == "surrogate"
    slope = np.abs(float(((p - nn.functional.one_hot(y, 3)).T @ x / len(x)).abs().max()))
    mean = table.loc[("mean_member", "stochastic", 32), "nll"]
    scatter = slope * math.sqrt(float(s.sum()) / 32)
    assert mean - loss == pytest.approx(rise, abs=SIGMAS * scatter + 0.25 * rise)


def test_the_rows_of_a_study() -> None:
    table = study(draws=8, rounding=ROUNDINGS)  # type: ignore[attr-defined]
    assert tuple(table.columns) == LOW_PRECISION  # type: ignore[attr-defined]
    pooled = table[table["rule"] == "ensemble"]  # type: ignore[index]
    sizes = {name: list(rows["members"]) for name, rows in pooled.groupby("rounding")}
    assert sizes == {
        "stochastic": [1, 2, 4, 8], "gaussian": [1, 2, 4, 8], "antithetic": [2, 4, 8]
    }  # fmt: skip
    assert (pooled["ambiguity"] >= -1e-12).all()
    assert (pooled["passes"] == pooled["members"]).all()
    model, _ = problem()
    rtn = table[table["rule"] == "rtn"].iloc[0]  # type: ignore[index]
    assert rtn["bits"] == pytest.approx((5 * 18 + 32 * (3 + 3)) / 21)
    single = pooled[(pooled["rounding"] == "stochastic") & (pooled["members"] == 1)].iloc[0]
    assert single["ambiguity"] == pytest.approx(0.0, abs=1e-12)
    state = SeededRounding(5, draws=8).members(base(model)).state(0)
    model.load_state_dict(state)
    _, batches = problem()
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    loss = float(nn.functional.cross_entropy(model(x), y).detach())
    assert single["nll"] == pytest.approx(loss, rel=1e-6)  # log-probabilities are in float32


def test_more_draws_use_those_that_are_there(tmp_path: Path) -> None:
    model, batches = problem()
    cells = Cells(tmp_path)

    def run(draws: int) -> int:
        config = LowPrecisionConfig(bits=(5,), draws=draws, rounding=("stochastic",), predict=False)
        low_precision(base(model), Parts(test=lambda: batches), config, cells=cells)
        return len(list(tmp_path.iterdir()))

    assert run(2) == 4  # the model, two draws, their mean
    assert run(2) == 4
    assert run(4) == 7


# --- mistakes, and the command -------------------------------------------------------------------


def test_a_killed_study_keeps_the_derivatives_of_each_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = problem()
    config = LowPrecisionConfig(bits=(5,), draws=4, rounding=("stochastic",))
    product, calls, stop = EmpiricalRisk.hessian_product, [0], [4]

    def counted(risk: EmpiricalRisk, *given: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == stop[0]:
            raise KeyboardInterrupt
        return product(risk, *given)

    def made() -> Any:
        cells = Cells(tmp_path)
        return low_precision(base(model), Parts(test=lambda: batches), config, cells=cells)

    monkeypatch.setattr(EmpiricalRisk, "hessian_product", counted)
    with pytest.raises(KeyboardInterrupt):
        made()
    calls[0], stop[0] = 0, 0
    continued = made()
    # The check of the model takes one; the first two draws of four were kept.
    assert calls[0] == 1 + 2
    plain = low_precision(base(model), Parts(test=lambda: batches), config)
    pd.testing.assert_frame_equal(continued, plain, check_exact=True)


def test_mistakes() -> None:
    two = Members.of_states(layer(), [layer().state_dict()] * 2)
    with pytest.raises(NQMError, match="about one model; got 2"):
        SeededRounding().members(two)
    with pytest.raises(NQMError, match="no weight with two axes"):
        SeededRounding().members(base(nn.BatchNorm1d(3)))
    with pytest.raises(NQMError, match="convert the model to float32"):
        SeededRounding().members(base(nn.Linear(2, 2).bfloat16()))
    with pytest.raises(NQMError, match="draws must be even"):
        SeededRounding(rounding="antithetic", draws=3)
    with pytest.raises(NQMError, match="bits must be an integer >= 2; got 1"):
        SeededRounding(1)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("bits=[8,8]", r"low_precision.bits names one twice"),
        ("bits=[17]", r"low_precision.bits must be at most 16; got 17"),
        ("bits=[]", r"low_precision.bits must name one at least"),
        ("rounding=['up']", r"low_precision.rounding 'up' is unknown"),
        ("draws=3", r"low_precision.draws must be even"),
        ("held_out=1.0", r"low_precision.held_out must lie in"),
        ("K=3", r"low_precision.K is not a known key"),
    ],
)
def test_settings_are_refused_by_their_key(setting: str, words: str) -> None:
    with pytest.raises(NQMError, match=words):
        load_section(LowPrecisionConfig, "low_precision", None, [f"low_precision.{setting}"])


def test_the_command(tmp_path: Path) -> None:
    from neural.training.train import train
    from tests.tiny_runs import tiny

    train(tiny(), tmp_path / "run")
    out = tmp_path / "out"
    args = ["neural", "low-precision", str(tmp_path / "run"), "--bits", "5", "--draws", "2",
            "--rounding", "nearest,stochastic", "--device", "cpu", "--out", str(out)]  # fmt: skip
    first = CliRunner().invoke(main, args)
    assert first.exit_code == 0, first.output
    assert "5 bits, stochastic, 2 draws: nll lower by" in first.output
    table = read_table(out / "low_precision.parquet")
    assert set(table["rule"]) == {"float", "rtn", "mean_member", "ensemble", "weight_mean"}
    assert (out / "low_precision.png").exists()
    held = (out / "low_precision.parquet").read_bytes()
    (out / "low_precision.parquet").unlink()  # as if it had been killed before the end
    again = CliRunner().invoke(main, args)
    assert again.stdout == first.stdout
    assert (out / "low_precision.parquet").read_bytes() == held
    other = CliRunner().invoke(main, [*args, "--set", "low_precision.seed=1"])
    assert "was computed with low_precision.seed = 0, you ask for 1" in other.output
    two = ["neural", "low-precision", *[str(tmp_path / "run")] * 2, "--out", str(tmp_path / "two")]
    assert "is given twice" in CliRunner().invoke(main, two).output
    wrong = CliRunner().invoke(main, [*args, "--bits", "a"])
    assert "--bits must be whole numbers between commas" in wrong.output
