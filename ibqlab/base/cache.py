"""Results that need not be computed twice, found again by the content of everything they depend on.

A key is a hash of pixels or file contents, weights and settings; nothing is found by a name or a date, so nothing found
is ever stale. Entries are `.npz` files without pickles and can be deleted at any time.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ibqlab.base.files import RunError, UnreadableFile, expanded, open_ordinary, read_npz, replacing, sweep

ENTRY_BYTES = 2**34
"""Largest entry that is read: the features of 50,000 images take 400 MB."""


def cache_folder() -> Path:
    """$IBQLAB_CACHE, or ~/.cache/ibqlab."""
    return expanded(os.environ.get("IBQLAB_CACHE") or "~/.cache/ibqlab")


def content_key(**parts: Any) -> str:
    """A name from everything a result depends on: hashes, numbers and texts. Other content, other name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def hash_file(path: Path) -> str:
    """sha256 of an ordinary file's content, hexadecimal.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableFile: it is no ordinary file, or may not be read.
    """
    with open_ordinary(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_arrays(kind: str, key: str) -> dict[str, np.ndarray] | None:
    """A stored entry; None when there is none, or it cannot be read and has to be computed again."""
    try:
        return read_npz(_file(kind, key), ENTRY_BYTES)
    except (FileNotFoundError, UnreadableFile):
        return None


def save_arrays(kind: str, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Store an entry, whole or not at all. Where it cannot be written a warning says so, and the work goes on."""
    file = _file(kind, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sweep(file.parent)
        with replacing(file) as stream:
            np.savez(stream, **arrays)
    except (OSError, RunError) as error:
        warnings.warn(
            f"{file} cannot be written ({error}); the result is right but will be computed again. "
            "Set IBQLAB_CACHE to a folder that you may write to.",
            stacklevel=2,
        )


def _file(kind: str, key: str) -> Path:
    return cache_folder() / kind / f"{key}.npz"
