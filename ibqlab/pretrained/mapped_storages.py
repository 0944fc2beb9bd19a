"""Where the numbers of stored tensors lie in a file, and tensors mapped from there.

torch.save writes a zip archive: one pickle, and one uncompressed entry per storage. Before torch 1.6 it wrote five
pickles one after another (magic number, version, byte order, content, keys of storages) and then every storage: its
length in 8 bytes and its numbers. Both are mapped here, so a tensor costs memory when it is used.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ibqlab.pretrained.stand_ins import InertReader, MalformedPickle, Storage, StoredTensor

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of an entry of a zip archive: its mark, and the lengths of its name and of its extra field, which follow."""
LOCAL_MARK = b"PK\x03\x04"
OLD_MAGIC = 0x1950A86A20F9469CFC6C
OLD_VERSION = 1001


class DamagedStorage(ValueError):
    """A tensor whose numbers are not in the file as its description says."""


@dataclass(frozen=True, kw_only=True)
class InertContent:
    """What a file holds, with descriptions in place of tensors and stand-ins in place of every class."""

    path: Path
    content: Any
    names: tuple[str, ...]
    """Classes and functions that were stood in for, sorted."""
    has_nested_keys: bool
    """Whether a dict or a set has a key that contains other objects; a stand-in is in its place."""
    places: Mapping[str, tuple[int, int]] | None
    """Storages of a file of torch before 1.6: first byte in the file and length in bytes; None for an archive."""

    def make_tensors(self, stored: Mapping[Any, Any]) -> dict[Any, Any]:
        """The same mapping with tensors, mapped from the file, in place of their descriptions.

        Raises:
            DamagedStorage: the numbers of a tensor are not in the file; the message names it.
        """
        whole = torch.UntypedStorage.from_file(os.fspath(self.path), False, self.path.stat().st_size)
        places = _archive_places(self.path) if self.places is None else self.places
        made = {}
        for name, value in stored.items():
            try:
                made[name] = _map(value, whole, places) if isinstance(value, StoredTensor) else value
            except (DamagedStorage, RuntimeError, OverflowError) as error:
                reason = str(error).splitlines()[0][:160]
                raise DamagedStorage(f"the tensor {str(name)[:160]!r} cannot be read: {reason}") from None
        return made


def read_inert(path: Path, stream: BinaryIO, *, is_archive: bool) -> InertContent:
    """A file's content, nothing of which was imported, called or run.

    Args:
        stream: the file, or the archive's pickle.
        is_archive: whether torch 1.6 or later wrote it.
    Raises:
        MalformedPickle: no file of torch.save, cut short, or more work than any checkpoint asks for.
    """
    reader = InertReader(stream)
    content, places = (reader.next_content(), None) if is_archive else _read_old(reader, stream)
    return InertContent(
        path=path,
        content=content,
        names=tuple(sorted(reader.names)),
        has_nested_keys=reader.has_nested_keys,
        places=places,
    )


def archive_pickle(path: Path) -> BinaryIO:
    """The pickle of an archive that torch.save wrote, the same that torch's reader finds in it.

    Raises:
        MalformedPickle: there is none, it is damaged, or a zip file made so that two readers find two.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            if root + "byteorder" in archive.namelist() and archive.read(root + "byteorder") != b"little":
                raise MalformedPickle("its numbers have the other byte order (big-endian)")
            program = archive.read(root + "data.pkl")
        with open(path, "rb") as file:
            if torch._C.PyTorchFileReader(file).get_record("data.pkl") != program:
                raise MalformedPickle("it has two tables of contents, and readers see different ones")
        return io.BytesIO(program)
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, NotImplementedError, RuntimeError, EOFError) as error:
        raise MalformedPickle(f"{type(error).__name__}: {error}"[:160]) from None


def _root(archive: zipfile.ZipFile) -> str:
    """The folder in an archive; torch names it after the file."""
    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    return name.removesuffix("data.pkl")


def _archive_places(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and length in bytes of every storage of an archive, by key."""
    places, end = {}, path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        start = f"{_root(archive)}data/"
        for entry in archive.infolist():
            if not entry.filename.startswith(start):
                continue
            file.seek(entry.header_offset)
            header = file.read(LOCAL_HEADER.size)
            if len(header) < LOCAL_HEADER.size or not header.startswith(LOCAL_MARK):
                continue  # no numbers there; a tensor that needs them says so
            _, name_length, extra_length = LOCAL_HEADER.unpack(header)
            first = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
            if first + entry.file_size <= end:
                places[entry.filename.removeprefix(start)] = (first, entry.file_size)
    return places


def _read_old(reader: InertReader, stream: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Content and places of storages of a file of torch before 1.6."""
    if reader.next_content() != OLD_MAGIC:
        raise MalformedPickle("it is a pickle of another kind than torch.save writes")
    if reader.next_content() != OLD_VERSION:
        raise MalformedPickle("it has an unknown version")
    system = reader.next_content()
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise MalformedPickle("its numbers have the other byte order (big-endian)")
    content, keys = reader.next_content(), reader.next_content()
    places, end = {}, os.fstat(stream.fileno()).st_size
    for key in keys if isinstance(keys, list) else []:
        storage = reader.storages.get(key) if isinstance(key, str) else None
        length = stream.read(8)
        if storage is None or len(length) < 8:
            raise MalformedPickle("its list of storages is damaged")
        first, nbytes = stream.tell(), int.from_bytes(length, "little") * _item_bytes(storage)
        if first + nbytes > end:
            raise MalformedPickle("it is cut short")
        places[key] = (first, nbytes)
        stream.seek(first + nbytes)
    return content, places


def _item_bytes(storage: Storage) -> int:
    return getattr(torch, storage.dtype).itemsize


def _map(stored: StoredTensor, whole: torch.UntypedStorage, places: Mapping[str, tuple[int, int]]) -> Tensor:
    """The tensor of a description, if all its numbers are in its storage and that is in the file."""
    storage = stored.storage
    first, nbytes = places.get(storage.key, (0, -1))
    if nbytes < 0:
        raise DamagedStorage(f"the file does not hold its storage {storage.key[:80]!r}")
    if nbytes != storage.numel * _item_bytes(storage):
        raise DamagedStorage(f"its storage has {nbytes:,} bytes, not {storage.numel:,} numbers of type {storage.dtype}")
    last = stored.offset + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
    if math.prod(stored.size) and last >= storage.numel:  # before torch would make the storage longer
        raise DamagedStorage(f"its number {last:,} lies outside its storage of {storage.numel:,}")
    empty = torch.empty(0, dtype=getattr(torch, storage.dtype))
    offset = min(stored.offset, storage.numel)
    return empty.set_(whole[first : first + nbytes], offset, stored.size, stored.stride)
