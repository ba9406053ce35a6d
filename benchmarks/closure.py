"""Error of the moment closure and of the first order of multiplicative weights, by Monte Carlo.

One direction of curvature 1 with minimum 1 and a start there; gamma = 1 / K and equal rates.
Printed are errors in per cent of the mean model's loss, with the standard error of Monte Carlo;
docs/tables/closure_error.csv holds those after 1000 steps.
"""

from __future__ import annotations

import itertools

from nqm import MultiplicativeLatePhase, Problem, constant, moment_closure, sample, solve

MEMBERS, NOISE, RATES, AT = (1, 4, 16), (0.016, 0.064, 0.25), (0.05, 0.2), (50, 1000)


def main(replicas: int = 6000) -> None:
    print("K,noise,lr,steps,first order,closure,standard error")
    for members, noise, lr in itertools.product(MEMBERS, NOISE, RATES):
        problem = Problem([1.0], noise, initial_variance=0.0, minimum=1.0)
        program = constant(MultiplicativeLatePhase(members, gamma="mean"), lr, max(AT))
        drawn = sample(problem, program, AT, replicas=replicas, seed=7, control=True)
        first, closed = solve(problem, program, AT), moment_closure(problem, program, AT)
        for i, steps in enumerate(AT):
            off = [100.0 * (result.loss[i] / drawn.loss[i] - 1.0) for result in (first, closed)]
            error = 100.0 * drawn.stderr[i] / drawn.loss[i]
            row = f"{off[0]:+.1f} %,{off[1]:+.1f} %,{error:.1f} %"
            print(f"{members},{noise:g},{lr:g},{steps},{row}", flush=True)


if __name__ == "__main__":
    main()
