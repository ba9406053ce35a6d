"""The risk of a run: which data, which statistics, and a minimum near by."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neural.bridge import from_run as risks
from neural.bridge.from_run import risk_of_run, training_batches
from neural.curvature.minimise import minimise
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.risk_batchnorm import BatchNormRisk
from neural.data import ImageData, StreamData, TextData, load_images
from neural.models import build
from neural.training.config import RunConfig
from neural.training.recipe import load_recipe
from neural.training.task import Runtime
from nqm.errors import NQMError
from tests.tiny_risks import Bowl, tanh_risk
from tests.tiny_runs import tiny
from tests.tolerances import agree

PLACE = Runtime()


def digits() -> ImageData:
    data = load_images("digits")
    assert data.train is not None
    return data


def normalised(images: Any, data: ImageData) -> Tensor:
    return (images.float() / 255.0 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(
        data.std
    )[:, None, None]


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_recipe("digits_bn", "smoke").arms["base"]


def network(run: RunConfig, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(run.model.name, classes=10, channels=1, **options)


def test_a_run_of_digits(run: RunConfig) -> None:
    model = network(run)
    risk = risk_of_run(run, model, PLACE, batch_size=128)
    data = digits()
    part = data.train.subset(run.data.train_examples)
    x, y = (torch.cat(parts) for parts in zip(*risk.batches, strict=True))
    assert [len(targets) for _, targets in risk.batches] == [128, 128, 44]
    assert risk.examples == run.data.train_examples == 300
    assert torch.equal(y, part.labels)
    agree(x, normalised(part.pixels, data), 1e-5)  # float32
    assert risk.weight_decay == run.train.weight_decay == 5e-4
    assert risk_of_run(run, model, PLACE, weight_decay=0.0).weight_decay == 0.0
    assert not model.training
    # In one part each, so that statistics are those of all examples at once.
    risk = risk_of_run(run, model, PLACE, select="batchnorm+head")
    assert risk.size < sum(p.numel() for p in model.parameters())
    seen: list[Tensor] = []
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        output = model(x)
    agree(cast(Tensor, layer.running_mean), seen[0].mean((0, 2, 3)), 1e-4)
    agree(cast(Tensor, layer.running_var), seen[0].var((0, 2, 3)), 1e-4)
    expected = nn.functional.cross_entropy(output, y) + 2.5e-4 * risk.weights.square().sum()
    assert risk.loss() == pytest.approx(float(expected), rel=1e-4)


def test_fewer_examples_are_the_same_for_every_seed(run: RunConfig) -> None:
    from dataclasses import replace

    found = [training_batches(replace(run, seed=seed), PLACE, 50, 512) for seed in (0, 1)]
    (x, y), (other, _) = found[0][0], found[1][0]
    assert torch.equal(x, other)
    assert torch.bincount(y).tolist() == [5] * 10
    more = training_batches(run, PLACE, 10_000, 512)
    assert len(more[0][0]) == run.data.train_examples
    with pytest.raises(NQMError, match="examples must be an integer >= 2; got 1"):
        training_batches(run, PLACE, 1, 512)


def test_curvature_and_groups_are_passed_on(run: RunConfig) -> None:
    plain = risk_of_run(run, network(run), PLACE, select="head")
    assert plain.curvature == "hessian"
    assert risk_of_run(run, network(run), PLACE, select="head", curvature="ggn").curvature == "ggn"
    risk = risk_of_run(run, network(run), PLACE, group=32)
    assert isinstance(risk, BatchNormRisk)
    assert risk.examples == 300 // 32
    x, y = (torch.cat([part[i][0] for part in risk.batches]) for i in (0, 1))
    assert torch.equal(x, torch.cat([x for x, _ in plain.batches])[:288])
    assert torch.equal(y, torch.cat([y for _, y in plain.batches])[:288])


def test_few_weights_are_in_double_precision() -> None:
    run = tiny()
    for hidden, dtype in (([8], torch.float64), ([80], torch.float32)):
        model = network(run, hidden=hidden)
        risk = risk_of_run(run, model, PLACE)
        assert risk.weights.dtype == risk.batches[0][0].dtype == dtype
        assert risk.examples == 100
        assert risk.gradient().dtype == dtype


def text_run(monkeypatch: pytest.MonkeyPatch, length: int) -> tuple[RunConfig, Tensor]:
    """A text of 100 symbols, of which bytes 40, 41 and 42 occur."""
    text = torch.randint(40, 43, (100,), generator=torch.Generator().manual_seed(0)).byte()
    data = TextData("t", "T", text, text[:30], text[:30])
    monkeypatch.setattr(risks, "load_data", lambda config, root: data)
    settings = {"name": "python_docs", "length": length, "train_examples": None}
    changes = {"test_examples": None, "batch_size": 2}
    model = {"name": "transformer_lm"}
    return tiny(data=settings | changes, model=model), (text - 40).long()


def test_windows_of_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    run, text = text_run(monkeypatch, 8)
    for wanted, windows in ((None, 12), (5, 5), (1000, 12)):
        batches = training_batches(run, PLACE, wanted, 4)
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(y, text[: 8 * windows].view(windows, 8))
        assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
        assert max(len(targets) for _, targets in batches) <= 4
    model = build("transformer_lm", classes=3, context=8, width=4, heads=1, layers=1)
    risk = risk_of_run(run, model, PLACE, examples=5)
    with torch.no_grad():
        output = model(torch.cat([text.new_zeros(1), text[:39]]).view(5, 8))
    expected = nn.functional.cross_entropy(output.flatten(0, 1), text[:40])
    decay = 0.5 * run.train.weight_decay * float(risk.weights.square().sum())
    assert risk.loss() == pytest.approx(float(expected) + decay, rel=1e-12)


def test_a_folder_of_images_is_refused(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = cast(Any, None)
    folder = StreamData("imagenet", "ImageNet", nothing, nothing, 10, (0.0,), (1.0,), 256)
    monkeypatch.setattr(risks, "load_data", lambda config, root: folder)
    with pytest.raises(NQMError, match="'digits' does not fit into memory") as told:
        risk_of_run(run, network(run), PLACE)
    assert "\n" not in str(told.value)


# --- settling ------------------------------------------------------------------------------------


def test_settling_finds_the_minimum_of_a_quadratic() -> None:
    risk = Bowl((3.0, 1.0, 0.4, 0.1), away=1.0).risk
    found = minimise(risk)
    np.testing.assert_allclose(found.weights, np.zeros(4), atol=1e-13)
    assert not found.weights.requires_grad


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_settling_does_not_depend_on_the_unit_of_the_loss(size: float) -> None:
    bowl = Bowl(np.geomspace(1.0, 1e-3, 10).tolist(), away=1.0)
    plain = bowl.risk.example_loss
    bowl.risk.example_loss = lambda output, targets: size * plain(output, targets)
    found = minimise(bowl.risk)
    # Rounding of the gradient, of examples' gradients of size 1, over the least curvature.
    np.testing.assert_allclose(found.weights, 0.0, atol=1e-14 / 1e-3)


def test_settling_finds_the_minimum_of_a_curved_loss() -> None:
    bowl = Bowl((3.0, 1.0, 0.4, 0.1), away=0.05, cubic=0.1)
    found = minimise(bowl.risk)
    # The gradient by the closed form; at the minimum the Hessian H + T[w] is positive.
    np.testing.assert_allclose(bowl.gradient(found.weights), 0.0, atol=1e-14)
    bent = bowl.hessian + np.tensordot(bowl.third, found.weights.numpy(), 1)
    assert np.linalg.eigvalsh(bent)[0] > 0.0


def test_settling_in_single_precision_goes_as_far_as_it_reaches() -> None:
    risk = tanh_risk(0.1, quick=False)
    exact = minimise(risk).weights
    single = EmpiricalRisk(
        risk.model.float(),
        [(x.float(), y) for x, y in risk.batches],
        weight_decay=0.1,
    )
    # The least curvature is at least the decay, and the gradient's rounding that of float32.
    agree(minimise(single).weights, exact, 1e-4)  # float32


def test_settling_does_not_climb_to_a_saddle() -> None:
    risk = Bowl((2.0, 1.0, -0.5), away=1e-3).risk
    found = minimise(risk, iterations=5)
    assert found.loss() <= risk.loss()
    w, v = found.weights.numpy(), np.linalg.eigh(Bowl((2.0, 1.0, -0.5)).hessian)[1][:, 0]
    start = risk.weights.numpy()
    assert abs(w @ v) >= abs(start @ v)


def test_settling_from_a_loss_that_is_not_finite() -> None:
    risk = Bowl((3.0, 1.0), away=1.0).risk
    with pytest.raises(NQMError, match="holds NaN or infinite numbers"):
        minimise(risk.at(torch.full((2,), torch.nan).double()))


def test_settling_stays_near_and_leaves_the_rest_alone() -> None:
    risk = tanh_risk()
    before = risk.weights.clone()
    found = minimise(risk)
    assert float(found.gradient(found.weights).abs().max()) < 1e-8
    assert found.loss() < risk.loss()
    assert torch.equal(risk.weights, before)
    # Weight decay: sum of the two slopes is zero, not the slope of the data alone.
    assert float(found.weighted_gradient(torch.full((40,), 1 / 40.0).double()).norm()) > 1e-4
    less = minimise(risk, iterations=3)
    assert found.loss() < less.loss() < risk.loss()


def test_settling_at_a_rate_goes_to_the_same_minimum() -> None:
    risk = Bowl((3.0, 1.0, 0.4, 0.1), away=1.0).risk
    # The flattest direction shrinks by exp(-lr h n / 2) under a cosine: 1e-9 of what it was.
    found = minimise(risk, 1400, lr=0.3)
    np.testing.assert_allclose(found.weights, np.zeros(4), atol=1e-8)


def test_settling_at_a_rate_that_is_too_high() -> None:
    risk = Bowl((3.0, 1.0, 0.4, 0.1), away=1.0).risk
    with pytest.raises(NQMError, match="minimise_lr = 40 diverges; use a lower learning rate"):
        minimise(risk, 500, lr=40.0)  # 3.8 / 3 is the edge of stability; a cosine goes below it
    with pytest.raises(NQMError, match="minimise_lr"):
        minimise(risk, 500, lr=0.0)


def test_progress_counts_gradients_and_products() -> None:
    told: list[int] = []
    minimise(tanh_risk(), 7, lr=0.1, progress=told.append)
    assert told == [1] * 7
    told.clear()
    minimise(tanh_risk(), 5, progress=told.append)
    assert 5 <= sum(told) <= 4 * 5
