"""What an image source is, and the settings that choose one."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from ibqlab.base.checks import IMAGE_SIDE, WORKERS, require, require_at_most, require_choice
from ibqlab.base.resources import BUILT_IN
from ibqlab.data.resizing import RESIZERS

Split = Literal["train", "validation"]
Unreadable = Literal["skip", "stop"]
"""What becomes of an image that cannot be read: it is left out, or the work stops at it."""
VALIDATION_SHARE = 0.1
"""Share of a folder's images that are held back for validation, where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images are trained on, and which are held back for validation."""

    source: str = "photos"
    """`photos`, `digits`, the path of a folder of images (write `./photos` for a folder of that name), or tar shards in
    webdataset's format: a folder that holds *.tar, one .tar file, or a pattern such as `train-{000000..001281}.tar`.
    Paper: the ImageNet training set."""

    image_size: int = 32
    """Height and width of every image, 1 to 16,384 pixels; a multiple of the tokenizer's downsampling. Paper: 256."""

    resize: str = "pil"
    """How images of a folder or of shards come to `image_size`: `pil` (smooths when it shrinks), `opencv` (does not),
    `pil_bicubic` or `adm` (smooth and keep edges sharper). The published IBQ tokenizers were trained and
    evaluated with `opencv`, those of Open-MAGVIT2 with `pil`. VQGAN and VQGAN-LC evaluate with `opencv`, MaskBit and
    SimVQ with `pil`, TiTok with `pil_bicubic`, LlamaGen with `adm`."""

    flip: bool = True
    """Mirror half of the training images left to right. Digits are never mirrored. Published training: False."""

    validation_source: str | None = None
    """A folder or shards of its own for validation. None: `validation_share` of the images of `source` is held back.
    `photos` and `digits` bring their own split. Paper: the ImageNet validation set."""

    validation_share: float = VALIDATION_SHARE
    """Share of `source` held back for validation, between 0 and 1. An image's place depends on its name."""

    exclude: tuple[str, ...] = ()
    """Images of `source` left out, by file name or glob on it; with a slash: on the path inside the folder or shard.
    Held against all of `source` before any is held back for validation. Published training drops
    `n06596364_9591.JPEG`."""

    unreadable: Unreadable = "skip"
    """What becomes of an image that cannot be read, alike in training, evaluation and tokenizing. `skip`: it is left
    out, named with the reason and counted; in training, where every batch is full, another one stands in for it.
    `stop`: an error names it, as in the published code. To evaluate on exactly the published images: `stop`."""

    workers: int = 0
    """Processes that load images beside the training process, 0 to 256. They never change what is loaded."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source must name the images; got an empty text. Use 'photos', 'digits' or a folder.")
        require(self.image_size >= 1, f"image_size must be at least 1 pixel; got {self.image_size}. Use 32.")
        require_at_most("image_size", self.image_size, IMAGE_SIDE, "pixels")
        require_choice("resize", self.resize, RESIZERS)
        require_choice("unreadable", self.unreadable, get_args(Unreadable))
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share must lie between 0 and 1, both excluded; got {self.validation_share}. Use 0.1, or "
                "name a folder or shards of its own in validation_source."
            )
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0; got {self.workers}. Use 0 to load in the training process.")
        require_at_most("workers", self.workers, WORKERS, "each is a process with a copy of the list of images")
        for name, default in (("validation_source", None), ("validation_share", VALIDATION_SHARE)):
            if self.source in BUILT_IN and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is for folders and shards only, because {self.source!r} brings its own split; got "
                    f"{getattr(self, name)!r}. Use {name}={default}."
                )
        if self.exclude and self.source in BUILT_IN:
            raise ValueError(
                f"exclude names images of a folder or of shards, and {self.source!r} has no file names; got "
                f"{list(self.exclude)}. Use exclude=()."
            )


class Sample(NamedTuple):
    """One image, and the files that could not be read on the way to it."""

    image: UInt8[Tensor, "3 H W"]
    """Red, green, blue, 0 to 255."""

    label: int
    """Index into the source's `classes`; −1 for an image without a class in a source that has classes."""

    broken: tuple[str, ...] = ()
    """Names of unreadable files that this image stands in for; `UnreadableName` where the reason is known."""


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
