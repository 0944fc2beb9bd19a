"""Where each image lies inside tar shards: read once from the headers, then kept in a cache folder.

Reading the headers of ImageNet's 2.6 million members takes a minute or more; the index is 80 MB of arrays and loads in
a fraction of a second.
"""

import hashlib
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from ibqlab.base.checks import CLASSES, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import (
    RunError,
    UnreadableFile,
    open_ordinary,
    parse_json,
    read_json,
    read_npz,
    replacing,
    why_not,
)
from ibqlab.base.progress import counted
from ibqlab.data.classes import NO_CLASS
from ibqlab.data.index import Listing, PackedNames, pack_names, printable
from ibqlab.data.pictures import SUFFIXES

CLASSES_FILE = "classes.json"
"""Beside the shards: a list of the class names in the order of the labels. Optional; `write_shards` writes it."""

CACHE_VARIABLE = "IBQLAB_CACHE"
BLOCK = 512
FORMAT = 2
HEADER_BYTES = 2**20
"""Longest header of a member of a tar file; the longest honest one holds a few long names."""
LABEL_BYTES = 2**20
"""Largest label, and largest JSON beside an image."""
CLASS_NAMES_BYTES = 256 * 2**20
INDEX_BYTES = 2**36
"""Largest index that is read from the cache: a billion images."""
UNLABELLED = -2
"""In an index: an image that has no label, unlike one that says that it has no class (−1)."""
OUTLYING = 10
"""A largest label of so many times the number of images is probably a name in digits and no number."""
_ARRAYS = {"shards": np.int32, "offsets": np.int64, "sizes": np.int64, "labels": np.int32}
_NAMES = {"letters": np.uint8, "ends": np.int64}
_INTEGER = re.compile(rb"\s*-?[0-9]{1,18}\s*")


@dataclass(frozen=True, kw_only=True)
class ShardListing(Listing):
    """A listing whose images are parts of tar files."""

    paths: list[str]
    """The tar files."""

    shards: Int32[np.ndarray, "N"]
    """Index into `paths` of each image."""

    offsets: Int64[np.ndarray, "N"]
    """Where each image begins in its shard, in bytes; it is `sizes` long."""


class Member(NamedTuple):
    """A part of a tar file that is an image or a label."""

    name: str
    offset: int
    size: int


def index_shards(paths: Sequence[Path], where: str, *, progress: bool = False) -> ShardListing:
    """The images of tar shards in the order of the shards, and within one in the order of the tar file.

    An image is a member whose name ends in a known suffix after the first dot; its label stands in `key.cls` (an
    integer as text) or under "label" in `key.json`. Other members are left alone. Class names come from `classes.json`
    beside the first shard; without it, the classes are "0", "1", … up to the largest label. Without any label (as
    img2dataset writes shards) all images are of one class, `NO_CLASS`; where only some have one, the others have −1.

    Args:
        paths: the shards, at least one.
        where: what the user calls them, for messages.
        progress: show a bar while headers are read; nothing is shown where the index is in the cache.
    Returns:
        At least one image.
    Raises:
        ValueError: a file that is no uncompressed tar, is cut off or damaged; a label that is no integer from −1 to
            1,048,575; a key used twice, in one shard or in two; no image; or too few class names.
    Cost: reads every header once (about 20,000 images per second from a local disk) and keeps the result, by the
    names, sizes and times of the shards, in $IBQLAB_CACHE or ~/.cache/ibqlab.
    """
    cached = _cache_file(paths)
    arrays = _load(cached, paths)
    if arrays is None:
        arrays = _build(paths, where, progress)
        _save(cached, arrays)
    names = PackedNames(arrays.pop("letters"), arrays.pop("ends"))
    labels = arrays.pop("labels")
    _warn_of_labels(labels, names, where)
    class_names = paths[0].with_name(CLASSES_FILE)
    labelled = bool((labels != UNLABELLED).any())
    return ShardListing(
        where=where,
        paths=[str(path) for path in paths],
        names=names,
        labels=np.where(labels == UNLABELLED, -1, labels) if labelled else np.zeros_like(labels),
        classes=_class_names(class_names, int(labels.max())) if labelled else [NO_CLASS],
        named=class_names.is_file() or not labelled,
        **arrays,
    )


def cache_folder() -> Path:
    """Where indexes are kept: $IBQLAB_CACHE, or ~/.cache/ibqlab."""
    return Path(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or "~/.cache/ibqlab"))


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
    length, end = os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            for info in tar:
                tar.members = []  # tarfile remembers every header, which a large shard need not
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
    """A tar file as tarfile reads its headers: none is longer than a megabyte, and none goes on behind the end.

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


def _build(paths: Sequence[Path], where: str, progress: bool) -> dict[str, np.ndarray]:
    names: list[str] = []
    rows: list[np.ndarray] = []
    dotted: list[str] = []
    seen: dict[str, int] = {}
    for number, path in enumerate(counted(paths, "reading the headers", "shards", shown=progress)):
        members = read_members(path)
        keys = [split_key(image.name)[0] for image in members.images]
        double = next((key for key in keys if key in seen), None)
        require(
            double is None,
            f"a key must occur once over all shards; got {double!r} in {paths[seen.get(double, 0)].absolute()} and in "
            f"{path.absolute()}. Remove the copy, or write one of them again with other keys.",
        )
        seen |= dict.fromkeys(keys, number)
        names += [image.name for image in members.images]
        dotted += members.dotted
        labels = [members.labels.get(key, UNLABELLED) for key in keys]
        table = [(number, image.offset, image.size, label) for image, label in zip(members.images, labels, strict=True)]
        rows.append(np.array(table, dtype=np.int64).reshape(-1, 4))
    rule = _rule_of_keys(dotted)
    require(
        bool(names),
        f"shards must hold at least one image ({', '.join(SUFFIXES)}); got {for_terminal(where)}, {len(paths)} files "
        f"that hold none. {rule or 'Name other shards.'}",
    )
    if rule:
        warnings.warn(f"{len(dotted):,} members of {for_terminal(where)} are left out. {rule}", stacklevel=3)
    columns = np.concatenate(rows).T
    arrays = {name: column.astype(kind) for (name, kind), column in zip(_ARRAYS.items(), columns, strict=True)}
    return arrays | pack_names(names)._asdict()


def _rule_of_keys(dotted: list[str]) -> str:
    """The rule about dots in names, where there are such names."""
    if not dotted:
        return ""
    key, extension = map(for_terminal, split_key(dotted[0]))
    return (
        f"The key of a member ends at the first dot of its file name, and an image's suffix follows at once: "
        f"{for_terminal(dotted[0])!r} has the key {key!r} and the suffix '.{extension}'. "
        "Write the shards with no other dots in the names."
    )


def _warn_of_labels(labels: Int32[np.ndarray, "N"], names: PackedNames, where: str) -> None:
    """Warn of images without a label among those that have one, and of a label far above the number of images."""
    unlabelled = np.flatnonzero(labels == UNLABELLED)
    if 0 < len(unlabelled) < len(labels):
        warnings.warn(
            f"{len(unlabelled):,} of {len(labels):,} images of {for_terminal(where)} have no label and count as of no "
            f"class, first {for_terminal(names.name(int(unlabelled[0])))}",
            stacklevel=3,
        )
    largest = int(labels.argmax())
    if labels[largest] >= max(OUTLYING * len(labels), 1000):
        warnings.warn(
            f"the largest label of {for_terminal(where)} is {labels[largest]:,}, in {for_terminal(names.name(largest))}"
            f", and there are only {len(labels):,} images; every number up to it counts as a class. If it is a name in "
            "digits (such as WordNet's), write the shards again with classes numbered from 0",
            stacklevel=3,
        )


def _class_names(file: Path, largest: int) -> list[str]:
    if not os.path.lexists(file):
        return [str(number) for number in range(max(largest, 0) + 1)]
    remedy = "Complete it, or delete it to use numbers as names."
    try:
        names = read_json(file, list, CLASS_NAMES_BYTES)
    except (UnreadableFile, FileNotFoundError) as error:
        raise ValueError(f"{error}. It must be a JSON list of class names. {remedy}") from error
    require(
        all(isinstance(name, str) for name in names) and largest < len(names) <= CLASSES,
        f"{for_terminal(file.absolute())} must be a JSON list of class names, one for each label 0 to {largest} "
        f"({CLASSES:,} at most); got {len(names):,}. {remedy}",
    )
    return [printable(name) for name in names]


def _cache_file(paths: Sequence[Path]) -> Path:
    states = [_state(path) for path in paths]
    identity = [FORMAT, *((str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, states, strict=True))]
    return cache_folder() / f"shards-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"


def _state(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise UnreadableFile(f"{for_terminal(path)}: {why_not(error)}. Restore it, or name the other shards") from None


def _load(file: Path, paths: Sequence[Path]) -> dict[str, np.ndarray] | None:
    """The kept index; None where there is none or it is damaged, and the shards are read again."""
    try:
        arrays = read_npz(file, INDEX_BYTES)
    except (OSError, ValueError):
        return None
    return arrays if _is_index(arrays, paths) else None


def _is_index(arrays: dict[str, np.ndarray], paths: Sequence[Path]) -> bool:
    """Whether arrays are an index of these shards: types, one length, and every image inside its shard."""
    kinds = {**_ARRAYS, **_NAMES}
    if set(arrays) != set(kinds) or any(arrays[name].dtype != kind for name, kind in kinds.items()):
        return False
    count = len(arrays["ends"]) if arrays["ends"].ndim == 1 else 0
    if not count or any(arrays[name].shape != (count,) for name in _ARRAYS):
        return False
    shards, offsets, sizes, labels = (arrays[name] for name in _ARRAYS)
    if shards.min() < 0 or shards.max() >= len(paths) or min(offsets.min(), sizes.min()) < 0:
        return False
    lengths = np.array([path.stat().st_size for path in paths])
    ends = np.diff(arrays["ends"], prepend=0)
    return bool(
        (offsets + sizes <= lengths[shards]).all()
        and labels.min() >= UNLABELLED
        and labels.max() < CLASSES
        and ends.min() >= 0
        and arrays["ends"][-1] == len(arrays["letters"])
    )


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **arrays)
    except (OSError, RunError) as error:
        warnings.warn(
            f"the index of the shards could not be kept in {for_terminal(file.parent)} ({error}) and is made again "
            f"each time; set {CACHE_VARIABLE} to a folder that can be written",
            stacklevel=2,
        )
