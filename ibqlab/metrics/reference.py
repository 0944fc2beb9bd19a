"""What samples are compared with: real images, stored statistics of them, or both."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ibqlab.base.cache import hash_file
from ibqlab.base.checks import require
from ibqlab.data.source import Unreadable
from ibqlab.metrics.archives import open_array, stored_names
from ibqlab.metrics.evaluated_images import open_images
from ibqlab.metrics.images import ImageSet
from ibqlab.metrics.protocols import Protocol
from ibqlab.metrics.statistics import FeatureStatistics

FEATURES = 2**14
"""Largest dimension of stored statistics; Inception has 2,048."""
KEEPS_FEATURES = ("kid", "precision", "recall")
"""Metrics that need the features themselves, n × D float32 of samples and reference."""


class Reference(NamedTuple):
    """What samples are compared with."""

    images: ImageSet | None
    statistics: FeatureStatistics | None
    """Stored ones, which take the place of the images' for the Fréchet distance."""
    description: str


def open_reference(
    reference: Any, metrics: tuple[str, ...], protocol: Protocol, samples: ImageSet, unreadable: Unreadable
) -> Reference:
    """The reference, refused when it lacks what the metrics need."""
    if metrics == ("is",):
        return Reference(None, None, "none")
    require(
        reference is not None,
        f"{', '.join(name for name in metrics if name != 'is')} compare samples with real images; got no reference. "
        "Pass reference=…, or metrics='is'",
    )
    statistics = None
    reference = Path(os.path.expanduser(reference)) if isinstance(reference, (str, Path)) else reference
    if isinstance(reference, Path) and reference.suffix == ".npz" and reference.is_file():
        statistics, has_images = _stored_statistics(reference)
        if statistics is not None and not has_images:
            lacking = [name for name in metrics if name in KEEPS_FEATURES]
            require(
                not lacking,
                f"{', '.join(lacking)} need reference images; {reference} holds only mu and sigma. Pass an .npz with "
                "arr_0 too, or leave them out: metrics=('fid', 'is')",
            )
            return Reference(None, statistics, _stored_description(reference))
    size = min(samples.side) if samples.side else protocol.image_size
    images = open_images(reference, resize=protocol.resize, image_size=size, crop=protocol.crop, unreadable=unreadable)
    require(
        None in (images.side, samples.side) or tuple(images.side) == tuple(samples.side),
        f"samples and reference must have one size; got {samples.side} and {images.side} (height, width). Use a "
        "protocol that resizes a folder of reference images, for example 'torch-fidelity', or references of that size",
    )
    description = images.description if statistics is None else _stored_description(reference)
    return Reference(images, statistics, description)


def _stored_statistics(path: Path) -> tuple[FeatureStatistics | None, bool]:
    """Mean and covariance of a published file, None when it holds none; and whether it holds images, too."""
    names = stored_names(path)
    has_images = "arr_0" in names
    if not {"mu", "sigma"} <= set(names):
        return None, has_images
    with open_array(path, "mu") as mu, open_array(path, "sigma") as sigma:
        size = math.prod(mu.shape)
        require(
            mu.shape == (size,) and sigma.shape == (size, size) and size <= FEATURES,
            f"mu and sigma of {path} must be (D,) and (D, D), D at most {FEATURES:,}; got {mu.shape} and {sigma.shape}",
        )
        require(
            mu.dtype.kind == sigma.dtype.kind == "f",
            f"mu and sigma of {path} must be float; got {mu.dtype} and {sigma.dtype}",
        )
        mean = mu.read(size).astype(np.float64)
        covariance = sigma.read(size * size).astype(np.float64).reshape(size, size)
    covariance = covariance if sigma.c_order else covariance.T
    require(
        bool(np.isfinite(mean).all() and np.isfinite(covariance).all()),
        f"mu and sigma of {path} must be finite; got NaN or infinity. Make them again",
    )
    return FeatureStatistics(mean=mean, covariance=covariance, count=None), has_images


def _stored_description(path: Path) -> str:
    return f"stored statistics of {path.name}, sha256 {hash_file(path)[:16]}"
