from .experiment import compare_modules as compare_modules
from .networks import ModuleNet as ModuleNet
from .networks import train_module as train_module
from .scores import Evidence as Evidence
from .scores import Sample as Sample
from .scores import Scored as Scored
