"""Soft VQ, the paper's other baseline that updates all codes: soft in training, hard in evaluation.

The training value, a mixture of all codes, is computed without the N × K matrix: exact value and gradient, one block of
rows at a time. It is attention of the tokens over the codebook, and PyTorch's fused attention was the first form; on a
CPU its backward pass took longer than the full-matrix form (experiments/results/index_backprop.md).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibqlab.base.checks import finite_number, require
from ibqlab.quantizers import blocks
from ibqlab.quantizers.base import Assignment, Quantizer, register_quantizer
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.estimators import nearest_code
from ibqlab.quantizers.products import (
    CodebookOperand,
    GradientProducts,
    ProductForm,
    in_panels,
    multiplying,
    product_form,
    side_by_side,
)
from ibqlab.quantizers.terms import PairLossConfig, pair_terms
from ibqlab.quantizers.vectors import check_alike


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

    reaches = "softmax"

    @property
    def temperature(self) -> float:
        """T at the present `progress`."""
        start, end = self.config.temperature_start, self.config.temperature_end
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(self.progress, 0.0), 1.0)))

    def choose(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Int[Tensor, " N"]:
        """The largest dot product."""
        return nearest_code(features, codebook, "dot", matmul=self.config.matmul)

    def assign(self, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
        """Average of all codes in training; the most probable code in evaluation."""
        indices = self.choose(features, codebook)
        if self.training:
            quantized = mixture_of_codes(features, codebook, self.temperature, matmul=self.config.matmul)
        else:
            quantized = F.embedding(indices, codebook)
        return Assignment(quantized, indices, pair_terms(features, quantized))


@never_compiled
def mixture_of_codes(
    features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"], temperature: float, *, matmul: str = "float32"
) -> Float[Tensor, "N D"]:
    """Soft VQ's training value: the average of all codes, weighted by softmax(z·Cᵀ/T). Every code takes gradient.

    Args:
        features: z, any scale.
        codebook: C, same type and device.
        temperature: T > 0; small enough, it gives the best code.
        matmul: what is promised about products of float32 on CUDA, one of `products.MATMULS`.
    Returns:
        (N, D), of the features' type.
    Raises:
        ValueError: shapes, types or devices that do not fit, a temperature that is not positive, or another promise.
    Cost: 14·N·K·D operations forward and backward together; memory O(N·D + K·D) plus two blocks of
        `blocks.BLOCK_BYTES`, and on CUDA panels of `products.PANEL_BYTES`.
    Source: IBQ appendix B.
    """
    if not (temperature := finite_number("temperature", temperature)) > 0:
        raise ValueError(f"temperature must be > 0, got {temperature:g}; for the best code alone use nearest_code")
    check_alike(features, codebook)
    form = product_form(features.dtype, features.device, matmul)
    return _MixtureOfCodes.apply(features, codebook, temperature, form)


class _MixtureOfCodes(torch.autograd.Function):
    """With p = softmax(z·Cᵀ/T), G = g·Cᵀ and ∂S = p ⊙ (G − ⟨p, G⟩)/T: ∂z = ∂S·C, ∂C = ∂Sᵀ·z + pᵀ·g."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, codebook: Tensor, temperature: float, form: ProductForm) -> Tensor:
        ctx.save_for_backward(features, codebook)
        ctx.temperature, ctx.form = temperature, form
        mixed = torch.empty_like(features, memory_format=torch.contiguous_format)
        with multiplying(form, features.device):
            operand, left = CodebookOperand(codebook, form), side_by_side(form, features, form.left)
            average = GradientProducts(operand, mixed, None)  # p·C has the form of ∂S·C
            for rows, (shares,) in blocks.score_blocks(len(features), len(codebook), features):
                operand.multiply([left[rows]], [shares])  # scores, (R, K), one block, never (N, K)
                for tile in shares.split(blocks.rows_per_tile(shares)):  # in the cache, softmax is one pass over memory
                    _to_shares(tile, temperature)
                average.add(rows, features[rows], in_panels(form, shares, operand.panels(len(shares))))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (features, codebook), form = ctx.saved_tensors, ctx.form
        grad_features = torch.empty_like(features, memory_format=torch.contiguous_format)
        grad_codebook = torch.zeros_like(codebook, memory_format=torch.contiguous_format)
        with multiplying(form, features.device):
            operand = CodebookOperand(codebook, form)
            lefts = [side_by_side(form, value, form.left) for value in (features, grad)]
            through_scores = GradientProducts(operand, grad_features, grad_codebook)
            through_codes = GradientProducts(operand, None, grad_codebook)
            for rows, (shares, gains) in blocks.score_blocks(len(features), len(codebook), features, buffers=2):
                # S computed again, because p of all tokens was not kept, and G, (R, K).
                operand.multiply([left[rows] for left in lefts], [shares, gains])
                tile_rows = blocks.rows_per_tile(shares)
                for tile, change in zip(shares.split(tile_rows), gains.split(tile_rows), strict=True):
                    _to_shares(tile, ctx.temperature)
                    blocks.softmax_backward(change, tile)  # G becomes ∂S·T in place
                    change.mul_(1 / ctx.temperature)
                panels = operand.panels(len(shares))
                through_scores.add(rows, features[rows], in_panels(form, gains, panels))
                through_codes.add(rows, grad[rows], in_panels(form, shares, panels))
        return grad_features, grad_codebook, None, None


def _to_shares(scores: Tensor, temperature: float) -> None:
    """scores ← softmax(scores/T)."""
    # Relative to the best score before it is divided: T may be 10⁻⁶, which would multiply the rounding of |S|.
    exponents = scores.sub_(blocks.best_codes(scores)[0]).mul_(1 / temperature)
    torch.softmax(exponents.clamp_(min=blocks.lowest_exponent(scores.dtype)), 1, out=scores)
