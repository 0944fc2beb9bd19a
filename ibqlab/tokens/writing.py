"""Writing a data set's tokens, in pieces that a kill cannot spoil and that several processes share out.

Every piece of `PIECE` images is a file of its own, there whole or not at all, and depends on nothing but the settings.
The first process joins them once all are there; so neither a restart nor the number of processes changes a byte. Each
process holds a lock meanwhile: a second command is told who writes the store.
"""

import hashlib
import json
import math
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import UInt

from ibqlab.base.checks import BATCH, require, require_at_most, require_memory
from ibqlab.base.files import (
    UnreadableFile,
    expanded,
    explained,
    force_to_disk,
    is_temporary,
    read_json,
    read_npz,
    replacing,
    sweep,
    write_whole,
)
from ibqlab.base.locking import holder, holding, wait_for
from ibqlab.base.processes import own_device, share_of_work
from ibqlab.base.progress import CountingLine
from ibqlab.config import completed, to_dict
from ibqlab.data.broken import name_a_few
from ibqlab.data.loading import Requests, load_requests
from ibqlab.data.opening import open_data
from ibqlab.data.sampling import seed_of_choices
from ibqlab.data.source import DataConfig, ImageSource, Split
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens.store import (
    FORMAT,
    LABEL_TYPE,
    MANIFEST,
    TOKENIZER,
    UNFINISHED,
    SplitManifest,
    TokenManifest,
    TokenStore,
    TokenStoreError,
    split_file,
    token_dtype,
)

PIECE = 1024
"""Images per file while the store is written, at most."""
REQUEST = "request.json"
LOCK = ".writing-{}.lock"
"""Held by the process of that number while it works; a finished store has none."""
NAMES_BYTES = 2**28
"""Most that the names of a piece's unreadable images may take."""


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
        require_at_most("crops", self.crops, 10_000)
        require_at_most("seed", self.seed, 2**62)
        require_at_most("batch_size", self.batch_size, BATCH)


def write_tokens(
    tokenizer: Tokenizer,
    data: DataConfig,
    folder: str | Path,
    settings: TokenSettings | None = None,
    *,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a data set's training and validation images as a folder, written once, with their tokenizer.

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
        TokenStoreError: the folder holds something else, or a store of other settings, or another process is writing
            it; nothing was changed.
        RunError: the disk is full, and what was finished is kept; or the other processes are gone.
        ValueError: no images, a size that the tokenizer cannot take, crops of images that are never cropped.
    Cost: one pass of the encoder per view; twice the store's size on disk while it is joined.
    """
    settings, folder = settings or TokenSettings(), expanded(folder)
    job = _Job(tokenizer, data, folder, settings)
    if not job.is_finished():
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with job.locked():
            # Another process may have finished it since it was looked at.
            if not job.is_finished():
                job.write(progress and job.rank == 0)
        job.clear()
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
        _require_utf8("source", self.data.source)
        _require_utf8("validation_source", self.data.validation_source or "")
        self.manifest = self._manifest()
        self.dtype = token_dtype(self.manifest.codebook_size)
        largest = max(min(len(source), PIECE) * self.views(split) for split, source in self.sources.items())
        # A piece and its copy, while it is put together.
        needed = 2 * largest * math.prod(self.grid) * self.dtype.itemsize
        require_memory(needed, f"a piece of {largest:,} token grids", "lower crops")

    def views(self, split: Split) -> int:
        """Token grids per image."""
        return 1 if split == "validation" else self.settings.crops * (2 if self.data.flip else 1)

    def is_finished(self) -> bool:
        """Whether the folder holds the store already; raises where it holds anything else.

        What killed processes left of unfinished files is deleted.
        """
        sweep(self.folder)
        sweep(self.folder / UNFINISHED)
        with explained(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise TokenStoreError(f"{self.folder} is no folder; nothing was changed. Choose another name")
            if not self.folder.exists() or not self._names():
                return False
        there = next((f for f in (self.folder / MANIFEST, self.folder / UNFINISHED / REQUEST) if f.is_file()), None)
        if there is None:
            if (self.folder / UNFINISHED).is_dir():
                return False
            raise TokenStoreError(
                f"{self.folder} exists and holds no tokens; nothing was changed. Choose another folder, or empty it"
            )
        try:
            found = read_json(there)
        except UnreadableFile as error:
            raise TokenStoreError(f"{error}; restore it, or delete {self.folder} and start again") from None
        found["data"] = completed(DataConfig, found.get("data"))
        ours, theirs = self._identity(to_dict(self.manifest)), self._identity(found)
        different = [key for key, value in ours.items() if theirs.get(key) != value]
        for split in get_args(Split):
            facts = found.get(split)
            if not isinstance(facts, dict) or facts.get("fingerprint") != self.sources[split].fingerprint:
                different.append(f"{split} images")
        if different:
            raise TokenStoreError(
                f"{self.folder} holds tokens of other settings ({', '.join(different)} differ); nothing was changed. "
                "Choose another folder, or delete this one"
            )
        if there.name != MANIFEST:
            return False
        self.clear()
        return True

    def _names(self) -> list[str]:
        """What the folder holds, beside locks and what is being written."""
        ours = {LOCK.format(rank) for rank in range(self.world_size)}
        return [f.name for f in self.folder.iterdir() if f.name not in ours and not is_temporary(f.name)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this process's lock inside the block.

        Raises:
            TokenStoreError: another process writes the store.
        """
        file = self._lock(self.rank)
        with ExitStack() as stack:
            with explained(file):
                ours = stack.enter_context(holding(file, remove=True))
            if not ours:
                raise TokenStoreError(
                    f"another process ({holder(file)}) is writing this store, {self.folder}; wait for it"
                )
            yield

    def _lock(self, rank: int) -> Path:
        return self.folder / LOCK.format(rank)

    def clear(self) -> None:
        """Delete what a finished store needs no more: the pieces, and locks that killed processes left."""
        if not (self.folder / MANIFEST).is_file():
            return
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        for file in self.folder.glob(LOCK.format("*")):
            with explained(file), holding(file, remove=True):
                pass

    def write(self, progress: bool) -> None:
        """Make what is missing, this process's share of it."""
        self.begin()
        was_training = self.tokenizer.training
        self.tokenizer.to(self.device).eval()
        try:
            self.write_pieces(progress)
        finally:
            self.tokenizer.train(was_training)
        self.join()

    def begin(self) -> None:
        """Make the folder, and say in it what will be written."""
        with explained(self.folder):
            (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / UNFINISHED / REQUEST, _as_json(self.manifest))

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
        with CountingLine("tokens", total, "images", shown=progress) as line:
            for piece in mine:
                if self._read_piece(piece) is not None:
                    line.advance((piece.stop - piece.first) * self.views(piece.split))
                else:
                    self._write_piece(piece, line)

    def _write_piece(self, piece: _Piece, line: CountingLine) -> None:
        source, images = self.sources[piece.split], range(piece.first, piece.stop)
        crops = 1 if piece.split == "validation" else self.settings.crops
        wanted = [(image, self._seed(piece.split, image, crop)) for image in images for crop in range(crops)]
        size = self.settings.batch_size
        requests = Requests(range(0, len(wanted), size), lambda first: wanted[first : first + size])
        tokens, labels, broken, numbers = [], [], set(), []
        for batch in load_requests(source, requests, self.workers, stand_ins=False):
            broken.update(batch.broken)
            line.advance(len(batch.broken) * (self.views(piece.split) // crops))
            if not len(batch.images):
                continue
            found = self._encode(batch.images, mirrored=self.views(piece.split) > crops)
            tokens.append(found)
            labels.append(batch.labels.numpy())
            numbers += batch.numbers
            # A sign of life for those who wait on another machine.
            with suppress(OSError):
                os.utime(self._lock(self.rank))
            line.advance(found.shape[0] * found.shape[1])
        # A disk may fail for one crop and not for the next: an image is whole or left out.
        crops_read = Counter(numbers)
        whole = np.array([crops_read[number] == crops for number in numbers], dtype=bool)
        named = np.array(sorted(broken), dtype=np.str_)
        shape = (whole.sum() // crops, self.views(piece.split), math.prod(self.grid))
        rows = np.concatenate([np.empty((0, shape[1] // crops, shape[2]), self.dtype), *tokens])[whole]
        labels = np.concatenate([np.empty(0, LABEL_TYPE), *labels])[whole][::crops].astype(LABEL_TYPE)
        with replacing(piece.file(self.folder)) as stream:
            np.savez(stream, tokens=rows.reshape(shape), labels=labels, broken=named)

    def _read_piece(self, piece: _Piece) -> dict[str, np.ndarray] | None:
        """A piece's arrays; None where it is missing, damaged or another's, and has to be made again."""
        images = piece.stop - piece.first
        views, length = self.views(piece.split), math.prod(self.grid)
        limit = images * (views * length * self.dtype.itemsize + LABEL_TYPE.itemsize) + NAMES_BYTES
        try:
            stored = read_npz(piece.file(self.folder), limit)
            tokens, labels, broken = stored["tokens"], stored["labels"], stored["broken"]
        except (FileNotFoundError, UnreadableFile, KeyError):
            return None
        if broken.ndim != 1 or broken.dtype.kind != "U":
            return None
        here = images - len(broken)
        fits = tokens.shape == (here, views, length) and labels.shape == (here,)
        fits = fits and tokens.dtype == self.dtype and labels.dtype == LABEL_TYPE
        return stored if fits and int(tokens.max(initial=0)) < self.manifest.codebook_size else None

    @torch.no_grad()
    def _encode(self, images: torch.Tensor, mirrored: bool) -> UInt[np.ndarray, "B mirrors T"]:
        """Tokens of images, and of their mirror images after each."""
        pictures = images.to(self.device)
        both = [pictures, pictures.flip(-1)] if mirrored else [pictures]
        found = [self.tokenizer.encode_indices(part).flatten(1).cpu().numpy() for part in both]
        return np.stack(found, axis=1).astype(self.dtype)

    def _seed(self, split: Split, image: int, crop: int) -> int:
        return 0 if split == "validation" else seed_of_choices(self.settings.seed, image, crop)

    def join(self) -> None:
        """Make one file of the pieces once all are there; the other processes wait until that is done."""
        work = f"{self.folder} is not finished"
        if self.rank:
            wait_for((self.folder / MANIFEST).is_file, [self._lock(0)], work)
            return
        pieces, others = self.pieces(), [self._lock(rank) for rank in range(1, self.world_size)]
        wait_for(lambda: all(piece.file(self.folder).is_file() for piece in pieces), others, work)
        facts = {split: self._join_split(split, [p for p in pieces if p.split == split]) for split in get_args(Split)}
        self._keep_tokenizer()
        write_whole(self.folder / MANIFEST, _as_json(replace(self.manifest, **facts)))

    def _keep_tokenizer(self) -> None:
        """The tokenizer beside its tokens, so that generators need no other file."""
        from ibqlab.pretrained import export_tokenizer  # noqa: PLC0415 - it reads data of runs itself

        unfinished = self.folder / UNFINISHED / TOKENIZER
        with explained(unfinished):
            unfinished.unlink(missing_ok=True)
            export_tokenizer(self.tokenizer, unfinished)
            unfinished.replace(self.folder / TOKENIZER)
            force_to_disk(self.folder)

    def _join_split(self, split: Split, pieces: list[_Piece]) -> SplitManifest:
        facts: SplitManifest = getattr(self.manifest, split)

        def parts(name: str) -> Iterator[np.ndarray]:
            for piece in pieces:
                stored = self._read_piece(piece)
                if stored is None:
                    piece.file(self.folder).unlink(missing_ok=True)
                    raise TokenStoreError(
                        f"{piece.file(self.folder)} is damaged and was deleted; start the same command again, which "
                        "makes it again"
                    )
                yield stored[name]

        broken = [_plain(name) for part in parts("broken") for name in part.tolist()]
        images = facts.images - len(broken)
        require(
            images > 0,
            f"at least one {split} image must be readable; got {name_a_few(broken)}, and no other. Replace the files",
        )
        shape = (images, facts.views, math.prod(self.grid))
        tokens = _write_array(split_file(self.folder, split, "tokens"), shape, np.dtype(facts.dtype), parts("tokens"))
        labels = _write_array(split_file(self.folder, split, "labels"), shape[:1], LABEL_TYPE, parts("labels"))
        return replace(facts, images=images, tokens_sha256=tokens, labels_sha256=labels, broken=tuple(sorted(broken)))

    def _manifest(self) -> TokenManifest:
        """What will have been written, but for the checksums."""
        size = self.tokenizer.quantizer.config.codebook_size
        splits = {
            split: SplitManifest(
                images=len(source),
                views=self.views(split),
                dtype=token_dtype(size).name,
                description=_plain(source.description),
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
            classes=tuple(map(_plain, self.sources["train"].classes)),
            data=self.data,
            crops=self.settings.crops,
            flips=self.data.flip,
            seed=self.settings.seed,
            versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            **splits,
        )

    def _identity(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The part of a manifest that another attempt must share; which images they are, their fingerprints tell."""
        kept = {key: value for key, value in manifest.items() if key not in (*get_args(Split), "versions")}
        if isinstance(kept.get("data"), dict):
            kept["data"] = {k: v for k, v in kept["data"].items() if k not in ("source", "validation_source")}
        return kept


def _plain(text: str) -> str:
    """A name that may come from a disk; bytes that are not UTF-8 are written as \\udcff, which JSON can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _require_utf8(name: str, text: str) -> None:
    require(
        text == _plain(text),
        f"data.{name} must be a path in UTF-8, since the store names it; got {_plain(text)!r}. Make a link to it with "
        "a plain name",
    )


def _as_json(manifest: TokenManifest) -> bytes:
    return json.dumps(to_dict(manifest), indent=2, ensure_ascii=False).encode()


def _write_array(file: Path, shape: tuple[int, ...], dtype: np.dtype, parts: Iterator[np.ndarray]) -> str:
    """An .npy file of arrays one after another, whole or not at all; its SHA-256."""
    with replacing(file) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part, dtype=dtype).data)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
