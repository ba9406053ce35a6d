"""Metrics, intervals, OOD scores and predictions against hand-worked examples and oracles."""

from __future__ import annotations

import contextlib
import importlib
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import neural.evaluate as ev
from neural.models._torchvision import import_torchvision
from nqm.errors import NQMError
from tests.tolerances import IDENTITY, SIGMAS, agree

FLOAT32 = 1e-6


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(500, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(7, (500,), generator=torch.Generator().manual_seed(1))


def torchmetrics_functional() -> Any:
    """The oracle; skips where it, or the torchvision it imports, does not load."""
    with contextlib.suppress(NQMError):  # torchmetrics does without torchvision, not with half
        import_torchvision()
    try:
        return importlib.import_module("torchmetrics.functional.classification")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchmetrics does not import: {error}")


def two_class(confidence: list[float]) -> torch.Tensor:
    """Log-probabilities that predict class 0 with the given confidences."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_worked_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 2, 2])
    got = ev.classification_metrics(probs.log(), labels)
    agree(got["accuracy"], 2 / 3, IDENTITY)
    agree(got["nll"], -(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3, IDENTITY)
    # (0.3^2 + 0.2^2 + 0.1^2 + 0.1^2 + 0.6^2 + 0.7^2 + 0.3^2 + 0.3^2 + 0.6^2) / 3
    agree(got["brier"], (0.14 + 0.86 + 0.54) / 3, IDENTITY)
    # Confidences 0.7, 0.6, 0.4 lie in different bins of 15: (0.3 + 0.6 + 0.6) / 3.
    agree(got["ece"], 0.5, IDENTITY)


def test_confidence_one_belongs_to_the_last_bin():
    # 0.95 right and 1.0 wrong share a bin: |1/2 - 0.975| = 0.475, not (0.05 + 1) / 2.
    agree(ev.ece(two_class([0.95, 1.0]), torch.tensor([0, 1])), 0.475, IDENTITY)


def test_bins_are_open_below_and_closed_above():
    # 0.75 belongs to (0.5, 0.75], with 0.7; 0.8 to (0.75, 1].
    log_probs = two_class([0.7, 0.75, 0.8])
    expected = (abs(1 - 1.45) + abs(0 - 0.8)) / 3
    agree(ev.ece(log_probs, torch.tensor([0, 1, 1]), bins=4), expected, IDENTITY)


def test_one_bin_compares_mean_accuracy_with_mean_confidence(logits, labels):
    confidence = logits.double().softmax(1).max(1).values.mean()
    expected = abs(ev.accuracy(logits, labels) - float(confidence))
    agree(ev.ece(logits, labels, bins=1), expected, IDENTITY)


def test_ece_and_accuracy_match_torchmetrics(logits, labels):
    functional = torchmetrics_functional()
    probs = logits.double().softmax(1)
    saturated = torch.cat([probs, torch.eye(7, dtype=torch.float64)])
    truth = torch.cat([labels, torch.tensor([0, 1, 2, 3, 4, 6, 5])])
    # torchmetrics 1.9 puts confidence 1 into a bin of its own, hence the clamp.
    expected = functional.multiclass_calibration_error(
        saturated.clamp(max=1 - 6e-8), truth, num_classes=7, n_bins=15
    )
    assert ev.ece(saturated.log(), truth) == pytest.approx(float(expected), abs=1e-6)
    expected = functional.multiclass_accuracy(probs, labels, num_classes=7, average="micro")
    assert ev.accuracy(logits, labels) == pytest.approx(float(expected), abs=FLOAT32)


def test_nll_and_brier_match_scikit_learn(logits, labels):
    from sklearn.metrics import brier_score_loss, log_loss

    probs = logits.double().softmax(1).numpy()
    agree(ev.nll(logits, labels), log_loss(labels, probs, labels=range(7)), IDENTITY)
    agree(ev.brier(logits, labels), np.square(probs - np.eye(7)[labels]).sum(1).mean(), IDENTITY)
    binary = labels % 2
    p = probs[:, 0]
    half = ev.brier(torch.from_numpy(np.log(np.stack([1 - p, p], 1))), binary)
    agree(half, 2 * brier_score_loss(binary, p), IDENTITY)


@given(shift=st.floats(-50, 50), seed=st.integers(0, 99))
def test_logits_and_log_probabilities_score_alike(shift, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(4, (20,), generator=rng)
    a = ev.classification_metrics(logits + shift, labels)
    b = ev.classification_metrics(logits.log_softmax(1), labels)
    agree(list(a.values()), list(b.values()), 1e-11)
    assert 0 <= a["ece"] <= 1
    assert 0 <= a["brier"] <= 2


def test_a_diverged_model_has_no_likelihood_and_no_luck():
    got = ev.classification_metrics(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.long))
    assert got["accuracy"] == 0
    assert all(math.isnan(got[name]) for name in ("nll", "brier", "ece"))


def test_impossible_label_costs_infinity_but_brier_stays_finite():
    log_probs = two_class([1.0])
    assert ev.nll(log_probs, torch.tensor([1])) == math.inf
    assert ev.brier(log_probs, torch.tensor([1])) == 2


def test_bits_per_character():
    # A uniform guess among 256 bytes costs 8 bits.
    agree(ev.bits_per_character(math.log(256)), 8, IDENTITY)


def test_labels_of_minus_100_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (12,), generator=generator)
    counted = torch.arange(12) % 3 > 0
    masked = torch.where(counted, labels, -100)
    found = ev.classification_metrics(logits, masked)
    assert found == ev.classification_metrics(logits[counted], labels[counted])
    assert found["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, masked)))
    # The same of a model, by windows of symbols: a symbol's logits are a row of the table.
    table = nn.Embedding.from_pretrained(logits)
    windows = torch.arange(12).view(3, 4)
    batches = [(windows[:2], masked.view(3, 4)[:2]), (windows[2:], masked.view(3, 4)[2:])]
    for score in (ev.score(table, batches), ev.score_text(table, batches)):
        assert score.loss == pytest.approx(found["nll"], rel=1e-6)  # the table is float64
        assert score.accuracy == found["accuracy"]
    nothing = [(windows, torch.full((3, 4), -100))]
    with pytest.raises(NQMError, match="every label is -100"):
        ev.score(table, nothing)
    with pytest.raises(NQMError, match=r"labels must lie in 0..3, or be -100 .* got 4"):
        ev.score(table, [(windows, torch.full((3, 4), 4))])


def test_probabilities_are_not_taken_for_logits() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    labels = torch.tensor([0, 1])
    for p in (probs, probs.bfloat16(), probs.double()):
        for rule in (ev.nll, ev.brier, ev.ece, ev.classification_metrics):
            with pytest.raises(NQMError, match="are probabilities; take their logarithm"):
                rule(p, labels)
        with pytest.raises(NQMError, match="entropy_score: expected logits"):
            ev.entropy_score(p)
        with pytest.raises(NQMError, match="ensemble_log_probs: expected logits"):
            ev.ensemble_log_probs(p[None])
    assert ev.accuracy(probs, labels) == 1.0  # which is the same of both
    logits = probs.clone()
    logits[0, 0] = 0.8
    assert ev.nll(logits, labels) > 0.0


def test_scores_of_any_kind_and_place() -> None:
    inside, outside = [0.0, 0.5, 1.0], [0.75, 2.0]
    expected = ev.ood_metrics(inside, outside)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        a, b = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (inside, outside))
        assert ev.ood_metrics(a, b) == expected


def test_a_tensor_kept_during_evaluation_can_be_trained_with() -> None:
    class Rotary(nn.Linear):
        angles: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.angles is None:
                self.angles = torch.ones(x.shape[1]).cos()
            return super().forward(x) * self.angles[0]

    model = Rotary(4, 3)
    data = [(torch.ones(2, 4), torch.tensor([0, 1]))]
    ev.score(model, data)
    logits, _ = ev.predict(model, data)
    assert not logits.requires_grad
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    assert model.weight.grad is not None


@pytest.mark.parametrize(
    ("shape", "labels", "says"),
    [
        ((3, 2), [0, 1], r"\(3, 2\) and \(2,\)"),
        ((2, 2, 2), [0, 1], "flatten"),
        ((0, 2), [], "N, C >= 1"),
        ((2, 2), [0, 2], r"0\.\.1 .* got 0\.\.2"),
        ((2, 2), [0, -1], r"got -1\.\.0"),
        ((2, 2), [-100, -100], "every label is -100"),
    ],
)
def test_misfits_are_one_line(shape, labels, says):
    with pytest.raises(NQMError, match=says) as error:
        ev.accuracy(torch.zeros(shape), torch.tensor(labels, dtype=torch.long))
    assert "\n" not in str(error.value)
    with pytest.raises(NQMError, match="integers"):
        ev.nll(torch.zeros(2, 2), torch.zeros(2))


# --- intervals -------------------------------------------------------------------------------


def test_mean_interval_is_scipys():
    values = [96.2, 95.9, 96.5, 96.1, 96.4]
    got = ev.mean_interval(values, level=0.9)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
    agree([got.low, got.high], [expected.low, expected.high], IDENTITY)
    agree([got.mean, got.sd], [np.mean(values), scipy.stats.tstd(values)], IDENTITY)
    agree(got.half_width, (expected.high - expected.low) / 2, IDENTITY)
    assert got.n == 5


def test_paired_difference_is_scipys():
    a, b = [1.0, 2.5, 3.0, 4.2], [0.8, 2.6, 2.1, 3.9]
    got = ev.paired_difference(a, b)
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    agree([got.low, got.high], [expected.low, expected.high], IDENTITY)


def test_one_run_has_a_mean_and_no_interval():
    got = ev.mean_interval([3.0])
    assert got.mean == 3
    assert math.isnan(got.low)
    assert math.isnan(got.sd)
    assert str(got) == "3 (1 run)"


def test_intervals_name_mistakes():
    with pytest.raises(NQMError, match="pair up"):
        ev.paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(NQMError, match="one value per run"):
        ev.mean_interval([])
    with pytest.raises(NQMError, match="level"):
        ev.mean_interval([1.0, 2.0], level=95)


# --- OOD -------------------------------------------------------------------------------------


def test_entropy_is_scipys(logits):
    probs = logits.double().softmax(1).numpy()
    agree(ev.entropy_score(logits), scipy.stats.entropy(probs, axis=1), IDENTITY)
    expected = -(probs * np.log(probs + 1e-5)).sum(1)
    agree(ev.entropy_score(logits, epsilon=1e-5), expected, IDENTITY)


def test_entropy_at_its_ends():
    agree(ev.entropy_score(torch.zeros(2, 10)), [math.log(10)] * 2, IDENTITY)
    certain = torch.tensor([[0.0, -math.inf, -math.inf], [1e4, 0.0, 0.0]])
    assert ev.entropy_score(certain).tolist() == [0, 0]


def test_ood_worked_by_hand_with_ties():
    # Pairs (out, in): 3 beats all three; 2 beats 0 and 1 and ties with 2 -> (3 + 2.5) / 6.
    got = ev.ood_metrics([0.0, 1.0, 2.0], [2.0, 3.0])
    agree(got["auroc"], 5.5 / 6, IDENTITY)
    # Precision 1 at recall 1/2, then 2/3 at recall 1 (2 of both kinds is flagged at once).
    agree(got["aupr"], 0.5 * 1 + 0.5 * 2 / 3, IDENTITY)
    agree(got["fpr95"], 1 / 3, IDENTITY)


def test_fpr95_catches_at_least_95_percent():
    # Of 20 the 19 largest suffice; of 19 they all do.
    inside = np.arange(0, 20) - 0.5
    agree(ev.ood_metrics(inside, np.arange(20.0))["fpr95"], 18 / 20, IDENTITY)
    agree(ev.ood_metrics(inside, np.arange(19.0))["fpr95"], 19 / 20, IDENTITY)


def test_ood_of_constant_and_of_separated_scores():
    assert ev.ood_metrics([1.0] * 3, [1.0] * 5) == pytest.approx(
        {"auroc": 0.5, "aupr": 5 / 8, "fpr95": 1.0}
    )
    assert ev.ood_metrics([0.0, 1.0], [2.0, math.inf]) == {"auroc": 1, "aupr": 1, "fpr95": 0}


def test_two_gaussians_have_known_areas():
    n, distance = 20_000, 1.5
    rng = np.random.default_rng(0)
    got = ev.ood_metrics(rng.normal(size=n), rng.normal(distance, size=n))
    # P(out > in) = Phi(d / sqrt 2); the standard error is at most sqrt(A (1 - A) / n).
    area = scipy.stats.norm.cdf(distance / math.sqrt(2))
    assert abs(got["auroc"] - area) < SIGMAS * math.sqrt(area * (1 - area) / n)
    # 95 % of out lie above d - z; in above that with probability Phi(z - d). The threshold's own
    # error adds (density ratio at it)^2 * 0.05 * 0.95 / n.
    z = scipy.stats.norm.ppf(0.95)
    share = scipy.stats.norm.cdf(z - distance)
    ratio = scipy.stats.norm.pdf(distance - z) / scipy.stats.norm.pdf(z)
    error = math.sqrt((share * (1 - share) + ratio**2 * 0.05 * 0.95) / n)
    assert abs(got["fpr95"] - share) < SIGMAS * error


@given(
    inside=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    outside=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_auroc_counts_pairs_and_fpr95_counts_flags(inside, outside):
    got = ev.ood_metrics(inside, outside)
    pairs = [(o > i) + 0.5 * (o == i) for o in outside for i in inside]
    agree(got["auroc"], np.mean(pairs), IDENTITY)
    enough = [
        t for t in range(6) if 100 * sum(o >= t for o in outside) >= 95 * len(outside)
    ]  # every threshold that catches enough
    agree(got["fpr95"], np.mean([i >= max(enough) for i in inside]), IDENTITY)


def test_ood_of_nothing_and_of_nan():
    with pytest.raises(NQMError, match="at least one"):
        ev.ood_metrics([], [1.0])
    assert all(math.isnan(v) for v in ev.ood_metrics([math.nan], [1.0]).values())


# --- predictions -----------------------------------------------------------------------------


class Members(nn.Module):
    """Shared layer, K heads: the interface of late-phase modules."""

    members = 3

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.heads = nn.ModuleList(nn.Linear(4, 5) for _ in range(self.members))

    def forward(self, x: torch.Tensor, *, member: int) -> torch.Tensor:
        return self.heads[member](self.norm(x))


def make_batches(sizes=(6, 6, 3)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(3)
    return [
        (torch.randn(n, 4, generator=rng), torch.randint(5, (n,), generator=rng)) for n in sizes
    ]


def test_predict_is_the_eval_forward_and_modes_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 5))
    model[1].eval()  # a frozen layer in a training model
    batches = make_batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, labels = ev.predict(model, batches)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    x = torch.cat([x for x, _ in batches])
    model.eval()
    torch.testing.assert_close(logits, model(x).detach(), rtol=FLOAT32, atol=FLOAT32)
    assert torch.equal(labels, torch.cat([y for _, y in batches]))
    assert logits.dtype == torch.float32
    logits.requires_grad_()  # an ordinary tensor, not one of inference mode
    logits.sum().backward()


def test_modes_come_back_after_an_exception():
    model = nn.Linear(4, 5)
    with pytest.raises(RuntimeError):
        ev.predict(model, [(torch.zeros(2, 3), torch.zeros(2))])
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_language_models_are_flattened():
    model = nn.Embedding(6, 6)
    x = torch.randint(6, (2, 5), generator=torch.Generator().manual_seed(0))
    logits, labels = ev.predict(model, [(x, x)])
    assert logits.shape == (10, 6)
    assert torch.equal(logits, model.weight.detach()[x.reshape(-1)])
    assert torch.equal(labels, x.reshape(-1))


def test_members_one_by_one():
    torch.manual_seed(0)
    model, batches = Members(), make_batches()
    logits, labels = ev.predict_members(model, model.members, iter(batches))
    assert logits.shape == (3, 15, 5)
    assert model.norm.training
    model.eval()
    for k in range(3):
        expected = torch.cat([model(x, member=k) for x, _ in batches]).detach()
        torch.testing.assert_close(logits[k], expected, rtol=FLOAT32, atol=FLOAT32)
    assert len(labels) == 15


def test_members_of_a_plain_function():
    logits, _ = ev.predict_members(lambda x, member: x * member, 2, make_batches())
    assert torch.equal(logits[0], torch.zeros(15, 4))


def test_late_phase_members_are_predicted():
    late_phase = pytest.importorskip("neural.late_phase.members")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    late = late_phase.LatePhase(model, members=3, noise=0.5)
    logits, _ = ev.predict_members(late, late.members, make_batches())
    for k in range(3):
        expected, _ = ev.predict(late.member(k), make_batches())
        torch.testing.assert_close(logits[k], expected, rtol=1e-5, atol=1e-5)


def test_ensemble_is_the_mean_probability(logits):
    members = torch.stack([logits, logits.flip(0), 3 * logits])
    expected = members.double().softmax(-1).mean(0)
    agree(ev.ensemble_log_probs(members).exp(), expected, IDENTITY)
    same = ev.ensemble_log_probs(torch.stack([logits, logits]))
    agree(same, logits.double().log_softmax(1), IDENTITY)
    # Far below the smallest probability a float64 can hold.
    far = torch.tensor([[[0.0, -2000.0]], [[0.0, -3000.0]]])
    agree(ev.ensemble_log_probs(far)[0, 1], -2000 - math.log(2), IDENTITY)


def test_mc_dropout_draws_masks_and_nothing_else():
    rate, samples = 0.3, 4000
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(rate))
    batch = [(torch.ones(2, 1), torch.zeros(2, dtype=torch.long))]
    state = torch.get_rng_state()
    logits, labels = ev.mc_dropout(model, batch, samples, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    assert model[0].training
    assert model[0].num_batches_tracked == 0
    assert labels.tolist() == [0, 0]
    # BatchNorm in eval mode leaves 1 / sqrt(1 + eps); dropout keeps a value with probability 0.7.
    kept = logits != 0
    torch.testing.assert_close(
        logits[kept], torch.full_like(logits[kept], 1 / 0.7 / math.sqrt(1 + 1e-5))
    )
    share = float(kept.float().mean())
    assert abs(share - (1 - rate)) < SIGMAS * math.sqrt(rate * (1 - rate) / (2 * samples))
    assert torch.equal(logits, ev.mc_dropout(model, batch, samples, seed=5)[0])
    assert not torch.equal(logits, ev.mc_dropout(model, batch, samples, seed=6)[0])


def test_score_is_the_mean_over_examples_not_batches():
    torch.manual_seed(0)
    model, batches = nn.Linear(4, 5), make_batches((7, 2))
    got = ev.score(model, batches)
    logits, labels = ev.predict(model, batches)
    assert got.loss == pytest.approx(ev.nll(logits, labels), rel=FLOAT32)
    assert got.accuracy == ev.accuracy(logits, labels)


def test_prediction_mistakes_are_one_line():
    model = nn.Linear(4, 5)
    with pytest.raises(NQMError, match="no dropout layer"):
        ev.mc_dropout(model, make_batches(), 2)
    for run in (ev.predict, ev.score):
        with pytest.raises(NQMError, match="no batch"):
            run(model, [])
        with pytest.raises(NQMError, match=r"\(2, 5\) and \(3,\)"):
            run(model, [(torch.zeros(2, 4), torch.zeros(3))])
    with pytest.raises(NQMError, match="members"):
        ev.predict_members(Members(), 0, make_batches())
    with pytest.raises(NQMError, match=r"\(K, N, C\)"):
        ev.ensemble_log_probs(torch.zeros(2, 3))


def test_score_text_carries_the_state_over_windows() -> None:
    from neural.evaluate import score, score_text
    from neural.models import build

    torch.manual_seed(0)
    model = build("lstm_lm", classes=5, hidden=6, embedding=3).double()
    text = torch.randint(5, (2, 31))
    whole = [(text[:, :-1], text[:, 1:])]
    windows = [(text[:, i : i + 7], text[:, i + 1 : i + 8]) for i in (0, 7, 14)]
    windows.append((text[:, 21:30], text[:, 22:31]))
    assert score_text(model, windows).loss == pytest.approx(score(model, whole).loss, rel=1e-12)
    assert score(model, windows).loss != pytest.approx(score(model, whole).loss, rel=1e-6)
    # Other rows are other readers: they begin anew.
    alone = [(text[:1, :9], text[:1, 1:10])]
    both = score_text(model, [*whole, *alone]).loss * 69
    assert both == pytest.approx(score(model, whole).loss * 60 + score(model, alone).loss * 9)


def test_score_text_of_a_model_without_a_state_is_its_score() -> None:
    from neural.evaluate import score, score_text
    from neural.models import build

    torch.manual_seed(0)
    model = build("transformer_lm", classes=5, width=8, heads=2, layers=1, context=16)
    text = torch.randint(5, (2, 13))
    windows = [(text[:, :6], text[:, 1:7]), (text[:, 6:12], text[:, 7:13])]
    assert score_text(model, windows) == score(model, windows)
