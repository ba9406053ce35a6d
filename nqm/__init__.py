"""Noisy quadratic theory of SGD, weight averaging and late-phase weights.

The public names are listed in `__init__.pyi` and load on first use, so that ``nqm --help`` stays
quick.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
