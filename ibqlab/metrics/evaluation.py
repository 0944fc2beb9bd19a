"""What both kinds of evaluation share: the result, and the checks that come before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ibqlab.base.checks import BATCH, require, require_at_most, require_choice
from ibqlab.base.processes import names_of_all_processes
from ibqlab.base.progress import notice
from ibqlab.data.broken import describe_unreadable
from ibqlab.metrics.cards import MetricCard, cards_markdown, cards_table
from ibqlab.metrics.extractors import FeatureExtractor, build_extractor
from ibqlab.metrics.images import ImageSet, this_process
from ibqlab.metrics.protocols import Protocol
from ibqlab.metrics.weights import PUBLISHED

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found; the same on every process. `evaluation["psnr"]` is a card, `.table()` all of them."""

    cards: tuple[MetricCard, ...]
    """One per metric, in the order of the tables."""
    images: int
    """Images evaluated, unreadable ones left out."""
    protocol: Protocol
    """How."""
    counts: Int[Tensor, " K"] | None = None
    """Hits per code on these images, for `ibqlab.diagnostics.usage`; None for generated samples."""
    originals: UInt8[Tensor, "P 3 H W"] | None = None
    """The first few images; None for generated samples."""
    reconstructions: UInt8[Tensor, "P 3 H W"] | None = None
    """Their reconstructions, rounded to 8 bits for the eye."""
    remeasured: tuple[MetricCard, ...] = ()
    """The same reconstructions under a second protocol's rounding and extractor, against the same images."""
    other_reference: MetricCard | None = None
    """rFID of the same under the second protocol, against the images as that one prepares them."""

    def __getitem__(self, key: str) -> MetricCard:
        """The card of a metric.

        Raises:
            ValueError: it was not computed; the message names those that were.
        """
        cards = {card.key: card for card in self.cards}
        require_choice("metric", key, cards)
        return cards[key]

    def table(self) -> "pd.DataFrame":
        """One row per metric."""
        return cards_table(self.cards)

    def markdown(self) -> str:
        """The same as a Markdown table."""
        return cards_markdown(self.cards)


def unreadable_remarks(count: int) -> tuple[str, ...]:
    """What must be said of a set of which so many files could not be read."""
    return (f"{count:,} unreadable {'file' if count == 1 else 'files'} left out",) if count else ()


def tell_unreadable(images: ImageSet) -> list[str]:
    """Names of a set's unreadable files over all processes, which all must call it; the first one says them."""
    names = list(dict.fromkeys(names_of_all_processes(list(images.broken))))
    rank, _ = this_process()
    if names and rank == 0:
        notice(describe_unreadable(names, images.count or len(names)))
    return names


def check_batch_size(batch_size: int) -> None:
    """Refuse a batch that the processes cannot share evenly."""
    _, processes = this_process()
    require_at_most("batch_size", batch_size, BATCH, "images of a step over all processes")
    require(
        batch_size >= 1 and batch_size % processes == 0,
        f"batch_size counts the images over all processes and must be a multiple of their number {processes}, at least "
        f"1; got {batch_size}. Use {max(batch_size // processes, 1) * processes}",
    )


def open_extractor(
    extractor: str | FeatureExtractor,
    weights: str | Path,
    check_weights: bool,
    device: torch.device,
    side: tuple[int, int] | None,
) -> FeatureExtractor:
    """The extractor of an evaluation on its device, tried on one black picture.

    Args:
        extractor: registered name, or an object.
        weights: Inception's file; empty: torch's folder of downloads.
        check_weights: whether it must be the published one.
        device: where it will work.
        side: height and width of the images where known.
    Raises:
        ValueError: unknown name, images too small, or features of another shape than it promises.
        FileNotFoundError: missing weights.
        TypeError: not a name and not an extractor.
    """
    if isinstance(extractor, str):
        inception = {"weights": weights, "expected_sha256": PUBLISHED if check_weights else None}
        extractor = build_extractor(extractor, **(inception if extractor.startswith("inception-") else {}))
    if not isinstance(extractor, FeatureExtractor):
        raise TypeError(
            f"an extractor needs name, dimension, weights and smallest_side; got {type(extractor).__name__}. "
            "See ibqlab.metrics.extractors"
        )
    if isinstance(extractor, torch.nn.Module):
        extractor.eval().to(device)
    check_side(side, extractor.smallest_side, f"the extractor {extractor.name}")
    with torch.no_grad():
        tried = torch.zeros(1, 3, *(side or [max(extractor.smallest_side, 32)] * 2), device=device)
        shape = tuple(extractor(tried).features.shape)
    require(
        shape == (1, extractor.dimension),
        f"{extractor.name} promises features (B, {extractor.dimension}); for one image it gives {shape}",
    )
    return extractor


def check_side(side: tuple[int, int] | None, smallest: int, name: str) -> None:
    """Refuse images too small for a metric, where their size is known."""
    require(
        side is None or min(side) >= smallest,
        f"{name} needs images of at least {smallest} × {smallest} pixels; got {side and side[0]} × {side and side[1]}. "
        "Leave it out of metrics=…, or use larger images",
    )


def check_count(count: int | None, least: int, metric: str, items: str, remedy: str) -> None:
    """Refuse too few images for a metric, where their number is known."""
    require(count is None or count >= least, f"{metric} needs at least {least:,} {items}; got {count}. {remedy}")
