"""Each published tokenizer under its own system's protocol, beside the one protocol that is common to all.

What is held fixed, for a tokenizer and a metric:

* own: images prepared as its system prepares them, reconstructed, measured as its system measures;
* same reconstructions: those very reconstructions and images, measured as the common protocol measures (rounding,
  network of features);
* common reference: the same again, with rFID's distance to the images as the common protocol prepares them;
* common: images prepared the common way, reconstructed, measured the common way.

Between neighbours of this list one thing changes, so that their differences add up to own − common.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ibqlab.base.checks import require
from ibqlab.grids.evaluation_parameters import MeasuringParameters
from ibqlab.grids.evaluation_rules import (
    EvaluationRules,
    TokenizerUnderTest,
    at_size,
    cautions_of,
    fit_protocol,
    open_for,
    takes_one_size,
)
from ibqlab.metrics import PROTOCOLS, MetricCard, Protocol
from ibqlab.metrics.images import ImageSet
from ibqlab.metrics.pixel_metrics import WINDOW
from ibqlab.recipes.presets import find_preset
from ibqlab.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput

SAYS_ONLY = ("name", "purpose", "published_extractor", "deviation", "source")
"""Fields of a protocol that change no number."""


@dataclass(frozen=True, kw_only=True)
class OwnRules:
    """How a tokenizer is measured under its own system's protocol."""

    protocol: Protocol
    images: ImageSet
    source: Any
    """The same images, as `evaluate_reconstruction` takes them."""
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class OwnResult:
    """What its own protocol gives, and how the same reconstructions look under the common one."""

    protocol: Protocol
    cards: tuple[MetricCard, ...]
    """Under its own protocol."""
    remeasured: tuple[MetricCard, ...]
    """The same reconstructions and images under the common protocol's rounding and extractor, of the metrics in which
    protocols differ so."""
    common_reference: MetricCard | None
    """rFID of the same, against the images as the common protocol prepares them; None without rFID."""


def find_own_rules(
    parameters: MeasuringParameters, tokenizers: Sequence[TokenizerUnderTest], rules: EvaluationRules
) -> dict[str, OwnRules]:
    """Label → rules, of the tokenizers whose system has a protocol that gives other numbers than the common one.

    Under smoke and laptop the size of its images is to the common size as published sizes are.

    Raises:
        ConfigError, ValueError: a system that names a protocol that is none; or images that its protocol cannot have.
    """
    preset = find_preset(parameters.preset, "evaluation")
    opened: dict[Protocol, OwnRules] = {}
    own = {}
    for tokenizer in tokenizers:
        name = tokenizer.own_protocol
        if not name:
            continue
        require(
            name in PROTOCOLS,
            f"the family {tokenizer.system!r} names the protocol {name!r}, which is none; write one of "
            f"{', '.join(PROTOCOLS)} into its class, or leave protocol out",
        )
        published, common = PROTOCOLS[name], PROTOCOLS[parameters.protocol].image_size
        # Where all are measured at another size than published, each is at its own multiple of it.
        scaled = round(published.image_size * rules.protocol.image_size / common)
        size = _nearest_size(tokenizer.config, scaled)
        protocol = at_size(fit_protocol(published, preset, size), size)
        if _same_numbers(protocol, rules.protocol, bool(parameters.images)):
            continue
        if protocol not in opened:
            source, limit, images = open_for(protocol, parameters, tokenizers)
            opened[protocol] = OwnRules(protocol=protocol, images=images, source=source, limit=limit)
        own[tokenizer.label] = opened[protocol]
    return own


def own_cautions(own: dict[str, OwnRules]) -> list[str]:
    """What must be known of their images before the work begins."""
    return list(dict.fromkeys(text for rules in own.values() for text in cautions_of(rules.images, rules.protocol)))


class ResizingTokenizer(nn.Module):
    """A tokenizer that takes one image size, for images of another: resized to it, and its reconstructions back.

    Both ways bilinear with antialias, on floats. What resizing loses counts as the tokenizer's loss, because the common
    task is to give back images of the common size.

    Args:
        tokenizer: any.
        size: height and width that it takes, in pixels.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        super().__init__()
        self.tokenizer, self.size = tokenizer, size
        self.quantizer = tokenizer.quantizer
        self.remarks = (f"takes {size} × {size} pixels only: images resized to it, reconstructions back",)

    def latent_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of an image of any size: those of one of its own size."""
        return self.tokenizer.latent_grid(self.size, self.size)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> TokenizerOutput:
        """As `Tokenizer.forward`; the reconstruction is as large as the image, features are those of the resized."""
        out = self.tokenizer(_resized(images, (self.size, self.size)).clamp(-1, 1))
        return out._replace(reconstruction=_resized(out.reconstruction, images.shape[2:]))


def _resized(images: Float[Tensor, "B 3 H W"], size: Sequence[int]) -> Float[Tensor, "B 3 h w"]:
    return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _nearest_size(config: TokenizerConfig, size: int) -> int:
    """The size nearest to the one asked for that a tokenizer takes, and that SSIM's window fits into."""
    if takes_one_size(config):
        return config.autoencoder.resolution
    factor = config.autoencoder.downsampling
    least = -(-WINDOW // factor)
    return factor * max(least, round(size / factor))


def _same_numbers(first: Protocol, second: Protocol, resizes: bool) -> bool:
    """Whether two protocols give the same numbers; sources that are no files are resized by neither."""
    said = dict.fromkeys(SAYS_ONLY, "-")
    if not resizes:
        said["resize"] = "none"
    return replace(first, **said) == replace(second, **said)
