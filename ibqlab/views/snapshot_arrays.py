"""The arrays of a snapshot as views may trust them: shapes and values are checked here, for cards, map and atlas alike.

A snapshot may come from an older version, from another program, or from a disk that lost something. NaN in codebook and
features is no damage: a training that has diverged writes it, and views say so.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ibqlab.base.codebook_parts import CONCATENATED, SUMMED, with_codebook
from ibqlab.base.files import RunError, UnreadableFile, read_npz
from ibqlab.runs.view import SNAPSHOT_BYTES

NEVER, NOT_STORED = -1, -2
"""In place of a last hit, or of the steps since: training never hit the code; the snapshot does not tell."""
PARTS = (SUMMED, CONCATENATED)
_SHAPES = {
    "codebook": (2, "K"),
    "features": (2, "M"),
    "counts": (1, "K"),
    "last_hit": (1, "K"),
    "assignments": (1, "M"),
    "gradient_norm": (1, "K"),
}
"""Dimensions of each array, and the letter of its length; those of one letter are of one length."""
_WHOLE = {"counts": 0, "last_hit": NEVER, "assignments": None}
"""Arrays of whole numbers, and the least there may be; a monitor stores also wrong indices that it was given."""


def read_snapshot(file: Path, names: tuple[str, ...] | None = None, *, join: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a snapshot, checked; counts, last hits and assignments as int64, −1 where there is no such code.

    Args:
        file: the snapshot.
        names: arrays to read, as far as they are there; None: all.
        join: make the codebook of its parts, where these are stored.
    Raises:
        RunError: there is no such file, or it is damaged; the message says what to do.
    """
    try:
        arrays = read_npz(file, SNAPSHOT_BYTES, names)
    except (FileNotFoundError, UnreadableFile, OSError) as error:
        raise RunError(f"{error}; delete {file.name} or train again") from error
    fault = next(_faults_of_parts(arrays), "")
    if not fault:
        arrays = with_codebook(arrays) if join else arrays
        fault = next(_faults(arrays), "")
    if fault:
        raise RunError(f"{file} is damaged: {fault}; delete {file.name} or train again")
    arrays = {name: values.astype(np.int64) if name in _WHOLE else values for name, values in arrays.items()}
    sizes = [len(arrays[name]) for name in ("codebook", "counts") if name in arrays]
    if "assignments" in arrays and sizes:
        codes = arrays["assignments"]
        arrays["assignments"] = np.where((codes >= 0) & (codes < sizes[0]), codes, -1)
    return arrays


def _faults_of_parts(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What is wrong with a codebook that is stored as its parts."""
    for name in PARTS:
        if name in arrays and not (_is_numbers(arrays[name], 3) and arrays[name].size):
            yield f"{name} must be numbers of shape (parts, codes, D); got {_kind(arrays[name])}"


def _faults(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    """What a view could not work with, in words; each is only asked for where there is none before it."""
    lengths: dict[str, tuple[str, int]] = {}
    for name, (dimensions, letter) in _SHAPES.items():
        if name not in arrays:
            continue
        values = arrays[name]
        if not _is_numbers(values, dimensions) or not values.size:
            shape = f"({letter},)" if dimensions == 1 else f"({letter}, D)"
            yield f"{name} must be numbers of shape {shape}; got {_kind(values)}"
        first, length = lengths.setdefault(letter, (name, len(values)))
        if len(values) != length:
            yield f"{name} is of {len(values):,} and {first} of {length:,}"
        if name in _WHOLE and not _is_whole(values, _WHOLE[name]):
            least = "" if _WHOLE[name] is None else f" of at least {_WHOLE[name]}"
            yield f"{name} must be whole numbers{least}, and not all are"
    if {"codebook", "features"} <= set(arrays) and arrays["codebook"].shape[1] != arrays["features"].shape[1]:
        dims = (arrays[name].shape[1] for name in ("codebook", "features"))
        yield "codebook is of {} and features of {} dimensions".format(*dims)


def _is_numbers(values: np.ndarray, dimensions: int) -> bool:
    return values.ndim == dimensions and values.dtype.kind in "fiu"


def _is_whole(values: np.ndarray, least: int | None) -> bool:
    are_whole = bool(np.isfinite(values).all() and (values == np.floor(values)).all())
    return are_whole and (least is None or values.min() >= least)


def _kind(values: np.ndarray) -> str:
    return f"{values.dtype} of shape {values.shape}"
