"""FSQ: every channel is bounded and rounded to a few levels, so the codebook is a grid that nobody stores or learns."""

import functools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ibqlab.base.checks import CODES, check_numbers, require, require_choice, whole_number
from ibqlab.quantizers.base import Assignment, Quantizer, QuantizerConfig, register_quantizer
from ibqlab.quantizers.codebooks import at_least_float32

PUBLISHED_SIZE = 1000
"""8 · 5 · 5 · 5, the published levels for about 2^10 codes."""
SHIFTS = {"tan": (-1, math.tan), "atanh": (1, math.atanh)}
"""By the name of a bound: the sign of ε in it, and the function that makes an even number of levels symmetric."""


@dataclass(frozen=True, kw_only=True)
class FiniteScalarQuantizerConfig(QuantizerConfig):
    """FSQ as published."""

    levels: tuple[int, ...] = ()
    """L_i, levels of each channel, at least 2; published: at least 5, for K ≈ 2^8 to 2^16 (8,6,5), (8,5,5,5),
    (7,5,5,5,5), (8,8,8,6,5), (8,8,8,5,5,5). () makes them of codebook_size and code_dim, as even as possible, which
    gives the published ones for their K. With 2 levels the border lies at −1.56 instead of 0, and the codes are −1
    and 0; for bits take "lfq" or "bsq"."""
    codebook_size: int = 0
    """K, codes, always the product of the levels: 0 fills it in, 1,000 where there are no levels either."""
    code_dim: int = 0
    """D, always the number of levels. 0 fills it in; without levels it is the largest for which even levels are ≥ 5."""
    codebook_init: str = "grid"
    """Always "grid": the codes never move."""
    shift: str = "tan"
    """How an even number of levels is made symmetric: "tan", as published, or "atanh", the exact inverse of the bound,
    as vector-quantize-pytorch has it."""

    def __post_init__(self):
        check_numbers(self)
        size = self.codebook_size or PUBLISHED_SIZE
        levels = tuple(
            whole_number(f"levels[{channel}]", count, 2, hint=". Use levels such as [8, 5, 5, 5]")
            for channel, count in enumerate(self.levels)
        )
        # Sizes that are none are for the checks below to refuse.
        if not levels and 2 <= size <= CODES and self.code_dim >= 0:
            levels = even_levels(size, self.code_dim)
            require(
                bool(levels),
                f"codebook_size must be a product of code_dim = {self.code_dim} levels of at least 2 for fsq; got "
                f"{size}. Use levels such as [8, 5, 5, 5], which says both",
            )
        object.__setattr__(self, "levels", levels)
        given = {"codebook_size": self.codebook_size, "code_dim": self.code_dim}
        for name, value in {"codebook_size": math.prod(levels), "code_dim": len(levels)}.items():
            if levels and given[name] in (0, value):
                object.__setattr__(self, name, value)
        if not levels:
            object.__setattr__(self, "code_dim", self.code_dim or 1)
        super().__post_init__()
        for name, value in {"codebook_size": math.prod(levels), "code_dim": len(levels)}.items():
            require(
                getattr(self, name) == value,
                f"{name} must be {value} for the levels {list(levels)}; got {getattr(self, name)}. "
                f"Use {name}={value}, or leave it out",
            )
        require(
            self.codebook_init == "grid",
            f"codebook_init does not apply to fsq, whose codes are fixed; got {self.codebook_init!r}. "
            "Leave it out, or use 'grid'",
        )
        require_choice("shift", self.shift, SHIFTS)

    @classmethod
    def sized(cls, codes: int, dim: int) -> dict[str, int]:
        """Two levels in every channel, three in as many as leave K below four times what is asked for."""
        size = 2**dim
        for _ in range(dim):
            size = size // 2 * 3 if size // 2 * 3 <= 4 * codes else size
        return {"codebook_size": size, "code_dim": dim}


@register_quantizer("fsq", FiniteScalarQuantizerConfig, label="FSQ")
class FiniteScalarQuantizer(Quantizer):
    """Finite Scalar Quantization.

        f(z) = h tanh(z + s) − o,   h = (L − 1)(1 − ε)/2,   o = ½ for even L, else 0,   s = tan(o/h),   ε = 10⁻³
        q = round(f(z)) / ⌊L/2⌋,    z_q = (f(z) + sg(round(f(z)) − f(z))) / ⌊L/2⌋
        k = Σ_i (round(f(z_i)) + ⌊L_i/2⌋) Π_{j<i} L_j

    There is no loss: rounding keeps the bounded features near the codes by itself. Codes of an even number of levels
    reach −1 but not +1.
    Source: FSQ (Mentzer et al., 2023), appendix A.1; published notebook google-research/fsq. tan stands in that
    notebook; it is near atanh, with which f(0) = 0 would hold exactly (`shift`).
    """

    looks_up = False

    def __init__(self, config: FiniteScalarQuantizerConfig):
        super().__init__(config, LevelGrid(config.levels))

    def bound(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """f(z), from −⌊L/2⌋ to ⌊(L − 1)/2⌋ when rounded."""
        sign, inverse = SHIFTS[self.config.shift]
        heights = [(count - 1) * (1 + sign * 1e-3) / 2 for count in self.config.levels]
        offsets = [0.5 * (count % 2 == 0) for count in self.config.levels]
        shifts = [inverse(offset / height) for offset, height in zip(offsets, heights, strict=True)]
        height, offset, shift = (features.new_tensor(values) for values in (heights, offsets, shifts))
        return torch.tanh(features + shift) * height - offset

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """Every channel's level, the first channel's worth least."""
        return self.codes.indices(self.bound(features).round())

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """The nearest level of every channel; the codebook is not looked at."""
        bounded = self.bound(features)
        rounded = bounded.round()
        indices = self.codes.indices(rounded)
        if not self.training:
            return Assignment(self.codes.vectors(indices).to(features.dtype), indices, {})
        half_width = features.new_tensor([count // 2 for count in self.config.levels])
        return Assignment((bounded + (rounded - bounded).detach()) / half_width, indices, {})

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Grid points from their indices."""
        return self.codes.vectors(indices.to(self.codes.like.device))


class LevelGrid(nn.Module):
    """All points of a grid with L_i levels in channel i, made on demand: nothing in the state dict.

    Args:
        levels: L_i.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = levels
        # As in `SignGrid`: one number that follows the module's device and type.
        like = torch.zeros(())
        self.register_buffer("like", torch.zeros((), device="cpu") if like.is_meta else like, persistent=False)

    def forward(self) -> Float[Tensor, "K D"]:
        """The whole grid. Cost: O(K·D) operations and memory."""
        return self.vectors(torch.arange(math.prod(self.levels), device=self.like.device))

    def vectors(self, indices: Int[Tensor, "*grid"]) -> Float[Tensor, "*grid D"]:
        """Points of some indices, in [−1, 1], float32 at least: float16 has no 1/3 that it would share with float32."""
        levels, worth = self._levels_and_worth(indices.device)
        digits = indices[..., None] // worth % levels
        return at_least_float32((digits - levels // 2).to(self.like.dtype)) / (levels // 2)

    def indices(self, rounded: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """Indices of points given as whole numbers from −⌊L/2⌋."""
        levels, worth = self._levels_and_worth(rounded.device)
        # NaN has no level; within the grid its index breaks nothing until the loss says that there is NaN.
        digits = (rounded.long() + levels // 2).clamp_min(0).minimum(levels - 1)
        return (digits * worth).sum(1)

    def _levels_and_worth(self, device: torch.device) -> tuple[Int[Tensor, " D"], Int[Tensor, " D"]]:
        worth = [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]
        return torch.tensor(self.levels, device=device), torch.tensor(worth, device=device)


def even_levels(codebook_size: int, code_dim: int = 0) -> tuple[int, ...]:
    """Levels whose product is K, as even as possible, the largest first; () where there are none.

    Args:
        codebook_size: K, at least 2.
        code_dim: how many levels; 0: the most for which even levels would be at least 5, fewer where K has too few
            factors.
    """
    divisors = [count for count in range(1, math.isqrt(codebook_size) + 1) if codebook_size % count == 0]
    divisors += [codebook_size // count for count in reversed(divisors) if count**2 != codebook_size]

    @functools.cache
    def split(rest: int, count: int, most: int) -> tuple[int, ...]:
        if count == 1:
            return (rest,) if 2 <= rest <= most else ()
        for level in divisors:  # ascending: the first largest level that works is the smallest
            if 2 <= level <= most and rest % level == 0 and level**count >= rest:
                fewer = split(rest // level, count - 1, level)
                if fewer:
                    return (level, *fewer)
        return ()

    if code_dim:
        # K has at most log2 K factors; more channels than that need no search.
        return split(codebook_size, code_dim, codebook_size) if code_dim < codebook_size.bit_length() else ()
    count = 1
    while 5 ** (count + 1) <= codebook_size:
        count += 1
    return next(levels for fewer in range(count, 0, -1) if (levels := split(codebook_size, fewer, codebook_size)))
