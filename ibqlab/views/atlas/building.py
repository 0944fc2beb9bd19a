"""The folder of an atlas: refused where it holds something else, and there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import explained, force_to_disk, sweep, temporary_beside
from ibqlab.runs.finding import run_name
from ibqlab.views.atlas.table import TABLE
from ibqlab.views.atlas_facts import atlas_facts, is_atlas
from ibqlab.views.subject import Subject, ViewError

PAGE = ("index.html", "atlas.css", "atlas.js", "table.js", "map.js")
"""Files that are the same in every atlas."""
FOLDERS = ("data", "cards", "images", "decoded")
_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in every folder."""
_HOW = "--output FOLDER, in a notebook output=FOLDER"
"""What to type for another folder."""


def default_name(subject: Subject) -> str:
    """Of an atlas's folder: the run's name, a study's run with its study in front, and _atlas."""
    name = Path(subject.full_name)
    return f"{'-'.join((name if subject.run else name.with_suffix('')).parts)}_atlas"


def require_free(folder: Path, subject: Subject) -> None:
    """Refuse a folder that holds anything but an atlas of the same run or checkpoint, which alone is replaced.

    Args:
        folder: of the new atlas.
        subject: what that is of.
    Raises:
        ViewError: the message names what lies there and what to type.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ViewError(f"{for_terminal(folder)} is a file; an atlas is a folder: give another, {_HOW}")
    names = {entry.name for entry in folder.iterdir()} - _OF_THE_SYSTEM
    if not names:
        return
    others = sorted(names - {*PAGE, *FOLDERS, TABLE}) if is_atlas(folder) else sorted(names)
    if others:
        named = ", ".join(for_terminal(name, 60) for name in others[:3]) + (", …" if others[3:] else "")
        raise ViewError(
            f"{for_terminal(folder)} holds something that is no atlas ({named}), and an atlas replaces its folder: "
            f"move that elsewhere, or give another folder: {_HOW}"
        )
    earlier = atlas_facts(folder)
    # Atlases of earlier versions hold the last part of the name alone, and no mark.
    expected = (subject.full_name, subject.place_mark) if "mark" in earlier else (subject.path.name, None)
    if "name" in earlier and (earlier["name"], earlier.get("mark")) != (for_terminal(expected[0], None), expected[1]):
        shown, asked = for_terminal(earlier["name"], 80), for_terminal(subject.full_name, 80)
        other = "another one of that name" if shown == asked else asked
        raise ViewError(
            f"{for_terminal(run_name(folder))} holds the atlas of {shown}, and this one is of {other}: "
            f"give it another folder: {_HOW}; or delete the earlier one"
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
