"""What is best on a noisy quadratic, and how flat the optimum is.

Rates by exact gradients (`rates`, `fewest`), batch sizes at equal data (`batches`), start and size
of late-phase weights at equal data (`late`). `nqm.targets` has the best constant rate and momentum.
"""

from nqm.optimize.batches import BestBatches, best_batches
from nqm.optimize.fewest import fewest_steps_piecewise
from nqm.optimize.flatness import Flatness, flatness
from nqm.optimize.late import BestLatePhase, best_late_phase
from nqm.optimize.pieces import equal_pieces, piecewise_loss
from nqm.optimize.rates import BestSchedule, best_piecewise

__all__ = [
    "BestBatches",
    "BestLatePhase",
    "BestSchedule",
    "Flatness",
    "best_batches",
    "best_late_phase",
    "best_piecewise",
    "equal_pieces",
    "fewest_steps_piecewise",
    "flatness",
    "piecewise_loss",
]
