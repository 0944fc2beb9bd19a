"""Networks that turn images into features, by name; your own takes ten lines.

    @register_extractor("mine")
    class Mine(torch.nn.Module):
        name, dimension, weights, smallest_side = "mine-v1", 128, "sha256 …", 1
        def forward(self, images):                    # (B, 3, H, W) in [0, 1]
            return Features(net(images), None)        # no logits: no Inception Score

Only Inception with its published weights yields the names FID, IS and KID; all else is named after its extractor.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require, require_choice
from ibqlab.base.measures import OTHER_NETWORK, measure
from ibqlab.metrics.weights import INCEPTION, PUBLISHED, find_weights, import_metric_package, read_state

INCEPTION_SIDE = 299
_REMEDY = "Pass torch-fidelity's port of Inception-v3 of 2015"


class Features(NamedTuple):
    """What an extractor returns."""

    features: Float[Tensor, "B D"]
    logits: Float[Tensor, "B C"] | None
    """For the Inception Score; None where the network does not classify."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """Any module with these members."""

    name: str
    """In every table."""
    dimension: int
    """D, numbers per feature."""
    weights: str
    """Identity of the weights, for tables and caches: a hash of their content."""
    smallest_side: int
    """Smallest height and width it takes, pixels."""

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features of images in [0, 1]."""
        ...


_EXTRACTORS: dict[str, Callable[..., FeatureExtractor]] = {}


def register_extractor(name: str) -> Callable[[Callable], Callable]:
    """Decorator: make a feature extractor known under a name to evaluations.

    Args:
        name: what evaluations and protocols write.
    Raises:
        ValueError: the name is taken by another.
    """

    def decorate(factory: Callable[..., FeatureExtractor]) -> Callable[..., FeatureExtractor]:
        registered_factory = _EXTRACTORS.get(name, factory)
        require(
            registered_factory.__qualname__ == factory.__qualname__,
            f"an extractor named {name!r} exists already: {registered_factory.__qualname__}; choose another name",
        )
        _EXTRACTORS[name] = factory
        return factory

    return decorate


def available_extractors() -> list[str]:
    """Names that `build_extractor` takes, sorted."""
    return sorted(_EXTRACTORS)


def build_extractor(name: str, **settings: Any) -> FeatureExtractor:
    """An extractor by its registered name; settings go to its factory.

    Raises:
        ValueError: unknown name; the message gives the nearest.
    """
    require_choice("extractor", name, available_extractors())
    return _EXTRACTORS[name](**settings)


class InceptionExtractor(nn.Module):
    """Inception-v3 of 2015 as torch-fidelity ports it (inception-v3-compat): 2048 features, 1008 logits without bias.

    Its input decides as much as its weights. "pytorch-fid": bilinear to 299 without antialias (align_corners=False), to
    [−1, 1] as 2x − 1. "tensorflow": bilinear to 299 with TensorFlow 1's pixel grid, to (255x − 128) / 128; on 8-bit
    images this is torch-fidelity's own forward pass to the bit.

    Args:
        resize: "pytorch-fid" or "tensorflow".
        weights: torch-fidelity's file; empty: the one in torch's folder of downloads.
        expected_sha256: how its hash must begin; None takes any file of this architecture that holds only tensors, and
            nothing computed from it is called FID.
    Raises:
        FileNotFoundError, ValueError, ImportError: the file is missing or another, or torch-fidelity is.
    """

    dimension = 2048
    smallest_side = 1

    def __init__(self, resize: str, weights: str | Path = "", expected_sha256: str | None = PUBLISHED) -> None:
        super().__init__()
        require_choice("resize", resize, ("pytorch-fid", "tensorflow"))
        file = find_weights(INCEPTION, weights, expected_sha256)
        fidelity = import_metric_package("torch_fidelity.feature_extractor_inceptionv3")
        if not file.published:
            # torch-fidelity unpickles whatever it is given; this refuses a file that would run code.
            read_state(file.path, _REMEDY)
        try:
            network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file.path)
            )
        except RuntimeError as error:
            raise ValueError(f"{file.path} is not the state dict of this network ({error}). {_REMEDY}") from error
        self.resize, self.weights, self.published = resize, str(file), file.published
        self.name = f"inception-v3-compat, input as {resize}"
        self.trunk = nn.Sequential(*(layer for name, layer in network.named_children() if name != "fc"))
        self.register_buffer("classes", network.fc.weight.detach())
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Features:
        """Features and logits of images in [0, 1]."""
        if self.resize == "tensorflow":
            tensorflow = import_metric_package("torch_fidelity.interpolate_compat_tensorflow")
            side = (INCEPTION_SIDE, INCEPTION_SIDE)
            resized = tensorflow.interpolate_bilinear_2d_like_tensorflow1x(images * 255, size=side, align_corners=False)
            inputs = (resized - 128) / 128
        else:
            inputs = 2 * F.interpolate(images, INCEPTION_SIDE, mode="bilinear", align_corners=False) - 1
        features = self.trunk(inputs).flatten(1)
        return Features(features, features @ self.classes.T)


@register_extractor("inception-pytorch-fid")
def inception_pytorch_fid(weights: str | Path = "", expected_sha256: str | None = PUBLISHED) -> InceptionExtractor:
    """Inception behind pytorch-fid's input, as the published reconstruction scripts use it."""
    return InceptionExtractor("pytorch-fid", weights, expected_sha256)


@register_extractor("inception-tensorflow")
def inception_tensorflow(weights: str | Path = "", expected_sha256: str | None = PUBLISHED) -> InceptionExtractor:
    """Inception behind TensorFlow's input, as the ADM evaluator and torch-fidelity use it."""
    return InceptionExtractor("tensorflow", weights, expected_sha256)


def is_published_inception(extractor: FeatureExtractor) -> bool:
    """Whether its numbers may be called FID, IS and KID."""
    return isinstance(extractor, InceptionExtractor) and extractor.published


def metric_name(key: str, extractor: FeatureExtractor) -> str:
    """The name under which a metric from this extractor stands in tables.

    Args:
        key: "rfid", "fid", "is", "kid", "precision" or "recall".
    """
    if is_published_inception(extractor):
        return measure(key).title
    return f"{measure(OTHER_NETWORK.get(key, key)).title} ({extractor.name})"
