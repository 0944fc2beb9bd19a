"""Index backpropagation without the N × K matrix: exact value and gradient, one block of rows at a time.

The published form has logits, softmax, one-hot and their gradients as matrices of N × K numbers each. Here the forward
pass keeps, per token, the chosen index, the largest logit and one or two log-sum-exps relative to it, and, per code,
one mean probability; the backward pass computes each block of logits again. Five matrix products in all, the floor, and
nothing of size N × K outlives its block. What happens within a block stands in `index_backprop_rows`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.base.checks import finite_number, require
from ibqlab.base.processes import average_over_processes
from ibqlab.quantizers import blocks
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.index_backprop_rows import EntropyGradient, RowStatistics, block_functions
from ibqlab.quantizers.products import (
    CodebookOperand,
    GradientProducts,
    ProductForm,
    gradient_form,
    multiplying,
    operand_type,
    product_form,
    side_by_side,
)
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
    matmul: str = "float32",
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
        matmul: what is promised about products of float32 on CUDA, one of `products.MATMULS`: "float32", as near to
            float64 as IEEE float32; "tf32" and "bfloat16", operands rounded to those types.
    Returns:
        IndexBackprop. `quantized` is float32, or float64 where an input is.
    Raises:
        ValueError: shapes, devices or settings that do not fit; the message says which.
    Cost: 10·N·K·D operations forward and backward together (on CUDA in float32 six times as many, of bfloat16); memory
        O(N·D + K·D) plus, in the backward pass, two blocks of `blocks.BLOCK_BYTES`, or of 128 rows where those are
        larger, and on CUDA two panels of `products.PANEL_BYTES`. For N = 4,096, K = 262,144, D = 256 in float32 that
        is 2·537 MB of scores and gains, 268 MB of ∂L/∂C, 2·50 MB of panels, 40 MB of the rest: 1.48 GB.
        On a CPU every repetition is equal in every bit; on CUDA with torch.use_deterministic_algorithms(True) and the
        environment's CUBLAS_WORKSPACE_CONFIG=:4096:8.
    Source: IBQ §3.2; the closed-form backward follows from the softmax's Jacobian, derivation in `_IndexBackprop`.
    """
    check_pair(features, codebook)
    epsilon, temperature = finite_number("entropy_epsilon", entropy_epsilon), entropy_temperature
    if temperature is not None and not (temperature := finite_number("entropy_temperature", temperature)) > 0:
        raise ValueError(f"entropy_temperature must be > 0, or None for no entropy, got {temperature:g}")
    require(epsilon >= 0, f"entropy_epsilon must be ≥ 0, got {epsilon:g}")
    entropies = Entropies(temperature, epsilon, entropy_over_processes)
    dtype = operand_type(features, codebook)
    form = product_form(dtype, features.device, matmul)
    with multiplying(form, features.device):
        inputs = features.to(dtype), codebook.to(dtype)
        quantized, indices, sample, average = _IndexBackprop.apply(*inputs, entropies, form)
    if entropies.temperature is None:
        return IndexBackprop(quantized, indices, None, None)
    return IndexBackprop(quantized, indices, sample, average)


class Entropies(NamedTuple):
    """Settings of the two entropies, as in `index_backprop`."""

    temperature: float | None
    epsilon: float
    over_processes: bool


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
        ctx: Any, features: Tensor, codebook: Tensor, entropies: Entropies, form: ProductForm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(features.dtype, torch.float32)
        average = torch.zeros(len(codebook), dtype=dtype, device=features.device)  # (K,), q̄ in the end
        block, operand = block_functions(average), CodebookOperand(codebook, form)
        left = side_by_side(form, features, form.left)
        # Blocks and panels are those of the backward pass: products of other shapes round otherwise, and 1/τ multiplies
        # the difference of a score here to the same score there.
        parts = []
        for rows, (buffer,) in blocks.score_blocks(len(features), len(codebook), average):
            operand.multiply([left[rows]], [buffer])  # scores, (R, K), one block, never (N, K)
            parts.append(block.statistics(buffer, entropies.temperature, average))
        # Statistics that a block does without are None in all of them.
        statistics = RowStatistics(
            *(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))
        )
        average.div_(len(features))
        if entropies.over_processes:
            average_over_processes(average)
        # O(N·D + K·D) numbers: the backward pass computes scores and shares again.
        ctx.save_for_backward(features, codebook, average, *statistics)
        ctx.entropies, ctx.form = entropies, form
        ctx.mark_non_differentiable(statistics.indices)
        ctx.set_materialize_grads(False)
        # A token that is not finite has an index, too, but its code must not look like a right one.
        quantized = codebook[statistics.indices].to(dtype).masked_fill_(~statistics.top.isfinite(), torch.nan)
        if entropies.temperature is None:
            return quantized, statistics.indices, average.new_zeros(()), average.new_zeros(())
        average_entropy = -(average * _shifted(average, entropies.epsilon).log()).sum()
        return quantized, statistics.indices, statistics.entropy.mean(), average_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None, grad_sample: Tensor | None, grad_average: Tensor | None):
        features, codebook, average, *saved = ctx.saved_tensors
        entropies = _entropy_gradient(average, len(features), ctx.entropies, grad_sample, grad_average)
        grad_features = torch.zeros(features.shape, dtype=average.dtype, device=average.device)
        grad_codebook = torch.zeros(codebook.shape, dtype=average.dtype, device=average.device)
        if grad is None and entropies is None:
            return grad_features, grad_codebook, None, None
        statistics, form, into = RowStatistics(*saved), ctx.form, gradient_form(ctx.form)
        with multiplying(form, features.device):
            operand = CodebookOperand(codebook, form)
            gradient_operand = operand if into == form else CodebookOperand(codebook, into)
            gradients = GradientProducts(gradient_operand, grad_features, grad_codebook)
            left, block = side_by_side(form, features, form.left), block_functions(average)
            pull = None if grad is None else side_by_side(into, grad.to(average.dtype), into.left)
            count = 1 if grad is None else 2
            for rows, buffers in blocks.score_blocks(len(features), len(codebook), average, buffers=count):
                scores, gains = buffers[0], buffers[1] if count == 2 else None
                _scores_and_gains(operand, gradient_operand, (left, pull), rows, buffers)
                of_rows = RowStatistics(*(None if value is None else value[rows] for value in statistics))
                panels = gradient_operand.panels(len(scores))
                # ∂L/∂S, (R, k) at a time
                change = block.changes(scores, gains, of_rows, entropies, form=into, panels=panels)
                gradients.add(rows, features[rows], change)
        if grad is not None:
            # The hard choice's part, Σ_n onehot(k_n) g_n, without the one-hot matrix.
            grad_codebook.index_add_(0, statistics.indices, grad.to(grad_codebook.dtype))
        return grad_features.to(features.dtype), grad_codebook.to(codebook.dtype), None, None


def _scores_and_gains(
    codebook: CodebookOperand,
    gradient_codebook: CodebookOperand,
    lefts: tuple[Tensor, Tensor | None],
    rows: slice,
    outs: list[Float[Tensor, "R K"]],
) -> None:
    """S and G = g·Cᵀ of a block; from one making of the codebook's parts where both have one form."""
    of_rows = [left[rows] for left in lefts if left is not None]
    if codebook is gradient_codebook:
        codebook.multiply(of_rows, outs)
        return
    codebook.multiply(of_rows[:1], outs[:1])
    gradient_codebook.multiply(of_rows[1:], outs[1:])


def _entropy_gradient(
    average: Float[Tensor, " K"],
    tokens: int,
    entropies: Entropies,
    grad_sample: Tensor | None,
    grad_average: Tensor | None,
) -> EntropyGradient | None:
    """The entropies' gradient at the scores; None where neither entropy has one."""
    if grad_sample is None and grad_average is None:
        return None
    share = 1 / (entropies.temperature * tokens)
    by_code, slope = torch.zeros_like(average), average.new_zeros(())
    if grad_average is not None:
        shifted = _shifted(average, entropies.epsilon)
        by_code = shifted.log().add_(average / shifted).mul_(-share * grad_average)
    if grad_sample is not None:
        slope = -share / entropies.temperature * grad_sample
    return EntropyGradient(by_code, slope, entropies.temperature)


def _shifted(average: Tensor, epsilon: float) -> Tensor:
    """q̄ + ε, kept above zero so that a code of probability 0 counts as 0·log 0 = 0 also where ε is 0."""
    return (average + epsilon).clamp_min(torch.finfo(average.dtype).tiny)
