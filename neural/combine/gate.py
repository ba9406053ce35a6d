"""Gates: weights of the members that depend on the example, learned on held-out data.

A gate is the softmax of linear functions of an example's features. It starts at equal weights and
is pulled back to them, so that it leaves them only as far as held-out data say it pays. Tyagi et
al. (2023, arXiv 2308.12272) call the ensemble "semi" if a small network gives the weights, and
"deep" if that network also sees outside knowledge and learns by rewards: the same gate here, with
more features and another `objective`.

Which objective is the better one is not open. The log score of a mixture can be differentiated, and
so can the expected reward of a member drawn from the gate: its gradient is a sum over N members.
REINFORCE estimates that sum from one draw. Its mean is the exact gradient and its variance is
above 0, so that it can only add noise. The expected reward is linear in the weights, too, so that
its best weights are those of a single member, not of an ensemble; only the pull prevents them. Both
are here because they were published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neural.evaluate.metrics import refuse_probabilities
from nqm.errors import NQMError, check_integer, check_number, check_word

#: Confidence beyond which a gate does not tell one from another, in nats of odds.
CERTAIN = 20.0
#: What a gate is trained by.
OBJECTIVES = ("log_score", "reward", "reinforce")


@dataclass(frozen=True)
class GateConfig:
    """How a gate is trained.

    Attributes
    ----------
    objective : {"log_score", "reward", "reinforce"}
        ``log_score``: the mixture's log-likelihood. ``reward``: the expected reward of a member
        drawn by the gate, by its exact gradient. ``reinforce``: the same from one draw at each
        example and step, with equal weights as the baseline (Williams 1992).
    penalty : float
        A member's reward is ``correct - penalty |confidence - correct|``, with ``correct`` 1 or 0
        and the probability of its class as confidence. Not used by ``log_score``.
    strengths : tuple of float
        Strengths of the L2 pull to equal weights, of which cross-validation on the held-out data
        chooses one by the mixture's loss; equal weights themselves are among the choices. One alone
        is taken as it is.
    folds : int
        Of the cross-validation.
    steps : int
        Of REINFORCE.
    lr : float
        Of REINFORCE (Adam, towards 0 in a straight line).
    seed : int
        Of folds and draws.
    """

    objective: str = "log_score"
    penalty: float = 1.0
    strengths: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0)
    folds: int = 5
    steps: int = 200
    lr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("GateConfig.objective", self.objective, OBJECTIVES)
        check_number("GateConfig.penalty", self.penalty, low=0.0)
        for strength in self.strengths:
            check_number("GateConfig.strengths", strength, low=0.0)
        if not self.strengths:
            raise NQMError("GateConfig.strengths must name one at least, e.g. [0.1]; got []")
        check_integer("GateConfig.folds", self.folds, 2)
        check_integer("GateConfig.steps", self.steps, 1)
        check_number("GateConfig.lr", self.lr, low=0.0, closed_low=False)
        check_integer("GateConfig.seed", self.seed, 0)


@dataclass(frozen=True)
class Gate:
    """A trained gate.

    Attributes
    ----------
    coefficients : Tensor of float64, shape (F, N)
        Of the features' linear functions, one for each member.
    center, scale : Tensor of float64, shape (F,)
        Features are used as ``(feature - center) / scale``.
    strength : float
        Of the pull to equal weights; infinite if these were chosen.
    """

    coefficients: Tensor
    center: Tensor
    scale: Tensor
    strength: float

    def __call__(self, features: Tensor) -> Tensor:
        """Weigh the members at each example.

        Parameters
        ----------
        features : Tensor, shape (n, F)

        Returns
        -------
        Tensor of float64, shape (n, N)
            > 0, rows summing to 1: the `weights` of a `neural.combine.pool.Pool`.

        Raises
        ------
        NQMError
            If the features do not fit or are not finite.
        """
        _check_features(features, len(self.center))
        return ((features.double() - self.center) / self.scale @ self.coefficients).softmax(-1)


def fit_gate(
    log_probs: Sequence[Tensor], labels: Tensor, features: Tensor, config: GateConfig | None = None
) -> tuple[Gate, Tensor]:
    """Train a gate on held-out data.

    A column of ones among the features is the gate's constant; without it and with features that
    are all 0 the weights are equal.

    Parameters
    ----------
    log_probs : sequence of N tensors, shape (n, C)
        Logits or log-probabilities of each member on data that it was not trained on.
    labels : Tensor of int64, shape (n,)
    features : Tensor, shape (n, F)
        Centred and scaled to unit variance; columns that do not vary are taken as they are.
    config : GateConfig, optional

    Returns
    -------
    gate : Gate
        Determined by the arguments, bit for bit on one machine.
    weights : Tensor of float64, shape (n, N)
        Weights on these data, each from a gate of this strength that was trained without the
        example's fold. What is fitted next, e.g. a temperature, would trust the gate's own weights
        on its training data too much.

    Raises
    ------
    NQMError
        If shapes do not fit, something is not finite, or there are fewer examples than folds.
    """
    config = config or GateConfig()
    at_label, rewards = _checked(log_probs, labels, config.penalty)
    n, members = at_label.shape
    _check_features(features, features.shape[-1], n)
    if n < config.folds:
        raise NQMError(f"a gate needs an example in each of {config.folds} folds; got {n}")
    center, scale = _standard(features.double())
    inputs = (features.double() - center) / scale
    data = _Data(inputs, at_label, rewards)
    equal = torch.full((n, members), -math.log(members), dtype=torch.float64)
    apart = {strength: _cross_fitted(data, strength, config) for strength in config.strengths}
    if len(apart) > 1:
        apart[math.inf] = equal
    losses = {strength: data.loss(rows) for strength, rows in apart.items()}
    best = min(losses, key=lambda strength: (losses[strength], -strength))
    found = torch.zeros(inputs.shape[1], members, dtype=torch.float64)
    if math.isfinite(best):
        found = _trained(data, best, config)
    return Gate(found, center, scale, best), apart[best].exp()


def confidences(log_probs: Sequence[Tensor]) -> Tensor:
    """How sure each member is of the class that it predicts: features of a gate for any data.

    Parameters
    ----------
    log_probs : sequence of N tensors, shape (n, C)
        Logits or log-probabilities of each member.

    Returns
    -------
    Tensor of float64, shape (n, N)
        Log-odds of the predicted class, 20 at most.
    """
    top = torch.stack([rows.double().log_softmax(-1).amax(-1) for rows in log_probs], 1)
    return (top - torch.log(-torch.expm1(top))).clamp(max=CERTAIN)


@dataclass(frozen=True)
class _Data:
    """Features, each member's log-probability of the label, and each member's reward."""

    inputs: Tensor
    at_label: Tensor
    rewards: Tensor

    def at(self, index: NDArray[np.int64]) -> _Data:
        where = torch.from_numpy(index)
        return _Data(self.inputs[where], self.at_label[where], self.rewards[where])

    def loss(self, log_weights: Tensor) -> float:
        """Loss of the mixture, in nats."""
        return -float((log_weights + self.at_label).logsumexp(-1).mean())


def _cross_fitted(data: _Data, strength: float, config: GateConfig) -> Tensor:
    """Logarithms of the weights, on each fold from a gate that was trained on the others."""
    from sklearn.model_selection import KFold

    found = torch.empty_like(data.at_label)
    parts = KFold(config.folds, shuffle=True, random_state=config.seed)
    for inside, outside in parts.split(data.inputs.numpy()):
        coefficients = _trained(data.at(inside), strength, config)
        where = torch.from_numpy(outside)
        found[where] = (data.inputs[where] @ coefficients).log_softmax(-1)
    return found


def _trained(data: _Data, strength: float, config: GateConfig) -> Tensor:
    """Coefficients that maximise the objective less ``strength / 2`` times their squared norm."""
    if config.objective == "reinforce":
        return _by_reinforce(data, strength, config)
    direction = _log_score if config.objective == "log_score" else _expected_reward
    return _by_gradient(data, strength, direction)


def _by_gradient(
    data: _Data, strength: float, direction: Callable[[Tensor, _Data], tuple[Tensor, Tensor]]
) -> Tensor:
    """Descend from equal weights with L-BFGS."""
    from scipy.optimize import minimize

    n, features = data.inputs.shape
    shape = features, data.at_label.shape[1]
    if not features:
        return torch.zeros(shape, dtype=torch.float64)

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        coefficients = torch.from_numpy(flat).view(shape)
        values, slopes = direction((data.inputs @ coefficients).log_softmax(-1), data)
        slope = strength * coefficients - data.inputs.T @ slopes / n
        value = strength / 2 * coefficients.square().sum() - values.mean()
        return float(value), slope.numpy().ravel()

    found = minimize(
        loss, np.zeros(math.prod(shape)), jac=True, method="L-BFGS-B",
        options={"ftol": 1e-12, "gtol": 1e-8},
    )  # fmt: skip
    return torch.from_numpy(np.asarray(found.x, dtype=np.float64)).view(shape)


def _log_score(log_weights: Tensor, data: _Data) -> tuple[Tensor, Tensor]:
    """Log score of the mixture at each example, and its slope along the gate's logits."""
    joint = log_weights + data.at_label
    return joint.logsumexp(-1), joint.softmax(-1) - log_weights.exp()


def _expected_reward(log_weights: Tensor, data: _Data) -> tuple[Tensor, Tensor]:
    weights = log_weights.exp()
    return (weights * data.rewards).sum(-1), reward_gradient(weights, data.rewards)


def reward_gradient(weights: Tensor, rewards: Tensor) -> Tensor:
    """Exact gradient of the expected reward of a member drawn from the gate.

    Parameters
    ----------
    weights : Tensor, shape (n, N)
        The gate's.
    rewards : Tensor, shape (n, N)
        Of each member.

    Returns
    -------
    Tensor, shape (n, N)
        Along the gate's logits, for each example: ``w_k (r_k - sum_j w_j r_j)``.
    """
    return weights * (rewards - (weights * rewards).sum(-1, keepdim=True))


def reinforce_gradient(weights: Tensor, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Estimate `reward_gradient` from one draw at each example (REINFORCE, Williams 1992).

    Parameters
    ----------
    weights : Tensor, shape (n, N)
        The gate's.
    rewards : Tensor, shape (n, N)
        Of each member; those that are not drawn enter the baseline, the reward at equal weights.
    generator : torch.Generator
        Draws the members.

    Returns
    -------
    Tensor, shape (n, N)
        ``(r_k - baseline) (one_k - w)`` for the member k that was drawn.
    """
    drawn = torch.multinomial(weights, 1, generator=generator)
    gain = rewards.gather(1, drawn) - rewards.mean(1, keepdim=True)
    one = torch.zeros_like(weights).scatter_(1, drawn, 1.0)
    return gain * (one - weights)


def _by_reinforce(data: _Data, strength: float, config: GateConfig) -> Tensor:
    """Ascend from equal weights along estimated gradients."""
    n, features = data.inputs.shape
    generator = torch.Generator().manual_seed(config.seed)
    coefficients = torch.zeros(features, data.at_label.shape[1], dtype=torch.float64)
    optimizer = torch.optim.Adam([coefficients], lr=config.lr)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * (1.0 - step / config.steps)
        weights = (data.inputs @ coefficients).softmax(-1)
        slopes = reinforce_gradient(weights, data.rewards, generator)
        coefficients.grad = strength * coefficients - data.inputs.T @ slopes / n
        optimizer.step()
    return coefficients


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Center and scale of each feature; 0 and 1 for one that does not vary."""
    if not features.shape[1]:
        return features.new_zeros(0), features.new_ones(0)
    scale = features.std(0, correction=0)
    # A constant has a deviation of rounding errors.
    varies = scale > 1e-12 * features.abs().amax(0)
    center = torch.where(varies, features.mean(0), 0.0)
    return center, torch.where(varies, scale, 1.0)


def _checked(log_probs: Sequence[Tensor], labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Each member's log-probability of the label and its reward, both (n, N)."""
    if not len(log_probs):
        raise NQMError("a gate needs members; got none")
    at_label, rewards = [], []
    for number, rows in enumerate(log_probs):
        where = f"gate: member {number}"
        if rows.ndim != 2 or labels.shape != rows.shape[:1]:
            raise NQMError(
                f"{where} has predictions {tuple(rows.shape)} for labels {tuple(labels.shape)}"
            )
        refuse_probabilities(where, rows)
        rows = rows.double().log_softmax(-1)
        if bool(rows.isnan().any()):
            raise NQMError(f"{where} has a prediction that is not a number")
        if labels.is_floating_point() or not bool(((labels >= 0) & (labels < rows.shape[1])).all()):
            raise NQMError(f"gate: labels must be whole numbers in 0..{rows.shape[1] - 1}")
        at_label.append(rows.gather(1, labels[:, None])[:, 0])
        confidence, predicted = rows.exp().max(1)
        correct = (predicted == labels).double()
        rewards.append(correct - penalty * (confidence - correct).abs())
    found = torch.stack(at_label, 1)
    if bool((found == -math.inf).all(1).any()):
        raise NQMError("gate: every member gives some label the probability 0")
    return found, torch.stack(rewards, 1)


def _check_features(features: Tensor, count: int, rows: int | None = None) -> None:
    if features.ndim != 2 or features.shape[1] != count or rows not in (None, len(features)):
        wanted = "n" if rows is None else rows
        raise NQMError(
            f"gate: features must have shape ({wanted}, {count}); got {tuple(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise NQMError("gate: features must be finite numbers")
