"""Methods of the literature beside VQ, Soft VQ, IBQ and LFQ, each in a module of its own and no longer than its idea.

A module registers its presets where it is imported, and all modules here are: a new method is a new file. Read `base`
first, then any of them.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
