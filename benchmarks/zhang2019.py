"""Search for the fewest steps of heavy ball, against the method of the published notebook.

Work: 4 preconditioners x 10 batch sizes x 100 rates x 20 momenta, target 0.01 (the most expensive
figure of Zhang et al. 2019). Peer, reimplemented from its description: the spectrum binned into 100
bins, a 3 x 3 transition of second moments in each, its powers by eigendecomposition (anew at every
evaluation), and bisection for the number of steps, for every setting and batch size separately. The
peer is timed on a part of the stable settings and extrapolated to their number. Times are those of
this process on one thread, not of the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from nqm import SGD, HeavyBall, Problem
from nqm.problems.quadratic import FloatArray
from nqm.tuning.grid_search import search
from paper_repro.study import ZHANG2019, Scale, find
from paper_repro.zhang2019.common import (
    EXPONENTS,
    model,
    preconditioned,
    rounded_down,
    slow_momenta,
)

TARGET, LIMIT = 0.01, 10**7
RATES = np.geomspace(1e-8, 10.0, 100)
BATCHES = [4**k for k in range(1, 11)]
#: Momenta, rates and batch sizes of the slice, by runtime.
SLICE = (range(0, 20, 4), range(30, 100, 10), range(1, 10, 4))


def peer_loss(problem: Problem, lr: float, mu: float, batch: float, steps: int) -> float:
    """Compute the expected loss by the eigendecomposition of one step's transition.

    The state holds the second moments (xx, vv, xv) of each direction.

    Parameters
    ----------
    problem : Problem
    lr : float
        Learning rate.
    mu : float
        Momentum.
    batch : float
        Batch size.
    steps : int
        Number of steps.

    Returns
    -------
    float
    """
    h = problem.curvature
    u, q = lr * h, lr**2 * problem.noise_variance / batch
    # v' = mu v - u x - lr e;  x' = x + v'
    step = np.empty((h.size, 3, 3))
    step[:, 0] = np.stack([(1 - u) ** 2, 0 * u + mu**2, 2 * mu * (1 - u)], axis=1)
    step[:, 1] = np.stack([u**2, 0 * u + mu**2, -2 * mu * u], axis=1)
    step[:, 2] = np.stack([u**2 - u, 0 * u + mu**2, mu - 2 * mu * u], axis=1)
    drive = np.repeat(q[:, None], 3, axis=1)
    settled = np.linalg.solve(np.eye(3) - step, drive[..., None])[..., 0]
    values, vectors = np.linalg.eig(step)
    start = np.zeros_like(drive)
    start[:, 0] = problem.initial_mean**2 + problem.initial_variance
    inverse = np.linalg.inv(vectors)
    left = np.einsum("dij,dj->di", inverse, start - settled)
    moved = np.einsum("dij,dj->di", vectors, values**steps * left)
    return float(problem.weight @ (settled + moved.real)[:, 0])


def peer_steps(problem: Problem, lr: float, mu: float, batch: float) -> int:
    """Find the last step above the target by bisection.

    Parameters
    ----------
    problem : Problem
    lr : float
        Learning rate.
    mu : float
        Momentum.
    batch : float
        Batch size.

    Returns
    -------
    int
        `LIMIT` - 1 if the target is never met.
    """
    low, high = 0, LIMIT
    while high - low > 1:
        middle = (low + high) // 2
        above = peer_loss(problem, lr, mu, batch, middle) > TARGET
        low, high = (middle, high) if above else (low, middle)
    return low


def cpu(function: Callable[[], object], repeats: int = 1) -> float:
    """Measure the least processor time of this process.

    Parameters
    ----------
    function : callable
        Called without arguments.
    repeats : int
        Number of calls.

    Returns
    -------
    float
        Seconds.
    """
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def stable(mu: FloatArray) -> FloatArray:
    """Find the settings below heavy ball's stability edge 2 (1 + mu) / h, with h up to 1.

    Parameters
    ----------
    mu : ndarray, shape (momenta,)
        Momenta.

    Returns
    -------
    ndarray of bool, shape (momenta, rates)
        Rates are `RATES`.
    """
    return 2 * (1 + mu[:, None]) > RATES


def main() -> None:
    mu = slow_momenta(20)
    algorithms = [HeavyBall(float(m)) for m in mu]
    problems = preconditioned(10_000)
    search(model(50), algorithms, RATES, BATCHES, TARGET)  # compiles
    ours = cpu(lambda: search(problems, algorithms, RATES, BATCHES, TARGET), repeats=3)

    binned = rounded_down(model(10_000))
    cases = [(k, i, j) for k in SLICE[0] for i in SLICE[1] for j in SLICE[2] if stable(mu)[k, i]]
    found: list[int] = []

    def slice_of_peer() -> None:
        for k, i, j in cases:
            found.append(peer_steps(binned, RATES[i], mu[k], BATCHES[j]))

    sliced = cpu(slice_of_peer)
    first = []
    for k, i, j in cases:
        table = search(binned, algorithms[k], [RATES[i]], [BATCHES[j]], TARGET, horizon=LIMIT)
        first.append(table["step"].iloc[0])
    count = len(EXPONENTS) * len(BATCHES) * int(stable(mu).sum())
    whole = sliced / len(cases) * count
    never = np.isnan(first)
    # Its count is the last step above the target: one more is a crossing, if not the first.
    over = (np.array(found)[~never] + 1) / np.array(first)[~never] - 1
    print(f"fewest steps of heavy ball: {count} stable settings by batch size, one thread")
    print(f"  nqm.tuning.grid_search, 10^4 directions, first crossings  {ours:8.2f} s")
    print(
        f"  eigendecomposition and bisection, 100 bins            {whole:8.0f} s "
        f"(extrapolated from {len(cases)} taking {sliced:.1f} s)"
    )
    print(f"  ratio {whole / ours:.0f}")
    print(
        f"  on the slice, both on 100 bins: of {over.size} reached {np.sum(over == 0)} agree, "
        f"{np.sum(over > 0)} bisect past the first crossing, by up to {over.max():.1%}; "
        f"{never.sum()} are never reached, and for {np.sum(np.array(found)[never] >= LIMIT - 1)} "
        "of these bisection returns its limit"
    )
    binned_steps, steps = (
        search(p, SGD(), np.geomspace(1e-5, 10**0.5, 100), [2**14], TARGET)["step"].iloc[0]
        for p in (binned, problems[0])
    )
    print(f"  SGD, B = 2^14: {binned_steps:.0f} steps on bins, {steps:.0f} on every direction")
    print("the eight figures, computing only:")
    total = 0.0
    for name in ZHANG2019:
        study = find(name)
        taken = cpu(lambda study=study: study.compute(Scale.FULL))
        total += taken
        print(f"  {name:28s} {taken:6.2f} s")
    print(f"  {'all':28s} {total:6.2f} s")


if __name__ == "__main__":
    with threadpool_limits(1):
        main()
