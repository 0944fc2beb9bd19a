"""Index backpropagation without the N × K matrix: exact value and gradient, one block of rows at a time.

The published form writes out logits, softmax, one-hot and their gradients, N × K numbers each. Here the forward pass
keeps, per token, the chosen index, the largest logit and one or two log-sum-exps relative to it, and, per code, one
mean probability; the backward pass computes each block of logits again. Five matrix products in all, the floor, and
nothing of size N × K outlives its block. What happens within a block stands in `index_backprop_rows`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.base.checks import finite_number
from ibqlab.base.processes import average_over_processes
from ibqlab.quantizers.blocks import add_product, full_precision, product, row_blocks, workspace
from ibqlab.quantizers.compilation import never_compiled
from ibqlab.quantizers.index_backprop_rows import Fused, InPlace, Pull, Rows, Split
from ibqlab.quantizers.vectors import check_pair


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


@never_compiled
def index_backprop(
    features: Float[Tensor, "N D"],
    codebook: Float[Tensor, "K D"],
    entropy_temperature: float | None = 0.01,
    entropy_epsilon: float = 1e-5,
    *,
    entropy_over_processes: bool = False,
) -> IndexBackprop:
    """Quantize by the largest dot product and differentiate through the softmax over all codes.

        S = z·Cᵀ,  p = softmax(S),  k = argmax S,  z_q = (onehot(k) + p − sg(p))·C          (IBQ eqs. 3–7)
        q = softmax(S/τ),  H̄ = mean_n −Σ_k q log q,  Ĥ = −Σ_k q̄ log(q̄ + ε),  q̄ = mean_n q

    The published code also adds ε to the logits inside H̄'s log-softmax, which shifts all of them alike and changes
    nothing. A token whose features hold NaN or infinity gets a code of NaN, as there, and so do the entropies.

    Args:
        features: z, any scale, any strides.
        codebook: C, on the same device. On CUDA two inputs of one half type are multiplied as they are, with float32
            sums, and the gradient's products are taken in bfloat16; every other pair is computed in float32, or in
            float64 where an input is. S and all that comes of it is float32 or float64 in any case, because τ
            multiplies the rounding of S by 1/τ.
        entropy_temperature: τ > 0; None skips both entropies.
        entropy_epsilon: ε ≥ 0.
        entropy_over_processes: take q̄ over the tokens of all processes of a distributed job, which must all call this
            with as many tokens each. The gradient is then that of the mean of the processes' losses, as data-parallel
            training wants it. False: over the tokens given, as published.
    Returns:
        IndexBackprop. `quantized` is float32, or float64 where an input is.
    Raises:
        ValueError: shapes, devices or settings that do not fit; the message says which.
    Cost: 10·N·K·D operations forward and backward together; memory O(N·D + K·D) plus, in the backward pass, two (CUDA:
        three) blocks of `blocks.BLOCK_BYTES`, or of 128 rows where those are larger. Measured: experiments/results.
        On a CPU every repetition is equal in every bit; on CUDA with torch.use_deterministic_algorithms(True) and the
        environment's CUBLAS_WORKSPACE_CONFIG=:4096:8.
    Source: IBQ §3.2; the closed-form backward follows from the softmax's Jacobian, derivation in `_IndexBackprop`.
    """
    entropies = Entropies(entropy_temperature, entropy_epsilon, entropy_over_processes)
    return quantize_by_blocks(features, codebook, entropies)


class Entropies(NamedTuple):
    """Settings of the two entropies, as in `index_backprop`."""

    temperature: float | None
    epsilon: float
    over_processes: bool = False


def quantize_by_blocks(
    features: Float[Tensor, "N D"], codebook: Float[Tensor, "part D"], entropies: Entropies, split: Split | None = None
) -> IndexBackprop:
    """`index_backprop` where the codebook may be a part of one whose other codes `split` reaches."""
    check_pair(features, codebook, split.size if split else None)
    entropies = _checked(entropies)
    dtype = _operand_type(features, codebook)
    with full_precision(features.device):
        quantized, indices, sample, average = _IndexBackprop.apply(
            features.to(dtype), codebook.to(dtype), entropies, split
        )
    if entropies.temperature is None:
        return IndexBackprop(quantized, indices, None, None)
    return IndexBackprop(quantized, indices, sample, average)


def _operand_type(features: Tensor, codebook: Tensor) -> torch.dtype:
    """The type in which features and codebook are multiplied."""
    if features.is_cuda and features.dtype == codebook.dtype and features.dtype in (torch.float16, torch.bfloat16):
        return features.dtype
    return torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)


def _checked(entropies: Entropies) -> Entropies:
    """The settings as plain numbers."""
    temperature, epsilon = entropies.temperature, finite_number("entropy_epsilon", entropies.epsilon)
    if temperature is not None and not (temperature := finite_number("entropy_temperature", temperature)) > 0:
        raise ValueError(f"entropy_temperature must be > 0, or None for no entropy, got {temperature:g}")
    if not epsilon >= 0:
        raise ValueError(f"entropy_epsilon must be ≥ 0, got {epsilon:g}")
    return Entropies(temperature, epsilon, entropies.over_processes)


def _form(device_type: str, split: Split | None) -> type[InPlace] | Fused:
    """How a block is worked on. On a CPU the compiled form lost (experiments/results/index_backprop.md)."""
    if split is not None:
        return Fused(split)
    return _compiled_form() if device_type == "cuda" else InPlace


@cache
def _compiled_form() -> Fused:
    return Fused(compiled=True)


_NO_GRADIENT = (None,) * 2
"""For the settings among the inputs of `_IndexBackprop`."""


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
        ctx: Any, features: Tensor, codebook: Tensor, entropies: Entropies, split: Split | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        form, dtype = _form(features.device.type, split), torch.promote_types(features.dtype, torch.float32)
        average = torch.zeros(len(codebook), dtype=dtype, device=features.device)
        parts = row_blocks(len(features), split.largest if split else len(codebook), average)
        (buffer,) = workspace(1, parts[0].stop, len(codebook), average)
        found = []
        for part in parts:
            scores = product(features[part], codebook.T, buffer[: part.stop - part.start])
            found.append(form.forward(scores, entropies.temperature, average))
        rows = Rows(*(None if values[0] is None else torch.cat(values) for values in zip(*found, strict=True)))
        average.div_(len(features))
        if entropies.over_processes:
            average_over_processes(average)
        ctx.save_for_backward(features, codebook, average, *rows)
        ctx.entropies, ctx.split = entropies, split
        ctx.mark_non_differentiable(rows.indices)
        ctx.set_materialize_grads(False)
        chosen = codebook[rows.indices] if split is None else split.take(codebook, rows.indices)
        quantized = chosen.to(dtype).masked_fill_(~rows.top.isfinite(), torch.nan)
        if entropies.temperature is None:
            return quantized, rows.indices, average.new_zeros(()), average.new_zeros(())
        average_entropy = -(average * _shifted(average, entropies.epsilon).log()).sum()
        if split is not None:
            average_entropy = split.total(average_entropy)
        return quantized, rows.indices, rows.entropy.mean(), average_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_sample: Tensor | None, grad_average: Tensor | None):
        features, codebook, average, *kept = ctx.saved_tensors
        pull = _pull_of_entropies(average, len(features), ctx.entropies, grad_sample, grad_average)
        grad_features = torch.zeros(features.shape, dtype=average.dtype, device=average.device)
        grad_codebook = torch.zeros(codebook.shape, dtype=average.dtype, device=average.device)
        if grad is None and pull is None:
            return grad_features, grad_codebook, *_NO_GRADIENT
        rows, form = Rows(*kept), _form(features.device.type, ctx.split)
        # float16 would lose gradients below 6·10⁻⁸.
        into = torch.bfloat16 if features.dtype == torch.float16 else features.dtype
        operands = features.to(into), codebook.to(into), None if grad is None else grad.to(into)
        parts = row_blocks(len(features), ctx.split.largest if ctx.split else len(codebook), average)
        buffers = workspace(1 if grad is None else 2, parts[0].stop, len(codebook), average)
        with full_precision(features.device):
            for part in parts:
                blocks = [buffer[: part.stop - part.start] for buffer in buffers]
                scores = product(features[part], codebook.T, blocks[0])
                gains = None if grad is None else product(operands[2][part], operands[1].T, blocks[1])
                here = Rows(*(None if value is None else value[part] for value in rows))
                change = form.backward(scores, gains, here, pull, into)
                product(change, operands[1], grad_features[part])
                add_product(grad_codebook, change.T, operands[0][part])
        if grad is not None:
            tokens, chosen = (slice(None), rows.indices) if ctx.split is None else ctx.split.own(rows.indices)
            grad_codebook.index_add_(0, chosen, grad[tokens].to(grad_codebook.dtype))
        return grad_features.to(features.dtype), grad_codebook.to(codebook.dtype), *_NO_GRADIENT


def _pull_of_entropies(
    average: Tensor, tokens: int, entropies: Entropies, grad_sample: Tensor | None, grad_average: Tensor | None
) -> Pull | None:
    """The entropies' pull on scores; None where neither has a gradient."""
    if grad_sample is None and grad_average is None:
        return None
    share = 1 / (entropies.temperature * tokens)
    codes, scores = torch.zeros_like(average), average.new_zeros(())
    if grad_average is not None:
        shifted = _shifted(average, entropies.epsilon)
        codes = shifted.log().add_(average / shifted).mul_(-share * grad_average)
    if grad_sample is not None:
        scores = -share / entropies.temperature * grad_sample
    return Pull(codes, scores, entropies.temperature)


def _shifted(average: Tensor, epsilon: float) -> Tensor:
    """q̄ + ε, kept above zero so that a code of probability 0 counts as 0·log 0 = 0 also where ε is 0."""
    return (average + epsilon).clamp_min(torch.finfo(average.dtype).tiny)
