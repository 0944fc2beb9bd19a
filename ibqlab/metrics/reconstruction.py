"""How well a tokenizer gives images back, and which codes it uses for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.base.processes import sum_over_processes
from ibqlab.data.pixels import to_uint8
from ibqlab.data.source import Unreadable
from ibqlab.diagnostics.usage import count_indices
from ibqlab.metrics import evaluation, features
from ibqlab.metrics.cautions import caution_of_weights, cautions_of_images, warn_of
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.metrics.extractors import FeatureExtractor
from ibqlab.metrics.images import ImageSet, Numbered, check_pixels
from ibqlab.metrics.perceptual import SMALLEST_SIDE, PerceptualDistance, load_lpips
from ibqlab.metrics.pixel_metrics import WINDOW, published_range
from ibqlab.metrics.protocols import RECONSTRUCTION_METRICS, Protocol, choose_metrics, find_protocol
from ibqlab.metrics.reconstruction_sums import ReconstructionSums, code_values
from ibqlab.metrics.statistics import FeatureStatistics
from ibqlab.metrics.weights import PUBLISHED

Observer = Callable[[Int[Tensor, " B"], Any], None]
"""Called with the numbers of some images and the `TokenizerOutput` of them, batch by batch, without gradients."""
REMEASURED = ("rfid", "psnr", "ssim")
"""Metrics in which protocols differ once an image is reconstructed: by rounding, and by the network of features."""
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
    observers: Sequence[Observer] = (),
    remeasure: str | Protocol | None = None,
    reference: Any = None,
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
        observers: functions that see each batch of tokens and features as it comes; of several processes each sees
            its own slices.
        remeasure: a second protocol under which the same reconstructions are measured, in `Evaluation.remeasured`. Its
            rounding and extractor count; the images stay as `protocol` prepares them.
        reference: with `remeasure`: images, prepared as that one says, whose features the reconstructions are compared
            with as well, in `Evaluation.other_reference`.
    Returns:
        Cards, hits per code, and the first 8 images with their reconstructions.
    Warns:
        EvaluationWarning: images that are not those of the protocol, or weights as trained where the file holds
            averaged ones. Only for protocols with a source.
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
    if protocol.source:
        warn_of([*cautions_of_images(opened, protocol), *caution_of_weights(getattr(tokenizer, "load_report", None))])
    lpips = _open_lpips(chosen, lpips_weights or {}, check_weights, opened, device)

    def sums(rules: Protocol, metrics: tuple[str, ...], network: str | FeatureExtractor) -> ReconstructionSums:
        opened_network = key = None
        if "rfid" in metrics:
            side = opened.side
            opened_network = evaluation.open_extractor(network, inception_weights, check_weights, device, side)
            key = features.reference_key(opened, opened_network, rules.rounding, False) if cache else None
        used = lpips if rules is protocol else {}
        return ReconstructionSums(rules, metrics, device, lpips=used, extractor=opened_network, key=key)

    all_sums = [sums(protocol, chosen, extractor or protocol.extractor)]
    if remeasure is not None:
        second = find_protocol(remeasure)
        all_sums.append(sums(second, tuple(name for name in REMEASURED if name in chosen), second.extractor))
    reconstructions = _Pass(tokenizer.to(device), device, all_sums, observers)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        for batch in features.progress_bar(opened.batches(batch_size), opened, "reconstruct", progress):
            reconstructions.update(batch)
    finally:
        tokenizer.train(was_training)
    result = reconstructions.result(opened)
    if reference is None or remeasure is None or "rfid" not in chosen:
        return result
    compared = open_images(
        reference,
        resize=second.resize,
        image_size=second.image_size,
        crop=second.crop,
        limit=limit,
        unreadable=unreadable,
    )
    settings = {"batch_size": batch_size, "device": device, "cache": cache, "progress": progress}
    statistics = features.reference_statistics(compared, all_sums[1].extractor, second.rounding, **settings)
    return reconstructions.compared_with(result, statistics, compared)


class _Pass:
    """One pass over the images: what it reconstructs goes into the sums of each protocol."""

    def __init__(
        self, tokenizer: nn.Module, device: torch.device, sums: list[ReconstructionSums], observers: Sequence[Observer]
    ) -> None:
        self.tokenizer, self.device, self.sums, self.observers = tokenizer, device, sums, observers
        self.dtype = next(tokenizer.parameters()).dtype
        self.counts = torch.zeros(tokenizer.quantizer.config.codebook_size, dtype=torch.int64, device=device)
        self.pairs: list[tuple[int, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, batch: Numbered) -> None:
        """Add this process's images of a batch."""
        x = published_range(check_pixels(batch.images, None)).to(self.device)
        out = self.tokenizer(x.to(self.dtype))
        y = out.reconstruction.float().clamp(-1, 1)
        require(
            y.shape == x.shape,
            f"a reconstruction must be as large as its image to be compared with it; got {tuple(y.shape[2:])} of "
            f"{tuple(x.shape[2:])} pixels. Measure a tokenizer whose decoder gives the encoder's size back",
        )
        self.counts += count_indices(out.quantizer.indices, len(self.counts))
        for sums in self.sums:
            sums.update(batch.numbers, x, y)
        for observer in self.observers:
            observer(batch.numbers, out)
        pairs = zip(batch.numbers.tolist(), batch.images, to_uint8(y).cpu(), strict=True)
        self.pairs += islice(pairs, PAIRS - len(self.pairs))

    def result(self, opened: ImageSet) -> evaluation.Evaluation:
        """Over all processes; every process must call it."""
        counts = sum_over_processes(self.counts).cpu()
        shared: dict[str, Any] = {}
        cards = []
        for sums in self.sums:
            images, values = sums.values()
            require(images > 0, "an evaluation needs at least 1 image; the batches held none")
            if "rfid" in sums.metrics:
                evaluation.check_count(images, *RFID_IMAGES)
            shared = shared or self._shared(opened, images)
            values |= code_values(counts)
            cards.append(tuple(sums.card(name, values[name], shared, counts) for name in sums.metrics))
        gathered = [pair for process_pairs in features.gather(self.pairs) for pair in process_pairs]
        pairs = sorted(gathered, key=lambda pair: pair[0])[:PAIRS]
        return evaluation.Evaluation(
            cards=cards[0],
            images=shared["images"],
            protocol=self.sums[0].protocol,
            counts=counts,
            originals=torch.stack([original for _, original, _ in pairs]),
            reconstructions=torch.stack([rebuilt for *_, rebuilt in pairs]),
            remeasured=cards[1] if len(cards) > 1 else (),
        )

    def compared_with(
        self, result: evaluation.Evaluation, statistics: FeatureStatistics, images: ImageSet
    ) -> evaluation.Evaluation:
        """The result with the distance of the reconstructions to other images, under the second protocol."""
        card = next(card for card in result.remeasured if card.key == "rfid")
        value = self.sums[1].distance_to(statistics)
        return replace(result, other_reference=replace(card, value=value, reference=images.description))

    def _shared(self, opened: ImageSet, images: int) -> dict[str, Any]:
        """What all cards of this evaluation have in common."""
        remarks = () if self.dtype == torch.float32 else (f"tokenizer run in {self.dtype}, published in float32",)
        remarks += getattr(self.tokenizer, "remarks", ())
        unreadable = evaluation.tell_unreadable(opened)
        remarks += evaluation.unreadable_remarks(len(unreadable))
        return {
            "images": images,
            "resize": opened.resize,
            "crop": opened.crop,
            "reference": opened.describe(images, len(unreadable)),
            "remarks": remarks,
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
