"""Writes tar shards in webdataset's format, for disks and networks that dislike a million small files."""

import json
import shutil
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ibqlab.base.checks import require
from ibqlab.base.files import expanded, explained, force_to_disk, read_bytes, sweep, temporary_beside
from ibqlab.base.progress import track_items
from ibqlab.data.folder import list_folder
from ibqlab.data.shard_index import CLASSES_FILE, PICTURE_BYTES
from ibqlab.data.source import ImageSource

Entry = dict[str, Any]
"""An image as webdataset writes it: the key as `__key__`, the file by its suffix, and the label as `cls`."""


def write_shards(
    source: str | Path | ImageSource, target: str | Path, *, images_per_shard: int = 1000, progress: bool = True
) -> list[Path]:
    """Write a folder of images, or the images of a source, as tar shards.

    The files of a folder are copied byte for byte, sorted by name; an image keeps its relative name, so the shards have
    the same order, labels and validation split as the folder. Any other source is written image by image as PNG, as
    `get(index, 0)` gives it. `classes.json` beside the shards keeps the class names.

    Args:
        source: a folder, or a source (of an endless one, the `len(source)` first images).
        target: folder for the shards, named after it: `train-000000.tar`, … in a folder `train`. It must not exist, or
            be empty; it appears only when it is complete.
        images_per_shard: at least 1.
        progress: show a bar.
    Returns:
        The shards in order.
    Raises:
        ValueError: target holds something, images_per_shard below 1, two images with one key, an unreadable image of a
            source, or a file that is none or larger than 1 GiB.
        FileNotFoundError: there is no such folder.
        RunError: the disk is full, or the folder may not be written to.
        ImportError: webdataset is not installed.
    """
    writer_class = _load_writer()
    target = expanded(target)
    require(images_per_shard >= 1, f"images_per_shard must be at least 1, got {images_per_shard}; use 1000")
    require(
        not target.exists() or (target.is_dir() and not any(target.iterdir())),
        f"shards are written into a new or empty folder; {target.absolute()} holds something. Name another folder, or "
        "delete that one.",
    )
    classes, count, entries = _read_folder(Path(source)) if isinstance(source, str | Path) else _read_source(source)
    sweep(target.parent)
    unfinished = temporary_beside(target)
    try:
        with explained(target):
            unfinished.mkdir(parents=True)
            (unfinished / CLASSES_FILE).write_text(json.dumps(classes, indent=0), encoding="utf-8")
        entries = track_items(entries, f"writing {target.name}", "images", total=count, shown=progress)
        names = _write(entries, unfinished, target, images_per_shard, writer_class)
        with explained(target):
            for name in (*names, CLASSES_FILE):
                force_to_disk(unfinished / name)
            force_to_disk(unfinished)
            # A rename takes the place of an empty folder.
            unfinished.rename(target)
            force_to_disk(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return [target / name for name in names]


def _write(
    entries: Iterable[Entry], folder: Path, target: Path, images_per_shard: int, writer_class: type
) -> list[str]:
    """Write the shards into a folder that will become `target`. Returns their names."""
    names: list[str] = []
    keys: set[str] = set()
    file = tar = None
    try:
        for number, entry in enumerate(entries):
            require(
                entry["__key__"] not in keys,
                f"an image is known by its name up to the first dot, with dots inside turned into underscores; "
                f"{entry['__key__']!r} stands for two images. Rename one of them.",
            )
            keys.add(entry["__key__"])
            with explained(target):
                if number % images_per_shard == 0:
                    _close(tar, file)
                    names.append(f"{target.name}-{len(names):06}.tar")
                    file = (folder / names[-1]).open("wb")
                    # A fixed time and PAX headers: the same images give the same bytes, and names may be long.
                    tar = writer_class(file, encoder=False, mtime=0, format="PAX_FORMAT")
                tar.write(entry)
    finally:
        with explained(target):
            _close(tar, file)
    return names


def _close(tar: object, file: object) -> None:
    for open_one in (tar, file):
        if open_one is not None:
            open_one.close()


def _read_folder(root: Path) -> tuple[list[str], int, Iterator[Entry]]:
    root = expanded(root)
    if not root.is_dir():
        raise FileNotFoundError(f"source must be an existing folder or an image source; there is none at {root}")
    files = list_folder(root)

    def entries() -> Iterator[Entry]:
        for name, label in zip(files.names.all(), files.labels.tolist(), strict=True):
            stem, _, extension = name.rpartition(".")
            folder, slash, base = stem.rpartition("/")
            content, key = read_bytes(root / name, PICTURE_BYTES), folder + slash + base.replace(".", "_")
            yield {"__key__": key, extension: content, "cls": str(label).encode()}

    return files.classes, len(files), entries()


def _read_source(source: ImageSource) -> tuple[list[str], int, Iterator[Entry]]:
    def entries() -> Iterator[Entry]:
        for index in range(len(source)):
            sample = source.get(index, 0)
            require(
                not sample.broken,
                f"every image to be written must be readable; {', '.join(sample.broken)} cannot be read. Exclude it.",
            )
            content = BytesIO()
            Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(content, format="PNG")
            yield {"__key__": f"{index:08}", "png": content.getvalue(), "cls": str(sample.label).encode()}

    return list(source.classes), len(source), entries()


def _load_writer() -> type:
    try:
        from webdataset import TarWriter  # noqa: PLC0415 - optional, and only writing needs it
    except ImportError as error:
        raise ImportError(
            "writing shards needs webdataset, which cannot be imported here. Type pip install 'ibqlab[data]'."
        ) from error
    return TarWriter
