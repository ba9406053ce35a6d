from .averaging import ema as ema
from .averaging import recompute_statistics as recompute_statistics
from .averaging import swa as swa
from .late_phase import LatePhase as LatePhase
from .reparametrize import add_lora as add_lora
from .reparametrize import add_rank1 as add_rank1
from .reparametrize import fold as fold
