"""From what somebody gives as images to a set of images for evaluation, checked as far as it can be before reading."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Int
from torch import Tensor

from ibqlab.base.checks import IMAGES, require, require_at_most, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.data.file_list import FileList, printable
from ibqlab.data.file_source import AS_STORED, FileSource
from ibqlab.data.folder import list_file
from ibqlab.data.image_sources import list_images
from ibqlab.data.pictures import picture_size
from ibqlab.data.shard_index import ShardList
from ibqlab.data.source import ImageSource, Unreadable
from ibqlab.data.splits import order_by_hash
from ibqlab.metrics.images import BatchImages, FileImages, ImageSet, NpzImages, SourceImages, check_pixels

SAMPLES = "samples.npz"
"""The archive in a folder that `ibqlab sample` wrote, in the order that the published evaluator reads."""


def open_images(
    images: Any,
    *,
    resize: str = AS_STORED,
    image_size: int = 256,
    crop: str = "none",
    limit: int | None = None,
    unreadable: Unreadable = "skip",
) -> ImageSet:
    """A set of images from whatever holds them, checked as far as it can be before reading.

    Args:
        images: a folder of images; one picture; tar shards (a file, a folder of them, or a pattern); a folder that
            `ibqlab sample` wrote; an `.npz` with arr_0 (N, H, W, 3) uint8; an ImageSource; a uint8 tensor or list of
            tensors (B, 3, H, W); or any iterable of such batches.
        resize, image_size, crop: what is done to files of a folder or of shards.
        limit: how many images at most. A folder gives evenly spaced ones, everything else the first.
        unreadable: what becomes of a file that cannot be read, as `DataConfig.unreadable` has it; an ImageSource has
            its own.
    Raises:
        FileNotFoundError: no such folder, file or archive.
        ValueError: no images, other types, mixed sizes, an endless source without a limit, or an unreadable file with
            unreadable="stop".
    """
    require(limit is None or limit >= 1, f"limit must be at least 1 image, or None for all; got {limit}")
    require_at_most("limit", limit or 1, IMAGES, "images")
    require_choice("unreadable", unreadable, get_args(Unreadable))
    if isinstance(images, (str, Path)):
        files = _open_path(os.path.expanduser(images), limit)
        if isinstance(files, ImageSet):
            return files
        source = FileSource(
            files,
            _evaluated(files, limit),
            labels=files.labels,
            classes=files.classes,
            image_size=image_size,
            resize=resize,
            split="validation",
            unreadable=unreadable,
        )
        source.description = f"{len(source):,} images of {printable(Path(images).name or str(images))}"
        is_stored = resize == AS_STORED
        side = _stored_size(source) if is_stored else (image_size, image_size)
        return FileImages(source, len(source), side, "as stored" if is_stored else f"{resize} to {image_size}", crop)
    if isinstance(images, ImageSource):
        require(
            limit is not None or not images.endless,
            f"{images.description} has no end; say how many images to evaluate on: limit={len(images)}",
        )
        count = limit if images.endless else min(len(images), limit or len(images))
        require(count > 0, "an evaluation needs at least 1 image; the image source is empty")
        return SourceImages(images, count)
    return _open_batches(images, limit)


def _open_path(path: str, limit: int | None) -> FileList | NpzImages:
    """What lies at a path, as a list of files or as an archive."""
    if os.path.isfile(os.path.join(path, SAMPLES)):
        return NpzImages(Path(path, SAMPLES), limit)
    if os.path.isfile(path) and path.endswith(".npz"):
        return NpzImages(Path(path), limit)
    if os.path.isfile(path) and not path.endswith(".tar"):
        return list_file(Path(path))
    if os.path.isdir(path) or path.endswith(".tar") or "{" in path:
        return list_images(path, "images")
    state = "that is no ordinary file" if os.path.exists(path) else "there is no such one"
    raise FileNotFoundError(
        f"images must be a folder, tar shards, a picture or an .npz file; {state} at "
        f"{for_terminal(os.path.abspath(path))}"
    )


def _evaluated(files: FileList, limit: int | None) -> Int[np.ndarray, " N"]:
    """Positions of the images that are evaluated: of shards the first in an order that mixes the classes, of a folder,
    whose names are sorted by class, evenly spaced ones.
    """
    positions = np.arange(len(files))
    if isinstance(files, ShardList):
        return order_by_hash(files, positions)[:limit]
    if limit is None or limit >= len(files):
        return positions
    return positions[[number * len(files) // limit for number in range(limit)]]


def _open_batches(images: Any, limit: int | None) -> BatchImages:
    if isinstance(images, (Tensor, np.ndarray)):
        images = [images]
    require(
        isinstance(images, Iterable),
        f"images must be a folder, an .npz, an ImageSource or batches of uint8 pixels; got {type(images).__name__}",
    )
    if not isinstance(images, Sequence):
        return BatchImages(images, None, limit, "batches of pixels")
    side = None
    for batch in images:
        side = tuple(check_pixels(batch, side).shape[2:])
    count = sum(map(len, images))
    require(count > 0, "an evaluation needs at least 1 image; got none")
    return BatchImages(images, count, limit, "an array of pixels", side)


def _stored_size(source: FileSource) -> tuple[int, int]:
    """Height and width that all files share, from their headers."""
    sizes: dict[tuple[int, int], str] = {}
    for index, position in enumerate(source.positions.tolist()):
        try:
            sizes.setdefault(picture_size(source.files.file(position), source.name(index)), source.name(index))
        except (OSError, ValueError) as error:
            if source.unreadable == "stop":
                raise ValueError(
                    f"every image must be readable with unreadable='stop'; {error}. Repair or remove it, or use "
                    "unreadable='skip'"
                ) from error
    require(bool(sizes), f"at least one image must be readable; none of {source.description} is. Replace the files")
    examples = ", ".join(
        f"{height} × {width} ({for_terminal(name.rpartition('/')[2])})"
        for (height, width), name in list(sizes.items())[:3]
    )
    require(
        len(sizes) == 1,
        f"images that are not resized must have one size; got {examples}. Use a protocol that resizes, for example "
        "dataclasses.replace(protocol, name='resized', resize='pil')",
    )
    return next(iter(sizes))
