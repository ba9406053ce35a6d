"""Adam as heavy ball in other coordinates: a diagonal preconditioner is a change of problem.

Adam divides its mean gradient by sqrt(v) + eps, v being a mean of the squared gradients of
minibatches over some 1 / (1 - beta2) steps. With v at rest a step is

    m <- beta1 m + (1 - beta1) g,    w <- w - lr P m,    P = 1 / (sqrt(v) + eps),

which is heavy ball at the rate lr (1 - beta1), and at the effective rate lr, in the coordinates u,
w = P^(1/2) u: curvature P^(1/2) H P^(1/2), noise P^(1/2) C P^(1/2). At the checkpoint the squared
gradient of a minibatch has the mean v = C_ii / B + slope_i^2.

AdamW pulls the weights by -lr weight_decay w beside this step. In u that is the gradient of
1/2 weight_decay u'u, whatever P is, and so AdamW is heavy ball on the loss with the weight decay
1/2 sum of weight_decay / P_ii w_i^2; v has no part of it. The pull does not pass through the
momentum. By elimination of m this is exactly heavy ball, at the momentum
beta1 (1 - lr weight_decay) in place of beta1: the difference is left out, and refused where it
matters (`check_decay`). Runs start with m at rest, at -weight_decay / P w, as heavy ball does.

v is not quite at rest. With a minibatch gradient of variance v and of skewness s, its fluctuations
change two things. The mean of v^(-1/2) is larger by 3/8 of the relative variance of v, which for
Gaussian gradients is 2 (1 - beta2) / (1 + beta2). And the newest gradient is part of v, so that
g / sqrt(v) has the mean -(1 - beta2) s / 2: a drift, which over t steps of a flat direction moves
the weights by (1 - beta2) abs(s) sqrt(t) / 2 of what noise moves them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neural.bridge.config import ADAMW, ADAPTIVE, BridgeConfig, Training
from neural.curvature.cache import Cache
from neural.curvature.risk import EmpiricalRisk
from nqm.errors import NQMError

#: Largest mean share of the squared slope in v: descent would change v.
MOVING = 0.1
#: Largest relative change of the effective rate by AdamW's decay, which has no momentum.
BYPASS = 0.01
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
        If a weight has no noise.
    """
    total, squares = torch.zeros_like(risk.weights), torch.zeros_like(risk.weights)
    for gradients in risk.example_gradients():
        total += gradients.sum(0)
        squares += gradients.square().sum(0)
    noise = (squares / risk.examples - (total / risk.examples).square()) / batch_size
    still = int((noise <= NOISELESS * noise.mean()).sum())
    if still:
        raise NQMError(
            f"optimizer: the gradient of {still} of {risk.size} weights has no noise, so that "
            "Adam's second moment has no stationary value; select other weights"
        )
    return noise + risk.gradient().square()


def decoupled(risk: EmpiricalRisk, config: BridgeConfig, v: Tensor | None = None) -> EmpiricalRisk:
    """The risk with the weight decay that the configuration's optimizer has.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss as a function of the weights.
    config : BridgeConfig
        Gives optimizer and batch size.
    v : Tensor, shape (p,), optional
        Second moments of Adam; by default those at the risk's weights.

    Returns
    -------
    EmpiricalRisk
        The risk itself unless the optimizer is AdamW, whose decay is weight_decay / P_ii.

    Raises
    ------
    NQMError
        See `second_moments`.
    """
    if config.optimizer != ADAMW:
        return risk
    if v is None:
        v = second_moments(_undecayed(risk), config.batch_sizes[0])
    return risk.decaying(v.sqrt() + config.eps)


def _undecayed(risk: EmpiricalRisk) -> EmpiricalRisk:
    return risk.decaying(torch.zeros_like(risk.weights))


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
        The risk itself unless the optimizer is Adam or AdamW.

    Raises
    ------
    NQMError
        If a weight has no noise, or the slope is too large a part of the second moments.
    """
    if config.optimizer not in ADAPTIVE:
        return risk
    size = config.batch_sizes[0]
    seen = _undecayed(risk) if config.optimizer == ADAMW else risk
    stored = (cache or Cache()).of(seen)(
        "second_moments", lambda: {"v": second_moments(seen, size).cpu().numpy()}, batch_size=size
    )
    v = torch.from_numpy(stored["v"]).to(risk.weights)
    share = float((seen.gradient().square() / v).mean())
    if share > MOVING:
        raise NQMError(
            f"optimizer = '{config.optimizer}': the slope is {share:.0%} of the squared gradient "
            "of a minibatch, and descent changes Adam's second moments; set bridge.minimise, or a "
            "smaller batch"
        )
    return decoupled(risk, config, v).rescaled((v.sqrt() + config.eps).rsqrt())


def check_decay(risk: EmpiricalRisk, trainings: Sequence[Training]) -> None:
    """Check that AdamW's weight decay, which bypasses the momentum, is slow enough for heavy ball.

    Parameters
    ----------
    risk : EmpiricalRisk
        Gives the weight decay.
    trainings : sequence of Training

    Raises
    ------
    NQMError
        If it changes the effective rate by more than `BYPASS`.
    """
    for training in trainings:
        change = training.effective_lr * risk.weight_decay / (1.0 - training.momentum)
        if training.optimizer == ADAMW and training.momentum * change > BYPASS:
            raise NQMError(
                f"weight_decay = {risk.weight_decay:.3g} at lr = {training.effective_lr:.3g}: "
                "AdamW's decay bypasses the momentum, and is too fast to be predicted; lower "
                "bridge.weight_decay, bridge.momentum or bridge.lr_times_sharpness"
            )


class AdamRuns:
    """Adam or AdamW for independent runs, from the stationary second moments on.

    All but AdamW's decay is done by `torch.optim.Adam`, which takes only one decay for all weights.

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
        self.lr, self.decoupled = training.effective_lr, training.optimizer == ADAMW
        betas = (training.momentum, training.beta2)
        self.optimizer = torch.optim.Adam([self.weights], self.lr, betas, training.eps)
        v = (self.scale**-2 - training.eps).square()
        self.optimizer.state[self.weights] = {
            "step": torch.tensor(LONG_AGO),
            "exp_avg": -self._decay(weights) / self.scale,
            "exp_avg_sq": v.expand_as(self.weights).clone(),
        }

    def _decay(self, weights: Tensor) -> Tensor:
        """Gradient of the decay that does not go through Adam, in the risk's coordinates."""
        if not self.decoupled:
            return torch.zeros_like(weights)
        return self.risk.decay_gradient(weights)

    def step(self, gradients: Tensor) -> Tensor:
        """Take one step of every run.

        Parameters
        ----------
        gradients : Tensor, shape (runs, p)
            Of the minibatches, weight decay included, in the risk's coordinates.

        Returns
        -------
        Tensor, shape (runs, p)
            The new weights, in the risk's coordinates.
        """
        decay = self._decay(self.risk.coordinates(self.weights.detach()))
        self.weights.grad = (gradients - decay) / self.scale
        with torch.no_grad():
            self.weights.sub_(self.lr * self.scale * decay)
        self.optimizer.step()
        return self.risk.coordinates(self.weights.detach())
