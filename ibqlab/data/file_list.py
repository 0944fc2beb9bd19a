"""The image files of one place, a folder or a set of shards, as a few arrays.

Names lie end to end in one array of bytes: for the 1.28 million images of ImageNet 40 MB that loader processes share,
where a million Python strings would be copied into each of them as soon as their reference counts move.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

NO_CLASS = "(no class)"
"""Name of the class of images that have none."""
SHOWN = 5
"""So many names or suffixes are shown in a warning."""


class PackedNames(NamedTuple):
    """A sequence of names in two arrays; `pack_names` makes one."""

    letters: UInt8[np.ndarray, "bytes"]
    """All names end to end in UTF-8."""

    ends: Int64[np.ndarray, "N"]
    """Where each name ends in `letters`."""

    def encoded(self, positions: Int64[np.ndarray, "n"]) -> list[bytes]:
        """The bytes of the names at these positions."""
        letters = self.letters.tobytes()
        ends = self.ends[positions]
        starts = np.where(positions > 0, self.ends[positions - 1], 0)
        return [letters[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def name(self, position: int) -> str:
        """One name; bytes that are no UTF-8 come back as Python writes them in paths (surrogateescape)."""
        start = self.ends[position - 1] if position else 0
        return _decode(self.letters[start : self.ends[position]].tobytes())

    def all(self) -> list[str]:
        """Every name in order, as strings: for one pass, and then to be forgotten."""
        return [_decode(name) for name in self.encoded(np.arange(len(self.ends)))]


def pack_names(names: Iterable[str]) -> PackedNames:
    """Names in two arrays, in the order in which they come."""
    encoded = [name.encode("utf-8", "surrogateescape") for name in names]
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return PackedNames(np.frombuffer(b"".join(encoded), dtype=np.uint8), np.cumsum(lengths))


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A name as text that every file can hold: bytes that are no UTF-8 become \\udcff and the like."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class FileList:
    """Every image file of one place. A position is an image's number in the list, 0 to N − 1."""

    where: str
    """The folder, or what the user calls the shards; for messages."""

    names: PackedNames
    """Relative to the place, with forward slashes on every system."""

    sizes: Int64[np.ndarray, "N"]
    """Bytes of each file; −1 where the system does not tell."""

    labels: Int32[np.ndarray, "N"]
    """Index into `classes`; −1 for an image without a class."""

    classes: list[str]
    """Class names in the order of the labels."""

    named: bool = True
    """False: the classes are known by number only, and `classes` holds "0", "1", …"""

    left_out: str = ""
    """Which files beside the images are left out, for `description`; empty: none."""

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, position: int) -> str:
        """The name at a position, printable."""
        return printable(self.names.name(position))

    def file(self, position: int) -> Path | bytes:
        """The image file at a position: where it lies, or its content if it is a part of a larger file.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        return Path(self.where, self.names.name(position))


def fingerprint(files: FileList, positions: Int64[np.ndarray, "n"]) -> str:
    """Identity of these images by name and size, whatever their order; 16 hexadecimal digits.

    Cost: a second for a million images, no file is opened.
    """
    lines = sorted(zip(files.names.encoded(positions), files.sizes[positions].tolist(), strict=True))
    return hashlib.sha256(b"\n".join(b"%s\t%d" % line for line in lines)).hexdigest()[:16]
