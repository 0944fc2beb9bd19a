"""Batches by number: what is in batch s depends on (seed, s) and on nothing else.

An epoch is a permutation from (seed, epoch); a sample's own seed comes from (seed, its position in the whole run). The
list of (index, seed) pairs is therefore known before anything is loaded: resuming in mid-epoch is starting the list
elsewhere, ranks take slices of it, and loader processes only share out the work.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64

from ibqlab.base.checks import BATCH, IMAGES, require, require_at_most
from ibqlab.data.batch_loading import Batch, Request, Requests, load_requests
from ibqlab.data.broken import UnreadableImages
from ibqlab.data.source import ImageSource

_ORDER, _CHOICES = 0, 1
"""Which stream of random numbers of a run's seed: the orders of the epochs, and the choices of the samples."""


def training_batches(source: ImageSource, *, workers: int = 0, **settings: int) -> Iterable[Batch]:
    """Global batches number start_step … start_step + steps − 1, each image once per epoch in an order of its own.

    A batch that reaches the end of an epoch continues with the next one, so every batch is full.

    Args:
        source: the training split.
        workers: processes that load images, at least 0; they change nothing but the speed.
        **settings: batch_size, seed, start_step, steps, rank and world_size, as in `training_requests`.
    Returns:
        An iterable of batches of batch_size / world_size images.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    return load_requests(source, training_requests(len(source), **settings), workers)


def validation_batches(source: ImageSource, *, workers: int = 0, **settings: int) -> Iterable[Batch]:
    """The first `images` images in their fixed order, each exactly once over all ranks.

    The last batch may be smaller, and a rank whose slice of it would be empty gets one batch fewer: gather results
    after the loop, not inside.

    Args:
        source: the validation split. An endless one gives any number of images (its own docstring tells whether they
            overlap); any other stops at len(source), even where more are asked for.
        workers: processes that load images, at least 0.
        **settings: images, batch_size, rank and world_size, as in `validation_requests`.
    Returns:
        An iterable of batches of at most batch_size / world_size images, none where all of a batch are unreadable.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    length = None if source.endless else len(source)
    return load_requests(source, validation_requests(length, **settings), workers, stand_ins=False)


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
        yield Batch(batch.images[:left], batch.labels[:left], broken, batch.numbers[:left])
        left, broken = max(0, left - len(batch.images)), []
        if not left:
            return
    if left == images:
        raise UnreadableImages(
            f"at least one validation image must be readable; none of {source.description} is. Replace the files"
        )


def first_images(source: ImageSource, images: int, workers: int = 0) -> Batch:
    """The same as one batch; of those that are left out, the ones before the last image."""
    batches = list(readable_batches(source, images, workers=workers))
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        [name for batch in batches for name in batch.broken],
        tuple(number for batch in batches for number in batch.numbers),
    )


def training_requests(
    length: int, *, batch_size: int, seed: int, start_step: int, steps: int, rank: int = 0, world_size: int = 1
) -> Requests:
    """Which images a rank's slices of the training batches hold, with a seed for each; nothing is loaded.

    Args:
        length: images in one epoch.
        batch_size: images per step over all ranks, at least 1.
        seed: of the run, at least 0.
        start_step: number of the first batch, from 0; a resumed run gives the steps it has done.
        steps: how many batches follow.
        rank: this process, 0 to world_size − 1; it gets its contiguous slice of every batch.
        world_size: processes that share a batch; it must divide batch_size.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    _check_sharing(batch_size, rank, world_size)
    if seed < 0 or start_step < 0 or steps < 0:
        raise ValueError(f"seed, start_step and steps must be at least 0; got {seed}, {start_step} and {steps}.")
    share = batch_size // world_size

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Int64[np.ndarray, "N"]:
        # From (seed, epoch) alone: epoch 7 needs none of the six before it, so a resumed run has the same order.
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).permutation(length)

    def request(position: int) -> Request:
        epoch, place_in_epoch = divmod(position, length)
        return int(order(epoch)[place_in_epoch]), seed_of_choices(seed, position)

    # The run is one long row of positions, batch_size of them per step. A resumed run begins further along, and a
    # rank at its slice of the step.
    starts = range(start_step * batch_size + rank * share, (start_step + steps) * batch_size, batch_size)
    return Requests(starts, lambda start: [request(position) for position in range(start, start + share)])


def validation_requests(
    length: int | None, *, images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Requests:
    """Which images a rank's slices of the validation batches hold: 0, 1, 2, … with seed 0; nothing is loaded.

    Args:
        length: how many images there are; None: no end.
        images: how many are asked for, at least 1.
        batch_size, rank, world_size: as in `training_requests`.
    Raises:
        ValueError: world_size does not divide batch_size, or a number is out of its range.
    """
    _check_sharing(batch_size, rank, world_size)
    require(images >= 1, f"validation needs at least 1 image; got images={images}.")
    require_at_most("images", images, IMAGES)
    count = images if length is None else min(images, length)
    share = batch_size // world_size
    starts = range(rank * share, count, batch_size)
    return Requests(starts, lambda start: [(index, 0) for index in range(start, min(start + share, count))])


def seed_of_choices(seed: int, *position: int) -> int:
    """Seed of the random choices at a position of a run, or for an image and its crop; 0 to 2⁶³ − 1."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_CHOICES, *position))
    # One bit less than it has: torch generators and int64 tensors hold the seed too.
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def _check_sharing(batch_size: int, rank: int, world_size: int) -> None:
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
