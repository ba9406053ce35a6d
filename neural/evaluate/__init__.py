"""Evaluation of trained models: accuracy, calibration, OOD detection, robustness, flatness.

`metrics`, `ood`, `intervals` and `corruption` are pure functions of tensors. `predict`, `flatness`
and `line` run a model over batches and restore it afterwards.
"""

from neural.evaluate.corruption import (
    CIFAR10C,
    CORRUPTIONS,
    Corruption,
    corrupt,
    load_cifar10_c,
)
from neural.evaluate.flatness import LossRise, loss_rise
from neural.evaluate.intervals import Interval, mean_interval, paired_difference
from neural.evaluate.line import Line, interpolate, loss_line
from neural.evaluate.metrics import (
    accuracy,
    bits_per_character,
    brier,
    classification_metrics,
    ece,
    nll,
)
from neural.evaluate.ood import entropy_score, ood_metrics
from neural.evaluate.predict import (
    Score,
    ensemble_log_probs,
    mc_dropout,
    predict,
    predict_members,
    score,
    score_text,
)

__all__ = [
    "CIFAR10C",
    "CORRUPTIONS",
    "Corruption",
    "Interval",
    "Line",
    "LossRise",
    "Score",
    "accuracy",
    "bits_per_character",
    "brier",
    "classification_metrics",
    "corrupt",
    "ece",
    "ensemble_log_probs",
    "entropy_score",
    "interpolate",
    "load_cifar10_c",
    "loss_line",
    "loss_rise",
    "mc_dropout",
    "mean_interval",
    "nll",
    "ood_metrics",
    "paired_difference",
    "predict",
    "predict_members",
    "score",
    "score_text",
]
