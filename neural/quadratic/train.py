"""The noisy quadratic problem trained by torch, to check `neural.LatePhase` against `nqm`.

`NoisyQuadratic` has many independent runs of one `nqm.Problem` as the rows of its weights, so that
one training estimates expected losses with a small standard error. `train_quadratic` runs an
`nqm.Program` with `torch.optim.SGD` and `neural.LatePhase`; `measure_law` tabulates the losses with
their prediction. This table translates from one library to the other:

=============================  ====================================================================
`nqm`                          torch
=============================  ====================================================================
one step of a late phase       one cycle: `LatePhase.step` on K minibatches, K B examples
``lr``                         rate of the base optimizer
``member_lr``                  rate of the member optimizer (``optimizer_like(base, lr=...)``)
``gamma`` = g, None (1 / K)    ``gamma=g``; None is ``"mean"``. torch's default is ``"sum"``, g = 1
mean model's rate, additive    member_lr + g K lr: the base moves K times as fast under ``"sum"``
``inner=HeavyBall(m)``         ``momentum=m``, dampening 0, in both optimizers; Nesterov likewise
``minibatch="own"``            batch k is member k's; ``"shared"``: K times the same batch
noise                          v / B per minibatch; the mean model sees v / (K B) ("own")
``spread`` s, additive         ``noise=sqrt(s n)``, ``noise_rule="fan_in"``, n numbers in a row
``spread`` s, multiplicative   ``noise=sqrt(s)``, ``noise_rule="rms"``: phi_k = factor (1 + ...)
a phase of a plain optimizer   the base optimizer alone, before T0; its momentum is kept
``loss``, ``member_loss``      of `averaged`, and the mean over `member`
=============================  ====================================================================

``leftover="carry"`` and ``"drop"`` make whole cycles only and follow the same law; with
``"members"`` the base misses a step. Idle steps change nothing if there is neither momentum nor
weight decay. `nqm` has no algorithm for ``"members"`` and for idle steps with momentum, but both
are linear: written as an `nqm.Algorithm`, as in the tests, they have exact moments as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import nqm
from neural.late_phase.members import Batch, LatePhase
from neural.training.optim import set_lr
from nqm import NQMError, Phase, Problem, Program
from nqm.algorithms.base import Optimizer
from nqm.errors import check_integer

#: Optimizers of `nqm` that do the same as `torch.optim.SGD`.
OPTIMIZERS = (nqm.SGD, nqm.HeavyBall, nqm.Nesterov)
LATE = (nqm.LatePhase, nqm.MultiplicativeLatePhase)


class NoisyQuadratic(nn.Module):
    """Module with the loss 1/2 sum_i h_i x_i^2, x = w - w*, and w = theta + phi or theta * phi.

    Parameters
    ----------
    problem : Problem
        Gives curvature h and minimum w*. Multiplicities are used by `loss` only.
    start : ndarray, shape (runs, d)
        Initial x, one run in each row.
    factor : float, optional
        If given, w = theta * phi, with phi = factor at the start; by default w = theta + phi, with
        phi = 0 at the start.
    """

    curvature: Tensor
    minimum: Tensor
    weight: Tensor

    def __init__(
        self,
        problem: Problem,
        start: NDArray[np.float64],
        factor: float | None = None,
    ):
        super().__init__()
        self.combine = torch.add if factor is None else torch.mul
        for name in ("curvature", "minimum", "weight"):
            self.register_buffer(name, torch.tensor(getattr(problem, name)))
        w = torch.from_numpy(start) + self.minimum
        self.theta = nn.Parameter(w if factor is None else w / factor)
        self.phi = nn.Parameter(torch.full_like(w, factor or 0.0))

    def displacement(self) -> Tensor:
        """Displacement x = w - w* from the minimum.

        Returns
        -------
        Tensor, shape (runs, d)
        """
        return self.combine(self.theta, self.phi) - self.minimum

    def forward(self, noise: Tensor) -> Tensor:
        """Compute every example's loss in every run; its gradient in w is h x + noise.

        Parameters
        ----------
        noise : Tensor, shape (B, runs, d)
            Gradient noise of the examples.

        Returns
        -------
        Tensor, shape (B, runs)
        """
        x = self.displacement()
        return 0.5 * (self.curvature * x.square()).sum(-1) + (noise * x).sum(-1)

    @torch.no_grad()
    def loss(self) -> NDArray[np.float64]:
        """Compute the loss of every run without noise.

        Returns
        -------
        ndarray, shape (runs,)
        """
        return np.asarray((self.displacement().square() @ self.weight).numpy())


def minibatch_loss(output: Tensor, targets: object = None) -> Tensor:
    """Average the loss over examples and sum it over runs.

    By the sum, the gradient of a run does not depend on the number of runs.

    Parameters
    ----------
    output : Tensor, shape (B, runs)
        Losses from `NoisyQuadratic.forward`.
    targets : object
        Not used.

    Returns
    -------
    Tensor, scalar
    """
    return output.mean(0).sum()


class NoiseStream:
    """Random minibatches of gradient noise, N(0, v) for every example and run.

    Parameters
    ----------
    problem : Problem
        Gives the noise variance v and the correlation between directions.
    runs : int
        Number of independent runs.
    seed : int
        Seed of the draws.
    """

    def __init__(self, problem: Problem, runs: int, seed: int):
        self.size = torch.tensor(np.sqrt(problem.noise_variance))
        correlation = problem.noise_correlation
        self.root = None if correlation is None else torch.tensor(correlation.root)
        self.runs = runs
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int, batch_size: int = 1) -> list[Batch]:
        """Draw minibatches of noise.

        Parameters
        ----------
        count : int
            Number of minibatches.
        batch_size : int
            Number of examples of each, B.

        Returns
        -------
        list of (inputs, None)
            Inputs have shape (B, runs, d).
        """
        shape = (batch_size, self.runs, len(self.size))
        rng = self.generator
        drawn = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count)]
        if self.root is not None:
            drawn = [normal[..., : self.root.shape[1]] @ self.root.T for normal in drawn]
        return [(normal * self.size, None) for normal in drawn]


def draw_start(problem: Problem, runs: int, seed: int) -> NDArray[np.float64]:
    """Draw initial displacements from the problem's initial distribution.

    Parameters
    ----------
    problem : Problem
        Gives mean, variance and correlation.
    runs : int
        Number of independent runs.
    seed : int
        Seed of the draws.

    Returns
    -------
    ndarray, shape (runs, d)
        Displacements from the minimum.
    """
    normal = np.random.default_rng(seed).standard_normal((runs, problem.directions))
    if problem.initial_correlation is not None:
        root = problem.initial_correlation.root
        normal = normal[:, : root.shape[1]] @ root.T
    return np.asarray(problem.initial_mean + np.sqrt(problem.initial_variance) * normal)


def late_settings(
    algorithm: nqm.LatePhase | nqm.MultiplicativeLatePhase, directions: int
) -> dict[str, Any]:
    """Translate a late phase of `nqm` to arguments of `neural.LatePhase`.

    Parameters
    ----------
    algorithm : nqm.LatePhase or nqm.MultiplicativeLatePhase
        The late phase.
    directions : int
        Number of directions of the problem, d: the length of a row of the weights.

    Returns
    -------
    dict of str to object
        Keyword arguments of `neural.LatePhase`.
    """
    additive = isinstance(algorithm, nqm.LatePhase)
    return {
        "members": algorithm.members,
        "select": "name:phi",
        "gamma": algorithm.gamma,
        "noise": math.sqrt(algorithm.spread * (directions if additive else 1.0)),
        "noise_rule": "fan_in" if additive else "rms",
    }


@dataclass(frozen=True)
class Measured:
    """Losses of all runs at the recorded steps.

    Attributes
    ----------
    steps : ndarray of int64, shape (records,)
        Recorded steps.
    averaged : ndarray, shape (records, runs)
        Loss of the model with averaged weights.
    member : ndarray, shape (records, runs)
        Mean loss of the members; before T0 equal to `averaged`.
    """

    steps: NDArray[np.int64]
    averaged: NDArray[np.float64]
    member: NDArray[np.float64]


def train_quadratic(
    problem: Problem,
    program: Program,
    at: Sequence[int] | None = None,
    *,
    runs: int = 4000,
    seed: int = 0,
    fused: bool = False,
    idle_steps: str = "none",
) -> Measured:
    """Run a program of `nqm` with `torch.optim.SGD` and `neural.LatePhase`, in float64.

    Parameters
    ----------
    problem : Problem
        The noisy quadratic problem.
    program : Program
        A phase of late-phase weights, additive or multiplicative by element, or a phase of SGD,
        heavy ball or Nesterov and then one of late-phase weights. Learning rates are constant or
        scheduled, batch sizes whole numbers.
    at : sequence of int, optional
        Recorded steps; about 100 by default.
    runs : int
        Number of independent runs, >= 2: the rows of one model.
    seed : int
        Seed of the initial weights, the noise and the members.
    fused, idle_steps
        See `neural.LatePhase`.

    Returns
    -------
    Measured

    Raises
    ------
    NQMError
        If the program is of another kind.
    """
    check_integer("runs", runs, 2)
    wanted = program.recorded(at)
    _check(program)
    last = program.phases[-1].algorithm
    factor = last.factor if isinstance(last, nqm.MultiplicativeLatePhase) else None
    # Three seeds: members spawned with the seed of the noise would be correlated with the noise.
    start_seed, noise_seed, member_seed = np.random.SeedSequence(seed).generate_state(3).tolist()
    model = NoisyQuadratic(
        problem,
        draw_start(problem, runs, start_seed),
        factor,
    )
    # Before T0 only theta is trained; phi is constant.
    base = torch.optim.SGD([model.theta], lr=1.0, **_momentum(program.phases[0]))
    stream = NoiseStream(problem, runs, noise_seed)
    late: LatePhase | None = None
    records: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    step = 0
    for phase in program.phases:
        algorithm = phase.algorithm
        if isinstance(algorithm, LATE):
            settings = late_settings(algorithm, problem.directions)
            late = LatePhase(model, idle_steps=idle_steps, seed=member_seed, **settings)
            own = late.optimizer_like(base)
        shared = isinstance(algorithm, nqm.LatePhase) and algorithm.shared == 1.0
        # Step 0 is recorded here; all other steps after they are done, in the loop below.
        if step == 0 and not records and 0 in wanted:
            records.append(_losses(model, late))
        for lr, *member_lr, size in phase.settings(0, phase.steps):
            set_lr(base, lr)
            if late is None:
                base.zero_grad()
                noise = stream.draw(1, int(size))[0][0]
                torch.autograd.backward(minibatch_loss(model(noise)))
                base.step()
            else:
                set_lr(own, member_lr[0])
                draws, times = (1, late.members) if shared else (late.members, 1)
                batches = stream.draw(draws, int(size)) * times
                late.step(batches, minibatch_loss, base, own, fused=fused)
            step += 1
            if step in wanted:
                records.append(_losses(model, late))
    averaged, member = (np.stack(column) for column in zip(*records, strict=True))
    return Measured(np.array(wanted), averaged, member)


def _check(program: Program) -> None:
    *before, last = (phase.algorithm for phase in program.phases)
    plain = [*before, last.inner] if isinstance(last, nqm.LatePhase) else before
    if (
        not isinstance(last, LATE)
        or len(before) > 1
        or any(type(a) not in OPTIMIZERS for a in plain)
    ):
        raise NQMError(
            "train_quadratic needs late-phase weights, on their own or after one phase of SGD, "
            f"HeavyBall or Nesterov; got {[type(a).__name__ for a in (*before, last)]}"
        )
    if isinstance(last, nqm.LatePhase):
        fits = last.directions is None and last.shared in (0.0, 1.0)
        # torch's members have the base optimizer's settings.
        fits = fits and all(algorithm == last.inner for algorithm in before)
    else:
        fits = not last.scalar and all(type(algorithm) is nqm.SGD for algorithm in before)
        fits = fits and (not before or last.factor == 1.0)
    if not fits:
        raise NQMError(
            "train_quadratic needs members of every direction, on minibatches of their own or one "
            "for all, a factor by element (1 after another phase), and the optimizer of the phase "
            f"before; got {last} after {before}"
        )
    for phase in program.phases:
        sizes = phase.settings(0, phase.steps)[:, -1]
        if phase.restart or np.any(sizes != np.round(sizes)):
            raise NQMError(f"train_quadratic needs whole batch sizes and no restart; got {phase}")


def _momentum(phase: Phase) -> dict[str, Any]:
    inner = getattr(phase.algorithm, "inner", phase.algorithm)
    momentum = getattr(inner, "momentum", 0.0) if isinstance(inner, Optimizer) else 0.0
    return {"momentum": momentum, "nesterov": isinstance(inner, nqm.Nesterov)}


def _losses(
    model: NoisyQuadratic, late: LatePhase | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses of every run: of the averaged model, and the mean over members."""
    if late is None:
        return model.loss(), model.loss()
    averaged, *members = (late.averaged(), *(late.member(k) for k in range(late.members)))
    losses = [member.loss() for member in members]  # type: ignore[operator]
    return averaged.loss(), np.mean(losses, axis=0)  # type: ignore[operator]


def measure_law(
    problem: Problem,
    program: Program,
    at: Sequence[int] | None = None,
    *,
    runs: int = 4000,
    seed: int = 0,
    fused: bool = False,
    idle_steps: str = "none",
) -> pd.DataFrame:
    """Tabulate the losses of `train_quadratic` with the losses that `nqm` predicts.

    The prediction is exact (`nqm.solve`), except for multiplicative members, whose moments do not
    form a closed system: for them it is a Monte Carlo of `nqm.sample` with four times as many runs.

    Parameters
    ----------
    problem, program, at, runs, seed, fused, idle_steps
        See `train_quadratic`.

    Returns
    -------
    DataFrame
        A row for each step and kind of weights. Columns method, members, lr, member_lr, gamma,
        momentum, nesterov (of the last phase, rates at its start); weights (``averaged`` or
        ``member``), step, kind, predicted, measured, stderr (of the difference), z (difference over
        stderr).

    Raises
    ------
    NQMError
        See `train_quadratic`.
    """
    measured = train_quadratic(
        problem, program, at, runs=runs, seed=seed, fused=fused, idle_steps=idle_steps
    )
    if program.linear:
        law = nqm.solve(problem, program, at)
    else:
        law = nqm.sample(problem, program, at, replicas=4 * runs, seed=seed + 1)
    phase = program.phases[-1]
    late = phase.algorithm
    assert isinstance(late, LATE)
    lr, member_lr, _ = phase.settings(0, 1)[0]
    lead = {
        "method": "additive" if isinstance(late, nqm.LatePhase) else "multiplicative",
        "members": late.members,
        "lr": lr,
        "member_lr": member_lr,
        "gamma": late.base_scale,
        **_momentum(phase),
    }
    frames = []
    for name, losses, predicted, error in (
        ("averaged", measured.averaged, law.loss, law.stderr),
        ("member", measured.member, law.member_loss, law.member_stderr),
    ):
        mean, own = losses.mean(axis=1), losses.std(axis=1, ddof=1) / math.sqrt(runs)
        stderr = np.hypot(own, error)
        columns = {"step": law.steps, "kind": str(law.kind), "predicted": predicted}
        columns |= {"measured": mean, "stderr": stderr, "z": (mean - predicted) / stderr}
        frames.append(pd.DataFrame({**lead, "weights": name, **columns}))
    return pd.concat(frames, ignore_index=True)
