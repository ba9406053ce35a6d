"""Functions of a matrix applied to a vector by Lanczos, against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import expm, funm
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from neural.curvature.lanczos import lanczos_nodes, lanczos_together
from nqm.errors import NQMError
from tests.tolerances import agree


def symmetric(values: list[float] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    h = basis @ np.diag(values) @ basis.T
    return 0.5 * (h + h.T)


def none(size: int) -> np.ndarray:
    return np.zeros((size, 0))


@given(
    # Repeated values and zeros exhaust the space early.
    st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.5, 1.0]), min_size=1, max_size=8),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_gauss_weights_are_exact_to_their_degree(
    values: list[float], steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, u = symmetric(values, rng), rng.standard_normal(len(values))
    found = lanczos_nodes(aslinearoperator(h), u, steps, none(len(u)))
    m = len(found.values)
    assert 1 <= m <= min(steps, len(u))
    agree(found.vectors.T @ found.vectors, np.eye(m), 1e-10)
    power = u
    for degree in range(2 * steps):
        moment = found.amplitudes**2 @ found.values**degree
        assert moment == pytest.approx(u @ power, rel=1e-8, abs=1e-8 * (u @ u))
        if degree < steps:
            np.testing.assert_allclose(
                found.apply(lambda c, n=degree: c**n), power, atol=1e-8 * np.linalg.norm(u)
            )
        power = h @ power


def test_all_steps_give_the_dense_function() -> None:
    rng = np.random.default_rng(0)
    h, u = symmetric(np.geomspace(0.01, 3.0, 9), rng), rng.standard_normal(9)
    found = lanczos_nodes(aslinearoperator(h), u, 9, none(9))
    agree(found.values, np.linalg.eigvalsh(h), 1e-10)
    agree(found.apply(lambda c: np.exp(-c)), expm(-h) @ u, 1e-10)
    agree(found.apply(np.sqrt), funm(h, np.sqrt) @ u, 1e-8)


def test_known_directions_are_left_out() -> None:
    rng = np.random.default_rng(1)
    h, u = symmetric([5.0, 4.0, 0.5, 0.1, -0.2, -3.0], rng), rng.standard_normal(6)
    known = np.linalg.eigh(h)[1][:, [0, 5]]
    apart = np.eye(6) - known @ known.T
    found = lanczos_nodes(aslinearoperator(h), u, 50, known)
    agree(found.values, [-0.2, 0.1, 0.5, 4.0], 1e-10)
    agree(found.apply(np.ones_like), apart @ u, 1e-10)
    agree(found.apply(np.exp), apart @ expm(h) @ u, 1e-10)


def test_no_value_comes_back_as_a_copy() -> None:
    # Without re-orthogonalisation the far value is found several times within these steps.
    rng = np.random.default_rng(2)
    values = np.append(np.linspace(0.0, 1.0, 59), 1e4)
    found = lanczos_nodes(
        aslinearoperator(symmetric(values, rng)), rng.standard_normal(60), 60, none(60)
    )
    agree(found.values, values, 1e-9)


def test_an_exhausted_space_takes_no_further_products() -> None:
    taken = []

    def product(v: np.ndarray) -> np.ndarray:
        taken.append(1)
        return np.array([1.0, 1.0, 2.0, 2.0]) * v

    apply = LinearOperator((4, 4), matvec=product, dtype=np.float64)
    found = lanczos_nodes(apply, np.array([1.0, 2.0, 2.0, 4.0]), 30, none(4))
    assert len(taken) == 2
    agree(found.values, [1.0, 2.0], 1e-12)
    agree(found.amplitudes**2, [5.0, 20.0], 1e-12)
    taken.clear()
    lanczos_nodes(apply, np.array([1.0, 2.0, 2.0, 4.0]), 1, none(4))
    assert len(taken) == 1


def test_a_matrix_of_zeros_has_one_node_at_zero() -> None:
    found = lanczos_nodes(aslinearoperator(np.zeros((3, 3))), np.array([3.0, 0.0, 4.0]), 3, none(3))
    agree(found.values, [0.0], 0.0)
    agree(found.amplitudes**2, [25.0], 1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_nothing_is_left_to_look_at(full: bool) -> None:
    start, out = (np.ones(4), np.eye(4)) if full else (np.zeros(4), none(4))
    found = lanczos_nodes(aslinearoperator(np.eye(4)), start, 3, out)
    assert found.values.shape == found.amplitudes.shape == (0,)
    agree(found.apply(np.exp), np.zeros(4), 0.0)


def test_steps_are_positive() -> None:
    with pytest.raises(NQMError, match="steps must be an integer >= 1; got 0"):
        lanczos_nodes(aslinearoperator(np.eye(2)), np.ones(2), 0, none(2))


def test_several_starts_together_end_each_in_its_time() -> None:
    """The second start is an eigenvector, the third none at all: they need one product and none."""
    rng = np.random.default_rng(1)
    h = symmetric(np.geomspace(0.01, 3.0, 9), rng)
    size, basis = np.linalg.eigh(h)
    rows: list[int] = []

    def products(vectors: np.ndarray) -> np.ndarray:
        rows.append(len(vectors))
        return np.asarray(vectors @ h)

    u = rng.standard_normal(9)
    first, second, third = lanczos_together(products, [u, 2.0 * basis[:, 3], 0.0 * u], 9, none(9))
    assert rows == [2] + [1] * 8
    agree(first.apply(lambda c: np.exp(-c)), expm(-h) @ u, 1e-10)
    agree(second.values, size[3:4], 1e-10)
    agree(second.apply(np.sqrt), 2.0 * np.sqrt(size[3]) * basis[:, 3], 1e-10)
    assert third.values.shape == (0,)
