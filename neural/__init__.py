"""Late-phase weights in PyTorch: a library for anyone's training loop, and the experiments on it.

The public names are listed in `__init__.pyi` and load on first use, so that the command line stays
quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
