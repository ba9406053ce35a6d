"""Linear twins of methods that are not linear: see `nqm.solvers.control_variates`.

`field` (FIELDS, d) holds deterministic numbers of each direction: the mean of the weights, the
variance of the twin's deviation from it, its covariance with the buffer and the buffer's
variance, the buffer's mean, three numbers specific to the method, and the twin's coefficients.
"""

from __future__ import annotations

import math

from nqm.solvers._kernels.compiling import jit

#: Rules of `sample_optimizer`, in the order of the classes of `nqm.algorithms.sampled`.
CLIPPED, SIGN, ADAM = 0, 1, 2
_MEAN, _VARIANCE, _CROSS, _BUFFER, _BUFFER_MEAN, _OWN, _SECOND, _APART = range(8)
_PULL, _PUSH, _STEP = 8, 9, 10
#: Rows of `field`.
FIELDS = 11


@jit
def move_twin(field, momentum, noise, delta, buffer):
    """Twin of one replica: b' = momentum b + pull delta + push noise, delta' = delta - step b'."""
    for i in range(delta.size):
        b = momentum * buffer[i] + field[_PULL, i] * delta[i] + field[_PUSH, i] * noise[i]
        buffer[i] = b
        delta[i] -= field[_STEP, i] * b


@jit
def _move_moments(field, i, momentum, step):
    """Second moments of the twin after that step, exact for noise of variance 1."""
    pull, push = field[_PULL, i], field[_PUSH, i]
    cross = momentum * field[_CROSS, i] + pull * field[_VARIANCE, i]
    own = momentum * momentum * field[_BUFFER, i] + push * push
    own += pull * (momentum * field[_CROSS, i] + cross)
    field[_STEP, i] = step
    field[_VARIANCE, i] += step * (step * own - 2.0 * cross)
    field[_CROSS, i] = cross - step * own
    field[_BUFFER, i] = own


@jit
def evaluate_twin(field, weight, delta, loss):
    """Compute the loss of every twin and its expectation.

    Parameters
    ----------
    field : ndarray, shape (FIELDS, d)
        Deterministic state of the twin.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    delta : ndarray, shape (R, d)
        Deviation of each twin from the mean.
    loss : ndarray, shape (R,)
        Output.

    Returns
    -------
    float
        Expected loss of the twin.
    """
    for r in range(delta.shape[0]):
        total = 0.0
        for i in range(weight.size):
            x = field[_MEAN, i] + delta[r, i]
            total += weight[i] * (x * x)
        loss[r] = total
    expected = 0.0
    for i in range(weight.size):
        expected += weight[i] * (field[_MEAN, i] * field[_MEAN, i] + field[_VARIANCE, i])
    return expected


@jit
def factors_field(field, curvature, minimum, noise_sd, base_lr, member_lr, count):
    """Twin of multiplicative late-phase weights, and the drift of E theta^2 and E phi^2.

    Noise moves the pair along theta phi = w: steps without noise conserve theta^2 / base_lr -
    K phi^2 / member_lr, to which noise adds base_lr G^2 - member_lr theta^2 sum g^2.
    """
    for i in range(curvature.size):
        h, mean, noise = curvature[i], field[_MEAN, i], noise_sd[i] * noise_sd[i]
        theta, phi, apart = field[_OWN, i], field[_SECOND, i], field[_APART, i]
        a, b = member_lr * theta, base_lr * phi
        rate = a + count * b
        joint = h * h * (mean * mean + field[_VARIANCE, i]) + noise / count
        alone = joint + h * h * apart + noise * (1.0 - 1.0 / count)
        field[_PULL, i], field[_PUSH, i] = h, noise_sd[i] / math.sqrt(count)
        _move_moments(field, i, 0.0, rate)
        field[_APART, i] = (1.0 - a * h) ** 2 * apart + a * a * noise * (1.0 - 1.0 / count)
        curved = base_lr * count * member_lr
        field[_MEAN, i] = mean - rate * h * mean + curved * (minimum[i] + mean) * joint
        theta += base_lr * base_lr * count * count * phi * joint
        phi += member_lr * a * alone
        w = minimum[i] + field[_MEAN, i]
        excess, slope = theta * phi - w * w, theta * member_lr + phi * base_lr * count
        root = math.sqrt(max(slope * slope - 4.0 * curved * excess, 0.0))
        slide = 2.0 * excess / (slope + root) if slope + root > 0.0 else 0.0
        field[_OWN, i] = theta - base_lr * count * slide
        field[_SECOND, i] = phi - member_lr * slide


@jit
def optimizer_field(
    field, rule, momentum, setting, epsilon, peak, done, curvature, noise_sd, lr, multiplicity
):
    """Twin of one step of `sample_optimizer`, by statistical linearisation; `peak` 2 f(0)."""
    d = curvature.size
    square = 0.0
    for i in range(d):
        h, s = curvature[i], noise_sd[i]
        second = field[_MEAN, i] * field[_MEAN, i] + field[_VARIANCE, i]
        square += multiplicity[i] * (h * h * second + s * s)
    clip = setting / math.sqrt(square) if rule == CLIPPED and square > setting * setting else 1.0
    for i in range(d):
        h, s, mean, variance = curvature[i], noise_sd[i], field[_MEAN, i], field[_VARIANCE, i]
        step = lr
        if rule == ADAM:
            fresh = h * h * (mean * mean + variance) + s * s
            field[_SECOND, i] = setting * field[_SECOND, i] + (1.0 - setting) * fresh
            scale = math.sqrt(field[_SECOND, i] / (1.0 - setting**done)) + epsilon
            step = lr / ((1.0 - momentum**done) * scale)
            field[_PULL, i], field[_PUSH, i] = (1.0 - momentum) * h, (1.0 - momentum) * s
            shift = momentum * field[_BUFFER_MEAN, i] + (1.0 - momentum) * h * mean
            drift = step * shift
        elif rule == SIGN:
            shift = momentum * field[_BUFFER_MEAN, i] + h * mean
            spread = s * s + h * h * variance
            if momentum > 0.0:
                spread += momentum * momentum * field[_BUFFER, i]
                spread += 2.0 * momentum * h * field[_CROSS, i]
            spread = math.sqrt(spread)
            z = shift / spread if spread > 0.0 else (math.inf if shift > 0.0 else -math.inf)
            slope = peak * math.exp(-0.5 * z * z) / spread if spread > 0.0 else 0.0
            drift = lr * math.erf(z / math.sqrt(2.0))
            if momentum > 0.0:
                field[_PULL, i], field[_PUSH, i] = h, s
                step = lr * slope
            else:  # the twin is driven by the sign of the noise
                field[_PULL, i] = slope * h
                agree = math.asin(min(s / spread, 1.0)) if spread > 0.0 else 0.0
                field[_PUSH, i] = 2.0 / math.pi * agree * math.erfc(abs(z) / math.sqrt(2.0))
        else:
            field[_PULL, i], field[_PUSH, i] = clip * h, clip * s
            shift = momentum * field[_BUFFER_MEAN, i] + clip * h * mean
            drift = lr * shift
        field[_BUFFER_MEAN, i] = shift
        field[_MEAN, i] = mean - drift
        _move_moments(field, i, momentum, step)
