"""Power-law random features: linear regression on a fixed random projection of the data.

Data x in R^v with Var x_j = l_j = j^(-2 alpha), target y = sum_j j^(-beta) x_j + e, and m features
``W'x`` with a fixed W of independent N(0, 1 / m) (Maloney, Roberts & Sully 2022; Paquette et al.
2024, "4+3 phases of compute-optimal neural scaling laws", section 1.1). The features' covariance
``W' diag(l) W`` is a sample covariance of m draws from the spectrum l. For large m its eigenvalues,
and the target's share in each, no longer depend on the draw (Marchenko & Pastur 1967; Silverstein
& Choi 1995): with the root w(z), Im w > 0, of

    1 / w = -z + 1/m sum_j l_j / (1 + w l_j)

the eigenvalues have density ``m Im w(x + i0) / pi``, and the target's variance along them is
distributed with density ``Im s(x + i0) / pi``, ``s(z) = -1/z sum_j l_j j^(-2 beta) / (1 + w l_j)``;
its mass at 0 is what the features cannot express.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nqm.errors import NQMError, check_integer, check_number
from nqm.limits import check_memory, check_work
from nqm.problems.least_squares import LeastSquares, power_laws
from nqm.problems.quadratic import FloatArray
from nqm.problems.quadrature import condense, condensed_measure

#: Largest relative error of the totals.
ACCURACY = 1e-6
#: Most nodes of a panel of a band.
MOST_POINTS = 128
#: Halvings of a bracket.
HALVINGS = 60


def random_features(
    features: int,
    hidden: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
) -> LeastSquares:
    """Power-law random features: linear regression on ``W'x``, start at zero weights.

    Data x in R^hidden with Var x_j = j^(-2 alpha), target y = sum_j j^(-beta) x_j + e, and a fixed
    W of independent N(0, 1 / features) (Maloney, Roberts & Sully 2022; Paquette et al. 2024,
    "4+3 phases of compute-optimal neural scaling laws", section 1.1).

    The part of the target that the features cannot express is a Gaussian independent of all
    features, so it acts exactly as label noise: `label_noise` of the result is the variance of this
    misfit plus that of e, and `irreducible_loss` is the loss that no training removes.

    Parameters
    ----------
    features : int
        Number of trained weights, >= 1.
    hidden : int
        Dimension of the data, >= 1.
    alpha, beta : float
        Exponents of the data's spectrum and of the target, >= 0.
    label_noise : float
        Variance of e, >= 0.
    seed : int
        Seed of the draw of W.

    Returns
    -------
    LeastSquares
        In the eigenbasis of the features' covariance.

    Raises
    ------
    NQMError
        If an argument is out of range, or the decomposition would take too much memory or time.
    """
    check_integer("random_features.features", features, 1)
    check_integer("random_features.hidden", hidden, 1)
    check_integer("random_features.seed", seed, 0)
    check_number("random_features.label_noise", label_noise, low=0.0)
    # The matrix, its copy and its two factors, then some 4 m n min(m, n) multiplications.
    small, large = sorted((features, hidden))
    where = "random_features.features" if features >= hidden else "random_features.hidden"
    check_memory(where, large, 3.0 * features * hidden + 2.0 * small**2)
    check_work(where, large, 4.0 * large * small**2, "of a singular value decomposition")
    variance, target = power_laws(hidden, alpha, beta, "random_features")
    draw = np.random.default_rng(seed).standard_normal((hidden, features))
    scaled = np.sqrt(variance)[:, None] * draw / np.sqrt(features)
    # Lambda^1/2 W = U S V': the features' covariance is V S^2 V', and w* = V S^-1 U' Lambda^1/2 b.
    basis, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    kept = singular > np.finfo(np.float64).eps * max(scaled.shape) * singular[0]
    basis, singular = basis[:, kept], singular[kept]
    signal = np.sqrt(variance) * target
    seen = basis.T @ signal
    misfit = signal - basis @ seen
    optimum = seen / singular
    total = label_noise + float(misfit @ misfit)
    return LeastSquares(singular**2, total, -optimum, 0.0, minimum=optimum)


def random_features_equivalent(
    features: int,
    hidden: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    label_noise: float = 0.0,
) -> LeastSquares:
    """Power-law random features without a draw of W: the deterministic equivalent.

    Its losses are those of `random_features` up to a relative error of order 1 / features, smaller
    than what one draw of W scatters. Thousands of features become a few hundred nodes, with
    fractional multiplicities, so that `solve` follows them for 10^9 steps.

    Parameters
    ----------
    features : int
        Number of trained weights, >= 1.
    hidden : int
        Dimension of the data, >= 1.
    alpha, beta : float
        Exponents of the data's spectrum and of the target, >= 0.
    label_noise : float
        Variance of e, >= 0.

    Returns
    -------
    LeastSquares
        Quadrature nodes of the features' spectrum; `label_noise` includes what the features cannot
        express. Expected losses only.

    Raises
    ------
    NQMError
        If an argument is out of range, or the quadrature would take too much memory.
    """
    where = "random_features_equivalent"
    check_integer(f"{where}.features", features, 1)
    check_integer(f"{where}.hidden", hidden, 1)
    check_number(f"{where}.label_noise", label_noise, low=0.0)
    check_memory(f"{where}.hidden", hidden, 6.0 * hidden)
    data = _Spectrum(*_atoms(features, hidden, alpha, beta, where), features)
    bands, dips = data.bands()
    misfit = data.misfit()
    totals, points = data.totals(misfit), 8
    while True:
        x, count, signal = data.quadrature(bands, dips, points)
        found = np.array([count.sum(), count @ x**2, signal.sum()])
        error = float(np.abs(found / totals - 1.0).max())
        if error < ACCURACY or points >= MOST_POINTS:
            break
        points *= 2
    if not error < 1e-4:
        raise NQMError(
            f"{where}: the quadrature for features = {features} and hidden = {hidden} has an "
            f"error of {error:.1e} of its moments; use random_features, which draws W"
        )
    return condense(
        LeastSquares(x, label_noise + misfit, 0.0, signal / (count * x), multiplicity=count)
    )


def _atoms(
    features: int, hidden: int, alpha: float, beta: float, where: str
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Spectrum of the data, largest first: eigenvalues, multiplicities, the target's variance.

    Only eigenvalues whose own bands cannot be seen are put together.
    """
    variance, target = power_laws(hidden, alpha, beta, where)
    signal = variance * target**2
    kept = min(hidden, 64 + 4 * int(_may_part(variance, features).sum()))
    tail = condensed_measure(variance[kept:], signal[kept:])
    parts = (variance[:kept], np.ones(kept), signal[:kept]), tail
    atom, count, share = (np.concatenate(part) for part in zip(*parts, strict=True))
    equal, index = np.unique(-atom, return_inverse=True)
    counts, shares = (np.bincount(index, each).astype(np.float64) for each in (count, share))
    return -equal, counts, shares


def _may_part(atom: FloatArray, features: int) -> NDArray[np.bool_]:
    """Whether two neighbours could belong to separate bands, were there no other eigenvalues."""
    return np.asarray(8.0 * atom[1:] ** 2 < features * (atom[:-1] - atom[1:]) ** 2)


class _Spectrum:
    """Eigenvalues l of the data with multiplicities and the target's variance, seen by m features.

    On the real axis z(t) = t (1 + 1/m sum l / (t - l)) with t = -1 / w; where it rises there are
    no eigenvalues (Silverstein & Choi 1995).
    """

    def __init__(self, atom: FloatArray, count: FloatArray, signal: FloatArray, features: int):
        self.atom, self.count, self.signal, self.features = atom, count, signal, features

    def _z(self, t: FloatArray) -> FloatArray:
        pulled = (self.count * self.atom / (t[:, None] - self.atom)).sum(axis=1)
        return np.asarray(t * (1.0 + pulled / self.features))

    def _fall(self, t: FloatArray) -> FloatArray:
        """Sum of (l / (t - l))^2 less m: z(t) rises where it is below 0."""
        with np.errstate(divide="ignore"):
            ratio = self.atom / (t[:, None] - self.atom)
        return np.asarray((self.count * ratio**2).sum(axis=1) - self.features)

    def _root(self, above: FloatArray, below: FloatArray) -> FloatArray:
        """Points between brackets at which `_fall` is above and below 0."""
        for _ in range(HALVINGS):
            middle = 0.5 * (above + below)
            high = self._fall(middle) > 0
            above, below = np.where(high, middle, above), np.where(high, below, middle)
        return below

    def bands(self) -> tuple[FloatArray, FloatArray]:
        """Edges (bands, 2) of where eigenvalues are, highest first, and where they are fewest."""
        atom, total = self.atom, self.count.sum()
        reach = atom[:1] * (1.0 + np.sqrt(total / self.features))
        top = self._root(atom[:1], reach)
        if total > self.features:
            far = -np.sqrt((self.count * atom**2).sum() / self.features)
            bottom = self._root(np.zeros(1), np.array([far]))
        elif total < self.features:
            bottom = self._root(atom[-1:], np.zeros(1))
        else:
            bottom = np.zeros(1)
        edges = [self._z(top)]
        may_part = _may_part(atom, self.features)
        high, low = atom[:-1][may_part], atom[1:][may_part]
        # Each gap's function is convex: golden section finds its least value.
        left, right, golden = low, high, (np.sqrt(5.0) - 1.0) / 2.0
        for _ in range(2 * HALVINGS):
            one, two = right - golden * (right - left), left + golden * (right - left)
            smaller = self._fall(one) < self._fall(two)
            left, right = np.where(smaller, left, one), np.where(smaller, two, right)
        least = 0.5 * (left + right)
        open_ = self._fall(least) < 0.0
        if open_.any():
            from_high = self._z(self._root(high[open_], least[open_]))
            from_low = self._z(self._root(low[open_], least[open_]))
            edges.append(np.column_stack([from_high, from_low]).ravel())
        edges.append(np.maximum(self._z(bottom), 1e-13 * atom[-1:]))
        return np.concatenate(edges).reshape(-1, 2)[:, ::-1], self._z(least[~open_])

    def totals(self, misfit: float) -> FloatArray:
        """Number of eigenvalues, sum of their squares, and the target's variance along them."""
        first, second = (float(self.count @ self.atom**power) for power in (1, 2))
        number = min(float(self.count.sum()), self.features)
        signal = float(self.signal.sum()) - misfit
        return np.array([number, second + first**2 / self.features, signal])

    def misfit(self) -> float:
        """Variance of the target that no weights of the features express."""
        if self.count.sum() <= self.features:
            return 0.0
        low, high = 0.0, float((self.count * self.atom).sum() / self.features)
        for _ in range(2 * HALVINGS):  # sum l / (l + k) = m, a falling function of k
            k = 0.5 * (low + high)
            if (self.count * self.atom / (self.atom + k)).sum() > self.features:
                low = k
            else:
                high = k
        return float((self.signal * k / (self.atom + k)).sum())

    def quadrature(
        self, bands: FloatArray, dips: FloatArray, points: int
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Nodes, eigenvalues that each stands for, and the target's variance.

        A band's density vanishes as a square root at both ends, so it is smooth in the angle t of
        log x = middle + half cos t. Panels end where it nearly vanishes, and are not wide.
        """
        place, weight = np.polynomial.legendre.leggauss(points)
        nodes, weights = [], []
        for low, high in np.log(bands):
            middle, half = 0.5 * (low + high), 0.5 * (high - low)
            inside = np.log(dips[(dips > np.exp(low)) & (dips < np.exp(high))])
            split = np.arccos((inside - middle) / half)
            edges = np.unique([*np.linspace(0.0, np.pi, int(np.ceil(2 * half)) + 1), *split])
            angle = (0.5 * (edges[1:] + edges[:-1]) + 0.5 * np.diff(edges) * place[:, None]).ravel()
            share = (0.5 * np.diff(edges) * weight[:, None]).ravel()
            order = np.argsort(angle)
            nodes.append(np.exp(middle + half * np.cos(angle[order])))
            weights.append(half * np.sin(angle[order]) * share[order])
        x, weight = np.concatenate(nodes), np.concatenate(weights)
        w = self._resolvent(x)
        seen = (self.signal / (1.0 + w[:, None] * self.atom)).sum(axis=1)
        count = self.features * w.imag / np.pi * weight * x
        signal = -seen.imag / np.pi * weight
        return x, count, signal

    def _resolvent(self, x: FloatArray) -> NDArray[np.complex128]:
        """Root w(x + i0), each found from its neighbour's."""
        out, near = np.empty(x.size, dtype=np.complex128), None
        for index, place in enumerate(x.tolist()):
            found = None if near is None else self._newton(place, near)
            near = self._from_above(place) if found is None else found
            out[index] = near
        return out

    def _newton(self, z: complex, w: complex, most: int = 12) -> complex | None:
        """Root w(z) near a guess; None if it is not found, or not above the real axis."""
        for _ in range(most):
            share = self.atom / (1.0 + w * self.atom)
            weighted = self.count * share
            value = 1.0 / w + z - complex(weighted.sum()) / self.features
            slope = -1.0 / w**2 + complex(weighted @ share) / self.features
            step = value / slope if slope else np.nan
            w -= step
            if not abs(w) < 1e100:
                return None
            if abs(step) < 1e-13 * abs(w):
                return w if w.imag > 0.0 else None
        return None

    def _from_above(self, x: float) -> complex:
        """Root w(x + i0), followed down from far above the real axis, where it is -1 / z."""
        height = 4.0 * float((self.count * self.atom).sum() / self.features + self.atom[0])
        w = -1.0 / complex(x, height)
        while height > 1e-12 * x:
            w = self._newton(complex(x, height), w) or w
            height *= 0.5
        return self._newton(x, w, 60) or w
