"""Curves of low loss between two trained models (Garipov et al. 2018), and planes through three.

A curve is a weighted mean of control points with weights that depend on t in [0, 1]. The ends are
two models; the points between them are trained on the mean loss over the curve, one t for each
minibatch. Weights are put into the model by name, so that any architecture will do. With free ends
and a penalty on their cosine this is a learning subspace (Wortsman et al. 2021).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neural.combine.cells import Arrays, Cells
from neural.combine.data import Parts
from neural.combine.information import spread_examples
from neural.combine.judge import log_probs, repaired
from neural.combine.mean import refuse_factors, weighted_mean
from neural.combine.members import Members, State
from neural.combine.repair import REPAIRS, has_statistics
from neural.data.sampling import keyed_generator
from neural.evaluate import classification_metrics
from neural.late_phase.rows import arguments
from neural.late_phase.swap import call, places
from neural.training import checkpoint
from neural.training.task import Stream
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.progress import Progress, counted

if TYPE_CHECKING:
    import pandas as pd

#: (output, targets) -> mean loss.
Loss = Callable[[Tensor, Tensor], Tensor]
#: Seconds between two checkpoints.
CHECKPOINT_EVERY = 60.0
#: Shares of the training at which the learning rate begins and ends to fall, and its last value
#: relative to the first (Garipov et al. 2018).
PLATEAU, FLOOR, LAST = 0.5, 0.9, 0.01

#: How far the grid on a plane reaches beyond its models, relative to their extent.
MARGIN = 0.2
#: Columns of the table of a curve, in order.
CURVE = (
    "path",
    "t",
    "length",
    "data",
    "accuracy",
    "nll",
    "ece",
    "brier",
    "penalty",
)


def bezier(t: float, bends: int) -> NDArray[np.float64]:
    """Weights of the control points of a Bezier curve: the Bernstein polynomials.

    Parameters
    ----------
    t : float
        In [0, 1].
    bends : int
        Control points between the ends.

    Returns
    -------
    ndarray, shape (bends + 2,)
        >= 0, summing to 1.
    """
    n = bends + 1
    return np.array([math.comb(n, i) * t**i * (1.0 - t) ** (n - i) for i in range(n + 1)])


def chain(t: float, bends: int) -> NDArray[np.float64]:
    """Weights of the control points of a polygonal chain: hat functions.

    Parameters
    ----------
    t : float
        In [0, 1]; every straight piece takes an equal part of it.
    bends : int
        Control points between the ends.

    Returns
    -------
    ndarray, shape (bends + 2,)
        >= 0, summing to 1.
    """
    at = t * (bends + 1)
    hats: NDArray[np.float64] = np.clip(1.0 - np.abs(at - np.arange(bends + 2)), 0.0, None)
    return hats


#: Name -> weights of the control points at t.
KINDS: dict[str, Callable[[float, int], NDArray[np.float64]]] = {"bezier": bezier, "chain": chain}


@dataclass(frozen=True)
class CurveConfig:
    """Settings of a curve: the table ``[curve]``.

    Attributes
    ----------
    kind : {"bezier", "chain"}
    bends : int
        Control points between the ends.
    epochs : int
        Of training; 0 leaves the straight line.
    lr : float
        Learning rate: constant for half of the training, then falling linearly to 1 % of it, which
        the last tenth has.
    momentum : float
    weight_decay : float
        Adds ``weight_decay / 2 |phi(t)|^2`` to the loss of a minibatch, phi(t) the weights on the
        curve.
    ends : {"fixed", "free"}
        Free ends are trained as well.
    cosine_penalty : float
        Adds this times the squared cosine of the ends to the loss; needs free ends.
    points : int
        Values of t at which the curve is judged.
    train_examples : int
        Training examples, as the stream has them, on which it is judged beside the test set.
    repair : {"statistics", "none"}
        statistics: BatchNorm statistics anew at every t.
    plane : int
        Points along either side of a grid on the plane through the ends and the middle bend; 0:
        none.
    seed : int
        Of t and of what the model draws.
    """

    kind: str = "bezier"
    bends: int = 1
    epochs: int = 30
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    ends: str = "fixed"
    cosine_penalty: float = 0.0
    points: int = 61
    train_examples: int = 2000
    repair: str = "statistics"
    plane: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_word("CurveConfig.kind", self.kind, tuple(KINDS))
        check_integer("CurveConfig.bends", self.bends, 0)
        check_integer("CurveConfig.epochs", self.epochs, 0)
        check_number("CurveConfig.lr", self.lr, low=0.0, closed_low=False)
        check_number("CurveConfig.momentum", self.momentum, low=0.0, high=1.0, closed_high=False)
        check_number("CurveConfig.weight_decay", self.weight_decay, low=0.0)
        check_word("CurveConfig.ends", self.ends, ("fixed", "free"))
        check_number("CurveConfig.cosine_penalty", self.cosine_penalty, low=0.0)
        if self.cosine_penalty and self.ends == "fixed":
            raise NQMError('CurveConfig.cosine_penalty needs ends = "free": fixed ends do not turn')
        if not self.bends and self.ends == "fixed" and self.epochs:
            raise NQMError(
                "CurveConfig.bends must be 1 at least: with fixed ends and no bend nothing is "
                "trained; or set epochs = 0"
            )
        check_integer("CurveConfig.points", self.points, 2)
        check_integer("CurveConfig.train_examples", self.train_examples, 1)
        check_word("CurveConfig.repair", self.repair, tuple(REPAIRS))
        check_integer("CurveConfig.plane", self.plane, 0)
        if self.plane:
            check_integer("CurveConfig.plane", self.plane, 2)
            if not self.bends or not self.epochs:
                raise NQMError(
                    "CurveConfig.plane needs a bend that is trained: points on the straight line "
                    "span no plane"
                )
            if self.repair == "none":
                raise NQMError(
                    'CurveConfig.plane needs repair = "statistics": beyond the models mean '
                    "variances may be negative"
                )
        check_integer("CurveConfig.seed", self.seed, 0)

    def lr_at(self, share: float) -> float:
        """Learning rate after a share of the training.

        Parameters
        ----------
        share : float
            From 0 to 1.

        Returns
        -------
        float
        """
        fallen = min(max((share - PLATEAU) / (FLOOR - PLATEAU), 0.0), 1.0)
        return self.lr * (1.0 - fallen * (1.0 - LAST))


@dataclass(frozen=True)
class Curve:
    """A curve through weights.

    Attributes
    ----------
    kind : {"bezier", "chain"}
    controls : Members
        Control points, the ends first and last.
    """

    kind: str
    controls: Members

    def weights(self, t: float) -> Tensor:
        """Weights of the control points.

        Parameters
        ----------
        t : float
            In [0, 1].

        Returns
        -------
        Tensor of float64, shape (bends + 2,)
        """
        return torch.from_numpy(KINDS[self.kind](t, len(self.controls) - 2))

    def state(self, t: float) -> State:
        """Weights on the curve; at t = 0 and t = 1 those of the ends bit for bit.

        Parameters
        ----------
        t : float
            In [0, 1].

        Returns
        -------
        dict of str to Tensor
        """
        return weighted_mean(self.controls, self.weights(t))


def straight(ends: Members, config: CurveConfig) -> Curve:
    """The curve before training: control points at equal distances on the line between the ends.

    Parameters
    ----------
    ends : Members
        Two.
    config : CurveConfig

    Returns
    -------
    Curve

    Raises
    ------
    NQMError
        If there are not two ends.
    """
    if len(ends) != 2:
        raise NQMError(f"a curve has two ends; got {len(ends)} models")
    refuse_factors(ends.weight_names)
    shares = np.linspace(0.0, 1.0, config.bends + 2)
    states = {
        name: weighted_mean(ends, [1.0 - share, share])
        for name, share in zip(control_names(config.bends), shares, strict=True)
    }
    return Curve(config.kind, Members.of_states(ends.model, states))


def control_names(bends: int) -> tuple[str, ...]:
    """Names of the control points.

    Parameters
    ----------
    bends : int

    Returns
    -------
    tuple of str
        start, bend1, bend2, ..., end.
    """
    return ("start", *(f"bend{i + 1}" for i in range(bends)), "end")


def drawn_t(generator: torch.Generator) -> float:
    """Where on the curve a minibatch is: uniform on [0, 1).

    Parameters
    ----------
    generator : Generator

    Returns
    -------
    float
    """
    return float(torch.rand((), generator=generator, dtype=torch.float64))


class _Training:
    """Control points in training: the state that a checkpoint holds."""

    def __init__(self, curve: Curve, config: CurveConfig, loss: Loss, device: torch.device):
        self.config, self.loss, self.kind = config, loss, KINDS[curve.kind]
        controls = curve.controls
        self.model = controls.with_state(controls.state(0)).to(device)
        self.names = controls.weight_names
        self.places = places(self.model, self.names)
        last = len(controls) - 1
        self.points: list[dict[str, Tensor]] = []
        for index, state in enumerate(controls.states()):
            moves = config.ends == "free" or 0 < index < last
            self.points.append(
                {n: state[n].clone().to(device).requires_grad_(moves) for n in self.names}
            )
        moving = [p for point in self.points for p in point.values() if p.requires_grad]
        self.optimizer = torch.optim.SGD(moving, config.lr, config.momentum)
        self.done = 0

    def step(self, batch: tuple[Any, Tensor], total: int) -> None:
        """One step on a minibatch, at one t."""
        config = self.config
        generator = keyed_generator(config.seed, self.done)
        t = drawn_t(generator)
        # What the model draws, dropout for example, depends on the step alone.
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        shares = self.kind(t, len(self.points) - 2).tolist()
        phi = {
            name: sum(share * point[name] for share, point in zip(shares, self.points, strict=True))
            for name in self.names
        }
        inputs, targets = batch
        args, kwargs = arguments(inputs)
        loss = self.loss(call(self.model, self.places, phi, args, kwargs), targets)
        if config.weight_decay:
            loss = loss + 0.5 * config.weight_decay * _inner(phi, phi)
        if config.cosine_penalty:
            one, other = self.points[0], self.points[-1]
            square = _inner(one, other) ** 2 / (_inner(one, one) * _inner(other, other))
            loss = loss + config.cosine_penalty * square
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.done / total)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.done += 1
        if not bool(loss.isfinite()):
            raise NQMError(
                f"curve.lr = {config.lr:g} is too large: the loss is not finite at step {self.done}"
            )

    def trained(self, curve: Curve) -> Curve:
        """The curve through the control points as they are now; fixed ends stay bit for bit."""
        controls = curve.controls
        states = {}
        for member, state, point in zip(controls, controls.states(), self.points, strict=True):
            moved = {n: p.detach().cpu() for n, p in point.items() if p.requires_grad}
            states[member.name] = controls.updated(state, moved) if moved else state
        return Curve(curve.kind, Members.of_states(controls.model, states))

    def state_dict(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "points": [{n: p.detach() for n, p in point.items()} for point in self.points],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = state["done"]
        for point, held in zip(self.points, state["points"], strict=True):
            for name, p in point.items():
                p.copy_(held[name])
        self.optimizer.load_state_dict(state["optimizer"])


def _inner(one: Mapping[str, Any], other: Mapping[str, Any]) -> Tensor:
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def train_curve(
    ends: Members,
    stream: Stream,
    loss: Loss,
    config: CurveConfig | None = None,
    *,
    file: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Curve:
    """Train a curve between two models; a killed training goes on bit for bit.

    Parameters
    ----------
    ends : Members
        Two.
    stream : Stream
        Training batches.
    loss : callable
        Mean loss of a minibatch: ``loss(output, targets)``.
    config : CurveConfig, optional
    file : Path, optional
        Checkpoint, which must be of these very ends, data and settings; it stays at the end.
    device : torch.device or str
    progress : callable, optional
        Called repeatedly as ``progress("training", share)``.

    Returns
    -------
    Curve

    Raises
    ------
    NQMError
        If there are not two ends, the loss is not finite, or the checkpoint is damaged.
    """
    config = config or CurveConfig()
    curve = straight(ends, config)
    total = config.epochs * len(stream)
    if not total:
        return curve
    training = _Training(curve, config, loss, torch.device(device))
    if file is not None and file.exists():
        training.load_state_dict(checkpoint.load(file, device))
    more = counted(progress, "training", float(total))
    more(training.done)
    saved = time.monotonic()
    training.model.train()
    with torch.random.fork_rng(devices=_cuda(device)):
        for batch in _batches(stream, training.done, total):
            training.step(batch, total)
            more(1)
            if file is not None and time.monotonic() - saved > CHECKPOINT_EVERY:
                checkpoint.save(file, training.state_dict())
                saved = time.monotonic()
    if file is not None:
        checkpoint.save(file, training.state_dict())
    return training.trained(curve)


def _batches(stream: Stream, done: int, total: int) -> Iterator[tuple[Any, Tensor]]:
    """Minibatches from a step on."""
    each = len(stream)
    while done < total:
        epoch, start = divmod(done, each)
        for batch in stream.epoch(epoch, start):
            yield batch
            done += 1


def _cuda(device: torch.device | str) -> list[torch.device]:
    device = torch.device(device)
    return [device] if device.type == "cuda" else []


# --- judging -------------------------------------------------------------------------------------


def judge_curve(
    ends: Members,
    curve: Curve,
    parts: Parts,
    config: CurveConfig | None = None,
    *,
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Judge a curve and the straight line between its ends at equal steps of t.

    Parameters
    ----------
    ends : Members
        Two; the straight line is between them, also if the curve's ends are free.
    curve : Curve
    parts : Parts
        Needs `train`.
    config : CurveConfig, optional
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called repeatedly as ``progress("points", share)``.

    Returns
    -------
    DataFrame
        One row for each path, t and set of data, with the columns `CURVE`:

        - ``path``: ``curve`` or ``line``; ``length``: distance from its start along it, through the
          points that are judged.
        - ``data``: ``train`` or ``test``; ``accuracy``, ``nll``, ``ece``, ``brier``.
        - ``penalty``: ``weight_decay / 2 |phi(t)|^2``, which is no part of ``nll``.

    Raises
    ------
    NQMError
        If there are no training data.
    """
    import pandas as pd

    config = config or CurveConfig()
    train = parts.required("train", "judging a curve")
    some = spread_examples(train(), config.train_examples)
    judge = _Judge(parts, {"train": lambda: some, "test": parts.test}, config.repair, cells)
    line = Curve("chain", Members.of_states(ends.model, list(ends.states())))
    grid = np.linspace(0.0, 1.0, config.points)
    more = counted(progress, "points", 2.0 * len(grid))
    rows = []
    for path, one in (("curve", curve), ("line", line)):
        before: Tensor | None = None
        length = 0.0
        for t in grid.tolist():
            weights = one.weights(t)
            flat = one.controls.flat(one.state(t)).double()
            length += 0.0 if before is None else float((flat - before).norm())
            before = flat
            penalty = 0.5 * config.weight_decay * float(flat @ flat)
            for data, metrics in judge(one.controls, weights).items():
                rows.append(
                    {
                        "path": path,
                        "t": t,
                        "length": length,
                        "data": data,
                        **metrics,
                        "penalty": penalty,
                    }
                )
            more(1)
    return pd.DataFrame(rows, columns=list(CURVE))


class _Judge:
    """Metrics of weighted means of models, repaired."""

    def __init__(
        self,
        parts: Parts,
        sets: Mapping[str, Any],
        repair: str,
        cells: Cells | None,
    ):
        self.parts, self.sets, self.repair = parts, sets, REPAIRS[repair]
        self.cells = cells or Cells()

    def __call__(self, members: Members, weights: Tensor) -> dict[str, dict[str, float]]:
        keys = [members.key(i) for i in range(len(members))]
        # One member alone is repaired as well: its statistics are then made as all others are.
        repair = self.repair
        names = ("accuracy", "nll", "ece", "brier")

        def compute() -> Arrays:
            model = repaired(members, weighted_mean(members, weights), repair, self.parts)
            return {data: _numbers(model, source, names) for data, source in self.sets.items()}

        what = {
            "kind": "point",
            "members": keys,
            "weights": weights.tolist(),
            "repair": repair.name,
            "sets": list(self.sets),
        }
        cell = self.cells.on_data(what, compute)
        return {data: dict(zip(names, cell[data].tolist(), strict=True)) for data in self.sets}


def _numbers(model: nn.Module, source: Any, names: Sequence[str]) -> NDArray[np.float64]:
    metrics = classification_metrics(*log_probs(model, source))
    return np.array([metrics[name] for name in names])


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """What a path is like as a whole.

    Parameters
    ----------
    table : DataFrame
        See `judge_curve`.

    Returns
    -------
    DataFrame
        One row for each path, set of data and metric (``error`` = 1 - accuracy, and ``nll``):
        ``start``, ``end``, ``middle`` (at t = 1/2, or the mean of the two points beside it),
        ``min``, ``max``, ``mean`` (over t), ``integral`` (mean over the length of the path, by the
        trapezoidal rule) and ``length``.
    """
    import pandas as pd

    rows = []
    for (path, data), part in table.groupby(["path", "data"], sort=False):
        part = part.sort_values("t")
        length = part["length"].to_numpy()
        for metric, values in (("error", 1.0 - part["accuracy"]), ("nll", part["nll"])):
            f = values.to_numpy()
            whole = float(length[-1])
            integral = float(np.trapezoid(f, length) / whole) if whole > 0 else float(f[0])
            rows.append(
                {
                    "path": path,
                    "data": data,
                    "metric": metric,
                    "start": f[0],
                    "end": f[-1],
                    "middle": float(np.interp(0.5, part["t"], f)),
                    "min": f.min(),
                    "max": f.max(),
                    "mean": f.mean(),
                    "integral": integral,
                    "length": whole,
                }
            )
    return pd.DataFrame(rows)


# --- planes --------------------------------------------------------------------------------------


def axes_of_plane(corners: Members) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates of three models in the plane through them.

    The first lies at (0, 0), the second on the x axis, the third above it.

    Parameters
    ----------
    corners : Members
        Three.

    Returns
    -------
    x, y : ndarray, shape (3,)
        Distances in the space of the weights.

    Raises
    ------
    NQMError
        If there are not three models, or they lie on one line.
    """
    if len(corners) != 3:
        raise NQMError(f"a plane goes through three models; got {len(corners)}")
    refuse_factors(corners.weight_names)
    first = corners.state(0)
    _, b, c = corners.offsets(first).double()
    width = float(b.norm())
    along = float(b @ c) / width if width > 0 else 0.0
    height = float((c - along * b / width).norm()) if width > 0 else 0.0
    if height <= 1e-6 * max(width, float(c.norm())):
        raise NQMError("the three models lie on one line, through which there are many planes")
    return np.array([0.0, width, along]), np.array([0.0, 0.0, height])


def barycentric(
    corners: tuple[NDArray[np.float64], NDArray[np.float64]], x: float, y: float
) -> Tensor:
    """Weights of three models whose mean lies at a point of their plane.

    Parameters
    ----------
    corners : tuple of ndarray
        See `axes_of_plane`.
    x, y : float

    Returns
    -------
    Tensor of float64, shape (3,)
        Sum to 1; negative outside the triangle.
    """
    width, along, height = corners[0][1], corners[0][2], corners[1][2]
    third = y / height
    second = (x - along * third) / width
    return torch.tensor([1.0 - second - third, second, third], dtype=torch.float64)


def path_on_plane(curve: Curve, corners: Members, points: int = 61) -> NDArray[np.float64]:
    """Where a curve runs on the plane through three models; it is projected if it leaves it.

    Parameters
    ----------
    curve : Curve
    corners : Members
        Three.
    points : int
        Equal steps of t.

    Returns
    -------
    ndarray, shape (points, 2)
        Coordinates x and y.
    """
    placed = axes_of_plane(corners)
    origin = corners.state(0)
    _, b, c = corners.offsets(origin).double()
    first = b / placed[0][1]
    second = (c - placed[0][2] * first) / placed[1][2]
    controls = curve.controls.offsets(origin).double()
    at = torch.stack([controls @ first, controls @ second], 1)
    path = [curve.weights(t) @ at for t in np.linspace(0.0, 1.0, points).tolist()]
    return torch.stack(path).numpy()


def judge_plane(
    corners: Members,
    parts: Parts,
    points: int = 21,
    *,
    repair: str = "statistics",
    cells: Cells | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Test loss and error on a grid on the plane through three models.

    Parameters
    ----------
    corners : Members
        Three.
    parts : Parts
    points : int
        Of the grid along either side.
    repair : {"statistics", "none"}
        statistics: BatchNorm statistics anew at every point.
    cells : Cells, optional
        Where parts of the work are kept; in memory by default.
    progress : callable, optional
        Called repeatedly as ``progress("plane", share)``.

    Returns
    -------
    DataFrame
        One row a point: ``corner`` (name of a model, empty for the grid), ``x``, ``y``,
        ``accuracy``, ``nll``, ``ece``, ``brier``.

    Raises
    ------
    NQMError
        If there are not three models, they lie on one line, or statistics cannot be recomputed.
    """
    import pandas as pd

    check_integer("points", points, 2)
    check_word("repair", repair, tuple(REPAIRS))
    if repair == "none" and has_statistics(corners.model):
        raise NQMError(
            "beyond the models mean variances of BatchNorm may be negative; use repair = "
            '"statistics" for a plane'
        )
    placed = axes_of_plane(corners)
    judge = _Judge(parts, {"test": parts.test}, repair, cells)
    sides = []
    for side in placed:
        low, high = float(side.min()), float(side.max())
        room = MARGIN * (high - low)
        sides.append(np.linspace(low - room, high + room, points).tolist())
    more = counted(progress, "plane", float(points**2 + 3))
    spots = [
        (member.name, *at) for member, at in zip(corners, zip(*placed, strict=True), strict=True)
    ]
    spots += [("", x, y) for y in sides[1] for x in sides[0]]
    rows = []
    for name, x, y in spots:
        found = judge(corners, barycentric(placed, float(x), float(y)))["test"]
        rows.append({"corner": name, "x": float(x), "y": float(y), **found})
        more(1)
    return pd.DataFrame(rows)
