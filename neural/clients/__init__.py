"""Federated learning in one process, for study: clients train apart, a server averages them.

`federated_rounds` and `dirichlet_shards` are for a loop of one's own, `make_clients`, `start_model`
and `train_client` for clients of another library, such as Flower; `run_clients` is what the command
``nqm neural clients`` does. They load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
