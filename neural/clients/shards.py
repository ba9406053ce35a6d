"""Shards of a labelled set of images: which client has which examples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from neural.data import Images
from nqm.errors import NQMError, check_integer, check_number

#: Draws before a split is given up.
TRIES = 1000


def dirichlet_shards(
    images: Images, count: int, concentration: float, *, seed: int = 0, least: int = 1
) -> list[Tensor]:
    """Divide images among clients, each class by shares of a Dirichlet distribution.

    For every class, shares of the clients are drawn from Dir(concentration, ..., concentration),
    as in Yurochkin et al. 2019. A draw in which a client has fewer than `least` images is repeated.

    Parameters
    ----------
    images : Images
        Each has a label.
    count : int
        Number of clients.
    concentration : float
        > 0. Small: most images of a class belong to one client; large: all clients are alike.
    seed : int
        Of the draws.
    least : int
        Smallest number of images of a client.

    Returns
    -------
    list of Tensor
        Indices of each client's images, increasing; every image is in one of them.

    Raises
    ------
    NQMError
        If images have no labels, there are too few of them, or no draw gives every client enough.
    """
    check_integer("count", count, 1)
    check_integer("least", least, 1)
    check_integer("seed", seed, 0)
    check_number("concentration", concentration, low=0.0, closed_low=False)
    labels = images.labels.cpu().numpy()
    if (labels < 0).any():
        raise NQMError("images without labels cannot be divided by class; choose a labelled set")
    if count * least > len(images):
        raise NQMError(
            f"clients.count must be at most {len(images) // least}, as each of the clients needs "
            f"{least} of {len(images)} images; got {count}"
        )
    # The purpose belongs to the key, so that no other draw of this seed is correlated with it.
    rng = np.random.default_rng(np.random.SeedSequence((seed, 0xD1)))
    for _ in range(TRIES):
        owner = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            mine = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(count, concentration))
            ends = np.rint(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
            for client, part in enumerate(np.split(mine, ends)):
                owner[part] = client
        if np.bincount(owner, minlength=count).min() >= least:
            return [torch.from_numpy(np.flatnonzero(owner == client)) for client in range(count)]
    raise NQMError(
        f"clients.dirichlet = {concentration:g} left a client with fewer than {least} images in "
        f"{TRIES} draws; raise it, or lower clients.count or clients.least_examples"
    )
