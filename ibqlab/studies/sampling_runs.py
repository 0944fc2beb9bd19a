"""Thousands of samples as files: 50,000 images for the published evaluation, gone on with after a kill, shared out.

    manifest.json                      what is drawn: generator, tokenizer, settings, seeds
    samples-000000.tar, …              webdataset's layout: PNG, class, and seed of each image
    samples.npz                        arr_0 (N, H, W, 3) uint8, arr_1 (N,) classes: what the published evaluator reads

Image n is of class number n // images_per_class and is drawn by seed + n, whatever the batch, the shard or the process.
"""

import io
import json
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ibqlab.config import to_dict
from ibqlab.data.pictures import open_picture
from ibqlab.data.sharing import own_device, share_of_work
from ibqlab.files import RunError, explained, replacing, write_whole
from ibqlab.generator import AnyGenerator, SamplingConfig
from ibqlab.metrics import truncate_to_uint8
from ibqlab.quantizers.base import require
from ibqlab.tokenizer import Tokenizer, fingerprint_weights
from ibqlab.training.generator_data import check_fit

MANIFEST, ARCHIVE = "manifest.json", "samples.npz"
POLL_SECONDS = 0.5


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
        RunError: the folder holds something else, or samples of other settings (nothing was changed); the disk is full.
        ValueError: a tokenizer that does not fit the generator, or classes that it has not.
    """
    job = _Job(
        generator, tokenizer, Path(folder).expanduser(), sampling or SamplingConfig(), request or SampleRequest()
    )
    if job.is_finished():
        return job.folder / ARCHIVE
    with explained(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    write_whole(job.folder / MANIFEST, json.dumps(job.manifest, indent=2).encode())
    for model in (generator, tokenizer):
        model.to(job.device).eval()
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
        """Whether everything is there already; raises where the folder holds anything else."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return False
        file = self.folder / MANIFEST
        if not file.is_file():
            raise RunError(
                f"{self.folder} exists and holds no samples; nothing was changed. Choose another folder, or empty it"
            )
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); delete {self.folder} and start again") from None
        different = [name for name, value in self.manifest.items() if found.get(name) != value]
        if different:
            raise RunError(
                f"{self.folder} holds samples of other settings ({', '.join(different)} differ); nothing was changed. "
                "Choose another folder, or delete this one"
            )
        return (self.folder / ARCHIVE).is_file()

    def shards(self) -> list[range]:
        """Numbers of the images of each shard."""
        count, size = len(self.labels), self.request.shard_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def shard_file(self, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"samples-{number:06d}.tar"

    def draw_shards(self, progress: bool) -> None:
        """This process's share of what is not there yet."""
        mine = list(enumerate(self.shards()))[self.rank :: self.world_size]
        with tqdm(
            total=sum(len(shard) for _, shard in mine), desc="samples", unit="image", disable=not progress
        ) as bar:
            for number, shard in mine:
                if not self.shard_file(number).is_file():
                    self._draw_shard(number, shard, bar)
                else:
                    bar.update(len(shard))

    def _draw_shard(self, number: int, shard: range, bar: Any) -> None:
        with replacing(self.shard_file(number)) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            for first in range(shard.start, shard.stop, self.request.batch_size):
                batch = range(first, min(first + self.request.batch_size, shard.stop))
                for image, picture in zip(batch, self._draw(batch), strict=True):
                    self._add(tar, image, picture)
                bar.update(len(batch))

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
        if self.rank:
            while not target.is_file():
                time.sleep(POLL_SECONDS)
            return target
        while not all(self.shard_file(number).is_file() for number in range(len(self.shards()))):
            time.sleep(POLL_SECONDS)
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
        """Images by number, from wherever they lie."""
        with ExitStack() as stack:
            files = [self.shard_file(number) for number in range(len(self.shards()))]
            shards = [stack.enter_context(tarfile.open(file)) for file in files]
            for image in order.tolist():
                content = shards[image // self.request.shard_size].extractfile(f"{image:09d}.png")
                yield np.asarray(open_picture(content))


def _write_header(member: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
