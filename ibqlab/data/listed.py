"""From a listing to samples: decode, resize, crop, mirror; an unreadable image gives its place to the next one."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from PIL import Image

from ibqlab.data.listing import Listing, fingerprint
from ibqlab.data.resizing import centre_offset, load_opencv, resize_short_side
from ibqlab.data.source import Sample, Split


class ListedSource(ABC):
    """Images of a listing: short side resized to `image_size`, then a square crop.

    Training: random crop, and a flip in half of the cases. Validation: centre crop. Everything becomes RGB:
    transparency is dropped, 16-bit grey is scaled to 8 bits, of an animation the first picture counts. The EXIF
    orientation is ignored, as in the published loaders. An unreadable image is replaced by the next readable one in
    order, and `Sample.broken` names it. A subclass says where an image is read.

    Args:
        listing: all images of the place.
        positions: the part of it that belongs to this split, in the order of the indices.
        labels: of every image of the listing, into `classes`.
        classes: class names of the training images.
        image_size: height and width in pixels.
        resize: "opencv" or "pil", see `resize_short_side`.
        split: "train" crops and mirrors at random, "validation" never does.
        flip: mirror half of the training images.
    Raises:
        ImportError: resize="opencv" without OpenCV.
    """

    endless = False

    def __init__(
        self,
        listing: Listing,
        positions: Int64[np.ndarray, "N_split"],
        *,
        labels: Int32[np.ndarray, "N"],
        classes: list[str],
        image_size: int,
        resize: str,
        split: Split,
        flip: bool = False,
    ) -> None:
        if resize == "opencv":
            load_opencv()
        self.listing, self.positions = listing, positions
        self.labels, self.classes = labels[positions], classes
        self.image_size, self.resize, self.split, self.flip = image_size, resize, split, flip
        self.fingerprint = fingerprint(listing, positions)
        self.description = f"{len(positions)} images for {split} in {len(classes)} classes, from {listing.where}"

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        """The name of the image `index`, as in `Sample.broken`."""
        return self.listing.names.name(self.positions[index])

    def get(self, index: int, seed: int) -> Sample:
        """The image `index`, 0 to len − 1, or the next readable one; crop and flip come from `seed` (training only).

        Raises:
            ValueError: no image of this split can be read.
        """
        broken = []
        for attempt in range(len(self)):
            place = (index + attempt) % len(self)
            try:
                picture = self._read(self.positions[place])
            except Exception as error:  # decoders raise almost anything on damaged data
                broken.append(self.name(place))
                reason = error
                continue
            return Sample(torch.from_numpy(self._crop(picture, seed)), int(self.labels[place]), tuple(broken))
        raise ValueError(
            f"at least one image must be readable; all {len(self)} {self.split} images in {self.listing.where} fail, "
            f"the last with: {reason}. Replace the files or name another source."
        )

    @abstractmethod
    def _read(self, position: int) -> Image.Image:
        """The image at a position of the listing, as RGB; any exception means that it cannot be read."""

    def _crop(self, picture: Image.Image, seed: int) -> UInt8[np.ndarray, "3 H W"]:
        side = self.image_size
        pixels = resize_short_side(picture, side, self.resize)
        height, width = pixels.shape[:2]
        if self.split == "validation":
            top, left = centre_offset(height, width, side, self.resize)
            mirrored = False
        else:
            rng = np.random.default_rng(seed)
            left, top = rng.integers(np.array([width - side, height - side]) + 1)
            mirrored = self.flip and bool(rng.integers(2))
        square = pixels[top : top + side, left : left + side]
        square = square[:, ::-1] if mirrored else square
        return np.array(square.transpose(2, 0, 1), order="C")
