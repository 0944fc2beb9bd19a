"""Loads batches in the order in which they are asked for, in this process or in several.

Start with `load_requests`. Which images a batch holds is decided in `batches`.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibqlab.base.checks import WORKERS, require, require_at_most
from ibqlab.data.broken import UnreadableImages
from ibqlab.data.source import ImageSource, Sample

Request = tuple[int, int]
"""Index of an image and the seed of its random choices."""


class Batch(NamedTuple):
    """Images as stored; `to_model_range(batch.images)` is what the tokenizer takes."""

    images: UInt8[Tensor, "B 3 H W"]
    labels: Int64[Tensor, "B"]
    """Index into the source's classes, −1 where there is none."""

    broken: list[str]
    """Names of unreadable files met on the way (`UnreadableName`), for `BrokenImages.add`."""

    numbers: tuple[int, ...] = ()
    """Which images of the source were asked for, one for each that is here."""


class Requests:
    """What each batch asks for, in order; worked out only when asked for, so a long run costs no memory.

    Args:
        starts: where each batch begins.
        requests_from: the requests of the batch that begins there.
    """

    def __init__(self, starts: range, requests_from: Callable[[int], list[Request]]) -> None:
        self.starts, self.requests_from = starts, requests_from

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Request]]:
        return map(self.requests_from, self.starts)


class _BatchReader(Dataset):
    """A source as torch's loader wants it: the requests of a batch in, the batch out."""

    def __init__(self, source: ImageSource, stand_ins: bool) -> None:
        self.source, self.stand_ins = source, stand_ins

    def __getitem__(self, requests: list[Request]) -> Batch | UnreadableImages:
        samples: list[Sample] = []
        numbers: list[int] = []
        broken: list[str] = []
        for number, seed in requests:
            try:
                sample = self.source.get(number, seed)
            except UnreadableImages as error:
                # Raised in the training process: torch would wrap a loader process's whole traceback around it.
                return error
            if sample.broken and not self.stand_ins:
                # The first name is that of the image itself; each of the others is asked for where its turn is.
                broken += sample.broken[:1]
                continue
            samples.append(sample)
            numbers.append(number)
            broken += sample.broken
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        images = [sample.image for sample in samples]
        pixels = torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        return Batch(pixels, labels, broken, tuple(numbers))


class _Loader(DataLoader):
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
    require(workers >= 0, f"workers must be at least 0; got {workers}. Use 0 to load in the training process.")
    require_at_most("workers", workers, WORKERS)
    return _Loader(
        _BatchReader(source, stand_ins),
        sampler=requests,
        batch_size=None,  # a request of the sampler is a batch already
        collate_fn=_unchanged,
        num_workers=workers,
        # Validation walks its batches again and again: its processes are started once.
        persistent_workers=workers > 0,
        worker_init_fn=obey_parent_alone,
        pin_memory=torch.cuda.is_available(),
        # The loader draws a number at each start: not from the run's own random state, which must survive a resume.
        generator=torch.Generator(),
    )


def _unchanged(batch: Any) -> Any:
    return batch


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
