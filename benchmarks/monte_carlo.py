"""Monte Carlo of SGD, loss recorded at every step, against NumPy and against the mere draws.

Work: 10^3 directions x 10^3 replicas x 10^3 steps = 10^9 normals (float64, SFC64 on both sides).
Peers: the same in vectorised NumPy with the same loss recorded, timed over 50 steps and
extrapolated; and the time to do nothing but draw 10^9 normals from the same generator in compiled
code. All on one thread, in processor time, which other processes disturb less.

``precision="float32"``: against NumPy's own single-precision normals and against its generator
alone, many calls in turn.
"""

from __future__ import annotations

import os
import resource
import time
from functools import partial

import numpy as np

from benchmarks.timing import best_of, paired
from nqm import (
    EMA,
    LAWA,
    SGD,
    SWA,
    Ensemble,
    HeavyBall,
    LatePhase,
    Lookahead,
    Nesterov,
    Problem,
    QuasiHyperbolicMomentum,
    Rounded,
    WeightDecay,
    constant,
    sample,
    solve,
)
from nqm.algorithms.base import Algorithm
from nqm.problems.quadratic import FloatArray
from nqm.problems.spectra import harmonic
from nqm.solvers._kernels import fast_normals
from nqm.solvers._kernels.lanes import fill_lanes
from nqm.solvers._kernels.normals import fill_normals
from nqm.solvers.sample import BLOCK
from nqm.transition import count_draws

DIRECTIONS, REPLICAS, STEPS, TIMED = 1_000, 1_000, 1_000, 50
LR, BATCH = 0.5, 8
#: Calls of each side where a share of the draws is told: other guests of a processor slow it down
#: for seconds, so that many short calls in turn are better than a few long ones.
ROUNDS = {"float64": 9, "float32": 25}


def generator() -> np.random.Generator:
    """Return the generator of all draws here.

    Returns
    -------
    Generator
        SFC64 with seed 0.
    """
    return np.random.Generator(np.random.SFC64(0))


def draw(count: int) -> None:
    """Draw normals in compiled code, into a buffer that stays in the cache.

    Parameters
    ----------
    count : int
        Number of normals, a multiple of `DIRECTIONS`.
    """
    state = generator().bit_generator.state["state"]["state"]
    buffer = np.empty(DIRECTIONS)
    for _ in range(count // DIRECTIONS):
        fill_normals(state, buffer)


def draw_single(count: int) -> None:
    """Draw single-precision normals in compiled code, a tile at a time.

    Parameters
    ----------
    count : int
        Number of normals, rounded down to whole tiles.
    """
    lanes = fast_normals.lanes(np.random.SeedSequence(0))
    buffer = np.empty((1024, fast_normals.LANES), dtype=np.float32)
    for _ in range(count // buffer.size):
        fill_lanes(lanes, buffer)


def single_precision(problem: Problem) -> None:
    """Print the rates of NumPy's normals, of our normals alone, and of `sample`.

    Parameters
    ----------
    problem : Problem
        Has `DIRECTIONS` directions.
    """
    rng, count, steps = generator(), 4 * 10**6, 100
    program = constant(SGD(), LR, steps, batch_size=BATCH)
    numpy = partial(rng.standard_normal, count, dtype=np.float32)
    draw_single(2**15)
    times = paired(partial(draw_single, count), numpy, ROUNDS["float32"])
    beside_numpy = times[2]
    print(f"precision='float32', load average {os.getloadavg()[0]:.1f}")
    print(f"  NumPy float32 SFC64  {count / times[1] / 1e6:6.0f} M normals/s")
    ours = count / times[0] / 1e6
    print(f"  the draws alone      {ours:6.0f} M normals/s  {beside_numpy:5.1f} x NumPy")
    for name, at in (("every loss", range(steps + 1)), ("last loss", [steps])):
        for precision in fast_normals.PRECISIONS:
            run = partial(
                sample, problem, program, at, replicas=320, workers=1, precision=precision
            )
            run()
            alike = 320 * steps * DIRECTIONS
            mine, _, share = paired(run, partial(draw_single, alike), ROUNDS[precision])
            print(
                f"  {precision}, {name:10s}  {alike / mine / 1e6:6.0f} M steps/s   "
                f"{share * beside_numpy:5.1f} x NumPy's draws, {share:.2f} x ours"
            )


#: Every linear method that differs in what a step does.
METHODS: dict[str, Algorithm] = {
    "SGD": SGD(),
    "heavy ball": HeavyBall(0.9),
    "Nesterov": Nesterov(0.9),
    "quasi-hyperbolic": QuasiHyperbolicMomentum(0.9, 0.7),
    "weight decay": WeightDecay(SGD(), 0.1),
    "EMA": EMA(decay=0.99),
    "EMA of heavy ball": EMA(HeavyBall(0.9), 0.99),
    "SWA": SWA(),
    "LAWA, window 5": LAWA(),
    "lookahead": Lookahead(SGD(), 5, 0.5),
    "rounded SGD": Rounded(SGD(), 0.01),
    "ensemble, K = 4": Ensemble(4),
    "late-phase, K = 4": LatePhase(4, "mean"),
    "late-phase of heavy ball, K = 4": LatePhase(4, "mean", inner=HeavyBall(0.9)),
}


def every_method(problem: Problem) -> None:
    """Print the rate of each linear method, and its share of that of the draws alone.

    Parameters
    ----------
    problem : Problem
        Has `DIRECTIONS` directions.
    """
    print(f"every linear method, last loss recorded, load average {os.getloadavg()[0]:.1f}")
    for name, algorithm in METHODS.items():
        counted = count_draws(algorithm)
        normals = counted.minibatches + counted.normals
        shares = []
        for steps, replicas in ((1000, 32), (100, 320)):
            program = constant(algorithm, 0.1, steps, batch_size=BATCH)
            for precision, alone in (("float64", draw), ("float32", draw_single)):
                alike = DIRECTIONS * replicas * steps  # as many draws as one normal a step takes
                run = partial(sample, problem, program, [steps], replicas=replicas, workers=1,
                              precision=precision)  # fmt: skip
                run()
                mine, _, ratio = paired(run, partial(alone, alike), ROUNDS[precision])
                rate = alike * normals / mine / 1e6
                shares.append(f"{steps} {precision} {rate:5.0f} M/s, {ratio * normals:.2f}")
        print(f"  {name:32s} {' | '.join(shares)} of the draws", flush=True)


def numpy_sgd(h: FloatArray, steps: int) -> FloatArray:
    """Run SGD in NumPy on arrays of (replicas, directions).

    Parameters
    ----------
    h : ndarray, shape (directions,)
        Curvatures; the noise of one example is C = H.
    steps : int

    Returns
    -------
    ndarray, shape (steps,)
        Mean loss after every step.
    """
    rng = generator()
    x = rng.standard_normal((REPLICAS, DIRECTIONS))
    keep, sd = 1 - LR * h, LR * np.sqrt(h / BATCH)
    loss = np.empty(steps)
    for t in range(steps):
        x = keep * x + sd * rng.standard_normal(x.shape)
        loss[t] = np.mean(0.5 * (x * x) @ h)
    return loss


def main() -> None:
    h = harmonic(DIRECTIONS)
    problem = Problem(h, h)
    program = constant(SGD(), LR, STEPS, batch_size=BATCH)
    steps = range(STEPS + 1)
    draw(DIRECTIONS)
    sample(problem, constant(SGD(), LR, 2, batch_size=BATCH), replicas=2, workers=1)
    single_precision(problem)
    every_method(problem)
    count = DIRECTIONS * REPLICAS * STEPS
    runs = []

    def run() -> None:
        runs.append(sample(problem, program, steps, replicas=REPLICAS, workers=1))

    ours, draws, share = paired(run, partial(draw, count), 3)
    loop = best_of(lambda: numpy_sgd(h, TIMED), clock=time.process_time) * STEPS / TIMED
    exact = solve(problem, program, [STEPS])
    z = (runs[0].loss[-1] - exact.loss[-1]) / (exact.loss_sd[-1] / np.sqrt(REPLICAS))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Monte Carlo of SGD: {DIRECTIONS} directions x {REPLICAS} replicas x {STEPS} steps")
    print(f"  nqm.sample        {ours:7.2f} s   {count / ours / 1e6:6.0f} M coordinate-steps/s")
    print(f"  NumPy, same loss  {loop:7.2f} s   {loop / ours:6.2f} x slower (from {TIMED} steps)")
    print(f"  the draws alone   {draws:7.2f} s   nqm.sample takes {1 / share:.2f} x as long")
    print(
        f"  state of a block {BLOCK * DIRECTIONS * 8 / 2**20:.2f} MiB, recorded losses "
        f"{STEPS * REPLICAS * 8 / 2**20:.0f} MiB x 2, process peak {peak:.0f} MiB "
        f"(a full path would take {count * 8 / 2**30:.1f} GiB); last loss z = {z:+.2f}"
    )


if __name__ == "__main__":
    main()
