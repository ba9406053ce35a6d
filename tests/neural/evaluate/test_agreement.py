"""Agreement of classifiers: against scikit-learn, SciPy and hand-worked tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from sklearn import metrics

from neural.evaluate import (
    kappa,
    kappa_matrix,
    macro_f1,
    mcnemar,
    paired_bootstrap,
    paired_difference,
)
from nqm import NQMError
from tests.tolerances import IDENTITY


def predictions(*classes: int, of: int = 3) -> torch.Tensor:
    """Log-probabilities whose most probable classes are these."""
    return torch.nn.functional.one_hot(torch.tensor(classes), of).double() * 2.0


def drawn(seed: int, n: int = 200, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)


def test_macro_f1_and_kappa_against_scikit_learn():
    rows, labels = drawn(0)
    predicted = rows.argmax(1)
    assert macro_f1(rows, labels) == metrics.f1_score(labels, predicted, average="macro")
    assert kappa(rows, labels) == metrics.cohen_kappa_score(labels, predicted)
    labels[::3] = -100  # left out
    kept = labels >= 0
    assert kappa(rows, labels) == metrics.cohen_kappa_score(labels[kept], predicted[kept])


def test_kappa_of_a_table_worked_out_by_hand():
    # Cohen's formula: observed agreement 35/50, by chance .5 * .6 + .5 * .4 = .5; kappa .4.
    truth = torch.tensor([0] * 25 + [1] * 25)
    rows = predictions(*[0] * 20, *[1] * 5, *[0] * 10, *[1] * 15, of=2)
    assert kappa(rows, truth) == pytest.approx(0.4, abs=IDENTITY)
    # F1: 2 * 20 / (30 + 25) and 2 * 15 / (20 + 25).
    assert macro_f1(rows, truth) == pytest.approx((40 / 55 + 30 / 45) / 2, abs=IDENTITY)


def test_kappa_of_one_class_alone_is_not_defined():
    assert math.isnan(kappa(predictions(1, 1, 1), torch.tensor([1, 1, 1])))
    assert kappa(predictions(1, 1, 1), torch.tensor([1, 0, 1])) == 0.0


def test_kappa_matrix_is_symmetric_with_ones():
    each = [drawn(seed)[0] for seed in range(3)]
    labels = drawn(0)[1]
    found = kappa_matrix(each, labels)
    assert np.allclose(np.diag(found), 1.0, atol=IDENTITY)
    assert np.allclose(found, found.T, rtol=0, atol=IDENTITY)
    assert found[0, 2] == metrics.cohen_kappa_score(each[0].argmax(1), each[2].argmax(1))


def test_mcnemar_is_the_exact_binomial_test():
    truth = torch.zeros(20).long()
    a = predictions(*[0] * 15, *[1] * 5)
    b = predictions(*[0] * 7, *[1] * 8, *[0] * 2, *[1] * 3)
    found = mcnemar(a, b, truth)
    assert (found.first, found.second) == (8, 2)
    # Both tails of a fair coin: 2 P(X <= 2) of 10.
    assert found.p_value == pytest.approx(2 * binom.cdf(2, 10, 0.5), abs=IDENTITY)
    assert mcnemar(a, a, truth) == (0, 0, 1.0)


def test_bootstrap_interval_of_a_mean_is_the_normal_one_for_many_examples():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1.0, 4000), rng.exponential(1.0, 4000)
    found = paired_bootstrap(a, b, resamples=4000, seed=1)
    plain = paired_difference(a, b)
    assert (found.mean, found.sd, found.n) == (plain.mean, plain.sd, 4000)
    error = plain.sd / math.sqrt(4000)
    # An end of 4,000 resamples is uncertain by sqrt(p (1 - p) / 4000) / density: .042 errors.
    for end, side in ((found.low, -1), (found.high, 1)):
        assert abs(end - (plain.mean + side * norm.ppf(0.975) * error)) < 5 * 0.042 * error
    assert found == paired_bootstrap(a, b, resamples=4000, seed=1)
    assert found != paired_bootstrap(a, b, resamples=4000, seed=2)


def test_bootstrap_of_equal_differences_has_no_width():
    found = paired_bootstrap([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert paired_bootstrap([1.0], [0.5]).mean == 0.5


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: paired_bootstrap([1.0, 2.0], [1.0]), "must pair up"),
        (lambda: paired_bootstrap([1.0, math.nan], [1.0, 2.0]), "must be finite"),
        (lambda: paired_bootstrap([1.0], [1.0], resamples=0), "resamples must be"),
        (lambda: paired_bootstrap([1.0], [1.0], resamples=10**9), "at most 1,000,000"),
        (lambda: paired_bootstrap([1.0], [1.0], level=1.0), "level must"),
        (lambda: kappa(torch.full((2, 3), math.nan), torch.tensor([0, 1])), "2 of 2 rows"),
        (lambda: macro_f1(torch.zeros(2, 3), torch.tensor([0, 3])), "labels must lie in 0..2"),
        (lambda: macro_f1(torch.zeros(2, 3), torch.tensor([-100, -100])), "no example is left"),
        (
            lambda: mcnemar(torch.zeros(2, 3), torch.zeros(2, 2), torch.tensor([0, 1])),
            r"one shape; got \(2, 3\) and \(2, 2\)",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(call, says):
    with pytest.raises(NQMError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)
