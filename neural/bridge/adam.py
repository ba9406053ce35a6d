"""Adam as heavy ball in other coordinates: a diagonal preconditioner is a change of problem.

Adam divides its mean gradient by sqrt(v) + eps, v being a mean of the squared gradients of
minibatches over some 1 / (1 - beta2) steps. With v at rest a step is

    m <- beta1 m + (1 - beta1) g,    w <- w - lr P m,    P = 1 / (sqrt(v) + eps),

which is heavy ball at the rate lr (1 - beta1), and at the effective rate lr, in the coordinates u,
w = P^(1/2) u: curvature P^(1/2) H P^(1/2), noise P^(1/2) C P^(1/2). At the checkpoint the squared
gradient of a minibatch has the mean v = C_ii / B + slope_i^2.

v is not quite at rest. With a minibatch gradient of variance v and of skewness s, its fluctuations
change two things. The mean of v^(-1/2) is larger by 3/8 of the relative variance of v, which for
Gaussian gradients is 2 (1 - beta2) / (1 + beta2). And the newest gradient is part of v, so that
g / sqrt(v) has the mean -(1 - beta2) s / 2: a drift, which over t steps of a flat direction moves
the weights by (1 - beta2) abs(s) sqrt(t) / 2 of what noise moves them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neural.bridge.config import ADAM, BridgeConfig, Training
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError

#: Largest mean share of the squared slope in v: descent would change v.
MOVING = 0.1
#: Weights with less than this fraction of the mean noise variance have no noise.
NOISELESS = 1e-12
#: Number of steps that Adam is told to have taken: beyond it no bias is left to correct.
LONG_AGO = 1e9


def second_moments(risk: EmpiricalRisk, batch_size: int) -> Tensor:
    """Mean squared gradient of a minibatch at the risk's weights, for every weight.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss.
    batch_size : int
        Number of examples of a minibatch, B, drawn with replacement.

    Returns
    -------
    Tensor, shape (p,)
        C_ii / B + slope_i^2, in the squared units of the gradient.

    Raises
    ------
    NQMError
        If a weight has no noise, or the slope is too large a part of the result.
    """
    total, squares = torch.zeros_like(risk.weights), torch.zeros_like(risk.weights)
    for gradients in risk.example_gradients():
        total += gradients.sum(0)
        squares += gradients.square().sum(0)
    noise = (squares / risk.examples - (total / risk.examples).square()) / batch_size
    still = int((noise <= NOISELESS * noise.mean()).sum())
    if still:
        raise NQMError(
            f"optimizer = 'adam': the gradient of {still} of {risk.size} weights has no noise, so "
            "that Adam's second moment has no stationary value; select other weights"
        )
    slope = risk.gradient().square()
    share = float((slope / (slope + noise)).mean())
    if share > MOVING:
        raise NQMError(
            f"optimizer = 'adam': the slope is {share:.0%} of the squared gradient of a minibatch, "
            "and descent changes Adam's second moments; set bridge.minimise, or a smaller batch"
        )
    return noise + slope


def preconditioned(
    risk: EmpiricalRisk, config: BridgeConfig, cache: Cache | None = None
) -> EmpiricalRisk:
    """The risk in the coordinates in which the configuration's optimizer is heavy ball or SGD.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss as a function of the weights.
    config : BridgeConfig
        Gives optimizer and batch size.
    cache : Cache, optional
        Stores the second moments.

    Returns
    -------
    EmpiricalRisk
        The risk itself unless the optimizer is Adam.

    Raises
    ------
    NQMError
        See `second_moments`.
    """
    if config.optimizer != ADAM:
        return risk
    size = config.batch_sizes[0]
    stored = (cache or Cache()).of(risk)(
        "second_moments", lambda: {"v": second_moments(risk, size).cpu().numpy()}, batch_size=size
    )
    v = torch.from_numpy(stored["v"]).to(risk.weights)
    return risk.rescaled((v.sqrt() + config.eps).rsqrt())


class AdamRuns:
    """`torch.optim.Adam` for independent runs, from the stationary second moments on.

    Parameters
    ----------
    risk : EmpiricalRisk
        Made by `preconditioned`.
    training : Training
        Gives rate, betas and eps.
    weights : Tensor, shape (runs, p)
        Where the runs start, in the risk's coordinates.
    """

    def __init__(self, risk: EmpiricalRisk, training: Training, weights: Tensor):
        assert risk.frame is not None
        self.risk, self.scale = risk, risk.frame[1]
        self.weights = torch.nn.Parameter(risk.model_weights(weights))
        betas = (training.momentum, training.beta2)
        self.optimizer = torch.optim.Adam(
            [self.weights], training.effective_lr, betas, training.eps
        )
        v = (self.scale**-2 - training.eps).square()
        self.optimizer.state[self.weights] = {
            "step": torch.tensor(LONG_AGO),
            "exp_avg": torch.zeros_like(self.weights),
            "exp_avg_sq": v.expand_as(self.weights).clone(),
        }

    def step(self, gradients: Tensor) -> Tensor:
        """Take one step of every run.

        Parameters
        ----------
        gradients : Tensor, shape (runs, p)
            Of the minibatches, in the risk's coordinates.

        Returns
        -------
        Tensor, shape (runs, p)
            The new weights, in the risk's coordinates.
        """
        self.weights.grad = gradients / self.scale
        self.optimizer.step()
        return self.risk.coordinates(self.weights.detach())
