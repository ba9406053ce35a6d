"""Combine trained models: produce, align, weigh, merge or pool, repair, compare.

`Members`, `merge`, `ensemble` and `compare` are the whole of it for a user; they load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
