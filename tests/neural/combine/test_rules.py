"""Rules of merging against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from neural.combine import Members, merge
from neural.combine.data import Parts
from neural.combine.information import fisher_diagonal, input_grams
from neural.combine.rules import AME, RULES, Fisher, Linear, ModelStock, RegMean, TaskArithmetic
from neural.combine.weigh import Greedy
from nqm import NQMError

NOTHING = Parts(test=list)


def linear(rows: int = 3, columns: int = 4) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


def weights(count: int, seed: int = 0, rows: int = 3, columns: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(count)]


def members(values: list[Tensor], ancestor: Tensor | None = None) -> Members:
    start = None if ancestor is None else {"weight": ancestor}
    return Members.of_states(linear(*values[0].shape), [{"weight": w} for w in values], start)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


# --- amortized model ensembling: COMBINING's closed forms ----------------------------------------


@pytest.mark.parametrize("order", ["given", "shuffled"])
@pytest.mark.parametrize("pivot", ["first", "soup", "ancestor"])
def test_descent_at_one_over_i_is_the_soup(pivot: str, order: str) -> None:
    values = weights(5)
    held = members(values, weights(1, seed=9)[0])
    merged = AME(pivot=pivot, order=order)(held, NOTHING).state["weight"]
    torch.testing.assert_close(merged, mean(values), rtol=1e-13, atol=1e-13)


def test_constant_descent_is_a_geometric_sum() -> None:
    """The sum is rho^N p + eta sum rho^(N - i) w_i, from the first member as the pivot."""
    values, eta = weights(4), 0.3
    rho = 1.0 - eta
    expected = rho**4 * values[0] + eta * sum(rho ** (3 - i) * w for i, w in enumerate(values))
    merged = AME(lr=eta)(members(values), NOTHING).state["weight"]
    torch.testing.assert_close(merged, expected, rtol=1e-13, atol=1e-13)


def test_full_batch_descent_is_the_line_from_the_pivot_to_the_soup() -> None:
    values, eta, steps = weights(4), 0.3, 5
    share = 1.0 - (1.0 - eta) ** steps
    rule = AME(lr=eta, epochs=steps, batch="all")
    expected = torch.lerp(values[0], mean(values), share)
    torch.testing.assert_close(rule(members(values), NOTHING).state["weight"], expected)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_converged_full_batch_descent_is_the_soup(optimizer: str) -> None:
    values = weights(4)
    rule = AME(optimizer=optimizer, lr=0.1, epochs=8000, batch="all")
    merged = rule(members(values), NOTHING).state["weight"]
    torch.testing.assert_close(merged, mean(values), rtol=1e-3, atol=1e-3)


def test_adaptive_descent_is_the_same_in_any_unit() -> None:
    rule = AME(optimizer="adam", lr=0.1)
    values = weights(4)
    small = rule(members([1e-3 * w for w in values]), NOTHING).state["weight"]
    torch.testing.assert_close(1e3 * small, rule(members(values), NOTHING).state["weight"])


# --- peers ---------------------------------------------------------------------------------------


def test_the_uniform_soup_is_the_average_of_torch() -> None:
    """`torch.optim.swa_utils.AveragedModel` and `update_bn`, on a network with BatchNorm."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    from tests.neural.combine.test_contract import PARTS, Net, states

    *held, _ = states(3)
    peer = AveragedModel(Net())
    for state in held:
        one = Net()
        one.load_state_dict(state)
        peer.update_parameters(one)
    update_bn((x for x, _ in PARTS.required("train", "torch")()), peer)
    soup = merge(Members.of_states(Net(), held), parts=PARTS)
    for name, value in peer.module.state_dict().items():
        if name != "mask" and value.is_floating_point():
            torch.testing.assert_close(soup.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# --- ancestors -----------------------------------------------------------------------------------


def test_task_arithmetic_is_the_line_of_a_single_model() -> None:
    (value,), start = weights(1), weights(1, seed=3)[0]
    merged = TaskArithmetic(scale=0.25)(members([value], start), NOTHING).state["weight"]
    torch.testing.assert_close(merged, start + 0.25 * (value - start))


def test_task_arithmetic_at_one_over_n_is_the_soup() -> None:
    values, start = weights(4), weights(1, seed=3)[0]
    merged = TaskArithmetic(scale=0.25)(members(values, start), NOTHING).state["weight"]
    assert torch.equal(merged, Linear()(members(values), NOTHING).state["weight"])


def test_model_stock_shrinks_by_the_mean_cosine() -> None:
    values, start = weights(3), weights(1, seed=3)[0]
    moved = [(w - start).flatten() for w in values]
    pairs = [(0, 1), (0, 2), (1, 2)]
    c = sum(float(torch.cosine_similarity(moved[i], moved[j], 0)) for i, j in pairs) / 3
    assert c > 0.05
    t = 3 * c / (1 + 2 * c)
    merged = ModelStock()(members(values, start), NOTHING).state["weight"]
    torch.testing.assert_close(merged, start + t * (mean(values) - start))


def test_model_stock_of_opposite_members_is_the_ancestor() -> None:
    start = weights(1, seed=3)[0]
    step = weights(1, seed=4)[0]
    merged = ModelStock()(members([start + step, start - step], start), NOTHING).state["weight"]
    torch.testing.assert_close(merged, start)


# --- information ---------------------------------------------------------------------------------


def test_fisher_diagonal_is_that_of_the_softmax() -> None:
    """Of a linear classifier: mean over examples of p_c (1 - p_c) x_j^2, by many labels each."""
    model = linear()
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many = [(x.expand(40_000, 4), torch.zeros(40_000, dtype=torch.int64))]
    found = fisher_diagonal(model, many, 40_000, seed=0)["weight"]
    p = model(x).softmax(-1)[0].detach()
    expected = (p * (1 - p))[:, None] * x.square()
    # The square of a gradient is x^2 times that of (label - p), which is at most 1.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=float(4.5 * x.square().max() / 200))


def test_fisher_merge_is_the_minimum_of_the_summed_quadratics() -> None:
    """Squared loss, features one at a time: L_i = sum_j h_ij (w - w_i)_j^2 / 2 with h = mean x^2.

    Residuals of +1 and -1 make the mean square of the gradients the curvature itself.
    """
    curvature = torch.tensor([[1.0, 4.0], [9.0, 0.25]], dtype=torch.float64)
    values = [torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[-1.0, 3.0]]).double()]
    top, bottom = torch.zeros(1, 2).double(), torch.zeros(1, 2).double()
    for h, w in zip(curvature, values, strict=True):
        model = linear(1, 2)
        model.load_state_dict({"weight": w})
        x = torch.diag(h.sqrt()).repeat(2, 1)
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()[:, None]
        batch = [(x, (model(x) + signs).detach())]
        f = fisher_diagonal(model, batch, 4, loss=lambda o, t: 0.5 * (o - t).square().sum(1))
        torch.testing.assert_close(f["weight"], h[None] / 2)
        top, bottom = top + f["weight"] * w, bottom + f["weight"]
    expected = (curvature * torch.cat(values)).sum(0) / curvature.sum(0)
    torch.testing.assert_close((top / bottom)[0], expected)


def test_weights_without_information_are_averaged_plainly() -> None:
    values = weights(2)
    x = torch.zeros(8, 4, dtype=torch.float64)
    x[:, 0] = 1.0
    parts = Parts(test=list, train=lambda: [(x, torch.zeros(8, dtype=torch.int64))])
    merged = Fisher()(members(values), parts).state["weight"]
    torch.testing.assert_close(merged[:, 1:], mean(values)[:, 1:])
    assert not torch.allclose(merged[:, 0], mean(values)[:, 0])


def test_regression_mean_is_least_squares() -> None:
    """Each member is right on its own directions: the merged layer is right on all of them."""
    target = weights(1)[0]
    inputs = [torch.eye(4).double()[:2], torch.eye(4).double()[2:]]
    values = []
    for x in inputs:
        noise = weights(1, seed=7)[0]
        noise[:, x.sum(0) > 0] = 0.0  # it has learned nothing of the other directions
        values.append(target + noise)
    grams = [x.T @ x for x in inputs]
    solved = torch.linalg.solve(
        sum(grams), sum(g @ w.T for g, w in zip(grams, values, strict=True))
    ).T
    torch.testing.assert_close(solved, target)
    seen = iter(inputs)
    parts = Parts(test=list, train=lambda: [(next(seen), torch.zeros(2, dtype=torch.int64))])
    merged = RegMean(shrink=1.0)(members(values), parts).state["weight"]
    torch.testing.assert_close(merged, target)


def test_regression_mean_of_equal_inputs_is_the_mean() -> None:
    values = weights(3)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = Parts(test=list, train=lambda: [(x, torch.zeros(20, dtype=torch.int64))])
    torch.testing.assert_close(RegMean()(members(values), parts).state["weight"], mean(values))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=2, padding=(0, 1), dilation=(1, 2)),
        nn.Conv2d(2, 3, (2, 3), padding="same"),
        nn.Conv2d(2, 3, 3, padding="valid"),
        nn.Linear(6, 3),
    ],
)
def test_grams_are_those_of_what_the_layer_multiplies(layer: nn.Module) -> None:
    """|W x|^2 summed over outputs is tr(W G W'), for any weight and no bias."""
    layer = layer.double()
    nn.init.zeros_(layer.bias)
    x = torch.randn(5, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = input_grams(layer, [(x, torch.zeros(5, dtype=torch.int64))], 5)["weight"]
    w = layer.weight.detach().flatten(1)
    torch.testing.assert_close((w @ gram @ w.T).trace(), layer(x).detach().square().sum())


# --- choosing on held-out data -------------------------------------------------------------------


def bent(value: float) -> dict[str, Tensor]:
    return {"weight": torch.tensor([[value], [-value]], dtype=torch.float64)}


def test_greedy_takes_what_helps_and_nothing_else() -> None:
    """Two classes, input 1 or -1, labels right in 9 of 10: the best weight has 2 w = log 9."""
    x = torch.ones(10, 1, dtype=torch.float64)
    y = torch.tensor([0] * 9 + [1])
    parts = Parts(test=list, held_out=lambda: [(x, y)])
    best = 0.5 * math.log(9.0)
    held = Members.of_states(
        linear(2, 1), {"high": bent(best + 0.4), "far": bent(best + 5.0), "low": bent(best - 0.3)}
    )
    weights = Greedy(criterion="nll")(held, parts)
    # low is best alone; high halves its distance; far would move the mean away.
    assert weights.tolist() == [0.5, 0.0, 0.5]
    assert RULES["best"](held, parts).weights.tolist() == [1.0, 0.0, 0.0]  # accuracies tie: first


def test_descent_from_the_best_member() -> None:
    """Labels are all 0: a positive weight is right in every case, a negative one in none."""
    x, y = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    parts = Parts(test=list, held_out=lambda: [(x, y)])
    values = [-1.0, 2.0, -3.0]
    rule = AME(lr=0.25, batch="all", pivot="best")
    assert rule.selected_on == "held_out"
    merged = rule(Members.of_states(linear(2, 1), [bent(v) for v in values]), parts)
    # One step of a quarter from 2 towards the mean, -2/3.
    assert merged.state["weight"][0, 0].item() == pytest.approx(2.0 - 0.25 * (2.0 + 2.0 / 3.0))
    with pytest.raises(NQMError, match="held"):
        rule(members(weights(2)), NOTHING)


def test_of_a_linear_model_soup_and_ensemble_are_one() -> None:
    """Squared loss: mean member minus ambiguity; ambiguity: the outputs' mean squared spread."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=g, dtype=torch.float64)
    values = weights(5)
    y = torch.randn(50, values[0].shape[0], generator=g, dtype=torch.float64)
    outputs = torch.stack([x @ w.T for w in values])
    soup = x @ RULES["uniform"](members(values), NOTHING).state["weight"].T
    torch.testing.assert_close(soup, outputs.mean(0), rtol=1e-12, atol=1e-12)
    mean_member = (outputs - y).square().mean()
    ambiguity = (outputs - outputs.mean(0)).square().mean()
    assert float((soup - y).square().mean()) == pytest.approx(
        float(mean_member - ambiguity), rel=1e-10
    )


def test_learned_weights_find_the_member_that_fits() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g, dtype=torch.float64)
    good, bad = weights(2, seed=3)
    y = (x @ (3.0 * good).T).argmax(1)
    parts = Parts(test=list, held_out=lambda: [(x[i::4], y[i::4]) for i in range(4)])
    rule = type(RULES["learned"])(epochs=40)
    merged = rule(members([3.0 * good, bad]), parts).state["weight"]
    away = float((merged - 3.0 * good).norm() / (bad - 3.0 * good).norm())
    assert away < 0.15


# --- mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_one_line() -> None:
    values = weights(2)
    held = members(values)
    for call, words in (
        (lambda: Members(linear(), []), "at least one model"),
        (lambda: Members.of_states(linear(), {}), "at least one model"),
        (lambda: merge(held, weights=[0.5]), "weights must be 2 numbers"),
        (lambda: merge(held, weights=[0.5, 0.6]), "sum to 1"),
        (lambda: merge(held, weights=["a", "b"]), "weights must be numbers"),
        (lambda: merge(held, "unifrom"), "unifrom.*uniform"),
        (lambda: merge(held, repair="rescue"), "repair"),
        (lambda: AME(optimizer="adam"), "AME.lr is needed"),
        (lambda: RegMean(shrink=2.0), "RegMean.shrink"),
        (lambda: merge(held, "stock"), "needs the model from which"),
    ):
        with pytest.raises(NQMError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_factors_of_low_rank_updates_are_not_averaged() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Module()
            self.layer.lora_A = nn.Linear(3, 2, bias=False)

    held = Members.of_states(Adapted(), [Adapted().state_dict(), Adapted().state_dict()])
    for name in ("uniform", "ame", "fisher", "regmean"):
        with pytest.raises(NQMError, match="factor of a low-rank update"):
            merge(held, name, parts=Parts(test=list, train=list))
