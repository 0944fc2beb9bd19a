"""Tar shards in webdataset's format, read at random instead of streamed: an index says where each image lies.

Streaming readers shuffle what passes by. Here every image has a number and is read by seeking to it, so shards obey the
same rule as a folder: batch s depends on (seed, s) alone. Reading the headers of ImageNet's 2.6 million members takes a
minute or more; the index is 80 MB of arrays, is stored in the cache and loads in a fraction of a second.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Int64

from ibqlab.base.cache import content_key, load_arrays, save_arrays
from ibqlab.base.checks import CLASSES, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, read_json, why_not
from ibqlab.base.progress import track_items
from ibqlab.data.file_list import NO_CLASS, FileList, PackedNames, pack_names, printable
from ibqlab.data.pictures import SUFFIXES
from ibqlab.data.shards import OpenFiles
from ibqlab.data.tar_members import read_members, split_key

CLASSES_FILE = "classes.json"
"""Beside the shards: a list of the class names in the order of the labels. Optional; `write_shards` writes it."""
PICTURE_BYTES = 2**30
"""Largest picture inside a shard, which is read whole."""
FORMAT = 2
CLASS_NAMES_BYTES = 256 * 2**20
UNLABELLED = -2
"""In an index: an image that has no label, unlike one that says that it has no class (−1)."""
OUTLYING = 10
"""A largest label of so many times the number of images is probably a name in digits and no number."""
_ARRAYS = {"shards": np.int32, "offsets": np.int64, "sizes": np.int64, "labels": np.int32}
"""The columns of an index, one row per image; beside them it holds the names."""
_NAMES = {"letters": np.uint8, "ends": np.int64}


@dataclass(frozen=True, kw_only=True)
class ShardList(FileList):
    """A list whose image files are parts of tar files; their names are those inside the shards."""

    paths: list[str]
    """The tar files."""

    shards: Int32[np.ndarray, "N"]
    """Index into `paths` of each image."""

    offsets: Int64[np.ndarray, "N"]
    """Where each image begins in its shard, in bytes; it is `sizes` long."""

    @cached_property
    def open_files(self) -> OpenFiles:
        """The shards that are open in this process."""
        return OpenFiles(self.paths)

    def file(self, position: int) -> bytes:
        """As in `FileList`; the content, read from its shard."""
        size = int(self.sizes[position])
        require(size <= PICTURE_BYTES, f"it has {size:,} bytes; a picture in a shard may have {PICTURE_BYTES:,}")
        return self.open_files.read(int(self.shards[position]), int(self.offsets[position]), size)


def index_shards(paths: Sequence[Path], where: str, *, progress: bool = False) -> ShardList:
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
    Cost: reads every header once (about 20,000 images per second from a local disk) and stores the result, by the
    names, sizes and times of the shards, in $IBQLAB_CACHE or ~/.cache/ibqlab.
    """
    try:
        states = [path.stat() for path in paths]
    except OSError as error:
        shard = for_terminal(error.filename)
        raise UnreadableFile(f"{shard}: {why_not(error)}. Restore it, or name the other shards") from None
    # Not by the content: reading all of it to find the index would take longer than making the index.
    key = content_key(
        format=FORMAT,
        shards=[(str(p.absolute()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, states, strict=True)],
    )
    arrays = load_arrays("shards", key)
    if arrays is None or not _is_index(arrays, np.array([state.st_size for state in states])):
        arrays = _build(paths, where, progress)
        save_arrays("shards", key, arrays)
    names = PackedNames(arrays.pop("letters"), arrays.pop("ends"))
    labels = arrays.pop("labels")
    _warn_of_labels(labels, names, where)
    class_names = paths[0].with_name(CLASSES_FILE)
    labelled = bool((labels != UNLABELLED).any())
    return ShardList(
        where=where,
        paths=[str(path) for path in paths],
        names=names,
        labels=np.where(labels == UNLABELLED, -1, labels) if labelled else np.zeros_like(labels),
        classes=_class_names(class_names, int(labels.max())) if labelled else [NO_CLASS],
        named=class_names.is_file() or not labelled,
        **arrays,
    )


def _is_index(arrays: dict[str, np.ndarray], lengths: Int64[np.ndarray, "shards"]) -> bool:
    """Whether arrays are an index of shards of these lengths: types, one length, and every image inside its shard."""
    types = {**_ARRAYS, **_NAMES}
    if set(arrays) != set(types) or any(arrays[name].dtype != dtype for name, dtype in types.items()):
        return False
    count = len(arrays["ends"]) if arrays["ends"].ndim == 1 else 0
    if not count or any(arrays[name].shape != (count,) for name in _ARRAYS):
        return False
    shards, offsets, sizes, labels = (arrays[name] for name in _ARRAYS)
    if shards.min() < 0 or shards.max() >= len(lengths) or min(offsets.min(), sizes.min()) < 0:
        return False
    return bool(
        (offsets + sizes <= lengths[shards]).all()
        and labels.min() >= UNLABELLED
        and labels.max() < CLASSES
        and np.diff(arrays["ends"], prepend=0).min() >= 0
        and arrays["ends"][-1] == len(arrays["letters"])
    )


def _build(paths: Sequence[Path], where: str, progress: bool) -> dict[str, np.ndarray]:
    """The arrays of an index, from the headers of all shards."""
    names: list[str] = []
    tables: list[np.ndarray] = []
    dotted: list[str] = []
    shard_of: dict[str, int] = {}
    for number, path in enumerate(track_items(paths, "reading the headers", "shards", shown=progress)):
        members = read_members(path)
        keys = [split_key(image.name)[0] for image in members.images]
        double = next((key for key in keys if key in shard_of), None)
        require(
            double is None,
            f"a key must occur once over all shards; got {double!r} in {paths[shard_of.get(double, 0)].absolute()} and "
            f"in {path.absolute()}. Remove the copy, or write one of them again with other keys.",
        )
        shard_of |= dict.fromkeys(keys, number)
        names += [image.name for image in members.images]
        dotted += members.dotted
        labels = [members.labels.get(key, UNLABELLED) for key in keys]
        rows = [(number, image.offset, image.size, label) for image, label in zip(members.images, labels, strict=True)]
        # Numbers instead of objects at once: (images of the shard, 4), columns as in `_ARRAYS`.
        tables.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
    rule = _rule_of_keys(dotted)
    require(
        bool(names),
        f"shards must hold at least one image ({', '.join(SUFFIXES)}); got {for_terminal(where)}, {len(paths)} files "
        f"that hold none. {rule or 'Name other shards.'}",
    )
    if rule:
        warnings.warn(f"{len(dotted):,} members of {for_terminal(where)} are left out. {rule}", stacklevel=3)
    columns = np.concatenate(tables).T
    arrays = {name: column.astype(dtype) for (name, dtype), column in zip(_ARRAYS.items(), columns, strict=True)}
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
