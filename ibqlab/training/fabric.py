"""Lightning Fabric, imported without torchmetrics.

lightning_fabric learns torchmetrics' version by importing it, and with it torchvision, SciPy and matplotlib: seconds of
every training, for something that no training uses. While Fabric is imported here, that version is read from the
installed package's metadata instead.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any

from lightning_utilities.core import imports
from packaging.version import Version

compare_version = imports.compare_version


def compare_without_import(package: str, op: Callable[..., bool], version: str, *rest: Any, **options: Any) -> bool:
    """What Lightning's `compare_version` says, for torchmetrics without importing it."""
    if package != "torchmetrics":
        return compare_version(package, op, version, *rest, **options)
    try:
        return op(Version(installed_version(package)), Version(version))
    except PackageNotFoundError:
        return False


@contextmanager
def torchmetrics_left_alone() -> Iterator[None]:
    """Lightning asks for torchmetrics' version without importing it."""
    imports.compare_version = compare_without_import
    try:
        yield
    finally:
        imports.compare_version = compare_version


with torchmetrics_left_alone(), warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

__all__ = ["DDPStrategy", "Fabric", "LightningEnvironment"]
