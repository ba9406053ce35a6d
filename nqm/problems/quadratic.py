"""The noisy quadratic problem: a loss that is quadratic and a gradient that is noisy.

In the eigenbasis of the Hessian every direction evolves independently,

    L(x) = 1/2 sum_i m_i h_i x_i^2,      g_i(x) = h_i x_i + e_i,      Var e_i = v_i / B,

with curvature h, noise variance v of one example's gradient, batch size B and the displacement
x = w - w* from the minimum (Zhang et al. 2019, "Which algorithmic choices matter at which batch
sizes?", section 3). A direction may stand for m_i equal ones (its multiplicity).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory
from nqm.problems.correlation import Correlation
from nqm.words import html_list, range_words, short_repr

FloatArray = NDArray[np.float64]

#: Relative size below which an eigenvalue of a measured Hessian counts as zero.
FLAT = 1e-12


class Quadratic:
    """Base of problems with a quadratic loss; `Problem` is the one with additive noise."""

    curvature: FloatArray
    multiplicity: FloatArray
    initial_mean: FloatArray
    initial_variance: FloatArray
    minimum: FloatArray
    expected_losses_only: bool = False

    @property
    def correlated(self) -> bool:
        """Whether directions are correlated, by the noise or by the start.

        Expected losses of linear methods do not depend on it; the distribution of the loss does.
        """
        return False

    @property
    def directions(self) -> int:
        """Number of entries d (equal directions count once)."""
        return self.curvature.size

    @property
    def weight(self) -> FloatArray:
        """Loss per unit of second moment, m h / 2, shape (d,)."""
        return 0.5 * self.multiplicity * self.curvature

    @property
    def initial_loss(self) -> float:
        """Expected loss of the start."""
        return float(self.weight @ (self.initial_mean**2 + self.initial_variance))

    def _noise_words(self) -> dict[str, str]:
        """What a notebook shows of the gradient noise."""
        return {}

    def _repr_html_(self) -> str:
        """Table that a notebook shows."""
        total = float(self.multiplicity.sum())
        stand = "" if np.all(self.multiplicity == 1.0) else f", which stand for {total:.6g}"
        start = {"mean": self.initial_mean, "variance": self.initial_variance}
        entries = {
            "directions": f"{self.directions}{stand}",
            "curvature h": range_words(self.curvature),
            **self._noise_words(),
            "start": ", ".join(f"{name} {range_words(value)}" for name, value in start.items()),
            "initial loss": self.initial_loss,
            "minimum": range_words(self.minimum) if np.any(self.minimum) else None,
            "only expected losses": "yes" if self.expected_losses_only else None,
        }
        return html_list(type(self).__name__, entries)

    def check_distribution(self, where: str) -> None:
        """Refuse what needs more than expected losses, if this problem has no more.

        Parameters
        ----------
        where : str
            What is asked for; the error begins with it.

        Raises
        ------
        NQMError
            If `expected_losses_only`.
        """
        if self.expected_losses_only:
            raise NQMError(
                f"{where}: the entries of this problem are quadrature nodes, which have the "
                "expected losses of linear methods only; use the problem with every direction"
            )

    def replace(self, **changes: Any) -> Self:
        """Copy the problem with some fields changed.

        Parameters
        ----------
        **changes
            New values by name of the field.

        Returns
        -------
        Problem or LeastSquares
            Of the same class.

        Raises
        ------
        NQMError
            If the class refuses a value.
        """
        held = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return type(self)(**(held | changes))


@dataclass(frozen=True, eq=False, init=False)
class Problem(Quadratic):
    """A noisy quadratic problem in the eigenbasis of its Hessian.

    Every vector but the first may be a scalar; all are stored as read-only float64 arrays.

    Parameters
    ----------
    curvature : array_like, shape (d,)
        Eigenvalues h of the Hessian, >= 0.
    noise_variance : array_like, shape (d,)
        Variance v of one example's gradient along each direction, >= 0; a batch of B has v / B.
    multiplicity : array_like, shape (d,)
        Number of equal directions that each entry stands for, > 0 (1 by default).
    initial_mean, initial_variance : array_like, shape (d,)
        Gaussian start of the displacement from the minimum (N(0, 1) by default).
    minimum : array_like, shape (d,)
        Position w* of the minimum. Used only by methods that are not translation invariant, e.g.
        multiplicative late-phase weights.
    irreducible_loss : float
        Constant that no reported loss includes, e.g. 1/2 tr(H Sigma) of noise on the minimum.
    noise_correlation, initial_correlation : array_like, shape (d, d), optional
        Correlations between directions of the noise and of the start, kept as `Correlation`; none
        by default. They need multiplicity 1. Expected losses of linear methods do not depend on
        them, the distribution of the loss does.
    expected_losses_only : bool
        True if the entries are quadrature nodes, each of which stands for directions of its own
        (`nqm.problems.quadrature.condense`, a partly measured network). Sums over the entries are
        then right, and with them the expected losses of linear methods; the distribution of the
        loss is not known, and methods that are not linear are refused.

    Raises
    ------
    NQMError
        For a negative curvature or variance, a NaN, lengths that do not match, or a matrix that is
        no correlation.
    """

    curvature: FloatArray
    noise_variance: FloatArray
    multiplicity: FloatArray
    initial_mean: FloatArray
    initial_variance: FloatArray
    minimum: FloatArray
    irreducible_loss: float
    noise_correlation: Correlation | None
    initial_correlation: Correlation | None
    expected_losses_only: bool

    __repr__ = short_repr

    def __init__(  # noqa: PLR0913 - options, by keyword
        self,
        curvature: ArrayLike,
        noise_variance: ArrayLike,
        multiplicity: ArrayLike = 1.0,
        initial_mean: ArrayLike = 0.0,
        initial_variance: ArrayLike = 1.0,
        minimum: ArrayLike = 0.0,
        irreducible_loss: float = 0.0,
        noise_correlation: ArrayLike | Correlation | None = None,
        initial_correlation: ArrayLike | Correlation | None = None,
        expected_losses_only: bool = False,
    ):
        h = _vector("curvature", curvature, None, low=0.0)
        object.__setattr__(self, "curvature", h)
        values = (noise_variance, multiplicity, initial_mean, initial_variance, minimum)
        for (name, low), value in zip(_LOWEST.items(), values, strict=True):
            object.__setattr__(self, name, _vector(name, value, h.size, low=low))
        if not np.all(self.multiplicity > 0):
            raise NQMError(f"problem.multiplicity must be > 0; got {self.multiplicity.min():g}")
        check_number("problem.irreducible_loss", irreducible_loss, low=0.0)
        object.__setattr__(self, "irreducible_loss", float(irreducible_loss))
        object.__setattr__(self, "expected_losses_only", bool(expected_losses_only))
        stated = {
            "noise_correlation": noise_correlation,
            "initial_correlation": initial_correlation,
        }
        for name, given in stated.items():
            where = f"problem.{name}"
            held = None if given is None else Correlation.of(where, given, h.size)
            object.__setattr__(self, name, held)
            if held is not None and np.any(self.multiplicity != 1.0):
                raise NQMError(
                    f"{where} needs multiplicity 1: a direction that stands for several has no one "
                    f"correlation; got {self.multiplicity[self.multiplicity != 1.0][0]:g}"
                )

    @property
    def correlated(self) -> bool:
        """Whether directions are correlated, by the noise or by the start."""
        return self.noise_correlation is not None or self.initial_correlation is not None

    def _noise_words(self) -> dict[str, str]:
        """What a notebook shows of the gradient noise."""
        entries = {"noise variance v": range_words(self.noise_variance)}
        scale = float(self.noise_variance @ self.curvature) / max(
            float(self.curvature @ self.curvature), np.finfo(float).tiny
        )
        if scale > 0.0 and np.allclose(self.noise_variance, scale * self.curvature, 1e-9, 0.0):
            entries["noise variance v"] += f" (v = {scale:.6g} h)"
        if self.correlated:
            entries["correlated directions"] = "yes"
        if self.irreducible_loss:
            entries["irreducible loss"] = f"{self.irreducible_loss:.6g}"
        return entries

    def key(self) -> str:
        """Content key, equal for equal problems only.

        Returns
        -------
        str
            16 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for name in ("curvature", *_LOWEST):
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        digest.update(np.float64(self.irreducible_loss).tobytes())
        for name in ("noise_correlation", "initial_correlation"):
            held = getattr(self, name)
            if held is not None:
                digest.update(name.encode() + np.ascontiguousarray(held.matrix).tobytes())
        if self.expected_losses_only:
            digest.update(b"expected_losses_only")
        return digest.hexdigest()[:16]

    def precondition(self, p: ArrayLike) -> Problem:
        """Change variables so that SGD on the result is SGD with gradients ``p * g`` here.

        With y = x / sqrt(p) curvature and noise become (h, v) -> (p h, p v), and the start is
        scaled by 1 / sqrt(p); every loss is unchanged.

        Parameters
        ----------
        p : array_like, shape (d,)
            Diagonal preconditioner, > 0; a scalar for all directions.

        Returns
        -------
        Problem
            In the variables y.

        Raises
        ------
        NQMError
            If `p` is not > 0 or has a wrong length.
        """
        p = _vector("p", p, self.directions, low=0.0)
        if not np.all(p > 0):
            raise NQMError(f"precondition: p must be > 0; got {p.min():g}")
        root = np.sqrt(p)
        return self.replace(
            curvature=p * self.curvature,
            noise_variance=p * self.noise_variance,
            initial_mean=self.initial_mean / root,
            initial_variance=self.initial_variance / p,
            minimum=self.minimum / root,
        )

    def expanded(self) -> Problem:
        """Repeat every direction as often as its multiplicity states.

        Expected losses are the same. Monte Carlo needs this form for the distribution of the loss
        over runs, because it simulates one entry once and counts it m times.

        Returns
        -------
        Problem
            With multiplicity 1.

        Raises
        ------
        NQMError
            If a multiplicity is no whole number, or the result does not fit in memory.
        """
        counts = self.multiplicity.astype(np.int64)
        if not np.array_equal(counts, self.multiplicity):
            raise NQMError("expanded: multiplicity must hold whole numbers; got fractions")
        total, vectors = float(counts.sum()), 6  # of a problem
        check_memory("expanded: the sum of multiplicity", total, vectors * total)
        repeated = {
            name: np.repeat(getattr(self, name), counts)
            for name in ("curvature", *_LOWEST)
            if name != "multiplicity"
        }
        return self.replace(multiplicity=1.0, **repeated)

    def binned(self, bins: int) -> Problem:
        """Merge directions into at most `bins` groups of nearly equal curvature.

        Groups are geometric in curvature. Each takes the means of its members weighted by
        multiplicity, so the traces of H and C and the initial loss to first order are kept
        (rounding down to a bin edge would lose several percent of the trace). The mean of the start
        becomes variance; where there is one, the result has `expected_losses_only`.

        Parameters
        ----------
        bins : int
            Largest number of groups, >= 1.

        Returns
        -------
        Problem
            One entry per group; `multiplicity` is the number of directions in it.

        Raises
        ------
        NQMError
            Where directions are correlated: a group has no one correlation with another.
        """
        check_integer("binned: bins", bins, 1)
        if self.correlated:
            raise NQMError(
                "binned: directions are correlated; where expected losses are enough, drop that by "
                "problem.replace(noise_correlation=None, initial_correlation=None)"
            )
        positive = self.curvature > 0
        label = np.zeros(self.directions)
        if positive.any():
            log = np.log(self.curvature[positive])
            # By arithmetic, for any number of bins; the largest curvature belongs to the last.
            width = (log.max() - log.min()) / bins
            place = np.floor((log - log.min()) / width) if width > 0.0 else np.zeros(log.size)
            label[positive] = 1.0 + np.minimum(place, bins - 1.0)
        _, group = np.unique(label, return_inverse=True)
        count = np.bincount(group, self.multiplicity)

        def mean(values: FloatArray, by: FloatArray) -> FloatArray:
            total = np.bincount(group, by)
            plain = np.bincount(group, self.multiplicity * values) / count
            kept = np.divide(np.bincount(group, by * values), total, where=total > 0, out=plain)
            return np.asarray(kept)

        weight = self.weight
        return Problem(
            curvature=mean(self.curvature, self.multiplicity),
            noise_variance=mean(self.noise_variance, self.multiplicity),
            multiplicity=count,
            # Weighted by curvature so that the initial loss survives the merging exactly.
            initial_mean=np.zeros_like(count),
            initial_variance=mean(self.initial_mean**2 + self.initial_variance, weight),
            minimum=mean(self.minimum, self.multiplicity),
            irreducible_loss=self.irreducible_loss,
            expected_losses_only=self.expected_losses_only or bool(np.any(self.initial_mean)),
        )

    @classmethod
    def from_minimum_noise(
        cls, curvature: ArrayLike, minimum_variance: ArrayLike, **fields: Any
    ) -> Problem:
        """Build a problem with noise on the minimum: L = 1/2 (x + e)' H (x + e), e ~ N(0, Sigma).

        The gradient noise is C = H Sigma H (here v = h^2 s2), and every loss contains the constant
        1/2 tr(H Sigma), stored as `irreducible_loss` (the convention of von Oswald et al. 2021,
        section 3.1).

        Parameters
        ----------
        curvature, minimum_variance : array_like, shape (d,)
            Eigenvalue h, >= 0, and variance s2 of one example's minimum along each direction, >= 0.
        **fields
            Any further field of `Problem`.

        Returns
        -------
        Problem
            With noise variance h^2 s2.

        Raises
        ------
        NQMError
            If `Problem` refuses a value.
        """
        h = _vector("curvature", curvature, None, low=0.0)
        s2 = _vector("minimum_variance", minimum_variance, h.size, low=0.0)
        count = np.broadcast_to(np.asarray(fields.get("multiplicity", 1.0), dtype=float), h.shape)
        constant = float(0.5 * np.sum(count * h * s2))
        return cls(h, h**2 * s2, irreducible_loss=constant, **fields)

    @classmethod
    def from_matrices(
        cls,
        hessian: ArrayLike,
        noise_covariance: ArrayLike,
        *,
        initial_mean: ArrayLike = 0.0,
        initial_covariance: ArrayLike | None = None,
        minimum: ArrayLike = 0.0,
    ) -> Problem:
        """Build a problem from dense matrices H and C that need not commute.

        In the eigenbasis U of H the variance of each direction depends on its own noise alone, so
        expected losses depend on the diagonal of U' C U. The distribution of the loss depends on
        the other entries as well, which become `noise_correlation` and `initial_correlation`.

        Parameters
        ----------
        hessian, noise_covariance : array_like, shape (d, d)
            H, and the covariance C of one example's gradient: symmetric, positive semi-definite.
        initial_mean : array_like, shape (d,) or scalar
            Mean displacement of the start from w*, in the coordinates of `hessian` like the two
            below.
        initial_covariance : array_like, shape (d, d), optional
            Covariance of the start; the identity by default.
        minimum : array_like, shape (d,) or scalar
            Position w*.

        Returns
        -------
        Problem
            In the eigenbasis of H, largest curvature first.

        Raises
        ------
        NQMError
            If a matrix is not square, symmetric or positive semi-definite.
        """
        h_matrix = _semidefinite("hessian", hessian, None)
        size = h_matrix.shape[0]
        c_matrix = _semidefinite("noise_covariance", noise_covariance, size)
        start = np.eye(size) if initial_covariance is None else initial_covariance
        start = _semidefinite("initial_covariance", start, size)
        h, basis = np.linalg.eigh(h_matrix)

        order = slice(None, None, -1)  # largest curvature first
        v, noise_correlation = Correlation.of_factor((basis.T @ _factor(c_matrix))[order])
        s, initial_correlation = Correlation.of_factor((basis.T @ _factor(start))[order])
        return cls(
            np.maximum(h, 0.0)[order],
            v,
            initial_mean=(basis.T @ _vector("initial_mean", initial_mean, size))[order],
            initial_variance=s,
            minimum=(basis.T @ _vector("minimum", minimum, size))[order],
            noise_correlation=noise_correlation,
            initial_correlation=initial_correlation,
        )

    @classmethod
    def from_linear_regression(
        cls, features: ArrayLike, target: ArrayLike, *, start: ArrayLike = 0.0
    ) -> Problem:
        """Measure curvature and gradient noise of least squares on real data.

        For ``L(w) = 1/(2 N) |X w - y|^2`` the Hessian is H = X'X / N, and one example drawn with
        replacement has gradient x (x'w - y). Its covariance at the minimum,
        C = 1/N sum_n r_n^2 x_n x_n' with residuals r, is used for all weights. This additive noise
        ignores that the true noise grows with the distance from w*. Directions along which all
        examples have the projection 0 are dropped, because they cannot change the loss.

        Parameters
        ----------
        features : array_like, shape (N, p)
            Inputs X, one example per row.
        target : array_like, shape (N,)
            Targets y.
        start : array_like, shape (p,) or scalar
            Weights at the start of training; the displacement from w* becomes `initial_mean`
            (with no variance).

        Returns
        -------
        Problem
            In the eigenbasis of H, largest curvature first; at most min(N, p) directions.

        Raises
        ------
        NQMError
            If shapes do not match, a value is not finite, or all features are 0.
        """
        x = np.asarray(features, dtype=np.float64)
        y = np.asarray(target, dtype=np.float64)
        if x.ndim != 2 or y.shape != (x.shape[0],):
            raise NQMError(
                f"from_linear_regression expects features (N, p) and target (N,); "
                f"got {x.shape} and {y.shape}"
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise NQMError("from_linear_regression: features and target must be finite; got NaN")
        if not np.any(x):
            got = "none" if x.size == 0 else "zeros only"
            raise NQMError(f"from_linear_regression: features must vary; got {got}")
        examples, width = x.shape
        _, singular, basis = np.linalg.svd(x, full_matrices=False)
        h = singular**2 / examples
        kept = h > FLAT * h[0]
        h, basis = h[kept], basis[kept].T
        projected = x @ basis  # (N, d): every example along the eigendirections
        optimum = (projected.T @ y) / examples / h
        residual = y - projected @ optimum
        gradients = (projected * residual[:, None]).T / np.sqrt(examples)
        noise, correlation = Correlation.of_factor(gradients)
        origin = basis.T @ _vector("start", start, width)
        return cls(
            h,
            noise,
            initial_mean=origin - optimum,
            initial_variance=0.0,
            minimum=optimum,
            irreducible_loss=float(0.5 * np.mean(residual**2)),
            noise_correlation=correlation,
        )


_LOWEST: dict[str, float] = {
    "noise_variance": 0.0,
    "multiplicity": 0.0,
    "initial_mean": -np.inf,
    "initial_variance": 0.0,
    "minimum": -np.inf,
}


def numbers_above_zero(where: str, values: ArrayLike) -> FloatArray:
    """Check that an argument is a number > 0 or a list of them.

    Parameters
    ----------
    where : str
        Name of the argument, for the message.
    values : array_like
        Scalar or shape (n,).

    Returns
    -------
    ndarray, shape (n,)
        The numbers; n = 1 for a scalar.

    Raises
    ------
    NQMError
        If one is not finite or not > 0, or there is none.
    """
    try:
        vector = np.atleast_1d(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        vector = np.empty(0)
    if vector.ndim != 1 or not vector.size or not np.all(np.isfinite(vector) & (vector > 0)):
        raise NQMError(f"{where} must hold numbers > 0; got {shown(values)}")
    return vector


def finite_numbers(where: str, values: ArrayLike) -> FloatArray:
    """Numbers as an array of their shape; NQMError unless all are finite.

    Parameters
    ----------
    where : str
        The field, for the message.
    values : array_like

    Returns
    -------
    ndarray

    Raises
    ------
    NQMError
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if not np.isfinite(array).all():
        raise NQMError(f"{where} must hold finite numbers; got {shown(values)}")
    return array


def _vector(name: str, value: ArrayLike, size: int | None, *, low: float = -np.inf) -> FloatArray:
    """Read-only float64 copy of shape (size,), broadcast from a scalar."""
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise NQMError(f"problem.{name} must hold numbers; got {value!r:.80}") from None
    if array.ndim > 1 or (size is None and array.ndim == 0):
        array = array.reshape(-1) if array.ndim == 0 else array
        if array.ndim > 1:
            raise NQMError(f"problem.{name} must be one-dimensional; got shape {array.shape}")
    if size is not None and array.ndim == 0:
        array = np.full(size, float(array))
    if array.size == 0:
        raise NQMError(f"problem.{name} must have at least one entry; got none")
    if size is not None and array.size != size:
        raise NQMError(
            f"problem.{name} has {array.size} entries but curvature has {size}; "
            "give one number or one per direction"
        )
    if not np.isfinite(array).all():
        raise NQMError(f"problem.{name} must be finite; got {array[~np.isfinite(array)][0]}")
    if array.min() < low:
        where = int(array.argmin())
        raise NQMError(f"problem.{name} must be >= {low:g}; got {array[where]:g} at index {where}")
    array.flags.writeable = False
    return array


def _factor(matrix: FloatArray) -> FloatArray:
    """F with F F' a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _semidefinite(name: str, value: ArrayLike, size: int | None) -> FloatArray:
    """Checked symmetric, positive semi-definite matrix of the given size."""
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise NQMError(f"{name} must be a square matrix; got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise NQMError(f"{name} must be finite; got NaN or infinity")
    if not np.allclose(matrix, matrix.T, rtol=1e-10, atol=1e-12 * np.abs(matrix).max()):
        raise NQMError(f"{name} must be symmetric; it differs from its transpose")
    if size is not None and matrix.shape[0] != size:
        raise NQMError(f"{name} must have the hessian's size {size}; got shape {matrix.shape}")
    values = np.linalg.eigvalsh(matrix)
    if values[0] < -FLAT * np.abs(values).max():
        raise NQMError(
            f"{name} must be positive semi-definite; its least eigenvalue: {values[0]:g}"
        )
    return matrix
