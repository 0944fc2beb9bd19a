"""What views of one run have computed once: coordinates, the index of patches, facts.

They lie in the run's folder, in `views/`, so that every view and the next kernel find them; what belongs to a
checkpoint alone, or to a run's folder that cannot be written, lies in the cache. An entry's name ends in a hash of all
that it depends on. The content of files of a run is known by the check sums that NumPy's and PyTorch's archives hold,
which are read without the arrays. Two processes that build one entry at once each write it whole; the last one stays.
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable, Collection
from contextlib import suppress
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
        fallback: where they go when that folder cannot be written.
    """

    def __init__(self, folder: Path, fallback: Path | None = None):
        self.folder, self.fallback = folder, fallback

    def get(self, name: str, build: Callable[[], Arrays], *, needs: Collection[str] = (), **depends: Any) -> Arrays:
        """An entry, computed when it is first asked for.

        Args:
            name: of the entry, a plain word.
            build: computes its arrays.
            needs: arrays without which a stored entry is damaged, and computed again.
            **depends: everything that the arrays depend on: numbers, texts, lists of them; also the version of what
                computes them.
        Returns:
            The arrays. Where they cannot be stored a warning says so.
        """
        file = f"{name}-{content_key(name=name, **depends)}.npz"
        folders = [folder for folder in (self.folder, self.fallback) if folder is not None]
        for folder in folders:
            try:
                arrays = read_npz(folder / file, ENTRY_BYTES)
            except (FileNotFoundError, UnreadableFile):
                continue
            if set(needs) <= set(arrays):
                return arrays
        arrays = build()
        self._store(name, file, arrays, folders)
        return arrays

    def _store(self, name: str, file: str, arrays: Arrays, folders: list[Path]) -> None:
        """Write an entry into the first folder that takes it; a warning says if that is not the first."""
        errors = []
        for folder in folders:
            try:
                # A run's folder that was deleted meanwhile stays deleted.
                folder.mkdir(parents=folder is not self.folder or self.fallback is None, exist_ok=True)
                sweep(folder)
                with replacing(folder / file) as stream:
                    np.savez(stream, **arrays)
                _forget_old(folder, name)
                break
            except (OSError, RunError) as error:
                errors.append((folder, error))
        if errors:
            folder, error = errors[0]
            instead = f"it is kept in {folders[len(errors)]}" if len(errors) < len(folders) else "it is not kept"
            warnings.warn(f"{folder / file} cannot be written ({error}); {instead}", stacklevel=4)


def _forget_old(folder: Path, name: str) -> None:
    """Delete all but the newest entries of a name; another process may do the same."""
    times = {}
    for file in folder.glob(f"{name}-*.npz"):
        with suppress(FileNotFoundError):
            times[file] = file.stat().st_mtime_ns
    for file in sorted(times, key=times.__getitem__)[:-KEPT]:
        file.unlink(missing_ok=True)


def store_of(path: Path) -> ViewStore:
    """The store of a run's folder, or of a checkpoint's file, whose folder belongs to its owner."""
    cache = cache_folder() / "views"
    if os.path.isdir(path):
        return ViewStore(path / "views", cache / content_key(folder=os.path.abspath(path)))
    return ViewStore(cache / file_mark(path)[:32])


def file_mark(path: Path) -> str:
    """A file's content as a hash: of an archive's check sums where it is one, else of its bytes.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: it is no ordinary file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError):
        return hash_file(path)
    return hashlib.sha256(repr(sorted(entries)).encode()).hexdigest()
