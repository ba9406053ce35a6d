from .api import ensemble as ensemble
from .api import merge as merge
from .comparison import compare as compare
from .members import Member as Member
from .members import Members as Members
