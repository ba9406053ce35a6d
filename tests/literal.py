"""Independent oracle: textbook recursions and closed forms, written out plainly.

Nothing here imports the library. The loss is ``1/2 sum_i h_i x_i^2``; a minibatch of size B
at x returns the gradient ``g = h x + e``, ``e ~ N(0, v/B)`` per direction and per step, where
v is the noise variance of one example's gradient and x the displacement from the minimum.

*Group 1* simulates each algorithm as its paper prints it. A simulator takes ``(h, v, start, lr,
batch_size, steps, rng, *, method parameters)``: ``start`` has shape (replicas, d), ``lr`` and
``batch_size`` are numbers or one number per step, and ``rng=None`` draws nothing at all. It
returns the path of the evaluated weights, shape (steps + 1, replicas, d), index 0 being the
start; methods with members add the members' path, shape (steps + 1, members, replicas, d).

*Group 2* holds exact second moments ``E x^2`` per direction (arrays over d) and the limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import xlog1py

Array = NDArray[np.float64]
Real = float | Array
Rng = np.random.Generator | None
Inner = Literal["sgd", "heavy_ball", "nesterov"]
Minibatch = Literal["own", "shared"]

# ------------------------------------------------------------------ group 1: literal simulators


def _plan(steps: int, *settings: ArrayLike) -> Iterator[tuple[Any, ...]]:
    """Yield the settings of each step; a number holds for all steps."""
    return zip(*(np.broadcast_to(s, steps) for s in settings), strict=True)


def _normal(rng: Rng, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape) if rng is None else rng.standard_normal(shape)


def _gradient(x: Array, h: Array, v: Array, size: float, rng: Rng, shape: Any = None) -> Array:
    """Return ``h x + e``; a smaller `shape` of the noise shares one minibatch among members."""
    return h * x + np.sqrt(v / size) * _normal(rng, x.shape if shape is None else shape)


def _step(inner: Inner, momentum: float, buffer: Array, g: Array) -> tuple[Array, Array]:
    """Return the new momentum buffer and the direction of one PyTorch SGD step."""
    if inner == "sgd":
        return buffer, g
    buffer = momentum * buffer + g
    return buffer, {"heavy_ball": buffer, "nesterov": g + momentum * buffer}[inner]


def sgd(
    h: Array, v: Array, start: Array, lr: ArrayLike, batch_size: ArrayLike, steps: int, rng: Rng
) -> Array:
    """Stochastic gradient descent (Robbins & Monro 1951): ``x <- x - lr g``."""
    x = start
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        x = x - eta * _gradient(x, h, v, size, rng)
        path.append(x)
    return np.stack(path)


def heavy_ball(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    momentum: float,
) -> Array:
    """Heavy ball (Polyak 1964; PyTorch form): ``b <- mu b + g; x <- x - lr b``."""
    x, b = start, np.zeros_like(start)
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        b = momentum * b + _gradient(x, h, v, size, rng)
        x = x - eta * b
        path.append(x)
    return np.stack(path)


def nesterov(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    momentum: float,
) -> Array:
    """Nesterov (Sutskever et al. 2013; PyTorch): ``b <- mu b + g; x <- x - lr (g + mu b)``."""
    x, b = start, np.zeros_like(start)
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        g = _gradient(x, h, v, size, rng)
        b = momentum * b + g
        x = x - eta * (g + momentum * b)
        path.append(x)
    return np.stack(path)


def quasi_hyperbolic_momentum(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    beta: float,
    nu: float,
) -> Array:
    """QHM (Ma & Yarats 2019, eqs. 3-4), beta and nu as printed there.

    ``g <- beta g + (1 - beta) grad;  theta <- theta - alpha ((1 - nu) grad + nu g)``.
    """
    theta, g = start, np.zeros_like(start)
    path = [theta]
    for alpha, size in _plan(steps, lr, batch_size):
        grad = _gradient(theta, h, v, size, rng)
        g = beta * g + (1 - beta) * grad
        theta = theta - alpha * ((1 - nu) * grad + nu * g)
        path.append(theta)
    return np.stack(path)


def _run(inner: Inner, momentum: float, *problem: Any) -> Array:
    if inner == "sgd":
        return sgd(*problem)
    return {"heavy_ball": heavy_ball, "nesterov": nesterov}[inner](*problem, momentum=momentum)


def ema(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    beta: float,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Moving average of the iterates: ``a <- beta a + (1 - beta) x_new``, a starts at x."""
    a = start
    path = [a]
    for x in _run(inner, momentum, h, v, start, lr, batch_size, steps, rng)[1:]:
        a = beta * a + (1 - beta) * x
        path.append(a)
    return np.stack(path)


def swa(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    every: int,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Average of all snapshots (Izmailov et al. 2018): ``a <- (n a + x) / (n + 1)``.

    Snapshots follow steps `every`, ``2 * every``, ...; until the first one x itself is
    evaluated. ``every=1`` is the uniform tail average (Polyak & Juditsky 1992).
    """
    a, n = start, 0
    path = [a]
    for t, x in enumerate(_run(inner, momentum, h, v, start, lr, batch_size, steps, rng)[1:], 1):
        if t % every == 0:
            a = (n * a + x) / (n + 1)
            n = n + 1
        path.append(a if n else x)
    return np.stack(path)


def lawa(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    every: int,
    window: int,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Mean of the last `window` snapshots (Kaddour 2022, LAWA); otherwise as `swa`."""
    snapshots: list[Array] = []
    path = [start]
    for t, x in enumerate(_run(inner, momentum, h, v, start, lr, batch_size, steps, rng)[1:], 1):
        if t % every == 0:
            snapshots.append(x)
        path.append(np.mean(snapshots[-window:], axis=0) if snapshots else x)
    return np.stack(path)


def lookahead(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    k: int,
    alpha: float,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Lookahead (Zhang et al. 2019): after k steps ``slow <- slow + alpha (x - slow); x <- slow``.

    The slow weights are evaluated; the inner momentum buffer survives the syncs.
    """
    slow, x, b = start, start, np.zeros_like(start)
    path = [slow]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size), 1):
        b, direction = _step(inner, momentum, b, _gradient(x, h, v, size, rng))
        x = x - eta * direction
        if t % k == 0:
            slow = slow + alpha * (x - slow)
            x = slow
        path.append(slow)
    return np.stack(path)


def ensemble(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    members: int,
    starts: Literal["common", "own"] = "common",
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> tuple[Array, Array]:
    """Weight mean of independent runs, own minibatches (Wortsman et al. 2022, model soups).

    With ``starts="own"`` the start has shape (members, replicas, d).
    """
    first = [start] * members if starts == "common" else list(start)
    if len(first) != members:
        raise ValueError("own starts need shape (members, replicas, d)")
    runs = [_run(inner, momentum, h, v, x, lr, batch_size, steps, rng) for x in first]
    w = np.stack(runs, axis=1)
    return w.mean(axis=1), w


def polynomial_average(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    eta: int,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Polynomial-decay average (Shamir & Zhang 2013) by its weights, for whole eta.

    Iterate s of t counts in proportion to the rising product ``s (s + 1) ... (s + eta - 1)``.
    """
    path = _run(inner, momentum, h, v, start, lr, batch_size, steps, rng)
    s = np.arange(1, steps + 1)
    weight = np.prod([s + j for j in range(eta)], axis=0) * np.ones(steps)
    means = [
        np.tensordot(weight[:t], path[1 : t + 1], 1) / weight[:t].sum() for t in range(1, steps + 1)
    ]
    return np.stack([start, *means])


def delayed_sgd(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    delay: int,
) -> Array:
    """SGD whose step t uses the gradient at x_(t - delay), or at x_0 before there is one."""
    path = [start]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size)):
        old = path[max(0, t - delay)]
        path.append(path[-1] - eta * _gradient(old, h, v, size, rng))
    return np.stack(path)


def correlated_noise(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    correlation: float,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """SGD or momentum whose gradient noise is a first-order autoregression from 0."""
    path, buffer, noise = [start], np.zeros_like(start), np.zeros_like(start)
    for _, (eta, size) in enumerate(_plan(steps, lr, batch_size)):
        fresh = np.sqrt(v / size) * _normal(rng, start.shape)
        noise = correlation * noise + np.sqrt(1.0 - correlation**2) * fresh
        buffer, step = _step(inner, momentum, buffer, h * path[-1] + noise)
        path.append(path[-1] - eta * step)
    return np.stack(path)


def pace(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    decay: float = 0.0,
    pull: float,
    power: float | None = None,
) -> Array:
    """SGD's step, a pull towards the average, then the average (Au & Block 2026)."""
    theta, average = start, start
    path = [average]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size)):
        if power is not None:
            decay = 1 - max((1 + t) ** -power, 1e-4)
        stepped = theta - eta * _gradient(theta, h, v, size, rng)
        theta = stepped + pull * (1 - decay) * (average - theta)
        average = decay * average + (1 - decay) * theta
        path.append(average)
    return np.stack(path)


def schedule_free(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    beta: float,
    warmup: int = 0,
) -> Array:
    """Schedule-free SGD (Defazio et al. 2024) with the warm-up and weights of the authors' code.

    x is the mean of z_1 .. z_t weighted by the squares of the factors of their rates.
    """
    z, x, total, weights = start, start, np.zeros_like(start), 0.0
    path = [x]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size), 1):
        factor = t / warmup if t < warmup else 1.0
        y = (1 - beta) * z + beta * x
        z = z - factor * eta * _gradient(y, h, v, size, rng)
        total, weights = total + factor**2 * z, weights + factor**2
        x = total / weights
        path.append(x)
    return np.stack(path)


def primal_average(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    mu_x: float,
    mu_y: float,
) -> Array:
    """Generalized primal averaging (Defazio et al. 2025) of SGD."""
    z, x = start, start
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        y = mu_y * x + (1 - mu_y) * z
        z = z - eta * _gradient(y, h, v, size, rng)
        x = mu_x * x + (1 - mu_x) * z
        path.append(x)
    return np.stack(path)


def local_sgd(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    clients: int,
    local_steps: int,
    inner: Inner = "sgd",
    momentum: float = 0.0,
    outer: Inner = "sgd",
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    curvatures: ArrayLike = 1.0,
    minima: ArrayLike = 0.0,
    shares: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Local SGD, FedAvg and DiLoCo (Douillard et al. 2023), round by round.

    The outer gradient is ``server - mean of clients``. Clients may have their own `curvatures`
    (clients,), in units of h, `minima` (clients, d), and `shares` (clients,) in the mean.
    """
    c = np.broadcast_to(curvatures, (clients,))[:, None, None]
    m = np.broadcast_to(minima, (clients, h.size))[:, None, :]
    server, b_server = start, np.zeros_like(start)
    x = np.stack([start] * clients)
    b = np.zeros_like(x)
    path = [x]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size), 1):
        b, direction = _step(inner, momentum, b, _gradient(c * (x - m), h, v, size, rng))
        x = x - eta * direction
        if t % local_steps == 0:
            delta = server - np.average(x, axis=0, weights=shares)
            b_server, direction = _step(outer, outer_momentum, b_server, delta)
            server = server - outer_lr * direction
            x = np.stack([server] * clients)
        path.append(x)
    w = np.stack(path)
    return np.average(w, axis=1, weights=shares), w


def fedprox(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    prox: float,
    clients: int,
    local_steps: int,
    inner: Inner = "sgd",
    momentum: float = 0.0,
    curvatures: ArrayLike = 1.0,
    minima: ArrayLike = 0.0,
    shares: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """FedProx (Li et al. 2020): each client descends ``F_k(w) + prox / 2 |w - server|^2``."""
    c = np.broadcast_to(curvatures, (clients,))[:, None, None]
    m = np.broadcast_to(minima, (clients, h.size))[:, None, :]
    server = start
    x = np.stack([start] * clients)
    b = np.zeros_like(x)
    path = [x]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size), 1):
        g = _gradient(c * (x - m), h, v, size, rng) + prox * (x - server)
        b, direction = _step(inner, momentum, b, g)
        x = x - eta * direction
        if t % local_steps == 0:
            server = np.average(x, axis=0, weights=shares)
            x = np.stack([server] * clients)
        path.append(x)
    w = np.stack(path)
    return np.average(w, axis=1, weights=shares), w


def scaffold(
    h: Array,
    v: Array,
    start: Array,
    lr: float,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    clients: int,
    local_steps: int,
    outer_lr: float = 1.0,
    curvatures: ArrayLike = 1.0,
    minima: ArrayLike = 0.0,
    shares: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """SCAFFOLD (Karimireddy et al. 2020), algorithm 1, option II, all clients in every round."""
    curved = np.broadcast_to(curvatures, (clients,))[:, None, None]
    m = np.broadcast_to(minima, (clients, h.size))[:, None, :]
    x = start
    y = np.stack([start] * clients)
    c_i = np.zeros_like(y)
    c = np.zeros_like(start)
    path = [y]
    for t, (eta, size) in enumerate(_plan(steps, lr, batch_size), 1):
        y = y - eta * (_gradient(curved * (y - m), h, v, size, rng) - c_i + c)
        if t % local_steps == 0:
            c_new = c_i - c + (x - y) / (local_steps * eta)
            x = x + outer_lr * np.average(y - x, axis=0, weights=shares)
            c = c + np.average(c_new - c_i, axis=0, weights=shares)
            c_i = c_new
            y = np.stack([x] * clients)
        path.append(y)
    w = np.stack(path)
    return np.average(w, axis=1, weights=shares), w


def weight_decay(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    decay: float,
    anchor: Array | Literal["start"],
    decoupled: bool = False,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """L2 pull to `anchor` (d,), in the gradient or (AdamW) beside it."""
    x, b = start, np.zeros_like(start)
    to = start if isinstance(anchor, str) else anchor
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        g = _gradient(x, h, v, size, rng)
        if decoupled:
            shrunk = (1 - eta * decay) * x + eta * decay * to
            b, direction = _step(inner, momentum, b, g)
            x = shrunk - eta * direction
        else:
            b, direction = _step(inner, momentum, b, g + decay * (x - to))
            x = x - eta * direction
        path.append(x)
    return np.stack(path)


def rounded(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    pitch: float,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> Array:
    """Low precision as added noise: variance ``pitch^2 / 6`` on the weights after every step."""
    x, b = start, np.zeros_like(start)
    path = [x]
    for eta, size in _plan(steps, lr, batch_size):
        b, direction = _step(inner, momentum, b, _gradient(x, h, v, size, rng))
        x = x - eta * direction + np.sqrt(pitch**2 / 6) * _normal(rng, x.shape)
        path.append(x)
    return np.stack(path)


def late_phase(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    members: int,
    member_lr: ArrayLike,
    gamma: float,
    spread: float = 0.0,
    minibatch: Minibatch | float = "own",
    replicated: ArrayLike = 1.0,
    decay: float = 0.0,
    inner: Inner = "sgd",
    momentum: float = 0.0,
) -> tuple[Array, Array]:
    """Additive late-phase weights ``w_k = theta + phi_k`` (von Oswald et al. 2021).

    ``phi_k <- phi_k - member_lr g_k; theta <- theta - lr gamma sum_k g_k``, all g_k taken
    before anything moves; theta and every phi_k have their own momentum buffers. Each phi_k
    starts at ``sqrt(spread) N(0, 1)``. A number for `minibatch` is the correlation of the members'
    gradient noise; phi exists only where `replicated` (d,) is 1; `decay` pulls every w_k to the
    mean model's start.
    """
    theta = start
    phi = np.sqrt(spread) * _normal(rng, (members, *start.shape)) * np.asarray(replicated)
    anchor = (theta + phi).mean(axis=0)
    b_theta, b_phi = np.zeros_like(theta), np.zeros_like(phi)
    noise = start.shape if minibatch == "shared" else phi.shape
    path = [theta + phi]
    for eta, eta_phi, size in _plan(steps, lr, member_lr, batch_size):
        if isinstance(minibatch, str):
            g = _gradient(theta + phi, h, v, size, rng, noise)
        else:
            own, common = _normal(rng, phi.shape), _normal(rng, start.shape)
            e = np.sqrt(1 - minibatch) * own + np.sqrt(minibatch) * common
            g = h * (theta + phi) + np.sqrt(v / size) * e
        g = g + decay * (theta + phi - anchor)
        b_phi, step_phi = _step(inner, momentum, b_phi, g)
        b_theta, step_theta = _step(inner, momentum, b_theta, gamma * g.sum(axis=0))
        phi = phi - eta_phi * step_phi * np.asarray(replicated)
        theta = theta - eta * step_theta
        path.append(theta + phi)
    w = np.stack(path)
    return w.mean(axis=1), w


def late_phase_multiplicative(
    h: Array,
    v: Array,
    start: Array,
    lr: ArrayLike,
    batch_size: ArrayLike,
    steps: int,
    rng: Rng,
    *,
    minimum: Array,
    members: int,
    member_lr: ArrayLike,
    gamma: float,
    factor: Real = 1.0,
    spread: float = 0.0,
    scalar: bool = False,
    minibatch: Minibatch = "own",
) -> tuple[Array, Array]:
    """Multiplicative late-phase weights ``w_k = theta phi_k`` (von Oswald et al. 2021).

    ``theta <- theta - lr gamma sum_k phi_k g_k; phi_k <- phi_k - member_lr theta g_k`` with
    ``g_k = h (w_k - minimum) + e_k``; a `scalar` phi_k serves all directions and has gradient
    ``sum_i theta_i g_ki``. Start: ``theta = (minimum + start) / factor`` and
    ``phi_k = factor (1 + sqrt(spread) N(0, 1))``. Returned paths are ``w - minimum``.
    """
    theta = (minimum + start) / factor
    shape = (members, len(start), 1) if scalar else (members, *start.shape)
    phi = factor * (1 + np.sqrt(spread) * _normal(rng, shape))
    noise = start.shape if minibatch == "shared" else (members, *start.shape)
    path = [theta * phi - minimum]
    for eta, eta_phi, size in _plan(steps, lr, member_lr, batch_size):
        g = _gradient(theta * phi - minimum, h, v, size, rng, noise)
        g_theta = gamma * np.sum(phi * g, axis=0)
        g_phi = np.sum(theta * g, axis=-1, keepdims=True) if scalar else theta * g
        theta, phi = theta - eta * g_theta, phi - eta_phi * g_phi
        path.append(theta * phi - minimum)
    x = np.stack(path)
    return x.mean(axis=1), x


# ----------------------------------------------------------- group 2: exact forms per direction


def _relax(gap: Array, noise: Real, s0: Real, n: int) -> Array:
    """Return s_n of ``s' = (1 - gap) s + noise`` without cancellation; gap is ``1 - square``."""
    log_power = xlog1py(n, -np.minimum(gap, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.where(gap == 0, n, -np.expm1(log_power) / gap)  # sum of (1 - gap)^j, j < n
    return np.asarray(np.exp(log_power) * s0 + noise * total)


def sgd_moment(h: Array, v: Array, lr: float, batch_size: float, s0: Real, steps: int) -> Array:
    """SGD from E x^2 = s0: ``s_T = s* + (1 - lr h)^(2T) (s0 - s*)``."""
    return _relax(lr * h * (2 - lr * h), lr**2 * v / batch_size, s0, steps)


def sgd_moment_sequence(h: Array, v: Array, lrs: Array, batch_sizes: Array, s0: Real) -> Array:
    """SGD, one rate and batch per step: ``sum_t lr_t^2 v/B_t prod_(u>t) (1 - lr_u h)^2 + bias``."""
    factors = (1 - np.multiply.outer(np.asarray(lrs), h)) ** 2
    total = np.prod(factors, axis=0) * s0
    for t, (lr, size) in enumerate(_plan(len(factors), lrs, batch_sizes)):
        total = total + lr**2 * v / size * np.prod(factors[t + 1 :], axis=0)
    return np.asarray(total)


def sgd_steady(h: Array, v: Array, lr: float, batch_size: float) -> Array:
    """SGD: ``lr v / (h (2 - lr h))``, v per minibatch."""
    return lr * v / batch_size / (h * (2 - lr * h))


def heavy_ball_steady(h: Array, v: Array, lr: float, batch_size: float, momentum: float) -> Array:
    """Heavy ball: ``lr v (1 + mu) / (h (1 - mu) (2 (1 + mu) - lr h))``."""
    mu = momentum
    return lr * v / batch_size * (1 + mu) / (h * (1 - mu) * (2 * (1 + mu) - lr * h))


def nesterov_steady(
    h: Array, v: Array, lr: float, batch_size: float, momentum: float, *, shifted: bool = True
) -> Array:
    """Nesterov; the stored x of PyTorch is the shifted point ``(1 + mu) y_t - mu y_(t-1)``.

    The unshifted y is the AR(2) process ``y' = r (1 + mu) y_t - r mu y_(t-1) - lr e``.
    """
    mu, r = momentum, 1 - lr * h
    g0 = lr * v / batch_size * (1 + mu * r) / (h * (1 - mu * r) * (1 + r * (1 + 2 * mu)))
    g1 = (1 + mu) * r * g0 / (1 + mu * r)
    return ((1 + mu) ** 2 + mu**2) * g0 - 2 * mu * (1 + mu) * g1 if shifted else g0


def quasi_hyperbolic_steady(
    h: Array, v: Array, lr: float, batch_size: float, beta: float, nu: float
) -> Array:
    """QHM: the ARMA(2, 1) process ``x' = p x + q x_(t-1) - lr (a e_t - b e_(t-1))``.

    Without g, which is ``(1 - beta) grad / (1 - beta L)`` with L the lag: a = 1 - nu beta,
    b = (1 - nu) beta, p = 1 + beta - lr h a, q = -beta + lr h b.
    """
    a, b = 1 - nu * beta, (1 - nu) * beta
    p, q = 1 + beta - lr * h * a, -beta + lr * h * b
    driven = (1 - q) * (a**2 + b**2) - 2 * p * a * b
    return lr**2 * v / batch_size * driven / ((1 + q) * ((1 - q) ** 2 - p**2))


def ema_steady(h: Array, v: Array, lr: float, batch_size: float, beta: float) -> Array:
    """EMA of SGD: ``s* (1 - beta) (1 + beta r) / ((1 + beta) (1 - beta r))``."""
    r = 1 - lr * h
    shrink = (1 - beta) * (1 + beta * r) / ((1 + beta) * (1 - beta * r))
    return sgd_steady(h, v, lr, batch_size) * shrink


def uniform_average(rho: Real, noise: Real, s0: Real, n: int) -> Array:
    """Mean of y_1..y_n, ``y' = rho y + e``, Var e = noise, E y_0^2 = s0.

    ``(noise sum_(m<=n) c_m^2 + (rho c_n)^2 s0) / n^2`` with ``c_m = 1 + rho + ... + rho^(m-1)``:
    no term cancels as rho -> 1, unlike in the textbook form (O(n) memory per direction).
    """
    c = np.cumsum(np.power.outer(np.asarray(rho, dtype=float), np.arange(n)), axis=-1)
    return np.asarray((noise * np.sum(c**2, axis=-1) + (rho * c[..., -1]) ** 2 * s0) / n**2)


def snapshot_average(
    h: Array,
    v: Array,
    lr: float,
    batch_size: float,
    s0: Real,
    every: int,
    snapshots: int,
    window: int | None = None,
) -> Array:
    """SWA of SGD at its n-th snapshot, or LAWA with a `window`: `uniform_average` in P steps.

    ``rho = (1 - lr h)^P``, noise that of P steps from 0, start moment that of the step P before
    the oldest snapshot averaged.
    """
    n = min(snapshots, window or snapshots)
    before = sgd_moment(h, v, lr, batch_size, s0, (snapshots - n) * every)
    noise = sgd_moment(h, v, lr, batch_size, 0.0, every)
    return uniform_average((1 - lr * h) ** every, noise, before, n)


def average_limit(h: Array, v: Array, batch_size: float, n: float) -> Array:
    """Long uniform average (Polyak & Juditsky 1992): ``v / (h^2 n)``, free of the rate."""
    return v / batch_size / (h**2 * n)


def _lookahead_gap(h: Array, lr: float, k: int, alpha: float) -> Array:
    """Return ``alpha (1 - r^k)`` as ``alpha lr h (1 + r + ... + r^(k-1))``."""
    return np.asarray(alpha * lr * h * np.sum(np.power.outer(1 - lr * h, np.arange(k)), axis=-1))


def lookahead_moment(
    h: Array, v: Array, lr: float, batch_size: float, k: int, alpha: float, s0: Real, syncs: int
) -> Array:
    """Slow weights after n syncs: ``s' = f^2 s + alpha^2 q_k``, ``f = 1 - alpha (1 - r^k)``."""
    gap = _lookahead_gap(h, lr, k, alpha)
    q = sgd_moment(h, v, lr, batch_size, 0.0, k)
    return _relax(gap * (2 - gap), alpha**2 * q, s0, syncs)


def lookahead_steady(
    h: Array, v: Array, lr: float, batch_size: float, k: int, alpha: float
) -> Array:
    """Slow weights: ``alpha^2 q_k / (1 - f^2)``, ``q_k = lr^2 v (1 - r^2k) / (1 - r^2)``."""
    r = 1 - lr * h
    f = 1 - alpha * (1 - r**k)
    q = lr**2 * v / batch_size * (1 - r ** (2 * k)) / (1 - r**2)
    return alpha**2 * q / (1 - f**2)


def ensemble_moment(
    h: Array,
    v: Array,
    lr: float,
    batch_size: float,
    members: int,
    mean: Real,
    var: Real,
    steps: int,
    starts: Literal["common", "own"] = "common",
) -> Array:
    """Mean of K SGD runs: ``r^2T (mean^2 + var [/K if own]) + (1 - r^2T) s* / K``."""
    s0 = np.square(mean) + var / (members if starts == "own" else 1)
    return sgd_moment(h, v / members, lr, batch_size, s0, steps)


def late_phase_rate(lr: float, member_lr: float, gamma: float, members: int) -> float:
    """Rate of the mean model: ``lambda = member_lr + gamma K lr``."""
    return member_lr + gamma * members * lr


def late_phase_noise(v: Array, members: int, minibatch: Minibatch = "own") -> tuple[Array, Array]:
    """Noise driving mean and deviation: ``v (q + (1-q)/K)`` and ``v (1-q)(1 - 1/K)``."""
    q = 1.0 if minibatch == "shared" else 0.0
    return v * (q + (1 - q) / members), v * (1 - q) * (1 - 1 / members)


def late_phase_moment(
    h: Array,
    v: Array,
    lr: float,
    batch_size: float,
    members: int,
    member_lr: float,
    gamma: float,
    s0: Real,
    steps: int,
    spread: float = 0.0,
    minibatch: Minibatch = "own",
) -> tuple[Array, Array]:
    """E w_bar^2 and E (w_k - w_bar)^2 after T steps: SGD at rates lambda and member_lr."""
    rate = late_phase_rate(lr, member_lr, gamma, members)
    v_mean, v_dev = late_phase_noise(v, members, minibatch)
    mean = sgd_moment(h, v_mean, rate, batch_size, s0 + spread / members, steps)
    return mean, sgd_moment(h, v_dev, member_lr, batch_size, spread * (1 - 1 / members), steps)


def late_phase_steady(
    h: Array,
    v: Array,
    lr: float,
    batch_size: float,
    members: int,
    member_lr: float,
    gamma: float,
    minibatch: Minibatch = "own",
) -> tuple[Array, Array]:
    """Steady E w_bar^2 = ``lambda v_mean/(h (2 - lambda h))``; deviation with member_lr, v_dev."""
    rate = late_phase_rate(lr, member_lr, gamma, members)
    v_mean, v_dev = late_phase_noise(v, members, minibatch)
    return sgd_steady(h, v_mean, rate, batch_size), sgd_steady(h, v_dev, member_lr, batch_size)


def sgd_limit(h: Array) -> Array:
    """Largest rate of SGD and of averages of its iterates: ``2 / h``."""
    return 2 / h


def heavy_ball_limit(h: Array, momentum: float) -> Array:
    """Largest rate of heavy ball: ``2 (1 + mu) / h``."""
    return 2 * (1 + momentum) / h


def nesterov_limit(h: Array, momentum: float) -> Array:
    """Largest rate of Nesterov: ``2 (1 + mu) / ((1 + 2 mu) h)``."""
    return 2 * (1 + momentum) / ((1 + 2 * momentum) * h)


def lookahead_stable(h: Array, lr: float, k: int, alpha: float) -> NDArray[np.bool_]:
    """Whether ``0 < alpha (1 - r^k) < 2``; for odd k some ``lr h > 2`` pass."""
    gap = _lookahead_gap(h, lr, k, alpha)
    return (gap > 0) & (gap < 2)


def late_phase_stable(
    h: Array, lr: float, members: int, member_lr: float, gamma: float
) -> NDArray[np.bool_]:
    """Whether ``lambda h < 2`` (mean model) and ``member_lr h < 2`` (deviations)."""
    rate = late_phase_rate(lr, member_lr, gamma, members)
    return (rate * h > 0) & (rate * h < 2) & (member_lr * h > 0) & (member_lr * h < 2)


def loss_variance(h: Array, mean: Real, var: Real, counts: Real = 1) -> float:
    """Var of ``1/2 sum h x^2``, Gaussian x: ``sum m h^2 (var^2/2 + mean^2 var)``."""
    spread = np.square(var) / 2 + np.square(mean) * var
    return float(np.sum(counts * h**2 * spread))


def multiplicative_rates(
    minimum: Array, factor: Real, lr: float, member_lr: float, gamma: float
) -> tuple[Array, Array]:
    """First order about ``theta phi = w*``: ``a = member_lr theta^2, b = gamma lr phi^2``.

    Elementwise phi then acts as the additive model with member rate a and lambda = a + K b.
    """
    phi = np.asarray(factor, dtype=float)
    return member_lr * (minimum / phi) ** 2, gamma * lr * phi**2 * np.ones_like(minimum)


def balance_factor(
    h: Array, minimum: Array, lr: float, members: int, member_lr: float, gamma: float
) -> Array:
    """Size of phi at which noise stops sliding (theta, phi) along ``theta phi = w*``.

    Solves ``b K^2 E g_bar^2 = a K E g_k^2``, ``E g_bar^2 = (v/K) 2/(2 - lambda h)``,
    ``E g_k^2 = E g_bar^2 + v (1 - 1/K) 2/(2 - a h)``, in ``u = log(theta^2/phi^2)``; with both
    denominators cleared, v drops out: ``(K b - a)(2 - a h) = a (K - 1)(2 - lambda h)``. The
    bracket is where lambda h < 2; nan where no such point exists.
    """

    def rates(u: float, w: float) -> tuple[float, float]:
        return member_lr * abs(w) * np.exp(u / 2), gamma * lr * abs(w) * np.exp(-u / 2)

    def drift(u: float, hi: float, w: float) -> float:
        a, b = rates(u, w)
        return (members * b - a) * (2 - a * hi) - a * (members - 1) * (2 - (a + members * b) * hi)

    phi = np.full(np.shape(minimum), np.nan)
    for i, (hi, w) in enumerate(zip(h, minimum, strict=True)):
        a, b = rates(0.0, w)
        if a * members * b * hi**2 < 1:
            root = np.sqrt(1 - a * members * b * hi**2)  # lambda h = 2 at exp(u/2) = z
            low, high = members * b * hi / (1 + root), (1 + root) / (a * hi)
            u = brentq(drift, 2 * np.log(low), 2 * np.log(high), (hi, w), xtol=1e-13)
            phi[i] = np.sqrt(abs(w)) * np.exp(-u / 4)
    return phi


def multiplicative_floor(
    h: Array,
    v: Array,
    minimum: Array,
    lr: float,
    batch_size: float,
    members: int,
    member_lr: float,
    gamma: float,
) -> Array:
    """Long-run E (w_bar - w*)^2: ``lambda v/K / (h (2 - lambda h))`` at the balance point."""
    phi = balance_factor(h, minimum, lr, members, member_lr, gamma)
    a, b = multiplicative_rates(minimum, phi, lr, member_lr, gamma)
    rate = a + members * b
    return rate * v / batch_size / members / (h * (2 - rate * h))
