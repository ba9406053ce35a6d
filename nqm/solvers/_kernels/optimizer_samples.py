"""Monte Carlo of optimizers that are not linear, stochastic rounding, heavy-tailed noise."""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.normals import correlate, fill_normals, student, unit
from nqm.solvers._kernels.twins import (
    ADAM,
    CLIPPED,
    SIGN,
    evaluate_twin,
    move_twin,
    optimizer_field,
)


@jit
def sample_optimizer(
    generator,
    rule,
    momentum,
    setting,
    epsilon,
    dof,
    pitch,
    age,
    curvature,
    minimum,
    noise_sd,
    lr,
    multiplicity,
    x,
    first,
    second,
    record,
    loss,
    field,
    delta,
    buffer,
    expected,
    twin_loss,
    peak,
    root,
):
    """Simulate T steps of clipped SGD, sign SGD or Adam for R replicas.

    Parameters
    ----------
    generator : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    rule : {CLIPPED, SIGN, ADAM}
        Update rule.
    momentum, setting, epsilon : float
        Momentum (Adam: beta1); clipping threshold or Adam's beta2; Adam's epsilon.
    dof : float
        Degrees of freedom of Student's t noise; inf for normal noise.
    pitch : float
        Spacing of the grid to which weights are rounded stochastically; 0 for no rounding.
    age : int
        Steps taken before.
    curvature, minimum : ndarray, shape (d,)
        Hessian eigenvalues h and minimum w*.
    noise_sd : ndarray, shape (T, d)
        Standard deviation of the gradient noise of one minibatch.
    lr : ndarray, shape (T,)
        Learning rate of each step.
    multiplicity : ndarray, shape (d,)
        Number of directions that each one stands for.
    x, first, second : ndarray, shape (R, d)
        Distance from the minimum, and the two buffers of the rule, changed in place.
    record : ndarray of int, shape (T,)
        Record after each step, or -1.
    loss : ndarray, shape (records, R)
        Output.
    field, delta, buffer : ndarray, shape (FIELDS, d), (R, d) and (R, d)
        State of the twins, changed in place; no twins if `delta` is empty.
    expected, twin_loss : ndarray, shape (records,) and (records, R)
        Outputs of the twins.
    peak : float
        Twice the density at 0 of the noise, of variance 1.
    root : ndarray, shape (d, r)
        Root of the correlation matrix of normal noise; r = 0 for independent directions.
    """
    replicas, d = x.shape
    gradient = np.empty(d)
    controlled, signs = delta.size > 0, rule == SIGN and momentum == 0.0
    weight, driving = 0.5 * multiplicity * curvature, np.empty(d)
    for t in range(record.size):
        done = age + t + 1
        if controlled:
            optimizer_field(
                field,
                rule,
                momentum,
                setting,
                epsilon,
                peak,
                done,
                curvature,
                noise_sd[t],
                lr[t],
                multiplicity,
            )
        for r in range(replicas):
            if math.isinf(dof):
                fill_normals(generator, gradient)
                correlate(root, gradient, 1)
            else:
                for i in range(d):
                    gradient[i] = student(generator, dof)
            if controlled:
                for i in range(d):
                    driving[i] = math.copysign(1.0, gradient[i]) if signs else gradient[i]
                move_twin(field, momentum, driving, delta[r], buffer[r])
            square = 0.0
            for i in range(d):
                gradient[i] = curvature[i] * x[r, i] + noise_sd[t, i] * gradient[i]
                square += multiplicity[i] * gradient[i] * gradient[i]
            norm = math.sqrt(square)
            clip = setting / norm if rule == CLIPPED and norm > setting else 1.0
            for i in range(d):
                g = clip * gradient[i]
                if rule == ADAM:
                    first[r, i] = momentum * first[r, i] + (1.0 - momentum) * g
                    second[r, i] = setting * second[r, i] + (1.0 - setting) * g * g
                    mean = first[r, i] / (1.0 - momentum**done)
                    scale = math.sqrt(second[r, i] / (1.0 - setting**done)) + epsilon
                    step = mean / scale
                else:
                    step = momentum * first[r, i] + g
                    first[r, i] = step
                    if rule == SIGN:
                        step = 1.0 if step > 0.0 else (-1.0 if step < 0.0 else step)
                x[r, i] -= lr[t] * step
                if pitch > 0.0:
                    cell = (x[r, i] + minimum[i]) / pitch
                    low = math.floor(cell) if math.isfinite(cell) else cell
                    up = 1.0 if unit(generator) < cell - low else 0.0
                    x[r, i] = (low + up) * pitch - minimum[i]
            if record[t] >= 0:
                total = 0.0
                for i in range(d):
                    total += 0.5 * multiplicity[i] * curvature[i] * (x[r, i] * x[r, i])
                loss[record[t], r] = total
        if controlled and record[t] >= 0:
            expected[record[t]] = evaluate_twin(field, weight, delta, twin_loss[record[t]])
