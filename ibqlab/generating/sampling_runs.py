"""Thousands of samples as files: 50,000 images for the published evaluation, gone on with after a kill, shared out.

    manifest.json                      what is drawn: generator, tokenizer, settings, seeds
    samples-000000.tar, …              webdataset's layout: PNG, class, and seed of each image
    samples.png                        the first images of each class to look at, and samples.csv, their seeds
    samples.npz                        arr_0 (N, H, W, 3) uint8, arr_1 (N,) classes: what the published evaluator reads

Image n is of class number n // images_per_class and is drawn by seed + n, whatever the batch, the shard or the process.
"""

import difflib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from ibqlab.base.checks import BATCH, IMAGES, SAMPLE_SEED, require, require_at_most, require_memory
from ibqlab.base.files import (
    RunError,
    UnreadableFile,
    expanded,
    explained,
    is_temporary,
    open_ordinary,
    read_json,
    replacing,
    sweep,
    write_whole,
)
from ibqlab.base.locking import holding, wait_for
from ibqlab.base.processes import own_device, share_of_work
from ibqlab.base.progress import CountingLine
from ibqlab.config import completed, nearest, to_dict
from ibqlab.data.pictures import open_picture
from ibqlab.generator import AnyGenerator, SamplingConfig
from ibqlab.metrics import truncate_to_uint8
from ibqlab.tokenizer import Tokenizer, fingerprint_weights
from ibqlab.training.generator.token_source import check_fit

MANIFEST, ARCHIVE, SHARD = "manifest.json", "samples.npz", "samples-{:06d}.tar"
NAMES_SHOWN = 10
"""Names of classes that a message lists."""
LOCK = ".drawing-{}.lock"
"""Held by the process of that number while it works, so that the others see it live."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which images are drawn, and how the work is cut up. Only the first three change what comes out."""

    images_per_class: int = 50
    """Images of each class, ≥ 1. Published: 50 of 1,000 classes."""
    classes: tuple[int, ...] = ()
    """Labels; empty: all."""
    seed: int = 0
    """Seed of the first image, ≥ 0; the next ones follow. Published: 42, with other random numbers than these."""
    batch_size: int = 50
    """Images drawn at once, ≥ 1. Published: 50."""
    shard_size: int = 1000
    """Images per tar file, ≥ 1: what a kill can cost."""
    compiled: bool = False
    """Compile the step of one position."""
    device: str = "cpu"
    """Where to compute: "cpu", "cuda" (one for each process of torchrun), or "cuda:1"."""

    def __post_init__(self):
        for name in ("images_per_class", "batch_size", "shard_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
            require_at_most(name, getattr(self, name), BATCH if name == "batch_size" else IMAGES)
        require_at_most("seed", self.seed, SAMPLE_SEED)
        require(self.seed >= 0, f"seed must be ≥ 0, got {self.seed}")
        require(min(self.classes, default=0) >= 0, f"classes must be ≥ 0, got {list(self.classes)}")


def read_classes(given: str | Sequence[str | int], names: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """Labels of classes that are given by number, range or name.

    Args:
        given: "0,7,12", "0-3", "cat,dog" or a list of the same; empty: none, which stands for all.
        names: of the classes by label; empty where nobody knows them.
        num_classes: labels lie below it.
    Returns:
        Labels in the order given.
    Raises:
        ValueError: no such class; the message names the nearest.
    """
    words = [word.strip() for word in given.split(",")] if isinstance(given, str) else list(given)
    return tuple(label for word in words if word != "" for label in _labels(word, names, num_classes))


def _labels(word: str | int, names: Sequence[str], num_classes: int) -> range:
    """One number, one name, or a range like 0-3."""
    if str(word) in names:
        first = last = list(names).index(str(word))
    else:
        start, dash, end = str(word).partition("-")
        numbers = [start, end] if dash else [start]
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            known = _near_name(str(word), names) if names else "its classes have no names here"
            raise ValueError(f"classes are numbers like 0,7,12, ranges like 0-3, or names; got {word!r}; {known}")
        first, last = int(numbers[0]), int(numbers[-1])
    if not first <= last < num_classes:
        raise ValueError(f"classes must lie in 0 to {num_classes - 1}, and ranges rise; got {word}")
    return range(first, last + 1)


def _near_name(word: str, names: Sequence[str]) -> str:
    """A hint for a misspelt class: the nearest name, or the first of them."""
    if len(names) > NAMES_SHOWN and not difflib.get_close_matches(word, names, n=1):
        return f"there are {len(names):,} names: {', '.join(names[:NAMES_SHOWN])}, …"
    return nearest(word, list(names))


def sample_images(
    generator: AnyGenerator,
    tokenizer: Tokenizer,
    folder: str | Path,
    sampling: SamplingConfig | None = None,
    request: SampleRequest | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Draw images into a folder, or go on with what is there.

    Several processes (started by torchrun, or anything else that sets RANK and WORLD_SIZE) share the shards.

    Args:
        generator: moved to the request's device.
        tokenizer: that its tokens belong to; moved there, too.
        folder: missing, empty, or begun with the same settings.
        sampling: how tokens are drawn; None: as the generator has it, without guidance.
        request: which images; None: 50 of every class.
        progress: show a bar (on the first process).
    Returns:
        The archive `samples.npz`, in an order that a seed mixes: the evaluator's Inception Score takes consecutive
        parts, which would hold few classes each.
    Raises:
        RunError: the folder holds something else, or samples of other settings (nothing was changed); the disk is
            full; the other processes are gone.
        ValueError: a tokenizer that does not fit the generator, or classes that it has not.
    """
    job = _Job(generator, tokenizer, expanded(folder), sampling or SamplingConfig(), request or SampleRequest())
    if job.is_finished():
        return job.folder / ARCHIVE
    with explained(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.folder / MANIFEST, json.dumps(job.manifest, indent=2).encode())
    for model in (generator, tokenizer):
        model.to(job.device).eval()
    with ExitStack() as stack:
        # Two commands at once draw the same images, so the second one may go on without the lock.
        with explained(job.folder):
            stack.enter_context(holding(job.lock(job.rank), remove=True))
        job.draw_shards(progress and job.rank == 0)
        return job.write_archive()


class _Job:
    """One folder of samples being filled, on one process."""

    def __init__(
        self,
        generator: AnyGenerator,
        tokenizer: Tokenizer,
        folder: Path,
        sampling: SamplingConfig,
        request: SampleRequest,
    ) -> None:
        self.generator, self.tokenizer, self.folder = generator, tokenizer, folder
        self.sampling, self.request = sampling, request
        check_fit(tokenizer, generator.config)
        there = generator.config.num_classes
        classes = request.classes or tuple(range(there))
        require(max(classes) < there, f"classes must lie in 0 to {there - 1}, got {list(classes)}")
        count = len(classes) * request.images_per_class
        require_at_most("images_per_class × classes", count, IMAGES)
        require_memory(16 * count, f"a list of {count:,} images", "lower images_per_class")
        self.labels = np.repeat(np.array(classes), request.images_per_class)
        self.rank, self.world_size = share_of_work()
        self.device = own_device(request.device)
        self.manifest = {
            "generator": fingerprint_weights(generator, generator.config.config_name),
            "tokenizer": tokenizer.fingerprint(),
            "sampling": to_dict(sampling),
            "images": len(self.labels),
            "images_per_class": request.images_per_class,
            "classes": list(map(int, classes)),
            "seed": request.seed,
            "shard_size": request.shard_size,
        }

    def is_finished(self) -> bool:
        """Whether everything is there already; raises where the folder holds anything else.

        What killed processes left of unfinished files is deleted.
        """
        sweep(self.folder)
        with explained(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise RunError(f"{self.folder} is no folder; nothing was changed. Choose another name")
            if not self.folder.exists() or not self._names():
                return False
        file = self.folder / MANIFEST
        if not file.is_file():
            raise RunError(
                f"{self.folder} exists and holds no samples; nothing was changed. Choose another folder, or empty it"
            )
        try:
            found = read_json(file)
        except UnreadableFile as error:
            raise RunError(f"{error}; restore it, or delete {self.folder} and start again") from None
        found["sampling"] = completed(SamplingConfig, found.get("sampling"))
        different = [name for name, value in self.manifest.items() if found.get(name) != value]
        if different:
            raise RunError(
                f"{self.folder} holds samples of other settings ({', '.join(different)} differ); nothing was changed. "
                "Choose another folder, or delete this one"
            )
        if not self._is_archive():
            return False
        for lock in self.folder.glob(LOCK.format("*")):
            with explained(lock), holding(lock, remove=True):
                pass
        return True

    def _names(self) -> list[str]:
        """What the folder holds, beside locks and what is being written."""
        ours = {LOCK.format(rank) for rank in range(self.world_size)}
        return [f.name for f in self.folder.iterdir() if f.name not in ours and not is_temporary(f.name)]

    def _is_archive(self) -> bool:
        """Whether the archive is there and holds as many images as it should; a damaged one is made again."""
        try:
            with open_ordinary(self.folder / ARCHIVE) as stream, zipfile.ZipFile(stream) as archive:
                with archive.open("arr_0.npy") as member:
                    np.lib.format.read_magic(member)
                    shape = np.lib.format.read_array_header_1_0(member)[0]
                    whole = archive.getinfo("arr_0.npy").file_size == member.tell() + int(np.prod(shape))
                return whole and shape[:1] == (len(self.labels),) and "arr_1.npy" in archive.namelist()
        except (OSError, UnreadableFile, KeyError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile):
            return False

    def lock(self, rank: int) -> Path:
        """What a process holds while it works."""
        return self.folder / LOCK.format(rank)

    def shards(self) -> list[range]:
        """Numbers of the images of each shard."""
        count, size = len(self.labels), self.request.shard_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def shard_file(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / SHARD.format(number)

    def draw_shards(self, progress: bool) -> None:
        """This process's share of what is not there yet."""
        mine = list(enumerate(self.shards()))[self.rank :: self.world_size]
        with CountingLine("samples", sum(len(shard) for _, shard in mine), "images", shown=progress) as line:
            for number, shard in mine:
                if not self._is_shard(number, shard):
                    self._draw_shard(number, shard, line)
                else:
                    line.advance(len(shard))

    def _is_shard(self, number: int, shard: range) -> bool:
        """Whether a shard is there with its images; one that is empty, cut, or another's is drawn again."""
        try:
            return list(self._places(number)) == list(shard)
        except RunError:
            return False

    def _places(self, number: int) -> dict[int, tuple[int, int]]:
        """Image → where its picture begins in the shard's file, and its bytes.

        Raises:
            RunError: the file is missing or damaged.
        """
        file = self.shard_file(number)
        try:
            with open_ordinary(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                members = [member for member in tar if member.name.endswith(".png")]
                size = os.fstat(stream.fileno()).st_size
            if any(member.offset_data + member.size > size for member in members):
                raise ValueError("cut short")
            return {int(member.name.removesuffix(".png")): (member.offset_data, member.size) for member in members}
        except (OSError, UnreadableFile, ValueError, tarfile.TarError) as error:
            raise RunError(
                f"{file} is missing or damaged ({error}); delete it and start the same command again, which draws its "
                "images again"
            ) from None

    def _draw_shard(self, number: int, shard: range, line: CountingLine) -> None:
        with replacing(self.shard_file(number)) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            for first in range(shard.start, shard.stop, self.request.batch_size):
                batch = range(first, min(first + self.request.batch_size, shard.stop))
                for image, picture in zip(batch, self._draw(batch), strict=True):
                    self._add(tar, image, picture)
                # A sign of life for those who wait on another machine.
                with suppress(OSError):
                    os.utime(self.lock(self.rank))
                line.advance(len(batch))

    @torch.no_grad()
    def _draw(self, batch: range) -> UInt8[np.ndarray, "B H W 3"]:
        labels = torch.from_numpy(self.labels[batch.start : batch.stop]).to(self.device)
        seed = self.request.seed + batch.start
        tokens = self.generator.sample(labels, seed=seed, compiled=self.request.compiled, **vars(self.sampling))
        decoded = self.tokenizer.decode_indices(self._grid(tokens))
        return truncate_to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy()

    def _grid(self, tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B h w"]:
        side = self.generator.config.grid_size
        return tokens.view(-1, side, side)

    def _add(self, tar: tarfile.TarFile, image: int, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """One image with its class and seed."""
        png = io.BytesIO()
        Image.fromarray(picture).save(png, format="PNG")
        label, facts = int(self.labels[image]), {"seed": self.request.seed + image, "class": int(self.labels[image])}
        contents = {"png": png.getvalue(), "cls": str(label).encode(), "json": json.dumps(facts).encode()}
        for ending, content in contents.items():
            member = tarfile.TarInfo(f"{image:09d}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def write_archive(self) -> Path:
        """All images in one file once all shards are there; the other processes wait until that is done."""
        target = self.folder / ARCHIVE
        work = f"{self.folder} is not finished"
        if self.rank:
            wait_for(self._is_archive, [self.lock(0)], work)
            return target
        others = [self.lock(rank) for rank in range(1, self.world_size)]
        files = [self.shard_file(number) for number in range(len(self.shards()))]
        wait_for(lambda: all(file.is_file() for file in files), others, work)
        order = np.random.default_rng(self.request.seed).permutation(len(self.labels))
        with replacing(target) as stream, zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
            pictures = self._read(order)
            first = next(pictures)
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                _write_header(member, (len(order), *first.shape), first.dtype)
                member.write(first.tobytes())
                for picture in pictures:
                    member.write(picture.tobytes())
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, self.labels[order])
        return target

    def _read(self, order: Int[np.ndarray, "N"]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Images by number, from wherever they lie; one file is open at a time, however many shards there are."""
        places = [self._places(number) for number in range(len(self.shards()))]
        for image in order.tolist():
            number = image // self.request.shard_size
            try:
                offset, size = places[number][image]
                with open_ordinary(self.shard_file(number)) as stream:
                    stream.seek(offset)
                    yield np.asarray(open_picture(io.BytesIO(stream.read(size))))
            except (OSError, UnreadableFile, KeyError, ValueError, SyntaxError) as error:
                raise RunError(
                    f"{self.shard_file(number)} is damaged at image {image} ({error}); delete it and start the same "
                    "command again, which draws its images again"
                ) from None


def _write_header(member: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
