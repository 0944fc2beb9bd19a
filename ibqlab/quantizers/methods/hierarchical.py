"""Hierarchical quantization: coarse codes say what is common to a neighbourhood, finer ones what they leave to say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import check_numbers, require
from ibqlab.quantizers.base import Assignment, Quantizer, quantizer_config, register_quantizer
from ibqlab.quantizers.codebooks import at_least_float32
from ibqlab.quantizers.composite import CompositeConfig, GridComposite, Parts, as_rows, nearest_cells, summed

Choose = Callable[[Quantizer, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""A part and the features of its grid to vectors, indices and terms."""


@dataclass(frozen=True, kw_only=True)
class HierarchicalQuantizerConfig(CompositeConfig):
    """VQ-VAE-2's hierarchy around any quantizer of single tokens."""

    levels: int = 2
    """Grids, 1 to 8: the latent grid, and above it grids of half the side each. Published: 2 for 256 pixels, 3 for
    1,024, with 512 codes each."""

    number_setting = "levels"

    def number(self) -> int:
        """As many parts as levels."""
        return self.levels

    def __post_init__(self):
        check_numbers(self)
        require(1 <= self.levels <= 8, f"levels must be from 1 to 8, got {self.levels}. Use 2 or 3")
        super().__post_init__()


@register_quantizer("hierarchical", HierarchicalQuantizerConfig, label="Hierarchical")
class HierarchicalQuantizer(GridComposite):
    """Hierarchical Quantization.

        h_s = W_s [shrink(z); enlarge(e_1); …; enlarge(e_{s−1})],   e_s = Q_s(h_s),   z_q = Σ_s V_s enlarge(e_s)
        loss = mean_s loss of Q_s at h_s,   k = Σ_s k_s k^(L−s)

    The coarsest grid comes first, and every finer one sees the codes above it, so that it need not say them again. W_s
    and V_s are linear maps per cell, which learn; at the start they are those of residual quantization. `shrink`
    averages areas, `enlarge` repeats cells. A cell's index has one digit a level, that of the coarse cell above it, so
    that h·w indices hold all levels, the coarse ones several times.
    Source: VQ-VAE-2 (Razavi et al., 2019), algorithm 1, whose maps between the levels are convolutional networks: here
    the networks are the tokenizer's, and one linear layer conditions a level on those above.
    """

    def __init__(self, config: HierarchicalQuantizerConfig):
        super().__init__(config, summed)
        self.codes = Levels(config)

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Level by level, without losses."""
        return self.codes.index([digit for digit, _, _ in self._levels(features, self._chosen)]).flatten()

    @torch.no_grad()
    def part_features(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "n D"]]:
        """The cells of each level's grid, as that level gets them."""
        self._keep_shape(features)
        grids = []

        def choose(part: Quantizer, cells: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            grids.append(as_rows(cells))
            return self._chosen(part, cells)

        list(self._levels(as_rows(features), choose))
        return grids

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Level by level; the gradient passes every level as its quantizer passes it, and the maps."""

        def choose(part: Quantizer, cells: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            part.progress = self.progress
            out = part(cells)
            return out.quantized, out.indices, out.terms

        digits, vectors, terms = zip(*self._levels(features, choose), strict=True)
        indices = self.codes.index(digits)
        if not self.training:
            vectors = self.codes.vectors(indices).to(features.dtype).reshape(features.shape)
            return Assignment(vectors, indices.flatten(), self.averaged(terms))
        total = summed([self.codes.shown(level, as_rows(raised)) for level, raised in enumerate(vectors)])
        return Assignment(total.to(features.dtype), indices.flatten(), self.averaged(terms))

    @staticmethod
    def _chosen(part: Quantizer, cells: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        indices = part.encode(cells)
        return part.look_up(indices).permute(0, 3, 1, 2).to(cells.dtype), indices, {}

    def _levels(
        self, features: Float[Tensor, "N D"], choose: Choose
    ) -> Iterator[tuple[Int[Tensor, "B h w"], Float[Tensor, "B D h w"], dict[str, Tensor]]]:
        """Of each level: its digit in every cell, its enlarged vectors, and its terms."""
        batch, height, width = self._shape
        whole = features.view(batch, height, width, -1).permute(0, 3, 1, 2)
        above: list[Tensor] = []
        for level, part in enumerate(self.parts):
            size = self.codes.size_of(level, height, width)
            seen = [
                grid if grid.shape[2:] == size else F.interpolate(grid, size, mode="area") for grid in (whole, *above)
            ]
            vectors, indices, terms = choose(part, self.codes.conditioned(level, seen))
            rows, columns = nearest_cells((height, width), size, indices.device)
            above.append(vectors[:, :, rows[:, None], columns])
            yield indices[:, rows[:, None], columns], above[-1], terms


class Levels(Parts):
    """The parts of all levels, and the maps between them.

    Args:
        config: the whole's.
    """

    def __init__(self, config: HierarchicalQuantizerConfig):
        super().__init__(quantizer_config(config.inner), config.number(), config.shared, summed)
        dim = config.code_dim
        self.inward = nn.ModuleList(nn.Linear(dim * (level + 1), dim) for level in range(self.number))
        self.outward = nn.ModuleList(nn.Linear(dim, dim, bias=level == 0) for level in range(self.number))
        with torch.no_grad():
            for level, (inward, outward) in enumerate(zip(self.inward, self.outward, strict=True)):
                # What the levels above have said is taken off, and all that is said is added up.
                inward.weight.copy_(torch.cat([torch.eye(dim), *[-torch.eye(dim)] * level], dim=1))
                outward.weight.copy_(torch.eye(dim))
                inward.bias.zero_()
        nn.init.zeros_(self.outward[0].bias)

    def vectors(self, indices: Int[Tensor, "*grid"]) -> Float[Tensor, "*grid D"]:
        """The sum of what all levels' codes show as."""
        digits = self.digits(indices)
        return summed([self.shown(level, self.part(level).look_up(digit)) for level, digit in enumerate(digits)])

    def contributions(self) -> list[Float[Tensor, "k D"]]:
        """What the levels' codes show as."""
        return [self.shown(level, codes) for level, codes in enumerate(super().contributions())]

    def conditioned(self, level: int, seen: list[Float[Tensor, "B D s t"]]) -> Float[Tensor, "B D s t"]:
        """What a level quantizes: features and the codes above, on its grid."""
        cells = at_least_float32(torch.cat(seen, dim=1).permute(0, 2, 3, 1))
        return _linear(self.inward[level], cells).permute(0, 3, 1, 2)

    def shown(self, level: int, vectors: Float[Tensor, "*grid D"]) -> Float[Tensor, "*grid D"]:
        """A level's vectors in the whole's space."""
        return _linear(self.outward[level], at_least_float32(vectors))

    def size_of(self, level: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of a level's grid; the last level's is the whole."""
        share = 2 ** (self.number - 1 - level)
        return max(1, height // share), max(1, width // share)


def _shrunk(grid: Float[Tensor, "B D h w"], size: tuple[int, int]) -> Float[Tensor, "B D s t"]:
    """A grid on a coarser one, areas averaged."""
    return grid if grid.shape[2:] == size else F.interpolate(grid, size, mode="area")


def _linear(layer: nn.Linear, vectors: Tensor) -> Tensor:
    """A linear map in the vectors' own type."""
    bias = None if layer.bias is None else layer.bias.to(vectors.dtype)
    return F.linear(vectors, layer.weight.to(vectors.dtype), bias)
