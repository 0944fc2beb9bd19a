"""Methods of the literature, a file each: what they share lies in the package above, what is theirs here.

Every module is imported, so a new method is a new file and nothing else.
"""

import importlib
import pkgutil

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
