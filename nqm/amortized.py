"""Amortized model ensembling (AME): models merged by an optimizer that steps towards each in turn.

Lee & Ngo 2025, "Amortized model ensembling". The optimizer's gradient at x is x - x_i, that of
|x - x_i|^2 / 2, for one ingredient x_i at a time or for their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.limits import check_memory
from nqm.problems.quadratic import FloatArray
from nqm.words import short_html, short_repr

#: Buffers of an optimizer, in the order of its function below.
Buffers = tuple[FloatArray, ...]
#: Direction and new buffers of a step, from the gradient, the buffers and the step number (from 1).
Direction = Callable[[FloatArray, Buffers, int], tuple[FloatArray, Buffers]]


@dataclass(frozen=True)
class AME:
    """How ingredients are merged by amortized model ensembling.

    From the pivot, the first ingredient by default, take one step of the optimizer for each
    ingredient; so many passes over all of them. Gradient descent at the rates 1 / i is the uniform
    soup, whatever the pivot; at a constant rate with batch "all" it is a point on the line from
    pivot to soup. Adagrad, Adam, Adadelta and signs depend on the basis.

    Parameters
    ----------
    optimizer : {"gd", "adagrad", "adam", "adadelta", "sign"}
        With the defaults of PyTorch for all but the rate, and no weight decay.
    lr : float or sequence of float, optional
        Learning rate, or one for each step; 1 / i at step i = 1, 2, ... by default.
    passes : int
        Passes over the ingredients, >= 1.
    order : {"given", "shuffled"}
        Order of the ingredients in a pass; shuffled anew in every pass.
    batch : {"one", "all"}
        The gradient is that of one ingredient, or of their mean: then a pass is one step.

    Raises
    ------
    NQMError
        On an unknown word, a rate that is no number >= 0, or less than one pass.
    """

    optimizer: str = "gd"
    lr: float | Sequence[float] | None = None
    passes: int = 1
    order: str = "given"
    batch: str = "one"

    def __post_init__(self) -> None:
        check_word("AME.optimizer", self.optimizer, _DIRECTIONS)
        check_integer("AME.passes", self.passes, 1)
        check_word("AME.order", self.order, ("given", "shuffled"))
        check_word("AME.batch", self.batch, ("one", "all"))
        if isinstance(self.lr, list | tuple | np.ndarray):
            object.__setattr__(self, "lr", tuple(self.lr))
            for lr in self.lr:
                check_number("AME.lr", lr, low=0.0)
        elif self.lr is not None:
            check_number("AME.lr", self.lr, low=0.0)

    def steps(self, ingredients: int) -> int:
        """Number of optimizer steps.

        Parameters
        ----------
        ingredients : int
            Number N of ingredients.

        Returns
        -------
        int
            passes, times N unless batch is "all".
        """
        return self.passes * (1 if self.batch == "all" else ingredients)

    def lrs(self, ingredients: int) -> FloatArray:
        """Learning rate of each step.

        Parameters
        ----------
        ingredients : int
            Number N of ingredients.

        Returns
        -------
        ndarray, shape (steps,)

        Raises
        ------
        NQMError
            If `lr` holds another number of rates, or if they do not fit into memory.
        """
        steps = self.steps(ingredients)
        check_memory("AME.passes", self.passes, 2.0 * steps)
        if self.lr is None:
            return 1.0 / np.arange(1.0, steps + 1.0)
        if isinstance(self.lr, tuple) and len(self.lr) != steps:
            raise NQMError(
                f"AME.lr must hold one rate for each of the {steps} steps; got {len(self.lr)}"
            )
        return np.array(np.broadcast_to(np.asarray(self.lr, dtype=np.float64), steps))

    def merge(
        self, ingredients: FloatArray, pivot: FloatArray, rng: np.random.Generator | None = None
    ) -> FloatArray:
        """Merge models given as vectors, in the basis in which they are given.

        Parameters
        ----------
        ingredients : ndarray, shape (..., N, d)
        pivot : ndarray, shape (..., d)
            Where the optimizer starts.
        rng : numpy.random.Generator, optional
            For a shuffled order; of seed 0 by default.

        Returns
        -------
        ndarray, shape (..., d)
        """
        n = ingredients.shape[-2]
        rng = np.random.default_rng(0) if rng is None else rng
        x = np.array(np.broadcast_to(pivot, ingredients[..., 0, :].shape), dtype=np.float64)
        direction = _DIRECTIONS[self.optimizer]
        buffers: Buffers = (np.zeros_like(x), np.zeros_like(x))
        mean = ingredients.mean(axis=-2)
        given = np.broadcast_to(np.arange(n), ingredients.shape[:-1])
        order = given
        for t, lr in enumerate(self.lrs(n)):
            if self.batch == "all":
                toward = mean
            else:
                if self.order == "shuffled" and t % n == 0:
                    order = rng.permuted(given, axis=-1)
                chosen = order[..., t % n, None, None]
                toward = np.take_along_axis(ingredients, chosen, axis=-2)[..., 0, :]
            step, buffers = direction(x - toward, buffers, t + 1)
            x = x - lr * step
        return x


@dataclass(frozen=True)
class AMESample:
    """Models merged by amortized model ensembling, by Monte Carlo; arrays of shape (replicas,).

    Attributes
    ----------
    loss : ndarray
        Loss of the merged model.
    soup_loss : ndarray
        Loss of the uniform soup of the same ingredients.
    pivot_loss : ndarray
        Loss of the pivot.
    """

    loss: FloatArray
    soup_loss: FloatArray
    pivot_loss: FloatArray

    __repr__ = short_repr
    _repr_html_ = short_html


def random_basis(directions: int, rng: np.random.Generator) -> FloatArray:
    """A random orthogonal matrix, uniformly distributed (Mezzadri 2007).

    Parameters
    ----------
    directions : int
        d >= 1.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray, shape (d, d)
    """
    q, r = np.linalg.qr(rng.standard_normal((directions, directions)))
    return np.asarray(q * np.sign(np.diag(r)))


def _gd(g: FloatArray, buffers: Buffers, t: int) -> tuple[FloatArray, Buffers]:
    return g, buffers


def _sign(g: FloatArray, buffers: Buffers, t: int) -> tuple[FloatArray, Buffers]:
    return np.sign(g), buffers


def _adagrad(g: FloatArray, buffers: Buffers, t: int) -> tuple[FloatArray, Buffers]:
    total = buffers[0] + g**2
    return g / (np.sqrt(total) + 1e-10), (total,)


def _adam(g: FloatArray, buffers: Buffers, t: int) -> tuple[FloatArray, Buffers]:
    beta1, beta2 = 0.9, 0.999
    m, s = beta1 * buffers[0] + (1 - beta1) * g, beta2 * buffers[1] + (1 - beta2) * g**2
    return m / (1 - beta1**t) / (np.sqrt(s / (1 - beta2**t)) + 1e-8), (m, s)


def _adadelta(g: FloatArray, buffers: Buffers, t: int) -> tuple[FloatArray, Buffers]:
    rho, epsilon = 0.9, 1e-6
    s = rho * buffers[0] + (1 - rho) * g**2
    step = np.sqrt(buffers[1] + epsilon) / np.sqrt(s + epsilon) * g
    return step, (s, rho * buffers[1] + (1 - rho) * step**2)


_DIRECTIONS: dict[str, Direction] = {
    "gd": _gd,
    "adagrad": _adagrad,
    "adam": _adam,
    "adadelta": _adadelta,
    "sign": _sign,
}
