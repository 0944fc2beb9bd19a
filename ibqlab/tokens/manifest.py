"""The manifest of a token store: what its tokens are, and all that they depend on. And the names of its files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibqlab.base.checks import CODES, IMAGES, WHOLE, require, require_between, require_choice
from ibqlab.base.files import read_json
from ibqlab.config import parse
from ibqlab.data.source import DataConfig, Split

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.safetensors"
UNFINISHED = "unfinished"
"""Sub-folder that holds what is done so far, until the store is complete."""
LABEL_TYPE = np.dtype(np.int32)
TOKEN_TYPES = ("uint8", "uint16", "uint32")


class TokenStoreError(RuntimeError):
    """A folder of tokens that cannot be used; the message says what stands there and what to do."""


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """What one split of a store holds."""

    images: int
    """Number of images."""
    views: int
    """Token grids per image: crops, twice as many where mirror images are stored beside them."""
    dtype: str
    """Number type of the tokens: uint8, uint16 or uint32."""
    description: str
    """The images, in one line for people."""
    fingerprint: str
    """Identity of the images, as `ImageSource.fingerprint`."""
    tokens_sha256: str = ""
    """Checksum of the file of tokens."""
    labels_sha256: str = ""
    """Checksum of the file of labels."""
    broken: tuple[str, ...] = ()
    """Names of unreadable images, which were left out. In stores of earlier versions others stand in for them."""

    def __post_init__(self):
        require_choice("dtype", self.dtype, TOKEN_TYPES)
        require_between("images", self.images, 1, IMAGES)
        require_between("views", self.views, 1, IMAGES)


@dataclass(frozen=True, kw_only=True)
class TokenManifest:
    """What a store's tokens are, and all that they depend on."""

    format: int
    """Version of the layout of the folder."""
    tokenizer: str
    """`Tokenizer.fingerprint()` of the weights that made the tokens."""
    codebook_size: int
    """K: tokens are 0 to K − 1."""
    downsampling: int
    """Pixels along a side of what the encoder makes one position of: of a token on a grid, else of a patch."""
    grid: tuple[int, int]
    """Rows and columns of tokens per image, (h, w); T = h·w. (1, T) of a tokenizer without a grid."""
    classes: tuple[str, ...]
    """Class names in the order of the labels."""
    data: DataConfig
    """The images; `flip` says whether mirror images are stored, `workers` is left at 0."""
    crops: int
    """Random crops stored of each training image."""
    flips: bool
    """Whether every training crop is followed by its mirror image."""
    seed: int
    """Seed of the crops."""
    train: SplitManifest
    """The training split."""
    validation: SplitManifest
    """The validation split: one view."""
    versions: dict[str, str]
    """Python and packages that made the store."""

    def __post_init__(self):
        require_between("codebook_size", self.codebook_size, 1, CODES)
        require_between("downsampling", self.downsampling, 1, WHOLE)
        require(
            all(1 <= side <= 2**14 for side in self.grid),
            f"grid must hold rows and columns of 1 to {2**14}, got {list(self.grid)}",
        )

    @property
    def tokens_per_image(self) -> int:
        """T = h·w, of one view."""
        return self.grid[0] * self.grid[1]

    @property
    def has_grid(self) -> bool:
        """Whether tokens lie over the image. Images are square, so a grid has as many rows as columns."""
        return self.grid[0] == self.grid[1]

    def split(self, split: Split) -> SplitManifest:
        """What the split holds."""
        return self.train if split == "train" else self.validation


def read_manifest(folder: Path) -> TokenManifest:
    """The manifest of a finished store.

    Raises:
        FileNotFoundError: there is no such folder.
        TokenStoreError: no store, an unfinished one, or one of another format.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: there is no such folder of tokens; write one with: ibqlab tokenize TOKENIZER"
        )
    if not file.is_file():
        state = "is not finished: start the same command again" if (folder / UNFINISHED).is_dir() else "holds no tokens"
        raise TokenStoreError(f"{folder} {state}; a finished one has a {MANIFEST}. Write one with: ibqlab tokenize")
    try:
        content = read_json(file)
        # An unknown format may have other fields: it is named before they are looked at.
        if content.get("format") == FORMAT:
            return parse(TokenManifest, content, source=str(file))
    except ValueError as error:
        raise TokenStoreError(f"{file} is damaged ({error}); restore it, or tokenize again") from None
    raise TokenStoreError(
        f"{file} must have format {FORMAT}; got {str(content.get('format'))[:40]}, of another version of ibqlab. "
        "Tokenize again"
    )


def split_file(folder: Path, split: Split, name: str) -> Path:
    """Where a store holds the "tokens" or the "labels" of a split."""
    return folder / f"{split}_{name}.npy"


def token_dtype(codebook_size: int) -> np.dtype:
    """The smallest type of unsigned integers that holds K − 1."""
    return np.min_scalar_type(codebook_size - 1)
