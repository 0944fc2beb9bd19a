"""Index backpropagation as the published code writes it, N × K matrices and all: the baseline of the benchmarks here.

Importing this registers the quantizer "ibq_published_form", which differs from "ibq" in time and memory alone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ibqlab.quantizers import IndexBackpropQuantizer, IndexBackpropQuantizerConfig, register_quantizer
from ibqlab.quantizers.base import Assignment
from ibqlab.quantizers.terms import pair_terms


def published_index_backprop(
    features: Float[Tensor, "N D"],
    codebook: Float[Tensor, "K D"],
    temperature: float = 0.01,
    epsilon: float = 1e-5,
) -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"], Float[Tensor, ""], Float[Tensor, ""]]:
    """Quantize by the largest dot product and differentiate through the softmax over all codes, all of it by autograd.

        S = z·Cᵀ,  p = softmax(S),  k = argmax p,  z_q = (onehot(k) − sg(p) + p)·C
        q = softmax(S/τ),  H̄ = −mean_n Σ_k q log_softmax(S/τ + ε),  Ĥ = −Σ_k q̄ log(q̄ + ε),  q̄ = mean_n q

    Args:
        features: z, any scale.
        codebook: C, of the same type and on the same device.
        temperature: τ > 0.
        epsilon: ε ≥ 0.
    Returns:
        Quantized features, indices (int64), mean entropy of the tokens H̄ and entropy of their mean Ĥ, in nats.
    Cost: O(N·K·D) operations, and of N × K numbers about seven matrices until the backward pass.
    Source: published IndexPropagationQuantize and compute_entropy_loss.
    """
    logits = torch.einsum("nd,kd->nk", features, codebook)
    soft_one_hot = logits.softmax(dim=1)
    indices = soft_one_hot.argmax(dim=1)
    one_hot = hard_one_hot(indices, codebook) - soft_one_hot.detach() + soft_one_hot
    quantized = torch.einsum("nk,kd->nd", one_hot, codebook)
    cold = logits / temperature
    p, log_p = cold.softmax(dim=1), (cold + epsilon).log_softmax(dim=1)
    mean = p.mean(dim=0)
    sample_entropy = -(p * log_p).sum(dim=1).mean()
    average_entropy = -(mean * (mean + epsilon).log()).sum()
    return quantized, indices, sample_entropy, average_entropy


def hard_one_hot(indices: Int[Tensor, " N"], codebook: Float[Tensor, "K D"]) -> Float[Tensor, "N K"]:
    """Each token's choice as a row of zeros and a one, of the codebook's type."""
    zeros = codebook.new_zeros(len(indices), len(codebook))
    return zeros.scatter_(1, indices[:, None], 1.0)


@register_quantizer("ibq_published_form", IndexBackpropQuantizerConfig)
class PublishedFormQuantizer(IndexBackpropQuantizer):
    """IBQ with the settings, losses and gradients of "ibq" and the published code's matrices.

    Like the published code, and unlike "ibq", it computes the entropies in evaluation, too; its loss leaves them out
    there as "ibq" does.
    """

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Hard choice with index backpropagation; the chosen codes once more by a product with the one-hot matrix."""
        config = self.config
        quantized, indices, sample_entropy, average_entropy = published_index_backprop(
            features, codebook, config.entropy_temperature, config.entropy_epsilon
        )
        terms = pair_terms(features, torch.einsum("nk,kd->nd", hard_one_hot(indices, codebook), codebook))
        if config.double_quantization:
            terms["double_quantization"] = F.mse_loss(quantized, features)
        if self.training and config.entropy_weight > 0:
            terms |= {"sample_entropy": sample_entropy, "average_entropy": average_entropy}
        return Assignment(quantized, indices, terms)
