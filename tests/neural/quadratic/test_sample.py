"""Monte Carlo in PyTorch against the compiled one and against exact moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import nqm
from neural.quadratic import sample as monte_carlo
from nqm import (
    EMA,
    SGD,
    Adam,
    Cosine,
    Ensemble,
    HeavyBall,
    LatePhase,
    Lookahead,
    MultiplicativeLatePhase,
    NQMError,
    Phase,
    Problem,
    Program,
    Rounded,
    SampledSGD,
    SignSGD,
    WeightDecay,
    constant,
)
from tests.tolerances import IDENTITY, agree, within_error

AT = [0, 1, 5, 20]
REPLICAS = 4000
PLACED = Problem(
    [1.0, 0.3, 0.05], [0.05, 0.1, 0.03], initial_mean=[0.2, 0.1, -0.1],
    initial_variance=[0.02, 0.0, 0.01], minimum=[1.0, -2.0, 0.7], multiplicity=[1.0, 2.0, 5.0],
)  # fmt: skip
NONLINEAR = {
    "members": (MultiplicativeLatePhase(3, gamma="mean"), 0.2),
    "spread": (MultiplicativeLatePhase(2, 0.7, factor=1.3, spread=0.02), 0.1),
    "scalar": (
        MultiplicativeLatePhase(2, factor=0.8, spread=0.02, coupling="scalar", gamma="mean"),
        0.05,
    ),
    "clipped": (SampledSGD(threshold=0.3, momentum=0.5), 0.1),
    "heavy tails": (SampledSGD(threshold=0.5, dof=4.0), 0.1),
    "rounded": (SampledSGD(pitch=0.05), 0.2),
    "signum": (SignSGD(momentum=0.8), 0.01),
    "adam": (Adam(beta2=0.95), 0.01),
}
LINEAR = {
    "late-phase": Phase(
        LatePhase(2, spread=0.1, directions=(0, 2), gamma="mean"), 0.2, 20, 2, member_lr=0.1
    ),
    "shared": Phase(LatePhase(3, minibatch=0.4, inner=HeavyBall(0.5), gamma="mean"), 0.1, 20, 2),
    "ensemble": Phase(Ensemble(2, starts="own"), Cosine(0.3, 0.1, 20), 20, 2),
    "lookahead": Phase(Lookahead(k=3), 0.3, 20, 2),
    "decay": Phase(WeightDecay(SGD(), 0.2), 0.3, 20, 2),
    "rounded": Phase(Rounded(SGD(), 0.2), 0.3, 20, 2),
}


@pytest.mark.parametrize("precision", monte_carlo.DTYPES)
@pytest.mark.parametrize("name", NONLINEAR)
def test_two_monte_carlos_agree(name, precision):
    """The compiled sampler and this one, means and distribution."""
    algorithm, lr = NONLINEAR[name]
    program = constant(algorithm, lr, AT[-1], batch_size=2)
    ours = monte_carlo.sample(PLACED, program, AT, replicas=REPLICAS, seed=1, precision=precision)
    other = nqm.sample(PLACED, program, AT, replicas=REPLICAS, seed=1)
    within_error(ours.loss, other.loss, np.hypot(ours.stderr, other.stderr))
    error = np.hypot(ours.member_stderr, other.member_stderr)
    within_error(ours.member_loss, other.member_loss, error)
    assert stats.ks_2samp(ours.samples[-1], other.samples[-1]).pvalue > 1e-5
    np.testing.assert_array_equal(ours.examples, other.examples)


@pytest.mark.parametrize("name", NONLINEAR)
def test_without_noise_both_take_the_same_path(name):
    algorithm, lr = NONLINEAR[name]
    if algorithm.__dict__.get("pitch") or algorithm.__dict__.get("spread"):
        pytest.skip("random without noise")
    quiet = PLACED.replace(noise_variance=0.0, initial_variance=0.0)
    halves = Program((Phase(algorithm, Cosine(lr, 0.1 * lr, 9), 9), Phase(algorithm, lr, 11)))
    ours = monte_carlo.sample(quiet, halves, range(21), replicas=2)
    agree(ours.samples, nqm.sample(quiet, halves, range(21), replicas=2).samples, IDENTITY)
    single = monte_carlo.sample(quiet, halves, range(21), replicas=2, precision="float32")
    agree(single.samples, ours.samples, 1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_methods_have_their_exact_loss(name):
    program = Program((LINEAR[name],))
    exact = nqm.solve(PLACED, program, AT)
    drawn = monte_carlo.sample(PLACED, program, AT, replicas=REPLICAS, seed=3)
    within_error(drawn.loss, exact.loss, drawn.stderr)
    if LINEAR[name].algorithm.member_count:
        within_error(drawn.member_loss, exact.member_loss, drawn.member_stderr)


def test_phases_hand_over_as_they_do_in_the_compiled_sampler(monkeypatch):
    monkeypatch.setattr(monte_carlo, "ENTRIES", 9 * 1000)  # blocks of 1000 replicas
    late = MultiplicativeLatePhase(3, spread=0.01, gamma="mean")
    program = Program((
        Phase(HeavyBall(0.5), 0.2, 4), Phase(EMA(inner=HeavyBall(0.5), decay=0.8), 0.2, 4),
        Phase(LatePhase(2, inner=HeavyBall(0.5), gamma="mean"), 0.1, 4), Phase(late, 0.1, 4),
        Phase(late, 0.05, 3, restart=True), Phase(Adam(), 0.01, 4), Phase(Adam(), 0.02, 4),
        Phase(SGD(), 0.1, 3),
    ))  # fmt: skip
    at = [4, 8, 9, 12, 13, 16, 19, 23, 27, 30]
    ours = monte_carlo.sample(PLACED, program, at, replicas=REPLICAS, seed=1)
    other = nqm.sample(PLACED, program, at, replicas=REPLICAS, seed=1)
    within_error(ours.loss, other.loss, np.hypot(ours.stderr, other.stderr))
    exact = nqm.solve(PLACED, Program(program.phases[:3]), at[:4])
    within_error(ours.loss[:4], exact.loss, ours.stderr[:4])


def test_a_seed_is_a_stream():
    program = constant(MultiplicativeLatePhase(2, gamma="mean"), 0.1, 3)
    runs = [monte_carlo.sample(PLACED, program, [3], replicas=9, seed=s) for s in (4, 4, 5)]
    np.testing.assert_array_equal(runs[0].samples, runs[1].samples)
    assert np.all(runs[0].samples != runs[2].samples)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
@pytest.mark.parametrize("name", NONLINEAR)
def test_a_graphics_card_agrees(name):
    algorithm, lr = NONLINEAR[name]
    program = constant(algorithm, lr, AT[-1], batch_size=2)
    ours = monte_carlo.sample(PLACED, program, AT, replicas=REPLICAS, seed=1, device="cuda")
    other = nqm.sample(PLACED, program, AT, replicas=REPLICAS, seed=1)
    within_error(ours.loss, other.loss, np.hypot(ours.stderr, other.stderr))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": 1}, "replicas"),
        ({"seed": -1}, "seed"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"precision": "float16"}, "precision 'float16' is unknown"),
        ({"at": [7]}, r"record\.at"),
    ],
)
def test_misuse_is_an_error(options, words):
    with pytest.raises(NQMError, match=words):
        monte_carlo.sample(PLACED, constant(SignSGD(), 0.1, 5), **options)
    with pytest.raises(NQMError, match=r"problem\.minimum != 0"):
        monte_carlo.sample(
            PLACED.replace(minimum=0.0), constant(MultiplicativeLatePhase(2, gamma="mean"), 0.1, 5)
        )


@pytest.mark.parametrize(
    "algorithm", [HeavyBall(0.5), LatePhase(2, gamma="mean"), SampledSGD()], ids=repr
)
def test_correlated_directions_are_drawn_as_such(algorithm):
    """Exact quantiles know the covariance of noise and start; SampledSGD is SGD."""
    rng = np.random.default_rng(2)
    h, c, start = (root @ root.T for root in (rng.standard_normal((3, k)) for k in (3, 1, 2)))
    problem = Problem.from_matrices(h, c, initial_covariance=start)
    linear = SGD() if algorithm == SampledSGD() else algorithm
    lr = 0.2 / problem.curvature.max()
    law = next(nqm.solve(problem, constant(linear, lr, 6), [6]).distributions())
    drawn = monte_carlo.sample(problem, constant(algorithm, lr, 6), [6], replicas=REPLICAS)
    for level in (0.1, 0.9):
        share = np.mean(drawn.samples[0] <= law.quantile(level))
        assert abs(share - level) < 4.5 * np.sqrt(0.09 / REPLICAS)
