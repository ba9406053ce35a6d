"""Gain of control variates and of common random numbers, and the speed of Monte Carlo in torch.

Control variates: the ratio of squared standard errors, at equal replicas, of the plain mean and of
the adjusted one, and the processor time of a controlled run over that of a plain one. Common
random numbers: the variance of the difference of two neighbouring settings with independent
streams over that with one seed. Torch: coordinate-steps per second on each device at hand, beside
`torch.randn` alone on that device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from neural.quadratic import sample as monte_carlo
from nqm import (
    SGD,
    Adam,
    MultiplicativeLatePhase,
    Phase,
    Problem,
    Program,
    SampledSGD,
    SignSGD,
    constant,
    sample,
)
from nqm.algorithms.base import Algorithm, Nonlinear
from nqm.problems.spectra import harmonic

DIRECTIONS, REPLICAS, STEPS = 100, 1000, 1000
#: Of the runs with common random numbers.
SHORT = 200


def problem(noise: float, start: float) -> Problem:
    """Return a problem with harmonic curvature and minimum w* = 1.

    Parameters
    ----------
    noise : float
        Noise covariance of one example over H.
    start : float
        Variance of the start in each direction.

    Returns
    -------
    Problem
    """
    h = harmonic(DIRECTIONS)
    return Problem(h, noise * h, initial_mean=0.0, initial_variance=start, minimum=1.0)


def cases() -> Iterator[tuple[str, Problem, Program]]:
    """Yield the compared programs: multiplicative late-phase weights, then other methods.

    Yields
    ------
    name : str
        What is varied.
    problem : Problem
    program : Program
    """
    for noise in (0.01, 0.1, 1.0):
        for lr in (0.02, 0.1, 0.5):
            late = MultiplicativeLatePhase(4, gamma="mean")
            yield (
                f"multiplicative K = 4, noise {noise}, lr {lr}",
                problem(noise, 0.0),
                constant(late, lr, STEPS),
            )
    for start in (0.01, 0.1, 1.0):
        yield (
            f"multiplicative K = 4, noise 0.1, lr 0.1, start {start}",
            problem(0.1, start),
            constant(MultiplicativeLatePhase(4, gamma="mean"), 0.1, STEPS),
        )
    after = Program(
        (Phase(SGD(), 0.5, STEPS), Phase(MultiplicativeLatePhase(4, gamma="mean"), 0.1, STEPS))
    )
    yield "SGD at 0.5, then multiplicative at 0.1, noise 0.1", problem(0.1, 0.0), after
    rules: dict[str, tuple[Nonlinear, tuple[float, float]]] = {
        "clipped at 0.5": (SampledSGD(threshold=0.5), (0.02, 0.2)),
        "clipped at 3": (SampledSGD(threshold=3.0), (0.02, 0.2)),
        "clipped at 3, t noise (3)": (SampledSGD(threshold=3.0, dof=3.0), (0.02, 0.2)),
        "rounded to 0.05": (SampledSGD(pitch=0.05), (0.02, 0.2)),
        "sign": (SignSGD(), (1e-3, 1e-2)),
        "sign, momentum 0.9": (SignSGD(momentum=0.9), (1e-3, 1e-2)),
        "Adam": (Adam(), (1e-3, 1e-2)),
        "Adam, beta2 0.9": (Adam(beta2=0.9), (1e-3, 1e-2)),
    }
    for name, (algorithm, rates) in rules.items():
        for lr in rates:
            yield f"{name}, lr {lr}", problem(1.0, 1.0), constant(algorithm, lr, STEPS)


def seconds(function: Callable[[], object]) -> float:
    """Measure the processor time of the faster of two calls.

    Parameters
    ----------
    function : callable
        Called without arguments.

    Returns
    -------
    float
        Seconds.
    """
    times = []
    for _ in range(2):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def control_variates() -> None:
    print(
        f"control variates: {DIRECTIONS} directions, {REPLICAS} replicas, phases of {STEPS} steps"
    )
    print(f"  {'speed-up in samples after':52s}{'10':>9s}{'100':>9s}{'1000':>9s}   time")
    for name, where, program in cases():
        at = [program.steps - STEPS + step for step in (10, 100, STEPS)]

        def run(control: bool, where: Problem = where, program: Program = program) -> object:
            return sample(where, program, at, replicas=64, workers=1, control=control)  # noqa: B023

        drawn = sample(where, program, at, replicas=REPLICAS, workers=1, control=True)
        ratio = seconds(lambda: run(True)) / seconds(lambda: run(False))
        gains = "".join(f"{gain:9.3g}" for gain in drawn.speed_up)
        print(f"  {name:52s}{gains}   x {ratio:.2f}", flush=True)


def common_numbers() -> None:
    print(f"common random numbers, {SHORT} steps: variance of a difference, own streams over one")
    late: Callable[..., Algorithm | Nonlinear] = MultiplicativeLatePhase
    pairs: dict[str, tuple[Program, Program]] = {
        f"{name}, lr 0.1 and {lr}": (constant(rule, 0.1, SHORT), constant(rule, lr, SHORT))
        for name, rule in (("SGD", SGD()), ("multiplicative K = 4", late(4)))
        for lr in (0.101, 0.11, 0.2)
    }
    pairs["multiplicative K = 4, batch size 8 and 9"] = (
        constant(late(4), 0.1, SHORT, batch_size=8), constant(late(4), 0.1, SHORT, batch_size=9),
    )  # fmt: skip
    pairs["multiplicative K = 4, gamma 1/4 and 0.3"] = (
        constant(late(4), 0.1, SHORT), constant(late(4, 0.3), 0.1, SHORT),
    )  # fmt: skip
    pairs["multiplicative K = 4 and 5"] = (
        constant(late(4), 0.1, SHORT), constant(late(5), 0.1, SHORT),
    )  # fmt: skip
    where = problem(0.1, 0.0)
    for name, (one, two) in pairs.items():
        a, b = (
            sample(where, program, [SHORT], replicas=REPLICAS, workers=1) for program in (one, two)
        )
        assert a.samples is not None
        assert b.samples is not None
        own = a.loss_sd[0] ** 2 + b.loss_sd[0] ** 2
        common = np.var(a.samples[0] - b.samples[0], ddof=1)
        print(f"  {name:52s}{own / common:9.3g}")


def torch_rate(device: str, precision: str) -> None:
    """Print the rate of Monte Carlo in torch, best of three, and relative to `torch.randn`.

    Parameters
    ----------
    device : str
        ``cpu`` or ``cuda``.
    precision : str
        A key of `neural.quadratic.sample.DTYPES`.
    """
    directions, replicas, steps = 1000, (8192 if device != "cpu" else 256), 20
    h = harmonic(directions)
    where = Problem(h, 0.1 * h, initial_mean=0.0, initial_variance=0.0, minimum=1.0)
    dtype = monte_carlo.DTYPES[precision]
    generator = torch.Generator(device).manual_seed(0)
    buffer = torch.empty((replicas, directions), dtype=dtype, device=device)

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def draw() -> None:
        for _ in range(steps):
            buffer.normal_(generator=generator)

    draw()
    drawn = steps * buffer.numel() / best(draw)
    print(f"  {device}, {precision}: torch.randn {drawn / 1e6:.0f} M/s")
    rules: list[tuple[Nonlinear, int]] = [
        (MultiplicativeLatePhase(4, "mean"), 4), (SampledSGD(threshold=1.0), 1), (SignSGD(), 1),
        (Adam(), 1),
    ]  # fmt: skip
    for rule, normals in rules:
        program = constant(rule, 0.01, steps)

        def run(program: Program = program) -> object:
            return monte_carlo.sample(
                where, program, [steps], replicas=replicas, device=device, precision=precision
            )

        rate = normals * steps * replicas * directions / best(run)
        name = type(rule).__name__
        print(f"    {name:24s}{rate / 1e6:8.0f} M normals' steps/s, {rate / drawn:.2f} of randn")


def main() -> None:
    print(f"load average {os.getloadavg()[0]:.1f}")
    control_variates()
    common_numbers()
    print("Monte Carlo in torch")
    torch.set_num_threads(1)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for precision in monte_carlo.DTYPES:
            torch_rate(device, precision)


if __name__ == "__main__":
    main()
