"""Soft VQ, the paper's other baseline that updates all codes: soft in training, hard in evaluation."""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.soft_assignment import mixture_of_codes
from ibqlab.quantizers.terms import PairLossConfig, pair_terms


@dataclass(frozen=True, kw_only=True)
class SoftVectorQuantizerConfig(PairLossConfig):
    """Soft VQ (the paper's appendix B; not SoftVQ-VAE)."""

    codebook_init: str = "normal"
    """As in every quantizer. The paper does not state Soft VQ's start; N(0, 1) is that of IBQ, its counterpart."""
    temperature_start: float = 0.9
    """Softmax temperature at the start of training, > 0. The end points are illegible in the paper's text at hand;
    0.9 falling to 1e-6 is the likely reading."""
    temperature_end: float = 1e-6
    """Softmax temperature at the end of training, > 0 and at most the start's."""

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < self.temperature_end <= self.temperature_start,
            f"temperatures must satisfy 0 < temperature_end ≤ temperature_start, "
            f"got end {self.temperature_end} and start {self.temperature_start}",
        )


@register_quantizer("soft_vq", SoftVectorQuantizerConfig)
class SoftVectorQuantizer(Quantizer):
    """Soft VQ: the softmax-weighted average of all codes in training, the most probable code in evaluation.

        z_q = softmax(z·Cᵀ/T) C,   T falls from its start to its end along half a cosine of the training progress

    Source: IBQ appendix B, table 9, figure 6.
    """

    @property
    def temperature(self) -> float:
        """T at the present `progress`."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(self.progress, 0.0), 1.0)))

    def loss_weights(self) -> dict[str, float]:
        """The two sides of the quantization loss."""
        return self.config.pair_weights()

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The largest dot product."""
        return nearest_code(features, codebook, "dot")

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Average of all codes in training; the most probable code in evaluation."""
        indices = self.choose(features, codebook)
        if self.training:
            quantized = mixture_of_codes(features, codebook, self.temperature)
        else:
            quantized = F.embedding(indices, codebook)
        return Assignment(quantized, indices, pair_terms(features, quantized))
