"""Monte Carlo of the noisy quadratic in PyTorch, on a CPU or a GPU.

It runs the same programs as `nqm.sample`, with other random numbers: linear algorithms by their
literal `update` on tensors, all others by the classes in this file. Replicas run in blocks; a block
needs memory for the state, one step's noise and its recorded losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nqm.algorithms import Adam, MultiplicativeLatePhase, SampledSGD, SignSGD
from nqm.algorithms.base import Algorithm, State
from nqm.algorithms.sampled import Sampled
from nqm.errors import NQMError, check_integer, check_word
from nqm.limits import check_memory, check_walk
from nqm.problems.quadratic import FloatArray, Problem
from nqm.program import Phase, Program, goes_on, resumes
from nqm.result import Trajectory
from nqm.solvers.moments import check_own_starts
from nqm.transition import origins

#: Largest number of entries of one state variable (replicas x members x directions) in a block.
ENTRIES = 2**23
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def sample(
    problem: Problem,
    program: Program,
    at: Sequence[int] | None = None,
    *,
    replicas: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float64",
) -> Trajectory:
    """Estimate the expected loss at the recorded steps by Monte Carlo.

    Parameters
    ----------
    problem : Problem
        The noisy quadratic problem.
    program : Program
        Any program that `nqm.sample` takes.
    at : sequence of int, optional
        Recorded steps, counted from the start of the program; about 100 by default.
    replicas : int
        Number of independent runs, >= 2.
    seed : int
        Seed of the random numbers, >= 0. On another device or at another precision the same seed
        gives other numbers.
    device : str
        PyTorch's name of the device: "cpu", "cuda", "cuda:1".
    precision : {"float64", "float32"}
        Precision of states and noise. Losses are always summed in float64.

    Returns
    -------
    Trajectory
        Mean losses with their standard errors.

    Raises
    ------
    NQMError
        If the device cannot be used, or `nqm.sample` would refuse the program.
    """
    check_integer("replicas", replicas, 2)
    check_integer("seed", seed, 0)
    check_word("precision", precision, DTYPES)
    wanted = program.recorded(at)
    for old, new in pairwise((None, *program.phases)):
        assert new is not None
        if isinstance(new.algorithm, Algorithm | MultiplicativeLatePhase | Sampled):
            new.algorithm.check(problem)
        if old is not None and isinstance(new.algorithm, Algorithm) and not goes_on(old, new):
            check_own_starts(new.algorithm)
    check_memory("replicas", replicas, 2.0 * len(wanted) * replicas)
    check_walk("phase.steps", program.steps, "Monte Carlo takes each of them")
    members = max(1, *(phase.algorithm.member_count for phase in program.phases))
    size = max(1, min(replicas, ENTRIES // (problem.directions * members)))
    draws = _Draws(problem, _device(device), DTYPES[precision], seed, size)
    loss = np.empty((len(wanted), replicas))
    member_loss = np.empty_like(loss)
    for first in range(0, replicas, size):
        draws.replicas = min(size, replicas - first)
        for row, (x, each) in enumerate(_walk(problem, program, wanted, draws)):
            chosen = slice(first, first + draws.replicas)
            loss[row, chosen] = draws.loss(x).cpu()
            member_loss[row, chosen] = loss[row, chosen]
            if each:
                total = sum((draws.loss(w) for w in each[1:]), start=draws.loss(each[0]))
                member_loss[row, chosen] = (total / len(each)).cpu()
    with np.errstate(over="ignore", invalid="ignore"):
        return Trajectory.of_samples(problem, program, wanted, loss, member_loss)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise NQMError(f"device {name!r} cannot be used: {reason}; use 'cpu'") from None
    return device


class _Draws:
    """The problem's arrays on a device, and its random numbers."""

    def __init__(
        self, problem: Problem, device: torch.device, dtype: torch.dtype, seed: int, replicas: int
    ):
        self.device, self.dtype, self.replicas = device, dtype, replicas
        self.generator = torch.Generator(device).manual_seed(seed)
        self.curvature, self.minimum, self.counts = (
            self.tensor(array)
            for array in (problem.curvature, problem.minimum, problem.multiplicity)
        )
        self.start, self.spread = problem.initial_mean, np.sqrt(problem.initial_variance)
        self.sd = self.tensor(np.sqrt(problem.noise_variance))
        self.noise_root, self.start_root = (
            None if correlation is None else self.tensor(correlation.root)
            for correlation in (problem.noise_correlation, problem.initial_correlation)
        )
        self.weight = torch.as_tensor(problem.weight.copy(), device=device)

    def tensor(self, values: FloatArray) -> Tensor:
        """Convert an array to a tensor of this device and precision."""
        return torch.as_tensor(values.copy(), dtype=self.dtype, device=self.device)

    @property
    def shape(self) -> tuple[int, int]:
        """(replicas, d)."""
        return self.replicas, len(self.curvature)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def batch_noise(self, *shape: int) -> Tensor:
        """Draw noise of minibatches, variance 1 and correlated as in the problem, (..., d)."""
        return _correlated(self.normal(*shape), self.noise_root)

    def uniform(self) -> Tensor:
        """Draw uniform numbers in [0, 1), (replicas, d)."""
        return torch.rand(
            self.shape, generator=self.generator, dtype=self.dtype, device=self.device
        )

    def noise(self, dof: float) -> Tensor:
        """Draw noise of variance 1: normal, or Student's t by the polar method (Bailey 1994)."""
        if math.isinf(dof):
            return self.batch_noise(*self.shape)
        radius = torch.expm1(torch.log1p(-self.uniform()).mul_(-2.0 / dof)).mul_(dof - 2.0).sqrt_()
        return radius.mul_(torch.cos(self.uniform().mul_(2.0 * math.pi)))

    def weights(self) -> Tensor:
        """Draw initial weights (replicas, d), as displacements from the minimum."""
        normal = _correlated(self.normal(*self.shape), self.start_root)
        return self.tensor(self.start) + self.tensor(self.spread) * normal

    def loss(self, x: Tensor) -> Tensor:
        """Loss of weights (replicas, d), summed in float64."""
        x = x.to(torch.float64)
        return (x * x) @ self.weight


def _correlated(normal: Tensor, root: Tensor | None) -> Tensor:
    """Independent normals (..., d) correlated by a root (d, r); None for independent directions."""
    return normal if root is None else normal[..., : root.shape[1]] @ root.T


class _Gradient:
    """Minibatch gradient of one step (`nqm.algorithms.base.Gradient`) on tensors."""

    def __init__(self, draws: _Draws, sd: Tensor):
        self.draws, self.sd = draws, sd
        self.batches: dict[int, Tensor] = {}

    def __call__(self, x: Any, batch: int | None = None, size: float = 1.0) -> Tensor:
        noise = None if batch is None else self.batches.get(batch)
        if noise is None:
            noise = self.draws.batch_noise(*self.draws.shape).mul_(self.sd / math.sqrt(size))
        if batch is not None:
            self.batches[batch] = noise
        return torch.as_tensor(self.draws.curvature * x + noise)

    def normal(self) -> Tensor:
        return self.draws.normal(*self.draws.shape)


@dataclass
class _Chain:
    """Run a linear algorithm by its literal update."""

    algorithm: Algorithm
    draws: _Draws
    mask: Any
    state: State = ()
    age: int = 0

    @classmethod
    def enter(cls, problem: Problem, draws: _Draws, old: Any, phases: Sequence[Phase]) -> Any:
        """Make the state at the start of a phase from that of the phase before, or from None."""
        new = phases[-1].algorithm
        assert isinstance(new, Algorithm)
        mask = new.member_mask(problem)
        scale = 1.0 if mask is None else draws.tensor(mask)
        linear = isinstance(old, _Chain)
        if linear and goes_on(*phases) and old.algorithm.coordinates == new.coordinates:
            return cls(new, draws, scale, old.state, old.age)

        def normal() -> Tensor:
            return scale * draws.normal(*draws.shape)

        start = None if old is None else old.weights()
        known: dict[str, Any] = {}
        if linear and resumes(*phases):
            known = dict(zip(old.algorithm.coordinates, old.state, strict=True))
            state = new.resume(known, lambda: start, normal)
        else:
            state = new.embed(draws.weights if start is None else lambda: start, normal)
        state = tuple(
            -draws.minimum + x if at_origin else x
            for x, at_origin in zip(state, origins(new, known), strict=True)
        )
        return cls(new, draws, scale, state)

    def step(self, settings: FloatArray) -> None:
        *rates, size = settings.tolist()
        lr = (rates[0], self.mask * rates[1]) if len(rates) == 2 else rates[0]
        gradient = _Gradient(self.draws, self.draws.sd / math.sqrt(size))
        self.state = self.algorithm.update(self.state, gradient, lr, self.age)
        self.age += 1

    def weights(self) -> Tensor:
        x = self.algorithm.weights(self.state, self.age)
        return torch.as_tensor(x + torch.zeros_like(self.draws.curvature)).expand(self.draws.shape)

    def members(self) -> tuple[Tensor, ...]:
        each = self.algorithm.member_weights(self.state, self.age)
        return tuple((x + torch.zeros_like(self.draws.curvature)) for x in each)


@dataclass
class _Factors:
    """Multiplicative late-phase weights: theta (R, d) and phi (R, K, d or 1)."""

    algorithm: MultiplicativeLatePhase
    draws: _Draws
    theta: Tensor
    phi: Tensor

    @classmethod
    def enter(cls, draws: _Draws, algorithm: MultiplicativeLatePhase, start: Tensor) -> Any:
        wide = 1 if algorithm.scalar else draws.shape[1]
        shape = (draws.replicas, algorithm.members, wide)
        phi = torch.full(shape, algorithm.factor, dtype=draws.dtype, device=draws.device)
        if algorithm.spread:
            phi *= 1.0 + math.sqrt(algorithm.spread) * draws.normal(*shape)
        return cls(algorithm, draws, (draws.minimum + start) / algorithm.factor, phi)

    def step(self, settings: FloatArray) -> None:
        lr, member_lr, size = settings.tolist()
        draws = self.draws
        noise = draws.batch_noise(draws.replicas, self.algorithm.members, draws.shape[1])
        g = (self.theta[:, None] * self.phi).sub_(draws.minimum).mul_(draws.curvature)
        g.addcmul_(noise, draws.sd / math.sqrt(size))
        pull = torch.mul(self.phi, g, out=noise).sum(dim=1)
        g *= self.theta[:, None]
        moved = g.sum(dim=2, keepdim=True) if self.algorithm.scalar else g
        self.phi.sub_(moved, alpha=member_lr)
        self.theta.sub_(pull, alpha=self.algorithm.base_scale * lr)

    def weights(self) -> Tensor:
        return self.theta * self.phi.mean(dim=1) - self.draws.minimum

    def members(self) -> tuple[Tensor, ...]:
        return tuple(self.theta * phi - self.draws.minimum for phi in self.phi.unbind(dim=1))


@dataclass
class _Optimizer:
    """A rule of `nqm.algorithms.sampled` and its two buffers, (R, d) each."""

    algorithm: Sampled
    draws: _Draws
    x: Tensor
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.first, self.second = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def step(self, settings: FloatArray) -> None:
        lr, size = settings.tolist()
        rule, draws, x = self.algorithm, self.draws, self.x
        g = draws.noise(rule.tail).mul_(draws.sd / math.sqrt(size)).addcmul_(draws.curvature, x)
        self.done += 1
        if isinstance(rule, Adam):
            self.first.lerp_(g, 1.0 - rule.beta1)
            self.second.mul_(rule.beta2).addcmul_(g, g, value=1.0 - rule.beta2)
            scale = (self.second / (1.0 - rule.beta2**self.done)).sqrt_().add_(rule.epsilon)
            x.addcdiv_(self.first, scale, value=-lr / (1.0 - rule.beta1**self.done))
        else:
            assert isinstance(rule, SampledSGD | SignSGD)
            if isinstance(rule, SampledSGD) and rule.threshold is not None:
                norm = ((g * g) @ draws.counts).sqrt_()
                g.mul_((rule.threshold / norm).clamp_(max=1.0)[:, None])
            self.first.mul_(rule.momentum).add_(g)
            x.sub_(self.first.sign() if isinstance(rule, SignSGD) else self.first, alpha=lr)
        if rule.pitch:
            cell = (x + draws.minimum) / rule.pitch
            low = cell.floor()
            low += draws.uniform() < cell - low
            self.x = low.mul_(rule.pitch).sub_(draws.minimum)

    def weights(self) -> Tensor:
        return self.x

    def members(self) -> tuple[Tensor, ...]:
        return ()


def _walk(
    problem: Problem, program: Program, wanted: Sequence[int], draws: _Draws
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield the evaluated weights and the members' weights at every wanted step."""
    record, now = set(wanted), 0
    run: _Chain | _Factors | _Optimizer | None = None
    for index, phase in enumerate(program.phases):
        phases = program.phases[max(index - 1, 0) : index + 1]
        algorithm, on = phase.algorithm, index > 0 and goes_on(*phases)
        if isinstance(algorithm, Algorithm):
            run = _Chain.enter(problem, draws, run, phases)
        elif on and isinstance(run, _Factors | _Optimizer):
            run.algorithm = algorithm  # type: ignore[assignment]
        else:
            start = draws.weights() if run is None else run.weights().clone()
            if isinstance(algorithm, MultiplicativeLatePhase):
                run = _Factors.enter(draws, algorithm, start)
            elif isinstance(algorithm, Sampled):
                run = _Optimizer(algorithm, draws, start)
            else:
                raise NQMError(f"no sampler for {type(algorithm).__name__}")
        assert run is not None
        if index == 0 and 0 in record:
            yield run.weights(), run.members()
        for settings in phase.settings(0, phase.steps):
            run.step(settings)
            now += 1
            if now in record:
                yield run.weights(), run.members()
