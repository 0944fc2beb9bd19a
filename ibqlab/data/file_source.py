"""From a list of files to samples: decode, resize, crop, mirror; another image stands in for an unreadable one."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from PIL import Image

from ibqlab.base.escaping import for_terminal
from ibqlab.data.broken import UnreadableImages, UnreadableName, name_a_few
from ibqlab.data.file_list import FileList, fingerprint, printable
from ibqlab.data.pictures import UnreadablePicture, read_rgb
from ibqlab.data.resizing import check_shape, load_opencv, resize_and_crop, resize_short_side
from ibqlab.data.source import Sample, Split, Unreadable

UNREADABLE_IN_A_ROW = 1000
"""So many unreadable images one after another are no accident: the disk is gone, or these are no pictures."""
AS_STORED = "none"
"""As `resize`: pictures of one size are taken as they are, for evaluation."""


class FileSource:
    """Images of a folder or of shards: short side resized to `image_size`, then a square crop.

    Training: random crop, and a flip in half of the cases. Validation: centre crop. Everything becomes RGB:
    transparency is dropped, 16-bit grey is scaled to 8 bits, of an animation the first picture counts. The EXIF
    orientation is ignored, as in the published loaders. For an unreadable image another one of the split stands in,
    which the seed chooses, and `Sample.broken` names the unreadable one with the reason; with unreadable="stop" it is
    an error. A strip more than 100 times as long as wide counts as unreadable. Picklable, and safe in forked loader
    processes.

    Args:
        files: all images of the place.
        positions: which of them belong to this split, in the order of the indices.
        labels: of every image of the list, into `classes`.
        classes: class names of the training images.
        image_size: height and width in pixels.
        resize: one of `RESIZERS`, see `resize_short_side`; "none" leaves all pictures as they are, uncropped.
        split: "train" crops and mirrors at random, "validation" never does.
        flip: mirror half of the training images.
        unreadable: "skip" or "stop".
    Raises:
        ImportError: resize="opencv" without OpenCV.
    """

    endless = False

    def __init__(
        self,
        files: FileList,
        positions: Int64[np.ndarray, "n"],
        *,
        labels: Int32[np.ndarray, "N"],
        classes: list[str],
        image_size: int,
        resize: str,
        split: Split,
        flip: bool = False,
        unreadable: Unreadable = "skip",
    ) -> None:
        if resize == "opencv":
            load_opencv()
        self.files, self.positions = files, positions
        self.labels, self.classes = labels[positions], classes
        self.image_size, self.resize, self.split, self.flip = image_size, resize, split, flip
        self.unreadable = unreadable
        self.fingerprint = fingerprint(files, positions)
        self.description = (
            f"{len(positions)} images for {split} in {len(classes)} classes, from {printable(files.where)}"
            + (f" (files left out: {files.left_out})" if files.left_out else "")
        )

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        """The name of the image `index`, as in `Sample.broken`; what is no UTF-8 in it is escaped."""
        return self.files.name(int(self.positions[index]))

    def get(self, index: int, seed: int) -> Sample:
        """The image `index`, 0 to len − 1, or one that stands in for it; the seed decides on crop and flip (training).

        Raises:
            UnreadableImages: no image of this split can be read, or a thousand in a row cannot; with
                unreadable="stop", this one cannot.
        """
        broken: list[UnreadableName] = []
        for candidate in self._candidates(index, seed):
            picture = self.read(int(self.positions[candidate]))
            if not isinstance(picture, UnreadableName):
                return Sample(torch.from_numpy(self._crop(picture, seed)), int(self.labels[candidate]), tuple(broken))
            broken.append(picture)
        raise self._error(broken)

    def read(self, position: int) -> Image.Image | UnreadableName:
        """The image at a position of the list, as RGB; its name and the reason where it cannot be read."""
        try:
            picture = read_rgb(self.files.file(position), self.files.names.name(position))
            if self.resize != AS_STORED:
                check_shape(*picture.size, self.image_size)
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, UnreadablePicture) else str(error)
            return UnreadableName(self.files.name(position), reason)
        return picture

    def _candidates(self, index: int, seed: int) -> Iterator[int]:
        """The index itself, then those of images that may stand in for it. These begin where the seed chooses."""
        yield index
        if self.unreadable == "stop":
            return
        # Not its neighbour, which would be trained on twice in every epoch.
        first = int(np.random.default_rng((seed, index)).integers(len(self)))
        substitutes = ((first + step) % len(self) for step in range(len(self)) if (first + step) % len(self) != index)
        yield from islice(substitutes, UNREADABLE_IN_A_ROW - 1)

    def _error(self, broken: list[UnreadableName]) -> UnreadableImages:
        where, last = for_terminal(self.files.where), broken[-1]
        if self.unreadable == "stop":
            return UnreadableImages(
                f"every image must be readable with unreadable='stop'; {for_terminal(last)} in {where} is not: "
                f"{last.reason}. Repair or remove it, or set data.unreadable=skip to leave it out"
            )
        all_of_them = f"all {len(self)}" if len(broken) == len(self) else f"{len(broken):,} in a row of the"
        return UnreadableImages(
            f"at least one image must be readable; {all_of_them} {self.split} images in {where} fail, the last with: "
            f"{last.reason}. They are {name_a_few(broken)}. Replace the files or name another source."
        )

    def _crop(self, picture: Image.Image, seed: int) -> UInt8[np.ndarray, "3 H W"]:
        if self.resize == AS_STORED:
            return np.array(np.asarray(picture).transpose(2, 0, 1), order="C")
        side = self.image_size
        if self.split == "validation":
            square = resize_and_crop(picture, side, self.resize)
        else:
            pixels = resize_short_side(picture, side, self.resize)  # (H, W, 3), the shorter of H and W is `side`
            height, width = pixels.shape[:2]
            # The draws and their order are part of what a seed means: changing them changes every run.
            rng = np.random.default_rng(seed)
            left, top = rng.integers(np.array([width - side, height - side]) + 1)
            square = pixels[top : top + side, left : left + side]
            square = square[:, ::-1] if self.flip and rng.integers(2) else square
        # A copy in C order: torch refuses negative strides, and a view would keep the whole picture in memory.
        return np.array(square.transpose(2, 0, 1), order="C")
