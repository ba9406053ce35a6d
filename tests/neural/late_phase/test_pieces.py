"""A minibatch in pieces: the gradient of the whole, or a word why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neural import LatePhase
from nqm import NQMError
from tests.tolerances import IDENTITY, agree

pytestmark = pytest.mark.usefixtures("double")


class Text(nn.Module):
    """Logits of every symbol, or the same in one row each."""

    def __init__(self, flat: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.symbol, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)
        self.dropout, self.flat = nn.Dropout(dropout), flat

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.dropout(torch.tanh(self.norm(self.symbol(x)))))
        return out.flatten(0, 1) if self.flat else out


def text_loss(out: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(out.reshape(-1, 9), targets.flatten())


def labelled(ignored: int = 0, rows: int = 6, length: int = 5) -> tuple[Tensor, Tensor]:
    x, y = torch.randint(9, (rows, length)), torch.randint(9, (rows, length))
    y[0] = -100 if ignored else y[0]  # a row of padding, and more of it in the next
    y[1, : max(ignored - length, 0)] = -100
    return x, y


def gradients(late: LatePhase) -> list[Tensor]:
    return [p.grad for p in late.parameters() if p.grad is not None]


def compare(
    late: LatePhase, batches: list[Any], loss_fn: Callable[..., Tensor], pieces: int, **given: Any
) -> None:
    whole = copy.deepcopy(late)
    expected = whole.accumulate(batches, loss_fn)
    losses = late.accumulate(batches, loss_fn, micro_batches=pieces, **given)
    agree(losses, expected, IDENTITY)
    for one, other in zip(gradients(late), gradients(whole), strict=True):
        agree(one, other, IDENTITY)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("ignored", [5, 8])
def test_labels_that_a_loss_ignores(ignored, flat):
    """Its mean is over other numbers in every piece: with their count it is right."""
    late = LatePhase(Text(flat), 2, "norm+head", noise=0.3)
    batches = [labelled(ignored), labelled()]
    if flat:
        batches = [(x, y.flatten()) for x, y in batches]
    with pytest.raises(NQMError, match=r"loss_fn is no mean over rows .* give loss_weight"):
        late.accumulate(batches, text_loss, micro_batches=2)
    compare(late, batches, text_loss, 2, loss_weight=lambda _, y: (y != -100).sum())
    with pytest.raises(NQMError, match="no mean over rows"):
        late.accumulate(batches, text_loss, micro_batches=2, loss_weight=lambda _, y: y.numel())
    compare(late, [labelled(), labelled()] if not flat else batches[1:], text_loss, 3)


def test_a_wrong_weight_is_told_before_any_weight_moves():
    model = Text()
    late = LatePhase(model, 2, "norm")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    own = late.optimizer_like(base)
    before = copy.deepcopy(late.state_dict())
    with pytest.raises(NQMError, match="no mean over rows"):
        late.step([labelled(5), labelled()], text_loss, base, own, micro_batches=2)
    assert all(torch.equal(before[name], value) for name, value in late.state_dict().items())


@pytest.mark.parametrize("loss_fn", [
    lambda out, y: functional.cross_entropy(out.reshape(-1, 9), y.flatten(), reduction="sum"),
    lambda out, y: text_loss(out, y) + out.mean(0).square().sum(),
], ids=["a sum", "rows that meet"])  # fmt: skip
def test_losses_that_are_no_mean_over_rows(loss_fn):
    late = LatePhase(Text(), 2, "head")
    with pytest.raises(NQMError, match="no mean over rows"):
        late.accumulate([labelled(), labelled()], loss_fn, micro_batches=2)


class Own(nn.Module):
    """Computes its loss itself, as transformers libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Text()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.text(x)
        return {"loss": text_loss(out, labels), "logits": out}


def test_a_loss_of_the_models_own_needs_a_weight():
    late = LatePhase(Own(), 2, "head", noise=0.3)
    batches = [({"x": x, "labels": y}, None) for x, y in (labelled(5), labelled(7))]
    with pytest.raises(NQMError, match=r"holds a tensor without rows, e\.g\. a loss; give"):
        late.accumulate(batches, lambda out, _: out["loss"], micro_batches=2)
    count = lambda x, _: (x["labels"] != -100).sum()  # noqa: E731
    compare(late, batches, lambda out, _: out["loss"], 3, loss_weight=count)


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.symbol = nn.Embedding(9, 4)
        self.rnn = nn.LSTM(4, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.symbol(x))[0])


def test_rows_along_another_axis_are_told():
    late = LatePhase(Recurrent(False), 2, "head")
    with pytest.raises(NQMError, match="pieces' outputs are not those of the whole minibatch"):
        late.accumulate([labelled(), labelled()], text_loss, micro_batches=2)
    compare(LatePhase(Recurrent(True), 2, "head", noise=0.3), [labelled()], text_loss, 2)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, attn_mask=mask)[0].mean(1))


@pytest.mark.parametrize("length", [5, 8, 4])
def test_a_mask_common_to_all_rows(length):
    """It is not cut; where it looks like rows, that is told."""
    late = LatePhase(Masked(), 2, "head", noise=0.3)
    mask = torch.ones(length, length).triu(1).bool()
    batches = [((torch.randn(4, length, 4), mask), torch.randint(3, (4,))) for _ in range(2)]
    if length == 4:
        with pytest.raises(NQMError, match="micro_batches: the model does not run on a piece"):
            late.accumulate(batches, functional.cross_entropy, micro_batches=2)
    else:
        compare(late, batches, functional.cross_entropy, 2)


class Contrast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


def test_a_model_that_mixes_rows_is_told_and_batchnorm_is_allowed():
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(2)]
    with pytest.raises(NQMError, match="pieces' outputs are not those of the whole"):
        LatePhase(Contrast(), 2, "head").accumulate(
            batches, functional.cross_entropy, micro_batches=2
        )
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    late = LatePhase(model, 2, "head")
    parts = [(x[half], y[half]) for x, y in batches for half in (slice(3), slice(3, 6))]
    by_hand = [functional.cross_entropy(model(x), y) for x, y in parts]
    losses = late.accumulate(batches, functional.cross_entropy, micro_batches=2)
    agree(losses, [float(sum(by_hand[i : i + 2])) / 2 for i in (0, 2)], IDENTITY)


def test_dropout_and_low_precision_hide_nothing_and_draw_nothing():
    late = LatePhase(Text(dropout=0.5), 2, "head")
    batch = labelled()
    for _ in range(2):
        torch.manual_seed(3)
        loss = late.accumulate([batch], text_loss, micro_batches=2)
        torch.manual_seed(3)
        parts = [
            text_loss(late(batch[0][i : i + 3], member=0), batch[1][i : i + 3]) for i in (0, 3)
        ]
        agree(loss, [float((parts[0] + parts[1]).detach()) / 2], IDENTITY)
    low = LatePhase(Text().bfloat16(), 2, "head")
    low.accumulate([labelled(), labelled()], text_loss, micro_batches=2)
    with pytest.raises(NQMError, match="no mean over rows"):
        low.accumulate([labelled(5), labelled()], text_loss, micro_batches=2)
