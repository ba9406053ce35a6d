"""Evaluation of trained models: accuracy, calibration, OOD detection, robustness, flatness.

`metrics`, `agreement`, `ood`, `intervals` and `corruption` are pure functions of tensors.
`predict`, `flatness` and `line` run a model over batches and restore it afterwards.
"""

from neural.evaluate.agreement import McNemar, kappa, kappa_matrix, macro_f1, mcnemar
from neural.evaluate.corruption import (
    CIFAR10C,
    CORRUPTIONS,
    Corruption,
    corrupt,
    load_cifar10_c,
)
from neural.evaluate.flatness import LossRise, loss_rise
from neural.evaluate.intervals import Interval, mean_interval, paired_bootstrap, paired_difference
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
    "McNemar",
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
    "kappa",
    "kappa_matrix",
    "load_cifar10_c",
    "loss_line",
    "loss_rise",
    "macro_f1",
    "mc_dropout",
    "mcnemar",
    "mean_interval",
    "nll",
    "ood_metrics",
    "paired_bootstrap",
    "paired_difference",
    "predict",
    "predict_members",
    "score",
    "score_text",
]
