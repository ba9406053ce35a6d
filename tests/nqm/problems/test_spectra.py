"""Spectra against their formulas, their moments and a random matrix."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nqm import NQMError
from nqm.errors import NQMWarning
from nqm.problems import spectra
from tests.tolerances import IDENTITY, agree_each


def test_harmonic_and_power_law():
    agree_each(spectra.harmonic(4, 2.0), [2.0, 1.0, 2 / 3, 0.5], IDENTITY)
    expected = [3.0 * i**-1.5 for i in range(1, 6)]
    agree_each(spectra.power_law(5, 1.5, 3.0), expected, IDENTITY)
    agree_each(spectra.power_law(3, 0.0), [1.0, 1.0, 1.0], IDENTITY)


def test_log_uniform():
    agree_each(spectra.log_uniform(4, 1e-3, 1.0), [1.0, 0.1, 0.01, 0.001], IDENTITY)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_marchenko_pastur_moments(ratio, scale):
    """Mean scale, second moment scale^2 (1 + ratio), third scale^3 (1 + 3 ratio + ratio^2)."""
    h = spectra.marchenko_pastur(4000, ratio, scale)
    assert h.shape == (4000,)
    assert np.all(np.diff(h) <= 0)
    # The mid-point quantile rule errs most at the square-root edges, by about n^-1.5.
    assert h.mean() == pytest.approx(scale, rel=1e-4)
    assert np.mean(h**2) == pytest.approx(scale**2 * (1 + ratio), rel=1e-4)
    assert np.mean(h**3) == pytest.approx(scale**3 * (1 + 3 * ratio + ratio**2), rel=1e-4)
    zero = np.count_nonzero(h == 0)
    assert zero == (2000 if ratio == 2.0 else 0)
    assert h[0] <= scale * (1 + np.sqrt(ratio)) ** 2
    assert h[h > 0].min() >= scale * (1 - np.sqrt(ratio)) ** 2


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_marchenko_pastur_is_a_random_matrix_in_the_limit(ratio):
    p = 600
    x = np.random.default_rng(0).standard_normal((int(p / ratio), p))
    drawn = np.linalg.eigvalsh(x.T @ x / len(x))[::-1]
    gap = np.abs(spectra.marchenko_pastur(p, ratio) - drawn)
    # The top eigenvalue's Tracy-Widom scale, p^(-2/3) (1 + sqrt(ratio))^(4/3) ratio^(1/2).
    edge = p ** (-2 / 3) * (1 + np.sqrt(ratio)) ** (4 / 3) * np.sqrt(ratio)
    assert gap.max() < 4.5 * edge
    assert gap.mean() < 0.01


def test_two_cluster():
    curvature, multiplicity = spectra.two_cluster(3, 97, 1.0, 0.01)
    assert curvature.tolist() == [1.0, 0.01]
    assert multiplicity.tolist() == [3.0, 97.0]


def test_power_noise():
    h = np.array([1.0, 0.25, 0.0])
    agree_each(spectra.power_noise(h), h, IDENTITY)
    assert spectra.power_noise(h, 2.0, 0.0).tolist() == [2.0, 2.0, 2.0]
    assert spectra.power_noise(h, 2.0, 0.5).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_problem_from_a_file(tmp_path, ending):
    columns = {"curvature": [1.0, 0.1], "noise_variance": [0.3, 0.2], "multiplicity": [1.0, 9.0]}
    path = tmp_path / f"measured.{ending}"
    frame = pd.DataFrame(columns)
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    problem = spectra.read_problem(path)
    for name, values in columns.items():
        assert getattr(problem, name).tolist() == values
    assert problem.initial_variance.tolist() == [1.0, 1.0]


def test_problem_from_a_file_without_noise(tmp_path):
    path = tmp_path / "measured.csv"
    pd.DataFrame({"curvature": [1.0]}).to_csv(path, index=False)
    with pytest.raises(NQMError, match=r"measured\.csv.*'noise_variance' is missing"):
        spectra.read_problem(path)


def test_spectra_as_other_tools_write_them(tmp_path):
    """Columns eigenvalue and weight, or a bare array; largest first from an array."""
    path = tmp_path / "density.csv"
    pd.DataFrame({"eigenvalue": [1.0, 0.1], "weight": [0.25, 0.75]}).to_csv(path, index=False)
    fields = spectra.read_fields(path)
    assert {name: list(values) for name, values in fields.items()} == {
        "curvature": [1.0, 0.1],
        "multiplicity": [0.25, 0.75],
    }
    np.save(tmp_path / "h.npy", np.array([1, 3, 2]))
    assert spectra.read_fields(tmp_path / "h.npy")["curvature"].tolist() == [3.0, 2.0, 1.0]
    with pytest.raises(NQMError, match=r"h\.npy: column 'noise_variance' is missing"):
        spectra.read_problem(tmp_path / "h.npy")


def test_slightly_negative_eigenvalues_become_zero_with_a_word(tmp_path):
    path = tmp_path / "h.npy"
    np.save(path, [2.0, -0.019, 0.5, -1e-9])
    with pytest.warns(NQMWarning, match=r"2 eigenvalues below zero, the least -0\.019"):
        fields = spectra.read_fields(path)
    assert fields["curvature"].tolist() == [2.0, 0.5, 0.0, 0.0]
    np.save(path, [2.0, -0.021])
    with pytest.raises(NQMError, match=r"eigenvalue -0\.021 is below zero by more than 1 %"):
        spectra.read_fields(path)


@pytest.mark.parametrize("values", [np.ones((2, 2)), np.array(["a"]), np.array(1.0)])
def test_arrays_that_are_no_spectrum(tmp_path, values):
    np.save(tmp_path / "h.npy", values)
    with pytest.raises(NQMError, match="must hold eigenvalues"):
        spectra.read_fields(tmp_path / "h.npy")


def test_files_that_are_no_spectrum(tmp_path):
    path = tmp_path / "h.npy"
    path.write_bytes(b"not an array")
    with pytest.raises(NQMError, match="is no array of numbers"):
        spectra.read_fields(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(NQMError, match="is no array of numbers"):  # and nothing is unpickled
        spectra.read_fields(path)
    with pytest.raises(NQMError, match="no such file"):
        spectra.read_fields(tmp_path / "none.npy")
    table = tmp_path / "twice.csv"
    table.write_text("curvature,eigenvalue\n1,2\n")
    with pytest.raises(NQMError, match="are the same; drop one"):
        spectra.read_fields(table)
    table.write_text("lambda\n1\n")
    with pytest.raises(NQMError, match="column 'curvature' is missing"):
        spectra.read_fields(table)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: spectra.harmonic(0), r"spectrum\.directions"),
        (lambda: spectra.power_law(2.5), r"spectrum\.directions"),
        (lambda: spectra.power_law(2, -1.0), r"spectrum\.exponent"),
        (lambda: spectra.power_law(2, 1.0, 0.0), r"spectrum\.largest"),
        (lambda: spectra.log_uniform(3, 0.0, 1.0), r"spectrum\.smallest"),
        (lambda: spectra.log_uniform(3, 2.0, 1.0), r"spectrum\.smallest"),
        (lambda: spectra.marchenko_pastur(3, 0.0), r"spectrum\.ratio"),
        (lambda: spectra.marchenko_pastur(3, 0.5, np.nan), r"spectrum\.scale"),
        (lambda: spectra.two_cluster(0, 1), r"spectrum\.outliers"),
        (lambda: spectra.two_cluster(1, 1, 1.0, -1.0), r"spectrum\.bulk_value"),
        (lambda: spectra.power_noise([1.0], -1.0), r"noise\.scale"),
        (lambda: spectra.power_noise([1.0], 1.0, np.inf), r"noise\.exponent"),
    ],
)
def test_bad_input_names_the_field(build, words):
    with pytest.raises(NQMError, match=words):
        build()
