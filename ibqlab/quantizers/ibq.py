"""IBQ: a hard choice whose gradient goes through a softmax over all codes, so that the whole codebook learns."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.index_backprop import index_backprop
from ibqlab.quantizers.terms import EntropyPenaltyConfig, PairLossConfig, pair_terms


@dataclass(frozen=True, kw_only=True)
class IndexBackpropQuantizerConfig(EntropyPenaltyConfig, PairLossConfig):
    """IBQ as published."""

    codebook_init: str = "normal"
    """As in every quantizer; the published IBQ starts at N(0, 1)."""
    double_quantization: bool = True
    """Add ‖z_q − z‖² with the straight-through z_q, which reaches every code. Paper: on; first ablation
    row: off."""

    def loss_weights(self) -> dict[str, float]:
        """Quantization loss (three terms) and entropy penalty (two)."""
        return super().loss_weights() | {"double_quantization": self.quantization_weight}


@register_quantizer("ibq", IndexBackpropQuantizerConfig)
class IndexBackpropQuantizer(Quantizer):
    """Index Backpropagation Quantization.

        p = softmax(z·Cᵀ),  k = argmax p,  z_q = (onehot(k) + p − sg(p))ᵀ C,
        loss = mean‖z_q − z‖² + mean‖sg(c_k) − z‖² + β mean‖c_k − sg(z)‖² + w (H̄ − Ĥ)

    The first term, "double quantization", reaches all codes through z_q, and it holds features back: while a token's
    softmax is undecided, lengthening z lengthens z_q by more. Without that term features grow to the codes' norm, √D
    for N(0, 1), where the softmax has decided and only the chosen code learns. The penalty lowers the mean entropy H̄ of
    the tokens' distributions and raises the entropy Ĥ of their mean. Evaluation leaves the penalty out, which the
    published code computes there too; no result depends on it.
    Source: IBQ §3.2, eqs. 3–10; published IndexPropagationQuantize (β on the codebook's side, no normalisation).
    """

    reaches = "softmax"

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The largest dot product."""
        return nearest_code(features, codebook, "dot", matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Hard choice with index backpropagation; without it where no gradient is taken in evaluation."""
        config = self.config
        if not (self.training or torch.is_grad_enabled()):
            indices = self.choose(features, codebook)
            codes = F.embedding(indices, codebook)  # (N, D), without the products that only a gradient needs
            terms = pair_terms(features, codes)
            if config.double_quantization:
                terms["double_quantization"] = terms["commitment"]  # equal values where z_q is the code itself
            return Assignment(codes, indices, terms)
        penalised = self.training and config.entropy_weight > 0
        temperature = config.entropy_temperature if penalised else None
        out = index_backprop(
            features,
            codebook,
            temperature,
            config.entropy_epsilon,
            entropy_over_processes=penalised and config.entropy_over_processes,
            matmul=config.matmul,
        )
        # The chosen codes again and not `quantized`, whose gradient would reach every code: these terms move the chosen
        # ones alone.
        terms = pair_terms(features, F.embedding(out.indices, codebook))
        if config.double_quantization:
            terms["double_quantization"] = F.mse_loss(out.quantized, features)
        if penalised:
            terms |= {"sample_entropy": out.sample_entropy, "average_entropy": out.average_entropy}
        return Assignment(out.quantized, out.indices, terms)
