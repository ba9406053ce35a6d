from .experiment import run_clients as run_clients
from .rounds import Client as Client
from .rounds import federated_rounds as federated_rounds
from .shards import dirichlet_shards as dirichlet_shards
