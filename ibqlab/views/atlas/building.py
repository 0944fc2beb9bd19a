"""The folder of an atlas: refused where it holds something else, and there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import explained, force_to_disk, sweep, temporary_beside
from ibqlab.views.atlas.table import TABLE
from ibqlab.views.subject import ViewError

PAGE = ("index.html", "atlas.css", "atlas.js", "table.js", "map.js")
"""Files that are the same in every atlas."""
FOLDERS = ("data", "cards", "images", "decoded")
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in every folder."""


def require_free(folder: Path) -> None:
    """Refuse a folder that holds anything but an atlas, which alone is replaced.

    Raises:
        ViewError: the message names what lies there and what to type.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ViewError(f"{for_terminal(folder)} is a file; an atlas is a folder: give another, --output FOLDER")
    names = {entry.name for entry in folder.iterdir()} - _OF_THE_SYSTEM
    if not names:
        return
    is_atlas = "index.html" in names and (folder / "data" / "facts.js").is_file()
    others = sorted(names - {*PAGE, *FOLDERS, TABLE}) if is_atlas else sorted(names)
    if others:
        named = ", ".join(for_terminal(name, 60) for name in others[:3]) + (", …" if others[3:] else "")
        raise ViewError(
            f"{for_terminal(folder)} holds something that is no atlas ({named}), and an atlas replaces its folder: "
            "move that elsewhere, or give another folder: --output FOLDER"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block ends well and is gone otherwise.

    Raises:
        RunError: the disk is full, or nothing may be written there.
    """
    folder = Path(os.path.realpath(folder))
    part = temporary_beside(folder)
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        try:
            for name in FOLDERS:
                (part / name).mkdir(parents=True)
            yield part
            _replace(folder, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        force_to_disk(folder.parent)


def _replace(folder: Path, part: Path) -> None:
    """Give the new folder its name; the earlier one stays where that fails."""
    if not folder.exists():
        os.replace(part, folder)
        return
    earlier = temporary_beside(folder)
    os.replace(folder, earlier)
    try:
        os.replace(part, folder)
    except OSError:
        os.replace(earlier, folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
