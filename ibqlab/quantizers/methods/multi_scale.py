"""Multi-scale residual quantization: coarse grids of codes first, then what they leave over on finer ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ibqlab.base.checks import require, whole_number
from ibqlab.quantizers.base import Assignment, Quantizer, quantizer_config, register_quantizer
from ibqlab.quantizers.codebooks import at_least_float32
from ibqlab.quantizers.composite import CompositeConfig, GridComposite, Parts, as_rows, nearest_cells, summed
from ibqlab.quantizers.estimators import straight_through
from ibqlab.quantizers.terms import PairLossConfig, pair_terms

Choose = Callable[[Quantizer, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""A part and the features of its grid to indices and terms."""


@dataclass(frozen=True, kw_only=True)
class MultiScaleQuantizerConfig(CompositeConfig, PairLossConfig):
    """VAR's quantizer around any quantizer of single tokens."""

    scales: tuple[int, ...] = (2,)
    """Sides of the coarse grids, ascending; the latent grid itself always comes last. On a grid h × w a scale s is
    min(s, h) × min(s, w). Published: 1, 2, 3, 4, 5, 6, 8, 10, 13 before 16, with 4,096 codes, which is more
    combinations than an index may have here."""
    shared: bool = True
    """Whether all scales are one and the same quantizer with one codebook. Published: True."""
    beta_on: str = "encoder"
    """As in VQ; published: "encoder"."""
    blend: float = 0.5
    """r, share of a 3 × 3 convolution in φ, which smooths each scale's codes after they are enlarged, 0 to 1; at 0
    there is none. Published: 0.5."""
    blends: int = 4
    """How many such convolutions there are, at most one a scale; scales next to each other share one. Published: 4."""

    number_setting = "number of scales"

    def number(self) -> int:
        """The coarse grids and the latent grid."""
        return len(self.scales) + 1

    def __post_init__(self):
        hint = ". Use ascending sides such as [1, 2, 4]"
        scales = tuple(whole_number(f"scales[{i}]", side, 1, hint=hint) for i, side in enumerate(self.scales))
        require(
            list(scales) == sorted(set(scales)) and len(scales) < 24,
            f"scales must ascend, at most 23 of them; got {list(scales)}. Use sides such as [1, 2, 4]",
        )
        object.__setattr__(self, "scales", scales)
        super().__post_init__()
        require(0 <= self.blend <= 1, f"blend must lie in [0, 1], got {self.blend}. Use 0.5, or 0 for none")
        require(self.blends >= 1, f"blends must be at least 1, got {self.blends}. Use 4")

    def loss_weights(self) -> dict[str, float]:
        """The pair of the whole in place of the parts', and what else the parts have."""
        return super().loss_weights() | PairLossConfig.loss_weights(self)


@register_quantizer("multi_scale", MultiScaleQuantizerConfig, label="Multi-scale")
class MultiScaleQuantizer(GridComposite):
    """Multi-scale Residual Quantization.

        r_1 = z,   q_s = φ_s(enlarge(Q_s(shrink(r_s)))),   r_{s+1} = r_s − sg(q_s),   f_s = Σ_{t≤s} q_t
        z_q = z + sg(f_S − z),   loss = mean_s (mean‖f_s − sg(z)‖² + β mean‖sg(f_s) − z‖²),   φ(x) = (1−r) x + r conv(x)

    `shrink` averages areas, `enlarge` is bicubic. A cell's index has one digit a scale, that of the coarse cell above
    it, so that h·w indices hold all scales, the coarse ones several times; decoding reads each coarse cell once, in the
    cell nearest to its upper left corner. A code's vector depends on its neighbours: the codebook lists what stands in
    the middle of a large area of equal indices.
    Source: VAR (Tian et al., 2024), algorithm 1; published VectorQuantizer2, in which the features of the choice
    take no gradient. Terms of the parts other than the pair (an entropy penalty, for instance) reach the encoder here.
    """

    def __init__(self, config: MultiScaleQuantizerConfig):
        super().__init__(config, summed)
        self.codes = Scales(config)

    def loss_weights(self) -> dict[str, float]:
        """The whole's pair beside what else the parts have."""
        return self.parts[0].loss_weights() | self.config.loss_weights()

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Scale by scale, without losses."""
        scales = self._scales(features, lambda part, coarse: (part.encode(coarse), {}))
        return self.codes.index([digit for digit, _, _ in scales]).flatten()

    @torch.no_grad()
    def part_features(self, features: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "n D"]]:
        """The cells of each scale's grid, of what the scales before it left over."""
        self._keep_shape(features)
        grids = []

        def choose(part: Quantizer, coarse: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            grids.append(as_rows(coarse))
            return part.encode(coarse), {}

        list(self._scales(as_rows(features), choose))
        return grids

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Scale by scale; the gradient passes the sum."""

        def choose(part: Quantizer, coarse: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            part.progress = self.progress
            out = part(coarse)
            return out.indices, out.terms

        total, digits, terms = torch.zeros_like(features), [], []
        for digit, raised, part_terms in self._scales(features, choose):
            total = total + as_rows(raised)
            digits.append(digit)
            terms.append(part_terms | pair_terms(features, total))
        indices = self.codes.index(digits)
        if not self.training:
            vectors = self.codes.vectors(indices).to(features.dtype)
            return Assignment(vectors.reshape(features.shape), indices.flatten(), self.averaged(terms))
        return Assignment(straight_through(features, total), indices.flatten(), self.averaged(terms))

    def _scales(
        self, features: Float[Tensor, "N D"], choose: Choose
    ) -> Iterator[tuple[Int[Tensor, "B h w"], Float[Tensor, "B D h w"], dict[str, Tensor]]]:
        """Of each scale: its digit in every cell, its enlarged codes, and its terms."""
        batch, height, width = self._shape
        rest = features.view(batch, height, width, -1).permute(0, 3, 1, 2)
        for level, part in enumerate(self.parts):
            size = self.codes.size_of(level, height, width)
            coarse = F.interpolate(rest, size, mode="area") if size != (height, width) else rest
            indices, terms = choose(part, coarse)
            raised = self.codes.raised(level, indices, height, width).to(rest.dtype)
            rest = rest - raised.detach()
            rows, columns = nearest_cells((height, width), size, indices.device)
            yield indices[:, rows[:, None], columns], raised, terms


class Scales(Parts):
    """The parts of all scales, and φ.

    Args:
        config: the whole's.
    """

    def __init__(self, config: MultiScaleQuantizerConfig):
        super().__init__(quantizer_config(config.inner), config.number(), config.shared, summed)
        self.scales, self.blend = config.scales, config.blend
        count = min(config.blends, self.number) if config.blend else 0
        self.blends = nn.ModuleList(nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1) for _ in range(count))

    def forward(self) -> Float[Tensor, "K D"]:
        """What stands in the middle of a large area of each index. Cost: O(K·D) operations and memory."""
        digits = self.digits(torch.arange(self.size**self.number))
        return self.join([codes[digit] for codes, digit in zip(self.contributions(), digits, strict=True)])

    def contributions(self) -> list[Float[Tensor, "k D"]]:
        """What the scales' codes add in the middle of a large area."""
        added = []
        for level, codes in enumerate(super().contributions()):
            if self.blend:
                blend = self._blend(level)
                weight, bias = map(at_least_float32, (blend.weight.sum((2, 3)), blend.bias))
                added.append((1 - self.blend) * codes + self.blend * F.linear(codes, weight, bias))
            else:
                added.append(codes)
        return added

    def vectors(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Sums of all scales' enlarged codes."""
        height, width = indices.shape[1:]
        total = 0.0
        for level, digit in enumerate(self.digits(indices)):
            # The first cell at or behind the corner of each coarse cell.
            rows, columns = (
                -(-torch.arange(few, device=indices.device) * whole // few)
                for whole, few in zip((height, width), self.size_of(level, height, width), strict=True)
            )
            total = total + self.raised(level, digit[:, rows[:, None], columns], height, width)
        return total.permute(0, 2, 3, 1)

    def raised(self, level: int, indices: Int[Tensor, "B s t"], height: int, width: int) -> Float[Tensor, "B D h w"]:
        """A scale's codes on the whole grid, blended."""
        codes = at_least_float32(self.part(level).look_up(indices)).permute(0, 3, 1, 2)
        if codes.shape[2:] != (height, width):
            codes = F.interpolate(codes, (height, width), mode="bicubic")
        if not self.blend:
            return codes
        blend = self._blend(level)
        weight, bias = (at_least_float32(values).to(codes.dtype) for values in (blend.weight, blend.bias))
        return (1 - self.blend) * codes + self.blend * F.conv2d(codes, weight, bias, padding=1)

    def size_of(self, level: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of a scale's grid; the last scale's is the whole."""
        side = self.scales[level] if level < len(self.scales) else max(height, width)
        return min(side, height), min(side, width)

    def _blend(self, level: int) -> nn.Conv2d:
        """The convolution whose place among all is nearest to the scale's among all scales, as published."""
        count = len(self.blends)
        edge = 1 / (3 * count) if count == 4 else 1 / (2 * count)
        places = [edge + (1 - 2 * edge) * i / max(1, count - 1) for i in range(count)]
        place = level / max(1, self.number - 1)
        return self.blends[min(range(count), key=lambda i: abs(places[i] - place))]
