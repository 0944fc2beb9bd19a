"""Batches by number: what is in batch s depends on (seed, s) and on nothing else.

An epoch is a permutation from (seed, epoch); a sample's own seed comes from (seed, its position in the whole run). The
list of (index, seed) pairs is therefore known before anything is loaded: resuming in mid-epoch is starting the list
elsewhere, ranks take slices of it, and loader processes only share out the work.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibqlab.bounds import BATCH, IMAGES, WORKERS, require_at_most
from ibqlab.data.listed import UnreadableImages
from ibqlab.data.source import ImageSource, Sample

Request = tuple[int, int]
"""Index of an image and the seed of its random choices."""

_ORDER, _CHOICES = 0, 1


class Batch(NamedTuple):
    """Images as stored; `to_model_range(batch.images)` is what the tokenizer takes."""

    images: UInt8[Tensor, "B 3 H W"]
    labels: Int64[Tensor, "B"]
    """Index into the source's classes, −1 where there is none."""

    broken: list[str]
    """Names of unreadable files met on the way (`UnreadableName`), for `BrokenImages.add`."""


def training_batches(
    source: ImageSource,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterable[Batch]:
    """Global batches number start_step … start_step + steps − 1, each image once per epoch in an order of its own.

    A batch that reaches the end of an epoch goes on with the next one, so every batch is full.

    Args:
        source: the training split.
        batch_size: images per step over all ranks, at least 1.
        seed: of the run, at least 0.
        start_step: number of the first batch, from 0; a resumed run gives the steps it has done.
        steps: how many batches follow.
        rank: this process, 0 to world_size − 1; it gets its contiguous slice of every batch.
        world_size: processes that share a batch; it must divide batch_size.
        workers: processes that load images, at least 0; they change nothing but the speed.
    Returns:
        An iterable of batches of batch_size / world_size images.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    starts = training_starts(batch_size, seed, range(start_step, start_step + steps), (rank, world_size))
    share, order = batch_size // world_size, EpochOrder(len(source), seed)
    requests = Requests(starts, lambda first: [order.request(position) for position in range(first, first + share)])
    return load_requests(source, requests, workers)


def validation_batches(
    source: ImageSource,
    *,
    images: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterable[Batch]:
    """The first `images` images in their fixed order, each exactly once over all ranks.

    The last batch may be smaller, and a rank whose slice of it would be empty gets one batch fewer: gather results
    after the loop, not inside.

    Args:
        source: the validation split.
        images: how many, at least 1. An endless source gives any number (its own docstring tells whether they overlap);
            any other stops at len(source), even where more are asked for.
        batch_size: images per batch over all ranks.
        rank: this process; it gets its contiguous slice of every batch.
        world_size: processes that share a batch; it must divide batch_size.
        workers: processes that load images, at least 0.
    Returns:
        An iterable of batches of at most batch_size / world_size images.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    check_sharing(batch_size, rank, world_size)
    if images < 1:
        raise ValueError(f"validation needs at least 1 image; got images={images}.")
    require_at_most("images", images, IMAGES)
    count = images if source.endless else min(images, len(source))
    share = batch_size // world_size
    starts = range(rank * share, count, batch_size)
    requests = Requests(starts, lambda first: [(index, 0) for index in range(first, min(first + share, count))])
    return load_requests(source, requests, workers)


def training_starts(batch_size: int, seed: int, steps: range, sharing: tuple[int, int]) -> range:
    """Positions in the run at which a rank's slices of some batches begin.

    Args:
        batch_size: images per step over all ranks.
        seed: of the run.
        steps: numbers of the batches.
        sharing: (rank, world_size).
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    rank, world_size = sharing
    check_sharing(batch_size, rank, world_size)
    count = len(steps) if steps.stop >= steps.start else steps.stop - steps.start
    if seed < 0 or steps.start < 0 or count < 0:
        raise ValueError(f"seed, start_step and steps must be at least 0; got {seed}, {steps.start} and {count}.")
    return range(steps.start * batch_size + rank * (batch_size // world_size), steps.stop * batch_size, batch_size)


class EpochOrder:
    """The request at any position of a run; holds the permutation of the epoch it was asked for last."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.epoch, self.permutation = -1, np.empty(0, dtype=np.int64)

    def request(self, position: int) -> Request:
        """Which image stands at a position, and the seed of its choices there."""
        epoch, place = divmod(position, self.length)
        if epoch != self.epoch:
            rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_ORDER, epoch)))
            self.epoch, self.permutation = epoch, rng.permutation(self.length)
        return int(self.permutation[place]), seed_of_choices(self.seed, position)


def seed_of_choices(seed: int, *place: int) -> int:
    """Seed of the random choices at a place, 0 to 2⁶³ − 1: a position of a run, or an image and its view."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_CHOICES, *place))
    # One bit less than it has: torch generators and int64 tensors hold the seed too.
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


class Requests:
    """What each batch asks for, in the shape of a batch sampler: made when asked for, so a long run costs no memory."""

    def __init__(self, starts: range, requests_from: Callable[[int], list[Request]]) -> None:
        self.starts, self.requests_from = starts, requests_from

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Request]]:
        return map(self.requests_from, self.starts)


class _Samples(Dataset):
    """A source as torch's loader wants it: a request in, a sample out."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, request: Request) -> Sample | UnreadableImages:
        try:
            return self.source.get(*request)
        except UnreadableImages as error:
            # Raised in the training process: torch would wrap a loader process's whole traceback around it.
            return error


class _Batches(DataLoader):
    """Torch's loader, which raises what a loader process says of unreadable images."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImages):
                raise batch
            yield batch


def load_requests(source: ImageSource, requests: Requests, workers: int) -> Iterable[Batch]:
    """Batches of what each request asks for.

    Args:
        source: of the images.
        requests: batch by batch.
        workers: processes that load images, at least 0.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0; got {workers}. Use 0 to load in the training process.")
    require_at_most("workers", workers, WORKERS)
    return _Batches(
        _Samples(source),
        batch_sampler=requests,
        collate_fn=_collate,
        num_workers=workers,
        # Validation walks its batches again and again: its processes are started once.
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a number at each start: not from the run's own random state, which must survive a resume.
        generator=torch.Generator(),
    )


def _collate(samples: list[Sample | UnreadableImages]) -> Batch | UnreadableImages:
    error = next((sample for sample in samples if isinstance(sample, UnreadableImages)), None)
    if error is not None:
        return error
    broken = [name for sample in samples for name in sample.broken]
    labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    return Batch(torch.stack([sample.image for sample in samples]), labels, broken)


def check_sharing(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ValueError unless the ranks can share batches of that size."""
    require_at_most("batch_size", batch_size, BATCH, "images of a step over all processes")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0 to world_size − 1; got rank={rank}, world_size={world_size}.")
    if batch_size < 1 or batch_size % world_size:
        near = max(world_size, batch_size // world_size * world_size)
        raise ValueError(
            f"batch_size counts the images over all processes and must be a multiple of their number; got batch_size="
            f"{batch_size} for {world_size} processes. Use batch_size={near} or {near + world_size}."
        )
