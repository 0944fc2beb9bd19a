"""LPIPS' comparison of two feature maps: unit vectors over channels, their squared distance, weighted by channel.

On a CUDA device, where features lie channels-last, one kernel in each direction reads both maps and writes nothing
between (`lpips_kernels`). torch's operations write some ten maps, under autocast in float32, and keep half of them.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibqlab.base.kernels import kernels_run_on
from ibqlab.tokenizer.group_norm import KERNEL_TYPES, device_of, lies_channels_last, power_of_two

EPSILON = 1e-10
"""Added to a vector's length, as published."""
TILE = 4096
"""Numbers of one map that a program holds at once: 16 for each thread of 8 warps, in each of two maps."""
MOST_CHANNELS = 1024
"""Wider maps, which no LPIPS network has, would leave tiles of few pixels."""


def layer_distance(
    x: Float[Tensor, "B C h w"], y: Float[Tensor, "B C h w"], weight: Float[Tensor, "1 C 1 1"]
) -> Float[Tensor, "B 1"]:
    """mean_hw Σ_c w_c·(x̂_c − ŷ_c)², with x̂ = x/(‖x‖ + 10⁻¹⁰) over channels.

    Args:
        x, y: features of one layer.
        weight: of the channels, without a gradient.
    Returns:
        A distance per image; float32 from the kernels, whatever the features' type.
    Source: Zhang et al. 2018, eq. 1.
    """
    if _kernels_take(x, y):
        return _Distance.apply(x, y, weight)
    apart = torch.pow(_normalise(x) - _normalise(y), 2)
    return F.conv2d(apart, weight).mean((2, 3))


def _normalise(features: Tensor) -> Tensor:
    return features / (torch.sqrt(torch.sum(features**2, dim=1, keepdim=True)) + EPSILON)


def _kernels_take(x: Tensor, y: Tensor) -> bool:
    """Whether the kernels compute it; as for group normalisation, a compiler is shown torch's operations."""
    if torch.compiler.is_compiling() or x.dtype not in KERNEL_TYPES or x.dtype != y.dtype:
        return False
    if x.shape[1] > MOST_CHANNELS or not (lies_channels_last(x) and lies_channels_last(y)):
        return False
    return x.is_meta or kernels_run_on(x.device)


class _Distance(torch.autograd.Function):
    """The kernels; what they keep are the features, which the network keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, weight)
        if x.is_meta:
            return x.new_empty(len(x), 1, dtype=torch.float32)
        from ibqlab.losses.lpips_kernels import compare  # noqa: PLC0415 - imports Triton

        grid, constants, pixels = _tiling(x)
        parts = x.new_empty(grid[::-1], dtype=torch.float32)
        with device_of(x):
            compare[grid](x, y, weight, parts, x.shape[1], pixels, **constants)
        return parts.sum(1, keepdim=True) / pixels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, weight = ctx.saved_tensors
        of_x, of_y, _ = ctx.needs_input_grad
        # The distance is the same from either side.
        return (
            _gradient(y, x, weight, gradient) if of_x else None,
            _gradient(x, y, weight, gradient) if of_y else None,
            None,
        )


def _gradient(x: Tensor, y: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Of the distances with respect to y."""
    result = torch.empty_like(y)
    if y.is_meta:
        return result
    from ibqlab.losses.lpips_kernels import compare_gradient  # noqa: PLC0415 - imports Triton

    grid, constants, pixels = _tiling(x)
    slope = (gradient.flatten() / pixels).float().contiguous()
    with device_of(x):
        compare_gradient[grid](x, y, weight, slope, result, x.shape[1], pixels, **constants)
    return result


def _tiling(x: Tensor) -> tuple[tuple[int, int], dict[str, int], int]:
    """Grid, constants of the kernels, and pixels of a map."""
    wide, pixels = power_of_two(x.shape[1]), x[0, 0].numel()
    tall = max(TILE // wide, 1)
    return (-(-pixels // tall), len(x)), {"BLOCK_PIXELS": tall, "BLOCK_CHANNELS": wide, "num_warps": 8}, pixels
