"""Features of a set of images, over all processes, and kept for the next time where the set is a reference."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.cache import content_key, load_arrays, save_arrays
from ibqlab.base.progress import CountingLine
from ibqlab.metrics.extractors import FeatureExtractor
from ibqlab.metrics.images import ImageSet, Numbered, check_pixels, this_process
from ibqlab.metrics.pixel_metrics import published_range, to_unit_range
from ibqlab.metrics.statistics import FeatureStatistics, RunningStatistics


class FeatureCollector:
    """Statistics, and where asked for the features themselves, of a stream of batches.

    Args:
        extractor: the network.
        device: where it is.
        keep_features, keep_logits: also keep every row (n × D float32).
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        device: torch.device | str,
        *,
        keep_features: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.extractor = extractor
        self.keep = {"features": keep_features, "logits": keep_logits}
        self.running = RunningStatistics(extractor.dimension, device)
        self.rows: dict[str, list[Tensor]] = {"numbers": [], "features": [], "logits": []}

    @torch.no_grad()
    def update(self, numbers: Int[Tensor, " B"], images: Float[Tensor, "B 3 H W"]) -> None:
        """Add images in [0, 1]."""
        out = self.extractor(images)
        self.running.update(out.features)
        self.rows["numbers"].append(numbers)
        for name in ("features", "logits"):
            if self.keep[name]:
                self.rows[name].append(getattr(out, name).float().cpu())

    def result(self) -> FeatureStatistics:
        """Over all processes; every process must call it."""
        rows = {name: self._gathered(name) for name, is_kept in self.keep.items() if is_kept}
        return replace(self.running.result(), **rows)

    def _gathered(self, name: str) -> Tensor:
        width = self.extractor.dimension if not self.rows[name] else self.rows[name][0].shape[1]
        values = torch.cat([torch.empty(0, width, dtype=torch.float32, device="cpu"), *self.rows[name]])
        numbers = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *self.rows["numbers"]])
        parts = gather((numbers, values))
        numbers = torch.cat([process_rows[0] for process_rows in parts])
        return torch.cat([process_rows[1] for process_rows in parts if len(process_rows[0])])[numbers.argsort()]


def gather(value: Any) -> list[Any]:
    """A value of every process, in the order of their ranks, on every process."""
    _, processes = this_process()
    if processes == 1:
        return [value]
    values: list[Any] = [None] * processes
    dist.all_gather_object(values, value)
    return values


def decided_by_first(compute: Callable[[], Any]) -> Any:
    """What the first process computes, on every process; the others compute nothing."""
    rank, _ = this_process()
    return gather(None if rank else compute())[0]


def reference_key(images: ImageSet, extractor: FeatureExtractor, rounding: str, keep_features: bool) -> str | None:
    """Under which name the features of a reference are kept; None when it cannot be read twice.

    Depends on the content of the images, the extractor and its weights, and the rounding.
    Cost: reads all files, or for an image source all pixels, once; only in the first process.
    """
    content = decided_by_first(images.content)
    parts = {"extractor": extractor.name, "weights": extractor.weights, "rounding": rounding}
    return content and content_key(images=content, features=keep_features, **parts)


def load_reference(key: str | None) -> FeatureStatistics | None:
    """A kept reference; None when there is none. The first process decides for all."""
    arrays = decided_by_first(lambda: load_arrays("references", key)) if key else None
    # An entry that lacks something is damaged, and computed again.
    if arrays is None or not {"mean", "covariance", "count"} <= set(arrays):
        return None
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    moments = {name: arrays[name] for name in ("mean", "covariance")}
    return FeatureStatistics(**moments, count=int(arrays["count"]), features=features)


def save_reference(key: str | None, reference: FeatureStatistics) -> None:
    """Keep a reference for the next evaluation; only the first process writes."""
    rank, _ = this_process()
    if key is None or rank:
        return
    arrays = {"mean": reference.mean, "covariance": reference.covariance, "count": np.array(reference.count)}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    save_arrays("references", key, arrays)


def reference_statistics(
    images: ImageSet,
    extractor: FeatureExtractor,
    rounding: str,
    *,
    batch_size: int,
    device: torch.device,
    cache: bool,
    progress: bool,
) -> FeatureStatistics:
    """Features of images alone, kept ones where there are; every process must call it.

    Args:
        images: of one size, as the protocol prepares them.
        extractor: the network, on its device.
        rounding: of the protocol.
        batch_size, device, cache, progress: as in `evaluate_reconstruction`.
    """
    key = reference_key(images, extractor, rounding, False) if cache else None
    reference = load_reference(key)
    if reference is None:
        collector = FeatureCollector(extractor, device)
        for batch in progress_bar(images.batches(batch_size), images, "reference", progress):
            pixels = published_range(check_pixels(batch.images, None)).to(device)
            collector.update(batch.numbers, to_unit_range(pixels, rounding))
        reference = collector.result()
        save_reference(key, reference)
    return reference


def progress_bar(batches: Iterable[Numbered], images: ImageSet, label: str, show: bool) -> Iterable[Numbered]:
    """The batches, with a line that counts images; only the first process shows one."""
    rank, processes = this_process()
    with CountingLine(label, images.count, "images", shown=show and rank == 0) as line:
        for batch in batches:
            yield batch
            count = len(batch.images) * processes
            line.advance(count if images.count is None else min(count, images.count - line.done))
        if images.broken:
            line.total = line.done
            line.advance(0)
