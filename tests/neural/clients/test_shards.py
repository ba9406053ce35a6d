"""Dirichlet shards: a partition, its distribution, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neural.clients import dirichlet_shards
from neural.data import Images
from nqm import NQMError


def images(labels: list[int] | torch.Tensor) -> Images:
    found = torch.as_tensor(labels, dtype=torch.int64)
    return Images(torch.zeros(len(found), 1, 2, 2, dtype=torch.uint8), found)


TEN = images([k % 10 for k in range(1000)])


@pytest.mark.parametrize("concentration", [0.05, 0.5, 100.0])
def test_every_image_is_in_one_shard(concentration: float) -> None:
    shards = dirichlet_shards(TEN, 7, concentration, seed=4, least=5)
    assert len(shards) == 7
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(1000))
    assert min(map(len, shards)) >= 5
    again = dirichlet_shards(TEN, 7, concentration, seed=4, least=5)
    assert all(torch.equal(a, b) for a, b in zip(shards, again, strict=True))
    other = dirichlet_shards(TEN, 7, concentration, seed=5, least=5)
    assert any(not torch.equal(a, b) for a, b in zip(shards, other, strict=True))


def test_one_client_has_all() -> None:
    (shard,) = dirichlet_shards(TEN, 1, 0.1)
    assert torch.equal(shard, torch.arange(1000))


@pytest.mark.parametrize("concentration", [0.2, 3.0])
def test_a_clients_share_of_a_class_is_beta_distributed(concentration: float) -> None:
    """Of two clients: mean 1/2, variance 1 / (4 (2 a + 1)), fourth moment known as well."""
    classes, each = 2000, 50
    many = images(torch.arange(classes).repeat_interleave(each))
    first, _ = dirichlet_shards(many, 2, concentration, seed=1)
    share = np.bincount(many.labels[first].numpy(), minlength=classes) / each
    a = concentration
    variance = 1 / (4 * (2 * a + 1))
    fourth = variance**2 * (3 - 6 / (2 * a + 3))  # a Beta(a, a)'s excess kurtosis is -6 / (2a + 3)
    assert abs(share.mean() - 0.5) < 4.5 * np.sqrt(variance / classes)
    # Rounding to whole images adds up to 1 / (12 each^2).
    error = 4.5 * np.sqrt((fourth - variance**2) / classes) + 1 / (12 * each**2)
    assert abs(np.mean((share - 0.5) ** 2) - variance) < error


@pytest.mark.parametrize(
    ("which", "count", "concentration", "least", "message"),
    [
        (TEN, 101, 1.0, 10, "clients.count must be at most 100"),
        (images([0, 1] * 20), 10, 1e-3, 4, "fewer than 4 images in 1000 draws"),
        (images([0, 1, -1]), 2, 1.0, 1, "images without labels"),
        (TEN, 0, 1.0, 1, "count must be"),
        (TEN, 2, 0.0, 1, "concentration must lie in"),
    ],
)
def test_refused(which: Images, count: int, concentration: float, least: int, message: str) -> None:
    with pytest.raises(NQMError, match=message) as error:
        dirichlet_shards(which, count, concentration, least=least)
    assert "\n" not in str(error.value)
