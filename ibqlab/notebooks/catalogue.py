"""The notebooks that come with the package: found by name, listed, and copied out to be changed."""

from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import expanded, explained, is_ordinary, read_bytes, write_whole
from ibqlab.base.resources import resource_folder
from ibqlab.config import ConfigError, nearest
from ibqlab.notebooks.parameters import heading
from ibqlab.runs import checkout_root

START_PAGE = "index"
"""The notebook that shows all others as cards; it is opened, not run."""
NOTEBOOK_BYTES = 2**30
"""Largest file that is looked at before it is refused or replaced by a notebook."""


def notebook_folder() -> Path:
    """The notebooks of the checkout around the current folder; elsewhere those that come with the package."""
    root = checkout_root()
    return root / "notebooks" if root else resource_folder("notebooks")


def find_notebook(name: str) -> Path:
    """The notebook's file, given as a path or as a name that `describe_notebooks` lists, with or without .ipynb.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    folder = notebook_folder()
    for candidate in (expanded(name), folder / name, folder / f"{name}.ipynb"):
        if is_ordinary(candidate):
            return candidate
    names = sorted(path.stem for path in folder.glob("*.ipynb") if path.stem != START_PAGE)
    text = for_terminal(name, 80)
    raise ConfigError(f"there is no notebook {text!r}, neither as a file nor under notebooks/; {nearest(name, names)}")


def describe_notebooks() -> str:
    """The notebooks, a line each: name and heading."""
    files = sorted(file for file in notebook_folder().glob("*.ipynb") if file.stem != START_PAGE)
    return "\n".join(f"  {file.stem:<20} {heading(file)}" for file in files) or "  none"


def copy_notebooks(folder: str | Path) -> list[Path]:
    """Copy all notebooks into a folder of the user's, where they may be changed.

    Args:
        folder: is made where it is missing. Copies in it that are as they were are left alone.
    Returns:
        The copies, by name.
    Raises:
        ConfigError: it is a file, or holds files of these names with other content; nothing was copied.
        RunError: it cannot be written to.
    """
    folder = expanded(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{for_terminal(folder)} is a file; name a folder for the notebooks")
    copies = {
        folder / source.name: read_bytes(source, NOTEBOOK_BYTES) for source in sorted(notebook_folder().glob("*.ipynb"))
    }
    existing = [copy for copy in copies if copy.exists()]
    changed = [copy.name for copy in existing if read_bytes(copy, NOTEBOOK_BYTES) != copies[copy]]
    if changed:
        raise ConfigError(
            f"{for_terminal(folder)} holds other files of these names: {', '.join(changed)}; nothing was copied. "
            "Name another folder, or move them away"
        )
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for copy, content in copies.items():
        if copy not in existing:
            write_whole(copy, content)
    return list(copies)
