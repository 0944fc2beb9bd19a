"""Cross-entropy of a linear head without the N × V logits: exact value and gradient, a block of rows at a time.

The naive form keeps logits, their softmax and their gradient, N × V numbers each. Here a block of logits becomes its
own gradient in place as soon as its losses are read off, and is multiplied into the gradients of hidden states and
weight in the same pass: three matrix products, the floor, and nothing is computed again in the backward pass.

From 2.13 on PyTorch has a form by blocks, `torch.nn.functional.linear_cross_entropy` with options. It is not used:
with this form's blocks it is as fast, with those it chooses itself slower than the naive form, and it gives half types
a loss of half type (experiments/results/cross_entropy/report.md, on a CPU).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.base.checks import require_choice
from ibqlab.quantizers import blocks
from ibqlab.quantizers.compiling import never_compiled
from ibqlab.quantizers.indices import value_bounds
from ibqlab.quantizers.products import (
    CodebookOperand,
    GradientProducts,
    ProductForm,
    gradient_form,
    in_panels,
    multiplying,
    operand_type,
    product_form,
    side_by_side,
)
from ibqlab.quantizers.vectors import FLOATS, check_plain

REDUCTIONS = ("mean", "sum", "none")
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Types of targets; torch computes little with the others."""


@never_compiled
def linear_cross_entropy(
    hidden: Float[Tensor, "*tokens C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, " *tokens"],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    matmul: str = "float32",
) -> Float[Tensor, ""] | Float[Tensor, " *tokens"]:
    """How badly a linear head without bias predicts the targets: cross_entropy(linear(hidden, weight), targets).

        S = h·Wᵀ,  L_n = ln Σ_v exp(S_nv) − S_n,target(n)

    In nats: 0 for certain and right, ln V for no idea at all. A token whose hidden state holds NaN or infinity has a
    loss of NaN, as in the naive form.

    Args:
        hidden: h, (N, C) or (B, T, C), any scale, any strides.
        weight: W, on the same device. On CUDA two inputs of one half type, and any but float64 under autocast, are
            multiplied in that type with float32 sums, and float16's gradients in bfloat16; every other pair is
            computed in float32, or in float64 where an input is.
        targets: the right tokens, 0 to V − 1, (N,) or (B, T). No index is ignored: leave tokens without a target out.
        reduction: "mean" or "sum" over tokens, or "none".
        matmul: what is promised about products of float32 on CUDA, one of `quantizers.products.MATMULS`.
    Returns:
        float32, or float64 where an input is: a scalar, or for "none" one loss per token in the shape of `targets`.
    Raises:
        ValueError: shapes, devices, types, targets, a reduction or a promise that do not fit; the message says which.
    Cost: 6·N·V·C operations forward and backward together, all in the forward pass; "none" and a second backward pass
        through the same loss compute the logits again: 8·N·V·C. Memory: both gradients in float32, a copy of each
        input that is not yet of the type multiplied in, and one block of `blocks.BLOCK_BYTES`, or of 128 rows where
        that is larger; on CUDA two panels of `products.PANEL_BYTES` more. Waits once for the device, to check the
        targets. Measured: experiments/results/cross_entropy.
    Source: gradients of a loss in its forward pass as in Liger Kernel (arXiv 2410.10989, §3.2).
    """
    _check(hidden, weight, targets, reduction)
    if not torch.is_grad_enabled():
        # An autograd function is told which inputs want gradients, whether or not gradients are taken at all.
        hidden, weight = hidden.detach(), weight.detach()
    rows = hidden.reshape(-1, hidden.shape[-1])
    form = product_form(_operand_type(hidden, weight), hidden.device, matmul)
    loss = _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1).long(), (reduction != "none", form))
    if reduction == "none":
        return loss.view(targets.shape)
    return loss / targets.numel() if reduction == "mean" else loss


def _operand_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which hidden states and weight are multiplied."""
    exact = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if hidden.is_cuda and torch.is_autocast_enabled("cuda") and exact == torch.float32:
        return torch.get_autocast_dtype("cuda")
    return operand_type(hidden, weight)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    require_choice("reduction", reduction, REDUCTIONS)
    check_plain(hidden=hidden, weight=weight, targets=targets)
    if hidden.ndim not in (2, 3) or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, C) or (B, T, C) and weight (V, C) must share C, got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; give a linear layer's .weight as it is, not transposed"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have hidden's shape without its last axis, {tuple(hidden.shape[:-1])}, got "
            f"{tuple(targets.shape)}; use targets.reshape({', '.join(map(str, hidden.shape[:-1]))})"
        )
    if not targets.numel() or not len(weight):
        raise ValueError(
            f"at least one token and a vocabulary of one are needed, got {targets.numel()} tokens, V = {len(weight)}; "
            "leave an empty batch out"
        )
    if hidden.dtype not in FLOATS or weight.dtype not in FLOATS:
        raise ValueError(
            f"hidden and weight must be floating-point, got {hidden.dtype} and {weight.dtype}; use .float()"
        )
    if targets.dtype not in WHOLE_NUMBERS:
        raise ValueError(f"targets must be integers, indices of tokens, got {targets.dtype}; use targets.long()")
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, targets on {targets.device}; move them to one "
            "with .to(device)"
        )
    bounds = value_bounds(targets)
    if bounds and not 0 <= bounds[0] <= bounds[1] < len(weight):
        raise ValueError(
            f"targets must lie in 0 to V − 1 = {len(weight) - 1}, got {bounds[0]} to {bounds[1]}; leave tokens without "
            "a target out: keep = targets >= 0, then hidden[keep] and targets[keep]"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(S) and g = ∂L/∂L_n: ∂S = g (p − onehot(target)), ∂h = ∂S·W, ∂W = ∂Sᵀ·h.

    Summed, g is one number for all tokens, so the forward pass computes both gradients for g = 1 and the backward pass
    scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, how: tuple[bool, ProductForm]) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.summed, ctx.form = summed, form = how
        # Not summed, every token has a g of its own, which only the backward pass knows.
        needed = ctx.needs_input_grad[:2] if summed else (False, False)
        losses, ctx.gradients = _losses_and_gradients(hidden, weight, targets, needed, form=form)
        return losses.sum() if summed else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        # Scaled in place, hence good for one backward pass; another one computes them again.
        gradients, ctx.gradients = ctx.gradients, (None, None)
        if gradients == (None, None):
            token_grads = None if ctx.summed else grad
            needed = ctx.needs_input_grad[:2]
            _, gradients = _losses_and_gradients(
                hidden, weight, targets, needed, form=ctx.form, token_grads=token_grads
            )
        if ctx.summed:
            gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        typed = (
            None if gradient is None else gradient.to(value.dtype)
            for gradient, value in zip(gradients, (hidden, weight), strict=True)
        )
        return *typed, None, None


def _losses_and_gradients(
    hidden: Float[Tensor, "N C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, " N"],
    needed: tuple[bool, bool],
    *,
    form: ProductForm,
    token_grads: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], tuple[Tensor | None, Tensor | None]]:
    """Losses of all tokens, and the gradients of hidden states and weight where they are needed.

    Args:
        hidden, weight: of any float type.
        targets: int64.
        needed: whether the gradients of hidden and of weight are.
        form: in which hidden states and weight are multiplied.
        token_grads: g, the gradient of each token's loss; None for 1.
    """
    dtype = torch.promote_types(form.dtype, torch.float32)
    losses, into = torch.empty(len(hidden), dtype=dtype, device=hidden.device), gradient_form(form)
    if form.parts > 1:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    grad_hidden = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format) if needed[1] else None
    with multiplying(form, hidden.device):
        operand, left = CodebookOperand(weight, form), side_by_side(form, hidden, form.left)
        gradient_operand = operand if into == form else CodebookOperand(weight, into)
        gradients = GradientProducts(gradient_operand, grad_hidden, grad_weight)
        for rows, (logits,) in blocks.score_blocks(len(hidden), len(weight), losses):
            operand.multiply([left[rows]], [logits])  # (R, V), one block, never (N, V)
            tile_rows = blocks.rows_per_tile(logits)
            for start in range(rows.start, rows.stop, tile_rows):
                tokens = slice(start, min(start + tile_rows, rows.stop))
                tile = logits[tokens.start - rows.start : tokens.stop - rows.start]
                losses[tokens], total = _losses(tile, targets[tokens])
                if any(needed):
                    _differentiate(tile, total, targets[tokens], None if token_grads is None else token_grads[tokens])
            if any(needed):
                # The block holds ∂S now, and both products read it before the next block overwrites it.
                panels = gradient_operand.panels(len(logits))
                gradients.add(rows, hidden[rows], in_panels(into, logits, panels))
    return losses, (grad_hidden, grad_weight)


def _losses(
    logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, "R 1"]]:
    """Losses of a tile's rows and Σ_v exp(S − max S); logits ← exp(S − max S)."""
    top = logits.amax(1, keepdim=True)
    target_logits = logits.gather(1, targets[:, None]).sub_(top)  # (R, 1), read before the next line overwrites them
    total = logits.sub_(top).clamp_(min=blocks.lowest_exponent(logits.dtype)).exp_().sum(1, keepdim=True)
    return (total.log() - target_logits)[:, 0], total


def _differentiate(
    weights: Float[Tensor, "R V"],
    total: Float[Tensor, "R 1"],
    targets: Int[Tensor, " R"],
    token_grads: Float[Tensor, " R"] | None,
) -> None:
    """weights ← g (weights/total − onehot(target)); g = 1 for every token where `token_grads` is None."""
    grads = torch.ones_like(total) if token_grads is None else token_grads[:, None]
    weights.mul_(grads / total)
    # The one-hot matrix is one number per row.
    weights.scatter_(1, targets[:, None], weights.gather(1, targets[:, None]) - grads)
