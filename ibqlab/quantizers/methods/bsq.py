"""BSQ: features on the unit sphere, the sign of every channel a bit, and an entropy that factorises over the bits."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.codebooks import SignGrid, at_least_float32, bit_values
from ibqlab.quantizers.estimators import straight_through
from ibqlab.quantizers.lfq import LookupFreeQuantizerConfig, sign_entropies


@dataclass(frozen=True, kw_only=True)
class BinarySphericalQuantizerConfig(LookupFreeQuantizerConfig):
    """BSQ as published. `average_entropy_weight` is γ, published 1."""

    codebook_size: int = 1024
    """K, codes, a power of two. Published: 2^18; the published 2^36 is more than a codebook may have here."""
    commitment_weight: float = 0.0
    """β, weight of mean‖u − sg(û)‖² in the loss, ≥ 0. Published: 0."""
    entropy_weight: float = 0.1
    """Weight of the entropy penalty in the loss, ≥ 0; 0 leaves it out. Published: 0.1, from 0.3 over the first 2,000
    steps, which is not done here."""
    entropy_temperature: float = 1.0
    """τ of the softmax inside the penalty, > 0. Published: 1."""
    entropy_epsilon: float = 1e-8
    """ε inside the logarithm of the average entropy, ≥ 0. Published: 1e-8."""
    group_size: int = 1
    """Channels whose average entropy is taken together, a divisor of D: 1, a product of bits; D, the exact
    entropy, of which the sum over groups is an upper bound. Published: 1, and 9 of 18."""

    def __post_init__(self):
        super().__post_init__()
        dim, size = self.code_dim, self.group_size
        divisors = [count for count in range(1, dim + 1) if dim % count == 0]
        require(size in divisors, f"group_size must divide code_dim = {dim}; got {size}. Use one of {divisors}")


@register_quantizer("bsq", BinarySphericalQuantizerConfig, label="BSQ")
class BinarySphericalQuantizer(Quantizer):
    """Binary Spherical Quantization.

        u = z/‖z‖,   û_i = ±1/√D with the sign of u_i,   k = Σ_i 1[u_i > 0] 2^i,   z_q = u + sg(û − u)
        loss = β mean‖u − sg(û)‖² + w (H̄ − γ Ĥ),   p_n(c) = Π_i σ(4 u_ni c_i / τ)

    H̄ is the mean entropy of p_n, a sum over bits; Ĥ the entropy of the mean of p_n, summed over groups of channels as
    if these were independent. Evaluation leaves the penalty out.
    Source: BSQ (Zhao et al., 2024, arXiv 2406.07548; the paper's text was not at hand); published bsq-vit. In that code
    the gradient passes û with the factor 1/√D, because it scales behind the straight-through step, and the commitment
    compares u with ±1. Here both are those of the vector ±1/√D itself, as vector-quantize-pytorch has them.
    Its first channel is the most significant bit, here the least, as in "lfq".
    """

    looks_up = False

    def __init__(self, config: BinarySphericalQuantizerConfig):
        super().__init__(config, SphereGrid(config.code_dim))

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """One bit per channel; 0 itself becomes a minus, as published."""
        return ((features > 0) * bit_values(self.config.code_dim, features.device)).sum(1)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """The sign of every channel; the codebook is not looked at. Cost of the penalty: see `sign_entropies`."""
        config = self.config
        indices = self.choose(features, codebook)
        codes = self.codes.signs(indices).to(features.dtype)
        unit = F.normalize(features, dim=1, eps=1e-6)  # features of length 0 have no direction and stay 0
        terms = {"commitment": F.mse_loss(unit, codes)}
        if not self.training:
            return Assignment(codes, indices, terms)
        if config.entropy_weight > 0:
            groups = (unit * config.code_dim**-0.5).split(config.group_size, dim=1)
            entropies = [
                sign_entropies(
                    group,
                    config.entropy_temperature,
                    config.entropy_epsilon,
                    over_processes=config.entropy_over_processes,
                    matmul=config.matmul,
                )
                for group in groups
            ]
            terms["sample_entropy"], terms["average_entropy"] = map(sum, zip(*entropies, strict=True))
        return Assignment(straight_through(unit, codes), indices, terms)

    def look_up(self, indices: Int[Tensor, "B h w"]) -> Float[Tensor, "B h w D"]:
        """Points on the sphere from the bits of their indices."""
        return self.codes.signs(indices.to(self.codes.like.device))


class SphereGrid(SignGrid):
    """All 2^D vectors of ±1/√D."""

    def signs(self, indices: Int[Tensor, "*grid"]) -> Float[Tensor, "*grid D"]:
        """The vectors of some indices, 0 to K−1, float32 at least."""
        return at_least_float32(super().signs(indices)) * self.code_dim**-0.5
