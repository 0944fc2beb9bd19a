"""How close generated samples come to real images, and how much of them they cover."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ibqlab.base.checks import require
from ibqlab.base.measures import SHARE, measure
from ibqlab.data.source import Unreadable
from ibqlab.metrics import evaluation, features, statistics
from ibqlab.metrics.cards import MetricCard, few_images_remarks
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.metrics.extractors import FeatureExtractor, metric_name
from ibqlab.metrics.images import ImageSet, check_pixels
from ibqlab.metrics.pixel_metrics import ROUNDINGS
from ibqlab.metrics.protocols import GENERATION_METRICS, Protocol, choose_metrics, find_protocol
from ibqlab.metrics.reference import KEEPS_FEATURES, Reference, open_reference


class _Setup(NamedTuple):
    """How an evaluation is done."""

    protocol: Protocol
    metrics: tuple[str, ...]
    extractor: FeatureExtractor
    device: torch.device
    batch_size: int
    progress: bool

    @property
    def keeps_features(self) -> bool:
        """Whether a metric needs the features themselves."""
        return any(name in KEEPS_FEATURES for name in self.metrics)


def evaluate_generation(
    samples: Any,
    reference: Any = None,
    protocol: str | Protocol = "adm",
    *,
    metrics: tuple[str, ...] | list[str] | str | None = None,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    inception_weights: str | Path = "",
    check_weights: bool = True,
    extractor: str | FeatureExtractor | None = None,
    progress: bool = True,
    limit: int | None = None,
    cache: bool = True,
    unreadable: Unreadable = "skip",
) -> evaluation.Evaluation:
    """Compare generated samples with real images in feature space, under a named protocol.

    Metrics: "fid", "is", "kid", "precision" and "recall". Memory grows with the images only for "kid", "precision" and
    "recall", which keep n × D float32 of both sides, and for "is", n × C of the samples. Under torch.distributed every
    process calls this with the same arguments, takes its slice of every batch, and gets the same result.

    Args:
        samples: 8-bit pictures of one size: a folder, also one that `ibqlab sample` wrote, tar shards, an `.npz` with
            arr_0 (N, H, W, 3), an ImageSource, or uint8 batches (B, 3, H, W). Never resized. `truncate_to_uint8` makes
            them from a decoder's output as published.
        reference: likewise, a folder resized by the protocol to the samples' size; or an `.npz` with mu and sigma (and
            arr_0 for the other metrics), such as ADM's. None only when "is" is all that is asked for.
        protocol: a name of `PROTOCOLS`, or one of your own.
        metrics: which; None: all.
        batch_size: images per step over all processes.
        device: where to compute.
        inception_weights: the file; empty: torch's folder of downloads.
        check_weights: False takes weights of another content; names and cards then say so.
        extractor: another registered feature extractor, or an object; None: the protocol's.
        progress: show a bar.
        limit: samples at most.
        cache: keep the reference's features under their content, in $IBQLAB_CACHE or ~/.cache/ibqlab.
        unreadable: what becomes of a file that cannot be read, as in `evaluate_reconstruction`.
    Returns:
        Cards; no counts and no pairs.
    Raises:
        ValueError: unknown protocol, metric or extractor; unfit images; fewer than a metric needs.
        FileNotFoundError: no such images, or missing weights; the message says what to fetch.
        ImportError: a package of `ibqlab[metrics]` is missing.
    Source: guided-diffusion's evaluator, torch-fidelity.
    """
    protocol = find_protocol(protocol)
    chosen = choose_metrics(metrics, GENERATION_METRICS)
    evaluation.check_batch_size(batch_size)
    sample_images = open_images(samples, limit=limit, unreadable=unreadable)
    real = open_reference(reference, chosen, protocol, sample_images, unreadable)
    _check_counts(sample_images.count, chosen, protocol, "samples")
    _check_counts(real.images and real.images.count, chosen, protocol, "reference images")
    device = torch.device(device)
    network = evaluation.open_extractor(
        extractor or protocol.extractor, inception_weights, check_weights, device, sample_images.side
    )
    setup = _Setup(protocol, chosen, network, device, batch_size, progress)
    _check_extractor(setup, real)
    of_reference = _reference_features(real, setup, cache)
    of_samples = _collect(sample_images, setup, keep_features=setup.keeps_features, keep_logits="is" in chosen)
    count = of_samples.count
    _check_counts(count, chosen, protocol, "samples")
    if of_reference is not None and of_reference.features is not None:
        _check_counts(len(of_reference.features), chosen, protocol, "reference images")
    scores = features.decided_by_first(lambda: _scores(setup, of_samples, of_reference))
    shared = _shared(setup, sample_images, real, count)
    left_out = len(evaluation.tell_unreadable(sample_images)) + _left_out_of_reference(real, of_reference)
    cards = tuple(
        MetricCard(
            key=name,
            metric=metric_name(name, network),
            value=scores[name].mean,
            unit=SHARE if measure(name).bounds == (0, 1) else measure(name).unit,
            better=measure(name).better,
            reference=_reference_of(name, real, of_reference),
            remarks=(
                *_remarks(name, scores[name], setup, of_reference, count),
                *evaluation.unreadable_remarks(left_out),
            ),
            **shared,
        )
        for name in chosen
    )
    return evaluation.Evaluation(cards=cards, images=count, protocol=protocol)


def _check_extractor(setup: _Setup, real: Reference) -> None:
    """Refuse statistics of another extractor, and an Inception Score without classes."""
    extractor = setup.extractor
    require(
        real.statistics is None or real.statistics.mean.size == extractor.dimension,
        f"stored statistics must have the extractor's {extractor.dimension} features; {real.description} has "
        f"{real.statistics and real.statistics.mean.size}. Use the extractor that made them",
    )
    if "is" in setup.metrics:
        side = max(extractor.smallest_side, 32)
        with torch.no_grad():
            logits = extractor(torch.zeros(1, 3, side, side, device=setup.device)).logits
        require(
            logits is not None,
            f"'is' needs a network that classifies; {extractor.name} gives no logits. Leave 'is' out of metrics=…",
        )


def _check_counts(count: int | None, metrics: tuple[str, ...], protocol: Protocol, kind: str) -> None:
    """Refuse too few images for a metric, where their number is known."""
    if not count:
        return
    least = {"fid": 2, "kid": protocol.kid_subset_size}
    least |= dict.fromkeys(("precision", "recall"), protocol.neighbours + 1)
    if kind == "samples" and not protocol.inception_split_size:
        least["is"] = protocol.inception_splits
    remedies = {
        "kid": f"Type dataclasses.replace(protocol, name='small-kid', kid_subset_size={max(2, count // 2)})",
        "is": f"Type dataclasses.replace(protocol, name='few-splits', inception_splits={count})",
    }
    for name in metrics:
        remedy = f"{remedies.get(name, 'Give more images')}, or leave {name!r} out of metrics=…"
        evaluation.check_count(count, least.get(name, 1), name, kind, remedy)


def _reference_features(real: Reference, setup: _Setup, cache: bool) -> statistics.FeatureStatistics | None:
    """Features of the reference: stored with it, kept from last time, or computed now."""
    keep = setup.keeps_features
    if real.images is None or (real.statistics is not None and not keep):
        return real.statistics
    key = features.reference_key(real.images, setup.extractor, setup.protocol.rounding, keep) if cache else None
    reference = features.load_reference(key)
    if reference is None:
        reference = _collect(real.images, setup, keep_features=keep)
        features.save_reference(key, reference)
    return replace(real.statistics or reference, features=reference.features)


def _collect(images: ImageSet, setup: _Setup, **keep: bool) -> statistics.FeatureStatistics:
    """One pass over a set of 8-bit images."""
    collector = features.FeatureCollector(setup.extractor, setup.device, **keep)
    for batch in features.progress_bar(images.batches(setup.batch_size), images, images.description, setup.progress):
        pixels = check_pixels(batch.images, images.side).to(setup.device)
        collector.update(batch.numbers, pixels.float() / 255)
    return collector.result()


def _scores(
    setup: _Setup, samples: statistics.FeatureStatistics, reference: statistics.FeatureStatistics | None
) -> dict[str, statistics.Score]:
    """The values; a metric without parts counts as one part."""
    metrics, protocol, scores = setup.metrics, setup.protocol, {}
    if "fid" in metrics:
        scores["fid"] = statistics.Score(statistics.frechet_distance(samples, reference), 0.0, 1)
    if "is" in metrics:
        splits = {"splits": protocol.inception_splits, "split_size": protocol.inception_split_size}
        scores["is"] = statistics.inception_score(samples.logits, **splits)
    if "kid" in metrics:
        subsets = {"subsets": protocol.kid_subsets, "subset_size": protocol.kid_subset_size}
        scores["kid"] = statistics.kernel_distance(samples.features, reference.features, **subsets)
    if {"precision", "recall"} & set(metrics):
        shares = statistics.precision_recall(samples.features, reference.features, neighbours=protocol.neighbours)
        scores |= {
            "precision": statistics.Score(shares.precision, 0.0, 1),
            "recall": statistics.Score(shares.recall, 0.0, 1),
        }
    return scores


def _shared(setup: _Setup, sample_images: ImageSet, real: Reference, count: int) -> dict[str, Any]:
    """What all cards of this evaluation have in common."""
    return {
        "images": count,
        "protocol": setup.protocol.name,
        "resize": f"samples {sample_images.resize}" + (f", reference {real.images.resize}" if real.images else ""),
        "crop": real.images.crop if real.images else "none",
        # Samples arrive in 8 bits, so a protocol can say how they should have been cut but not see to it.
        "rounding": f"8 bits as given; protocol: {ROUNDINGS[setup.protocol.rounding]}",
        "extractor": setup.extractor.name,
        "weights": setup.extractor.weights,
    }


def _left_out_of_reference(real: Reference, reference: statistics.FeatureStatistics | None) -> int:
    """How many files of the reference are unreadable, which is known of features kept from last time, too."""
    if real.images is None or real.images.count is None or real.statistics is not None or reference is None:
        return 0
    evaluation.tell_unreadable(real.images)
    return real.images.count - reference.count


def _reference_of(name: str, real: Reference, reference: statistics.FeatureStatistics | None) -> str:
    """What a metric was compared with, where statistics and images may lie in one file."""
    if name == "is":
        return "none"
    if real.statistics is None and real.images and real.images.count and reference:
        return real.images.describe(reference.count, real.images.count - reference.count)
    return real.images.description if name in KEEPS_FEATURES and real.images else real.description


def _remarks(
    name: str, score: statistics.Score, setup: _Setup, reference: statistics.FeatureStatistics | None, count: int
) -> tuple[str, ...]:
    """What a reader must know before comparing."""
    protocol = setup.protocol
    if name == "fid":
        behind = reference.count
        remarks = few_images_remarks(min(count, behind or count), setup.extractor.dimension)
        return remarks if behind else (*remarks, "images behind the stored statistics unknown")
    if name == "is":
        return (f"± {score.deviation:.3g} over {score.parts} splits, {protocol.splits}",)
    if name == "kid":
        return (f"± {score.deviation:.3g} over {score.parts} subsets of {protocol.kid_subset_size:,}",)
    sizes = (count, len(reference.features))
    published = (protocol.samples, protocol.reference_images)
    remarks = (f"k = {protocol.neighbours}, {sizes[0]:,} samples, {sizes[1]:,} reference images",)
    if sizes != published:
        remarks += (f"published on {published[0]:,} and {published[1]:,}: depends on both numbers",)
    return remarks
