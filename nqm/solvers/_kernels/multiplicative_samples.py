"""Monte Carlo of multiplicative late-phase weights."""

from __future__ import annotations

import math

import numpy as np

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.normals import correlate, fill_normals
from nqm.solvers._kernels.twins import evaluate_twin, factors_field, move_twin


@jit
def sample_multiplicative(
    generator,
    curvature,
    minimum,
    noise_sd,
    base_lr,
    member_lr,
    scalar,
    theta,
    phi,
    record,
    weight,
    loss,
    member_loss,
    field,
    delta,
    buffer,
    expected,
    twin_loss,
    root,
):
    """Simulate T steps of multiplicative late-phase weights for R replicas.

    Parameters
    ----------
    generator : ndarray of uint64, shape (4,)
        SFC64 state, advanced in place.
    curvature, minimum : ndarray, shape (d,)
        Hessian eigenvalues h and minimum w*.
    noise_sd : ndarray, shape (T, d)
        Standard deviation of the gradient noise of one minibatch.
    base_lr, member_lr : ndarray, shape (T,)
        gamma times the rate of the base weights, and the rate of the factors.
    scalar : bool
        Whether one factor per member multiplies all directions.
    theta, phi : ndarray, shape (R, d) and (R, K, d), or (R, K, 1) if `scalar`
        Base weights and members' factors, changed in place.
    record : ndarray of int, shape (T,)
        Record after each step, or -1.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss, member_loss : ndarray, shape (records, R)
        Outputs.
    field, delta, buffer : ndarray, shape (FIELDS, d), (R, d) and (R, d)
        State of the twins, changed in place; no twins if `delta` is empty.
    expected, twin_loss : ndarray, shape (records,) and (records, R)
        Outputs of the twins.
    root : ndarray, shape (d, r)
        Root of the noise's correlation matrix; r = 0 for independent directions.
    """
    replicas, d = theta.shape
    count = phi.shape[1]
    gradient = np.empty((count, d))
    normal = np.empty(count * d)
    controlled, common = delta.size > 0, np.empty(d)
    for t in range(record.size):
        if controlled:
            factors_field(field, curvature, minimum, noise_sd[t], base_lr[t], member_lr[t], count)
        for r in range(replicas):
            fill_normals(generator, normal)
            for k in range(count):
                correlate(root, normal[k * d : (k + 1) * d], 1)
            if controlled:
                common[:] = 0.0
                for k in range(count):
                    for i in range(d):
                        common[i] += normal[k * d + i] / math.sqrt(count)
                move_twin(field, 0.0, common, delta[r], buffer[r])
            for k in range(count):
                for i in range(d):
                    f = phi[r, k, 0 if scalar else i]
                    gradient[k, i] = (
                        curvature[i] * (theta[r, i] * f - minimum[i])
                        + noise_sd[t, i] * normal[k * d + i]
                    )
            for i in range(d):
                pull = 0.0
                old = theta[r, i]
                for k in range(count):
                    f = phi[r, k, 0 if scalar else i]
                    pull += f * gradient[k, i]
                    if scalar:
                        gradient[k, i] *= old
                    else:
                        phi[r, k, i] = f - member_lr[t] * old * gradient[k, i]
                theta[r, i] = old - base_lr[t] * pull
            if scalar:
                for k in range(count):
                    total = 0.0
                    for i in range(d):
                        total += gradient[k, i]
                    phi[r, k, 0] -= member_lr[t] * total
        if record[t] >= 0:
            evaluate_multiplicative(
                theta, phi, minimum, scalar, weight, loss[record[t]], member_loss[record[t]]
            )
            if controlled:
                expected[record[t]] = evaluate_twin(field, weight, delta, twin_loss[record[t]])


@jit
def evaluate_multiplicative(theta, phi, minimum, scalar, weight, loss, member_loss):
    """Compute the loss of the mean model theta * mean phi and the mean loss of the members.

    Parameters
    ----------
    theta, phi : ndarray, shape (R, d) and (R, K, d), or (R, K, 1) if `scalar`
        Base weights and members' factors.
    minimum : ndarray, shape (d,)
        Minimum w*.
    scalar : bool
        Whether one factor per member multiplies all directions.
    weight : ndarray, shape (d,)
        Loss per unit of second moment.
    loss, member_loss : ndarray, shape (R,)
        Outputs.
    """
    replicas, d = theta.shape
    count = phi.shape[1]
    for r in range(replicas):
        total, member_total = 0.0, 0.0
        for i in range(d):
            mean = 0.0
            for k in range(count):
                x = theta[r, i] * phi[r, k, 0 if scalar else i] - minimum[i]
                member_total += weight[i] * (x * x)
                mean += x
            mean /= count
            total += weight[i] * (mean * mean)
        loss[r] = total
        member_loss[r] = member_total / count
