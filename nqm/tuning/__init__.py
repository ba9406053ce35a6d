"""Optimal hyperparameters on a noisy quadratic problem, and how flat each optimum is.

Schedules by exact gradients (`schedule`, `schedule_to_target`), batch sizes at equal data
(`batch_sizes`), both with momentum and an average (`joint`), start and size of late-phase weights
at equal data (`late_phase`), the best constant rate and momentum (`constant_lr`), the best average
of a run's iterates (`average`), and what no method could reach (`information`).
"""

from nqm.tuning.average import BestAverage, best_average
from nqm.tuning.batch_sizes import BestBatches, best_batches
from nqm.tuning.information import information_bound, program_bound
from nqm.tuning.joint import BestLinear, best_linear, linear_loss
from nqm.tuning.late_phase import BestLatePhase, best_late_phase
from nqm.tuning.piecewise_loss import equal_pieces, piecewise_loss
from nqm.tuning.schedule import BestSchedule, best_piecewise
from nqm.tuning.schedule_to_target import fewest_steps_piecewise
from nqm.tuning.sensitivity import Flatness, flatness

__all__ = [
    "BestAverage",
    "BestBatches",
    "BestLatePhase",
    "BestLinear",
    "BestSchedule",
    "Flatness",
    "best_average",
    "best_batches",
    "best_late_phase",
    "best_linear",
    "best_piecewise",
    "equal_pieces",
    "fewest_steps_piecewise",
    "flatness",
    "information_bound",
    "linear_loss",
    "piecewise_loss",
    "program_bound",
]
