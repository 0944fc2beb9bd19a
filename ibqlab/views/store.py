"""What views of one run have computed once: coordinates, the index of patches, facts.

They lie in the run's folder, in `views/`, so that every view and the next kernel find them; what belongs to a
checkpoint alone lies in the cache. An entry's name ends in a hash of all that it depends on. The content of files of a
run is known by the check sums that NumPy's and PyTorch's archives hold, which are read without the arrays.
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.cache import cache_folder, content_key, hash_file
from ibqlab.base.files import RunError, UnreadableFile, read_npz, replacing, sweep

Arrays = dict[str, np.ndarray]
ENTRY_BYTES = 2**36
"""Largest entry that is read: coordinates of 262,144 codes at 24 steps take 50 MB, 50,000 pictures of 256² 10 GB."""
KEPT = 3
"""Entries of one name that stay, the newest: of other images, or of a run that has gone on since."""


class ViewStore:
    """Entries of one run or checkpoint.

    Args:
        folder: where they lie; it is made when the first is stored.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str, build: Callable[[], Arrays], **depends: Any) -> Arrays:
        """An entry, computed when it is first asked for.

        Args:
            name: of the entry, a plain word.
            build: computes its arrays.
            **depends: everything that the arrays depend on: numbers, texts, lists of them.
        Returns:
            The arrays. Where they cannot be stored a warning says so.
        """
        file = self.folder / f"{name}-{content_key(name=name, **depends)}.npz"
        try:
            return read_npz(file, ENTRY_BYTES)
        except (FileNotFoundError, UnreadableFile):
            arrays = build()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            with replacing(file) as stream:
                np.savez(stream, **arrays)
            self._forget_old(name)
        except (OSError, RunError) as error:
            warnings.warn(f"{file} cannot be written ({error}); it will be computed again next time", stacklevel=2)
        return arrays

    def _forget_old(self, name: str) -> None:
        """Delete all but the newest entries of a name."""
        files = sorted(self.folder.glob(f"{name}-*.npz"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-KEPT]:
            file.unlink(missing_ok=True)


def store_of(path: Path) -> ViewStore:
    """The store of a run's folder, or of a checkpoint's file, whose folder belongs to its owner."""
    if os.path.isdir(path):
        return ViewStore(path / "views")
    return ViewStore(cache_folder() / "views" / file_mark(path)[:32])


def file_mark(path: Path) -> str:
    """A file's content as a hash: of an archive's check sums where it is one, else of its bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except (zipfile.BadZipFile, ValueError):
        return hash_file(path)
    return hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()


def file_marks(paths: Sequence[Path]) -> list[str]:
    """The marks of several files, in their order."""
    return [file_mark(path) for path in paths]
