"""`photos`: crops from photographs that lie inside installed wheels; nothing is downloaded.

The files are opened by path, without importing the packages that carry them. Where scikit-image is not installed, the
two photographs of scikit-learn remain; `description` and `fingerprint` say which are there.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ibqlab.data.pictures import read_rgb
from ibqlab.data.source import Sample, Split

VALIDATION_WIDTH = 0.2
VALIDATION_SEED = 20_241_204
MINIMUM_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Photo:
    """Where a photograph lies and whom to credit."""

    name: str
    package: str
    file: str
    licence: str
    credit: str
    frame: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom of the usable part in pixels; None: all of it."""


PHOTOS = (
    Photo(
        name="china",
        package="sklearn",
        file="datasets/images/china.jpg",
        licence="CC BY 2.0",
        credit="danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/",
    ),
    Photo(
        name="flower",
        package="sklearn",
        file="datasets/images/flower.jpg",
        licence="CC BY 2.0",
        credit="vultilion, https://www.flickr.com/photos/vultilion/6056698931/",
    ),
    Photo(name="astronaut", package="skimage", file="data/astronaut.png", licence="public domain", credit="NASA"),
    Photo(name="chelsea", package="skimage", file="data/chelsea.png", licence="CC0", credit="Stefan van der Walt"),
    Photo(name="coffee", package="skimage", file="data/coffee.png", licence="CC0", credit="Rachel Michetti"),
    Photo(name="rocket", package="skimage", file="data/rocket.jpg", licence="public domain", credit="SpaceX"),
    Photo(
        name="hubble_deep_field",
        package="skimage",
        file="data/hubble_deep_field.jpg",
        licence="public domain",
        credit="NASA, HubbleSite",
    ),
    Photo(
        name="retina",
        package="skimage",
        file="data/retina.jpg",
        licence="CC0",
        credit="Mikael Häggström",
        frame=(280, 280, 1130, 1130),  # inside the disc: around it the picture is black
    ),
    Photo(
        name="immunohistochemistry",
        package="skimage",
        file="data/ihc.png",
        licence="no known copyright restrictions",
        credit="Center for Microscopy and Molecular Imaging (CMMI)",
    ),
)


def split_columns(width: int, image_size: int) -> dict[Split, slice]:
    """The two disjoint regions of a photograph: right-hand columns for validation, the others for training.

    Validation takes a fifth of the width, or `image_size` where that is more.

    Args:
        width: of the photograph, in pixels.
        image_size: side of a crop, in pixels; at most half the width.
    Returns:
        Columns per split.
    """
    border = width - max(image_size, round(VALIDATION_WIDTH * width))
    return {"train": slice(0, border), "validation": slice(border, width)}


def largest_crop(height: int, width: int) -> int:
    """The largest crop, in pixels, that both regions of a photograph can hold."""
    return min(height, width // 2)


class PhotosSource:
    """Random square crops of the built-in photographs at their own resolution.

    Training: a photograph, a position and a flip, each uniform. Validation: crop number i is fixed for ever and never
    mirrored. Validation crops may overlap each other, never a training crop: the regions share no pixel. Both are
    endless: `len` is how many crops fit side by side, at least 1024, and only says how long an epoch is called.

    Args:
        image_size: side of a crop in pixels.
        split: which region of each photograph.
        flip: mirror half of the training crops.
    Raises:
        ValueError: the regions cannot hold a crop of that size; or no photograph is installed.
    """

    endless = True

    def __init__(self, *, image_size: int, split: Split, flip: bool) -> None:
        installed = [(photo, path) for photo in PHOTOS if (path := _find(photo)) is not None]
        if not installed:
            raise ValueError(
                "source='photos' needs scikit-learn or scikit-image. Install one: pip install scikit-learn."
            )
        pictures = [_read(photo, path) for photo, path in installed]
        largest = min(largest_crop(*picture.shape[:2]) for picture in pictures)
        if image_size > largest:
            raise ValueError(
                f"a crop of the photographs must lie wholly in its training or validation region; got image_size="
                f"{image_size}, and the largest possible is {largest}. Use image_size={largest} or less, or a "
                "folder of larger images."
            )
        self.image_size, self.split, self.flip = image_size, split, flip
        # Copies: a loader process is sent these regions, not the whole photographs behind views.
        self.regions = [picture[:, split_columns(picture.shape[1], image_size)[split]].copy() for picture in pictures]
        self.classes = ["photo"]
        digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for _, path in installed)
        self.fingerprint = hashlib.sha256(digests).hexdigest()[:16]
        self.description = f"{image_size}-pixel {split} crops of {', '.join(photo.name for photo, _ in installed)}"

    def __len__(self) -> int:
        area = sum(region.shape[0] * region.shape[1] for region in self.regions)
        return max(MINIMUM_LENGTH, area // self.image_size**2)

    def get(self, index: int, seed: int) -> Sample:
        """Training: a crop that `seed` alone decides. Validation: the fixed crop `index`, any index from 0."""
        training = self.split == "train"
        rng = np.random.default_rng(seed if training else (VALIDATION_SEED, index))
        region = self.regions[rng.integers(len(self.regions))]
        top = rng.integers(region.shape[0] - self.image_size + 1)
        left = rng.integers(region.shape[1] - self.image_size + 1)
        crop = region[top : top + self.image_size, left : left + self.image_size]
        if training and self.flip and rng.integers(2):
            crop = crop[:, ::-1]
        return Sample(torch.from_numpy(np.array(crop.transpose(2, 0, 1), order="C")), 0)


def _find(photo: Photo) -> Path | None:
    spec = find_spec(photo.package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / photo.file
    return path if path.is_file() else None


@cache
def _read(photo: Photo, path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A photograph, decoded once for both splits and all runs of a process, and not to be written to."""
    picture = read_rgb(path)
    pixels = np.array(picture.crop(photo.frame or (0, 0, *picture.size)))
    pixels.flags.writeable = False
    return pixels
