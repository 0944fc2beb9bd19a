"""Lightning Fabric, imported without torchmetrics.

lightning_fabric learns torchmetrics' version by importing it, and with it torchvision, SciPy and matplotlib: seconds of
every training, for something that no training uses. While Fabric is imported here, that version is read from the
installed package's metadata instead.
"""

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from types import ModuleType
from typing import Any


def import_fabric() -> ModuleType:
    """The package lightning_fabric."""
    from lightning_utilities.core import imports  # noqa: PLC0415 - needed only to train, as all below
    from packaging.version import Version  # noqa: PLC0415

    compare_version = imports.compare_version

    def compare(package: str, op: Callable[..., bool], version: str, *rest: Any, **options: Any) -> bool:
        if package != "torchmetrics":
            return compare_version(package, op, version, *rest, **options)
        try:
            return op(Version(installed_version(package)), Version(version))
        except PackageNotFoundError:
            return False

    imports.compare_version = compare
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import lightning_fabric  # noqa: PLC0415
    finally:
        imports.compare_version = compare_version
    return lightning_fabric
