from .experiment import make_clients as make_clients
from .experiment import run_clients as run_clients
from .experiment import start_model as start_model
from .rounds import Client as Client
from .rounds import federated_rounds as federated_rounds
from .rounds import train_client as train_client
from .shards import dirichlet_shards as dirichlet_shards
