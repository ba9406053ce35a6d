from .late_phase.averaging import ema as ema
from .late_phase.averaging import recompute_statistics as recompute_statistics
from .late_phase.averaging import swa as swa
from .late_phase.members import LatePhase as LatePhase
from .late_phase.reparametrize import add_lora as add_lora
from .late_phase.reparametrize import add_rank1 as add_rank1
from .late_phase.reparametrize import fold as fold
