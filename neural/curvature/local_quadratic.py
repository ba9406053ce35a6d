"""Local quadratic model of a network's loss: slope, curvature and gradient noise at a checkpoint.

The expected loss of a linear method depends on two distributions over curvature: how much noise and
how much squared slope there is at each curvature. The stiffest directions are measured one by one.
For all others each distribution is approximated by Lanczos, started at a vector that has it: the
gradient for the slope, random draws of the gradient noise for the noise. No law that relates noise
to curvature is assumed. Noise may be correlated between directions: expected losses depend on the
diagonal of its covariance alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from neural.curvature import gradient_noise
from neural.curvature.cache import Cache
from neural.curvature.lanczos import LanczosNodes, lanczos_together
from neural.curvature.risk import EmpiricalRisk
from neural.curvature.spectrum import Eigenpairs, Progress, leading_pairs, products
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
        Loss at the checkpoint.
    pairs : Eigenpairs
        The k eigenpairs of largest curvature, or all p.
    noise : ndarray, shape (k, k)
        Covariance, along these eigenpairs, of the gradient of an example that is drawn at random
        from the N examples.
    slope : ndarray, shape (k,)
        Gradient of the loss along these eigenpairs.
    gradient : LanczosNodes
        Gradient beyond the eigenpairs.
    draws : tuple of LanczosNodes
        Random draws of one example's gradient noise beyond the eigenpairs.
    noise_trace : float
        Trace of the whole covariance of one example's gradient.
    examples : int
        Number of examples, N.
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
        """True if all p eigenpairs are known."""
        return len(self.pairs.values) == len(self.pairs.vectors)

    @property
    def draw_scale(self) -> float:
        """Factor of the draws' squares that makes their mean trace agree with `noise_trace`."""
        drawn = sum(float(draw.amplitudes @ draw.amplitudes) for draw in self.draws)
        rest = self.noise_trace - float(np.trace(self.noise))
        return max(rest, 0.0) * len(self.draws) / drawn if drawn > 0 else 0.0

    def points(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Curvature, noise variance and squared slope of every node, negative curvature included.

        Returns
        -------
        curvature, noise_variance, squared_slope : ndarray, shape (d,)
            First the eigenpairs, then the nodes of the draws, then those of the gradient.
        """
        scale = self.draw_scale / max(len(self.draws), 1)
        parts = [(self.pairs.values, np.diag(self.noise), self.slope**2)]
        parts += [(d.values, scale * d.amplitudes**2, 0.0 * d.values) for d in self.draws]
        rest = self.gradient
        parts.append((rest.values, 0.0 * rest.values, rest.amplitudes**2))
        h, v, g = (np.concatenate(column) for column in zip(*parts, strict=True))
        return h, v, g

    def problem(self) -> Problem:
        """Convert to the noisy quadratic problem that `nqm` solves.

        Expected losses of the problem are correct for any local model. The distribution of the loss
        (`loss_sd`, quantiles) needs a `complete` one, which includes the correlation of the noise
        between directions. In any other one node of a noise draw represents many directions, and
        the problem has `expected_losses_only`.

        Returns
        -------
        Problem
            Starts at the checkpoint: displacement g / h from the minimum along each node. Nodes of
            negative curvature are left out (see `negative_share`).
        """
        h, v, g = self.points()
        positive = h > 0
        mean, correlation = np.sqrt(g), None
        if self.complete:
            mean[: len(self.slope)] = self.slope  # signs matter where directions are correlated
            correlation = self._correlation(positive)
        h, v, mean = h[positive], v[positive], mean[positive] / h[positive]
        return Problem(
            h,
            v,
            initial_mean=mean,
            initial_variance=0.0,
            noise_correlation=correlation,
            expected_losses_only=not self.complete,
        )

    def _correlation(self, chosen: NDArray[np.bool_]) -> Correlation | None:
        """Correlation of the noise along the chosen nodes, none beyond the eigenpairs."""
        pairs = chosen[: len(self.noise)]
        values, vectors = np.linalg.eigh(self.noise[np.ix_(pairs, pairs)])
        factor = np.zeros((int(chosen.sum()), len(values)))
        factor[: len(values)] = vectors * np.sqrt(np.maximum(values, 0.0))
        return Correlation.of_factor(factor)[1]

    def problem_table(self) -> pd.DataFrame:
        """Convert `problem` to a table, which ``[problem] file = "..."`` reads.

        Returns
        -------
        DataFrame
            Columns curvature, noise_variance, initial_mean, initial_variance and, if the noise is
            correlated, noise_correlation.0, noise_correlation.1, ...
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
        """Fractions of the noise's trace and of the squared slope along curvature <= 0.

        Returns
        -------
        noise, squared_slope : float
            Both in [0, 1].
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
            Numbers of eigenpairs, draws and Lanczos nodes, and the measured values to ten digits.
        """
        return {
            "eigenpairs": len(self.pairs.values),
            "noise_samples": len(self.draws),
            "nodes": len(self.gradient.values),
            "largest": f"{self.largest:.10g}",
            "noise_trace": f"{self.noise_trace:.10g}",
        }


def measure_local(
    risk: EmpiricalRisk,
    eigenpairs: int | None = 50,
    *,
    noise_samples: int = 6,
    lanczos_steps: int = 10,
    seed: int = 0,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> LocalQuadratic:
    """Measure slope, curvature and noise of an empirical risk.

    Parameters
    ----------
    risk : EmpiricalRisk
        The loss. Its `curvature` determines whether the Hessian or the Gauss-Newton matrix is
        measured.
    eigenpairs : int, optional
        Number of largest eigenvalues that are measured one by one; None computes all from the dense
        matrix, for few weights.
    noise_samples : int
        Number of random draws of the gradient noise beyond the eigenpairs, at least 1.
    lanczos_steps : int
        Products with the curvature for each draw, and for the gradient; at least 1.
    seed : int
        Seed of all random draws.
    cache : Cache, optional
        Stores the result of every stage; nothing is stored by default.
    progress : callable, optional
        Called with 1 after every product with the curvature; for a dense matrix see
        `EmpiricalRisk.curvature_matrix`.

    Returns
    -------
    LocalQuadratic

    Raises
    ------
    NQMError
        If there are fewer than two examples, a number is out of range, or the loss cannot be
        measured (`EmpiricalRisk.check`).
    """
    check_integer("noise_samples", noise_samples, 1)
    check_integer("lanczos_steps", lanczos_steps, 1)
    if risk.examples < 2:
        raise NQMError("gradient noise needs at least two examples; got 1")
    stored = (cache or Cache()).of(risk, seed=seed)
    complete = eigenpairs is None or eigenpairs >= risk.size

    def stiffest() -> dict[str, Any]:
        risk.check()
        if complete:
            matrix = risk.curvature_matrix(progress).double().cpu().numpy()
            values, vectors = np.linalg.eigh(matrix)
            pairs = Eigenpairs(values[::-1], vectors[:, ::-1], np.zeros(len(values)))
        else:
            assert eigenpairs is not None
            pairs = leading_pairs(risk, eigenpairs, seed=seed, progress=progress)
        noise = gradient_noise.covariance(risk, pairs.vectors)
        return vars(pairs) | {"noise": noise}

    settings = {} if complete else {"eigenpairs": eigenpairs}
    top = stored("eigenpairs", stiffest, complete=complete, **settings)
    known = Eigenpairs(top["values"], top["vectors"], top["residuals"])
    gradient = risk.gradient().double().cpu().numpy()

    def draw(index: int) -> FloatArray:
        rng = np.random.default_rng([seed, 2, index])
        weights = rng.standard_normal(risk.examples)
        weights = (weights - weights.mean()) / np.sqrt(risk.examples)
        noise = risk.weighted_gradient(torch.from_numpy(weights).to(risk.weights))
        return np.asarray(noise.double().cpu().numpy())

    drawn = 0 if complete else noise_samples

    def lanczos() -> dict[str, Any]:
        starts = [gradient, *(draw(i) for i in range(drawn))]
        runs = lanczos_together(products(risk, progress), starts, lanczos_steps, known.vectors)
        return {f"{i}-{name}": a for i, run in enumerate(runs) for name, a in vars(run).items()}

    nodes = stored("krylov", lanczos, lanczos_steps=lanczos_steps, draws=drawn, **settings)
    rest, *draws = (
        LanczosNodes(*(nodes[f"{i}-{name}"] for name in ("values", "amplitudes", "vectors")))
        for i in range(1 + drawn)
    )
    if complete:
        trace = np.trace(top["noise"])
    else:
        known_trace = stored("trace", lambda: {"trace": np.array(gradient_noise.trace(risk))})
        trace = known_trace["trace"]
    return LocalQuadratic(
        risk.loss(),
        known,
        top["noise"],
        known.vectors.T @ gradient,
        rest,
        tuple(draws),
        float(trace),
        risk.examples,
    )


def vector(risk: EmpiricalRisk, values: FloatArray) -> torch.Tensor:
    """Convert an array to a tensor of the risk's precision and device.

    Parameters
    ----------
    risk : EmpiricalRisk
        Gives precision and device.
    values : ndarray, shape (p,)
        A vector of weights.

    Returns
    -------
    Tensor, shape (p,)
    """
    return torch.from_numpy(np.ascontiguousarray(values)).to(risk.weights)
