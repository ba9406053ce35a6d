"""Functions of a Hessian applied to a vector, by Lanczos.

A few products with H span a space in which H is a tridiagonal matrix T. In that space F(H) u is
|u| V F(T) e_1 for any function F (Golub & Meurant 2010, chapter 4). One run of products thus gives,
for example, the displacement by t steps of gradient descent at learning rate lr, for all t and lr.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from nqm.errors import check_integer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LanczosNodes:
    """A vector u and a symmetric matrix H, projected onto their Krylov space.

    Attributes
    ----------
    values : ndarray, shape (m,)
        Nodes: approximate eigenvalues of H, increasing.
    amplitudes : ndarray, shape (m,)
        Components of u along `vectors`. Their squares are Gauss weights: the sum of
        ``amplitudes^2 F(values)`` is u' F(H) u, exactly for polynomials of degree 2m - 1.
    vectors : ndarray, shape (p, m)
        Approximate eigenvectors, one in each column, orthonormal.
    """

    values: FloatArray
    amplitudes: FloatArray
    vectors: FloatArray

    def apply(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """Compute F(H) u for a function F.

        Parameters
        ----------
        function : callable
            F; maps an array of eigenvalues to an array of the same shape.

        Returns
        -------
        ndarray, shape (p,)
        """
        return np.asarray(self.vectors @ (function(self.values) * self.amplitudes))


def lanczos_nodes(
    apply: LinearOperator, start: FloatArray, steps: int, out: FloatArray
) -> LanczosNodes:
    """Run Lanczos from a vector, in the orthogonal complement of some directions.

    Every new vector is orthogonalised twice against all before it: otherwise rounding would let
    copies of converged eigenvalues appear.

    Parameters
    ----------
    apply : LinearOperator, (p, p)
        H, symmetric.
    start : ndarray, shape (p,)
        u; its component in the span of `out` is removed.
    steps : int
        Number of products with H, at least 1; fewer are done if the space is exhausted.
    out : ndarray, shape (p, k)
        Orthonormal eigenvectors of H that are left out, one in each column.

    Returns
    -------
    LanczosNodes
        Empty if `start` lies in the span of `out`.
    """
    (nodes,) = lanczos_together(lambda rows: [apply.matvec(v) for v in rows], [start], steps, out)
    return nodes


def lanczos_together(
    apply: Callable[[FloatArray], Iterable[FloatArray]],
    starts: Sequence[FloatArray],
    steps: int,
    out: FloatArray,
) -> list[LanczosNodes]:
    """Run `lanczos_nodes` from several vectors in step, as products cost less together.

    Parameters
    ----------
    apply : callable
        Takes m vectors, shape (m, p), and returns their products with H in this order.
    starts : sequence of ndarray, shape (p,)
    steps, out
        See `lanczos_nodes`.

    Returns
    -------
    list of LanczosNodes
        One for each start.
    """
    check_integer("steps", steps, 1)
    found: dict[int, LanczosNodes] = {}
    waiting: list[tuple[int, _Run, FloatArray]] = []

    def go_on(index: int, run: _Run, product: FloatArray | None) -> None:
        try:
            waiting.append((index, run, run.send(product)))
        except StopIteration as end:
            found[index] = end.value[0]

    for index, start in enumerate(starts):
        go_on(index, _lanczos(start, steps, out), None)
    while waiting:
        now, waiting = waiting, []
        images = apply(np.stack([v for _, _, v in now]))
        for (index, run, _), image in zip(now, images, strict=True):
            go_on(index, run, image)
    return [found[index] for index in range(len(starts))]


def lanczos_pairs(
    apply: LinearOperator, start: FloatArray, steps: int
) -> tuple[LanczosNodes, FloatArray]:
    """Run `lanczos_nodes` in the whole space, and compute how far the nodes are from eigenpairs.

    Parameters
    ----------
    apply, start, steps
        See `lanczos_nodes`.

    Returns
    -------
    nodes : LanczosNodes
    residuals : ndarray, shape (m,)
        ``|H v - h v|`` of every node h with its vector v, up to rounding.
    """
    check_integer("steps", steps, 1)
    run, product = _lanczos(start, steps, np.zeros((len(start), 0))), None
    while True:
        try:
            product = apply.matvec(run.send(product))
        except StopIteration as end:
            nodes, residuals = end.value
            return nodes, residuals


#: Lanczos from one vector: it yields vectors and is sent their products with H.
_Run = Generator[FloatArray, FloatArray | None, tuple[LanczosNodes, FloatArray]]


def _lanczos(start: FloatArray, steps: int, out: FloatArray) -> _Run:
    start = start - out @ (out.T @ start)
    length = float(np.linalg.norm(start))
    room = len(start) - out.shape[1]
    if length == 0.0 or room == 0:
        return LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((len(start), 0))), np.zeros(0)
    basis = [start / length]
    alpha: list[float] = []
    beta: list[float] = []
    while True:
        product = yield basis[-1]
        assert product is not None
        w = product
        alpha.append(float(w @ basis[-1]))
        earlier = np.stack(basis, 1)
        for _ in range(2):
            w = w - out @ (out.T @ w)
            w = w - earlier @ (earlier.T @ w)
        size = float(np.linalg.norm(w))
        if len(alpha) == min(steps, room) or size <= 1e-10 * max(map(abs, alpha + beta)):
            break
        beta.append(size)
        basis.append(w / size)
    nodes, turn = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    return LanczosNodes(nodes, length * turn[0], earlier @ turn), size * np.abs(turn[-1])
