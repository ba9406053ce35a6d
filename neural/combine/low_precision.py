"""Low-precision ensembles: members made of one model by rounding its weights at random.

LPE-BSR (Nam & Lee 2024) rounds every weight up or down at random, so that the mean over draws is
the weight, and pools the predictions of several draws. No training is needed, and a draw is given
by a seed. Gaussian noise of the same variance and rounding to nearest are the controls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from neural.combine.cells import Cells, described
from neural.combine.comparison import NONE, OUTSIDE, SURROGATE
from neural.combine.data import Parts
from neural.combine.information import spread_examples
from neural.combine.judge import Judge
from neural.combine.mean import mean_state
from neural.combine.members import Member, Members, State
from neural.combine.pool import POOLS
from neural.combine.surrogate import Surrogate
from neural.data.sampling import keyed_generator
from neural.evaluate import classification_metrics
from neural.evaluate.temperature import tuned_nll
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

GRANULARITIES = ("channel", "tensor")
ROUNDINGS = ("stochastic", "nearest", "antithetic", "gaussian")
#: Bits of a grid: one for the sign at least and one for the size; integers of 16 at most.
FEWEST, MOST = 2, 16
#: Bits of a number that is not rounded.
FLOAT_BITS = 32
#: Layers whose scales and shifts stay as they are, whatever their shape.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

#: Columns of the table, in order.
LOW_PRECISION = (
    "rule",
    "space",
    "rounding",
    "grid_bits",
    "members",
    "data",
    "accuracy",
    "nll",
    "nll_tuned",
    "temperature",
    "ece",
    "brier",
    "mean_member_nll",
    "ambiguity",
    "passes",
    "bits",
    "predicted",
    "predicted_ambiguity",
    "predicted_from",
)


@dataclass(frozen=True)
class SeededRounding:
    """Draws of one model on a symmetric uniform grid; a draw is a seed and a number.

    The pitch of the grid is ``D = max|w| / (2^(bits - 1) - 1)``, of each output channel or of the
    whole tensor. Parameters with two axes or more are rounded; biases, and all of normalising
    layers, stay as they are. With f the fraction of w / D:

    - ``stochastic``: up with probability f, each weight for itself; unbiased, variance D^2 f(1-f).
    - ``antithetic``: the same in pairs, the second of which uses 1 - u where the first uses u.
    - ``gaussian``: no grid, normal noise of that variance.
    - ``nearest``: to the nearest point (RTN); there is one draw only.

    Attributes
    ----------
    bits : int
        Of a weight on the grid, 2 to 16.
    granularity : {"channel", "tensor"}
        What has a pitch of its own.
    rounding : {"stochastic", "nearest", "antithetic", "gaussian"}
    draws : int
        Members; even if ``antithetic``, and 1 of them if ``nearest``.
    seed : int
    """

    bits: int = 8
    granularity: str = "channel"
    rounding: str = "stochastic"
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _check_bits("SeededRounding.bits", self.bits)
        check_word("SeededRounding.granularity", self.granularity, GRANULARITIES)
        check_word("SeededRounding.rounding", self.rounding, ROUNDINGS)
        check_integer("SeededRounding.draws", self.draws, 1)
        check_integer("SeededRounding.seed", self.seed, 0)
        if self.rounding == "antithetic" and self.draws % 2:
            raise NQMError(
                f"SeededRounding.draws must be even for antithetic pairs; got {self.draws}"
            )

    def members(self, base: Members) -> Members:
        """The draws, as members that are drawn again whenever their weights are read.

        Parameters
        ----------
        base : Members
            One member: the model that is rounded.

        Returns
        -------
        Members
            Of the same architecture; one only if ``rounding = "nearest"``.

        Raises
        ------
        NQMError
            If `base` has several members, or nothing in it can be rounded.
        """
        if len(base) != 1:
            raise NQMError(f"low precision is about one model; got {len(base)}, name one of them")
        axes = rounded_axes(base.model)
        origin = base[0]
        count = 1 if self.rounding == "nearest" else self.draws

        def drawn(index: int) -> Member:
            return Member(
                f"{origin.name} {self.rounding} {self.bits} bits {index}",
                lambda: self.draw(base, base.state(0), index, axes),
                0.0,
                (origin.name, origin.epochs_all),
                origin.source,
            )

        return Members(base.model, [drawn(index) for index in range(count)], base.ancestor)

    def draw(
        self, members: Members, state: Mapping[str, Tensor], index: int, axes: Mapping[str, int]
    ) -> State:
        """Weights of one draw.

        Parameters
        ----------
        members : Members
            For the architecture.
        state : mapping of str to Tensor
            State dict of the model that is rounded.
        index : int
            Number of the draw, from 0.
        axes : mapping of str to int
            See `rounded_axes`.

        Returns
        -------
        dict of str to Tensor
        """
        paired = self.rounding == "antithetic"
        generator = keyed_generator(self.seed, index // 2 if paired else index)
        mirrored = paired and index % 2 == 1
        changes = {
            name: self._rounded(state[name], axis, generator, mirrored)
            for name, axis in axes.items()
        }
        return members.updated(state, changes)

    def _rounded(
        self, value: Tensor, axis: int, generator: torch.Generator, mirror: bool
    ) -> Tensor:
        levels = 2 ** (self.bits - 1) - 1
        wide = value.double()
        over = [d for d in range(wide.ndim) if d != axis or self.granularity == "tensor"]
        top = wide.abs().amax(over, keepdim=True)
        # A channel of zeros stays one. Rounding of the quotient must not lead out of the grid.
        scaled = torch.where(top > 0, wide * levels / top, 0.0).clamp(-levels, levels)
        lower = scaled.round() if self.rounding == "nearest" else scaled.floor()
        fraction = scaled - lower
        made: Tensor = lower * top / levels
        if self.rounding == "gaussian":
            normal = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
            made = wide + top / levels * (fraction * (1.0 - fraction)).sqrt() * normal
        elif self.rounding != "nearest":
            u = torch.rand(wide.shape, generator=generator, dtype=torch.float64)
            made = (lower + ((1.0 - u if mirror else u) < fraction)) * top / levels
        return made

    def held_bits(self, model: nn.Module, members: int) -> float:
        """Bits that some draws hold, for each weight of the architecture.

        Members on a grid share its pitches and all that is not rounded, in 32 bits each.

        Parameters
        ----------
        model : Module
        members : int
            How many draws are kept.

        Returns
        -------
        float
        """
        axes = rounded_axes(model)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        rounded = sum(sizes[name] for name in axes)
        rest = sum(sizes.values()) - rounded
        if self.rounding == "gaussian":
            return FLOAT_BITS * (members * rounded + rest) / (rounded + rest)
        each = self.granularity == "channel"
        pitches = sum(
            model.get_parameter(name).shape[axis] if each else 1 for name, axis in axes.items()
        )
        return (members * self.bits * rounded + FLOAT_BITS * (rest + pitches)) / (rounded + rest)


def rounded_axes(model: nn.Module) -> dict[str, int]:
    """Parameters that are rounded, and the axis of their output channels.

    Parameters
    ----------
    model : Module

    Returns
    -------
    dict of str to int

    Raises
    ------
    NQMError
        If there is none, or one has numbers that are complex or of less than 32 bits.
    """
    kept, turned = set(), set()
    for layer in model.modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if isinstance(layer, _NORMS):
            kept |= own
        elif isinstance(layer, _ConvTransposeNd):  # its weight has the inputs first
            turned |= own
    axes = {}
    for name, p in model.named_parameters():
        if p.ndim < 2 or not p.numel() or id(p) in kept:
            continue
        if p.dtype not in (torch.float32, torch.float64):
            raise NQMError(
                f"{name!r} is {p.dtype}, on which no grid can be laid; convert the model to float32"
            )
        axes[name] = int(id(p) in turned)
    if not axes:
        raise NQMError(f"{type(model).__name__} has no weight with two axes or more to round")
    return axes


@dataclass(frozen=True)
class LowPrecisionConfig:
    """Settings of a study of low precision: the table ``[low_precision]``.

    Attributes
    ----------
    bits : tuple of int
        Of a weight, 2 to 16; each is studied.
    draws : int
        Most members of an ensemble; 1, 2, 4, ... of them are pooled as well.
    granularity : {"channel", "tensor"}
    rounding : tuple of str
        See `SeededRounding`; each is studied.
    seed : int
        Of the draws, and of the held-out part.
    held_out : float
        Share of the test images on which temperatures are tuned; results are those on the others.
        0: none, and temperatures are tuned two-fold.
    predict : bool
        Whether losses are predicted from derivatives at the model (`neural.combine.surrogate`).
    predict_examples : int
        Test examples at which the derivatives are taken.
    """

    bits: tuple[int, ...] = (8, 6, 5, 4)
    draws: int = 16
    granularity: str = "channel"
    rounding: tuple[str, ...] = ROUNDINGS
    seed: int = 0
    held_out: float = 0.0
    predict: bool = True
    predict_examples: int = 1000

    def __post_init__(self) -> None:
        for name in ("bits", "rounding"):
            values = getattr(self, name)
            if not values:
                raise NQMError(f"LowPrecisionConfig.{name} must name one at least; got []")
            if len(set(values)) < len(values):
                raise NQMError(f"LowPrecisionConfig.{name} names one twice: {list(values)}")
        for bits in self.bits:
            _check_bits("LowPrecisionConfig.bits", bits)
        for rounding in self.rounding:
            check_word("LowPrecisionConfig.rounding", rounding, ROUNDINGS)
        check_word("LowPrecisionConfig.granularity", self.granularity, GRANULARITIES)
        check_integer("LowPrecisionConfig.draws", self.draws, 1)
        if "antithetic" in self.rounding and self.draws % 2:
            raise NQMError(
                f"LowPrecisionConfig.draws must be even for antithetic pairs; got {self.draws}"
            )
        check_integer("LowPrecisionConfig.seed", self.seed, 0)
        check_number(
            "LowPrecisionConfig.held_out", self.held_out, low=0.0, high=1.0, closed_high=False
        )
        check_integer("LowPrecisionConfig.predict_examples", self.predict_examples, 1)

    def producers(self) -> Iterator[SeededRounding]:
        """What makes the draws: each number of bits with each kind of rounding.

        Yields
        ------
        SeededRounding
        """
        for bits in self.bits:
            for rounding in self.rounding:
                draws = 1 if rounding == "nearest" else self.draws
                yield SeededRounding(bits, self.granularity, rounding, draws, self.seed)


def _check_bits(where: str, bits: int) -> None:
    check_integer(where, bits, FEWEST)
    if bits > MOST:
        raise NQMError(f"{where} must be at most {MOST}; got {bits}")


def low_precision(
    base: Members,
    parts: Parts,
    config: LowPrecisionConfig | None = None,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Ensembles of low-precision draws of one model beside the model, its rounding and their mean.

    Parameters
    ----------
    base : Members
        One member: the model.
    parts : Parts
        Data; `held_out` for temperatures, if there is some.
    config : LowPrecisionConfig, optional
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called repeatedly as ``progress(stage, share)``.

    Returns
    -------
    DataFrame
        One row for each model, with the columns `LOW_PRECISION`:

        - ``rule``: ``float`` (the model itself), ``rtn`` (rounded to nearest), ``mean_member`` (the
          draws' own metrics, averaged), ``ensemble`` (of the first ``members`` draws) or
          ``weight_mean`` (of all draws).
        - ``grid_bits``: of a weight on the grid, 0 for ``float``; ``bits``: all bits that are held,
          for each weight of the architecture; ``passes``: forward passes a prediction costs.
        - ``ambiguity``: how much lower the loss is than that of the draws, on average.
        - ``predicted``, ``predicted_ambiguity``: by `neural.combine.surrogate` about the model, for
          these very draws; ``predicted_from``: whether that is to be believed.

    Raises
    ------
    NQMError
        If there are several models, or nothing can be rounded; told before any work.
    """
    import pandas as pd

    config = config or LowPrecisionConfig()
    study = _Study(base, parts, config, cells or Cells())
    producers = list(config.producers())
    drawn = [producer.members(base) for producer in producers]
    more = counted(progress, "models", float(sum(map(len, drawn)) + len(drawn) + 1))
    rows = [study.plain_row()]
    more(1)
    for producer, members in zip(producers, drawn, strict=True):
        rows += study.rows(producer, members, more)
    return pd.DataFrame(rows, columns=list(LOW_PRECISION))


@dataclass(frozen=True)
class _Draws:
    """One kind of draws, and what is known of each."""

    producer: SeededRounding
    single: list[dict[str, float]]
    surrogate: Surrogate | None
    told: str

    def stated(self, rule: str, members: int) -> dict[str, Any]:
        """Entries of a row that say what it is about."""
        return {
            "rule": rule,
            "rounding": self.producer.rounding,
            "grid_bits": self.producer.bits,
            "members": members,
            "data": "test",
            "predicted_from": self.told,
        }


class _Study:
    """One call of `low_precision`."""

    def __init__(
        self,
        base: Members,
        parts: Parts,
        config: LowPrecisionConfig,
        cells: Cells,
    ):
        if len(base) != 1:
            raise NQMError(f"low precision is about one model; got {len(base)}, name one of them")
        rounded_axes(base.model)
        self.base, self.parts, self.config = base, parts, config
        self.sets = {"test": parts.test}
        if parts.held_out is not None:
            self.sets["held_out"] = parts.held_out
        self.judge = Judge(self.sets, cells)
        self.labels = self.judge.labels
        self.key = base.key(0)
        self.plain = self._on_sets({"kind": "float"}, lambda: base.state(0))
        self.loss = self._metrics(self.plain)["nll"]

    def plain_row(self) -> dict[str, Any]:
        """Row of the model itself."""
        metrics = self._metrics(self.plain)
        return {
            "rule": "float",
            "space": "weights",
            "rounding": "",
            "grid_bits": 0,
            "members": 1,
            "data": "test",
            **metrics,
            "mean_member_nll": metrics["nll"],
            "ambiguity": 0.0,
            "passes": 1,
            "bits": float(8 * next(self.base.model.parameters()).element_size()),
            "predicted": math.nan,
            "predicted_ambiguity": math.nan,
            "predicted_from": NONE,
        }

    def rows(
        self, producer: SeededRounding, members: Members, more: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        """All rows of one kind of draws."""
        # How many are drawn changes no draw.
        what = described(replace(producer, draws=SeededRounding.draws))
        each = []
        for index in range(len(members)):
            key = {"kind": "draw", "rule": what, "draw": index}
            each.append(self._on_sets(key, _reader(members, index)))
            more(1)
        single = [self._metrics(one) for one in each]
        surrogate, told = self._surrogate(what, members, [one["nll"] for one in single])
        draws = _Draws(producer, single, surrogate, told)
        if producer.rounding == "nearest":
            yield self._row(draws, "rtn", each[0], 1)
            return
        yield self._mean_member(draws)
        for count in _sizes(len(members), producer.rounding == "antithetic"):
            share = torch.full((count,), 1.0 / count, dtype=torch.float64)
            pooled = {
                name: POOLS["probabilities"]((one[name] for one in each[:count]), share)
                for name in self.sets
            }
            yield self._row(draws, "ensemble", pooled, count)
        key = {"kind": "weight mean", "rule": what, "draws": len(members)}
        merged = self._on_sets(key, lambda: mean_state(members))
        more(1)
        yield self._row(draws, "weight_mean", merged, len(members))

    def _mean_member(self, draws: _Draws) -> dict[str, Any]:
        single, count = draws.single, len(draws.single)
        mean = {name: math.fsum(one[name] for one in single) / count for name in single[0]}
        predicted = draws.surrogate and draws.surrogate.mean_member(_uniform(count, count))
        return {
            **draws.stated("mean_member", count),
            "space": "",
            **mean,
            "mean_member_nll": mean["nll"],
            "ambiguity": 0.0,
            "passes": 1,
            "bits": draws.producer.held_bits(self.base.model, 1),
            "predicted": math.nan if predicted is None else predicted,
            "predicted_ambiguity": math.nan if predicted is None else 0.0,
        }

    def _row(
        self, draws: _Draws, rule: str, found: Mapping[str, Tensor], members: int
    ) -> dict[str, Any]:
        """Row of a model or a pool made of the first draws."""
        metrics = self._metrics(found)
        pooled = rule == "ensemble"
        mean = math.fsum(one["nll"] for one in draws.single[:members]) / members
        predicted = gain = math.nan
        if draws.surrogate is not None:
            surrogate, weights = draws.surrogate, _uniform(members, len(draws.single))
            predicted = surrogate.ensemble(weights) if pooled else surrogate.soup(weights)
            gain = surrogate.mean_member(weights) - predicted
        passes = members if pooled else 1
        # The mean of weights on a grid lies between its points.
        held = float(FLOAT_BITS)
        if rule != "weight_mean":
            held = draws.producer.held_bits(self.base.model, passes)
        return {
            **draws.stated(rule, members),
            "space": "probabilities" if pooled else "weights",
            **metrics,
            "mean_member_nll": mean,
            "ambiguity": mean - metrics["nll"],
            "passes": passes,
            "bits": held,
            "predicted": predicted,
            "predicted_ambiguity": gain,
        }

    def _metrics(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        held = None
        if "held_out" in found:
            held = found["held_out"], self.labels["held_out"]
        tuned, temperature = tuned_nll(found["test"], self.labels["test"], held)
        metrics = classification_metrics(found["test"], self.labels["test"])
        return {**metrics, "nll_tuned": tuned, "temperature": temperature}

    def _on_sets(self, what: Mapping[str, Any], state: Callable[[], State]) -> dict[str, Tensor]:
        """Log-probabilities of a model on every set."""
        key = {"study": "low precision", **what, "model": self.key}
        return self.judge(key, lambda: self.base.with_state(state()))

    def _surrogate(
        self, what: Mapping[str, Any], members: Members, losses: list[float]
    ) -> tuple[Surrogate | None, str]:
        """Model of the loss about the float weights along the draws, and whether it holds."""
        if not self.config.predict:
            return None, NONE

        key = {
            "study": "low precision",
            "rule": what,
            "model": self.key,
            "draws": len(members),
            "examples": self.config.predict_examples,
        }

        def build() -> tuple[nn.Module, Tensor, Mapping[str, Tensor]]:
            origin = self.base.state(0)
            return self.base.with_state(origin), members.offsets(origin), {}

        examples = self.config.predict_examples
        surrogate = self.judge.surrogate(
            key, self.loss, build, lambda: spread_examples(self.parts.test(), examples)
        )
        return surrogate, SURROGATE if surrogate.holds(losses) else OUTSIDE


def _reader(members: Members, index: int) -> Callable[[], State]:
    return lambda: members.state(index)


def _uniform(count: int, total: int) -> Tensor:
    """Equal weights of the first members, 0 for the others."""
    weights = torch.zeros(total, dtype=torch.float64)
    weights[:count] = 1.0 / count
    return weights


def _sizes(draws: int, pairs: bool) -> list[int]:
    """Sizes of ensembles: powers of two up to all draws; whole pairs only."""
    powers = [2**k for k in range(int(pairs), draws.bit_length()) if 2**k < draws]
    return [*powers, draws]
