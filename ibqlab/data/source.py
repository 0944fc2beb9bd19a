"""What an image source is, and the settings that choose one."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

Split = Literal["train", "validation"]
BUILT_IN = ("photos", "digits")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on, and which are held back for validation."""

    source: str = "photos"
    """`photos`, `digits` or the path of a folder of images (write `./photos` for a folder of that name).
    Paper: the ImageNet training set."""

    image_size: int = 32
    """Height and width of every image in pixels, at least 1; a multiple of the tokenizer's downsampling. Paper: 256."""

    flip: bool = True
    """Mirror half of the training images left to right. Digits are never mirrored. Published training: False."""

    validation_source: str | None = None
    """A folder of images of its own for validation. None: `validation_share` of the folder `source` is held back.
    `photos` and `digits` bring their own split. Paper: the ImageNet validation set."""

    validation_share: float = 0.1
    """Share of the folder `source` held back for validation, between 0 and 1. A file's place depends on its name."""

    workers: int = 0
    """Processes that load images beside the training process, at least 0. They never change what is loaded."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source must name the images; got an empty text. Use 'photos', 'digits' or a folder.")
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel; got {self.image_size}. Use 32.")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must lie between 0 and 1, both excluded; got {self.validation_share}. Use 0.1, or "
                "name a folder of its own in validation_source."
            )
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0; got {self.workers}. Use 0 to load in the training process.")
        if self.validation_source is not None and self.source in BUILT_IN:
            raise ValueError(
                f"validation_source is for folders only, because {self.source!r} brings its own split; got "
                f"{self.validation_source!r}. Use validation_source=None."
            )


class Sample(NamedTuple):
    """One image, and the files that could not be read on the way to it."""

    image: UInt8[Tensor, "3 H W"]
    """Red, green, blue, 0 to 255."""

    label: int
    """Index into the source's `classes`; −1 for an image without a class in a source that has classes."""

    broken: tuple[str, ...] = ()
    """Names of unreadable files that this image stands in for."""


@runtime_checkable
class ImageSource(Protocol):
    """Images by number. Any object with these members can be trained on; loader processes need it to be picklable."""

    classes: list[str]
    """Class names in the order of the labels."""

    fingerprint: str
    """Identity of the content, for provenance: it changes when the images change."""

    description: str
    """One line for people."""

    endless: bool
    """True: any index, however large, gives an image, and `len` is nominal. False: indices end at `len`."""

    def __len__(self) -> int:
        """Images in one epoch."""
        ...

    def get(self, index: int, seed: int) -> Sample:
        """The image `index`; every random choice (crop, flip) comes from `seed`, 0 to 2⁶³ − 1, and nothing else."""
        ...
