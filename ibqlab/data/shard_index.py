"""Where each image lies inside tar shards: read once from the headers, then kept in a cache folder.

Reading the headers of ImageNet's 2.6 million members takes a minute or more; the index is 80 MB of arrays and loads in
a fraction of a second.
"""

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64
from tqdm.auto import tqdm

from ibqlab.data.listing import Listing, PackedNames, pack_names
from ibqlab.data.pictures import SUFFIXES
from ibqlab.quantizers.base import require

CLASSES_FILE = "classes.json"
"""Beside the shards: a list of the class names in the order of the labels. Optional; `write_shards` writes it."""

CACHE_VARIABLE = "IBQLAB_CACHE"
BLOCK = 512
FORMAT = 1
_ARRAYS = ("shards", "offsets", "sizes", "labels", "letters", "ends")


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
    beside the first shard; without it, the classes are "0", "1", … up to the largest label.

    Args:
        paths: the shards, at least one.
        where: what the user calls them, for messages.
        progress: show a bar while headers are read; nothing is shown where the index is in the cache.
    Returns:
        At least one image.
    Raises:
        ValueError: a file that is no uncompressed tar, is cut off or damaged; an image without a label, or with a label
            that is no integer from −1; a key used twice, in one shard or in two; no image; or too few class names.
    Cost: reads every header once (about 20,000 images per second from a local disk) and keeps the result, by the
    names, sizes and times of the shards, in $IBQLAB_CACHE or ~/.cache/ibqlab.
    """
    cached = _cache_file(paths)
    arrays = _load(cached)
    if arrays is None:
        arrays = _build(paths, where, progress)
        _save(cached, arrays)
    names = PackedNames(arrays.pop("letters"), arrays.pop("ends"))
    class_names = paths[0].with_name(CLASSES_FILE)
    return ShardListing(
        where=where,
        paths=[str(path) for path in paths],
        names=names,
        classes=_class_names(class_names, int(arrays["labels"].max())),
        named=class_names.is_file(),
        **arrays,
    )


def cache_folder() -> Path:
    """Where indexes are kept: $IBQLAB_CACHE, or ~/.cache/ibqlab."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/ibqlab").expanduser()


def read_members(path: Path) -> tuple[list[Member], dict[str, int]]:
    """The images of one shard in their order, and the label of every key that has one.

    Raises:
        ValueError: no uncompressed tar, cut off, damaged, a key with two images, or a label that is no integer from −1.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for member in _walk(path, file):
            key, extension = split_key(member.name)
            if "." + extension in SUFFIXES:
                require(
                    key not in images,
                    f"a key must have one image; got {key!r} twice in {path.absolute()}. Write the shard anew with "
                    "each key once.",
                )
                images[key] = member
            elif extension == "cls" or (extension == "json" and key not in labels):
                label = _read_label(path, file, member)
                labels |= {} if label is None else {key: label}
    unlabelled = [member.name for key, member in images.items() if key not in labels]
    require(
        not unlabelled,
        f"every image of a shard must have a label; {len(unlabelled)} of {len(images)} in {path.absolute()} have none, "
        f'first {unlabelled[:1]}. Write an integer into key.cls, or {{"label": integer}} into key.json; -1 stands for '
        "no class.",
    )
    return list(images.values()), labels


def split_key(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member: the name is cut at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _walk(path: Path, file: BinaryIO) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                tar.members = []  # tarfile remembers every header, which a large shard need not
                name = info.name.removeprefix("./")
                base = name.rpartition("/")[2]
                if info.isfile() and not base.startswith("."):
                    yield Member(name, info.offset_data, info.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"a shard must be a whole, uncompressed tar file; got {path.absolute()} ({path.stat().st_size} bytes): "
            f"{error}. Copy it again, or unpack a compressed one first."
        ) from error
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    file.seek(end)
    closing = file.read(BLOCK)
    require(
        len(closing) == BLOCK and not any(closing),
        f"a tar file must end with a block of zeros; {path.absolute()} has none after byte {end}, so it is cut off or "
        "damaged there. Copy it again.",
    )


def _read_label(path: Path, file: BinaryIO, member: Member) -> int | None:
    text = os.pread(file.fileno(), member.size, member.offset)
    if member.name.lower().endswith(".cls"):
        label = _parse(text, int)
    else:
        content = _parse(text, json.loads)
        if isinstance(content, dict) and "label" not in content:
            return None
        label = content["label"] if isinstance(content, dict) else None
    require(
        type(label) is int and label >= -1,
        f"a label must be an integer from -1 (-1: no class); got {text[:40]!r} in {member.name} of {path.absolute()}. "
        "Write the number of the class.",
    )
    return label


def _parse(text: bytes, reader: Callable[[bytes], Any]) -> Any:
    try:
        return reader(text)
    except ValueError:
        return None


def _build(paths: Sequence[Path], where: str, progress: bool) -> dict[str, np.ndarray]:
    names: list[str] = []
    rows: list[np.ndarray] = []
    seen: dict[str, int] = {}
    for number, path in enumerate(tqdm(paths, desc="reading the headers of shards", disable=not progress)):
        images, labels = read_members(path)
        keys = [split_key(image.name)[0] for image in images]
        double = next((key for key in keys if key in seen), None)
        require(
            double is None,
            f"a key must occur once over all shards; got {double!r} in {paths[seen.get(double, 0)].absolute()} and in "
            f"{path.absolute()}. Remove the copy, or write one of them anew with other keys.",
        )
        seen |= dict.fromkeys(keys, number)
        names += [image.name for image in images]
        table = [(number, image.offset, image.size, labels[key]) for image, key in zip(images, keys, strict=True)]
        rows.append(np.array(table, dtype=np.int64).reshape(-1, 4))
    require(
        bool(names),
        f"shards must hold at least one image ({', '.join(SUFFIXES)}); got {where}, {len(paths)} files that hold none. "
        "Name other shards.",
    )
    shards, offsets, sizes, labels = np.concatenate(rows).T.copy()
    letters, ends = pack_names(names)
    arrays = (shards.astype(np.int32), offsets, sizes, labels.astype(np.int32), letters, ends)
    return dict(zip(_ARRAYS, arrays, strict=True))


def _class_names(file: Path, largest: int) -> list[str]:
    if not file.is_file():
        return [str(number) for number in range(max(largest, 0) + 1)]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        names = None
    good = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) > largest
    require(
        good,
        f"{file.absolute()} must be a JSON list of class names, one for each label 0 to {largest}; got "
        f"{len(names) if isinstance(names, list) else 'no list'}. Complete it, or delete it to use numbers as names.",
    )
    return names


def _cache_file(paths: Sequence[Path]) -> Path:
    states = [path.stat() for path in paths]
    identity = [FORMAT, *((str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, states, strict=True))]
    return cache_folder() / f"shards-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"


def _load(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in _ARRAYS}
    except Exception:  # absent or damaged, in any way that zip and NumPy have: it is read from the shards again
        return None


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    own = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with own.open("wb") as stream:
            np.savez(stream, **arrays)
        own.replace(file)
    except OSError as error:
        with suppress(OSError):
            own.unlink()
        warnings.warn(
            f"the index of the shards could not be kept in {file.parent} ({error}) and is made anew each time; set "
            f"{CACHE_VARIABLE} to a folder that can be written",
            stacklevel=2,
        )
