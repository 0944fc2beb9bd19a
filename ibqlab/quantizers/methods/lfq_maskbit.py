"""LFQ as MaskBit trains it: a floor under the logarithm's argument stands where Open-MAGVIT2 adds a small number.

What is unusual: the floor couples the bits, so that a token's entropy is no sum over bits any more. It is computed over
all K codes, but one block of tokens at a time, and from the tables of two halves of the bits instead of a softmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibqlab.quantizers import blocks
from ibqlab.quantizers.base import register_quantizer
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.lfq import LookupFreeQuantizer, LookupFreeQuantizerConfig, bit_tables, mean_distribution


@dataclass(frozen=True, kw_only=True)
class MaskbitQuantizerConfig(LookupFreeQuantizerConfig):
    """LFQ as published by MaskBit. `average_entropy_weight` is γ, published 1."""

    codebook_size: int = 16384
    """K, codes, a power of two. Published: 2^10, 2^12, 2^14, 2^16 and 2^18."""
    code_dim: int = 0
    """D, bits per code, always log2 K: 0 fills it in. Published: 10 to 18."""
    entropy_weight: float = 0.02
    """Weight of the entropy penalty in the loss, ≥ 0; 0 leaves it out. Published: 0.02, and 2.0 more that falls to 0
    over the first 2,000 steps, which is not done here."""
    entropy_epsilon: float = 1e-5
    """ε, the smallest number whose logarithm either entropy takes, ≥ 0. Published: 1e-5. 0 gives the exact entropy."""


@register_quantizer("lfq_maskbit", MaskbitQuantizerConfig, label="LFQ, MaskBit")
class MaskbitQuantizer(LookupFreeQuantizer):
    """Lookup-free quantization with the entropies and the evaluation of MaskBit.

        loss = β mean‖z − sg(q)‖² + w (H̄ − γ Ĥ),   H(p) = −Σ_c p(c) ln max(p(c), ε)

    with p_n = softmax_c(2 z_n·c / τ), H̄ the mean of H(p_n) and Ĥ = H(mean_n p_n). Choice and value are those of "lfq".
    The commitment is there in evaluation, too; the entropies are 0 there.
    Source: MaskBit (Weber et al., 2024), §3; published MaskBit code, LookupFreeQuantizer.
    """

    def terms(self, features: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> dict[str, Float[Tensor, ""]]:
        """The terms of the loss. Cost of the penalty: see `floored_entropies`."""
        config = self.config
        terms = dict.fromkeys(self.loss_weights(), features.new_zeros(()))
        terms["commitment"] = F.mse_loss(features, codes)
        if self.training and config.entropy_weight > 0:
            terms["sample_entropy"], terms["average_entropy"] = floored_entropies(
                features,
                config.entropy_temperature,
                config.entropy_epsilon,
                over_processes=config.entropy_over_processes,
                matmul=config.matmul,
            )
        return terms


def floored_entropies(
    features: Float[Tensor, "N D"],
    temperature: float = 0.01,
    epsilon: float = 1e-5,
    *,
    over_processes: bool = False,
    matmul: str = "float32",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Entropies of the softmax over all sign vectors, with logarithms of ε at least.

        p_n = softmax_c(2 z_n·c / τ),   H̄ = mean_n −Σ_c p_n(c) ln max(p_n(c), ε),   Ĥ likewise of p̄ = mean_n p_n

    Args:
        features: z, any scale, float32 or float64.
        temperature: τ > 0.
        epsilon: ε ≥ 0.
        over_processes, matmul: as in `lfq.sign_entropies`.
    Returns:
        H̄ and Ĥ, nats, 0 to D·ln 2, and at most ln 1/ε.
    Cost: O(N·K) operations, O(N·√K + K) memory plus two blocks of `blocks.BLOCK_BYTES`.
    Source: published MaskBit code; the tables are exact.
    """
    lower, upper = bit_tables(features * (4 / temperature))
    floor = max(epsilon, torch.finfo(features.dtype).tiny)  # a code of probability 0 must give 0, not 0 · ∞
    mean = mean_distribution(lower, upper, over_processes, matmul)
    return _mean_entropy(lower, upper, floor), -(mean * mean.clamp_min(floor).log()).sum()


@never_compiled
def _mean_entropy(lower: Float[Tensor, "N L"], upper: Float[Tensor, "N U"], floor: float) -> Float[Tensor, ""]:
    """mean_n −Σ_ul p ln max(p, floor) with p = upper_nu lower_nl, a block of tokens at a time."""
    return _MeanEntropy.apply(lower, upper, floor)


class _MeanEntropy(torch.autograd.Function):
    """With G = −(ln max(p, ε) + 1[p ≥ ε]): ∂lower_l = Σ_u G_ul upper_u, ∂upper_u = Σ_l G_ul lower_l."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor, floor: float) -> Tensor:
        total = lower.new_zeros(())
        for rows, (shares, logarithms) in _blocks(lower, upper):
            _shares(lower[rows], upper[rows], shares)
            total -= torch.clamp(shares, min=floor, out=logarithms).log_().mul_(shares).sum()
        ctx.save_for_backward(lower, upper)
        ctx.floor = floor
        return total / len(lower)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        lower, upper = ctx.saved_tensors
        grad_lower, grad_upper = torch.empty_like(lower), torch.empty_like(upper)
        with blocks.full_precision(lower.device):
            for rows, (shares, slope) in _blocks(lower, upper):
                _shares(lower[rows], upper[rows], shares)
                torch.clamp(shares, min=ctx.floor, out=slope).log_().add_(shares >= ctx.floor)  # −G, (R, K)
                table = slope.view(-1, upper.shape[1], lower.shape[1])  # (R, U, L)
                torch.bmm(upper[rows, None], table, out=grad_lower[rows, None])
                torch.bmm(table, lower[rows, :, None], out=grad_upper[rows, :, None])
        scale = -gradient / len(lower)
        return grad_lower.mul_(scale), grad_upper.mul_(scale), None


def _blocks(lower: Float[Tensor, "N L"], upper: Float[Tensor, "N U"]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of tokens with memory for two (R, K)."""
    return blocks.score_blocks(len(lower), lower.shape[1] * upper.shape[1], lower, buffers=2)


def _shares(lower: Float[Tensor, "R L"], upper: Float[Tensor, "R U"], out: Float[Tensor, "R K"]) -> None:
    """p of every code, into memory."""
    torch.mul(upper[:, :, None], lower[:, None, :], out=out.view(-1, upper.shape[1], lower.shape[1]))
