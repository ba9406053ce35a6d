"""Weighted sums of state dicts against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import torch

from neural.training.weighted_sum import add_weighted


def test_sums_in_double_precision_do_not_lose_small_terms() -> None:
    """2^24 + 1 is no float32: a sum in float32 drops the 1, in whatever order."""
    values = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([-(2.0**24)])]
    terms = [(1.0, {"w": value}) for value in values]
    assert add_weighted(terms)["w"].item() == 0.0
    total = add_weighted(terms, double=True)["w"]
    assert total.item() == 1.0
    assert total.dtype == torch.float64


def test_half_precision_is_summed_in_float32() -> None:
    """A third of 0.1, three times: its error is less than two units of float32."""
    value = torch.tensor([0.1], dtype=torch.float16)
    total = add_weighted((1 / 3, {"w": value}) for _ in range(3))["w"]
    assert total.dtype == torch.float32
    assert abs(Fraction(total.item()) - Fraction(value.item())) <= Fraction(2) ** -26


def test_of_whole_numbers_the_largest_is_taken_and_no_term_changes() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(7)}
    other = {"w": torch.tensor([3.0, 5.0]), "count": torch.tensor(4)}
    total = add_weighted([(0.25, other), (0.75, one)])
    assert total["w"].tolist() == [1.5, 2.75]
    assert total["count"].item() == 7
    total["w"].zero_()
    total["count"].zero_()
    assert one["w"].tolist() == [1.0, 2.0]
    assert one["count"].item() == 7
    assert other["count"].item() == 4
