"""Where recipes, tables and notebooks lie: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

BUILT_IN = ("photos", "digits")
"""Images that installed packages bring; settings may name them in place of a path."""
PACKAGE = Path(__file__).resolve().parents[1]


def resource_folder(name: str) -> Path:
    """A folder of files that come with the package.

    Args:
        name: "experiments" or "notebooks", as the folder is called in a checkout.
    Returns:
        The wheel's copy, which pyproject.toml puts into the package; in a checkout, which has none, the folder itself.
    """
    installed = PACKAGE / "resources" / name
    return installed if installed.is_dir() else PACKAGE.parent / name
