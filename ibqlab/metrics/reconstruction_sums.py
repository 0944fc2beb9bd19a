"""What is summed over the images of a reconstruction evaluation, under one protocol, and the cards made of it.

The pass over the images is in `reconstruction`; one pass may fill the sums of several protocols, so that the same
reconstructions are measured by each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.measures import measure
from ibqlab.base.processes import sum_over_processes
from ibqlab.diagnostics.usage import measure_usage_of_counts, perplexity
from ibqlab.metrics import features
from ibqlab.metrics.cards import MetricCard, few_images_remarks
from ibqlab.metrics.extractors import FeatureExtractor, metric_name
from ibqlab.metrics.perceptual import PerceptualDistance
from ibqlab.metrics.pixel_metrics import ROUNDINGS, psnr, ssim, to_unit_range
from ibqlab.metrics.protocols import Protocol
from ibqlab.metrics.statistics import FeatureStatistics, frechet_distance

PIXEL_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}


class ReconstructionSums:
    """Sums over images and their reconstructions, as one protocol rounds them and its extractor sees them.

    Args:
        protocol: how.
        metrics: which.
        device: where the pictures are.
        lpips: networks of those metrics that are LPIPS.
        extractor: network of rFID; None without it.
        key: name of the images' features in the cache; None: not kept.
    """

    def __init__(
        self,
        protocol: Protocol,
        metrics: tuple[str, ...],
        device: torch.device,
        *,
        lpips: dict[str, PerceptualDistance],
        extractor: FeatureExtractor | None,
        key: str | None = None,
    ) -> None:
        self.protocol, self.metrics, self.lpips, self.extractor, self.key = protocol, metrics, lpips, extractor, key
        self.per_image = tuple(name for name in metrics if name in PIXEL_METRICS or name in lpips)
        self.sums = torch.zeros(len(self.per_image) + 1, dtype=torch.float64, device=device)
        self.reference: FeatureStatistics | None = None
        """Features of the images, known from an earlier evaluation or once `values` has summed them."""
        if extractor is not None:
            self.reference = features.load_reference(key)
            self._rebuilt, self._original = (features.FeatureCollector(extractor, device) for _ in range(2))

    def update(self, numbers: Int[Tensor, " B"], x: Float[Tensor, "B 3 H W"], y: Float[Tensor, "B 3 H W"]) -> None:
        """Add images and their reconstructions, both in [−1, 1]."""
        values = [self._measure(name, x, y).double().sum() for name in self.per_image]
        self.sums += torch.stack([*values, self.sums.new_tensor(len(x))])
        if self.extractor is not None:
            self._rebuilt.update(numbers, to_unit_range(y, self.protocol.rounding))
            if self.reference is None:
                self._original.update(numbers, to_unit_range(x, self.protocol.rounding))

    def _measure(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """One value per image."""
        if name in self.lpips:
            return self.lpips[name](x, y)
        cut = partial(to_unit_range, rounding=self.protocol.pixel_rounding)
        return PIXEL_METRICS[name](cut(x), cut(y))

    def values(self) -> tuple[int, dict[str, float]]:
        """Number of images, and the value of each metric that is no count of codes, over all processes.

        Every process must call it. Without images there are no values.
        """
        *sums, count = sum_over_processes(self.sums).tolist()
        images = round(count)
        values = {name: total / max(images, 1) for name, total in zip(self.per_image, sums, strict=True)}
        if self.extractor is not None and images > 1:
            if self.reference is None:
                self.reference = self._original.result()
                features.save_reference(self.key, self.reference)
            values["rfid"] = self.distance_to(self.reference)
        return images, values

    def distance_to(self, reference: FeatureStatistics) -> float:
        """Fréchet distance of the reconstructions to a reference; the first process computes it for all."""
        rebuilt = self._rebuilt.result()
        return features.decided_by_first(lambda: frechet_distance(reference, rebuilt))

    def card(self, name: str, value: float, facts: dict[str, Any], counts: Int[Tensor, " K"]) -> MetricCard:
        """The card of a metric.

        Args:
            name: of the metric.
            value: of it.
            facts: what the cards of one evaluation have in common.
            counts: hits per code.
        """
        quantity = measure(name)
        facts = {"metric": quantity.title, "unit": quantity.unit, "better": quantity.better} | facts
        facts["protocol"] = self.protocol.name
        if name == "rfid":
            extractor = self.extractor
            facts |= {"metric": metric_name(name, extractor), "rounding": ROUNDINGS[self.protocol.rounding]}
            facts |= {"extractor": extractor.name, "weights": extractor.weights}
            facts["remarks"] += few_images_remarks(facts["images"], extractor.dimension)
        elif name in self.lpips:
            facts |= _lpips_facts(self.lpips[name])
        elif name in PIXEL_METRICS:
            facts["rounding"] = ROUNDINGS[self.protocol.pixel_rounding]
        else:
            usage = measure_usage_of_counts(counts)
            # Perplexity counts hits as usage does, but its name needs no definition of a hit.
            facts |= {"metric": f"{quantity.title} (any hit)"} if name == "usage" else {}
            facts |= {"rounding": "", "reference": f"{usage.codebook_size:,} codes", "tokens": usage.tokens}
            facts["remarks"] += usage.remarks
        return MetricCard(key=name, value=value, **facts)


def code_values(counts: Int[Tensor, " K"]) -> dict[str, float]:
    """The metrics that are counts of codes."""
    return {"usage": measure_usage_of_counts(counts).value, "perplexity": perplexity(counts)}


def _lpips_facts(distance: PerceptualDistance) -> dict[str, Any]:
    """What the card of LPIPS says beside its value. Only with the published weights is it called LPIPS."""
    metric = {} if distance.weights.published else {"metric": f"LPIPS formula on other weights ({distance.net})"}
    return metric | {
        "rounding": "not rounded, float in [−1, 1]",
        "extractor": f"LPIPS 0.1, {distance.net}",
        "weights": str(distance.weights),
    }
