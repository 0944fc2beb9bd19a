"""Arrays inside .npz archives, read piece by piece: they may be larger than the memory.

`base.files.read_npz` reads what this library wrote, whole. Here are files of others, such as published references.
"""

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from ibqlab.base.checks import require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import open_ordinary


@dataclass(frozen=True)
class StoredArray:
    """An array inside an .npz, open at its first value."""

    shape: tuple[int, ...]
    dtype: np.dtype
    c_order: bool
    """Rows one after another; False: columns (Fortran's order)."""
    stream: BufferedIOBase

    def read(self, count: int) -> np.ndarray:
        """The next `count` values, (count,).

        Raises:
            ValueError: there are fewer.
        """
        data = bytearray(self.stream.read(count * self.dtype.itemsize))
        require(len(data) == count * self.dtype.itemsize, "it ends before its last value")
        return np.frombuffer(data, self.dtype)


@contextmanager
def open_array(path: Path, name: str) -> Iterator[StoredArray]:
    """An array of an .npz to be read piece by piece.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no archive, no such array, Python objects, or more values than the file says it has bytes for; or
            the archive turns out to be damaged while it is read.
    """
    with _open_archive(path) as archive:
        names = _names(archive)
        require(
            name in names,
            f"{path} must hold an array {name}, uint8 (N, H, W, 3); it holds "
            f"{', '.join(map(for_terminal, names[:10])) or 'no array'}",
        )
        with archive.open(f"{name}.npy") as stream:
            array = _array_at(stream, f"{name} of {path}")
            claimed = math.prod(array.shape) * array.dtype.itemsize
            stored_bytes = archive.getinfo(f"{name}.npy").file_size - stream.tell()
            require(
                claimed == stored_bytes,
                f"{name} of {path} says shape {array.shape}, {claimed:,} bytes, and holds {stored_bytes:,}. Write it "
                "again with np.savez",
            )
            yield array


def stored_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no archive.
    """
    with _open_archive(path) as archive:
        return _names(archive)


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz; what its damage makes zipfile and zlib raise becomes a ValueError."""
    with open_ordinary(path) as file:
        require(zipfile.is_zipfile(file), f"{path} must be an .npz archive; its content is not. Write it with np.savez")
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({for_terminal(error)}); write it again with np.savez") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _array_at(stream: BufferedIOBase, name: str) -> StoredArray:
    """The array whose header the stream is at."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    # NumPy parses the header as a Python literal, whose errors are of many kinds.
    except Exception as error:
        raise ValueError(f"{name} is no array ({for_terminal(error)}). Write it again with np.savez") from error
    require(not dtype.hasobject, f"{name} must hold numbers; it holds Python objects, which could run a program")
    return StoredArray(shape, dtype, not fortran, stream)
