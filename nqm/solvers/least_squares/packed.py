"""Second moments with noise that depends on the state: one number per mode couples all directions.

One step of a linear method is z_i' = A_i z_i + C_i e_i in every direction i. In one-pass least
squares its minibatch gradient, taken at the point p = P z, has the noise

    Var e_i = (h_i^2 E p_i^2 + h_i (2 L(p) + s2)) / B,          2 L(p) = sum_j m_j h_j E p_j^2

(see `nqm.problems.least_squares`). So the packed second moments s_i of the state follow

    s_i' = D_i s_i + g_i (2 L + s2),          2 L = sum_j f_j s_j

where D_i contains A_i and the direction's own noise. One number couples all directions, so a step
costs O(d). K exchangeable members are a mean and a deviation, uncorrelated, each with a number 2 L
of its own; a member's point is their sum, so with b the deviation's share of the noise,

    noise of the mean      = (1 - b) (mean's + s2) +      b / (K - 1)  deviation's
    noise of the deviation =      b  (mean's + s2) + (1 - b / (K - 1)) deviation's

for own, shared and partly shared minibatches alike: on a shared minibatch, e_k - mean_k e depends
only on the differences between the members' points.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nqm.algorithms.base import Algorithm, Gradient, Mode, Rate, State, Value
from nqm.errors import NQMError
from nqm.limits import check_memory
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import FloatArray
from nqm.solvers.moments import Law
from nqm.transition import Transition, extract, spectral_radius

Indices = NDArray[np.int64]


class _Recorder:
    """A gradient that records the points at which it is evaluated."""

    def __init__(self, gradient: Gradient):
        self.gradient = gradient
        self.points: list[Value] = []

    def __call__(self, x: Value, batch: int | None = None, size: float = 1.0) -> Value:
        self.points.append(x)
        return self.gradient(x, batch, size)

    def normal(self) -> Value:
        return self.gradient.normal()


@dataclass(frozen=True)
class _Probed(Algorithm):
    """A chain with one more coordinate: the point at which it took its gradient.

    Run on unit vectors, the last row of its transition is the linear form P.
    """

    chain: Algorithm

    @property
    def coordinates(self) -> tuple[str, ...]:
        return (*self.chain.coordinates, "point of the gradient")

    @property
    def rate_count(self) -> int:
        return self.chain.rate_count

    def update(self, state: State, gradient: Gradient, lr: Rate, t: int) -> State:
        recorder = _Recorder(gradient)
        new = self.chain.update(state[:-1], recorder, lr, t)
        if len(recorder.points) != 1:
            raise NQMError(
                "least squares needs one gradient per member and step; "
                f"{type(self.chain).__name__} takes {len(recorder.points)}"
            )
        return (*new, recorder.points[0])

    def weights(self, state: State, t: int) -> Value:
        return self.chain.weights(state[:-1], t)

    def embed(self, draw: Callable[[], Value], normal: Callable[[], Value]) -> State:
        return (*self.chain.embed(draw, normal), 0.0)


@dataclass(frozen=True)
class Steps:
    """Maps of R distinct steps of M modes with n coordinates and N packed moments in all.

    Directions are the last axis, because it is the longest.

    Attributes
    ----------
    matrix : ndarray, shape (R, n, n, d)
        A, the map of the means.
    moment : ndarray, shape (R, N, N, d)
        D, the map of the packed moments.
    gain, sight : ndarray, shape (R, M, N, d)
        g and f of each mode's number 2 L.
    own : ndarray, shape (R, N, d)
        Second moment of the method's own noise (rounding).
    """

    matrix: FloatArray
    moment: FloatArray
    gain: FloatArray
    sight: FloatArray
    own: FloatArray


def pair(form: FloatArray, other: FloatArray) -> FloatArray:
    """Coefficients of E (form z)(other z) on the packed moments E z_k z_m, k <= m.

    Parameters
    ----------
    form, other : ndarray, shape (..., n, d)
        Coefficients of two linear forms of the n coordinates z.

    Returns
    -------
    ndarray, shape (..., N, d)
        N = n (n + 1) / 2 coefficients, in the order of `numpy.triu_indices`.
    """
    k, m = np.triu_indices(form.shape[-2])
    crossed = form[..., m, :] * other[..., k, :]
    crossed *= (k != m)[:, None]
    crossed += form[..., k, :] * other[..., m, :]
    return np.asarray(crossed)


def pack(moment: FloatArray) -> FloatArray:
    """Store the upper triangle of symmetric matrices.

    Parameters
    ----------
    moment : ndarray, shape (d, n, n)
        Symmetric second moments.

    Returns
    -------
    ndarray, shape (N, d)
        N = n (n + 1) / 2 packed moments, in the order of `numpy.triu_indices`.
    """
    i, j = np.triu_indices(moment.shape[-1])
    return np.ascontiguousarray(moment[:, i, j].T)


def unpack(packed: FloatArray, n: int) -> FloatArray:
    """Restore symmetric matrices from their packed form.

    Parameters
    ----------
    packed : ndarray, shape (N, d)
        Moments as `pack` returns them.
    n : int
        Size of the matrices; N = n (n + 1) / 2.

    Returns
    -------
    ndarray, shape (d, n, n)
        Symmetric second moments.
    """
    out = np.empty((packed.shape[1], n, n))
    i, j = np.triu_indices(n)
    out[:, i, j] = packed.T
    out[:, j, i] = packed.T
    return out


def _blocks(sizes: list[int]) -> list[slice]:
    edges = np.cumsum([0, *sizes])
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _shares(modes: tuple[Mode, ...], members: int) -> FloatArray:
    """Noise of each mode (row) per unit of noise at each mode's point (column)."""
    if len(modes) == 1:
        return np.ones((1, 1))
    b = modes[1].noise_share
    spill = b / (members - 1) if members > 1 else 0.0
    return np.array([[1.0 - b, spill], [b, 1.0 - spill]])


class Coupled:
    """Maps of packed second moments for the steps of one phase of one-pass least squares.

    Attributes
    ----------
    coordinates, packed : list of slice
        Position of each mode's coordinates among n, and of its packed moments among N.
    """

    def __init__(self, problem: LeastSquares, law: Law):
        self.problem, self.law = problem, law
        self.modes = law.algorithm.modes()
        sizes = [len(mode.algorithm.coordinates) for mode in self.modes]
        self.coordinates = _blocks(sizes)
        self.packed = _blocks([n * (n + 1) // 2 for n in sizes])
        self._shares = _shares(self.modes, law.algorithm.member_count)
        name = f"the coordinates of {type(law.algorithm).__name__}"
        check_memory(name, self.coordinates[-1].stop, 2.0 * self.entries)
        self._last: tuple[bytes, Steps] | None = None
        self._rows: FloatArray = np.empty((0, 0))
        #: Directions without members: there the deviation stays 0.
        self._still: NDArray[np.bool_] | None = None
        if law.scales is not None and len(self.modes) > 1:
            self._still = law.scales[1] == 0

    @property
    def entries(self) -> int:
        """Number of entries of one step's maps, to order of magnitude."""
        return int(self.problem.directions * self.packed[-1].stop ** 2)

    def steps(self, start: int, stop: int, age: int) -> tuple[Steps, Indices]:
        """Compute the maps of the steps [start, stop) of the phase.

        Parameters
        ----------
        start, stop : int
            First step of the phase, and the last one plus 1.
        age : int
            Steps of the method before the phase.

        Returns
        -------
        steps : Steps
            Maps of the distinct steps.
        kind : ndarray of int, shape (stop - start,)
            Index of each step's maps.
        """
        times = self.law.algorithm.time.reduced(age + np.arange(start, stop))
        rows = np.column_stack([self.law.phase.settings(start, stop), times])
        rows, kind = np.unique(rows, axis=0, return_inverse=True)
        key = rows.tobytes()
        if self._last is None or self._last[0] != key:
            self._last, self._rows = (key, self._distinct(rows)), rows
        return self._last[1], kind.reshape(-1)

    def excess(self, start: int, stop: int, age: int) -> tuple[FloatArray, FloatArray]:
        """Compute the diagonals of D and A less 1, to the last digit where they are small.

        Parameters
        ----------
        start, stop, age : int
            As for `steps`, in whose order the distinct steps are.

        Returns
        -------
        moment : ndarray, shape (R, N, d)
            Diagonal of D, less 1.
        mean : ndarray, shape (R, n, d)
            Diagonal of A, less 1.
        """
        steps, _ = self.steps(start, stop, age)
        moment = np.empty_like(steps.own)
        mean = np.empty(steps.matrix[:, 0].shape)
        for chosen, t in self.law.algorithm.time.groups(self._rows[:, -1]):
            for m, mode in enumerate(self.modes):
                here, where = self.packed[m], self.coordinates[m]
                step = self._extract(mode.algorithm, self._rows[chosen, :-1], t, exact=True)
                a = np.moveaxis(step.matrix, 1, -1)[:, :-1, :-1]
                low = np.moveaxis(step.low, 1, -1)[:, :-1, :-1]
                less = np.einsum("rnnd->rnd", a - 1.0) + np.einsum("rnnd->rnd", low)
                i, j = np.triu_indices(less.shape[1])
                crossed = a[:, i, j] * a[:, j, i] * (i != j)[:, None]
                own = steps.gain[chosen, m, here] * steps.sight[chosen, m, here]
                own /= self.problem.multiplicity
                moment[chosen, here] = less[:, i] + less[:, j] + less[:, i] * less[:, j]
                moment[chosen, here] += crossed + own
                mean[chosen, where] = less
        if self._still is not None:
            moment[:, self.packed[1], self._still] = -1.0
        return moment, mean

    def _distinct(self, rows: FloatArray) -> Steps:
        d, n, size = self.problem.directions, self.coordinates[-1].stop, self.packed[-1].stop
        many, modes, h = len(rows), len(self.modes), self.problem.curvature
        matrix, moment = np.zeros((many, n, n, d)), np.zeros((many, size, size, d))
        gain, sight = np.zeros((2, many, modes, size, d))
        own = np.zeros((many, size, d))
        for chosen, t in self.law.algorithm.time.groups(rows[:, -1]):
            parts = [self._mode(mode.algorithm, rows[chosen, :-1], t) for mode in self.modes]
            for m, (a, kick, seen, noise) in enumerate(parts):
                here, where = self.packed[m], self.coordinates[m]
                i, j = np.triu_indices(a.shape[1])
                matrix[chosen, where, where] = a
                moment[chosen, here, here] = pair(a[:, i], a[:, j])
                own[chosen, here] = noise
                sight[chosen, m, here] = seen * (self.problem.multiplicity * h)
                for o, (_, _, viewed, _) in enumerate(parts):
                    felt = self._shares[m, o] * h * kick
                    gain[chosen, o, here] = felt
                    moment[chosen, here, self.packed[o]] += felt[:, :, None] * (h * viewed)[:, None]
        if self._still is not None:
            moment[:, self.packed[1], :, self._still] = 0.0
        return Steps(matrix, moment, gain, sight, own)

    def _mode(self, chain: Algorithm, settings: FloatArray, t: Any) -> tuple[FloatArray, ...]:
        """A, C C' / B, P P' and D D' of one mode, the last three packed, (R, ..., d)."""
        step = self._extract(chain, settings, t)
        full, c, own = (
            np.ascontiguousarray(np.moveaxis(part, 1, -1))
            for part in (step.matrix, step.noise, step.own)
        )
        a, point = full[:, :-1, :-1], full[:, -1, :-1]
        i, j = np.triu_indices(a.shape[1])
        kick = c[:, i, 0] * c[:, j, 0] / settings[:, [-1], None]
        return a, kick, pair(point, point), np.sum(own[:, i] * own[:, j], axis=2)

    def _extract(
        self, chain: Algorithm, settings: FloatArray, t: Any, *, exact: bool = False
    ) -> Transition:
        """Transition of one mode, (R, d, ...), whose last coordinate is the gradient's point."""
        rates: Any = tuple(settings[:, [i]] for i in range(settings.shape[1] - 1))
        if self.law.scales is not None:
            rates = tuple(rate * scale for rate, scale in zip(rates, self.law.scales, strict=True))
        lr = rates if chain.rate_count == 2 else rates[0]
        return extract(_Probed(chain), self.problem.curvature[None, :], lr, t, exact=exact)


@dataclass(frozen=True)
class Cycle:
    """Stability of one cycle of steps that is repeated without end.

    The map of all directions is a sum of a cone-preserving D and of positive terms of rank one, so
    it contracts if and only if every D_i does and so does the matrix that maps the numbers 2 L of
    one cycle to those that they cause: kappa = f (1 - D)^-1 g for a cycle of one step. For SGD
    kappa = sum_i m_i h_i w_i with w_i = lr / (B (2 - lr h_i (1 + 1 / B))).

    Attributes
    ----------
    radius : float
        Largest spectral radius of D over the cycle, among curved directions and the moments on
        which the gradient depends.
    kappa : float
        Spectral radius of the map of the numbers 2 L; infinite unless `radius` is below 1.
    """

    radius: float
    kappa: float

    @property
    def stable(self) -> bool:
        """Whether second moments converge."""
        return self.radius < 1.0 and self.kappa < 1.0


def cycle(coupled: Coupled, start: int, period: int, age: int) -> Cycle:
    """Compute the stability of a cycle of steps.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.
    start, period : int
        First step of the cycle within the phase, and number of steps.
    age : int
        Steps of the method before the phase.

    Returns
    -------
    Cycle
        Spectral radii of the cycle.

    Raises
    ------
    NQMError
        If the maps of the period do not fit in memory.
    """
    check_memory("the period", period, 3.0 * period * coupled.entries)
    steps, kind = coupled.steps(start, start + period, age)
    return Repeated(coupled.problem, steps, kind, moving(coupled, steps, driving=True)).judge()


def moving(coupled: Coupled, steps: Steps, *, driving: bool) -> Indices:
    """Indices of the packed moments that can change.

    Parameters
    ----------
    coupled : Coupled
        Phase of least squares.
    steps : Steps
        Maps of its distinct steps.
    driving : bool
        Keep only moments of coordinates on which a gradient depends, now or later. An average has
        no influence on the gradient, and a running sum would never converge.

    Returns
    -------
    ndarray of int
        Rising indices among the N packed moments.
    """
    indices = []
    for m, mode in enumerate(coupled.modes):
        here, where = coupled.packed[m], coupled.coordinates[m]
        names, constants = mode.algorithm.coordinates, mode.algorithm.constants
        i, j = np.triu_indices(len(names))
        still = np.array([name in constants for name in names])
        chosen = ~(still[i] & still[j])
        if driving:
            seen = (steps.sight[:, m, here][:, i == j] != 0).any(axis=(0, 2))
            links = (steps.matrix[:, where, where] != 0).any(axis=(0, 3))
            for _ in names:  # a path to the gradient is no longer than this
                seen = seen | links[seen].any(axis=0)
            chosen &= seen[i] & seen[j]
        indices.append(here.start + np.flatnonzero(chosen))
    return np.concatenate(indices)


class Repeated:
    """A cycle of steps on some of the packed moments, in the directions that have curvature."""

    def __init__(self, problem: LeastSquares, steps: Steps, kind: Indices, free: Indices):
        self.kind, self.curved = kind, problem.curvature > 0
        self.moment = steps.moment[:, free[:, None], free][..., self.curved]
        self.gain = steps.gain[:, :, free][..., self.curved]
        self.sight = steps.sight[:, :, free][..., self.curved]
        self.whole = np.broadcast_to(np.eye(free.size), (self.curved.sum(), free.size, free.size))
        for k in kind:
            self.whole = np.moveaxis(self.moment[k], -1, 0) @ self.whole

    def judge(self) -> Cycle:
        """Compute the stability of the cycle.

        Returns
        -------
        Cycle
            Spectral radii; the loss converges if both are below 1.
        """
        radius = float(spectral_radius(self.whole).max(initial=0.0))
        if not radius < 1.0:
            return Cycle(radius, np.inf)
        bred, _ = self.respond(np.zeros((len(self.kind), *self.moment.shape[2:])))
        return Cycle(radius, float(spectral_radius(bred[:, :-1])))

    def respond(self, forcing: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Compute the periodic responses to a unit of each number 2 L, and to `forcing`.

        Parameters
        ----------
        forcing : ndarray, shape (period, N, d)
            Second moments that each step adds independently of the state.

        Returns
        -------
        numbers : ndarray, shape (period * M, period * M + 1)
            The numbers 2 L of each response; the last column belongs to `forcing`.
        start : ndarray, shape (period * M + 1, N, d)
            Moments of each response at the start of the cycle.
        """
        modes = self.gain.shape[1]
        numbers = len(self.kind) * modes
        check_memory(
            "the period", len(self.kind), 3.0 * numbers * self.moment[0, 0].size + numbers**2
        )
        state = np.zeros((len(self.kind) * modes + 1, *self.moment.shape[2:]))
        for t, k in enumerate(self.kind):
            state = np.einsum("nkd,fkd->fnd", self.moment[k], state)
            state[t * modes : (t + 1) * modes] += self.gain[k]
            state[-1] += forcing[t]
        left = np.eye(self.whole.shape[-1]) - self.whole
        start = np.linalg.solve(left, state.transpose(2, 1, 0)).transpose(2, 1, 0)
        numbers, state = [], start
        for t, k in enumerate(self.kind):
            numbers.append(np.einsum("mnd,fnd->mf", self.sight[k], state))
            state = np.einsum("nkd,fkd->fnd", self.moment[k], state)
            state[t * modes : (t + 1) * modes] += self.gain[k]
            state[-1] += forcing[t]
        return np.concatenate(numbers), np.asarray(start)
