from .api import Measured as Measured
from .api import compare as compare
from .api import measure as measure
from .api import predict as predict
from .comparison import Outcome as Outcome
from .config import BridgeConfig as BridgeConfig
from .config import Plan as Plan
from .config import Training as Training
