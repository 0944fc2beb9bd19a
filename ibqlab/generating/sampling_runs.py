"""Thousands of samples as files: 50,000 images for the published evaluation, resumed after a kill, shared out.

    manifest.json                      what is drawn: generator, tokenizer, settings, seeds
    samples-000000.tar, …              webdataset's layout: PNG, class, and seed of each image
    samples.png                        the first images of each class to look at, and samples.csv, their seeds
    samples.npz                        arr_0 (N, H, W, 3) uint8, arr_1 (N,) classes: what the published evaluator reads

Image n is of class number n // images_per_class and is drawn by seed + n, whatever the batch, the shard or the process.
"""

import json
import os
import tarfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ibqlab.base import files
from ibqlab.base.checks import (
    BATCH,
    IMAGES,
    SAMPLE_SEED,
    require,
    require_at_most,
    require_between,
    require_choice,
    require_memory,
)
from ibqlab.base.locking import holding, wait_for
from ibqlab.base.processes import own_device, share_of_work
from ibqlab.base.progress import CountingLine
from ibqlab.config import completed, to_dict
from ibqlab.generating import sample_shards
from ibqlab.generating.drawing import draw_images
from ibqlab.generator import AnyGenerator, SamplingConfig
from ibqlab.generator.sampling_dtype import AUTO, DTYPE_NAMES, dtype_name, sampling_dtype
from ibqlab.tokenizer import Tokenizer, fingerprint_weights
from ibqlab.training.generator.token_source import check_fit

LOCK = ".drawing-{}.lock"
"""Held by the process of that number while it works, so that the others see it live."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Which images are drawn, and how the work is cut up. The first three and dtype change what comes out."""

    images_per_class: int = 50
    """Images of each class, ≥ 1. Published: 50 of 1,000 classes."""
    classes: tuple[int, ...] = ()
    """Labels; empty: all."""
    seed: int = 0
    """Seed of the first image, ≥ 0; the next ones follow. Published: 42, with other random numbers than these."""
    batch_size: int = 64
    """Images drawn at once, ≥ 1; 64 fill a recorded step on a GPU. Published: 50."""
    shard_size: int = 1000
    """Images per tar file, ≥ 1: what a kill can cost."""
    dtype: str = AUTO
    """Number type to draw in: "float32", "bfloat16", "float16" or "float64"; "auto": bfloat16 on a GPU that multiplies
    it, and the weights' type elsewhere."""
    compiled: bool | None = None
    """Record the step of one position; None: on a GPU, and not on a CPU, where compiling it takes a minute."""
    device: str = "cpu"
    """Where to compute: "cpu", "cuda" (one for each process of torchrun), or "cuda:1"."""

    def __post_init__(self):
        require_between("images_per_class", self.images_per_class, 1, IMAGES)
        require_between("batch_size", self.batch_size, 1, BATCH)
        require_between("shard_size", self.shard_size, 1, IMAGES)
        require_choice("dtype", self.dtype, DTYPE_NAMES)
        require_at_most("seed", self.seed, SAMPLE_SEED)
        require(self.seed >= 0, f"seed must be ≥ 0, got {self.seed}")
        require(min(self.classes, default=0) >= 0, f"classes must be ≥ 0, got {list(self.classes)}")


def sample_images(
    generator: AnyGenerator,
    tokenizer: Tokenizer,
    folder: str | Path,
    sampling: SamplingConfig | None = None,
    request: SampleRequest | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Draw images into a folder; what an earlier command has drawn there is kept.

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
    samples = _SampleFolder(
        generator, tokenizer, files.expanded(folder), sampling or SamplingConfig(), request or SampleRequest()
    )
    if samples.is_finished():
        return samples.folder / sample_shards.ARCHIVE
    with files.explained(samples.folder):
        samples.folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(samples.folder / sample_shards.MANIFEST, json.dumps(samples.manifest, indent=2).encode())
    for model in (generator, tokenizer):
        model.to(samples.device).eval()
    with ExitStack() as stack:
        # Two commands at once draw the same images, so the second one may go on without the lock.
        with files.explained(samples.folder):
            stack.enter_context(holding(samples.lock(samples.rank), remove=True))
        samples.draw_shards(progress and samples.rank == 0)
        return samples.write_archive()


class _SampleFolder:
    """A folder of samples that one of several processes fills."""

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
        num_classes = generator.config.num_classes
        classes = request.classes or tuple(range(num_classes))
        require(max(classes) < num_classes, f"classes must lie in 0 to {num_classes - 1}, got {list(classes)}")
        count = len(classes) * request.images_per_class
        require_at_most("images_per_class × classes", count, IMAGES)
        require_memory(16 * count, f"a list of {count:,} images", "lower images_per_class")
        self.labels = np.repeat(np.array(classes), request.images_per_class)
        starts = range(0, count, request.shard_size)
        self.shards = {
            folder / sample_shards.SHARD.format(number): range(first, min(first + request.shard_size, count))
            for number, first in enumerate(starts)
        }
        """File → numbers of its images."""
        self.rank, self.world_size = share_of_work()
        self.device = own_device(request.device)
        weights = next(generator.parameters()).dtype
        self.weights_dtype = dtype_name(weights)
        self.dtype = dtype_name(sampling_dtype(request.dtype, weights, torch.device(self.device)))
        self.manifest = {
            "generator": fingerprint_weights(generator, generator.config.config_name),
            "tokenizer": tokenizer.fingerprint(),
            "sampling": to_dict(sampling),
            "dtype": self.dtype,
            "images": len(self.labels),
            "images_per_class": request.images_per_class,
            "classes": list(map(int, classes)),
            "seed": request.seed,
            "shard_size": request.shard_size,
        }

    def is_finished(self) -> bool:
        """Whether everything is there already. Raises where the folder holds anything else.

        What killed processes left of unfinished files is deleted.
        """
        files.sweep(self.folder)
        with files.explained(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise files.RunError(f"{self.folder} is no folder; nothing was changed. Choose another name")
            # Beside locks and what is being written.
            lock_names = {LOCK.format(rank) for rank in range(self.world_size)}
            names = [file.name for file in self.folder.iterdir()] if self.folder.exists() else []
            if all(name in lock_names or files.is_temporary(name) for name in names):
                return False
        file = self.folder / sample_shards.MANIFEST
        if not file.is_file():
            raise files.RunError(
                f"{self.folder} exists and holds no samples; nothing was changed. Choose another folder, or empty it"
            )
        try:
            manifest = files.read_json(file)
        except files.UnreadableFile as error:
            raise files.RunError(f"{error}; restore it, or delete {self.folder} and start again") from None
        manifest["sampling"] = completed(SamplingConfig, manifest.get("sampling"))
        manifest.setdefault("dtype", self.weights_dtype)  # of earlier versions, which had no other
        different = [name for name, value in self.manifest.items() if manifest.get(name) != value]
        if different:
            raise files.RunError(
                f"{self.folder} holds samples of other settings ({', '.join(different)} differ); nothing was changed. "
                "Choose another folder, or delete this one"
            )
        if not self._is_archive():
            return False
        for lock in self.folder.glob(LOCK.format("*")):
            with files.explained(lock), holding(lock, remove=True):
                pass
        return True

    def lock(self, rank: int) -> Path:
        """What a process holds while it works."""
        return self.folder / LOCK.format(rank)

    def draw_shards(self, progress: bool) -> None:
        """This process's share of what is not there yet."""
        rank_shards = list(self.shards.items())[self.rank :: self.world_size]
        with CountingLine("samples", sum(len(shard) for _, shard in rank_shards), "images", shown=progress) as line:
            for file, shard in rank_shards:
                if self._is_shard(file):
                    line.advance(len(shard))
                else:
                    self._draw_shard(file, line)

    def _is_shard(self, file: Path) -> bool:
        """Whether a shard is there with its images; one that is empty, cut, or another's is drawn again."""
        try:
            return list(sample_shards.picture_ranges(file)) == list(self.shards[file])
        except files.RunError:
            return False

    def _draw_shard(self, file: Path, line: CountingLine) -> None:
        request, shard = self.request, self.shards[file]
        with files.replacing(file) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            for first in range(shard.start, shard.stop, request.batch_size):
                batch = range(first, min(first + request.batch_size, shard.stop))
                pictures = draw_images(
                    self.generator,
                    self.tokenizer,
                    torch.from_numpy(self.labels[batch.start : batch.stop]).to(self.device),
                    seed=request.seed + first,
                    batch_size=request.batch_size,
                    dtype=self.dtype,
                    compiled=request.compiled,
                    **vars(self.sampling),
                )
                for image, picture in zip(batch, pictures, strict=True):
                    sample_shards.add_picture(tar, image, picture, int(self.labels[image]), request.seed + image)
                # A sign of life for those who wait on another machine.
                with suppress(OSError):
                    os.utime(self.lock(self.rank))
                line.advance(len(batch))

    def write_archive(self) -> Path:
        """All images in one file, once all shards are there. The other processes wait until that is done."""
        target = self.folder / sample_shards.ARCHIVE
        work = f"{self.folder} is not finished"
        if self.rank:
            wait_for(self._is_archive, [self.lock(0)], work)
            return target
        other_locks = [self.lock(rank) for rank in range(1, self.world_size)]
        wait_for(lambda: all(file.is_file() for file in self.shards), other_locks, work)
        order = np.random.default_rng(self.request.seed).permutation(len(self.labels))
        pictures = sample_shards.read_pictures(self.folder, order.tolist(), self.request.shard_size)
        sample_shards.write_archive(target, pictures, self.labels[order])
        return target

    def _is_archive(self) -> bool:
        return sample_shards.is_archive(self.folder / sample_shards.ARCHIVE, len(self.labels))
