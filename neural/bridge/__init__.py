"""The bridge: measure a network, predict trainings from it, and compare with real ones.

A user needs `measure`, `predict` and `compare` only; they are imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
