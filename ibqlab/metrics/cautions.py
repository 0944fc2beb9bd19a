"""Warnings before hours are lost: images that are not what a protocol names, and weights that nobody evaluates with.

Published numbers are from originals that were resized once, by one rule, all 50,000 of them, with averaged weights
where there are any. What departs from that is said by name, with what to do; where nothing departs, nothing is said.
Sizes are looked at in the headers of some files, so that the check costs a second, not an hour.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from ibqlab.base.escaping import for_terminal
from ibqlab.data.file_source import AS_STORED, FileSource
from ibqlab.data.pictures import picture_size
from ibqlab.metrics.images import FileImages, ImageSet, SourceImages
from ibqlab.metrics.protocols import PROTOCOLS, Protocol
from ibqlab.pretrained.load_report import NAMES, LoadReport

LOOKED_AT = 256
"""Most files whose sizes are read, evenly spaced."""
ORIGINALS = "Give the folder of originals as they were downloaded"


class EvaluationWarning(UserWarning):
    """The numbers of an evaluation will not be those that its protocol's name promises."""


def cautions_of_images(images: ImageSet, protocol: Protocol) -> list[str]:
    """Where the images depart from what a protocol names: another size, crop or number, or resized before.

    Args:
        images: as `open_images` gives them for this protocol.
        protocol: a published one, or one made of it; `samples` are compared for published ones alone.
    Returns:
        A sentence each, with what to type or to give; none where nothing is known to depart.
    Cost: the headers of at most 256 files.
    """
    if isinstance(images, FileImages) and images.source.resize != AS_STORED:
        cautions = _of_files(images.source, protocol)
    else:
        cautions = _of_pixels(images, protocol)
    is_published = PROTOCOLS.get(protocol.name) == protocol
    if is_published and images.count is not None and images.count != protocol.samples:
        bias = ", and rFID is biased upward by few images" if images.count < protocol.samples else ""
        cautions.append(
            f"count: {images.count:,} images, and numbers of {protocol.name} are from {protocol.samples:,}{bias}. Give "
            "ImageNet's validation images, all of them (limit=0), or compare with no published number"
        )
    return cautions


def caution_of_weights(report: LoadReport | None) -> list[str]:
    """Whether a published file's weights as trained are measured although it holds the averaged ones.

    Args:
        report: of the tokenizer; None for one that was not loaded from a file. Runs of ours, whose report tells their
            step, are not warned of: their averages may be too young.
    """
    held = report is not None and NAMES["tokenizer_ema"] in report.left
    return raw_weights(report.path) if held and report.weights == "raw" and not report.step else []


def raw_weights(label: str) -> list[str]:
    """The sentence about weights as trained, of a tokenizer whose authors evaluate averaged ones."""
    return [
        f"weights: {for_terminal(label)} is measured with its weights as trained, and its authors evaluate averaged "
        "ones, which it holds. Type weights=ema"
    ]


def warn_of(cautions: Iterable[str], stacklevel: int = 3) -> None:
    """Warn of each."""
    for caution in cautions:
        warnings.warn(caution, EvaluationWarning, stacklevel=stacklevel)


@contextmanager
def without_cautions() -> Iterator[None]:
    """For callers that have told them already, or that measure trials by intent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EvaluationWarning)
        yield


def _of_files(source: FileSource, protocol: Protocol) -> list[str]:
    """Of files that the protocol resizes: whether they are originals."""
    sizes = _some_sizes(source)  # (n, 2)
    side, count = protocol.image_size, len(sizes)
    if not count:
        return []
    first, short = int(sizes[0, 0]), sizes.min(1)
    what, caution = f"all {count:,} files looked at", ""
    if (sizes == side).all():
        caution = (
            f"resized before: {what} are {side} × {side} pixels already, so {protocol.name}'s rule ({protocol.resize}, "
            f"then the centre) changes nothing, and by which rule they were made cannot be told. {ORIGINALS}"
        )
    elif count > 1 and (short == side).all():
        caution = (
            f"resized before: {what} have a short side of {side} pixels already and are not cropped, so "
            f"{protocol.name} crops them and resizes nothing. {ORIGINALS}"
        )
    elif count > 1 and (sizes == first).all():
        caution = (
            f"resized twice: {what} are {first} × {first} pixels, so somebody cropped and resized them, and "
            f"{protocol.name} resizes them again, to {side}. {ORIGINALS}"
        )
    elif count > 1 and (short == short[0]).all() and len(set(sizes.max(1).tolist())) > 1:
        caution = (
            f"resized twice: {what} have a short side of {short[0]} pixels, so somebody resized them, and "
            f"{protocol.name} resizes them again, to {side}. {ORIGINALS}"
        )
    elif (small := int((short < side).sum())) > count / 2:
        caution = (
            f"size: {small:,} of {count:,} files looked at are smaller than {side} pixels and are enlarged to it. "
            f"{ORIGINALS}, or measure at the size of most, image_size={int(np.median(short))}"
        )
    return [caution] if caution else []


def _of_pixels(images: ImageSet, protocol: Protocol) -> list[str]:
    """Of images that come at a size of their own."""
    if images.side is None:
        return []
    (height, width), side = images.side, protocol.image_size
    what, named = f"{images.description}, {height} × {width} pixels", f"{protocol.name} names {side} × {side}"
    source_rule = getattr(getattr(images, "source", None), "resize", "")
    caution = ""
    if height != width:
        caution = f"not cropped: {what}; {named}. Give a folder of originals and a protocol that resizes, or crop them"
    elif height != side:
        caution = f"size: {what}; {named}. Give a folder of originals, which a protocol resizes, or arrays of that size"
    elif protocol.resize in (AS_STORED, source_rule):
        pass
    elif source_rule:
        caution = (
            f"resize: {images.description} are resized by {source_rule}, and {protocol.name} resizes by "
            f"{protocol.resize}. Give their folder, which it resizes"
        )
    elif not isinstance(images, SourceImages):
        caution = (
            f"resized before: {what} already, so {protocol.name}'s rule ({protocol.resize}) was not applied here, and "
            f"by which rule they were made cannot be told. {ORIGINALS}"
        )
    return [caution] if caution else []


def _some_sizes(source: FileSource) -> np.ndarray:
    """Height and width of some files, (n, 2); unreadable ones are left out."""
    positions = source.positions[:: max(1, -(-len(source.positions) // LOOKED_AT))].tolist()
    sizes = []
    for position in positions:
        try:
            sizes.append(picture_size(source.files.file(position), source.files.name(position)))
        except (OSError, ValueError):
            continue
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)
