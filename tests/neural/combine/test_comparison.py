"""The one table: its numbers by hand, its predictions, and its cells."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from neural.combine import Members, compare, ensemble, merge
from neural.combine.cells import Cells
from neural.combine.comparison import OUTSIDE, SURROGATE, TABLE
from neural.combine.config import CombineConfig, load_config
from neural.combine.data import Parts
from neural.combine.gate import fit_gate
from neural.combine.information import BATCH, first_examples, spread_examples
from neural.combine.surrogate import make_surrogate
from neural.evaluate import brier, ece, nll, predict
from neural.evaluate.temperature import fit_temperature, tuned_nll
from nqm import NQMError
from tests.tolerances import agree

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(seed: int, count: int = 60) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g, dtype=torch.float64)
    return [(x, (x[:, :3] + 0.7 * torch.randn(count, 3, generator=g)).argmax(1))]


PARTS = Parts(test=lambda: batch(1), train=lambda: batch(2), held_out=lambda: batch(3),
              shifts={"noisy": lambda: batch(4)})  # fmt: skip


def start() -> nn.Sequential:
    torch.manual_seed(0)
    return net()


def scattered(scale: float, count: int = 4) -> Members:
    """Members at given random directions from one net, `scale` far."""
    base = start()
    states = {}
    for k in range(count):
        g = torch.Generator().manual_seed(10 + k)
        one = copy.deepcopy(base)
        with torch.no_grad():
            for p in one.parameters():
                p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
        states[f"m{k}"] = one.state_dict()
    return Members.of_states(net(), states, ancestor=base.state_dict())


CONFIG = CombineConfig(
    rules=("uniform", "greedy", "stock", "fisher"), pools=("probabilities", "logits")
)


def test_every_number_by_hand() -> None:
    held = scattered(0.3)
    table = compare(held, PARTS, CONFIG)
    assert list(table.columns) == list(TABLE)
    each = [predict(held.with_state(state), batch(1)) for state in held.states()]
    labels = each[0][1]
    losses = [nll(rows, labels) for rows, _ in each]
    test = table[table["data"] == "test"]
    agree(test.loc[test["rule"] == "member", "nll"], losses, 1e-6)
    mean = sum(losses) / 4
    assert float(test.loc[test["rule"] == "mean_member", "nll"].iloc[0]) == pytest.approx(mean)
    soup = {
        name: torch.stack([state[name] for state in held.states()]).mean(0)
        for name in dict(net().named_parameters())
    }
    rows, _ = predict(held.with_state(soup), batch(1))
    row = test[test["rule"] == "uniform"].iloc[0]
    expected = {"nll": nll(rows, labels), "brier": brier(rows, labels), "ece": ece(rows, labels)}
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6)
    assert row["ambiguity"] == pytest.approx(mean - expected["nll"], rel=1e-5)
    mixture = torch.stack([r.double().softmax(1) for r, _ in each]).mean(0)
    row = test[(test["rule"] == "ensemble") & (test["space"] == "probabilities")].iloc[0]
    assert row["nll"] == pytest.approx(nll(mixture.log(), labels), rel=1e-6)
    assert row["ambiguity"] > 0  # the concavity of the logarithm
    assert row["passes"] == 4
    assert row["bits"] == 4 * 64
    assert set(table["selected_on"]) == {"none", "held_out"}
    assert set(table["data"]) == {"test", "noisy"}
    assert table.loc[table["data"] == "noisy", "predicted"].isna().all()
    agree(ensemble(held, batch(1)).exp(), mixture, 1e-6)


def test_a_gate_weighs_members_by_how_sure_they_are() -> None:
    held = scattered(0.5)
    config = CombineConfig(rules=("uniform",), weights=("uniform", "gate"), predict_examples=10)
    table = compare(held, PARTS, config)
    test = table[table["data"] == "test"].set_index("rule")

    def seen(seed: int) -> tuple[list[Tensor], Tensor, Tensor]:
        each = [predict(held.with_state(state), batch(seed)) for state in held.states()]
        rows = [one.log_softmax(1).float().double() for one, _ in each]  # cells hold float32
        top = torch.stack([one.softmax(1).amax(1) for one in rows], 1)
        features = torch.cat([torch.ones(len(top), 1), (top / (1 - top)).log()], 1)
        return rows, each[0][1], features

    gate, _ = fit_gate(*seen(3))
    rows, labels, features = seen(1)
    weights = gate(features)
    assert weights.std(0).min() > 0
    mixture = sum(weights[:, [k]] * rows[k].softmax(1) for k in range(4))
    assert isinstance(mixture, Tensor)
    row = test.loc["ensemble_gate"]
    assert row["nll"] == pytest.approx(nll(mixture.log(), labels), rel=1e-5)
    mean = -torch.stack([one.gather(1, labels[:, None])[:, 0] for one in rows], 1)
    assert row["mean_member_nll"] == pytest.approx(float((weights * mean).sum(1).mean()), rel=1e-5)
    assert row["ambiguity"] > 0
    assert (row["passes"], row["selected_on"], row["predicted_from"]) == (4, "held_out", "none")
    assert math.isnan(row["predicted"])
    assert not math.isnan(test.loc["ensemble", "predicted"])
    with pytest.raises(NQMError, match="a gate needs held-out data"):
        compare(held, Parts(test=lambda: batch(1)), config)


def test_predictions_are_right_to_second_order() -> None:
    """Halving the distance divides the error of every soup and ensemble by eight, near enough."""
    errors = []
    # Nearer, an error may pass through 0 between two distances, and what is left is rounding.
    for scale in (0.2, 0.1, 0.05):
        table = compare(scattered(scale), PARTS, CONFIG)
        rows = table[table["predicted"].notna()]
        assert set(rows["rule"]) == {
            "member", "mean_member", "uniform", "greedy", "stock", "fisher", "ensemble"
        }  # fmt: skip
        assert (rows["predicted_from"] == SURROGATE).all()
        # The uniform soup is where the loss was expanded about.
        assert (rows["nll"] - rows["predicted"])[rows["rule"] == "uniform"].abs().max() < 1e-6
        one = rows[(rows["rule"] == "ensemble") | (rows["rule"] == "mean_member")]
        errors.append((one["nll"] - one["predicted"]).abs().to_numpy())
    # Predictions are made in float32 rows of log-probabilities: 1e-7 of the loss.
    assert (errors[1] < errors[0] / 4 + 1e-6).all()
    assert (errors[2] < errors[1] / 4 + 1e-6).all()
    assert errors[0].max() > 1e-5


def test_entries_of_the_surrogate() -> None:
    """Against derivatives by autograd, entry by entry."""
    model, data = start(), batch(1)
    p = sum(q.numel() for q in model.parameters())
    offsets = torch.randn(3, p, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = make_surrogate(model, offsets, data)
    names = [name for name, _ in model.named_parameters()]
    shapes = [q.shape for q in model.parameters()]
    flat = torch.cat([q.detach().flatten() for q in model.parameters()])

    def logits(w: Tensor) -> Tensor:
        parts = torch.split(w, [s.numel() for s in shapes])
        named = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, named, (data[0][0],))

    def loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(w), data[0][1])

    jacobian = torch.autograd.functional.jacobian(logits, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    moves = torch.einsum("ncp,ip->inc", jacobian, offsets)
    agree(made.moves, moves, 1e-9)
    assert made.repaired is made.moves  # no BatchNorm
    q = logits(flat).detach().softmax(1)
    softmax = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    gauss_newton = torch.einsum("inc,ncd,jnd->ij", moves, softmax, moves) / len(q)
    agree(made.bend, 0.5 * (offsets @ hessian @ offsets.T - gauss_newton), 1e-9)


def test_a_model_that_is_linear_in_its_weights_is_predicted_however_far() -> None:
    torch.manual_seed(3)
    model = nn.Linear(4, 3).double()
    states = {}
    for k in range(3):
        one = copy.deepcopy(model)
        with torch.no_grad():
            for p in one.parameters():
                p.add_(3.0 * torch.randn_like(p))
        states[f"m{k}"] = one.state_dict()
    config = CombineConfig(
        rules=("uniform", "inverse_loss"), pools=("probabilities", "logits"), weights=("accuracy",)
    )
    table = compare(Members.of_states(model, states), PARTS, config)
    rows = table[(table["data"] == "test")]
    assert (rows["predicted_from"] == SURROGATE).all()
    assert rows["nll"].max() > 2.0 * rows["nll"].min()  # far, where second order is of no use
    agree(rows["predicted"], rows["nll"], 1e-6)


def test_statistics_of_members_and_of_soups_are_predicted() -> None:
    """A BatchNorm of fixed weights: own statistics move the members, new ones every soup."""
    variance = batch(2)[0][0].var(0)

    def normed(mean: float) -> nn.Sequential:
        model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)).double()
        model.load_state_dict(
            start_state
            | {"0.running_mean": torch.full_like(variance, mean), "0.running_var": variance}
        )
        return model

    torch.manual_seed(5)
    start_state = nn.Sequential(
        nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
    ).double().state_dict()  # fmt: skip
    means = (-0.3, 0.1, 0.5)
    states = {f"m{k}": normed(mean).state_dict() for k, mean in enumerate(means)}
    config = CombineConfig(rules=("uniform", "inverse_loss"), repair=("statistics", "none"))
    table = compare(Members.of_states(normed(0.0), states), PARTS, config)
    rows = table[table["data"] == "test"]
    # Logits are linear in the mean that BatchNorm subtracts; float32 rows of log-probabilities.
    assert (rows["predicted_from"] == SURROGATE).all()
    members = rows[rows["rule"] == "member"]
    assert members["nll"].max() > 1.01 * members["nll"].min()
    spread = float(members["nll"].max() - members["nll"].min())
    agree(members["predicted"], members["nll"], 0.02 * spread)
    soups = rows[rows["space"] == "weights"].drop(members.index)
    # All have the same weights, so that all have the same statistics on the same data.
    anew = soups[soups["repair"] == "statistics"]
    agree(anew["predicted"], anew["nll"], 1e-6)
    own = soups[soups["repair"] == "none"]
    assert set(own["rule"]) == {"uniform", "inverse_loss"}
    agree(own["predicted"], own["nll"], 0.02 * spread)


def test_a_member_of_a_much_larger_variance_has_a_prediction() -> None:
    """A step away from it would make the variance negative."""
    torch.manual_seed(5)
    states = {}
    for k, variance in enumerate((1.0, 1.0, 4000.0)):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        model[0].running_var.fill_(variance)  # type: ignore[union-attr, operator]
        states[f"m{k}"] = model.state_dict()
    table = compare(Members.of_states(model, states), PARTS, CombineConfig(rules=("uniform",)))
    rows = table[(table["data"] == "test") & (table["rule"] != "uniform")]
    assert np.isfinite(rows["predicted"]).all()


def test_far_members_are_said_to_be_outside() -> None:
    table = compare(scattered(6.0), PARTS, CONFIG)
    assert (table.loc[table["predicted"].notna(), "predicted_from"] == OUTSIDE).all()


def permuted(state: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The same function with the six hidden units in another order."""
    moved = dict(state)
    for name in ("0.weight", "0.bias"):
        moved[name] = state[name][order]
    moved["2.weight"] = state["2.weight"][:, order]
    return moved


@pytest.mark.parametrize("align", ["weights", "activations"])
def test_permuted_members_are_as_good_as_the_others_after_alignment(align: str) -> None:
    one, two, *_ = scattered(0.05).states()
    moved = Members.of_states(net(), [one, permuted(two, [3, 0, 5, 1, 4, 2])])
    plain = Members.of_states(net(), [one, two])
    config = CombineConfig(rules=("uniform",), repair=("none", "rescale"))
    expected = compare(plain, PARTS, config)
    found = compare(moved, PARTS, replace(config, align=align))
    columns = ["rule", "repair", "data", "nll", "ambiguity", "predicted"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], rtol=1e-6)
    lost = compare(moved, PARTS, config)
    soup = (lost["rule"] == "uniform") & (lost["repair"] == "none") & (lost["data"] == "test")
    assert abs(float((lost["nll"] - expected["nll"])[soup].iloc[0])) > 1e-3
    torch.testing.assert_close(
        merge(moved, align=align, parts=PARTS).state_dict(),
        merge(plain).state_dict(),
        rtol=1e-12,
        atol=1e-12,
    )


def test_matching_activations_needs_data() -> None:
    with pytest.raises(NQMError, match="'activations' needs training data"):
        merge(scattered(0.1), align="activations")


def test_rescaled_soups_have_no_prediction_and_the_others_do() -> None:
    config = CombineConfig(rules=("uniform",), repair=("rescale", "none"))
    table = compare(scattered(0.3), PARTS, config)
    rows = table[(table["rule"] == "uniform") & (table["data"] == "test")].set_index("repair")
    assert math.isnan(rows["predicted"]["rescale"])
    assert rows["predicted"]["none"] == pytest.approx(rows["nll"]["none"], rel=1e-6)
    assert rows["nll"]["rescale"] != rows["nll"]["none"]


def test_sets_are_told_apart_whatever_the_caller_says_of_the_data(tmp_path: Path) -> None:
    """The temperature is fitted on held-out data, also where `about` has entries of our names."""
    held = scattered(0.3)
    about = {"data": {"name": "x"}, "kind": "y", "repair": "z"}
    table = compare(held, PARTS, CONFIG, cells=Cells(tmp_path, about))
    assert table.equals(compare(held, PARTS, CONFIG))
    rows, labels = predict(held.with_state(held.state(0)), batch(1))
    apart = predict(held.with_state(held.state(0)), batch(3))
    first = table[(table["member"] == "m0") & (table["data"] == "test")].iloc[0]
    assert first["temperature"] == pytest.approx(fit_temperature(*apart), rel=1e-4)
    assert first["nll_tuned"] == pytest.approx(tuned_nll(rows, labels, apart)[0], rel=1e-6)
    noisy = table[(table["member"] == "m0") & (table["data"] == "noisy")].iloc[0]
    assert abs(noisy["nll"] - first["nll"]) > 1e-3


class Counting(Cells):
    """Cells that count what is computed."""

    made = 0

    def get(self, what: Any, make: Any) -> Any:
        def counted() -> Any:
            self.made += 1
            return make()

        return super().get(what, counted)


def test_what_is_on_disk_is_not_computed_again(tmp_path: Path) -> None:
    held = scattered(0.3)
    first, again = Counting(tmp_path), Counting(tmp_path)
    one = compare(held, PARTS, CONFIG, cells=first)
    two = compare(held, PARTS, CONFIG, cells=again)
    assert one.equals(two)
    assert first.made > 0
    assert again.made == 0
    # A killed comparison has some of its cells; the rest is computed and the table is the same.
    lost = sorted(tmp_path.iterdir())[::3]
    for path in lost:
        path.unlink()
    third = Counting(tmp_path)
    assert compare(held, PARTS, CONFIG, cells=third).equals(one)
    # Parts of the surrogate are not needed where the whole of it is there.
    assert 0 < third.made <= len(lost)
    next(tmp_path.iterdir()).write_bytes(b"torn")
    with pytest.raises(NQMError, match=r"is damaged.*delete it"):
        compare(held, PARTS, CONFIG, cells=Cells(tmp_path))


def test_other_members_have_other_cells(tmp_path: Path) -> None:
    one = compare(scattered(0.3), PARTS, CONFIG, cells=Cells(tmp_path))
    two = compare(scattered(0.2), PARTS, CONFIG, cells=Cells(tmp_path))
    assert not one.equals(two)
    assert two.equals(compare(scattered(0.2), PARTS, CONFIG))


def test_mistakes_are_told_before_any_work() -> None:
    held = scattered(0.3)
    bare = Parts(test=lambda: batch(1))
    for parts, members, words in (
        (PARTS, held.chosen([0]), "at least two members"),
        (bare, held, "greedy needs held-out data"),
        (Parts(test=bare.test, held_out=bare.test), held, "fisher needs training data"),
        (PARTS, Members.of_states(net(), list(held.states())), "stock needs the model"),
    ):
        with pytest.raises(NQMError, match=words):
            compare(members, parts, CONFIG)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("combine.rules=['unifrom']", "combine.rules.*uniform"),
        ("combine.rules=['uniform','uniform']", "names one twice"),
        ("combine.repair=[]", "at least"),
        ("combine.held_out=1.0", "held_out"),
        ("combine.severities=[9]", "1 to 5"),
        ("combine.pool='logits'", "combine.pool"),
        ("rule.fisher.examples=10", "rule.fisher is not in combine.rules"),
        ("rule.uniform.examples=10", "rule.uniform.examples"),
        ("combin.rules=[]", "combin"),
    ],
)
def test_wrong_settings_name_their_key(override: str, words: str) -> None:
    with pytest.raises(NQMError, match=words) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_options_of_rules() -> None:
    overrides = ["combine.rules=['fisher','greedy','ame']", "rule.fisher.examples=7",
                 "rule.greedy.criterion='nll'", "rule.ame.pivot='soup'"]  # fmt: skip
    config, rules = load_config(None, overrides)
    assert config.rules == ("fisher", "greedy", "ame")
    fisher, greedy, ame = (rules[name] for name in config.rules)
    assert (fisher.examples, greedy.weigh.criterion, ame.pivot) == (7, "nll", "soup")  # type: ignore[attr-defined]


# --- examples and temperatures -------------------------------------------------------------------


def test_examples_are_spread_over_all_batches() -> None:
    x = torch.arange(20.0)[:, None]
    batches = [(x[i : i + 6], torch.arange(i, min(i + 6, 20))) for i in range(0, 20, 6)]
    taken = torch.cat([y for _, y in spread_examples(batches, 5)])
    assert taken.tolist() == [0, 5, 10, 14, 19]
    assert torch.cat([y for _, y in first_examples(batches, 8)]).tolist() == list(range(8))
    assert len(torch.cat([y for _, y in spread_examples(batches, 99)])) == 20
    large = [(torch.zeros(2 * BATCH, 1), torch.arange(2 * BATCH))]
    pieces = [y for _, y in spread_examples(large, 2 * BATCH - 1)]
    assert [len(y) for y in pieces] == [BATCH, BATCH - 1]  # bounds what second derivatives hold
    assert torch.cat(pieces).unique().numel() == 2 * BATCH - 1
    for take in (first_examples, spread_examples):
        with pytest.raises(NQMError, match="no batch"):
            take([], 3)


def test_temperature_undoes_what_was_done() -> None:
    """Rows that are right on average, made three times too sure, need temperature three."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 5, generator=g, dtype=torch.float64)
    labels = torch.multinomial(rows.softmax(1), 1, generator=g)[:, 0]
    best = minimize_scalar(lambda t: nll(3 * rows / t, labels), bounds=(0.5, 9), method="bounded")
    assert fit_temperature(3 * rows, labels) == pytest.approx(best.x, rel=1e-4)
    assert fit_temperature(3 * rows, labels) == pytest.approx(3.0, rel=0.1)
    tuned, t = tuned_nll(3 * rows, labels, (3 * rows, labels))
    assert tuned == pytest.approx(nll(3 * rows / t, labels), rel=1e-12)
    folded, mean = tuned_nll(3 * rows, labels)
    even, odd = (fit_temperature(3 * rows[k::2], labels[k::2]) for k in (0, 1))
    half = 0.5 * (nll(3 * rows[::2] / odd, labels[::2]) + nll(3 * rows[1::2] / even, labels[1::2]))
    assert folded == pytest.approx(half, rel=1e-12)
    assert mean == pytest.approx(math.sqrt(even * odd), rel=1e-12)
    assert np.isfinite(folded)
