"""Deferred VQ: the encoder learns without quantization first, and codes start where its features have come to lie."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.quantizers.base import Assignment, QuantizerOutput, register_quantizer
from ibqlab.quantizers.upkeep import KMeansStart
from ibqlab.quantizers.vq import VectorQuantizer, VectorQuantizerConfig


@dataclass(frozen=True, kw_only=True)
class DeferredVectorQuantizerConfig(VectorQuantizerConfig):
    """VQ after a continuous phase."""

    allows_unit_vectors: ClassVar[bool] = False
    defer: float = 0.2
    """Share of training in which features pass as they are, 0 to below 1. The share of the paper's runs could not be
    established; a fifth is a choice of this library."""

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.defer < 1, f"defer must lie in [0, 1), the share of training; got {self.defer}")
        require(self.codebook != "linear", 'codebook must be "free" or "ema" for deferred_vq, got "linear"')
        require(
            self.codebook_init != "kmeans",
            "codebook_init does not apply to deferred_vq, whose codes start at k-means centres when `defer` has "
            'passed; got "kmeans". Leave it out',
        )


@register_quantizer("deferred_vq", DeferredVectorQuantizerConfig, label="Deferred VQ")
class DeferredVectorQuantizer(VectorQuantizer):
    """In training, features as they are until `progress` reaches `defer`; then k-means centres and VQ.

        z_q = z, loss = 0   while progress < defer;   afterwards as `vq`

    Evaluation is quantized at all times: before the start its codes are the initial ones, and what is measured with
    them says nothing. Indices of the continuous phase are those of the initial codes, too.
    Source: Zhao et al., "Early Quantization Shrinks Codebook" (2026, arXiv 2603.17052), deferred quantization: a
    separate continuous phase first. The paper's abstract does not say how codes start after it; here by k-means.
    """

    def __init__(self, config: DeferredVectorQuantizerConfig):
        super().__init__(config)
        # Ahead of moving averages and revival, as every start is.
        self.upkeep.insert(0, KMeansStart())

    @property
    def continuous(self) -> bool:
        """Whether features pass as they are at the present `progress`, in training."""
        return self.training and self.progress < self.config.defer

    def forward(self, features: Float[Tensor, "B D h w"]) -> QuantizerOutput:
        """As every quantizer; in the continuous phase codes are left alone."""
        if self.continuous:
            with self.without_upkeep():
                return super().forward(features)
        return super().forward(features)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """As VQ; in the continuous phase the features, and terms that are 0."""
        assignment = super().assign(features, codebook)
        if not self.continuous:
            return assignment
        return Assignment(features, assignment.indices, {name: 0 * term for name, term in assignment.terms.items()})
