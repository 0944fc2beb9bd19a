"""Image sets for evaluation: folders, archives, image sources and batches of pixels behind one small interface.

Each process gets its slice of every batch together with the images' numbers, so that results which depend on the order
(splits, subsets) are the same for any number of processes.
"""

import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.data.folder import list_folder
from ibqlab.data.pictures import UnreadablePicture, picture_size, read_rgb
from ibqlab.data.resizing import resize_and_crop
from ibqlab.data.sampling import validation_batches
from ibqlab.data.source import ImageSource, Sample
from ibqlab.metrics.cache import content_key
from ibqlab.metrics.weights import hash_file
from ibqlab.quantizers.base import require


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
        """As in `ImageSet`."""
        rank, processes = this_process()
        loader = validation_batches(
            self.source, images=self.count, batch_size=batch_size, rank=rank, world_size=processes
        )
        first = rank * (batch_size // processes)
        for batch in loader:
            self.broken += batch.broken
            yield Numbered(torch.arange(first, first + len(batch.images)), batch.images)
            first += batch_size

    def content(self) -> str:
        """As in `ImageSet`."""
        digest = hashlib.sha256()
        for number in range(self.count):
            digest.update(np.ascontiguousarray(self.source.get(number, 0).image.numpy()).tobytes())
        return content_key(pixels=digest.hexdigest(), side=self.side, count=self.count)


class _FolderSource:
    """Files of a folder behind the interface of an image source; an unreadable one is an error, not replaced."""

    endless = False
    classes: Sequence[str] = ()
    fingerprint = ""

    def __init__(self, files: list[Path], resize: str, side: tuple[int, int], description: str) -> None:
        self.files, self.resize, self.side, self.description = files, resize, side, description

    def __len__(self) -> int:
        return len(self.files)

    def get(self, index: int, seed: int) -> Sample:
        """The image of that number; nothing about it is random."""
        file = self.files[index]
        try:
            picture = read_rgb(file)
        except UnreadablePicture as error:
            raise ValueError(
                f"every image of an evaluation must be readable; {file} is not ({error}). Repair or remove it"
            ) from error
        pixels = np.asarray(picture) if self.resize == "none" else resize_and_crop(picture, self.side[0], self.resize)
        require(
            pixels.shape[:2] == self.side,
            f"images must be {self.side[0]} × {self.side[1]} pixels; {file} is {pixels.shape[0]} × {pixels.shape[1]}",
        )
        return Sample(torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C")), 0)


class FolderImages(SourceImages):
    """Image files below a folder, sorted by name; with a limit, so many evenly spaced over the list.

    Raises:
        ValueError: no images, or stored sizes that differ where nothing resizes them.
    """

    def __init__(self, root: Path, resize: str, image_size: int, crop: str, limit: int | None) -> None:
        files = [root / name for name in list_folder(root).names.all()]
        if limit is not None and limit < len(files):
            files = [files[index * len(files) // limit] for index in range(limit)]
        self.side = _stored_size(files) if resize == "none" else (image_size, image_size)
        words = "as stored" if resize == "none" else f"{resize} to {image_size}"
        description = f"{len(files):,} images of {root.name}"
        super().__init__(_FolderSource(files, resize, self.side, description), len(files), words, crop)
        self.root, self.files = root, files

    def content(self) -> str:
        """As in `ImageSet`."""
        names = [str(file.relative_to(self.root)) for file in self.files]
        return content_key(names=names, files=list(map(hash_file, self.files)), resize=self.resize, crop=self.crop)


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
        ValueError: no such array, or another type or shape.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        with _OpenArray(path, "arr_0") as (_, shape, dtype):
            require(
                dtype == np.uint8 and len(shape) == 4 and shape[3] == 3,
                f"arr_0 of {path} must be uint8 (N, H, W, 3); got {dtype} {shape}",
            )
        super().__init__(_NpzBatches(path), shape[0], limit, f"{shape[0]:,} images of {path.name}")
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
        with _OpenArray(self.path, "arr_0") as (stream, shape, _):
            size = int(np.prod(shape[1:]))
            for start in range(0, shape[0], self.ROWS):
                rows = min(self.ROWS, shape[0] - start)
                pixels = np.frombuffer(bytearray(stream.read(rows * size)), np.uint8).reshape(rows, *shape[1:])
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2)


class _OpenArray:
    """An array inside an .npz as (stream at its first byte, shape, dtype), without reading it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> tuple[Any, tuple[int, ...], np.dtype]:
        check_archive(self.path)
        self.archive = zipfile.ZipFile(self.path)
        if f"{self.name}.npy" not in self.archive.namelist():
            names = ", ".join(name.removesuffix(".npy") for name in self.archive.namelist())
            self.archive.close()
            raise ValueError(f"{self.path} must hold an array {self.name}, uint8 (N, H, W, 3); it holds {names}")
        stream = self.archive.open(f"{self.name}.npy")
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
        require(not fortran, f"{self.name} of {self.path} must be stored in C order; save np.ascontiguousarray(images)")
        return stream, shape, dtype

    def __exit__(self, *_: Any) -> None:
        self.archive.close()


def open_images(
    images: Any, *, resize: str = "none", image_size: int = 256, crop: str = "none", limit: int | None = None
) -> ImageSet:
    """A set of images from whatever holds them, checked as far as it can be before reading.

    Args:
        images: a folder; an `.npz` with arr_0 (N, H, W, 3) uint8; an ImageSource; a uint8 tensor or list of tensors
            (B, 3, H, W); or any iterable of such batches.
        resize, image_size, crop: what is done to the files of a folder.
        limit: how many images at most. A folder gives evenly spaced ones, everything else the first.
    Raises:
        FileNotFoundError: no such folder or archive.
        ValueError: no images, other types, mixed sizes, or an endless source without a limit.
    """
    require(limit is None or limit >= 1, f"limit must be at least 1 image, or None for all; got {limit}")
    if isinstance(images, (str, Path)):
        return _open_path(Path(images).expanduser(), resize, image_size, crop, limit)
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


def check_archive(path: Path) -> None:
    """Refuse a file that only its name makes an archive."""
    require(zipfile.is_zipfile(path), f"{path} must be an .npz archive; its content is not. Write it with np.savez")


def _open_path(path: Path, resize: str, image_size: int, crop: str, limit: int | None) -> ImageSet:
    if path.is_file() and path.suffix == ".npz":
        return NpzImages(path, limit)
    if not path.is_dir():
        raise FileNotFoundError(f"images must be a folder or an .npz file; there is no such one at {path.absolute()}")
    return FolderImages(path, resize, image_size, crop, limit)


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


def _stored_size(files: list[Path]) -> tuple[int, int]:
    """Height and width that all files share, from their headers."""
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            sizes.setdefault(picture_size(file), file)
        except UnreadablePicture as error:
            raise ValueError(f"every image must be readable; {file} is not ({error}). Repair or remove it") from error
    listing = ", ".join(f"{height} × {width} ({file.name})" for (height, width), file in list(sizes.items())[:3])
    require(
        len(sizes) == 1,
        f"images that are not resized must have one size; got {listing}. Use a protocol that resizes, for example "
        "dataclasses.replace(protocol, name='resized', resize='pil')",
    )
    return next(iter(sizes))
