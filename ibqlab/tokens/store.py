"""Stored tokens: a data set as a trained tokenizer saw it, written by `ibqlab tokenize` for generators to train on.

    manifest.json                       what the tokens are and what they were made from
    train_tokens.npy                    (images, views, T), the smallest unsigned integers that hold K − 1
    train_labels.npy                    (images,) int32, −1 where there is no class
    validation_tokens.npy, validation_labels.npy
    tokenizer.safetensors               the tokenizer that made them (stores of earlier versions have none)

A view is one crop of an image, or its mirror image. Arrays are mapped, not loaded: ImageNet's tokens take no memory.

    store = TokenStore("tokens/imagenet")
    for batch in token_batches(store.split("train"), batch_size=768, seed=0, start_step=0, steps=1000):
        loss = generator.loss(batch.indices, batch.labels)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt
from torch import Tensor

from ibqlab.base.checks import CODES, IMAGES, require, require_at_most, require_choice
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, expanded, is_ordinary, open_ordinary, read_json, why_not
from ibqlab.base.names import BUILT_IN
from ibqlab.config import parse, to_dict
from ibqlab.data.broken import describe_unreadable
from ibqlab.data.loading import Requests
from ibqlab.data.opening import open_data
from ibqlab.data.sampling import training_requests, validation_requests
from ibqlab.data.source import DataConfig, Split

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.safetensors"
UNFINISHED = "unfinished"
"""Sub-folder that holds what is done so far, until the store is complete."""
LABEL_TYPE = np.dtype(np.int32)
TOKEN_TYPES = ("uint8", "uint16", "uint32")
_READ_AT_ONCE = 2**24


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
        for name in ("images", "views"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
            require_at_most(name, getattr(self, name), IMAGES)


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
    """Pixels per token along a side."""
    grid: tuple[int, int]
    """Rows and columns of tokens per image, (h, w); T = h·w."""
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
        for name in ("codebook_size", "downsampling"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require_at_most("codebook_size", self.codebook_size, CODES)
        require(
            all(1 <= side <= 2**14 for side in self.grid),
            f"grid must hold rows and columns of 1 to {2**14}, got {list(self.grid)}",
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.data.image_size

    @property
    def tokens_per_image(self) -> int:
        """T = h·w, of one view."""
        return self.grid[0] * self.grid[1]


class TokenBatch(NamedTuple):
    """Token sequences in raster order, as a generator takes them."""

    indices: Int64[Tensor, "B T"]
    """0 to K − 1."""
    labels: Int64[Tensor, "B"]
    """Index into the manifest's classes, −1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class StoredTokens:
    """One split of a store; `len` is its number of images."""

    indices: UInt[np.ndarray, "images views T"]
    """Mapped from the file, read-only."""
    labels: Int32[np.ndarray, "images"]
    """Mapped from the file, read-only."""
    codebook_size: int
    """K: what a token must lie below."""
    num_classes: int
    """What a label must lie below."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        """Token grids per image."""
        return self.indices.shape[1]

    def batch(self, images: list[int], views: list[int]) -> TokenBatch:
        """One view each of the images with these numbers.

        Raises:
            TokenStoreError: a token that is no code, or a label that is no class.
        """
        rows, labels = self.indices[images, views], self.labels[images]
        self._check("tokens", 0, self.codebook_size, rows)
        self._check("labels", -1, self.num_classes, labels)
        return TokenBatch(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(labels.astype(np.int64)))

    def _check(self, what: str, least: int, bound: int, values: np.ndarray) -> None:
        lowest, highest = int(values.min()), int(values.max())
        if lowest < least or highest >= bound:
            raise TokenStoreError(
                f"stored {what} must lie in {least} to {bound - 1}; got {highest if highest >= bound else lowest}: the "
                "file is damaged. Restore it, or tokenize again"
            )

    def count_codes(self, codebook_size: int) -> Int64[np.ndarray, "K"]:
        """How often each code occurs, over all views.

        Args:
            codebook_size: K of the manifest.
        Raises:
            TokenStoreError: a token that is no code.
        Cost: one pass through the file, in pieces.
        """
        flat, counts = self.indices.reshape(-1), np.zeros(codebook_size, dtype=np.int64)
        for start in range(0, flat.size, _READ_AT_ONCE):
            hits = np.bincount(flat[start : start + _READ_AT_ONCE], minlength=codebook_size)
            if hits.size > codebook_size:
                raise TokenStoreError(
                    f"stored tokens must lie in 0 to {codebook_size - 1}; got {hits.size - 1}: the file is damaged. "
                    "Restore it, or tokenize again"
                )
            counts += hits
        return counts


@runtime_checkable
class Fingerprinted(Protocol):
    """A tokenizer, as far as its tokens' identity goes."""

    config: Any

    def fingerprint(self) -> str:
        """Which tokens mean what."""
        ...


class TokenStore:
    """A folder that `ibqlab tokenize` wrote. Opening looks at sizes and types; `verify` reads every byte.

    Args:
        path: the folder.
    Raises:
        FileNotFoundError: there is no such folder.
        TokenStoreError: no store, an unfinished one, one of another format, or files that do not fit the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self.manifest = _read_manifest(self.path)
        self._splits = {split: self._open(split) for split in get_args(Split)}

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that made the tokens, for `load_tokenizer`; None in a store of an earlier version."""
        file = self.path / TOKENIZER
        return file if is_ordinary(file) else None

    def split(self, split: Split) -> StoredTokens:
        """The tokens of "train" or "validation".

        Raises:
            ValueError: another split.
        """
        if split not in self._splits:
            raise ValueError(f"split must be 'train' or 'validation'; got {split!r}.")
        return self._splits[split]

    def describe(self) -> str:
        """Both splits in one line each: images, tokens, bytes, and how many codes occur in them."""
        lines = [f"{self.path}: tokens of tokenizer {self.manifest.tokenizer}, {self.manifest.codebook_size:,} codes"]
        for split, stored in self._splits.items():
            counts = stored.count_codes(self.manifest.codebook_size)
            shares = counts[counts > 0] / counts.sum()
            lines.append(
                f"  {split}: {len(stored):,} images × {stored.views} views, {counts.sum():,} tokens of "
                f"{self.manifest.grid[0]} × {self.manifest.grid[1]}, {stored.indices.nbytes:,} bytes; "
                f"{(counts > 0).mean():.1%} of the codes occur, entropy {-(shares * np.log2(shares)).sum():.2f} bits "
                "per token"
            )
        broken = [*self.manifest.train.broken, *self.manifest.validation.broken]
        if broken:
            lines.append(f"  {describe_unreadable(broken, sum(map(len, self._splits.values())) + len(broken))}")
        return "\n".join(lines)

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            TokenStoreError: the first file that differs.
        Cost: reads everything, at the speed of the disk.
        """
        for split in self._splits:
            facts = self._facts(split)
            for part, wanted in (("tokens", facts.tokens_sha256), ("labels", facts.labels_sha256)):
                file = split_file(self.path, split, part)
                try:
                    with open_ordinary(file) as stream:
                        found = hashlib.file_digest(stream, "sha256").hexdigest()
                except (OSError, UnreadableFile) as error:
                    raise TokenStoreError(f"{error}; restore it, or tokenize again") from None
                if found != wanted:
                    raise TokenStoreError(
                        f"{file} is damaged: its SHA-256 must be {wanted}, got {found}. Restore the file, or delete "
                        "the folder and tokenize again"
                    )

    def check_tokenizer(self, tokenizer: Fingerprinted) -> None:
        """Refuse any tokenizer but the one that made the tokens: another one's code numbers mean other things.

        Args:
            tokenizer: with the weights that will decode the tokens.
        Raises:
            ValueError: another codebook size or fingerprint; the message gives both.
        """
        ours, theirs = self.manifest.codebook_size, tokenizer.config.quantizer.codebook_size
        if ours != theirs:
            raise ValueError(
                f"stored tokens belong to the tokenizer that made them; {self.path} was made with {ours:,} codes, this "
                f"tokenizer has {theirs:,}. Give that tokenizer, or write tokens of this one: ibqlab tokenize TOKENIZER"
            )
        ours, theirs = self.manifest.tokenizer, tokenizer.fingerprint()
        if ours != theirs:
            raise ValueError(
                f"stored tokens belong to the tokenizer that made them; {self.path} was made by {ours}, this tokenizer "
                f"is {theirs} (averaged and raw weights differ, too: tokenizer_weights). Give that tokenizer, or none "
                "(tokenizer=: the tokens bring theirs), or write tokens of this one: ibqlab tokenize TOKENIZER"
            )

    def check_data(self, config: DataConfig) -> None:
        """Refuse settings of other images than those the tokens were made from.

        A source of the same name is believed, so that training needs no images. Under another name (the images were
        moved) it is opened and must hold the same images.

        Args:
            config: settings of the images; `workers` may differ, and so may what the source does not use.
        Raises:
            ValueError: another source, size, resizing, split or mirroring; the message gives both.
        """
        ours, theirs = _image_settings(self.manifest.data), _image_settings(config)
        different = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        moved = set(different) <= {"source", "validation_source"} and not {ours["source"], theirs["source"]} & {
            *BUILT_IN
        }
        if not different or (moved and self._holds_images_of(config)):
            return
        listed = ", ".join(f"data.{name} {ours.get(name)!r} there, {theirs.get(name)!r} here" for name in different)
        raise ValueError(
            f"stored tokens stand for the images they were made from; {self.path} differs from the settings in "
            f"{listed}. Type the store's settings, or write tokens of these images: ibqlab tokenize TOKENIZER"
            + (f" flip={str(theirs['flip']).lower()}" if "flip" in different and "flip" in theirs else "")
        )

    def _holds_images_of(self, config: DataConfig) -> bool:
        return all(open_data(config, split).fingerprint == self._facts(split).fingerprint for split in self._splits)

    def _facts(self, split: Split) -> SplitManifest:
        return self.manifest.train if split == "train" else self.manifest.validation

    def _open(self, split: Split) -> StoredTokens:
        facts = self._facts(split)
        shape = (facts.images, facts.views, self.manifest.tokens_per_image)
        tokens = _map_array(split_file(self.path, split, "tokens"), shape, np.dtype(facts.dtype))
        labels = _map_array(split_file(self.path, split, "labels"), (facts.images,), LABEL_TYPE)
        classes = max(1, len(self.manifest.classes))
        return StoredTokens(
            indices=tokens, labels=labels, codebook_size=self.manifest.codebook_size, num_classes=classes
        )


def token_batches(
    stored: StoredTokens,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[TokenBatch]:
    """Global batches number start_step … start_step + steps − 1, in the order of `training_batches`.

    Which images are in batch s, and which view of each, depends on (seed, s) alone.

    Args:
        stored: the training split.
        batch_size: images per step over all ranks, at least 1.
        seed: of the run, at least 0.
        start_step: number of the first batch, from 0; a resumed run gives the steps it has done.
        steps: how many batches follow.
        rank: this process, 0 to world_size − 1; it gets its contiguous slice of every batch.
        world_size: processes that share a batch; it must divide batch_size.
    Returns:
        Batches of batch_size / world_size sequences.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    sharing = {"rank": rank, "world_size": world_size}
    return _batches(
        stored,
        training_requests(len(stored), batch_size=batch_size, seed=seed, start_step=start_step, steps=steps, **sharing),
    )


def stored_validation_batches(
    stored: StoredTokens, *, images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[TokenBatch]:
    """The first `images` images in their fixed order, view 0, each exactly once over all ranks.

    The last batch may be smaller, and a rank whose slice of it would be empty gets one batch fewer.

    Args:
        stored: the validation split.
        images: how many, at least 1; it stops at len(stored).
        batch_size: images per batch over all ranks.
        rank: this process; it gets its contiguous slice of every batch.
        world_size: processes that share a batch; it must divide batch_size.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    sharing = {"rank": rank, "world_size": world_size}
    return _batches(stored, validation_requests(len(stored), images=images, batch_size=batch_size, **sharing))


def _batches(stored: StoredTokens, requests: Requests) -> Iterator[TokenBatch]:
    """One view of each image: the seed that would decide on a crop decides on the view; 0 is view 0."""
    for batch in requests:
        yield stored.batch([image for image, _ in batch], [seed % stored.views for _, seed in batch])


def split_file(folder: Path, split: Split, part: str) -> Path:
    """Where a store keeps the "tokens" or the "labels" of a split."""
    return folder / f"{split}_{part}.npy"


def token_dtype(codebook_size: int) -> np.dtype:
    """The smallest type of unsigned integers that holds K − 1."""
    return np.min_scalar_type(codebook_size - 1)


def _image_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that an image's pixels depend on; a built-in source ignores those of files."""
    settings = to_dict(data)
    unused = {"workers"}
    if data.source in BUILT_IN:
        unused |= {"resize", "validation_source", "validation_share", "exclude", "unreadable"}
    if data.source == "digits":
        unused |= {"flip"}
    return {name: value for name, value in settings.items() if name not in unused}


def _read_manifest(folder: Path) -> TokenManifest:
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


def _map_array(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        # A pipe would be waited for, and an .npz under this name is no array.
        open_ordinary(file).close()
        array = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        reason = for_terminal(why_not(error) if isinstance(error, OSError) and error.errno else error)
        raise TokenStoreError(f"{file} is missing or damaged ({reason}); restore it, or tokenize again") from None
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise TokenStoreError(
            f"{file} must hold {np.dtype(dtype).name} of shape {shape} by the manifest; got {array.dtype.name} of "
            f"shape {array.shape}. Restore it, or tokenize again"
        )
    return array
