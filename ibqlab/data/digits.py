"""`digits`: the 1,797 handwritten digits that ship with scikit-learn."""

import hashlib
from functools import cache

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image

from ibqlab.data.source import Sample, Split

VALIDATION_IMAGES = 360
SPLIT_SEED = 0


class DigitsSource:
    """Scanned digits 0 to 9, 8 × 8 pixels of 17 grey levels, enlarged (bilinear) to `image_size`, three equal channels.

    1,437 for training and 360 for validation, each class in its share, the same split for ever. Never cropped and never
    mirrored, because a mirrored digit is no digit: an image is the same whatever the seed.

    Args:
        image_size: height and width in pixels; 8 is the size of the scans.
        split: which of the two parts.
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test set), as `sklearn.datasets.load_digits`.
    """

    endless = False

    def __init__(self, *, image_size: int, split: Split) -> None:
        scans, labels = _read_scans()
        chosen = split_digits(labels)[split]
        grey = scans[chosen]
        size, bilinear = (image_size, image_size), Image.Resampling.BILINEAR
        is_scan = size == grey.shape[1:]  # resizing to the same size changes nothing and takes a while
        self.images = grey if is_scan else np.stack([Image.fromarray(scan).resize(size, bilinear) for scan in grey])
        self.labels = labels[chosen].tolist()
        self.classes = [str(digit) for digit in range(10)]
        self.fingerprint = hashlib.sha256(grey.tobytes() + bytes(self.labels)).hexdigest()[:16]
        self.description = f"{len(chosen)} handwritten digits for {split}, {image_size} × {image_size} pixels"

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, seed: int) -> Sample:
        """The digit `index`, 0 to len − 1; nothing is random, so `seed` changes nothing."""
        grey = torch.from_numpy(self.images[index])
        return Sample(grey.expand(3, -1, -1).contiguous(), self.labels[index])


@cache
def _read_scans() -> tuple[UInt8[np.ndarray, "N 8 8"], Int64[np.ndarray, "N"]]:
    """All scans in grey levels 0 to 255, and their classes; read once in a process."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second, and only digits need it

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def split_digits(labels: Int64[np.ndarray, "N"]) -> dict[Split, Int64[np.ndarray, "N_split"]]:
    """Which scans belong to which split: 360 for validation, each class in its share of the whole.

    Args:
        labels: class per scan, 0 to 9.
    Returns:
        Indices per split, in an order that mixes the classes, so that the first n validation images are a fair sample.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    # Walking through each class in step and taking every fifth-or-so scan keeps all shares within one image.
    by_class = order[np.argsort(labels[order], kind="stable")]
    picks = (np.arange(VALIDATION_IMAGES) * len(labels)) // VALIDATION_IMAGES
    validation = np.isin(order, by_class[picks])
    return {"train": order[~validation], "validation": order[validation]}
