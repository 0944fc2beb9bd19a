"""A folder of images of your own, with or without class sub-folders."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from ibqlab.data.source import Sample, Split

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
NO_CLASS = "(no class)"


class ImageFile(NamedTuple):
    """An image below the root of a folder."""

    name: str
    """Path relative to the root, with forward slashes on every system."""

    size: int
    """Bytes."""

    @property
    def class_name(self) -> str:
        """First sub-folder under the root; NO_CLASS for a file that lies in the root itself."""
        parts = PurePosixPath(self.name).parts
        return parts[0] if len(parts) > 1 else NO_CLASS


def list_images(root: Path) -> list[ImageFile]:
    """Every image below a folder, sorted by name.

    Links to folders are followed, each folder once. Names that begin with a dot (thumbnails, notebook checkpoints) are
    left out.

    Args:
        root: an existing folder.
    Returns:
        At least one image file.
    Raises:
        ValueError: there is no image below the folder.
        OSError: a sub-folder cannot be listed.
    """
    files = []
    seen = {_identity(root)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_refuse):
        subfolders[:] = [name for name in sorted(subfolders) if _is_new(Path(folder, name), seen)]
        images = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        files += [_image_file(Path(folder, name), root) for name in images]
    if not files:
        raise ValueError(
            f"a folder of images must hold at least one image ({', '.join(SUFFIXES)}) at any depth; got "
            f"{root.absolute()}, which holds none. Name another folder, or use source='photos' for built-in images."
        )
    return sorted(files)


def split_by_name(files: list[ImageFile], share: float, root: Path) -> dict[Split, list[ImageFile]]:
    """Training and validation files; a file's place depends on its own name, so adding files moves no other.

    A name whose hash lies in the lowest `share` of the range is validation. Should that leave one part of a small
    folder empty, the file with the nearest hash fills it.

    Args:
        files: what the folder holds.
        share: of the files for validation, between 0 and 1.
        root: for the message.
    Returns:
        Files per split, each at least one: training sorted by name, validation by hash, so that the first n of them are
        a fair sample of all classes.
    Raises:
        ValueError: a single file cannot be split.
    """
    if len(files) < 2:
        raise ValueError(
            f"a folder is split into training and validation images and must hold at least 2; got 1 in "
            f"{root.absolute()}. Add images, or name a folder of its own in validation_source."
        )
    ordered = sorted(files, key=_hash)
    count = sum(_hash(file) < share for file in files)
    count = min(max(count, 1), len(files) - 1)
    return {"train": sorted(ordered[count:]), "validation": ordered[:count]}


class FolderSource:
    """Images of a folder: short side resized to `image_size`, then a square crop.

    Training: random crop, and a flip in half of the cases. Validation: centre crop. The resize is PIL's bilinear
    filter, which smooths when it shrinks; the published IBQ configurations resize without smoothing (OpenCV), those of
    Open-MAGVIT2 as here. Everything becomes RGB: transparency is dropped, 16-bit grey is scaled to 8 bits, of an
    animation the first picture counts. The EXIF orientation is ignored, as in the published loaders. An unreadable file
    is replaced by the next readable one in order, and `Sample.broken` names it.

    Args:
        root: the folder.
        files: the part of it that belongs to this split.
        classes_of: the files that define the classes (those of the training folder).
        image_size: height and width in pixels.
        split: "train" crops and mirrors at random, "validation" never does.
        flip: mirror half of the training images.
    Raises:
        ValueError: a class folder in `files` that `classes_of` lacks.
    """

    endless = False

    def __init__(
        self,
        root: Path,
        files: list[ImageFile],
        *,
        classes_of: list[ImageFile],
        image_size: int,
        split: Split,
        flip: bool = False,
    ) -> None:
        self.root, self.image_size, self.split, self.flip = root, image_size, split, flip
        self.files = files if split == "train" else sorted(files, key=_hash)
        self.classes = sorted({file.class_name for file in classes_of})
        self.labels = _labels(self.files, self.classes, root)
        self.fingerprint = _fingerprint(self.files)
        self.description = f"{len(files)} images for {split} in {len(self.classes)} classes, from {root}"

    def __len__(self) -> int:
        return len(self.files)

    def get(self, index: int, seed: int) -> Sample:
        """The image `index`, 0 to len − 1, or the next readable one; crop and flip come from `seed` (training only).

        Raises:
            ValueError: no file of this split can be read.
        """
        broken = []
        for attempt in range(len(self.files)):
            place = (index + attempt) % len(self.files)
            try:
                picture = read_rgb(self.root / self.files[place].name)
            except Exception as error:  # decoders raise almost anything on damaged data
                broken.append(self.files[place].name)
                reason = error
                continue
            pixels = self._crop(resize_short_side(picture, self.image_size), seed)
            return Sample(torch.from_numpy(pixels), self.labels[place], tuple(broken))
        raise ValueError(
            f"at least one image must be readable; all {len(self.files)} {self.split} images in "
            f"{self.root.absolute()} fail, the last with: {reason}. Replace the files or name another folder."
        )

    def _crop(self, picture: Image.Image, seed: int) -> UInt8[np.ndarray, "3 H W"]:
        spare = np.array([picture.width - self.image_size, picture.height - self.image_size])
        if self.split == "validation":
            left, top = np.rint(spare / 2).astype(int)
            mirrored = False
        else:
            rng = np.random.default_rng(seed)
            left, top = rng.integers(spare + 1)
            mirrored = self.flip and bool(rng.integers(2))
        pixels = np.asarray(picture.crop((left, top, left + self.image_size, top + self.image_size)))
        pixels = pixels[:, ::-1] if mirrored else pixels
        return np.array(pixels.transpose(2, 0, 1), order="C")


def read_rgb(path: Path) -> Image.Image:
    """An image file as 8-bit RGB.

    Args:
        path: of a file that PIL can open.
    Returns:
        The decoded picture in mode RGB.
    Raises:
        OSError: there is no such file, or it is truncated or no image.
        ValueError: 32 bits per value, whose range the file does not tell. Damaged data can raise other exceptions too.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError(f"{path.name} has 32-bit values of unknown range; store it with 8 or 16 bits")
        return image.convert("RGB")


def resize_short_side(picture: Image.Image, image_size: int) -> Image.Image:
    """The picture with its short side `image_size` pixels long, its long side in proportion and rounded down.

    Source: published Open-MAGVIT2 data pipeline.
    """
    short = min(picture.size)
    width, height = (image_size * side // short for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _labels(files: list[ImageFile], classes: list[str], root: Path) -> list[int]:
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({file.class_name for file in files} - numbers.keys() - {NO_CLASS})
    if unknown:
        raise ValueError(
            f"validation classes must be among the {len(classes)} classes of source; got {', '.join(unknown[:5])} in "
            f"{root.absolute()}. Rename those folders, or put all validation images into the folder itself."
        )
    return [numbers.get(file.class_name, -1) for file in files]


def _image_file(path: Path, root: Path) -> ImageFile:
    try:
        size = path.stat().st_size
    except OSError:
        size = -1  # a dangling link: listed, so that it is named among the unreadable
    return ImageFile(path.relative_to(root).as_posix(), size)


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    identity = _identity(folder)
    new = identity not in seen and not folder.name.startswith(".")
    seen.add(identity)
    return new


def _refuse(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _hash(file: ImageFile) -> float:
    return int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:8], "big") / 2**64


def _fingerprint(files: Iterable[ImageFile]) -> str:
    listing = "\n".join(f"{name}\t{size}" for name, size in sorted(files))
    return hashlib.sha256(listing.encode()).hexdigest()[:16]
