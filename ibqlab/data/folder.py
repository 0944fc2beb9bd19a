"""A folder of images of your own, with or without class sub-folders."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from ibqlab.data.listed import ListedSource
from ibqlab.data.listing import NO_CLASS, Listing, pack_names
from ibqlab.data.pictures import SUFFIXES, is_picture_name, read_rgb
from ibqlab.quantizers.base import require


def list_folder(root: Path) -> Listing:
    """Every image below a folder, sorted by name; its class is the first sub-folder under the root.

    Links to folders are followed, each folder once. Names that begin with a dot (thumbnails, notebook checkpoints) are
    left out. Classes are numbered in sorted order, as torchvision's ImageFolder numbers them; images that lie in the
    root itself form a class of their own, `NO_CLASS`.

    Args:
        root: an existing folder.
    Returns:
        At least one image.
    Raises:
        ValueError: there is no image below the folder.
        OSError: a sub-folder cannot be listed.
    Cost: one look at each file for its size; tens of thousands of files per second on a local disk.
    """
    found: list[tuple[str, int]] = []
    _collect(root, "", {_identity(root)}, found)
    require(
        bool(found),
        f"a folder of images must hold at least one image ({', '.join(SUFFIXES)}) at any depth; got "
        f"{root.absolute()}, which holds none. Name another folder, or use source='photos' for built-in images.",
    )
    found.sort()
    class_of = [name.partition("/")[0] if "/" in name else NO_CLASS for name, _ in found]
    classes = sorted(set(class_of))
    numbers = {name: number for number, name in enumerate(classes)}
    return Listing(
        where=str(root),
        names=pack_names(name for name, _ in found),
        sizes=np.array([size for _, size in found], dtype=np.int64),
        labels=np.array([numbers[name] for name in class_of], dtype=np.int32),
        classes=classes,
    )


class FolderSource(ListedSource):
    """Images of a folder, each a file of its own; `ListedSource` tells what becomes of them."""

    def _read(self, position: int) -> Image.Image:
        return read_rgb(Path(self.listing.where, self.listing.names.name(position)))


def _collect(folder: Path, prefix: str, seen: set[tuple[int, int]], found: list[tuple[str, int]]) -> None:
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                subfolders.append(entry.name)
            elif is_picture_name(entry.name):
                found.append((prefix + entry.name, _size(entry)))
    # All of one level are marked before any is entered: of two ways to a folder, the shorter one names its images.
    new = [name for name in sorted(subfolders) if _is_new(folder / name, seen)]
    for name in new:
        _collect(folder / name, f"{prefix}{name}/", seen, found)


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1  # a dangling link: listed, so that it is named among the unreadable


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    identity = _identity(folder)
    new = identity not in seen
    seen.add(identity)
    return new


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
