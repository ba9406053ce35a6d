"""Soups: weighted means of several end points of training, with closed-form weights.

Every ingredient is, in each direction, a linear function of a few independent Gaussian sources:
the common start and each run's own noise. So the expected loss of a soup with weights w is
w' M w with M_ij = sum_d m h / 2 E x_i x_j, and the best weights that sum to one solve M w ~ 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from nqm.amortized import AME, AMESample, random_basis
from nqm.errors import NQMError, check_integer, check_number, shown
from nqm.limits import check_memory, check_work
from nqm.problems.least_squares import additive_only
from nqm.problems.quadratic import FloatArray, Problem, finite_numbers
from nqm.program import Program, as_program
from nqm.solvers.moments import check_own_starts, solve
from nqm.words import short_html, short_repr


def check_ingredients(where: str, value: int, problem: Problem, ingredients: int) -> None:
    """Refuse more ingredients than fit into memory.

    Parameters
    ----------
    where : str
        Name of the setting, for the message.
    value : int
        Its value.
    problem : Problem
    ingredients : int
        Their number in all.

    Raises
    ------
    NQMError
        If what a soup holds of them does not fit.
    """
    held = 3.0 * problem.directions * ingredients * (ingredients + 2.0)
    check_memory(where, value, held)


@dataclass(frozen=True)
class GreedySample:
    """Greedy soups chosen on a finite validation set, by Monte Carlo; arrays of shape (replicas,).

    Attributes
    ----------
    loss : ndarray
        True loss of the soup chosen.
    single_loss : ndarray
        True loss of the one ingredient that looked best.
    size : ndarray
        How many ingredients the soup has.
    """

    loss: FloatArray
    single_loss: FloatArray
    size: NDArray[np.int64]

    __repr__ = short_repr
    _repr_html_ = short_html


@dataclass(frozen=True, eq=False)
class Soup:
    """N ingredients with a joint Gaussian law.

    Attributes
    ----------
    problem : Problem
    response : ndarray, shape (d, N, S)
        Ingredient i in direction d is ``response[d, i] @ sources[d]``.
    mean, variance : ndarray, shape (d, S)
        Means and variances of the independent sources.
    curvatures : ndarray, shape (d, N), optional
        Curvature of the loss that each ingredient was trained on; the problem's by default.
    """

    problem: Problem
    response: FloatArray
    mean: FloatArray
    variance: FloatArray
    curvatures: FloatArray | None = None

    __repr__ = short_repr
    _repr_html_ = short_html

    # --- ingredients ---------------------------------------------------------------------------

    @classmethod
    def of_runs(cls, problem: Problem, programs: Sequence[Program]) -> Soup:
        """End points of independent runs from a common start, each with its own program.

        Rates, steps and methods may differ (Wortsman et al. 2022, "Model soups").

        Parameters
        ----------
        problem : Problem
        programs : list of Program
            One for each ingredient.

        Returns
        -------
        Soup

        Raises
        ------
        NQMError
            If `programs` is empty or not a list, or if a program is not linear or diverges.
        """
        if not isinstance(programs, list | tuple):
            raise NQMError(f"Soup.of_runs needs a list of programs; got {shown(programs)}")
        if not programs:
            raise NQMError("a soup needs at least one program; got none")
        n, problem = len(programs), additive_only("Soup.of_runs", problem)
        check_ingredients("Soup: the ingredients", n, problem, n)
        runs = {id(program): _affine(problem, program) for program in _distinct(programs)}
        return cls._from(problem, [(None, runs[id(program)]) for program in programs])

    @classmethod
    def of_snapshots(cls, problem: Problem, cycle: Program, members: int) -> Soup:
        """End points of `members` cycles run one after another, the optimizer restarted at each.

        Snapshot ensembles (SSE, Huang et al. 2017) and FGE (Garipov et al. 2018), averaged. FGE
        takes its snapshots in mid-cycle, where the rate is lowest: let the cycle end there.

        Parameters
        ----------
        problem : Problem
        cycle : Program
            One cycle, e.g. a phase of SGD under a `Cosine` schedule.
        members : int
            Number N of snapshots.

        Returns
        -------
        Soup
        """
        check_integer("Soup.members", members, 1)
        run = _affine(problem, cycle)
        check_memory("Soup.members", members, 3.0 * problem.directions * float(members) ** 2)
        return cls._from(problem, [(i - 1 if i else None, run) for i in range(members)])

    @classmethod
    def of_star(
        cls, problem: Problem, cycle: Program, members: int, branch: Program | None = None
    ) -> Soup:
        """A first cycle, then `members` - 1 branches that all start from its end point.

        StarSSE (Sadrtdinov et al. 2023).

        Parameters
        ----------
        problem : Problem
        cycle : Program
            The first cycle.
        members : int
            Number N of ingredients: the first end point and N - 1 branches.
        branch : Program, optional
            The cycle of the branches; `cycle` by default.

        Returns
        -------
        Soup
        """
        check_integer("Soup.members", members, 1)
        first = _affine(problem, cycle)
        check_memory("Soup.members", members, 3.0 * problem.directions * float(members) ** 2)
        other = first if branch is None else _affine(problem, branch)
        return cls._from(problem, [(None, first), *[(0, other)] * (members - 1)])

    @classmethod
    def of_clients(cls, target: Problem, clients: Sequence[tuple[Problem, Program]]) -> Soup:
        """End points of runs on different losses, from a common start, evaluated on one of them.

        Clients share the eigen-directions and differ in curvature, noise and minimum: a client's
        ``minimum`` beside the target's says where its loss is lowest. Means of clients that have
        converged are biased, unless their weights are `curvature_weighted`.

        Parameters
        ----------
        target : Problem
            The loss by which the soup is judged, and the common start: its ``initial_mean`` and
            ``initial_variance`` about its own minimum. Those of the clients are not looked at.
        clients : list of (Problem, Program)
            The loss and the training of each client, e.g.
            ``(target.replace(minimum=1.0, curvature=h), nqm.constant(nqm.SGD(), 0.1, 100))``.

        Returns
        -------
        Soup

        Raises
        ------
        NQMError
            If `clients` is no list of such pairs, if a client has other directions than the
            target, if directions are correlated or quadrature nodes, or if a program is not linear
            or diverges.
        """
        where = "Soup.of_clients"
        target = additive_only(f"{where}: the target", target)
        if not isinstance(clients, list | tuple) or not clients:
            raise NQMError(f"{where} needs a list of (problem, program); got {shown(clients)}")
        runs: list[tuple[int | None, _Affine]] = []
        losses = []
        for k, client in enumerate(clients):
            if not isinstance(client, list | tuple) or len(client) != 2:
                raise NQMError(f"{where}: client {k} must be (problem, program); got "
                               f"{shown(client)}")  # fmt: skip
            problem = additive_only(f"{where}: client {k}", client[0])
            _check_client(f"{where}: client {k}", target, problem)
            run, away = _affine(problem, client[1]), problem.minimum - target.minimum
            # The client's displacement is the target's less `away`, at the start and at the end.
            runs.append((None, replace(run, shift=run.shift + (1.0 - run.gain) * away)))
            losses.append(problem.curvature)
        return replace(cls._from(target, runs), curvatures=np.stack(losses, axis=1))

    @classmethod
    def _from(cls, problem: Problem, tree: list[tuple[int | None, _Affine]]) -> Soup:
        """Ingredients that each begin at the problem's start (None) or at an earlier one."""
        d, n = problem.directions, len(tree)
        check_memory("Soup: the ingredients", n, 3.0 * d * n * (n + 2.0))
        # Sources: the start, the number one (for pulls to a place), then each run's noise.
        response = np.zeros((d, n, n + 2))
        variance = np.zeros((d, n + 2))
        variance[:, 0] = problem.initial_variance
        mean = np.zeros((d, n + 2))
        mean[:, 0], mean[:, 1] = problem.initial_mean, 1.0
        for i, (parent, run) in enumerate(tree):
            if parent is None:
                response[:, i, 0] = run.gain
            else:
                response[:, i] = run.gain[:, None] * response[:, parent]
            response[:, i, 1] += run.shift
            response[:, i, i + 2] = 1.0
            variance[:, i + 2] = run.noise
        return cls(problem, response, mean, variance)

    # --- weights -------------------------------------------------------------------------------

    @property
    def ingredients(self) -> int:
        """Number N of ingredients."""
        return int(self.response.shape[1])

    @property
    def moment(self) -> FloatArray:
        """Matrix M_ij = E[x_i' H x_j] / 2, shape (N, N); M_ii is the loss of ingredient i."""
        r = self.response
        place = np.einsum("dis,ds->di", r, self.mean)
        weight = self.problem.weight
        spread = np.einsum("d,dis,ds,djs->ij", weight, r, self.variance, r)
        return np.asarray(spread + np.einsum("d,di,dj->ij", weight, place, place))

    def loss(self, weights: ArrayLike) -> float:
        """Expected loss of the weighted mean of the ingredients.

        Parameters
        ----------
        weights : array_like, shape (N,) or (d, N)
            For all directions, or by direction; they should sum to 1.

        Returns
        -------
        float

        Raises
        ------
        NQMError
            If `weights` has another shape.
        """
        w = finite_numbers("a soup's weights", weights)
        if w.shape == (self.problem.directions, self.ingredients):
            soup = np.einsum("di,dis->ds", w, self.response)[:, None, :]
            return float(self.problem.weight @ self._second_moment(soup)[:, 0])
        if w.shape != (self.ingredients,):
            raise NQMError(f"a soup's weights must have shape ({self.ingredients},); got {w.shape}")
        return float(w @ self.moment @ w)

    def uniform(self) -> FloatArray:
        """Weights of the uniform soup, 1 / N each.

        Returns
        -------
        ndarray, shape (N,)
        """
        return np.full(self.ingredients, 1.0 / self.ingredients)

    def optimal(self, *, nonnegative: bool = False) -> FloatArray:
        """Weights of least expected loss that sum to 1: w ~ M^-1 1.

        Parameters
        ----------
        nonnegative : bool
            Among weights >= 0 only. Up to scale these minimise u' M u / 2 - sum u over u >= 0, a
            non-negative least-squares problem in a factor of M.

        Returns
        -------
        ndarray, shape (N,)

        Raises
        ------
        NQMError
            If M is singular: two ingredients are the same, or one has no loss at all.
        """
        moment = self.moment
        scale = np.sqrt(np.diag(moment))
        try:
            factor = np.linalg.cholesky(moment / np.outer(scale, scale))
        except np.linalg.LinAlgError:
            factor = np.full_like(moment, np.nan)
        ones = 1.0 / scale
        if not np.isfinite(factor).all() or np.linalg.cond(factor) > 1e7:
            raise NQMError(
                "optimal weights of a soup are not determined: its ingredients are linearly "
                "dependent; drop duplicates"
            )
        target = np.linalg.solve(factor, ones)
        u = nnls(factor.T, target)[0] if nonnegative else np.linalg.solve(factor.T, target)
        u = u / scale
        return np.asarray(u / u.sum())

    def greedy(self) -> FloatArray:
        """Weights of the greedy soup on the exact expected loss.

        Ingredients in order of their own loss; each enters, at equal weights, if it strictly
        lowers the loss (Wortsman et al. 2022, recipe 1).

        Returns
        -------
        ndarray, shape (N,)
            1 / k for each of the k chosen ingredients, 0 for the others.
        """
        moment = self.moment
        weights = np.zeros(self.ingredients)
        order = np.argsort(np.diag(moment), kind="stable")
        chosen = _greedy(order, lambda kept: float(moment[np.ix_(kept, kept)].mean()))
        weights[chosen] = 1.0 / len(chosen)
        return weights

    def curvature_weighted(self, shares: ArrayLike | None = None) -> FloatArray:
        """Weights by direction in proportion to each ingredient's curvature there.

        Of clients that have converged (`of_clients`) the mean is then the minimum of their summed
        loss: sum_k p_k h_k m_k / sum_k p_k h_k, without the bias that plain means have. Merging by
        the diagonal Fisher information (Matena & Raffel 2022) and by least squares (RegMean, Jin
        et al. 2023) are this on a quadratic.

        Parameters
        ----------
        shares : array_like, shape (N,), optional
            Share p of each ingredient's loss in the sum, >= 0 and not all 0; equal by default.

        Returns
        -------
        ndarray, shape (d, N)
            Rows that sum to 1. Where no ingredient has curvature, the shares.

        Raises
        ------
        NQMError
            If `shares` has another shape, or a share is negative or not a number.
        """
        given = np.ones(self.ingredients) if shares is None else shares
        p = finite_numbers("a soup's shares", given)
        if p.shape != (self.ingredients,):
            raise NQMError(f"a soup's shares must have shape ({self.ingredients},); got {p.shape}")
        if not (np.all(p >= 0.0) and p.sum() > 0.0):
            raise NQMError(f"a soup's shares must be >= 0 and not all 0; got {shown(p.tolist())}")
        p = p / p.sum()
        if self.curvatures is None:
            return np.tile(p, (self.problem.directions, 1))
        curved = p * self.curvatures
        total = curved.sum(axis=1, keepdims=True)
        flat = np.broadcast_to(p, curved.shape).copy()
        return np.asarray(np.divide(curved, total, out=flat, where=total > 0.0))

    # --- the soup and its members --------------------------------------------------------------

    def member_loss(self, weights: ArrayLike | None = None) -> float:
        """Expected loss of one ingredient, averaged over the ingredients.

        Parameters
        ----------
        weights : array_like, shape (N,) or (d, N), optional
            Weights that sum to 1, for all directions or by direction; uniform by default.

        Returns
        -------
        float

        Raises
        ------
        NQMError
            If `weights` has another shape or does not sum to 1.
        """
        w = self._by_direction(weights)
        return float(self.problem.weight @ np.sum(w * self._second_moment(self.response), axis=1))

    def ambiguity(self, weights: ArrayLike | None = None) -> float:
        """How far the soup is below its mean ingredient: member_loss - loss, exactly.

        It is the weighted mean of h/2 E (x_i - soup)^2 summed over directions, and so never
        negative for weights >= 0 (Krogh & Vedelsby 1995). Computed as such, it keeps its digits
        where the ingredients are nearly equal.

        Parameters
        ----------
        weights : array_like, shape (N,) or (d, N), optional
            Weights that sum to 1, for all directions or by direction; uniform by default.

        Returns
        -------
        float

        Raises
        ------
        NQMError
            If `weights` has another shape or does not sum to 1.
        """
        w = self._by_direction(weights)
        soup = np.einsum("di,dis->ds", w, self.response)
        apart = self._second_moment(self.response - soup[:, None, :])
        return float(self.problem.weight @ np.sum(w * apart, axis=1))

    def _second_moment(self, response: FloatArray) -> FloatArray:
        """E x^2 of linear forms in the sources, shape (d, N) from (d, N, S)."""
        place = np.einsum("dis,ds->di", response, self.mean)
        return np.asarray(place**2 + np.einsum("dis,ds->di", response**2, self.variance))

    def _by_direction(self, weights: ArrayLike | None) -> FloatArray:
        """Weights that sum to 1 in every direction, shape (d, N)."""
        given = self.uniform() if weights is None else weights
        w = finite_numbers("a soup's weights", given)
        shape = (self.problem.directions, self.ingredients)
        if w.shape not in (shape, shape[1:]):
            raise NQMError(
                f"a soup's weights must have shape ({shape[1]},), or {shape} for weights by "
                f"direction; got {w.shape}"
            )
        total = w.sum(axis=-1)
        if not np.all(np.abs(total - 1.0) <= 1e-9):
            raise NQMError(f"a soup's weights must sum to 1; got {np.ravel(total)[0]:g}")
        return np.broadcast_to(w, shape)

    # --- by Monte Carlo ------------------------------------------------------------------------

    def _check_draws(self, where: str) -> None:
        """Refuse to draw ingredients of a problem whose directions are not one and independent."""
        self.problem.check_distribution(where)
        if np.any(self.problem.multiplicity != 1.0):
            raise NQMError(f"{where} needs multiplicity 1; use problem.expanded()")
        if self.problem.correlated:
            raise NQMError(
                f"{where} draws directions independently, but those of this problem are "
                "correlated; its expected losses (`loss`, `greedy`) hold"
            )

    def ame(
        self,
        rule: AME,
        *,
        pivot: str | ArrayLike = "first",
        rotated: bool = True,
        replicas: int = 1000,
        seed: int = 0,
    ) -> AMESample:
        """Ingredients merged by amortized model ensembling, by Monte Carlo of their joint law.

        Parameters
        ----------
        rule : AME
        pivot : {"first", "soup"} or array_like, shape (d,) or scalar
            Where the optimizer starts: the first ingredient, the uniform soup, or a displacement
            from the minimum in the eigenbasis.
        rotated : bool
            Let the optimizer see the weights in a random orthogonal basis, as in a network, where
            coordinates are no eigen-directions. Gradient descent does not depend on the basis.
        replicas : int
            Independent draws of the ingredients.
        seed : int
            Seed of the draws, the basis and the order; draws are the same in every basis.

        Returns
        -------
        AMESample

        Raises
        ------
        NQMError
            Unless every multiplicity is 1 and no directions are correlated, and for a problem with
            `expected_losses_only`.
        """
        self._check_draws("Soup.ame")
        check_integer("replicas", replicas, 1)
        check_integer("seed", seed, 0)
        if not isinstance(rule, AME):
            raise NQMError(f"Soup.ame needs a rule, e.g. AME('adam', 0.1); got {shown(rule)}")
        d, n = self.problem.directions, self.ingredients
        place = self._pivot(pivot)
        turned = rotated and rule.optimizer != "gd"
        drawn = 1.0 * replicas * n * d * (n + turned * d)
        check_work("replicas", replicas, drawn, "to draw the ingredients")
        # A step costs ten thousand besides.
        stepped = rule.steps(n) * (10.0 * replicas * d + 10_000)
        check_work("AME.passes", rule.passes, stepped, "in the optimizer's steps")
        rule.lrs(n)  # refused before work starts
        draws, basis, orders = (
            np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3)
        )
        if turned:
            check_memory("Soup.ame of a rotated basis: the directions", d, 3.0 * d * d)
        q = random_basis(d, basis) if turned else None
        place = place if place is None or q is None else place @ q

        def loss(seen: FloatArray) -> FloatArray:
            return np.asarray((seen if q is None else seen @ q.T) ** 2 @ self.problem.weight)

        block = max(1, 2_000_000 // (d * (2 * n + 2)))
        parts = []
        for first in range(0, replicas, block):
            x = self._draw(min(block, replicas - first), draws)
            x = x if q is None else x @ q
            soup = x.mean(axis=1)
            named = soup if place is None and pivot == "soup" else x[:, 0]
            start = named if place is None else np.broadcast_to(place, soup.shape)
            parts.append([loss(seen) for seen in (rule.merge(x, start, orders), soup, start)])
        return AMESample(*(np.concatenate(losses) for losses in zip(*parts, strict=True)))

    def _pivot(self, pivot: str | ArrayLike) -> FloatArray | None:
        """The pivot that was given as a place, (d,); None where it is named."""
        if isinstance(pivot, str) and pivot in ("first", "soup"):
            return None
        d = self.problem.directions
        words = f"'first', 'soup' or a place of shape ({d},)"
        if isinstance(pivot, str):
            raise NQMError(f"Soup.ame: pivot must be {words}; got {shown(pivot)}")
        place = finite_numbers("Soup.ame: pivot", pivot)
        if place.shape not in ((), (d,)):
            raise NQMError(f"Soup.ame: pivot must be {words}; got shape {place.shape}")
        return np.array(np.broadcast_to(place, (d,)))

    def _draw(self, replicas: int, rng: np.random.Generator) -> FloatArray:
        """Draws of all ingredients, shape (replicas, N, d)."""
        normal = rng.standard_normal((replicas, *self.mean.shape))
        sources = self.mean + np.sqrt(self.variance) * normal
        return np.asarray(np.einsum("dis,rds->rid", self.response, sources, optimize=True))

    def sample_greedy(
        self, validation_size: float, *, replicas: int = 1000, seed: int = 0
    ) -> GreedySample:
        """Greedy soups chosen by a finite validation set, by Monte Carlo.

        The loss of one set of n examples is the true one tilted by its gradient noise,
        L(x) + e'x with Var e = v / n, the same for every candidate.

        Parameters
        ----------
        validation_size : float
            n > 0; ``numpy.inf`` for the true loss of each draw.
        replicas : int
            Independent draws.
        seed : int
            Seed of the random numbers.

        Returns
        -------
        GreedySample

        Raises
        ------
        NQMError
            Unless every multiplicity is 1 (the tilts of equal directions are independent) and no
            directions are correlated, and for a problem with `expected_losses_only`.
        """
        self._check_draws("sample_greedy")
        if validation_size != np.inf:
            check_number("validation_size", validation_size, low=0.0, closed_low=False)
        check_integer("replicas", replicas, 1)
        check_integer("seed", seed, 0)
        rng = np.random.default_rng(seed)
        weight = self.problem.weight
        tilt_sd = np.sqrt(self.problem.noise_variance / validation_size)
        loss, single = np.empty((2, replicas))
        size = np.empty(replicas, dtype=np.int64)
        for replica in range(replicas):
            sources = self.mean + np.sqrt(self.variance) * rng.standard_normal(self.mean.shape)
            x = np.einsum("dis,ds->id", self.response, sources)
            tilt = tilt_sd * rng.standard_normal(tilt_sd.shape)

            def seen(kept: Sequence[int], x: FloatArray = x, tilt: FloatArray = tilt) -> float:
                mean = x[kept].mean(axis=0)
                return float(weight @ mean**2 + tilt @ mean)

            order = np.argsort([seen([i]) for i in range(len(x))], kind="stable")
            chosen = _greedy(order, seen)
            loss[replica] = weight @ x[chosen].mean(axis=0) ** 2
            single[replica] = weight @ x[order[0]] ** 2
            size[replica] = len(chosen)
        return GreedySample(loss, single, size)


def _greedy(order: NDArray[np.int64], loss: Callable[[Sequence[int]], float]) -> list[int]:
    """Ingredients in order, each kept if the mean of those kept then has a lower loss."""
    kept = [int(order[0])]
    best = loss(kept)
    for i in map(int, order[1:]):
        found = loss([*kept, i])
        if found < best:
            kept, best = [*kept, i], found
    return kept


def _distinct(programs: Sequence[Program]) -> list[Program]:
    """Each object once: copies of a program are solved once."""
    return list({id(program): program for program in programs}.values())


def _check_client(where: str, target: Problem, client: Problem) -> None:
    """Refuse a client whose directions are not the target's, or whose joint law is not known."""
    for problem in (target, client):
        problem.check_distribution(where)
    if client.directions != target.directions:
        raise NQMError(
            f"{where} has {client.directions} directions, the target {target.directions}; clients "
            "share its eigen-directions"
        )
    if np.any(client.multiplicity != target.multiplicity):
        raise NQMError(
            f"{where} must have the target's multiplicity, as they share eigen-directions; use "
            "target.replace(...) for clients"
        )
    if client.noise_correlation is not None:
        raise NQMError(
            f"{where} has correlated noise, which a soup of clients does not keep; where expected "
            "losses are enough, drop that by client.replace(noise_correlation=None)"
        )


@dataclass(frozen=True)
class _Affine:
    """A run's end point, gain * start + shift + noise, by direction (d,); `noise` a variance."""

    gain: FloatArray
    shift: FloatArray
    noise: FloatArray


def _affine(problem: Problem, program: Program) -> _Affine:
    """Read off the exact moments of runs from 0 and from 1."""
    problem, program = additive_only("Soup", problem), as_program("Soup: the program", program)
    if not program.linear:
        raise NQMError("a soup's closed forms need linear methods; use method 'sample'")
    try:
        check_own_starts(program.phases[0].algorithm)  # type: ignore[arg-type]
    except NQMError:
        raise NQMError(
            "a soup's ingredients share their start; use ensemble.starts = 'common'"
        ) from None
    ends = []
    for start in (0.0, 1.0):
        placed = problem.replace(initial_mean=start, initial_variance=0.0)
        ends.append(solve(placed, program, [program.steps]))
    zero, one = (end.weight_mean for end in ends)
    noise = ends[0].weight_variance
    assert zero is not None
    assert one is not None
    assert noise is not None
    if not np.isfinite([zero, one, noise]).all():
        raise NQMError("a soup's ingredient diverges; lower its learning rate")
    return _Affine(one[0] - zero[0], zero[0], noise[0])
