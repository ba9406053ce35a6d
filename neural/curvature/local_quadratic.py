"""The quadratic picture of a network around a checkpoint: slope, curvature and gradient noise.

Expected losses of linear methods see three measures on the axis of curvature: how many directions
there are, how much noise, and how much slope. The stiffest directions are measured one by one. Of
the rest each measure is found by Lanczos from a vector that carries it: the gradient for the slope,
draws of the gradient noise for the noise. No law that ties noise to curvature is assumed, and noise
that is correlated between directions is counted right, as expected losses need its diagonal alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.lanczos import LanczosNodes, lanczos_nodes
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Eigenpairs, Progress, operator
from neural.curvature.spectrum import eigenpairs as stiffest_pairs
from nqm.errors import NQMError, check_integer
from nqm.problems.correlation import Correlation
from nqm.problems.quadratic import Problem

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LocalQuadratic:
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
    gradient : LanczosNodes
        The rest of the gradient.
    draws : tuple of LanczosNodes
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
    gradient: LanczosNodes
    draws: tuple[LanczosNodes, ...]
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
        """Curvature, noise variance and squared slope of every node, negative curvature included.

        Returns
        -------
        curvature, noise_variance, squared_slope : ndarray, shape (d,)
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

        Displacements are measured from the minimum of the quadratic: g / h along each node. Nodes
        of negative curvature are left out (`negative_share`).

        Expected losses are right for any model. The distribution of the loss (`loss_sd`, quantiles)
        needs a `complete` model, which has the correlation of the noise between directions. In any
        other one node of a noise draw stands for many directions: `expected_losses_only`.

        Returns
        -------
        Problem
        """
        h, v, g = self.points()
        held = h > 0
        mean, correlation = np.sqrt(g), None
        if self.complete:
            mean[: len(self.slope)] = self.slope  # signs matter where directions are correlated
            correlation = self._correlation(held)
        h, v, mean = h[held], v[held], mean[held] / h[held]
        return Problem(
            h,
            v,
            initial_mean=mean,
            initial_variance=0.0,
            noise_correlation=correlation,
            expected_losses_only=not self.complete,
        )

    def _correlation(self, held: NDArray[np.bool_]) -> Correlation | None:
        """Of the noise along the nodes held; the nodes beyond the eigenpairs have none."""
        pairs = held[: len(self.noise)]
        values, vectors = np.linalg.eigh(self.noise[np.ix_(pairs, pairs)])
        factor = np.zeros((int(held.sum()), len(values)))
        factor[: len(values)] = vectors * np.sqrt(np.maximum(values, 0.0))
        return Correlation.of_factor(factor)[1]

    def problem_table(self) -> pd.DataFrame:
        """`problem` as a table, which ``[problem] file = "..."`` reads.

        Returns
        -------
        DataFrame
        """
        import pandas as pd

        problem = self.problem()
        names = ("curvature", "noise_variance", "initial_mean", "initial_variance")
        table = {name: getattr(problem, name) for name in names}
        if problem.noise_correlation is not None:
            columns = enumerate(problem.noise_correlation.matrix.T)
            table |= {f"noise_correlation.{i}": column for i, column in columns}
        if problem.expected_losses_only:
            table["expected_losses_only"] = True
        return pd.DataFrame(table)

    def negative_share(self) -> tuple[float, float]:
        """Fractions of the noise's trace and of the squared slope along negative curvature.

        Returns
        -------
        noise, squared_slope : float
        """
        h, v, g = self.points()
        below = h <= 0
        return (
            float(v[below].sum() / max(v.sum(), 1e-300)),
            float(g[below].sum() / max(g.sum(), 1e-300)),
        )

    def key(self) -> dict[str, Any]:
        """Values that identify this measurement among those of the same network, for cache keys.

        Returns
        -------
        dict of str to int or str
        """
        return {
            "eigenpairs": len(self.pairs.values),
            "noise_samples": len(self.draws),
            "largest": f"{self.largest:.10g}",
            "noise_trace": f"{self.noise_trace:.10g}",
        }


def measure_local(  # noqa: PLR0913 - options, by keyword
    risk: EmpiricalRisk,
    eigenpairs: int | None = 50,
    *,
    noise_samples: int = 6,
    lanczos_steps: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> LocalQuadratic:
    """Measure slope, curvature and noise of an empirical risk.

    Parameters
    ----------
    risk : EmpiricalRisk
        Its `curvature` says whether the Hessian or the Gauss-Newton matrix is measured.
    eigenpairs : int, optional
        Number of largest eigenvalues that are measured one by one; None computes all from the dense
        matrix, for few weights.
    noise_samples : int
        Draws of the gradient noise beyond the eigenpairs.
    lanczos_steps : int
        Products with the curvature for each draw, and for the gradient.
    tolerance : float
        Relative accuracy of the eigenpairs.
    seed : int
        Seed of all random draws.
    cache : Cache, optional
        Stores every stage when it is done, under the content of the risk.
    progress : callable, optional
        Called with 1 after every product with the curvature.

    Returns
    -------
    LocalQuadratic

    Raises
    ------
    NQMError
        If there are fewer than two examples, or the eigenpairs do not converge.
    """
    check_integer("noise_samples", noise_samples, 1)
    check_integer("lanczos_steps", lanczos_steps, 1)
    if risk.examples < 2:
        raise NQMError("gradient noise needs at least two examples; got 1")
    kept = (cache or Cache()).of(risk, seed=seed)
    complete = eigenpairs is None or eigenpairs >= risk.size
    population = 1.0 - 1.0 / risk.examples  # minibatches are drawn from these very examples

    def stiffest() -> dict[str, Any]:
        if complete:
            values, vectors = np.linalg.eigh(risk.curvature_matrix().double().cpu().numpy())
            found = Eigenpairs(values[::-1], vectors[:, ::-1], np.zeros(len(values)))
        else:
            assert eigenpairs is not None
            found = stiffest_pairs(
                risk, eigenpairs, tolerance=tolerance, seed=seed, progress=progress
            )
        noise = population * gradient_noise.covariance(risk, found.vectors)
        return vars(found) | {"noise": noise}

    settings = {} if complete else {"eigenpairs": eigenpairs, "tolerance": tolerance}
    top = kept("eigenpairs", stiffest, complete=complete, **settings)
    known = Eigenpairs(top["values"], top["vectors"], top["residuals"])
    gradient = risk.gradient().double().cpu().numpy()
    apply = operator(risk, progress)

    def lanczos(stage: str, start: Callable[[], FloatArray], **values: int) -> LanczosNodes:
        def run() -> dict[str, Any]:
            return vars(lanczos_nodes(apply, start(), lanczos_steps, known.vectors))

        return LanczosNodes(**kept(stage, run, lanczos_steps=lanczos_steps, **settings, **values))

    def draw(index: int) -> FloatArray:
        rng = np.random.default_rng([seed, 2, index])
        weights = rng.standard_normal(risk.examples)
        weights = (weights - weights.mean()) / np.sqrt(risk.examples)
        given = torch.from_numpy(weights).to(risk.weights)
        return np.asarray(risk.weighted_gradient(given).double().cpu().numpy())

    rest = lanczos("gradient", lambda: gradient)
    others = tuple(
        lanczos("noise_sample", partial(draw, i), index=i)
        for i in range(0 if complete else noise_samples)
    )
    if complete:
        trace = np.trace(top["noise"])
    else:
        found = kept("noise_trace", lambda: {"trace": np.array(gradient_noise.trace(risk))})
        trace = population * found["trace"]
    return LocalQuadratic(
        risk.loss(),
        known,
        top["noise"],
        known.vectors.T @ gradient,
        rest,
        others,
        float(trace),
        risk.examples,
    )


def vector(risk: EmpiricalRisk, values: FloatArray) -> torch.Tensor:
    """Convert an array to a tensor of the risk's precision and device.

    Parameters
    ----------
    risk : EmpiricalRisk
    values : ndarray, shape (p,)

    Returns
    -------
    Tensor, shape (p,)
    """
    return torch.from_numpy(np.ascontiguousarray(values)).to(risk.weights)
