"""The quadratic picture of a network around a checkpoint: slope, curvature and gradient noise.

Expected losses of linear methods see three measures on the axis of curvature: how many directions
there are, how much noise, and how much slope. The stiffest directions are measured one by one. Of
the rest each measure is found by Lanczos from a vector that carries it: the gradient for the slope,
draws of the gradient noise for the noise. No law that ties noise to curvature is assumed, and noise
that is correlated between directions is counted right, as expected losses need its diagonal alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from neural import noise as gradient_noise
from neural.curvature import Landscape
from neural.examples import content
from neural.krylov import Krylov, krylov
from neural.spectrum import Eigenpairs, Progress, eigenpairs, operator
from nqm.correlation import Correlation
from nqm.errors import NQMError, check_integer
from nqm.problem import Problem

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LocalModel:
    """Slope, curvature and gradient noise at a checkpoint.

    Attributes
    ----------
    loss : float
        At the checkpoint.
    pairs : Eigenpairs
        The stiffest k directions, or all.
    noise : ndarray, shape (k, k)
        Covariance along them of the gradient of one of the N examples, drawn at random.
    slope : ndarray, shape (k,)
        Of the loss along them.
    gradient : Krylov
        The rest of the gradient.
    draws : tuple of Krylov
        Draws of the rest of one example's gradient noise.
    noise_trace : float
        Of the whole covariance of one example's gradient.
    examples : int
        N.
    """

    loss: float
    pairs: Eigenpairs
    noise: FloatArray
    slope: FloatArray
    gradient: Krylov
    draws: tuple[Krylov, ...]
    noise_trace: float
    examples: int

    @property
    def largest(self) -> float:
        """Largest curvature."""
        return float(self.pairs.values[0])

    @property
    def complete(self) -> bool:
        """Whether the eigenpairs are all there are, as of the dense matrix."""
        return len(self.pairs.values) == len(self.pairs.vectors)

    @property
    def draw_scale(self) -> float:
        """What the squares of the draws are multiplied by, so that they have the known trace."""
        found = sum(float(draw.amplitudes @ draw.amplitudes) for draw in self.draws)
        left = self.noise_trace - float(np.trace(self.noise))
        return max(left, 0.0) * len(self.draws) / found if found > 0 else 0.0

    def points(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Curvature, noise variance and squared slope of every node, shape (d,) each.

        Negative curvature included.
        """
        scale = self.draw_scale / max(len(self.draws), 1)
        parts = [(self.pairs.values, np.diag(self.noise), self.slope**2)]
        parts += [(d.values, scale * d.amplitudes**2, 0.0 * d.values) for d in self.draws]
        rest = self.gradient
        parts.append((rest.values, 0.0 * rest.values, rest.amplitudes**2))
        h, v, g = (np.concatenate(column) for column in zip(*parts, strict=True))
        return h, v, g

    def problem(self) -> Problem:
        """The noisy quadratic problem that `nqm` solves.

        Displacements are from the minimum of the quadratic, g / h along each node. Nodes of
        negative curvature are left out (`negative_share`): nothing settles along them.

        Expected losses are right. The distribution of the loss (`loss_sd`, quantiles) is right only
        of a `complete` model, which keeps how its directions are correlated: a node of a draw
        stands for many directions at once.
        """
        h, v, g = self.points()
        held = h > 0
        correlation = self._correlation(held) if self.complete else None
        h, v, g = h[held], v[held], g[held]
        return Problem(
            h,
            v,
            initial_mean=np.sqrt(g) / h,
            initial_variance=0.0,
            noise_correlation=correlation,
        )

    def _correlation(self, held: NDArray[np.bool_]) -> Correlation | None:
        """Of the noise along the nodes held; the nodes beyond the eigenpairs have none."""
        pairs = held[: len(self.noise)]
        values, vectors = np.linalg.eigh(self.noise[np.ix_(pairs, pairs)])
        factor = np.zeros((int(held.sum()), len(values)))
        factor[: len(values)] = vectors * np.sqrt(np.maximum(values, 0.0))
        return Correlation.of_factor(factor)[1]

    def problem_table(self) -> pd.DataFrame:
        """The same as a table, which ``[problem] file = "..."`` reads."""
        import pandas as pd

        problem = self.problem()
        names = ("curvature", "noise_variance", "initial_mean", "initial_variance")
        table = {name: getattr(problem, name) for name in names}
        if problem.noise_correlation is not None:
            columns = enumerate(problem.noise_correlation.matrix.T)
            table |= {f"noise_correlation.{i}": column for i, column in columns}
        return pd.DataFrame(table)

    def negative_share(self) -> tuple[float, float]:
        """Shares of the noise's trace and of the squared slope along negative curvature."""
        h, v, g = self.points()
        below = h <= 0
        return (
            float(v[below].sum() / max(v.sum(), 1e-300)),
            float(g[below].sum() / max(g.sum(), 1e-300)),
        )

    def scatter(
        self, lr: float, batch_size: float, steps: float, momentum: float = 0.0
    ) -> FloatArray:
        """Covariance along the eigenpairs after so many steps, shape (k, k).

        Parameters
        ----------
        lr : float
            The effective rate: with momentum b, that of the optimiser over 1 - b.
        batch_size, steps : float
        momentum : float
            Of heavy ball; SGD by default.
        """
        u = lr * self.pairs.values
        if momentum:
            ages = _heavy_ages(u, steps, momentum, joint=True)
        else:
            joint = np.outer(1.0 - u, 1.0 - u)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                ages = np.where(joint == 1.0, steps, (1.0 - joint**steps) / (1.0 - joint))
        return np.asarray(lr**2 / batch_size * self.noise * ages)

    def rest_scatter(
        self, lr: float, batch_size: float, steps: float, momentum: float = 0.0
    ) -> float:
        """Trace of the covariance beyond the eigenpairs, as `scatter` has it along them."""
        if not self.draws:
            return 0.0
        squares = [
            draw.amplitudes**2 @ _ages(lr * draw.values, steps, momentum) for draw in self.draws
        ]
        return self.draw_scale * lr**2 / batch_size * float(np.mean(squares))

    def displacement(
        self,
        rng: np.random.Generator,
        lr: float,
        batch_size: float,
        steps: float,
        draw: int | None = None,
        momentum: float = 0.0,
    ) -> FloatArray:
        """A draw of where the noise of so many steps puts the weights, shape (p,).

        Exact covariance along the eigenpairs (`scatter`); for the rest, the stated draw of the
        noise, or one at random, with its diagonal exact.
        """
        h = self.pairs.values
        covariance = self.scatter(lr, batch_size, steps, momentum)
        size, turn = np.linalg.eigh(0.5 * (covariance + covariance.T))
        top = turn @ (np.sqrt(np.maximum(size, 0.0)) * rng.standard_normal(len(h)))
        moved = self.pairs.vectors @ top
        if self.draws and len(self.draws[0].values):
            drawn = self.draws[rng.integers(len(self.draws)) if draw is None else draw]
            scale = self.draw_scale * lr**2 / batch_size
            moved = moved + drawn.apply(lambda c: np.sqrt(scale * _ages(lr * c, steps, momentum)))
        return np.asarray(moved)


def _ages(u: FloatArray, steps: float, momentum: float) -> FloatArray:
    """Sum over t < steps of the square of what is left of a step's noise t steps later."""
    if momentum:
        return _heavy_ages(u, steps, momentum, joint=False)
    r = (1.0 - u) ** 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(np.abs(1.0 - r) < 1e-12, steps, (1.0 - r**steps) / (1.0 - r))


def _heavy_ages(u: FloatArray, steps: float, momentum: float, joint: bool) -> FloatArray:
    """The same of heavy ball, in units of the effective rate; `joint` of every two directions.

    Of a unit of noise r_a has reached the weights after a steps, r_0 = 0, r_1 = 1 and
    r_(a+1) = (1 + b - (1 - b) u) r_a - b r_(a-1), times the optimiser's rate.
    """
    before, now = np.zeros(len(u)), np.full(len(u), 1.0 - momentum)
    total = np.zeros((len(u), len(u)) if joint else len(u))
    left = int(steps)
    with np.errstate(invalid="ignore", over="ignore"):
        while left:
            block = np.empty((min(left, 512), len(u)))
            for row in block:
                row[:] = now
                before, now = (
                    now, (1.0 + momentum - (1.0 - momentum) * u) * now - momentum * before
                )  # fmt: skip
            total += block.T @ block if joint else (block**2).sum(0)
            left -= len(block)
    return total


def measure(
    landscape: Landscape,
    pairs: int | None = 50,
    *,
    draws: int = 6,
    products: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> LocalModel:
    """Measure slope, curvature and noise of a landscape.

    Parameters
    ----------
    landscape : Landscape
        Its curvature is the one that it was made with: the Hessian, or its Gauss-Newton part.
    pairs : int, optional
        Stiffest directions one by one; None for all, of few weights: from the dense matrix.
    draws, products : int
        Draws of the noise, and products with the curvature for each and for the gradient.
    tolerance : float
        Of the eigenpairs.
    seed : int
    folder : Path, optional
        Every stage is kept there as it is done, under the content of the landscape, and not
        computed again.
    progress : callable, optional
        Told that one more product with the curvature is done.

    Raises
    ------
    NQMError
        If there are fewer than two examples, or the eigenpairs do not converge.
    """
    check_integer("draws", draws, 1)
    check_integer("products", products, 1)
    if landscape.examples < 2:
        raise NQMError("gradient noise needs two examples at least; got 1")
    kept = Kept(folder, f"{fingerprint(landscape)}-{seed}")
    complete = pairs is None or pairs >= landscape.size
    population = 1.0 - 1.0 / landscape.examples  # minibatches are drawn from these very examples

    def stiffest() -> dict[str, Any]:
        if complete:
            values, vectors = np.linalg.eigh(landscape.curvature_matrix().double().cpu().numpy())
            found = Eigenpairs(values[::-1], vectors[:, ::-1], np.zeros(len(values)))
        else:
            assert pairs is not None
            found = eigenpairs(landscape, pairs, tolerance=tolerance, seed=seed, progress=progress)
        noise = population * gradient_noise.covariance(landscape, found.vectors)
        return vars(found) | {"noise": noise}

    top = kept("all" if complete else f"top{pairs}-{tolerance:g}", stiffest)
    known = Eigenpairs(top["values"], top["vectors"], top["residuals"])
    gradient = landscape.gradient().double().cpu().numpy()
    apply = operator(landscape, progress)

    def run(start: Callable[[], FloatArray]) -> Callable[[], dict[str, Any]]:
        return lambda: vars(krylov(apply, start(), products, known.vectors))

    def draw(index: int) -> FloatArray:
        rng = np.random.default_rng([seed, 2, index])
        weights = rng.standard_normal(landscape.examples)
        weights = (weights - weights.mean()) / np.sqrt(landscape.examples)
        given = torch.from_numpy(weights).to(landscape.weights)
        return np.asarray(landscape.weighted_gradient(given).double().cpu().numpy())

    stage = f"{len(known.values)}-{tolerance:g}-{products}"
    rest = Krylov(**kept(f"gradient-{stage}", run(lambda: gradient)))
    others = tuple(
        Krylov(**kept(f"draw{i}-{stage}", run(lambda i=i: draw(i))))  # type: ignore[misc]
        for i in range(0 if complete else draws)
    )
    if complete:
        trace = np.trace(top["noise"])
    else:
        found = kept("trace", lambda: {"trace": np.array(gradient_noise.trace(landscape))})
        trace = population * found["trace"]
    return LocalModel(
        landscape.loss(),
        known,
        top["noise"],
        known.vectors.T @ gradient,
        rest,
        others,
        float(trace),
        landscape.examples,
    )


def vector(landscape: Landscape, values: FloatArray) -> torch.Tensor:
    """An array in the landscape's own precision and place."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(landscape.weights)


def fingerprint(landscape: Landscape) -> str:
    """Content of a landscape: weights, data, loss, what an example is, which curvature."""
    digest = hashlib.sha256()
    state = landscape.model.state_dict()
    held = [landscape.weights, *(state[name] for name in sorted(state))]
    for one in [*held, *content(landscape.batches)]:
        if torch.is_tensor(one):
            digest.update(one.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(one).encode())
    said = (sorted(landscape.shapes.items()), landscape.weight_decay, landscape.example_loss)
    digest.update(repr((said[0], said[1], getattr(said[2], "__qualname__", ""))).encode())
    digest.update(repr((landscape.curvature, landscape.examples)).encode())
    return digest.hexdigest()[:16]


class Kept:
    """Results of stages, in a folder of their own, each written whole or not at all.

    Parameters
    ----------
    folder : Path, optional
        None to keep nothing.
    key : str
        What the stages belong to.
    """

    def __init__(self, folder: Path | None, key: str):
        self.folder = None if folder is None else folder / key

    def __call__(self, stage: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The arrays of a stage, from its file or computed and written there."""
        from nqm.table import replacing

        if self.folder is None:
            return compute()
        path = self.folder / f"{stage}.npz"
        if path.exists():
            try:
                with np.load(path) as content:
                    return dict(content)
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                raise NQMError(f"{path} is damaged ({error}); remove it, and run again") from None
        found = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            np.savez(stream, **found)
        return found
