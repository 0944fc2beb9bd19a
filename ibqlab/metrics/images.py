"""Image sets for evaluation: folders, shards, archives, image sources and batches of pixels behind one small interface.

Each process gets its slice of every batch together with the images' numbers, so that results which depend on the order
(splits, subsets) are the same for any number of processes. `evaluated_images.open_images` makes them.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.base.cache import content_key, hash_file
from ibqlab.base.checks import IMAGE_SIDE, IMAGES, require
from ibqlab.data.batches import validation_batches
from ibqlab.data.file_list import FileList, printable
from ibqlab.data.file_source import FileSource
from ibqlab.data.source import ImageSource
from ibqlab.metrics.archives import open_array

ROWS = 256
"""Images of an archive that are read at a time."""


class Numbered(NamedTuple):
    """Some images of a set and which they are."""

    numbers: Int[Tensor, " B"]
    images: UInt8[Tensor, "B 3 H W"]


def this_process() -> tuple[int, int]:
    """Rank of this process among those that share an evaluation, and their number; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class ImageSet(ABC):
    """Images of one size, in a fixed order. Subclasses say how they are read.

    Args:
        count: how many; None when only reading tells.
        side: height and width; None when only reading tells.
        resize: how they came to their size, in words.
        crop: how they were cut.
    """

    def __init__(
        self,
        description: str,
        count: int | None,
        side: tuple[int, int] | None,
        resize: str = "as given",
        crop: str = "none",
    ) -> None:
        self.description, self.count, self.side = description, count, side
        self.resize, self.crop = resize, crop
        self.broken: list[str] = []

    def describe(self, evaluated: int, unreadable: int) -> str:
        """The set as it was evaluated: "5 of 6 images of pictures" where one is unreadable."""
        return f"{evaluated:,} of {self.description}" if unreadable else self.description

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """This process's slices of the batches; `batch_size` counts the images over all processes."""

    @abstractmethod
    def content(self) -> str | None:
        """Hash of all that decides the pixels; None when they can be read only once."""

    def _hash_pixels(self, pixels: Iterable[UInt8[Tensor, "*shape"]]) -> str:
        digest = hashlib.sha256()
        for images in pixels:
            digest.update(np.ascontiguousarray(images.numpy()).tobytes())
        return content_key(pixels=digest.hexdigest(), side=self.side, count=self.count)


class SourceImages(ImageSet):
    """The first `count` images of an ImageSource, in its own size."""

    def __init__(
        self,
        source: ImageSource,
        count: int,
        side: tuple[int, int] | None = None,
        resize: str = "by the image source",
        crop: str = "",
    ) -> None:
        side = side or tuple(source.get(0, 0).image.shape[1:])
        super().__init__(source.description, count, side, resize, crop)
        self.source = source

    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """As in `ImageSet`; unreadable images are left out, and `broken` names them."""
        rank, processes = this_process()
        self.broken = []
        for batch in validation_batches(
            self.source, images=self.count, batch_size=batch_size, rank=rank, world_size=processes
        ):
            self.broken += batch.broken
            if len(batch.images):
                yield Numbered(torch.tensor(batch.numbers), batch.images)

    def content(self) -> str:
        """As in `ImageSet`."""
        samples = (self.source.get(number, 0) for number in range(self.count))
        return self._hash_pixels(sample.image for sample in samples if not sample.broken)


class FileImages(SourceImages):
    """Image files of a folder or of shards, whose content is told without decoding them."""

    source: FileSource

    def content(self) -> str:
        """As in `ImageSet`."""
        files, positions = self.source.files, self.source.positions.tolist()
        hashes = [_hash_picture(files, position) for position in positions]
        # What was stored with unreadable files left out must not spare "stop" from reading them.
        rules = {"resize": self.resize, "crop": self.crop, "unreadable": self.source.unreadable}
        return content_key(names=[files.names.name(position) for position in positions], files=hashes, **rules)


class BatchImages(ImageSet):
    """Batches of pixels as they come: an array, a list of batches, or anything that yields batches."""

    def __init__(
        self,
        batches: Iterable[Any],
        count: int | None,
        limit: int | None,
        description: str,
        side: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(description, count if limit is None or count is None else min(count, limit), side)
        self.iterable, self.limit = batches, limit

    def batches(self, batch_size: int) -> Iterator[Numbered]:
        """As in `ImageSet`."""
        rank, processes = this_process()
        count = 0
        for batch in self.iterable:
            images = check_pixels(batch, self.side)
            self.side = tuple(images.shape[2:])
            for piece in images[: None if self.limit is None else self.limit - count].split(batch_size):
                # Every process walks through all batches and takes its part of each, with the numbers of the whole set.
                numbers = torch.arange(count, count + len(piece)).tensor_split(processes)[rank]
                count += len(piece)
                if len(numbers):
                    yield Numbered(numbers, piece.tensor_split(processes)[rank])
            if count == self.limit:
                return

    def content(self) -> str | None:
        """As in `ImageSet`."""
        return None if self.count is None else self._hash_pixels(check_pixels(batch, None) for batch in self.iterable)


class NpzImages(BatchImages):
    """The array `arr_0` (N, H, W, 3) uint8 of an archive, read piece by piece.

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
        super().__init__(self, shape[0], limit, f"{shape[0]:,} images of {printable(path.name)}", shape[1:3])
        self.path = path

    def __iter__(self) -> Iterator[UInt8[Tensor, "B 3 H W"]]:
        with open_array(self.path, "arr_0") as array:
            shape = array.shape
            for start in range(0, shape[0], ROWS):
                rows = min(ROWS, shape[0] - start)
                pixels = array.read(rows * math.prod(shape[1:])).reshape(rows, *shape[1:])  # (rows, H, W, 3)
                yield torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def content(self) -> str:
        """As in `ImageSet`."""
        return content_key(file=hash_file(self.path), count=self.count)


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


def _hash_picture(files: FileList, position: int) -> str:
    try:
        file = files.file(position)
        return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else hash_file(file)
    except (OSError, ValueError) as error:
        return f"unreadable: {type(error).__name__}"
