"""How well a tokenizer gives images back, and which codes it uses for it."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.base.measures import measure
from ibqlab.base.processes import sum_over_processes
from ibqlab.data.pixels import to_uint8
from ibqlab.data.source import Unreadable
from ibqlab.diagnostics.usage import count_indices, measure_usage_of_counts, perplexity
from ibqlab.metrics import evaluation, features
from ibqlab.metrics.cards import MetricCard, few_images_remarks
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.metrics.extractors import FeatureExtractor, metric_name
from ibqlab.metrics.images import ImageSet, Numbered, check_pixels
from ibqlab.metrics.perceptual import SMALLEST_SIDE, PerceptualDistance, load_lpips
from ibqlab.metrics.pixel_metrics import ROUNDINGS, WINDOW, psnr, published_range, ssim, to_unit_range
from ibqlab.metrics.protocols import RECONSTRUCTION_METRICS, Protocol, choose_metrics, find_protocol
from ibqlab.metrics.statistics import FeatureStatistics, frechet_distance
from ibqlab.metrics.weights import PUBLISHED

PIXEL_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
PAIRS = 8
"""Images kept beside their reconstructions."""
RFID_IMAGES = (2, "rfid", "images", "Leave it out of metrics=…, or give more images")
"""How many rfid needs, in the words of `check_count`."""


def evaluate_reconstruction(
    tokenizer: nn.Module,
    images: Any,
    protocol: str | Protocol = "seed-voken-ibq",
    *,
    metrics: tuple[str, ...] | list[str] | str | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    lpips_weights: Mapping[str, str | Path] | None = None,
    inception_weights: str | Path = "",
    check_weights: bool = True,
    extractor: str | FeatureExtractor | None = None,
    progress: bool = True,
    limit: int | None = None,
    cache: bool = True,
    unreadable: Unreadable = "skip",
) -> evaluation.Evaluation:
    """Reconstruct images and measure what was lost, under a named protocol.

    Metrics: "rfid", "lpips_vgg", "lpips_alex", "psnr", "ssim", "usage" (any hit) and "perplexity". Each is the mean
    over images, except rfid, usage and perplexity, which are of the whole set. Memory does not grow with the images.
    Under torch.distributed every process calls this with the same arguments, takes its slice of every batch, and gets
    the same result.

    Args:
        tokenizer: eval mode is set and restored; run in the type of its weights (published: float32). Its output is
            clamped to [−1, 1].
        images: a folder, a picture, tar shards, an `.npz`, an ImageSource or uint8 batches (B, 3, H, W); see
            `open_images`. Only files of folders and of shards are resized by the protocol.
        protocol: a name of `PROTOCOLS`, or one of your own.
        metrics: which; None: all, which needs the weights of LPIPS and Inception.
        batch_size: images per step over all processes.
        device: where to compute; the tokenizer is moved there. None: where it is.
        lpips_weights: {"vgg": file, "alex": file}; nets left out: torch's folder of downloads.
        inception_weights: likewise.
        check_weights: False takes weights of another content; names and cards then say so.
        extractor: another registered feature extractor, or an object; None: the protocol's.
        progress: show a bar.
        limit: images at most.
        cache: keep the features' statistics of the images under their content, in $IBQLAB_CACHE or ~/.cache/ibqlab.
        unreadable: what becomes of a file that cannot be read, as `DataConfig.unreadable`: "skip" leaves it out, and
            the cards count them; "stop" is an error, as in the published evaluation.
    Returns:
        Cards, hits per code, and the first 8 images with their reconstructions.
    Raises:
        ValueError: unknown protocol, metric or extractor; unfit images; too few images.
        FileNotFoundError: no such images, or missing weights; the message says what to fetch.
        ImportError: a package of `ibqlab[metrics]` is missing.
    Cost: per image one pass of tokenizer and networks (Inception 0.25 s on a CPU core); rfid's last step 20 s.
    Source: published evaluation script.
    """
    protocol = find_protocol(protocol)
    chosen = choose_metrics(metrics, RECONSTRUCTION_METRICS)
    evaluation.check_batch_size(batch_size)
    opened = open_images(
        images,
        resize=protocol.resize,
        image_size=protocol.image_size,
        crop=protocol.crop,
        limit=limit,
        unreadable=unreadable,
    )
    device = torch.device(device or next(tokenizer.parameters()).device)
    _check_images(opened, chosen, tokenizer)
    lpips = _open_lpips(chosen, lpips_weights or {}, check_weights, opened, device)
    network = None
    if "rfid" in chosen:
        network = evaluation.open_extractor(
            extractor or protocol.extractor, inception_weights, check_weights, device, opened.side
        )
    key = features.reference_key(opened, network, protocol.rounding, False) if network and cache else None
    sums = _Sums(tokenizer.to(device), protocol, chosen, device, lpips=lpips, extractor=network)
    sums.reference = features.load_reference(key)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for batch in features.progress_bar(opened.batches(batch_size), opened, "reconstruct", progress):
            sums.update(batch)
    finally:
        tokenizer.train(was_training)
    return sums.result(opened, key)


class _Sums:
    """The sums of one pass over the images, and the cards made of them."""

    def __init__(
        self,
        tokenizer: nn.Module,
        protocol: Protocol,
        metrics: tuple[str, ...],
        device: torch.device,
        *,
        lpips: dict[str, PerceptualDistance],
        extractor: FeatureExtractor | None,
    ) -> None:
        self.tokenizer, self.protocol, self.metrics, self.device = tokenizer, protocol, metrics, device
        self.lpips, self.extractor = lpips, extractor
        self.reference: FeatureStatistics | None = None
        """Features of the images where they are known from an earlier evaluation."""
        self.dtype = next(tokenizer.parameters()).dtype
        self.per_image = tuple(name for name in metrics if name in PIXEL_METRICS or name in lpips)
        self.sums = torch.zeros(len(self.per_image) + 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(tokenizer.quantizer.config.codebook_size, dtype=torch.int64, device=device)
        self.pairs: list[tuple[int, Tensor, Tensor]] = []
        if extractor is not None:
            self.rebuilt, self.original = (features.FeatureCollector(extractor, device) for _ in range(2))

    @torch.no_grad()
    def update(self, batch: Numbered) -> None:
        """Add this process's images of a batch."""
        x = published_range(check_pixels(batch.images, None)).to(self.device)
        out = self.tokenizer(x.to(self.dtype))
        y = out.reconstruction.float().clamp(-1, 1)
        self.counts += count_indices(out.quantizer.indices, len(self.counts))
        values = [self._measure(name, x, y).double().sum() for name in self.per_image]
        self.sums += torch.stack([*values, self.sums.new_tensor(len(x))])
        if self.extractor is not None:
            self.rebuilt.update(batch.numbers, to_unit_range(y, self.protocol.rounding))
            if self.reference is None:
                self.original.update(batch.numbers, to_unit_range(x, self.protocol.rounding))
        pairs = zip(batch.numbers.tolist(), batch.images, to_uint8(y).cpu(), strict=True)
        self.pairs += islice(pairs, PAIRS - len(self.pairs))

    def _measure(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """One value per image."""
        if name in self.lpips:
            return self.lpips[name](x, y)
        cut = partial(to_unit_range, rounding=self.protocol.pixel_rounding)
        return PIXEL_METRICS[name](cut(x), cut(y))

    def result(self, opened: ImageSet, key: str | None) -> evaluation.Evaluation:
        """Over all processes; every process must call it."""
        *sums, count = sum_over_processes(self.sums).tolist()
        images = round(count)
        require(images > 0, "an evaluation needs at least 1 image; the batches held none")
        counts = sum_over_processes(self.counts).cpu()
        values = {name: total / images for name, total in zip(self.per_image, sums, strict=True)}
        if "rfid" in self.metrics:
            evaluation.check_count(images, *RFID_IMAGES)
            values["rfid"] = self._frechet(key)
        usage = measure_usage_of_counts(counts)
        values |= {"usage": usage.value, "perplexity": perplexity(counts)}
        shared = self._shared(opened, images)
        gathered = [pair for process_pairs in features.gather(self.pairs) for pair in process_pairs]
        pairs = sorted(gathered, key=lambda pair: pair[0])[:PAIRS]
        return evaluation.Evaluation(
            cards=tuple(self._card(name, values[name], counts, shared) for name in self.metrics),
            images=images,
            protocol=self.protocol,
            counts=counts,
            originals=torch.stack([original for _, original, _ in pairs]),
            reconstructions=torch.stack([rebuilt for *_, rebuilt in pairs]),
        )

    def _frechet(self, key: str | None) -> float:
        """Fréchet distance of the reconstructions to the images; the first process computes it for all."""
        reference = self.reference
        if reference is None:
            reference = self.original.result()
            features.save_reference(key, reference)
        rebuilt = self.rebuilt.result()
        return features.decided_by_first(lambda: frechet_distance(reference, rebuilt))

    def _shared(self, opened: ImageSet, images: int) -> dict[str, Any]:
        """What all cards of this evaluation have in common."""
        remarks = () if self.dtype == torch.float32 else (f"tokenizer run in {self.dtype}, published in float32",)
        unreadable = evaluation.tell_unreadable(opened)
        remarks += evaluation.unreadable_remarks(len(unreadable))
        return {
            "images": images,
            "protocol": self.protocol.name,
            "resize": opened.resize,
            "crop": opened.crop,
            "reference": opened.describe(images, len(unreadable)),
            "remarks": remarks,
        }

    def _card(self, name: str, value: float, counts: Tensor, shared: dict[str, Any]) -> MetricCard:
        """The card of a metric."""
        quantity = measure(name)
        facts: dict[str, Any] = {"metric": quantity.title, "unit": quantity.unit, "better": quantity.better}
        facts |= shared
        if name == "rfid":
            extractor = self.extractor
            facts |= {"metric": metric_name(name, extractor), "rounding": ROUNDINGS[self.protocol.rounding]}
            facts |= {"extractor": extractor.name, "weights": extractor.weights}
            facts["remarks"] += few_images_remarks(shared["images"], extractor.dimension)
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


def _lpips_facts(distance: PerceptualDistance) -> dict[str, Any]:
    """What the card of LPIPS says beside its value. Only with the published weights is it called LPIPS."""
    metric = {} if distance.weights.published else {"metric": f"LPIPS formula on other weights ({distance.net})"}
    return metric | {
        "rounding": "not rounded, float in [−1, 1]",
        "extractor": f"LPIPS 0.1, {distance.net}",
        "weights": str(distance.weights),
    }


def _check_images(opened: ImageSet, metrics: tuple[str, ...], tokenizer: nn.Module) -> None:
    """Refuse images that a metric or the tokenizer cannot take, before any work."""
    if "rfid" in metrics:
        evaluation.check_count(opened.count, *RFID_IMAGES)
    if "ssim" in metrics:
        evaluation.check_side(opened.side, WINDOW, "ssim")
    if opened.side is not None and hasattr(tokenizer, "latent_grid"):
        tokenizer.latent_grid(*opened.side)


def _open_lpips(
    metrics: tuple[str, ...],
    weights: Mapping[str, str | Path],
    check_weights: bool,
    opened: ImageSet,
    device: torch.device,
) -> dict[str, PerceptualDistance]:
    for net in weights:
        require_choice("lpips_weights", net, SMALLEST_SIDE)
    nets = [net for net in SMALLEST_SIDE if f"lpips_{net}" in metrics]
    for net in nets:
        evaluation.check_side(opened.side, SMALLEST_SIDE[net], f"lpips_{net}")
    expected = PUBLISHED if check_weights else None
    return {f"lpips_{net}": load_lpips(net, weights.get(net, ""), expected_sha256=expected).to(device) for net in nets}
