"""A folder of images of your own, with or without class sub-folders."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ibqlab.base.checks import FOLDER_DEPTH, require
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import why_not
from ibqlab.data.file_list import NO_CLASS, SHOWN, FileList, pack_names, printable
from ibqlab.data.pictures import SUFFIXES, is_picture_name

COMPANIONS = ("", ".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".html", ".pdf", ".py")
COMPANIONS += (".ini", ".db", ".log", ".npy", ".npz", ".parquet", ".mat", ".zip")
"""Suffixes of files that usually lie beside images; they are counted and left out without a warning."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Suffixes of compressed shards, which cannot be read."""


def list_folder(root: Path) -> FileList:
    """Every image below a folder, sorted by name; its class is the first sub-folder under the root.

    Links to folders are followed, each folder once. Names that begin with a dot (thumbnails, notebook checkpoints) are
    left out. Classes are numbered in sorted order, as torchvision's ImageFolder numbers them; images that lie in the
    root itself form a class of their own, `NO_CLASS`. What has an image's name and is none (a pipe, a device, a link to
    nowhere) is listed and turns out unreadable. Warnings name class folders without images, numbers that are sorted as
    text, and files that are left out although they may be images.

    Args:
        root: an existing folder.
    Returns:
        At least one image.
    Raises:
        ValueError: there is no image below the folder, a sub-folder cannot be listed, or they lie too deep.
    Cost: one look at each file for its size; tens of thousands of files per second on a local disk.
    """
    walk = _collect(root)
    images = sorted(walk.images)
    compressed = sum(count for suffix, count in walk.left_out.items() if suffix in COMPRESSED)
    require(
        bool(images),
        f"a folder of images must hold at least one image ({', '.join(SUFFIXES)}) at any depth; got "
        f"{for_terminal(root.absolute())}, which holds none"
        + (f" and {compressed} compressed shards; a shard must be an uncompressed .tar: unpack them" * bool(compressed))
        + ". Name another folder, or use source='photos' for built-in images.",
    )
    class_of = [name.partition("/")[0] if "/" in name else NO_CLASS for name, _ in images]
    classes = sorted(set(class_of))
    numbers = {name: number for number, name in enumerate(classes)}
    _warn(root, walk, classes)
    return FileList(
        where=str(root),
        names=pack_names(name for name, _ in images),
        sizes=np.array([size for _, size in images], dtype=np.int64),
        labels=np.array([numbers[name] for name in class_of], dtype=np.int32),
        classes=[printable(name) for name in classes],
        left_out=_suffix_counts(walk.left_out),
    )


def list_file(file: Path) -> FileList:
    """One picture as a list of one, for evaluation.

    Args:
        file: an existing file, whatever its name.
    """
    return FileList(
        where=str(file.parent),
        names=pack_names([file.name]),
        sizes=np.array([file.stat().st_size], dtype=np.int64),
        labels=np.zeros(1, dtype=np.int32),
        classes=[NO_CLASS],
    )


@dataclass
class _Walk:
    """What was seen on a walk through a folder and all below it."""

    images: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes; −1 for what has no size."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Other files, by suffix."""
    suspects: list[str] = field(default_factory=list)
    """The first few of them that may be images."""
    classes: set[str] = field(default_factory=set)
    """Folders right under the root."""


def _collect(root: Path) -> _Walk:
    """Walk level by level, without recursion. Of two ways to a folder the shorter one names its images."""
    walk, folder_ids = _Walk(), set()
    _is_new(root, folder_ids)
    level = [""]
    for depth in range(FOLDER_DEPTH + 1):
        below: list[str] = []
        for folder in level:
            below += _list_level(root, folder, walk)
        # In the order of the names; each folder once.
        level = [name for name in sorted(below) if _is_new(root / name, folder_ids)]
        if depth == 0:
            walk.classes = set(level)
        if not level:
            return walk
    raise ValueError(
        f"folders of images may lie {FOLDER_DEPTH} deep; got {for_terminal(root / level[0])}. Name a folder further "
        "down as the source"
    )


def _list_level(root: Path, folder: str, walk: _Walk) -> list[str]:
    """Notes the files of one folder; the folders in it, relative to the root."""
    prefix = folder and folder + "/"
    below = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    below.append(prefix + entry.name)
                elif is_picture_name(entry.name):
                    walk.images.append((prefix + entry.name, _size(entry)))
                else:
                    _leave_out(prefix + entry.name, walk)
    except OSError as error:
        raise ValueError(
            f"every folder of images must be readable; {for_terminal(root / folder)} cannot be listed "
            f"({why_not(error)}). Put a dot in front of its name to leave it out"
        ) from error
    return below


def _leave_out(name: str, walk: _Walk) -> None:
    suffix = next((ending for ending in COMPRESSED if name.lower().endswith(ending)), os.path.splitext(name)[1].lower())
    walk.left_out[suffix] += 1
    if suffix not in COMPANIONS and len(walk.suspects) < SHOWN:
        walk.suspects.append(name)


def _warn(root: Path, walk: _Walk, classes: list[str]) -> None:
    where = for_terminal(root)
    if walk.suspects:
        suspicious = Counter({suffix: n for suffix, n in walk.left_out.items() if suffix not in COMPANIONS})
        warnings.warn(
            f"{suspicious.total():,} files in {where} are left out, because their suffix is not one of the images that "
            f"are read here ({', '.join(SUFFIXES)}): {_suffix_counts(suspicious)}; such as "
            f"{', '.join(map(for_terminal, walk.suspects))}",
            stacklevel=3,
        )
    named = [name for name in classes if name != NO_CLASS]
    empty = sorted(walk.classes - set(named))
    if named and empty:
        warnings.warn(
            f"{len(empty):,} folders in {where} hold no image and are no class: "
            f"{', '.join(map(for_terminal, empty[:SHOWN]))}{', …' if len(empty) > SHOWN else ''}. The classes after "
            f"them have lower numbers than if they were; {len(named):,} classes remain",
            stacklevel=3,
        )
    _warn_of_numeric_order(named, where)


def _warn_of_numeric_order(classes: Sequence[str], where: str) -> None:
    """Warn where class folders are numbers whose order as text is another one: 0, 1, 10, 11, 2."""
    if not all(name.isdecimal() and len(name) < 20 for name in classes):
        return
    number = next((number for number, name in enumerate(sorted(classes, key=int)) if classes[number] != name), None)
    if number is not None:
        warnings.warn(
            f"the class folders of {where} are numbered by their names as text, as torchvision does, not "
            f"as numbers: class number {number} is folder {classes[number]!r}. The list is open_data(config, "
            f"'train').classes. To have number n mean folder n, give all names the same length, such as {number:03}",
            stacklevel=2,
        )


def _suffix_counts(suffixes: Counter[str]) -> str:
    """How many files of which suffixes, the most frequent first."""
    by_count = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count:,} {for_terminal(suffix, 20) or 'without suffix'}" for suffix, count in by_count[:SHOWN]]
    return ", ".join(texts + ["…"] * (len(by_count) > SHOWN))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link that leads back to itself


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a dangling link: listed, so that it is named among the unreadable


def _is_new(folder: Path, folder_ids: set[tuple[int, int]]) -> bool:
    """Whether a folder was not met before, under this name or another. It is then noted in `folder_ids`."""
    try:
        status = folder.stat()
    except OSError:
        return True  # listing it will say why it cannot be looked at
    identity = (status.st_dev, status.st_ino)
    is_new = identity not in folder_ids
    folder_ids.add(identity)
    return is_new
