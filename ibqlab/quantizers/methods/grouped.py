"""Grouped (product) quantization: the channels are cut into groups, and each group has a quantizer of its own."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.checks import check_numbers, require
from ibqlab.quantizers.base import Assignment, register_quantizer
from ibqlab.quantizers.composite import CompositeConfig, CompositeQuantizer, as_grid, as_rows, joined_channels


@dataclass(frozen=True, kw_only=True)
class GroupedQuantizerConfig(CompositeConfig):
    """Grouped quantization of any quantizer."""

    groups: int = 2
    """Groups of channels, 1 to 24, a divisor of code_dim. Published product DiVeQ: 4."""

    number_setting = "groups"

    def number(self) -> int:
        """As many parts as groups."""
        return self.groups

    def splits(self) -> int:
        """Every part gets its share of the channels."""
        return self.groups

    def __post_init__(self):
        check_numbers(self)
        require(1 <= self.groups <= 24, f"groups must be from 1 to 24, got {self.groups}. Use 2 to 8")
        super().__post_init__()


@register_quantizer("grouped", GroupedQuantizerConfig, label="Grouped")
class GroupedQuantizer(CompositeQuantizer):
    """Product quantization.

        z = (z_1, …, z_G),   z_q = (Q_1(z_1), …, Q_G(z_G)),   loss = mean_g loss of Q_g,   k = Σ_g k_g k^(G−g)

    Value and gradient are the groups' own. A loss that is a mean over numbers stays one.
    Source: Jégou et al. (2011); in tokenizers the "heads" of vector-quantize-pytorch and the groups of
    wav2vec 2.0 (Baevski et al., 2020), whose choice is by Gumbel softmax and not by distance.
    """

    def __init__(self, config: GroupedQuantizerConfig):
        super().__init__(config, joined_channels)

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Every group's choice."""
        pieces = features.chunk(self.config.groups, dim=1)
        return self.codes.index(
            [part.encode(as_grid(piece)).flatten() for part, piece in zip(self.parts, pieces, strict=True)]
        )

    @torch.no_grad()
    def part_features(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "N d"]]:
        """Every group's channels."""
        return list(as_rows(features).chunk(self.config.groups, dim=1))

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Every group by itself."""
        pieces = features.chunk(self.config.groups, dim=1)
        outputs = [self.quantize_part(part, piece) for part, piece in zip(self.parts, pieces, strict=True)]
        vectors, digits, terms = zip(*outputs, strict=True)
        return Assignment(joined_channels(vectors), self.codes.index(digits), self.averaged(terms))
