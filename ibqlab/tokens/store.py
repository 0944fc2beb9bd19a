"""Stored tokens: a data set as a trained tokenizer saw it, written by `ibqlab tokenize` for generators to train on.

    manifest.json                       what the tokens are and what they were made from
    train_tokens.npy                    (images, views, T), the smallest unsigned integers that hold K − 1
    train_labels.npy                    (images,) int32, −1 where there is no class
    validation_tokens.npy, validation_labels.npy
    tokenizer.safetensors               the tokenizer that made them (stores of earlier versions have none)

A view is one crop of an image, or its mirror image. Arrays are mapped, not loaded: ImageNet's tokens take no memory.

    tokens = TokenStore("tokens/imagenet").split("train")
    requests = training_requests(len(tokens), batch_size=768, seed=0, start_step=0, steps=1000)
    for batch in tokens.batches(requests):
        loss = generator.loss(batch.indices, batch.labels)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt
from torch import Tensor

from ibqlab.base.cache import hash_file
from ibqlab.base.escaping import for_terminal
from ibqlab.base.files import UnreadableFile, expanded, is_ordinary, open_ordinary, why_not
from ibqlab.base.resources import BUILT_IN
from ibqlab.config import to_dict
from ibqlab.data.batch_loading import Requests
from ibqlab.data.broken import describe_unreadable
from ibqlab.data.image_sources import open_data
from ibqlab.data.source import DataConfig, Split
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.manifest import LABEL_TYPE, TOKENIZER, TokenStoreError, read_manifest, split_file

_COUNTED_AT_ONCE = 2**24


class TokenBatch(NamedTuple):
    """Token sequences in raster order, as a generator takes them."""

    indices: Int64[Tensor, "B T"]
    """0 to K − 1."""
    labels: Int64[Tensor, "B"]
    """Index into the manifest's classes, −1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """The tokens of one split; `len` is its number of images."""

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

    def batches(self, requests: Requests) -> Iterator[TokenBatch]:
        """Batches as an image source would give them: tokens of the same images in the same order.

        Args:
            requests: `training_requests` or `validation_requests` of `ibqlab.data.batches`, for `len(self)` images.
                The seed that would decide on an image's crop decides on its view; seed 0 is view 0.
        Raises:
            TokenStoreError: as `batch`.
        """
        for batch in requests:
            yield self.batch([image for image, _ in batch], [seed % self.views for _, seed in batch])

    def batch(self, images: list[int], views: list[int]) -> TokenBatch:
        """One view each of the images with these numbers.

        Raises:
            TokenStoreError: a token that is no code, or a label that is no class.
        """
        rows, labels = self.indices[images, views], self.labels[images]  # (B, T) and (B,), read from the disk here
        _require_range("tokens", rows, 0, self.codebook_size)
        _require_range("labels", labels, -1, self.num_classes)
        return TokenBatch(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(labels.astype(np.int64)))

    def count_codes(self) -> Int64[np.ndarray, "K"]:
        """How often each code occurs, over all views.

        Raises:
            TokenStoreError: a token that is no code.
        Cost: one pass through the file, in pieces.
        """
        flat, counts = self.indices.reshape(-1), np.zeros(self.codebook_size, dtype=np.int64)
        for start in range(0, flat.size, _COUNTED_AT_ONCE):
            # bincount makes int64 of them: of 16 million tokens at a time, never of the whole file.
            piece = flat[start : start + _COUNTED_AT_ONCE]
            _require_range("tokens", piece, 0, self.codebook_size)
            counts += np.bincount(piece, minlength=self.codebook_size)
        return counts


def _require_range(name: str, values: np.ndarray, least: int, bound: int) -> None:
    lowest, highest = int(values.min()), int(values.max())
    if lowest < least or highest >= bound:
        raise TokenStoreError(
            f"stored {name} must lie in {least} to {bound - 1}; got {highest if highest >= bound else lowest}: the "
            "file is damaged. Restore it, or tokenize again"
        )


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
        self.manifest = read_manifest(self.path)
        self._splits = {split: self._open(split) for split in get_args(Split)}

    def _open(self, split: Split) -> TokenSplit:
        facts = self.manifest.split(split)
        shape = (facts.images, facts.views, self.manifest.tokens_per_image)
        return TokenSplit(
            indices=_map_array(split_file(self.path, split, "tokens"), shape, np.dtype(facts.dtype)),
            labels=_map_array(split_file(self.path, split, "labels"), shape[:1], LABEL_TYPE),
            codebook_size=self.manifest.codebook_size,
            num_classes=max(1, len(self.manifest.classes)),
        )

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that made the tokens, for `load_tokenizer`; None in a store of an earlier version."""
        file = self.path / TOKENIZER
        return file if is_ordinary(file) else None

    def split(self, split: Split) -> TokenSplit:
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
        for split, tokens in self._splits.items():
            counts = tokens.count_codes()
            shares = counts[counts > 0] / counts.sum()
            lines.append(
                f"  {split}: {len(tokens):,} images × {tokens.views} views, {counts.sum():,} tokens of "
                f"{self.manifest.grid[0]} × {self.manifest.grid[1]}, {tokens.indices.nbytes:,} bytes; "
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
            facts = self.manifest.split(split)
            for name, checksum in (("tokens", facts.tokens_sha256), ("labels", facts.labels_sha256)):
                file = split_file(self.path, split, name)
                try:
                    actual = hash_file(file)
                except (OSError, UnreadableFile) as error:
                    raise TokenStoreError(f"{error}; restore it, or tokenize again") from None
                if actual != checksum:
                    raise TokenStoreError(
                        f"{file} is damaged: its SHA-256 must be {checksum}, got {actual}. Restore the file, or delete "
                        "the folder and tokenize again"
                    )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse any tokenizer but the one that made the tokens: another one's code numbers mean other things.

        Args:
            tokenizer: with the weights that will decode the tokens.
        Raises:
            ValueError: another codebook size or fingerprint; the message gives both.
        """
        store_size, tokenizer_size = self.manifest.codebook_size, tokenizer.config.quantizer.codebook_size
        if store_size != tokenizer_size:
            raise ValueError(
                f"stored tokens belong to the tokenizer that made them; {self.path} was made with {store_size:,} "
                f"codes, this tokenizer has {tokenizer_size:,}. Give that tokenizer, or write tokens of this one: "
                "ibqlab tokenize TOKENIZER"
            )
        maker, fingerprint = self.manifest.tokenizer, tokenizer.fingerprint()
        if maker != fingerprint:
            raise ValueError(
                f"stored tokens belong to the tokenizer that made them; {self.path} was made by {maker}, this "
                f"tokenizer is {fingerprint} (averaged and raw weights differ, too: tokenizer_weights). Give that "
                "tokenizer, or none (tokenizer=: the tokens bring theirs), or write tokens of this one: "
                "ibqlab tokenize TOKENIZER"
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
        old, new = _image_settings(self.manifest.data), _image_settings(config)
        different = [name for name in old | new if old.get(name) != new.get(name)]
        has_files = not {old["source"], new["source"]} & {*BUILT_IN}
        may_be_moved = has_files and set(different) <= {"source", "validation_source"}
        if not different or (may_be_moved and self._holds_images_of(config)):
            return
        differences = ", ".join(f"data.{key} {old.get(key)!r} there, {new.get(key)!r} here" for key in different)
        raise ValueError(
            f"stored tokens stand for the images they were made from; {self.path} differs from the settings in "
            f"{differences}. Type the store's settings, or write tokens of these images: ibqlab tokenize TOKENIZER"
            + (f" flip={str(new['flip']).lower()}" if "flip" in different and "flip" in new else "")
        )

    def _holds_images_of(self, config: DataConfig) -> bool:
        return all(
            open_data(config, split).fingerprint == self.manifest.split(split).fingerprint for split in self._splits
        )


def _image_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that an image's pixels depend on; a built-in source ignores those of files."""
    unused = {"workers"}
    if data.source in BUILT_IN:
        unused |= {"resize", "validation_source", "validation_share", "exclude", "unreadable"}
    if data.source == "digits":
        unused |= {"flip"}
    return {name: value for name, value in to_dict(data).items() if name not in unused}


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
