"""Rules that make one model of many by their weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neural.combine.data import Parts
from neural.combine.mean import combined, mean_state, refuse_factors, weighted_mean
from neural.combine.members import Members, State
from neural.combine.weigh import Best, Given, Greedy, InverseLoss, Uniform, Weigh
from nqm.errors import NQMError, check_integer, check_number, check_word


@dataclass(frozen=True)
class Merged:
    """One model made of many.

    Attributes
    ----------
    state : dict of str to Tensor
        Its state dict, before any repair.
    weights : Tensor or None
        Of the members, shape (N,); None if it is no weighted mean of them.
    """

    state: State
    weights: Tensor | None = None


class Merge(ABC):
    """A rule that merges weights.

    Attributes
    ----------
    ordered : bool
        True if the result depends on the order of the members. A class attribute.
    """

    ordered: ClassVar[bool] = False

    @property
    def selected_on(self) -> str:
        """Which labels it has seen: ``none``, ``train`` or ``held_out``."""
        return "held_out" if "held_out" in self.needs else "none"

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: ``train``, ``held_out``, ``ancestor``."""
        return ()

    @abstractmethod
    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Merge the members.

        Parameters
        ----------
        members : Members
        parts : Parts
            Data, as the rule needs them.

        Returns
        -------
        Merged
            A single member, weighted 1, comes back bit for bit.

        Raises
        ------
        NQMError
            If data or the ancestor are missing, or the members cannot be averaged.
        """


@dataclass(frozen=True)
class Linear(Merge):
    """A weighted mean of the members: a soup.

    Attributes
    ----------
    weigh : Weigh
    """

    weigh: Weigh = field(default_factory=Uniform)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: what its weights are chosen on."""
        return () if self.weigh.selected_on == "none" else (self.weigh.selected_on,)

    @property
    def ordered(self) -> bool:  # type: ignore[override]
        """Members of equal merit are tried in the order given."""
        return isinstance(self.weigh, Greedy | Best)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Average the members; see `Merge`."""
        weights = self.weigh(members, parts)
        return Merged(weighted_mean(members, weights), weights)


@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """Ancestor plus a multiple of the sum of displacements (Ilharco et al. 2023).

    With one member it is the line from the ancestor to it (WiSE-FT, Wortsman et al. 2022); with
    scale 1 / N the uniform soup.

    Attributes
    ----------
    scale : float
        Factor of the sum.
    """

    scale: float = 0.3

    def __post_init__(self) -> None:
        check_number("TaskArithmetic.scale", self.scale)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: the ancestor."""
        return ("ancestor",)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Add up the displacements; see `Merge`."""
        start = members.ancestor_state("task_arithmetic")
        count = len(members)
        mean = mean_state(members)
        total = self.scale * count
        # A multiple of exactly 1 is the soup itself, to the last bit.
        line = [(1.0 - total, start), (total, mean)]
        return Merged(mean if total == 1.0 else members.updated(combined(line), {}))


@dataclass(frozen=True)
class ModelStock(Merge):
    """The mean, drawn back towards the ancestor tensor by tensor (Jang et al. 2024).

    ``w = t mean + (1 - t) ancestor`` with ``t = N c / (1 + (N - 1) c)``, c the mean cosine between
    two members' displacements from the ancestor. On a noisy quadratic of equal curvature this is
    the factor that minimises the expected loss. A mean cosine below 0 is taken as 0.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: the ancestor."""
        return ("ancestor",)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Shrink the mean; see `Merge`."""
        start = members.ancestor_state("model_stock")
        if len(members) == 1:
            return Merged(members.state(0), torch.ones(1, dtype=torch.float64))
        mean = mean_state(members)
        cosine = _mean_cosines(members, start)
        changes = {}
        for name, c in cosine.items():
            t = len(members) * c / (1.0 + (len(members) - 1) * c)
            changes[name] = torch.lerp(start[name], mean[name], t)
        return Merged(members.updated(mean, changes))


def _mean_cosines(members: Members, start: State) -> dict[str, float]:
    """Mean cosine between two members' displacements, by parameter."""
    count = len(members)
    sums: dict[str, Tensor] = {}
    for state in members.states():
        for name in members.weight_names:
            moved = (state[name] - start[name]).double()
            length = float(moved.norm())
            unit = moved / length if length else moved
            sums[name] = sums[name] + unit if name in sums else unit
    pairs = count * (count - 1)
    return {name: max(0.0, (float(u.square().sum()) - count) / pairs) for name, u in sums.items()}


@dataclass(frozen=True)
class Fisher(Merge):
    """Mean weighted by each member's own diagonal Fisher information (Matena & Raffel 2022).

    ``w = sum_i F_i w_i / sum_i F_i``, elementwise: the minimum of the summed quadratics if their
    curvature is diagonal. Labels are drawn from the member's own predictions.

    Attributes
    ----------
    examples : int
        Training examples to estimate it on.
    floor : float
        Added to every F, so that weights without information are averaged plainly.
    normalise : bool
        Scale each member's information to norm 1 first, so that a sure member does not drown the
        others; False: as it is.
    seed : int
        Of the labels.
    """

    examples: int = 256
    floor: float = 1e-6
    normalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("Fisher.examples", self.examples, 1)
        check_integer("Fisher.seed", self.seed, 0)
        check_number("Fisher.floor", self.floor, low=0.0, closed_low=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: training data."""
        return ("train",)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Average by information; see `Merge`."""
        from neural.combine.information import fisher_diagonal

        if len(members) == 1:
            return Merged(members.state(0), torch.ones(1, dtype=torch.float64))
        refuse_factors(members.weight_names)
        train = parts.required("train", "fisher")
        top: State = {}
        bottom: State = {}
        for state in members.states():
            model = members.with_state(state)
            own = fisher_diagonal(model, train(), self.examples, seed=self.seed)
            norm = float(torch.cat([f.flatten() for f in own.values()]).norm())
            for name, f in own.items():
                share = (f / norm if self.normalise and norm else f) + self.floor
                weighted = share * state[name].double()
                top[name] = top[name] + weighted if name in top else weighted
                bottom[name] = bottom[name] + share if name in bottom else share
        changes = {name: top[name] / bottom[name] for name in top}
        return Merged(members.updated(mean_state(members), changes))


@dataclass(frozen=True)
class RegMean(Merge):
    """Least squares for every linear and convolutional layer (Jin et al. 2023).

    ``W = (sum_i G_i)^-1 sum_i G_i W_i`` with G_i = X'X of the layer's inputs in member i: the
    weight whose outputs are nearest to every member's own on its own inputs. All other weights,
    biases included, are averaged plainly.

    Attributes
    ----------
    examples : int
        Training examples whose inputs are taken.
    shrink : float
        Factor of the off-diagonal entries of G, in [0, 1]; 0.9 in the paper.
    """

    examples: int = 1000
    shrink: float = 0.9

    def __post_init__(self) -> None:
        check_integer("RegMean.examples", self.examples, 1)
        check_number("RegMean.shrink", self.shrink, low=0.0, high=1.0)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: training data."""
        return ("train",)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Solve the layers' least squares; see `Merge`."""
        from neural.combine.information import input_grams

        if len(members) == 1:
            return Merged(members.state(0), torch.ones(1, dtype=torch.float64))
        refuse_factors(members.weight_names)
        train = parts.required("train", "regmean")
        grams: dict[str, Tensor] = {}
        sides: dict[str, Tensor] = {}
        for state in members.states():
            model = members.with_state(state)
            for name, gram in input_grams(model, train(), self.examples).items():
                shrunk = self.shrink * gram + (1.0 - self.shrink) * torch.diag(gram.diagonal())
                side = shrunk @ state[name].double().flatten(1).T
                grams[name] = grams[name] + shrunk if name in grams else shrunk
                sides[name] = sides[name] + side if name in sides else side
        mean = mean_state(members)
        changes = {}
        for name, gram in grams.items():
            # Directions that no input has are averaged plainly.
            plain = mean[name].double().flatten(1).T
            step = torch.linalg.pinv(gram, hermitian=True) @ (sides[name] - gram @ plain)
            changes[name] = (plain + step).T.reshape(mean[name].shape)
        return Merged(members.updated(mean, changes))


@dataclass(frozen=True)
class Learned(Merge):
    """Soup whose weights are learned on held-out data, one set for every tensor.

    Softmax weights from equal logits and one scale of the model's logits, by AdamW (Wortsman et al.
    2022, appendix I). All members are in memory at once.

    Attributes
    ----------
    epochs : int
        Passes over the held-out data.
    lr : float
    """

    epochs: int = 5
    lr: float = 0.05

    def __post_init__(self) -> None:
        check_integer("Learned.epochs", self.epochs, 1)
        check_number("Learned.lr", self.lr, low=0.0, closed_low=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: held-out data."""
        return ("held_out",)

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Learn the weights; see `Merge`."""
        from torch.func import functional_call

        from neural.combine.repair import Statistics

        held_out = parts.required("held_out", "learned")
        if len(members) == 1:
            return Merged(members.state(0), torch.ones(1, dtype=torch.float64))
        refuse_factors(members.weight_names)
        mean = mean_state(members)
        model = members.with_state(mean)
        Statistics()(model, parts, members, None)
        model.eval()
        offsets = members.offsets(mean)
        shapes = [mean[name].shape for name in members.weight_names]
        sizes = [shape.numel() for shape in shapes]
        columns = torch.split(offsets, sizes, dim=1)
        logits = torch.zeros(len(sizes), len(members), requires_grad=True)
        scale = torch.ones((), requires_grad=True)
        optimizer = torch.optim.AdamW([logits, scale], lr=self.lr, weight_decay=0.0)

        def mixed() -> dict[str, Tensor]:
            shares = logits.softmax(1)
            return {
                name: mean[name] + (share.to(part.dtype) @ part).view(shape)
                for name, shape, share, part in zip(
                    members.weight_names, shapes, shares, columns, strict=True
                )
            }

        for _ in range(self.epochs):
            for inputs, targets in held_out():
                output = functional_call(model, mixed(), (inputs,), tie_weights=True)
                loss = nn.functional.cross_entropy(scale * output.flatten(0, -2), targets.flatten())
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            return Merged(members.updated(mean, mixed()))


OPTIMIZERS = ("gd", "adagrad", "adam", "adadelta")
PIVOTS = ("first", "soup", "ancestor", "best")
ORDERS = ("given", "shuffled")


@dataclass(frozen=True)
class AME(Merge):
    """Amortized model ensembling: an optimizer that descends towards the members (Lee & Ngo 2025).

    From a pivot x it follows the pseudogradient ``x - w_i``, one member after the other. GD at rate
    1 / i is the uniform soup, whatever the pivot (arXiv 2508.14832).

    Attributes
    ----------
    optimizer : {"gd", "adagrad", "adam", "adadelta"}
        Without weight decay: it would pull towards the origin.
    lr : float, optional
        Of all but "gd" for weights in units of the members' root mean square distance from their
        mean, by weight. None, for "gd" alone: 1 / i at step i.
    epochs : int
        Passes over the members.
    pivot : {"first", "soup", "ancestor", "best"}
        Where it starts; best: the member with the best held-out accuracy.
    order : {"given", "shuffled"}
        Of the members in each pass.
    batch : {"one", "all"}
        "all": the pseudogradient of the mean of all members, at every step.
    seed : int
        Of the order.
    """

    ordered: ClassVar[bool] = True

    optimizer: str = "gd"
    lr: float | None = None
    epochs: int = 1
    pivot: str = "first"
    order: str = "given"
    batch: str = "one"
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("AME.optimizer", self.optimizer, OPTIMIZERS)
        check_word("AME.pivot", self.pivot, PIVOTS)
        check_word("AME.order", self.order, ORDERS)
        check_word("AME.batch", self.batch, ("one", "all"))
        check_integer("AME.epochs", self.epochs, 1)
        check_integer("AME.seed", self.seed, 0)
        if self.lr is None and self.optimizer != "gd":
            raise NQMError(f"AME.lr is needed for optimizer = {self.optimizer!r}; got none")
        if self.lr is not None:
            check_number("AME.lr", self.lr, low=0.0, closed_low=False)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the members: the ancestor or held-out data, for its pivot."""
        return {"ancestor": ("ancestor",), "best": ("held_out",)}.get(self.pivot, ())

    def __call__(self, members: Members, parts: Parts) -> Merged:
        """Descend towards the members; see `Merge`."""
        if len(members) == 1:
            return Merged(members.state(0), torch.ones(1, dtype=torch.float64))
        refuse_factors(members.weight_names)
        merged = mean_state(members)
        names = members.weight_names
        unit = self._unit(members, merged)
        start = self._pivot(members, merged, parts)
        x = [(start[name] / unit).requires_grad_() for name in names]
        step = self._made(x)
        for count, target in enumerate(self._targets(members, merged), 1):
            if self.lr is None:
                step.param_groups[0]["lr"] = 1.0 / count
            for value, name in zip(x, names, strict=True):
                value.grad = value.detach() - target[name] / unit
            step.step()
        changes = {name: unit * value.detach() for name, value in zip(names, x, strict=True)}
        return Merged(members.updated(merged, changes))

    def _unit(self, members: Members, mean: State) -> float:
        """Unit of length in which the optimizer works; plain descent is the same in any."""
        if self.optimizer == "gd":
            return 1.0
        square, center = 0.0, members.flat(mean).double()
        for state in members.states():
            square += float((members.flat(state).double() - center).square().mean())
        return math.sqrt(square / len(members)) or 1.0

    def _pivot(self, members: Members, soup: State, parts: Parts) -> State:
        if self.pivot == "ancestor":
            return members.ancestor_state("AME with pivot = 'ancestor'")
        if self.pivot == "best":
            return weighted_mean(members, Best()(members, parts))
        return soup if self.pivot == "soup" else members.state(0)

    def _made(self, x: list[Tensor]) -> torch.optim.Optimizer:
        kinds: dict[str, Any] = {
            "gd": torch.optim.SGD,
            "adagrad": torch.optim.Adagrad,
            "adam": torch.optim.Adam,
            "adadelta": torch.optim.Adadelta,
        }
        made: torch.optim.Optimizer = kinds[self.optimizer](x, lr=self.lr or 1.0)
        return made

    def _targets(self, members: Members, soup: State) -> Iterator[State]:
        """What is descended to, step by step."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            if self.batch == "all":
                yield soup
                continue
            order = list(range(len(members)))
            if self.order == "shuffled":
                order = torch.randperm(len(members), generator=generator).tolist()
            yield from (members.state(i) for i in order)


#: Name in options and tables -> rule.
RULES: dict[str, Merge] = {
    "uniform": Linear(Uniform()),
    "best": Linear(Best()),
    "greedy": Linear(Greedy()),
    "greedy_nll": Linear(Greedy(criterion="nll")),
    "inverse_loss": Linear(InverseLoss()),
    "learned": Learned(),
    "fisher": Fisher(),
    "regmean": RegMean(),
    "stock": ModelStock(),
    "task_arithmetic": TaskArithmetic(),
    "ame": AME(),
    "ame_adagrad": AME(optimizer="adagrad", lr=0.3),
    "ame_adam": AME(optimizer="adam", lr=0.1),
}


def given(weights: tuple[float, ...]) -> Merge:
    """Soup with stated weights.

    Parameters
    ----------
    weights : tuple of float
        One a member, summing to 1.

    Returns
    -------
    Merge
    """
    return Linear(Given(weights))
