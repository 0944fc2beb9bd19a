"""The pieces that a token store is written in: which there are, made and read again.

Every piece of `PIECE` images is a file of its own, there whole or not at all, and depends on nothing but the manifest.
So a kill costs one piece, and any process can make any of them.
"""

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt

from ibqlab.base.checks import require_memory
from ibqlab.base.files import UnreadableFile, read_npz, replacing
from ibqlab.base.processes import share_of_work
from ibqlab.base.progress import CountingLine
from ibqlab.data.batch_loading import Requests, load_requests
from ibqlab.data.batches import seed_of_choices
from ibqlab.data.source import ImageSource, Split
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.manifest import LABEL_TYPE, UNFINISHED, TokenManifest, TokenStoreError
from ibqlab.tokens.store_folder import lock_file

PIECE = 1024
"""Images per file while the store is written, at most."""
NAMES_BYTES = 2**28
"""Most that the names of a piece's unreadable images may take."""


class Piece(NamedTuple):
    """Images first … stop − 1 of a split."""

    split: Split
    first: int
    stop: int

    def file(self, folder: Path) -> Path:
        """Its file in the folder of a store."""
        return folder / UNFINISHED / f"{self.split}_{self.first:09d}.npz"


class Pieces:
    """All pieces of a store, as one of the processes that share the work sees them.

    Args:
        tokenizer: makes the tokens.
        sources: the images of both splits, none of them mirrored.
        manifest: what is to be written.
        folder: of the store.
        batch_size: images that go through the tokenizer at once.
        workers: processes that load images.
        device: where the tokenizer computes.
    Raises:
        ValueError: a piece does not fit into this machine's memory.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sources: dict[Split, ImageSource],
        manifest: TokenManifest,
        folder: Path,
        *,
        batch_size: int,
        workers: int,
        device: str,
    ) -> None:
        self.tokenizer, self.sources, self.manifest, self.folder = tokenizer, sources, manifest, folder
        self.batch_size, self.workers, self.device = batch_size, workers, device
        self.rank, self.world_size = share_of_work()
        self.length, self.dtype = manifest.tokens_per_image, np.dtype(manifest.train.dtype)
        largest = max(min(len(source), PIECE) * manifest.split(split).views for split, source in sources.items())
        # A piece and its copy, while it is put together.
        needed = 2 * largest * self.length * self.dtype.itemsize
        require_memory(needed, f"a piece of {largest:,} token grids", "lower crops")

    def all(self) -> list[Piece]:
        """The pieces of both splits, in order."""
        return [
            Piece(split, first, min(first + PIECE, len(source)))
            for split, source in self.sources.items()
            for first in range(0, len(source), PIECE)
        ]

    def write_missing(self, progress: bool) -> None:
        """Make this process's share of what is not there yet; the tokenizer is moved, and in eval mode meanwhile."""
        pieces = self.all()[self.rank :: self.world_size]
        grids = {piece: (piece.stop - piece.first) * self.manifest.split(piece.split).views for piece in pieces}
        was_training = self.tokenizer.training
        self.tokenizer.to(self.device).eval()
        try:
            with CountingLine("tokens", sum(grids.values()), "images", shown=progress) as line:
                for piece in pieces:
                    if self._read(piece) is None:
                        self._write(piece, line)
                    else:
                        line.advance(grids[piece])
        finally:
            self.tokenizer.train(was_training)

    def _write(self, piece: Piece, line: CountingLine) -> None:
        crops, size = 1 if piece.split == "validation" else self.manifest.crops, self.batch_size
        mirrors = self.manifest.split(piece.split).views // crops
        images = range(piece.first, piece.stop)
        seed, random = self.manifest.seed, piece.split == "train"
        reads = [(i, seed_of_choices(seed, i, crop) if random else 0) for i in images for crop in range(crops)]
        requests = Requests(range(0, len(reads), size), lambda first: reads[first : first + size])
        tokens, labels, numbers, broken = [np.empty((0, mirrors, self.length), self.dtype)], [], [], set()
        for batch in load_requests(self.sources[piece.split], requests, self.workers, stand_ins=False):
            broken.update(batch.broken)
            line.advance((len(batch.broken) + len(batch.images)) * mirrors)
            if len(batch.images):
                tokens.append(self._encode(batch.images, mirrors))
            labels += batch.labels.tolist()
            numbers += batch.numbers
            # A sign of life for those who wait on another machine.
            with suppress(OSError):
                os.utime(lock_file(self.folder, self.rank))
        # A disk may fail for one crop and not for the next: an image is whole or left out.
        crops_read = Counter(numbers)
        is_whole = np.array([crops_read[number] == crops for number in numbers], dtype=bool)
        # (images · crops, mirrors, T) becomes (images, views, T): every crop is followed by its mirror image.
        rows = np.concatenate(tokens)[is_whole].reshape(-1, crops * mirrors, self.length)
        labels = np.array(labels, dtype=LABEL_TYPE)[is_whole][::crops]
        with replacing(piece.file(self.folder)) as stream:
            np.savez(stream, tokens=rows, labels=labels, broken=np.array(sorted(broken), dtype=np.str_))

    def _read(self, piece: Piece) -> dict[str, np.ndarray] | None:
        """A piece's arrays; None where it is missing, damaged or another's, and has to be made again."""
        images, views = piece.stop - piece.first, self.manifest.split(piece.split).views
        limit = images * (views * self.length * self.dtype.itemsize + LABEL_TYPE.itemsize) + NAMES_BYTES
        try:
            arrays = read_npz(piece.file(self.folder), limit)
            tokens, labels, broken = arrays["tokens"], arrays["labels"], arrays["broken"]
        except (FileNotFoundError, UnreadableFile, KeyError):
            return None
        if broken.ndim != 1 or broken.dtype.kind != "U":
            return None
        readable = images - len(broken)
        fits = tokens.shape == (readable, views, self.length) and labels.shape == (readable,)
        fits = fits and tokens.dtype == self.dtype and labels.dtype == LABEL_TYPE
        return arrays if fits and int(tokens.max(initial=0)) < self.manifest.codebook_size else None

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, mirrors: int) -> UInt[np.ndarray, "B mirrors T"]:
        """Tokens of images, and of their mirror images after each."""
        pictures = images.to(self.device)
        views = [pictures] if mirrors == 1 else [pictures, pictures.flip(-1)]
        return np.stack(
            [self.tokenizer.encode_indices(view).flatten(1).cpu().numpy().astype(self.dtype) for view in views], axis=1
        )

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        """Arrays of a piece: tokens (images, views, T), labels (images,), and broken, the names of those left out.

        Raises:
            TokenStoreError: it is damaged, and was deleted to be made again.
        """
        arrays = self._read(piece)
        if arrays is None:
            file = piece.file(self.folder)
            file.unlink(missing_ok=True)
            raise TokenStoreError(
                f"{file} is damaged and was deleted; start the same command again, which makes it again"
            )
        return arrays
