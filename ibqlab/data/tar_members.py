"""What one tar shard holds, told by its headers alone: images with their offsets, and labels.

What belongs together has one key, as in webdataset: `n01440764/n01440764_10026.JPEG` and
`n01440764/n01440764_10026.cls`.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ibqlab.base.checks import CLASSES, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, open_ordinary, parse_json
from ibqlab.data.pictures import SUFFIXES

BLOCK = 512
HEADER_BYTES = 2**20
"""Longest header of a member of a tar file; the longest honest one holds a few long names."""
LABEL_BYTES = 2**20
"""Largest label, and largest JSON beside an image."""
_INTEGER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


class Member(NamedTuple):
    """A part of a tar file that is an image or a label."""

    name: str
    offset: int
    size: int


class ShardMembers(NamedTuple):
    """What one shard holds."""

    images: list[Member]
    """In their order."""
    labels: dict[str, int]
    """Of every key that has one."""
    dotted: list[str]
    """Members that would be images if their key had no dot."""


def read_members(path: Path) -> ShardMembers:
    """The images of one shard and their labels.

    Raises:
        ValueError: no uncompressed tar, cut off, damaged, a key with two images, or a label that is no integer from −1.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    dotted: list[str] = []
    with open_ordinary(path) as file:
        for member in _walk(path, file):
            key, extension = split_key(member.name)
            if "." + extension in SUFFIXES:
                require(
                    key not in images,
                    f"a key must have one image; got {key!r} twice in {path.absolute()}. Write the shard again with "
                    "each key once.",
                )
                images[key] = member
            elif extension == "cls" or (extension == "json" and key not in labels):
                label = _read_label(path, file, member)
                labels |= {} if label is None else {key: label}
            elif extension.endswith(SUFFIXES):
                dotted.append(member.name)
    # Beside an image of the same key they are something else, such as its segmentation.
    dotted = [name for name in dotted if split_key(name)[0] not in images]
    return ShardMembers(list(images.values()), labels, dotted)


def split_key(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member: the name is cut at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _walk(path: Path, file: BinaryIO) -> Iterator[Member]:
    """The ordinary members of a tar file in order; the error about a damaged one comes after those before it."""
    length, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for info in tar:
                tar.members = []  # tarfile remembers every header, which a large shard need not
                # Only offset and size of a member are remembered, so they must lie inside the file and go forwards.
                if not (info.size >= 0 and end < tar.offset and info.offset_data + info.size <= length):
                    raise tarfile.ReadError(f"its member at byte {info.offset} says it has {info.size:,} bytes")
                end = tar.offset
                name = info.name.removeprefix("./")
                base = name.rpartition("/")[2]
                if info.isfile() and not base.startswith("."):
                    yield Member(name, info.offset_data, info.size)
            end = tar.offset
    # What tarfile raises on damaged headers beside its own errors.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise ValueError(
            f"a shard must be a whole, uncompressed tar file; got {for_terminal(path.absolute())} ({length} bytes): "
            f"{for_terminal(error) or type(error).__name__}. Copy it again, or unpack a compressed one first."
        ) from error
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    file.seek(end)
    closing = file.read(BLOCK)
    require(
        len(closing) == BLOCK and not any(closing),
        f"a tar file must end with a block of zeros; {for_terminal(path.absolute())} has none after byte {end}, so it "
        "is cut off or damaged there. Copy it again.",
    )


class _Headers:
    """A tar file as tarfile reads its headers: none is longer than a megabyte, and none continues behind the end.

    A damaged size would otherwise fill the memory, and a sparse file's map is looked for behind the end for ever.
    """

    AT_THE_END = 8
    """Times that tarfile may look behind the end: it does so once or twice in a good file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.empty = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """As a file's."""
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header says it has {size:,} bytes")
        data = self.file.read(size)
        self.empty += not data
        if self.empty > self.AT_THE_END:
            raise tarfile.ReadError("a header goes on behind the end")
        return data


def _read_label(path: Path, file: BinaryIO, member: Member) -> int | None:
    require(
        member.size <= LABEL_BYTES,
        f"a label, or JSON beside an image, may have {LABEL_BYTES:,} bytes; {for_terminal(member.name)} of "
        f"{for_terminal(path.absolute())} has {member.size:,}. Leave it out of the shard.",
    )
    text = os.pread(file.fileno(), member.size, member.offset)
    label = None
    if member.name.lower().endswith(".cls"):
        label = int(text) if _INTEGER.fullmatch(text) else None
    else:
        try:
            content = parse_json(text, member.name, object)
        except UnreadableFile:
            content = None
        if isinstance(content, dict):
            if "label" not in content:
                return None
            label = content["label"]
    require(
        type(label) is int and -1 <= label < CLASSES,
        f"a label must be an integer from -1 to {CLASSES - 1:,} (-1: no class); got {text[:40]!r} in "
        f"{for_terminal(member.name)} of {for_terminal(path.absolute())}. Write the number of the class.",
    )
    return label
