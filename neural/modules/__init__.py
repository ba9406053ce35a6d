"""Zero-shot composition of modules: small modules on one frozen trunk, combined for new data.

Every domain has a module of its own; scores that look at unlabelled text say how modules are
weighed for a domain that none of them has seen (Holtermann et al. 2024). They load on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
