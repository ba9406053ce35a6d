"""What the quadratic leaves out at leading order: noise pushes the mean, by third derivatives.

Around weights that scatter with covariance S the mean gradient is g + 1/2 T:S, T the tensor of
third derivatives. The force f = 1/2 T:S moves the mean of any number of runs away from where the
loss is least. Averaging K members divides the scatter by K and leaves this: the *floor*,

    1/2 f' psi^2 H f,      psi = (1 - (1 - lr H)^t) / H,

after t steps, 1/2 f' H^-1 f in the end; of an average over time psi is averaged with its weights. f
is measured on the network, by mean gradients at both ends of random displacements of the scatter's
width, and of half of it: 4/3 of their difference. Of a smooth loss that is 1/2 T:S. Weights on
kinks are pushed by any scatter, however narrow, and training without noise meets that push as well;
in the difference it cancels. S goes as lr / B, f with it, and the floor as its square: f is
measured at the scatter of each training, and scaled with lr / B to others near by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neural.curvature import Landscape
from neural.krylov import Krylov, krylov
from neural.local_model import Kept, LocalModel, fingerprint, vector
from neural.spectrum import Progress, operator
from neural.time_averages import TimeAverage, power
from nqm.errors import check_integer

FloatArray = NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]
#: After so many steps, or an average over time.
When = float | TimeAverage


@dataclass(frozen=True)
class Slopes:
    """How the slope turns from one end of a displacement to the other, for n random ones.

    Attributes
    ----------
    moved : ndarray, shape (n, k)
        Displacements along the local model's eigenpairs.
    turned : ndarray, shape (n, k)
        Half the difference of the slopes at both ends, along the same.
    left : ndarray, shape (3,)
        Of d, the displacement beyond the eigenpairs, sums of d'd, of d'Hd by the local model, and
        of d' with half the difference of the slopes.
    risen : ndarray, shape (2,)
        Sums of the mean loss at both ends less that in the middle; and of half the displacement.
    """

    moved: FloatArray
    turned: FloatArray
    left: FloatArray
    risen: FloatArray


@dataclass(frozen=True)
class Drift:
    """The force of the noise on the mean weights, measured twice.

    Two independent halves of the draws: products of the two are free of the bias that the square of
    a noisy estimate has.

    Attributes
    ----------
    local : LocalModel
        Whose scatter it was measured at.
    lr, batch_size, steps : float
        Of that scatter.
    top : tuple of ndarray, shape (k,)
        Of both halves along the local model's eigenpairs.
    rest : tuple of Krylov
        Of both halves.
    slopes : Slopes
        What was seen besides; the force is their even part.
    climb : ndarray, shape (k, k), optional
        Curvature along the eigenpairs by which the displacement of the mean counts in the loss,
        where it is another than that which holds the force (`Smoothing.hold`).
    """

    local: LocalModel
    lr: float
    batch_size: float
    steps: float
    top: tuple[FloatArray, FloatArray]
    rest: tuple[Krylov, Krylov]
    slopes: Slopes
    climb: FloatArray | None = None

    def floor(self, lr: float, batch_size: float, when: When) -> float:
        """Loss that the mean over any number of members keeps after so many steps."""
        psi, h = response(lr, when), self.local.pairs.values
        one, other = (psi(h) * half for half in self.top)
        value = one @ (h * other if self.climb is None else self.climb @ other)
        if len(self.rest[0].values):
            moved = self.rest[0].apply(lambda h: psi(h) ** 2 * h)
            value += moved @ self.rest[1].apply(np.ones_like)
        return 0.5 * float(value) * self._scale(lr, batch_size) ** 2

    def cross(self, lr: float, batch_size: float, when: When) -> float:
        """Change of the mean's loss by the force acting along the slope of the checkpoint."""
        psi = response(lr, when)

        def function(h: FloatArray) -> FloatArray:
            return psi(h) * (psi(h) * h - 1.0)

        local = self.local
        force = 0.5 * (self.top[0] + self.top[1])
        value = local.slope @ (function(local.pairs.values) * force)
        if len(local.gradient.values) and len(self.rest[0].values):
            moved = local.gradient.apply(function)
            value += 0.5 * sum(float(moved @ half.apply(np.ones_like)) for half in self.rest)
        return float(value) * self._scale(lr, batch_size)

    def moved(self, lr: float, batch_size: float, when: When) -> FloatArray:
        """Where the force has put the mean, -psi f, shape (p,)."""
        psi = response(lr, when)
        local = self.local
        found = local.pairs.vectors @ (psi(local.pairs.values) * (self.top[0] + self.top[1]))
        if len(self.rest[0].values):
            found = found + sum(half.apply(psi) for half in self.rest)
        return np.asarray(-0.5 * found * self._scale(lr, batch_size))

    def _scale(self, lr: float, batch_size: float) -> float:
        return (lr / batch_size) / (self.lr / self.batch_size)


def response(lr: float, when: When) -> Function:
    """psi: how far a constant force moves the weights along curvature h, (1 - (1 - lr h)^t) / h.

    Parameters
    ----------
    lr : float
    when : float or TimeAverage
        t; or an average of psi over t.
    """
    steps, age, left = (
        (when.steps, when.age, when.left)
        if isinstance(when, TimeAverage)
        else (when, when, partial(power, steps=when))
    )

    def psi(h: FloatArray) -> FloatArray:
        u = lr * h
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.abs(u) * steps < 1e-9, lr * age, (1.0 - left(u)) / h)

    return psi


def descent(local: LocalModel, lr: float, when: When) -> float:
    """Change of the loss by noise-free gradient descent on the quadratic, <= 0 where H > 0."""
    psi = response(lr, when)
    h, _, g = local.points()
    return float(g @ (0.5 * psi(h) ** 2 * h - psi(h)))


def descended(local: LocalModel, lr: float, when: When) -> FloatArray:
    """Where noise-free gradient descent on the quadratic puts the weights, -psi g, shape (p,).

    Negative curvature is taken for none: the loss, unlike the quadratic, is bounded from below.
    Where lr h is 2 or more, which heavy ball may stand, descent is taken to have settled.
    """
    psi = response(lr, when)

    def held(h: FloatArray) -> FloatArray:
        within = psi(np.clip(h, 0.0, 2.0 / lr))
        return np.where(lr * h < 2.0, within, 1.0 / np.maximum(h, 2.0 / lr))

    moved = local.pairs.vectors @ (held(local.pairs.values) * local.slope)
    if len(local.gradient.values):
        moved = moved + local.gradient.apply(held)
    return np.asarray(-moved)


def measure_drift(
    landscape: Landscape,
    local: LocalModel,
    lr: float,
    batch_size: float,
    steps: float,
    *,
    momentum: float = 0.0,
    samples: int = 32,
    products: int = 30,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Measure the force at the scatter of so many steps of SGD from the checkpoint.

    Around where descent without noise ends by the local model: a checkpoint that training without
    noise has settled on is on more kinks than weights that scatter meet.

    Parameters
    ----------
    landscape : Landscape
    local : LocalModel
        Of this landscape.
    lr, batch_size, steps : float
        The scatter. With momentum b, lr is the effective rate lr / (1 - b).
    momentum : float
        Of the optimiser.
    samples : int
        Random displacements, four gradients each; an even number.
    products : int
        Hessian products for each half.
    seed : int
    folder : Path, optional
        Keeps what is found, and gives it when asked again.
    progress : callable, optional
        Told that one more gradient or product is done.
    """
    check_integer("samples", samples, 2)
    kept = Kept(folder, f"{fingerprint(landscape)}-{seed}")
    # A smoothed local model is another one: its largest curvature and its noise say which.
    basis = f"{len(local.pairs.values)}-{len(local.draws)}-{local.largest:.10g}"
    basis += f"-{local.noise_trace:.10g}"
    heavy = f"-{momentum}" if momentum else ""
    stage = f"push-{lr:.8g}-{batch_size}-{steps}{heavy}-{samples}-{basis}"
    known = local.pairs.vectors
    centre = landscape.weights + vector(landscape, descended(local, lr, steps))

    def sampled() -> dict[str, Any]:
        rng = np.random.default_rng([seed, 3])
        halves, risen = np.zeros((2, landscape.size)), np.zeros(2)
        moved, turned, left = [], [], np.zeros(3)
        middle = landscape.loss(centre)
        for i in range(samples):
            draw = _drawn(local, i)
            d = local.displacement(rng, lr, batch_size, steps, draw, momentum)
            odd, even, loss = _both_ends(landscape, centre, d)
            _, near_even, near_loss = _both_ends(landscape, centre, 0.5 * d)
            risen += loss - middle, near_loss - middle
            halves[i % 2] += (even - near_even) / 0.75
            moved.append(known.T @ d)
            turned.append(known.T @ odd)
            if draw is not None:
                beyond, rest = d - known @ moved[-1], local.draws[draw]
                bent = rest.values @ (rest.vectors.T @ beyond) ** 2  # exact: it lies in their span
                left += beyond @ beyond, bent, beyond @ odd
            if progress is not None:
                progress(4)
        forces = halves / np.array([[(samples + 1) // 2], [samples // 2]])
        return {"forces": forces, "moved": moved, "turned": turned, "left": left, "risen": risen}

    found = kept(f"{stage}-seen", sampled)
    forces = found["forces"]
    apply = operator(landscape, progress)

    def rest(half: int) -> Krylov:
        found = kept(
            f"{stage}-{products}-{half}",
            lambda: vars(krylov(apply, forces[half], products, known)),
        )
        return Krylov(**found)

    top = (known.T @ forces[0], known.T @ forces[1])
    seen = (np.asarray(found[name]) for name in ("moved", "turned", "left", "risen"))
    return Drift(local, lr, batch_size, steps, top, (rest(0), rest(1)), Slopes(*seen))


def _both_ends(
    landscape: Landscape, centre: Tensor, moved: FloatArray
) -> tuple[FloatArray, FloatArray, float]:
    """At both ends of a displacement: half the slopes' difference, their mean, and the losses'."""
    given = vector(landscape, moved)
    ends = [landscape.loss_and_gradient(centre + sign * given) for sign in (1.0, -1.0)]
    (loss, _), (other_loss, _) = ends
    one, other = (slope.double().cpu().numpy() for _, slope in ends)
    return 0.5 * (one - other), 0.5 * (one + other), 0.5 * (loss + other_loss)


def _drawn(local: LocalModel, sample: int) -> int | None:
    """Draw of the noise for a displacement: the halves take turns, and share none if they can."""
    count = len(local.draws)
    if not count or not len(local.draws[0].values):
        return None
    own = range(count)[sample % 2 :: 2] or range(count)
    return own[sample // 2 % len(own)]
