"""Writing a data set's tokens, in pieces that a kill cannot spoil and that several processes share out.

Every piece of `PIECE` images is a file of its own, there whole or not at all, and depends on nothing but the settings.
Whoever finds all pieces done joins them; so neither a restart nor the number of processes changes a byte.
"""

import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import UInt
from tqdm.auto import tqdm

from ibqlab.config import to_dict
from ibqlab.data.opening import open_data
from ibqlab.data.sampling import Requests, load_requests, seed_of_choices
from ibqlab.data.sharing import own_device, share_of_work
from ibqlab.data.source import DataConfig, ImageSource, Split
from ibqlab.data.tokens import (
    FORMAT,
    LABEL_TYPE,
    MANIFEST,
    UNFINISHED,
    SplitManifest,
    TokenManifest,
    TokenStore,
    TokenStoreError,
    split_file,
    token_dtype,
)
from ibqlab.files import explained, replacing, write_whole
from ibqlab.quantizers.base import require
from ibqlab.tokenizer import Tokenizer

PIECE = 1024
"""Images per file while the store is written, at most."""
POLL_SECONDS = 0.5
REQUEST = "request.json"


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What is written: how often each image is looked at, and how it is computed."""

    crops: int = 1
    """Random crops of each training image, ≥ 1; the validation images are cropped in the middle, once. Published
    training draws a new crop at every step; ten stored ones are usual elsewhere."""
    seed: int = 0
    """Seed of the crops, ≥ 0."""
    batch_size: int = 64
    """Images that go through the tokenizer at once, ≥ 1; changes nothing but the speed."""
    device: str = "cpu"
    """Where the tokenizer computes: "cpu", "cuda" (one for each process of torchrun), or "cuda:1"."""

    def __post_init__(self):
        require(self.crops >= 1, f"crops must be at least 1, got {self.crops}")
        require(self.seed >= 0, f"seed must be ≥ 0, got {self.seed}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")


def write_tokens(
    tokenizer: Tokenizer,
    data: DataConfig,
    folder: str | Path,
    settings: TokenSettings | None = None,
    *,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a data set's training and validation images as a folder, written once.

    A store with the same settings is returned as it is; an unfinished one is gone on with. Several processes (started
    by torchrun, or anything else that sets RANK and WORLD_SIZE) share the work. With `data.flip` each crop is followed
    by its mirror image; digits are never mirrored.

    Args:
        tokenizer: as it is; moved to the device, in eval mode meanwhile.
        data: the images.
        folder: missing, empty, or a store of the same settings.
        settings: crops, seed, batch size and device; None: the defaults.
        progress: show a bar (on the first process).
    Returns:
        The finished store.
    Raises:
        TokenStoreError: the folder holds something else, or a store of other settings; nothing was changed.
        RunError: the disk is full; what was finished is kept.
        ValueError: no images, a size that the tokenizer cannot take, crops of images that are never cropped.
    Cost: one pass of the encoder per view; twice the store's size on disk while it is joined.
    """
    settings, folder = settings or TokenSettings(), Path(folder).expanduser()
    job = _Job(tokenizer, data, folder, settings)
    if job.is_finished():
        return TokenStore(folder)
    job.begin()
    was_training = tokenizer.training
    tokenizer.to(job.device).eval()
    try:
        job.write_pieces(progress and job.rank == 0)
    finally:
        tokenizer.train(was_training)
    job.join()
    return TokenStore(folder)


class _Piece(NamedTuple):
    """Images first … stop − 1 of a split."""

    split: Split
    first: int
    stop: int

    def file(self, folder: Path) -> Path:
        return folder / UNFINISHED / f"{self.split}_{self.first:09d}.npz"


class _Job:
    """One store being written, on one process."""

    def __init__(self, tokenizer: Tokenizer, data: DataConfig, folder: Path, settings: TokenSettings) -> None:
        self.tokenizer, self.folder, self.settings = tokenizer, folder, settings
        digits = data.source == "digits"
        require(
            not digits or settings.crops == 1,
            f"digits are never cropped, so all crops would be equal; got crops={settings.crops}. Use crops=1.",
        )
        self.data = replace(data, flip=data.flip and not digits, workers=0)
        self.workers = data.workers
        # Whether an image is mirrored is not left to chance here: both ways are stored.
        plain = replace(self.data, flip=False)
        self.sources: dict[Split, ImageSource] = {split: open_data(plain, split) for split in get_args(Split)}
        self.grid = tokenizer.latent_grid(data.image_size, data.image_size)
        self.rank, self.world_size = share_of_work()
        self.device = own_device(settings.device)
        self.manifest = self._manifest()

    def views(self, split: Split) -> int:
        """Token grids per image."""
        return 1 if split == "validation" else self.settings.crops * (2 if self.data.flip else 1)

    def is_finished(self) -> bool:
        """Whether the folder holds the store already; raises where it holds anything else."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        there = next((f for f in (self.folder / MANIFEST, self.folder / UNFINISHED / REQUEST) if f.is_file()), None)
        if there is None:
            if (self.folder / UNFINISHED).is_dir():
                return False
            raise TokenStoreError(
                f"{self.folder} exists and holds no tokens; nothing was changed. Choose another folder, or empty it"
            )
        try:
            found = json.loads(there.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenStoreError(f"{there} is damaged ({error}); delete {self.folder} and start again") from None
        different = [key for key, value in self._identity(to_dict(self.manifest)).items() if found.get(key) != value]
        for split in get_args(Split):
            if (found.get(split) or {}).get("fingerprint") != self.sources[split].fingerprint:
                different.append(f"{split} images")
        if different:
            raise TokenStoreError(
                f"{self.folder} holds tokens of other settings ({', '.join(different)} differ); nothing was changed. "
                "Choose another folder, or delete this one"
            )
        return there.name == MANIFEST

    def begin(self) -> None:
        """Make the folder, and say in it what will be written."""
        with explained(self.folder):
            (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / UNFINISHED / REQUEST, json.dumps(to_dict(self.manifest)).encode())

    def pieces(self) -> list[_Piece]:
        """All of both splits, in order."""
        counts = {split: len(source) for split, source in self.sources.items()}
        return [
            _Piece(split, first, min(first + PIECE, count))
            for split, count in counts.items()
            for first in range(0, count, PIECE)
        ]

    def write_pieces(self, progress: bool) -> None:
        """This process's share of what is not there yet."""
        mine = self.pieces()[self.rank :: self.world_size]
        total = sum((piece.stop - piece.first) * self.views(piece.split) for piece in mine)
        with tqdm(total=total, desc="tokens", unit="image", disable=not progress) as bar:
            for piece in mine:
                if piece.file(self.folder).is_file():
                    bar.update((piece.stop - piece.first) * self.views(piece.split))
                else:
                    self._write_piece(piece, bar)

    def _write_piece(self, piece: _Piece, bar: Any) -> None:
        source, images = self.sources[piece.split], range(piece.first, piece.stop)
        crops = 1 if piece.split == "validation" else self.settings.crops
        wanted = [(image, self._seed(piece.split, image, crop)) for image in images for crop in range(crops)]
        size = self.settings.batch_size
        requests = Requests(range(0, len(wanted), size), lambda first: wanted[first : first + size])
        tokens, labels, broken = [], [], []
        for batch in load_requests(source, requests, self.workers):
            found = self._encode(batch.images, mirrored=self.views(piece.split) > crops)
            tokens.append(found)
            labels.append(batch.labels.numpy())
            broken += batch.broken
            bar.update(found.shape[0] * found.shape[1])
        rows = np.concatenate(tokens).reshape(len(images), self.views(piece.split), -1)
        named = np.array(sorted(set(broken)), dtype=np.str_)
        labels = np.concatenate(labels)[::crops].astype(LABEL_TYPE)
        with replacing(piece.file(self.folder)) as stream:
            np.savez(stream, tokens=rows, labels=labels, broken=named)

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, mirrored: bool) -> UInt[np.ndarray, "B mirrors T"]:
        """Tokens of images, and of their mirror images after each."""
        pictures = images.to(self.device)
        both = [pictures, pictures.flip(-1)] if mirrored else [pictures]
        found = [self.tokenizer.encode_indices(part).flatten(1).cpu().numpy() for part in both]
        return np.stack(found, axis=1).astype(token_dtype(self.manifest.codebook_size))

    def _seed(self, split: Split, image: int, crop: int) -> int:
        return 0 if split == "validation" else seed_of_choices(self.settings.seed, image, crop)

    def join(self) -> None:
        """Make one file of the pieces once all are there; the other processes wait until that is done."""
        if self.rank:
            while not (self.folder / MANIFEST).is_file():
                time.sleep(POLL_SECONDS)
            return
        pieces = self.pieces()
        while not all(piece.file(self.folder).is_file() for piece in pieces):
            time.sleep(POLL_SECONDS)
        facts = {split: self._join_split(split, [p for p in pieces if p.split == split]) for split in get_args(Split)}
        content = json.dumps(to_dict(replace(self.manifest, **facts)), indent=2, ensure_ascii=False)
        write_whole(self.folder / MANIFEST, content.encode())
        shutil.rmtree(self.folder / UNFINISHED)

    def _join_split(self, split: Split, pieces: list[_Piece]) -> SplitManifest:
        facts: SplitManifest = getattr(self.manifest, split)
        shape = (facts.images, facts.views, math.prod(self.grid))
        broken: set[str] = set()

        def parts(name: str) -> Iterator[np.ndarray]:
            for piece in pieces:
                with np.load(piece.file(self.folder), allow_pickle=False) as stored:
                    broken.update(stored["broken"].tolist())
                    yield stored[name]

        tokens = _write_array(split_file(self.folder, split, "tokens"), shape, np.dtype(facts.dtype), parts("tokens"))
        labels = _write_array(split_file(self.folder, split, "labels"), shape[:1], LABEL_TYPE, parts("labels"))
        return replace(facts, tokens_sha256=tokens, labels_sha256=labels, broken=tuple(sorted(broken)))

    def _manifest(self) -> TokenManifest:
        """What will have been written, but for the checksums."""
        size = self.tokenizer.quantizer.config.codebook_size
        splits = {
            split: SplitManifest(
                images=len(source),
                views=self.views(split),
                dtype=token_dtype(size).name,
                description=source.description,
                fingerprint=source.fingerprint,
            )
            for split, source in self.sources.items()
        }
        return TokenManifest(
            format=FORMAT,
            tokenizer=self.tokenizer.fingerprint(),
            codebook_size=size,
            downsampling=self.tokenizer.downsampling,
            grid=self.grid,
            classes=tuple(self.sources["train"].classes),
            data=self.data,
            crops=self.settings.crops,
            flips=self.data.flip,
            seed=self.settings.seed,
            versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            **splits,
        )

    def _identity(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The part of a manifest that another attempt must share."""
        return {k: v for k, v in manifest.items() if k not in (*get_args(Split), "versions")}


def _write_array(file: Path, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]) -> str:
    """An .npy file of arrays one after another, whole or not at all; its SHA-256."""
    with replacing(file) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype=dtype).data)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
