"""Index backpropagation without the N × K matrix: exact value and gradient, one block of rows at a time.

The published form writes out logits, softmax, one-hot and their gradients, N × K numbers each. Here the forward pass
keeps, per token, the chosen index, the largest logit and two log-sum-exps relative to it (temperatures 1 and τ), and,
per code, one mean probability; the backward pass computes each block of logits again. Five matrix products in all, the
floor, and nothing of size N × K outlives its block.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.quantizers.estimators import rows_per_block


class IndexBackprop(NamedTuple):
    """What `index_backprop` returns."""

    quantized: Float[Tensor, "N D"]
    """The chosen codes; their gradient reaches every code and the features."""
    indices: Int[Tensor, " N"]
    """int64; on a tie of the largest logit the lowest index."""
    sample_entropy: Float[Tensor, ""] | None
    """H̄, mean over tokens of the entropy of softmax(z·Cᵀ/τ), nats, 0 to ln K; None without a temperature."""
    average_entropy: Float[Tensor, ""] | None
    """Ĥ, entropy of the tokens' mean distribution, nats, 0 to ln K; None without a temperature."""


def index_backprop(
    features: Float[Tensor, "N D"],
    codebook: Float[Tensor, "K D"],
    entropy_temperature: float | None = 0.01,
    entropy_epsilon: float = 1e-5,
) -> IndexBackprop:
    """Quantize by the largest dot product and differentiate through the softmax over all codes.

        S = z·Cᵀ,  p = softmax(S),  k = argmax S,  z_q = (onehot(k) + p − sg(p))·C          (IBQ eqs. 3–7)
        q = softmax(S/τ),  H̄ = mean_n −Σ_k q log q,  Ĥ = −Σ_k q̄ log(q̄ + ε),  q̄ = mean_n q

    The published code also adds ε to the logits inside H̄'s log-softmax, which shifts all of them alike and changes
    nothing. q̄ is the mean over the tokens given, on this process only, as published.

    Args:
        features: z, any scale. Half types are computed in float32, because τ multiplies the rounding of S by 1/τ.
        codebook: C, on the same device.
        entropy_temperature: τ > 0; None skips both entropies.
        entropy_epsilon: ε ≥ 0.
    Returns:
        IndexBackprop. `quantized` is float32, or float64 where an input is.
    Raises:
        ValueError: shapes, devices or settings that do not fit; the message says which.
    Cost: 10·N·K·D operations forward and backward together; memory O(N·D + K·D) plus three blocks of
        `estimators.BLOCK_BYTES`.
    Source: IBQ §3.2; the closed-form backward follows from the softmax's Jacobian, derivation in `_IndexBackprop`.
    """
    _check(features, codebook, entropy_temperature, entropy_epsilon)
    dtype = torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        quantized, indices, sample, average = _IndexBackprop.apply(
            features.to(dtype), codebook.to(dtype), entropy_temperature, entropy_epsilon
        )
    if entropy_temperature is None:
        return IndexBackprop(quantized, indices, None, None)
    return IndexBackprop(quantized, indices, sample, average)


def _check(features: Tensor, codebook: Tensor, temperature: float | None, epsilon: float) -> None:
    if features.ndim != 2 or codebook.ndim != 2 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"features (N, D) and codebook (K, D) must share D, got {tuple(features.shape)} and "
            f"{tuple(codebook.shape)}; reshape (B, D, h, w) features with .permute(0, 2, 3, 1).reshape(-1, D)"
        )
    if not len(features) or len(codebook) < 2:
        raise ValueError(f"at least one token and two codes are needed, got N = {len(features)}, K = {len(codebook)}")
    if features.device != codebook.device:
        raise ValueError(
            f"features are on {features.device}, the codebook on {codebook.device}; move one with .to(device)"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"entropy_temperature must be > 0, or None for no entropy, got {temperature}")
    if not epsilon >= 0:
        raise ValueError(f"entropy_epsilon must be ≥ 0, got {epsilon}")


class _IndexBackprop(torch.autograd.Function):
    """Forward and backward by blocks of rows.

    With g = ∂L/∂z_q, G = g·Cᵀ and a, b the gradients of H̄ and Ĥ:
        ∂L/∂S = p ⊙ (G − ⟨p, G⟩) + q ⊙ (u − ⟨q, u⟩)/(τN),   u_k = −b(log(q̄_k + ε) + q̄_k/(q̄_k + ε)) − a S_k/τ
        ∂L/∂z = ∂L/∂S · C,   ∂L/∂C = (∂L/∂S)ᵀ · z + Σ_n onehot(k_n) g_n
    Terms of u that are constant along k vanish in u − ⟨q, u⟩, so S is taken relative to its largest entry throughout:
    otherwise the rounding of ⟨q, u⟩ would grow with |S|/τ.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, codebook: Tensor, temperature: float | None, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, size = len(features), len(codebook)
        indices = torch.empty(tokens, dtype=torch.int64, device=features.device)
        top, log_sum, log_sum_cold = (features.new_empty(tokens) for _ in range(3))
        entropy = features.new_zeros(tokens)
        average = features.new_zeros(size)
        rows = rows_per_block(size, features.element_size())
        scores = features.new_empty(min(rows, tokens), size)
        scratch = torch.empty_like(scores)
        for start in range(0, tokens, rows):
            part = slice(start, min(start + rows, tokens))
            count = part.stop - start
            block, work = scores[:count], scratch[:count]
            torch.mm(features[part], codebook.T, out=block)
            top[part], indices[part] = block.max(1)
            block.sub_(top[part, None])
            log_sum[part] = torch.exp(block, out=work).sum(1).log_()
            if temperature is None:
                continue
            block.div_(temperature)
            total = torch.exp(block, out=work).sum(1, keepdim=True)
            work.div_(total)
            average.add_(work.sum(0))
            log_sum_cold[part] = total.log_()[:, 0]
            entropy[part] = log_sum_cold[part] - _row_dot(work, block)[:, 0]
        average.div_(tokens)
        ctx.save_for_backward(features, codebook, indices, top, log_sum, log_sum_cold, average)
        ctx.temperature, ctx.epsilon = temperature, epsilon
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        shifted = _shifted(average, epsilon)
        return codebook[indices], indices, entropy.mean(), -(average * shifted.log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_sample: Tensor | None, grad_average: Tensor | None):
        features, codebook, indices, top, log_sum, log_sum_cold, average = ctx.saved_tensors
        grad_features = torch.zeros_like(features)
        grad_codebook = torch.zeros_like(codebook)
        penalised = grad_sample is not None or grad_average is not None
        if grad is None and not penalised:
            return grad_features, grad_codebook, None, None
        if penalised:
            sample_pull = 0.0 if grad_sample is None else grad_sample / ctx.temperature
            code_pull = torch.zeros_like(average)
            if grad_average is not None:
                shifted = _shifted(average, ctx.epsilon)
                code_pull = shifted.log().add_(average / shifted).mul_(-grad_average)
        rows = rows_per_block(len(codebook), features.element_size())
        scores = features.new_empty(min(rows, len(features)), len(codebook))
        pull, entropy_part = torch.empty_like(scores), torch.empty_like(scores) if penalised else None
        for start in range(0, len(features), rows):
            part = slice(start, min(start + rows, len(features)))
            count = part.stop - start
            block, work = scores[:count], pull[:count]
            torch.mm(features[part], codebook.T, out=block).sub_(top[part, None])
            if penalised:
                cold = entropy_part[:count]
                torch.mul(block, -sample_pull, out=work).add_(code_pull)
                torch.div(block, ctx.temperature, out=cold).sub_(log_sum_cold[part, None]).exp_()
                work.sub_(_row_dot(cold, work)).mul_(1 / (ctx.temperature * len(features)))
                cold.mul_(work)
            if grad is None:
                block = cold
            else:
                block.sub_(log_sum[part, None]).exp_()
                torch.mm(grad[part], codebook.T, out=work)
                block.mul_(work.sub_(_row_dot(block, work)))
                if penalised:
                    block.add_(cold)
            torch.mm(block, codebook, out=grad_features[part])
            grad_codebook.addmm_(block.T, features[part])
        if grad is not None:
            grad_codebook.index_add_(0, indices, grad)
        return grad_features, grad_codebook, None, None


def _shifted(average: Tensor, epsilon: float) -> Tensor:
    """q̄ + ε, kept above zero so that a code of probability 0 counts as 0·log 0 = 0 also where ε is 0."""
    return (average + epsilon).clamp_min(torch.finfo(average.dtype).tiny)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row dot product, (R, 1), without writing out the elementwise product."""
    return torch.bmm(left[:, None, :], right[:, :, None])[:, :, 0]
