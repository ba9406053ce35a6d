"""Monte Carlo with single-precision normals: the generator, and `sample` against exact moments."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import nqm
from nqm import (
    EMA,
    SGD,
    Cosine,
    HeavyBall,
    LatePhase,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Program,
    constant,
)
from nqm.runs import config
from nqm.solvers._kernels import fast_normals
from nqm.solvers._kernels.fast_normals import LANES, LARGEST
from nqm.solvers._kernels.lanes import fill_lanes
from tests.tolerances import SIGMAS, within_error

ROWS = 2**16


def draws(seed: int, rows: int = ROWS) -> np.ndarray:
    """Normals (rows, LANES) of the block with this seed."""
    out = np.empty((rows, LANES), dtype=np.float32)
    fill_lanes(fast_normals.lanes(np.random.SeedSequence(seed)), out)
    return out.astype(np.float64)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draws(3)


def uncorrelated(a: np.ndarray, b: np.ndarray) -> None:
    """Neither values nor squares correlate; a product of independent ones has variance 1."""
    within_error(np.mean(a * b), 0.0, 1 / np.sqrt(a.size))
    squares = (a**2 - 1) * (b**2 - 1) / 2
    within_error(np.mean(squares), 0.0, 1 / np.sqrt(a.size))


def test_moments(drawn):
    """E z^k for k = 1..4; Var z^k = E z^2k - (E z^k)^2 = 1, 2, 15, 96."""
    for k, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        within_error(np.mean(drawn**k), mean, np.sqrt(variance / drawn.size))


def test_tail_counts():
    """Either tail beyond 3 and 4.5 sigma, on 1.7e7 draws (57 expected beyond 4.5 on each side)."""
    z = draws(5, 2**19)
    for sign in (1, -1):
        for edge in (3.0, 4.5):
            expected = z.size * stats.norm.sf(edge)
            within_error((sign * z > edge).sum(), expected, np.sqrt(expected))
    assert np.abs(z).max() < LARGEST


def test_distribution(drawn):
    """Kolmogorov-Smirnov, of the normals and of the angle and the radius of every pair."""
    assert stats.kstest(drawn.ravel()[: 2**19], "norm").pvalue > 1e-3
    x, y = drawn[0::2].ravel(), drawn[1::2].ravel()
    angle = np.arctan2(y, x) / (2 * np.pi) + 0.5
    assert stats.kstest(angle[: 2**19], "uniform").pvalue > 1e-3
    assert stats.kstest((x**2 + y**2)[: 2**19], "chi2", (2,)).pvalue > 1e-3


def test_lanes_are_independent(drawn):
    """The largest of 496 correlations: each N(0, 1 / ROWS)."""
    correlation = np.corrcoef(drawn.T)[np.triu_indices(LANES, 1)] * np.sqrt(ROWS)
    assert np.abs(correlation).max() < SIGMAS
    assert abs((correlation**2).sum() - 496) < SIGMAS * np.sqrt(2 * 496)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 64])
def test_successive_draws_are_independent(drawn, lag):
    uncorrelated(drawn[:-lag], drawn[lag:])


def test_blocks_are_independent(drawn):
    uncorrelated(drawn, draws(4))
    first, second = np.random.SeedSequence(0).spawn(2)
    assert not np.isin(fast_normals.lanes(first), fast_normals.lanes(second)).any()


def test_stream_is_xoshiro_and_box_muller():
    """Bit operations in Python's integers, logarithm and angle in float64."""
    state = fast_normals.lanes(np.random.SeedSequence(1))
    a, b, c, d = (state[i, 5].item() for i in range(4))
    mask, words = 0xFFFFFFFF, []

    def rotate(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    for _ in range(40):
        words.append((rotate((a + d) & mask, 7) + a) & mask)
        t = (b << 9) & mask
        c, d = c ^ a, d ^ b
        b, a = b ^ c, a ^ d
        c, d = c ^ t, rotate(d, 11)
    expected = []
    for p, q in zip(words[0::2], words[1::2], strict=True):
        radius = np.sqrt(-2 * np.log(((p >> 1) + 0.5) / 2**31))
        angle = np.pi / 4 * ((q >> 3) + 0.5) / 2**29
        pair = [np.cos(angle), np.sin(angle)][:: -1 if q & 1 else 1]
        expected += [
            radius * pair[0] * (-1) ** (q >> 1 & 1),
            radius * pair[1] * (-1) ** (q >> 2 & 1),
        ]
    np.testing.assert_allclose(draws(1, 40)[:, 5], expected, rtol=1e-6)  # float32 has 6e-8


PROGRAMS = [
    constant(SGD(), 0.3, 50, batch_size=4),
    Program((Phase(SGD(), Cosine(0.3, 0.05, 70), 70, 4),)),
    constant(HeavyBall(0.8), 0.1, 50, batch_size=4),
    constant(EMA(SGD(), 0.9), 0.3, 50, batch_size=4),
    Program(
        (Phase(SGD(), 0.3, 30, 4), Phase(LatePhase(3, gamma="mean"), 0.2, 33, 4, member_lr=0.1))
    ),
    Program(
        (
            Phase(HeavyBall(0.5), 0.2, 5, 4),
            Phase(LatePhase(2, inner=HeavyBall(0.5), gamma="mean"), 0.1, 9),
        )
    ),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: type(p.phases[-1].algorithm).__name__)
def test_agrees_with_exact_moments(problem, program):
    """Recorded densely and rarely, mean model and members; 3970 replicas leave a short block."""
    at = [0, 1, 7, program.steps - 1, program.steps]
    exact = nqm.solve(problem, program, at)
    drawn = nqm.sample(problem, program, at, replicas=3970, seed=11, precision="float32")
    within_error(drawn.loss, exact.loss, exact.loss_sd / np.sqrt(3970))
    within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)
    all_steps = nqm.sample(
        problem, program, range(program.steps + 1), replicas=3970, seed=11, precision="float32"
    )
    np.testing.assert_array_equal(all_steps.loss[at], drawn.loss)


def test_workers_do_not_change_the_numbers(problem):
    one, two, other = (
        nqm.sample(problem, PROGRAMS[4], replicas=70, seed=seed, workers=w, precision="float32")
        for seed, w in ((2, 1), (2, 2), (3, 1))
    )
    np.testing.assert_array_equal(one.samples, two.samples)
    assert not np.isin(one.samples[-1], other.samples[-1]).any()


def test_divergence_is_seen(problem):
    wild = nqm.sample(problem, constant(SGD(), 1e6, 80), [80], replicas=4, precision="float32")
    assert not np.isfinite(wild.loss[0])


def test_refused(problem):
    program = Program((Phase(MultiplicativeLatePhase(2, gamma="mean"), 0.1, 5),))
    with pytest.raises(NQMError, match=r"phase\.0 is MultiplicativeLatePhase; use 'float64'"):
        nqm.sample(problem.replace(minimum=1.0), program, precision="float32")
    with pytest.raises(NQMError, match=r"precision 'float3' is unknown.*float32"):
        nqm.sample(problem, PROGRAMS[0], precision="float3")


def test_configuration(problem):
    mapping = {
        "problem": {"curvature": [1.0, 0.1], "noise_variance": 1.0},
        "phase": [{"algorithm": "sgd", "lr": 0.1, "steps": 9}],
        "method": "sample", "replicas": 40, "precision": "float32",
    }  # fmt: skip
    run = config.build(mapping)
    direct = nqm.sample(run.problem, run.program, replicas=40, precision="float32")
    np.testing.assert_array_equal(run.solve().samples, direct.samples)
    exact_tails = config.build({**mapping, "precision": "float64"}).solve()
    assert not np.isin(exact_tails.samples[-1], direct.samples[-1]).any()
    with pytest.raises(NQMError, match="precision 'half' is unknown"):
        config.build({**mapping, "precision": "half"})
