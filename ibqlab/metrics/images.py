"""Image sets for evaluation: folders, shards, archives, image sources and batches of pixels behind one small interface.

Each process gets its slice of every batch together with the images' numbers, so that results which depend on the order
(splits, subsets) are the same for any number of processes.
"""

import hashlib
import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.base.cache import content_key
from ibqlab.base.checks import IMAGE_SIDE, IMAGES, require, require_at_most, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import open_ordinary
from ibqlab.data.broken import BrokenImages
from ibqlab.data.decoding import AS_STORED, ListedSource
from ibqlab.data.folder import list_file
from ibqlab.data.index import Listing, order_by_hash, printable
from ibqlab.data.opening import list_images, open_listing
from ibqlab.data.pictures import picture_size
from ibqlab.data.sampling import validation_batches
from ibqlab.data.shard_index import ShardListing
from ibqlab.data.shards import names_shards
from ibqlab.data.source import ImageSource, Unreadable
from ibqlab.metrics.weights import hash_file

SAMPLES = "samples.npz"
"""The archive in a folder that `ibqlab sample` wrote, in the order that the published evaluator reads."""


class Numbered(NamedTuple):
    """Some images of a set and which they are."""

    numbers: Int[Tensor, " B"]
    images: UInt8[Tensor, "B 3 H W"]


class Share(NamedTuple):
    """This process among those that share an evaluation."""

    rank: int
    processes: int


def this_process() -> Share:
    """Rank and number of processes; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return Share(dist.get_rank(), dist.get_world_size())
    return Share(0, 1)


class ImageSet(ABC):
    """Images of one size, in a fixed order. Subclasses say how they are read.

    Args:
        count: how many; None when only reading tells.
        resize: how they came to their size, in words.
        crop: how they were cut.
    """

    side: tuple[int, int] | None = None
    """Height and width where known before reading."""

    def __init__(self, description: str, count: int | None, resize: str = "as given", crop: str = "none") -> None:
        self.description, self.count, self.resize, self.crop = description, count, resize, crop
        self.broken: list[str] = []

    def describe(self, evaluated: int, unreadable: int) -> str:
        """The set as it was evaluated: "5 of 6 images of pictures" where one is unreadable."""
        return f"{evaluated:,} of {self.description}" if unreadable else self.description

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """This process's slices of the batches; `batch_size` counts the images over all processes."""

    def content(self) -> str | None:
        """Hash of all that decides the pixels; None when they can be read only once."""
        return None


class SourceImages(ImageSet):
    """The first `count` images of an ImageSource, in its own size."""

    def __init__(self, source: ImageSource, count: int, resize: str = "by the image source", crop: str = "") -> None:
        super().__init__(source.description, count, resize, crop)
        self.source = source
        self.side = self.side or tuple(source.get(0, 0).image.shape[1:])

    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """As in `ImageSet`; unreadable images are left out, and `broken` names them."""
        rank, processes = this_process()
        loader = validation_batches(
            self.source, images=self.count, batch_size=batch_size, rank=rank, world_size=processes
        )
        collector = BrokenImages()
        for batch in loader:
            collector.add(batch.broken)
            self.broken = collector.names
            if len(batch.images):
                yield Numbered(torch.tensor(batch.numbers), batch.images)

    def content(self) -> str:
        """As in `ImageSet`."""
        digest = hashlib.sha256()
        for number in range(self.count):
            sample = self.source.get(number, 0)
            if not sample.broken:
                digest.update(np.ascontiguousarray(sample.image.numpy()).tobytes())
        return content_key(pixels=digest.hexdigest(), side=self.side, count=self.count)


class FileImages(SourceImages):
    """Image files of a folder or of shards; a folder's sorted by name, shards' in an order that mixes the classes.

    With a limit, so many evenly spaced over a folder's list, or the first of the shards' order.

    Args:
        listing: what the folder or the shards hold.
        description: of the set, for cards.
        resize, image_size, crop: as in a protocol.
        limit: images at most.
        unreadable: "skip" or "stop".
    Raises:
        ValueError: stored sizes that differ where nothing resizes them, or an unreadable image with "stop".
    """

    def __init__(
        self,
        listing: Listing,
        name: str,
        *,
        resize: str,
        image_size: int,
        crop: str,
        limit: int | None,
        unreadable: Unreadable,
    ) -> None:
        source = open_listing(
            listing,
            _chosen(listing, limit),
            labels=listing.labels,
            classes=listing.classes,
            image_size=image_size,
            resize=resize,
            split="validation",
            unreadable=unreadable,
        )
        source.description = f"{len(source):,} images of {printable(name)}"
        self.side = _stored_size(source) if resize == AS_STORED else (image_size, image_size)
        words = "as stored" if resize == AS_STORED else f"{resize} to {image_size}"
        super().__init__(source, len(source), words, crop)

    def content(self) -> str:
        """As in `ImageSet`."""
        positions = self.source.positions.tolist()
        names = [self.source.listing.names.name(position) for position in positions]
        hashes = [_hash_picture(self.source, position) for position in positions]
        # What was kept with unreadable files left out must not spare "stop" from reading them.
        rules = {"resize": self.resize, "crop": self.crop, "unreadable": self.source.unreadable}
        return content_key(names=names, files=hashes, **rules)


class BatchImages(ImageSet):
    """Batches of pixels as they come: an array, a list of batches, or anything that yields batches."""

    def __init__(self, batches: Iterable[Any], count: int | None, limit: int | None, description: str) -> None:
        super().__init__(description, count if limit is None or count is None else min(count, limit))
        self.iterable, self.limit = batches, limit

    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """As in `ImageSet`."""
        rank, processes = this_process()
        seen = 0
        for batch in self.iterable:
            images = check_pixels(batch, self.side)
            self.side = tuple(images.shape[2:])
            for part in images[: None if self.limit is None else self.limit - seen].split(batch_size):
                numbers = torch.arange(seen, seen + len(part)).tensor_split(processes)[rank]
                seen += len(part)
                if len(numbers):
                    yield Numbered(numbers, part.tensor_split(processes)[rank])
            if seen == self.limit:
                return

    def content(self) -> str | None:
        """As in `ImageSet`."""
        if self.count is None:
            return None
        digest = hashlib.sha256()
        for batch in self.iterable:
            digest.update(np.ascontiguousarray(check_pixels(batch, None).numpy()).tobytes())
        return content_key(pixels=digest.hexdigest(), side=self.side, count=self.count)


class NpzImages(BatchImages):
    """The array `arr_0` (N, H, W, 3) uint8 of an archive, read piece by piece: it may be larger than the memory.

    Raises:
        ValueError: no such array, another type or shape, no image, or less in the file than it says.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        with open_array(path, "arr_0") as array:
            shape = array.shape
            require(
                array.dtype == np.uint8 and len(shape) == 4 and shape[3] == 3,
                f"arr_0 of {path} must be uint8 (N, H, W, 3); got {array.dtype} {shape}",
            )
            require(
                min(shape) > 0 and max(shape[1:3]) <= IMAGE_SIDE and shape[0] <= IMAGES,
                f"arr_0 of {path} must hold at least 1 image, of 1 to {IMAGE_SIDE:,} pixels a side; got {shape}",
            )
            require(
                array.c_order, f"arr_0 of {path} must be stored in C order; save np.ascontiguousarray(images) again"
            )
        super().__init__(_NpzBatches(path), shape[0], limit, f"{shape[0]:,} images of {printable(path.name)}")
        self.side, self.path = shape[1:3], path

    def content(self) -> str:
        """As in `ImageSet`."""
        return content_key(file=hash_file(self.path), count=self.count)


class _NpzBatches:
    """Batches (256, 3, H, W) of an archive, each time from the start."""

    ROWS = 256

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
        with open_array(self.path, "arr_0") as array:
            shape = array.shape
            for start in range(0, shape[0], self.ROWS):
                rows = min(self.ROWS, shape[0] - start)
                pixels = array.read(rows * math.prod(shape[1:])).reshape(rows, *shape[1:])
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class StoredArray:
    """An array inside an .npz, open at its first value."""

    shape: tuple[int, ...]
    dtype: np.dtype
    c_order: bool
    """Rows one after another; False: columns (Fortran's order)."""
    stream: IO[bytes]

    def read(self, count: int) -> np.ndarray:
        """The next `count` values, (count,).

        Raises:
            ValueError: there are fewer.
        """
        data = bytearray(self.stream.read(count * self.dtype.itemsize))
        require(len(data) == count * self.dtype.itemsize, "it ends before its last value")
        return np.frombuffer(data, self.dtype)


@contextmanager
def open_array(path: Path, name: str) -> Iterator[StoredArray]:
    """An array of an .npz to be read piece by piece.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no archive, no such array, Python objects, or more values than the file says it has bytes for; or
            the archive turns out to be damaged while it is read.
    """
    with _open_archive(path) as archive:
        names = _names(archive)
        require(
            name in names,
            f"{path} must hold an array {name}, uint8 (N, H, W, 3); it holds "
            f"{', '.join(map(for_terminal, names[:10])) or 'no array'}",
        )
        with archive.open(f"{name}.npy") as stream:
            array = _array_at(stream, f"{name} of {path}")
            claimed = math.prod(array.shape) * array.dtype.itemsize
            stored = archive.getinfo(f"{name}.npy").file_size - stream.tell()
            require(
                claimed == stored,
                f"{name} of {path} says shape {array.shape}, {claimed:,} bytes, and holds {stored:,}. Write it again "
                "with np.savez",
            )
            yield array


def stored_names(path: Path) -> list[str]:
    """Names of the arrays of an .npz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no archive.
    """
    with _open_archive(path) as archive:
        return _names(archive)


@contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """An .npz; what its damage makes zipfile and zlib raise becomes a ValueError."""
    with open_ordinary(path) as file:
        require(zipfile.is_zipfile(file), f"{path} must be an .npz archive; its content is not. Write it with np.savez")
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({for_terminal(error)}); write it again with np.savez") from error


def _names(archive: zipfile.ZipFile) -> list[str]:
    names = [entry.filename for entry in archive.infolist()]
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def _array_at(stream: IO[bytes], place: str) -> StoredArray:
    """The array whose header the stream is at."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    # NumPy parses the header as a Python literal, whose errors are of many kinds.
    except Exception as error:
        raise ValueError(f"{place} is no array ({for_terminal(error)}). Write it again with np.savez") from error
    require(not dtype.hasobject, f"{place} must hold numbers; it holds Python objects, which could run a program")
    return StoredArray(shape, dtype, not fortran, stream)


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
        listing = _open_path(os.path.expanduser(images), limit)
        if isinstance(listing, ImageSet):
            return listing
        return FileImages(
            listing,
            Path(images).name or str(images),
            resize=resize,
            image_size=image_size,
            crop=crop,
            limit=limit,
            unreadable=unreadable,
        )
    if isinstance(images, ImageSource):
        require(
            limit is not None or not images.endless,
            f"{images.description} has no end; say how many images to evaluate on: limit={len(images)}",
        )
        count = limit if images.endless else min(len(images), limit or len(images))
        require(count > 0, "an evaluation needs at least 1 image; the image source is empty")
        return SourceImages(images, count)
    return _open_batches(images, limit)


def check_pixels(batch: Any, side: tuple[int, int] | None) -> UInt8[Tensor, "B 3 H W"]:
    """A batch of pixels; refused unless it is uint8, (B, 3, H, W), and of the size of those before it."""
    images = torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch
    require(
        isinstance(images, Tensor),
        f"a batch must be a uint8 tensor (B, 3, H, W); got {type(batch).__name__}. Of (images, labels) give the images",
    )
    require(
        images.dtype == torch.uint8,
        f"images must be uint8, 0 to 255; got {images.dtype}. Use ibqlab.metrics.truncate_to_uint8(images) for [−1, 1]",
    )
    require(
        min(images.shape[1:], default=1) > 0,
        f"images must have pixels; got {tuple(images.shape)}. Look at how they were cut",
    )
    channels_last = images.ndim == 4 and images.shape[-1] == 3
    require(
        images.ndim == 4 and images.shape[1] == 3,
        f"images must be (B, 3, H, W); got {tuple(images.shape)}"
        + (". Use images.permute(0, 3, 1, 2)" if channels_last else ""),
    )
    require(
        side is None or tuple(images.shape[2:]) == tuple(side),
        f"images must have one size; got {images.shape[2]} × {images.shape[3]} after {side and side[0]} × "
        f"{side and side[1]} pixels. Resize and crop them first, or give a folder and a protocol that resizes",
    )
    return images


def _open_path(path: str, limit: int | None) -> Listing | NpzImages:
    """What lies at a path, as a listing of files or as an archive."""
    if os.path.isfile(os.path.join(path, SAMPLES)):
        return NpzImages(Path(path, SAMPLES), limit)
    if os.path.isfile(path) and path.endswith(".npz"):
        return NpzImages(Path(path), limit)
    if os.path.isdir(path) or names_shards(path):
        return list_images(path, "images")
    if os.path.isfile(path):
        return list_file(Path(path))
    if "{" in path:
        return list_images(path, "images")
    state = "that is no ordinary file" if os.path.exists(path) else "there is no such one"
    raise FileNotFoundError(
        f"images must be a folder, tar shards, a picture or an .npz file; {state} at "
        f"{for_terminal(os.path.abspath(path))}"
    )


def _chosen(listing: Listing, limit: int | None) -> Int[np.ndarray, " N"]:
    """Positions of the images that are evaluated."""
    positions = np.arange(len(listing))
    if isinstance(listing, ShardListing):
        return order_by_hash(listing, positions)[:limit]
    if limit is None or limit >= len(listing):
        return positions
    return positions[[number * len(listing) // limit for number in range(limit)]]


def _hash_picture(source: ListedSource, position: int) -> str:
    try:
        file = source.file(position)
        return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else hash_file(file)
    except (OSError, ValueError) as error:
        return f"unreadable: {type(error).__name__}"


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
    opened = BatchImages(images, count, limit, "an array of pixels")
    opened.side = side
    return opened


def _stored_size(source: ListedSource) -> tuple[int, int]:
    """Height and width that all files share, from their headers."""
    sizes: dict[tuple[int, int], str] = {}
    for index, position in enumerate(source.positions.tolist()):
        try:
            sizes.setdefault(tuple(picture_size(source.file(position), source.name(index))), source.name(index))
        except (OSError, ValueError) as error:
            if source.unreadable == "stop":
                raise ValueError(
                    f"every image must be readable with unreadable='stop'; {error}. Repair or remove it, or use "
                    "unreadable='skip'"
                ) from error
    require(bool(sizes), f"at least one image must be readable; none of {source.description} is. Replace the files")
    listing = ", ".join(
        f"{height} × {width} ({for_terminal(name.rpartition('/')[2])})"
        for (height, width), name in list(sizes.items())[:3]
    )
    require(
        len(sizes) == 1,
        f"images that are not resized must have one size; got {listing}. Use a protocol that resizes, for example "
        "dataclasses.replace(protocol, name='resized', resize='pil')",
    )
    return next(iter(sizes))
