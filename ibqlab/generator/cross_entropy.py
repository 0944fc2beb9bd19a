"""Cross-entropy of a linear head without the N × V logits: exact value and gradient, a block of rows at a time.

The written-out form keeps logits, their softmax and their gradient, N × V numbers each. Here a block of logits becomes
its own gradient in place as soon as its losses are read off, and is multiplied into the gradients of hidden states and
weight in the same pass: three matrix products, the floor, and nothing is computed again in the backward pass.

From 2.13 on PyTorch has a form by blocks, `torch.nn.functional.linear_cross_entropy` with options. It is not used:
with this form's blocks it is as fast, with those it chooses itself slower than the written-out form, and it gives half
types a loss of half type (experiments/results/cross_entropy/report.md, on a CPU).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibqlab.quantizers.blocks import add_product, full_precision, product, row_blocks, rows_per_tile, workspace
from ibqlab.quantizers.compilation import never_compiled
from ibqlab.quantizers.index_backprop_rows import lowest_exponent
from ibqlab.quantizers.vectors import FLOATS

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
) -> Float[Tensor, ""] | Float[Tensor, " *tokens"]:
    """How badly a linear head without bias predicts the targets: cross_entropy(linear(hidden, weight), targets).

        S = h·Wᵀ,  L_n = ln Σ_v exp(S_nv) − S_n,target(n)

    In nats: 0 for certain and right, ln V for no idea at all. A token whose hidden state holds NaN or infinity has a
    loss of NaN, as in the written-out form.

    Args:
        hidden: h, (N, C) or (B, T, C), any scale, any strides.
        weight: W, on the same device. On CUDA two inputs of one half type, and any but float64 under autocast, are
            multiplied in that type with float32 sums, and float16's gradients in bfloat16; every other pair is
            computed in float32 (without TF32), or in float64 where an input is.
        targets: the right tokens, 0 to V − 1, (N,) or (B, T). No index is ignored: leave tokens without a target out.
        reduction: "mean" or "sum" over tokens, or "none".
    Returns:
        float32, or float64 where an input is: a scalar, or for "none" one loss per token in the shape of `targets`.
    Raises:
        ValueError: shapes, devices, types, targets or a reduction that do not fit; the message says which.
    Cost: 6·N·V·C operations forward and backward together, all in the forward pass; "none" and a second backward pass
        through the same loss compute the logits again: 8·N·V·C. Memory: both gradients in float32, a copy of each
        input that is not yet of the type multiplied in, and one block of `blocks.BLOCK_BYTES`, or of 128 rows where
        that is larger. Waits once for the device, to check the targets. Measured: experiments/results/cross_entropy.
    Source: gradients of a loss in its forward pass as in Liger Kernel (arXiv 2410.10989, §3.2).
    """
    _check(hidden, weight, targets, reduction)
    if not torch.is_grad_enabled():
        # An autograd function is told which inputs want gradients, whether or not gradients are taken at all.
        hidden, weight = hidden.detach(), weight.detach()
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = _LinearCrossEntropy.apply(rows, weight, targets.reshape(-1).long(), reduction != "none")
    if reduction == "none":
        return loss.view(targets.shape)
    return loss / targets.numel() if reduction == "mean" else loss


def _operand_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which hidden states and weight are multiplied."""
    exact = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if not hidden.is_cuda:
        return exact
    if torch.is_autocast_enabled("cuda") and exact == torch.float32:
        return torch.get_autocast_dtype("cuda")
    return hidden.dtype if hidden.dtype == weight.dtype else exact


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            got = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a plain tensor; got {got}. Use torch.as_tensor({name})")
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
    # A plan's tensors have no values to check.
    if type(targets) is Tensor and not targets.is_meta:
        lowest, highest = torch.stack(targets.aminmax()).tolist()
        if lowest < 0 or highest >= len(weight):
            raise ValueError(
                f"targets must lie in 0 to V − 1 = {len(weight) - 1}, got {lowest} to {highest}; leave tokens without "
                "a target out: keep = targets >= 0, then hidden[keep] and targets[keep]"
            )


class _LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(S) and g = ∂L/∂L_n: ∂S = g (p − onehot(target)), ∂h = ∂S·W, ∂W = ∂Sᵀ·h.

    Summed, g is one number for all tokens, so the forward pass computes both gradients for g = 1 and the backward pass
    scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, summed: bool) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.dtype, ctx.summed = _operand_type(hidden, weight), summed
        wanted = ctx.needs_input_grad[:2] if summed else (False, False)
        losses, ctx.ahead = _go_through_blocks(hidden.to(ctx.dtype), weight.to(ctx.dtype), targets, wanted)
        return losses.sum() if summed else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        # Scaled in place, hence good for one backward pass; another one computes them again.
        gradients, ctx.ahead = ctx.ahead, (None, None)
        if gradients == (None, None):
            operands = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            pull = None if ctx.summed else grad
            _, gradients = _go_through_blocks(*operands, targets, ctx.needs_input_grad[:2], pull)
        if ctx.summed:
            gradients = [None if gradient is None else gradient.mul_(grad) for gradient in gradients]
        typed = (
            None if gradient is None else gradient.to(value.dtype)
            for gradient, value in zip(gradients, (hidden, weight), strict=True)
        )
        return *typed, None, None


def _go_through_blocks(
    hidden: Float[Tensor, "N C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, " N"],
    wanted: tuple[bool, bool],
    pull: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, " N"], tuple[Tensor | None, Tensor | None]]:
    """Losses of all tokens, and the gradients of hidden states and weight where wanted.

    Args:
        hidden, weight: in the type in which they are multiplied.
        targets: int64.
        wanted: whether the gradients of hidden and of weight are.
        pull: g, the gradient of each token's loss; None for 1.
    """
    losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    # float16 would lose gradients below 6·10⁻⁸.
    into = torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype
    operands = hidden.to(into), weight.to(into)
    grad_hidden = torch.empty_like(hidden, dtype=losses.dtype) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=losses.dtype) if wanted[1] else None
    parts = row_blocks(len(hidden), len(weight), losses)
    (buffer,) = workspace(1, parts[0].stop, len(weight), losses)
    with full_precision(hidden.device):
        for part in parts:
            scores = product(hidden[part], weight.T, buffer[: part.stop - part.start])
            # Only a CPU has a cache that a tile fits and a block does not.
            rows = rows_per_tile(scores) if scores.device.type == "cpu" else len(scores)
            for start in range(part.start, part.stop, rows):
                tile = slice(start, min(start + rows, part.stop))
                inside = scores[tile.start - part.start : tile.stop - part.start]
                losses[tile], total = _losses(inside, targets[tile])
                if any(wanted):
                    _differentiate(inside, total, targets[tile], None if pull is None else pull[tile])
            change = scores.to(into) if any(wanted) else scores
            if grad_hidden is not None:
                product(change, operands[1], grad_hidden[part])
            if grad_weight is not None:
                add_product(grad_weight, change.T, operands[0][part])
    return losses, (grad_hidden, grad_weight)


def _losses(scores: Float[Tensor, "R V"], targets: Int[Tensor, " R"]) -> tuple[Tensor, Tensor]:
    """Losses (R,) of a tile's rows and Σ_v exp(S − max S) (R, 1); scores ← exp(S − max S)."""
    top = scores.amax(1, keepdim=True)
    chosen = scores.gather(1, targets[:, None]).sub_(top)
    total = scores.sub_(top).clamp_(min=lowest_exponent(scores.dtype)).exp_().sum(1, keepdim=True)
    return (total.log() - chosen)[:, 0], total


def _differentiate(weights: Tensor, total: Tensor, targets: Tensor, pull: Tensor | None) -> None:
    """weights ← g (weights/total − onehot(target)); a token's loss has the gradient g = 1 where `pull` is None."""
    pull = torch.ones_like(total) if pull is None else pull[:, None]
    weights.mul_(pull / total)
    weights.scatter_(1, targets[:, None], weights.gather(1, targets[:, None]) - pull)
