"""Scores of modules against closed forms, and what follows from weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.naive_bayes import MultinomialNB

from neural.combine.api import ensemble, merge
from neural.combine.members import Members
from neural.combine.rules import Linear
from neural.modules.networks import Examples, FitConfig, ModuleNet, train_module
from neural.modules.scores import (
    Entropy,
    Equal,
    Evidence,
    Posterior,
    Sample,
    Scored,
    Similarity,
    TextParts,
    TfIdf,
    selected,
)
from nqm.errors import NQMError

TEXTS = (("cats sleep", "cats purr cats"), ("banks lend", "banks fail often"))


def evidence(target: tuple[str, ...] = ("cats lend", "banks purr purr")) -> Evidence:
    generator = torch.Generator().manual_seed(1)
    first, second, own = (torch.randn(2, 3, generator=generator) + 0.5 for _ in range(3))
    batches = ((torch.randn(5, 3, generator=generator), torch.zeros(5, dtype=torch.long)),)
    return Evidence((Sample(TEXTS[0], first), Sample(TEXTS[1], second)), Sample(target, own),
                    batches)  # fmt: skip


def members(kind: str = "bottleneck", count: int = 2) -> Members:
    """Modules far from their start, on one head."""
    torch.manual_seed(0)
    net = ModuleNet(3, 2, kind, 2)
    states = []
    for _ in range(count):
        state = {name: value.clone() for name, value in net.state_dict().items()}
        for name in state:
            state[name] += torch.randn(state[name].shape) if name.startswith("module") else 0.0
        states.append(state)
    head = torch.randn(2, 3)
    for state in states:
        state["head.weight"] = head
    return Members.of_states(net, states)


def test_similarity_is_the_mean_over_all_pairs() -> None:
    known = evidence()
    for found, domain in zip(Similarity()(members(), known), known.domains, strict=True):
        pairs = cosine_similarity(domain.vectors.numpy(), known.target.vectors.numpy())
        assert float(found) == pytest.approx(max(0.0, pairs.mean()), abs=1e-6)
    opposite = Sample(TEXTS[0], -known.target.vectors)
    away = Evidence((opposite, known.target), known.target, ())
    found = Similarity()(members(), away)
    assert float(found[0]) == 0.0 < float(found[1])


def test_tfidf_of_two_documents_by_hand() -> None:
    """A word of one document has idf 1 + ln(3/2), a word of both has 1."""
    one = 1.0 + math.log(1.5)
    # "cats" 3 times, "sleep", "purr" against "cats", "lend", "banks", "purr" twice.
    first = np.array([3.0, one, 1.0, 0.0, 0.0])  # cats sleep purr lend banks
    target = np.array([1.0, 0.0, 2.0, one, one])
    expected = first @ target / np.linalg.norm(first) / np.linalg.norm(target)
    found = TfIdf()(members(), evidence())
    assert float(found[0]) == pytest.approx(expected, rel=1e-12)
    assert TfIdf()(members(), evidence(("the of and", "to"))).tolist() == [0.0, 0.0]


def test_tfidf_of_characters_counts_short_sequences() -> None:
    """Of "ab" and "ba!" terms are a, b, ab and ba, ! and a!; a and b are in both documents."""
    one = 1.0 + math.log(3 / 2)
    first = np.array([1.0, 1.0, one, 0.0, 0.0, 0.0])
    target = np.array([1.0, 1.0, 0.0, one, one, one])
    expected = first @ target / np.linalg.norm(first) / np.linalg.norm(target)
    vectors = torch.ones(1, 3)
    known = Evidence((Sample(("ab",), vectors),), Sample(("BA!",), vectors), ())
    found = TfIdf(2)(members(count=1), known)
    assert float(found[0]) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(NQMError, match=r"TfIdf\.characters"):
        TfIdf(-1)


def test_entropy_of_modules_and_its_weights() -> None:
    known, both = evidence(), members()
    found = Entropy()(both, known)
    for index in range(2):
        with torch.no_grad():
            p = both.with_state(both.state(index))(known.batches[0][0]).double().softmax(1)
        assert -float(found[index]) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    # sum u - u_i over those kept: of 0.2, 0.3 and 0.5, then of the least two.
    values = [-0.2, -0.3, -0.5]
    np.testing.assert_allclose(selected(Entropy(), values, 0, "linear"), [0.4, 0.35, 0.25])
    np.testing.assert_allclose(selected(Entropy(), values, 2, "linear"), [0.6, 0.4, 0.0])


def test_posterior_is_bayes_by_counting() -> None:
    """Words cats sleep purr banks lend fail often; one count is added to each."""
    a = {"cats": 4 / 12, "sleep": 2 / 12, "purr": 2 / 12, "banks": 1 / 12, "lend": 1 / 12}
    b = {"cats": 1 / 12, "sleep": 1 / 12, "purr": 1 / 12, "banks": 3 / 12, "lend": 2 / 12}
    expected = np.zeros(2)
    for text in evidence().target.texts:
        both = np.array([math.prod(p[word] for word in text.split()) for p in (a, b)])
        expected += both / both.sum() / 2
    # 5 and 5 words, and 7 kinds of them.
    found = Posterior(length_power=0.0)(members(), evidence())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_posterior_of_one_text_is_naive_bayes() -> None:
    counts = np.array([[3, 1, 0], [0, 2, 2]])
    model = MultinomialNB(alpha=1.0, fit_prior=False).fit(counts, [0, 1])
    text = np.array([[1, 2, 1]])
    likelihood = torch.from_numpy(text @ model.feature_log_prob_.T)
    plain = Posterior(0.0).posterior(likelihood, torch.tensor([4.0]))
    np.testing.assert_allclose(plain, model.predict_proba(text), rtol=1e-12)
    tempered = Posterior(0.5).posterior(likelihood, torch.tensor([4.0]))
    odds = float(plain[0, 0] / plain[0, 1])
    assert float(tempered[0, 0] / tempered[0, 1]) == pytest.approx(math.sqrt(odds), rel=1e-12)


def test_top_k_and_weights() -> None:
    np.testing.assert_allclose(selected(Equal(), [1.0, 3.0, 4.0], 2, "linear"), [0, 3 / 7, 4 / 7])
    np.testing.assert_allclose(selected(Equal(), [1.0, 3.0, 4.0], 2, "uniform"), [0, 0.5, 0.5])
    assert selected(Equal(), [0.0, 0.0], 0, "linear").tolist() == [0.5, 0.5]
    assert selected(Equal(), [2.0, 2.0, 1.0], 1, "linear").tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(NQMError, match="Equal: scores must be finite"):
        selected(Equal(), [float("nan"), 1.0], 0, "linear")


def test_one_module_of_weight_one_is_that_module_bit_for_bit() -> None:
    both = members()
    parts = TextParts(list, evidence=evidence())
    best = int(TfIdf()(both, evidence()).argmax())
    made = Linear(Scored(TfIdf(), 1))(both, parts).state
    assert all(torch.equal(value, made[name]) for name, value in both.state(best).items())


def test_mean_of_linear_modules_is_the_ensemble_of_logits() -> None:
    three = members("lora", 3)
    batches = list(evidence().batches)
    weights = [0.5, 0.3, 0.2]
    with torch.no_grad():
        merged = merge(three, weights=weights)(batches[0][0]).double().log_softmax(1)
    torch.testing.assert_close(
        merged, ensemble(three, batches, weights=weights, pool="logits"), rtol=1e-5, atol=1e-5
    )
    bent = members("bottleneck", 3)
    with torch.no_grad():
        merged = merge(bent, weights=weights)(batches[0][0]).double().log_softmax(1)
    pooled = ensemble(bent, batches, weights=weights, pool="logits")
    assert float((merged - pooled).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_training_changes_the_module_alone_and_stops_early(kind: str) -> None:
    torch.manual_seed(0)
    net = ModuleNet(4, 2, kind, 2)
    torch.nn.init.normal_(net.head.weight)
    x = torch.randn(80, 4)
    data = Examples(x, (x[:, 0] * x[:, 1] > 0).long())
    before = {n: v.clone() for n, v in net.state_dict().items()}
    with torch.no_grad():
        start = float(torch.nn.functional.cross_entropy(net(x), data.labels))
    config = FitConfig(lr=1e-2, epochs=5)
    state, epochs = train_module(net, data, data, config, torch.Generator().manual_seed(0))
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[n]) for n, value in net.state_dict().items())
    assert torch.equal(state["head.weight"], before["head.weight"])
    assert 1 <= epochs <= 5
    net.load_state_dict(state)
    with torch.no_grad():
        assert float(torch.nn.functional.cross_entropy(net(x), data.labels)) < start
    # Held-out labels that training makes worse: the start is kept, which is no module.
    torch.nn.init.zeros_(net.head.weight)
    net.load_state_dict(before)
    wrong = Examples(x, net(x).argmin(1))
    right = Examples(x, net(x).argmax(1))
    state, epochs = train_module(net, wrong, right, config, torch.Generator().manual_seed(0))
    assert epochs == 0
    assert torch.equal(net(x), before_logits(net, state, x))


def before_logits(net: ModuleNet, state: dict, x: torch.Tensor) -> torch.Tensor:
    made = ModuleNet(4, 2, net.kind, 2)
    made.load_state_dict(state)
    return made(x)


def test_bad_inputs_are_told() -> None:
    both = members()
    with pytest.raises(NQMError, match="give TextParts with evidence"):
        Scored()(both, TextParts(list))
    with pytest.raises(NQMError, match="at most the 2 modules; got 3"):
        Scored(Equal(), 3)(both, TextParts(list, evidence=evidence()))
    with pytest.raises(NQMError, match="for each of 3 modules; got 2"):
        Scored()(members(count=3), TextParts(list, evidence=evidence()))
    with pytest.raises(NQMError, match=r"Scored.weighting"):
        Scored(weighting="square")
    with pytest.raises(NQMError, match=r"Posterior.length_power"):
        Posterior(2.0)
    with pytest.raises(NQMError, match="got 0 texts"):
        Sample((), torch.zeros(0, 3))
    with pytest.raises(NQMError, match=r"ModuleNet.kind"):
        ModuleNet(3, 2, "prefix")
    with pytest.raises(NQMError, match=r"FitConfig.lr"):
        FitConfig(lr=0.0)
