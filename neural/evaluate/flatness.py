"""Flatness of a minimum: the rise of the loss when every weight gets relative Gaussian noise.

Noise is proportional to the weight, w (1 + sigma eps). Unlike with additive noise, the result does
not change if a layer's weights are rescaled. To second order the mean rise is sigma^2 / 2 sum_i
H_ii w_i^2. Noise is drawn in pairs +eps and -eps, whose mean has no term linear in sigma: where the
gradient is not zero, as on test data, that term would exceed the rise at small sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from neural.evaluate.state import Loss, Recompute, borrowed, scorer
from nqm.errors import NQMError, check_integer, check_number


@dataclass(frozen=True)
class LossRise:
    """Rise of the loss under relative weight noise of one size.

    Attributes
    ----------
    sigma : float
        Standard deviation of the noise, relative to each weight.
    loss : float
        Loss without noise.
    rises : tuple of float
        Loss with noise minus `loss`, for each draw (the mean of +eps and -eps).
    """

    sigma: float
    loss: float
    rises: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean rise over the draws."""
        return float(np.mean(self.rises))

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`; NaN for one draw."""
        n = len(self.rises)
        with np.errstate(invalid="ignore"):  # a network may overflow under much noise
            return float(np.std(self.rises, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def loss_rise(
    model: nn.Module,
    loss: Loss,
    sigmas: Sequence[float],
    samples: int = 10,
    *,
    seed: int = 0,
    names: Iterable[str] | None = None,
    recompute: Recompute | None = None,
) -> list[LossRise]:
    """Measure the loss at w (1 + sigma eps), eps ~ N(0, 1), minus the loss at w.

    A draw takes two evaluations, at +eps and -eps. All sigmas share their draws of eps, so that
    curves over sigma and, for models of one architecture, differences between models are less noisy
    than single values.

    Parameters
    ----------
    model : Module
        The model. It is restored bit for bit, also after an exception.
    loss : batches or callable
        Batches over which cross-entropy is averaged in eval mode, or ``loss(model) -> float``.
    sigmas : sequence of float
        Standard deviations of the noise, relative to each weight; each >= 0.
    samples : int
        Number of draws of eps, at least 1.
    seed : int
        Seed of the draws. They are made on the CPU and do not depend on the device.
    names : iterable of str, optional
        Names of the parameters that get noise; by default all of real or complex numbers. Real and
        imaginary part of a complex weight are two weights.
    recompute : callable, optional
        ``recompute(model)`` is called before every evaluation, the one without noise included, e.g.
        to recompute BatchNorm statistics. Without it buffers do not change.

    Returns
    -------
    list of LossRise
        One for each sigma, in order.

    Raises
    ------
    NQMError
        If `samples`, a sigma or a name is wrong, or `loss` is an iterator.
    """
    check_integer("loss_rise: samples", samples, 1)
    for sigma in sigmas:
        check_number("loss_rise: sigma", sigma, low=0)
    parameters = dict(model.named_parameters())
    chosen = set(parameters) if names is None else set(names)
    if chosen - set(parameters):
        raise NQMError(
            f"loss_rise: names must be parameters of the model; got {min(chosen - set(parameters))}"
            "; list(dict(model.named_parameters())) lists them"
        )
    weights = [
        torch.view_as_real(p.detach()) if p.is_complex() else p
        for name, p in parameters.items()
        if name in chosen and (p.is_floating_point() or p.is_complex())
    ]
    if not weights:
        raise NQMError(
            "loss_rise: names must include a weight of real or complex numbers; got none of them"
        )
    run, rng = scorer(loss), torch.Generator().manual_seed(seed)
    rises: list[list[float]] = [[] for _ in sigmas]
    with borrowed(model) as restore:

        def at_current() -> float:
            if recompute is not None:
                recompute(model)
            value = run(model).loss
            restore()
            return value

        base = at_current()
        for _ in range(samples):
            noise = [torch.randn(w.shape, generator=rng, dtype=w.dtype).to(w) for w in weights]
            for sigma, of_sigma in zip(sigmas, rises, strict=True):
                losses = []
                for size in (sigma, -sigma):
                    with torch.no_grad():
                        for weight, eps in zip(weights, noise, strict=True):
                            weight.addcmul_(weight, eps, value=size)
                    losses.append(at_current())
                of_sigma.append(sum(losses) / 2 - base)
    return [LossRise(float(s), base, tuple(r)) for s, r in zip(sigmas, rises, strict=True)]
