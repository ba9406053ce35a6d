"""Mean of two networks of different weight decay: scope alignment beside its controls.

    python docs/examples/scope_barrier.py out/scope_barrier.csv

Two starts of a perceptron on the digits are trained with weight decay 1e-5 and 1e-3; five pairs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from neural.clients.scope import divergence, divergence_gradient, fused, layers, rescaled, scope_of
from neural.combine import Members
from neural.combine.align import ALIGNS, aligned
from neural.combine.data import Parts
from neural.combine.judge import repaired
from neural.combine.mean import mean_state
from neural.combine.repair import REPAIRS
from neural.data import evaluation_batches, load_images
from neural.evaluate import classification_metrics, predict

EPOCHS, BATCH, LR = 60, 32, 0.05
State = dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """How the two networks of a pair are trained."""

    decays: tuple[float, float] = (1e-5, 1e-3)
    strength: float = 0.0
    prox: float = 0.0
    rescale: bool = False


ARMS = {
    "decay 1e-5 and 1e-3": Arm(),
    "scope alignment, strength 0.1": Arm(strength=0.1),
    "scope alignment, 1": Arm(strength=1.0),
    "scope alignment, 10": Arm(strength=10.0),
    "pull to the own start, 0.001": Arm(prox=1e-3),
    "pull to the own start, 0.01": Arm(prox=1e-2),
    "decay 1e-5 in both": Arm((1e-5, 1e-5)),
    "decay 1e-3 in both": Arm((1e-3, 1e-3)),
    "rescaled to the mean scope after training": Arm(rescale=True),
}


def network(seed: int) -> nn.Module:
    """A perceptron 64-64-64-10."""
    torch.manual_seed(seed)
    hidden = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def fit(inputs: Tensor, labels: Tensor, seed: int, decay: float, arm: Arm) -> State:
    """Train by SGD with momentum, the rate falling linearly to 0."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    # The scope of torch's own start, U(-1 / sqrt(n), 1 / sqrt(n)): the same for both networks.
    targets = {
        name: torch.tensor([0.0, (3 * p.shape[1]) ** -0.5]) for name, p in layers(model).items()
    }
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=decay)
    steps = EPOCHS * -(-len(inputs) // BATCH)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(inputs), generator=generator).split(BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(
                nn.functional.cross_entropy(model(inputs[index]), labels[index])
            )
            for name, p in model.named_parameters():
                assert p.grad is not None
                if arm.strength and name in targets:
                    p.grad += arm.strength * divergence_gradient(p.detach(), targets[name])
                p.grad += arm.prox * (p.detach() - start[name])
            optimizer.step()
            falling.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def pair_of(states: list[State], arm: Arm) -> tuple[list[State], float]:
    """Both networks, rescaled if the arm says so, and the divergence of their scopes."""
    scopes = [{name: scope_of(w) for name, w in s.items() if w.ndim > 1} for s in states]
    common = fused(scopes, (0.5, 0.5))
    each = [float(divergence(scope[name], common[name])) for scope in scopes for name in common]
    if arm.rescale:
        states = [
            {name: rescaled(w, common[name]) if name in common else w for name, w in s.items()}
            for s in states
        ]
    return states, sum(each) / len(each)


def main(out: str) -> None:
    """Write one row for each pair, arm, alignment and repair."""
    digits = load_images("digits")
    train, test = (
        list(evaluation_batches(part, 450, digits.mean, digits.std))
        for part in (digits.train, digits.test)
    )
    inputs, labels = (torch.cat(part) for part in zip(*train, strict=True))
    parts, rows = Parts(test=lambda: test, train=lambda: train), []

    def metrics(model: nn.Module) -> dict[str, float]:
        return classification_metrics(*predict(model, test))

    for number in range(5):
        for name, arm in ARMS.items():
            states = [
                fit(inputs, labels, 2 * number + i, decay, arm)
                for i, decay in enumerate(arm.decays)
            ]
            states, apart = pair_of(states, arm)
            for align in ("none", "weights"):
                both = aligned(Members.of_states(network(0), states), ALIGNS[align](), parts)
                ends = pd.DataFrame([metrics(both.with_state(s)) for s in both.states()]).mean()
                for repair in ("none", "rescale"):
                    model = repaired(both, mean_state(both), REPAIRS[repair], parts)
                    mean = metrics(model)
                    rows.append(
                        {
                            "pair": number, "networks": name, "align": align, "repair": repair,
                            "scope_kl": apart, "ends_accuracy": ends["accuracy"],
                            "accuracy": mean["accuracy"], "height": mean["nll"] - ends["nll"],
                        }
                    )  # fmt: skip
        pd.DataFrame(rows).to_csv(out, index=False)


if __name__ == "__main__":
    main(sys.argv[1])
