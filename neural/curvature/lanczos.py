"""Functions of a Hessian applied to a vector, by Lanczos.

A few products with H span a space in which H is tridiagonal. There F(H) u is |u| V F(T) e_1 for any
function F (Golub & Meurant 2010, chapter 4), so that one run of products answers every question of
the kind "how far does gradient descent get in t steps at rate lr" for all t and lr at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from nqm.errors import check_integer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class LanczosNodes:
    """A vector u and a symmetric matrix H in the Krylov space of both.

    Attributes
    ----------
    values : ndarray, shape (m,)
        Nodes: approximate eigenvalues.
    amplitudes : ndarray, shape (m,)
        Components of u along `vectors`. Their squares are Gauss weights: the sum of
        ``amplitudes^2 F(values)`` is u' F(H) u, exactly for polynomials of degree 2m - 1.
    vectors : ndarray, shape (p, m)
        Orthonormal, one for each node.
    """

    values: FloatArray
    amplitudes: FloatArray
    vectors: FloatArray

    def apply(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """F(H) u for a function F.

        Parameters
        ----------
        function : callable
            F, of an array of eigenvalues.

        Returns
        -------
        ndarray, shape (p,)
        """
        return np.asarray(self.vectors @ (function(self.values) * self.amplitudes))


def lanczos_nodes(
    apply: LinearOperator, start: FloatArray, steps: int, out: FloatArray
) -> LanczosNodes:
    """Run Lanczos from a vector, in the complement of some directions.

    Every step is orthogonalised twice against all before: rounding would otherwise bring copies of
    converged values back.

    Parameters
    ----------
    apply : LinearOperator, (p, p)
        Symmetric.
    start : ndarray, shape (p,)
        Its part along `out` is dropped.
    steps : int
        Number of products with H; fewer if the space is exhausted.
    out : ndarray, shape (p, k)
        Orthonormal eigenvectors that are known already.

    Returns
    -------
    LanczosNodes
        Empty if `start` lies in the span of `out`.
    """
    check_integer("steps", steps, 1)
    start = start - out @ (out.T @ start)
    length = float(np.linalg.norm(start))
    room = len(start) - out.shape[1]
    if length == 0.0 or room == 0:
        return LanczosNodes(np.zeros(0), np.zeros(0), np.zeros((len(start), 0)))
    basis = [start / length]
    alpha: list[float] = []
    beta: list[float] = []
    while True:
        w = apply.matvec(basis[-1])
        alpha.append(float(w @ basis[-1]))
        held = np.stack(basis, 1)
        for _ in range(2):
            w = w - out @ (out.T @ w)
            w = w - held @ (held.T @ w)
        size = float(np.linalg.norm(w))
        if len(alpha) == min(steps, room) or size <= 1e-10 * max(map(abs, alpha + beta)):
            break
        beta.append(size)
        basis.append(w / size)
    nodes, turn = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    return LanczosNodes(nodes, length * turn[0], held @ turn)
