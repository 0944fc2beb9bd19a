"""Batches by number: what is in batch s depends on (seed, s) and on nothing else.

An epoch is a permutation from (seed, epoch); a sample's own seed comes from (seed, its position in the whole run). The
list of (index, seed) pairs is therefore known before anything is loaded: resuming in mid-epoch is starting the list
elsewhere, ranks take slices of it, and loader processes only share out the work.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibqlab.base.checks import BATCH, IMAGES, WORKERS, require_at_most
from ibqlab.data.decoding import UnreadableImages
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

    numbers: tuple[int, ...] = ()
    """Which images of the source were asked for, one for each that is here."""


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
        An iterable of batches of at most batch_size / world_size images, none where all of a batch are unreadable.
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
    return load_requests(source, requests, workers, stand_ins=False)


def readable_batches(source: ImageSource, images: int, batch_size: int = 32, workers: int = 0) -> Iterator[Batch]:
    """The first readable validation images in their order; fewer where there are fewer.

    Args:
        source: the validation split.
        images: how many, at least 1.
        batch_size: images of one batch, at most.
        workers: processes that load images, at least 0.
    Raises:
        UnreadableImages: none can be read.
    """
    left, broken = images, []
    for batch in validation_batches(
        source, images=max(images, len(source)), batch_size=min(batch_size, images), workers=workers
    ):
        broken += batch.broken
        if not len(batch.images):
            continue
        part = Batch(batch.images[:left], batch.labels[:left], broken, tuple(batch.numbers)[:left])
        left, broken = left - len(part.images), []
        yield part
        if not left:
            return
    if left == images:
        raise UnreadableImages(
            f"at least one validation image must be readable; none of {source.description} is. Replace the files"
        )


def first_images(source: ImageSource, images: int, workers: int = 0) -> Batch:
    """The same as one batch; of those that are left out, the ones before the last image."""
    parts = list(readable_batches(source, images, workers=workers))
    return Batch(
        torch.cat([part.images for part in parts]),
        torch.cat([part.labels for part in parts]),
        [name for part in parts for name in part.broken],
        tuple(number for part in parts for number in part.numbers),
    )


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


class _Loaded(NamedTuple):
    """What came of one request."""

    number: int
    """Of the image that was asked for."""
    sample: Sample | None
    """None: it is unreadable, and nothing may stand in for it."""
    broken: tuple[str, ...]


class _Samples(Dataset):
    """A source as torch's loader wants it: a request in, a sample out."""

    def __init__(self, source: ImageSource, stand_ins: bool) -> None:
        self.source, self.stand_ins = source, stand_ins

    def __getitem__(self, request: Request) -> _Loaded | UnreadableImages:
        number, seed = request
        try:
            sample = self.source.get(number, seed)
        except UnreadableImages as error:
            # Raised in the training process: torch would wrap a loader process's whole traceback around it.
            return error
        if sample.broken and not self.stand_ins:
            # The first name is that of the image itself; each of the others is asked for where its turn is.
            return _Loaded(number, None, sample.broken[:1])
        return _Loaded(number, sample, sample.broken)


class _Batches(DataLoader):
    """Torch's loader, which raises what a loader process says of unreadable images."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, UnreadableImages):
                raise batch
            yield batch


def load_requests(source: ImageSource, requests: Requests, workers: int, *, stand_ins: bool = True) -> Iterable[Batch]:
    """Batches of what each request asks for.

    Args:
        source: of the images.
        requests: batch by batch.
        workers: processes that load images, at least 0.
        stand_ins: another image stands in for an unreadable one, as training needs it; False: it is left out, so that
            no image counts twice.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0; got {workers}. Use 0 to load in the training process.")
    require_at_most("workers", workers, WORKERS)
    return _Batches(
        _Samples(source, stand_ins),
        batch_sampler=requests,
        collate_fn=_collate,
        num_workers=workers,
        # Validation walks its batches again and again: its processes are started once.
        persistent_workers=workers > 0,
        worker_init_fn=obey_parent_alone,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a number at each start: not from the run's own random state, which must survive a resume.
        generator=torch.Generator(),
    )


def _collate(loaded: list[_Loaded | UnreadableImages]) -> Batch | UnreadableImages:
    error = next((one for one in loaded if isinstance(one, UnreadableImages)), None)
    if error is not None:
        return error
    broken = [name for one in loaded for name in one.broken]
    here = [one for one in loaded if one.sample is not None]
    images = [one.sample.image for one in here]
    labels = torch.tensor([one.sample.label for one in here], dtype=torch.int64)
    pixels = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
    return Batch(pixels, labels, broken, tuple(one.number for one in here))


def obey_parent_alone(_: int) -> None:
    """In a process that loads images: SIGTERM from anybody but its parent is ignored.

    A signal to all processes of a command, as schedulers and terminals send it, must not end this one before the step
    in progress has its images. The parent decides when it is over; when the parent dies, torch ends this process.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


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
