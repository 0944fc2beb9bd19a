"""Writing a data set's tokens: pieces that a kill cannot spoil, shared out among processes, then joined.

`pieces` makes them; `store_folder` says whether the folder may be written to. The first process joins the pieces once
all are there; so neither a restart nor the number of processes changes a byte.
"""

import platform
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from ibqlab.base.cache import hash_file
from ibqlab.base.checks import BATCH, SAMPLE_SEED, require, require_between
from ibqlab.base.files import expanded, explained, force_to_disk, replacing, write_whole
from ibqlab.base.locking import wait_for
from ibqlab.base.processes import own_device
from ibqlab.data.broken import name_a_few
from ibqlab.data.file_list import printable
from ibqlab.data.image_sources import open_data
from ibqlab.data.source import DataConfig, ImageSource, Split
from ibqlab.pretrained import export_tokenizer
from ibqlab.tokenizer import Tokenizer
from ibqlab.tokens import manifest
from ibqlab.tokens.pieces import Pieces
from ibqlab.tokens.store import TokenStore
from ibqlab.tokens.store_folder import REQUEST, clear, is_finished, lock_file, locked, manifest_json


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
        require_between("crops", self.crops, 1, 10_000)
        require_between("seed", self.seed, 0, SAMPLE_SEED)
        require_between("batch_size", self.batch_size, 1, BATCH)


def write_tokens(
    tokenizer: Tokenizer,
    data: DataConfig,
    folder: str | Path,
    settings: TokenSettings | None = None,
    *,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a data set's training and validation images as a folder, written once, with their tokenizer.

    A store with the same settings is returned as it is; an unfinished one is completed. Several processes (started
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
        RunError: the disk is full, and what was finished stays; or the other processes are gone.
        ValueError: no images, a size that the tokenizer cannot take, crops of images that are never cropped.
    Cost: one pass of the encoder per view; twice the store's size on disk while it is joined.
    """
    settings, folder = settings or TokenSettings(), expanded(folder)
    digits = data.source == "digits"
    require(
        not digits or settings.crops == 1,
        f"digits are never cropped, so all crops would be equal; got crops={settings.crops}. Use crops=1.",
    )
    stored_data = replace(data, flip=data.flip and not digits, workers=0)
    # Whether an image is mirrored is not left to chance here: both ways are stored.
    plain = replace(stored_data, flip=False)
    sources = {split: open_data(plain, split) for split in get_args(Split)}
    pieces = Pieces(
        tokenizer,
        sources,
        _manifest(tokenizer, stored_data, sources, settings),
        folder,
        batch_size=settings.batch_size,
        workers=data.workers,
        device=own_device(settings.device),
    )
    if not is_finished(folder, pieces.manifest, pieces.world_size):
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, pieces.rank):
            # Another process may have finished it since it was looked at.
            if not is_finished(folder, pieces.manifest, pieces.world_size):
                with explained(folder):
                    (folder / manifest.UNFINISHED).mkdir(parents=True, exist_ok=True)
                write_whole(folder / REQUEST, manifest_json(pieces.manifest))
                pieces.write_missing(progress and pieces.rank == 0)
                _join(pieces)
        clear(folder)
    return TokenStore(folder)


def _manifest(
    tokenizer: Tokenizer, data: DataConfig, sources: dict[Split, ImageSource], settings: TokenSettings
) -> manifest.TokenManifest:
    """What will have been written, but for the checksums."""
    for name in ("source", "validation_source"):
        path = printable(getattr(data, name) or "")
        require(
            path == (getattr(data, name) or ""),
            f"data.{name} must be a path in UTF-8, since the store names it; got {path!r}. Make a link to it with a "
            "plain name",
        )
    size = tokenizer.quantizer.config.codebook_size
    views = {"train": settings.crops * (2 if data.flip else 1), "validation": 1}
    splits = {
        split: manifest.SplitManifest(
            images=len(source),
            views=views[split],
            dtype=manifest.token_dtype(size).name,
            description=source.description,
            fingerprint=source.fingerprint,
        )
        for split, source in sources.items()
    }
    return manifest.TokenManifest(
        format=manifest.FORMAT,
        tokenizer=tokenizer.fingerprint(),
        codebook_size=size,
        downsampling=tokenizer.downsampling,
        grid=tokenizer.latent_grid(data.image_size, data.image_size),
        classes=tuple(sources["train"].classes),
        data=data,
        crops=settings.crops,
        flips=data.flip,
        seed=settings.seed,
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        **splits,
    )


def _join(pieces: Pieces) -> None:
    """Make one store of the pieces once all are there. The other processes wait until that is done."""
    folder, work = pieces.folder, f"{pieces.folder} is not finished"
    if pieces.rank:
        wait_for((folder / manifest.MANIFEST).is_file, [lock_file(folder, 0)], work)
        return
    other_locks = [lock_file(folder, rank) for rank in range(1, pieces.world_size)]
    wait_for(lambda: all(piece.file(folder).is_file() for piece in pieces.all()), other_locks, work)
    splits = {split: _join_split(pieces, split) for split in get_args(Split)}
    # The tokenizer beside its tokens, so that generators need no other file.
    unfinished = folder / manifest.UNFINISHED / manifest.TOKENIZER
    with explained(unfinished):
        unfinished.unlink(missing_ok=True)
        export_tokenizer(pieces.tokenizer, unfinished)
        unfinished.replace(folder / manifest.TOKENIZER)
        force_to_disk(folder)
    # Last of all: a folder with a manifest is a finished store.
    write_whole(folder / manifest.MANIFEST, manifest_json(replace(pieces.manifest, **splits)))


def _join_split(pieces: Pieces, split: Split) -> manifest.SplitManifest:
    """The files of one split, and what its part of the manifest says of them."""
    of_split = [piece for piece in pieces.all() if piece.split == split]
    # Two passes, because an .npy file begins with its shape: labels and names are small and are collected in the
    # first, tokens go from file to file in the second.
    labels: list[np.ndarray] = []
    broken: list[str] = []
    for piece in of_split:
        arrays = pieces.read(piece)
        labels.append(arrays["labels"])
        broken += arrays["broken"].tolist()
    facts = pieces.manifest.split(split)
    images = facts.images - len(broken)
    require(
        images > 0,
        f"at least one {split} image must be readable; got {name_a_few(broken)}, and no other. Replace the files",
    )
    tokens = (pieces.read(piece)["tokens"] for piece in of_split)
    shape = (images, facts.views, pieces.length)
    return replace(
        facts,
        images=images,
        tokens_sha256=_write_array(manifest.split_file(pieces.folder, split, "tokens"), shape, pieces.dtype, tokens),
        labels_sha256=_write_array(
            manifest.split_file(pieces.folder, split, "labels"), shape[:1], manifest.LABEL_TYPE, labels
        ),
        broken=tuple(sorted(broken)),
    )


def _write_array(file: Path, shape: tuple[int, ...], dtype: np.dtype, arrays: Iterable[np.ndarray]) -> str:
    """An .npy file of arrays one after another, whole or not at all; its SHA-256."""
    with replacing(file) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for array in arrays:
            stream.write(np.ascontiguousarray(array, dtype=dtype).data)
    return hash_file(file)
