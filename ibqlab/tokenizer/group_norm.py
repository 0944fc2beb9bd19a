"""Group normalisation with or without a swish behind it, as encoders and decoders use it.

On a CUDA device, where activations lie with the channels of a pixel side by side, kernels of our own read and write
them so and in their own type (`group_norm_kernels`): torch's group norm would turn them around and back, and under
autocast copy them to float32 and back. Elsewhere these are torch's operations, in the published order. What a kernel
computes is float32 whatever the activations' type; only its result is rounded. The gradient has no gradient of its own.

For the backward pass the kernels keep their input and two numbers per group. In bf16-mixed that is 2 bytes per
activation beside the 2 that the next convolution keeps; torch's operations keep 8 beside them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibqlab.base.kernels import kernels_run_on

MOST_CHUNKS = 128
"""Parts of an image whose sums are taken apart: enough programs for every processor of a GPU at 16 images, and few
enough that adding up the parts costs nothing."""
TILE = 4096
"""Numbers that a program holds at once: 16 for each thread of 8 warps, so that reads are wide and nothing spills."""
WIDEST_TILE = 128
"""Channels of a tile: 256 bytes in a row of bfloat16, which fills the memory's transactions."""
WARPS = 8
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def normalise(
    norm: nn.GroupNorm, x: Float[Tensor, "B C H W"], *, swish: bool
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """swish(norm(x)) or norm(x), and x itself for the skip connection around what is done with the first.

    Whoever adds x to something later should take it from here: the gradient of that sum and that of the norm then meet
    in the norm's last kernel instead of in an addition of their own.

    Args:
        norm: with learned scales and shifts.
        x: activations. On CUDA in channels-last order the result is in autocast's type, where that is on.
        swish: multiply the normalised value by its sigmoid.
    """
    if _kernels_take(x):
        return _GroupNorm.apply(x, norm.weight, norm.bias, _Settings(norm.num_groups, norm.eps, swish, _result_type(x)))
    normed = norm(x)
    return F.silu(normed) if swish else normed, x


def normalise_per_image(
    x: Float[Tensor, "B C H W"], scale: Float[Tensor, "B C"], shift: Float[Tensor, "B C"], groups: int, epsilon: float
) -> Float[Tensor, "B C H W"]:
    """scale ⊙ GroupNorm(x) + shift, with scales and shifts of each image.

    Args:
        x: activations. On CUDA in channels-last order the result is in autocast's type, where that is on; torch's
            operations give float32 there.
        scale, shift: of each image's channels.
        groups: of channels.
        epsilon: added to the variance.
    """
    if _kernels_take(x):
        return _GroupNorm.apply(x, scale, shift, _Settings(groups, epsilon, False, _result_type(x)))[0]
    return scale[:, :, None, None] * F.group_norm(x, groups, eps=epsilon) + shift[:, :, None, None]


def lies_channels_last(x: Float[Tensor, "B C H W"]) -> bool:
    """Whether a pixel's channels lie side by side in memory, and not also as if they did not."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _kernels_take(x: Tensor) -> bool:
    """Whether the kernels compute it.

    A compiler is shown torch's operations, which it fuses itself. Tensors without contents stand for a GPU's: costs are
    counted with them.
    """
    if torch.compiler.is_compiling() or x.dtype not in KERNEL_TYPES or not lies_channels_last(x):
        return False
    return x.is_meta or kernels_run_on(x.device)


def _result_type(x: Tensor) -> torch.dtype:
    """Autocast's type where it is on: the convolution behind the norm would round to it."""
    kind = "cpu" if x.is_meta else x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Settings(NamedTuple):
    """What a norm does beside its scales and shifts."""

    groups: int
    epsilon: float
    swish: bool
    dtype: torch.dtype
    """Of the result."""


class _Tiling(NamedTuple):
    """How an image's numbers are shared out over programs."""

    grid: tuple[int, int, int]
    """Chunks, tiles of channels, images."""
    chunk: int
    """Pixels of a chunk; the last one may have fewer."""
    constants: dict[str, int]
    """Of the kernels that walk over pixels."""

    @classmethod
    def of(cls, x: Tensor) -> "_Tiling":
        batch, channels, height, width = x.shape
        wide = min(max(power_of_two(channels), 32), WIDEST_TILE)
        tall = TILE // wide
        chunk = tall * -(-height * width // (tall * MOST_CHUNKS))
        grid = (-(-height * width // chunk), -(-channels // wide), batch)
        return cls(grid, chunk, {"BLOCK_PIXELS": tall, "BLOCK_CHANNELS": wide, "num_warps": WARPS})


class _GroupNorm(torch.autograd.Function):
    """The kernels, forward and backward. Gives back its input, too, so that both gradients arrive together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
        mean, deviation = (x.new_empty(len(x), settings.groups, dtype=torch.float32) for _ in range(2))
        normed = torch.empty_like(x, dtype=settings.dtype)
        if not x.is_meta:
            _forward(x, (mean, deviation, weight, bias), normed, settings)
        ctx.save_for_backward(x, mean, deviation, weight, bias)
        ctx.swish = settings.swish
        ctx.set_materialize_grads(False)
        return normed, x

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor | None, skip: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if gradient is None:
            return skip, None, None, None
        x, *parameters = ctx.saved_tensors
        weight = parameters[2]
        gradient, skip = (
            value if value is None else value.contiguous(memory_format=torch.channels_last)
            for value in (gradient, skip)
        )
        result = torch.empty_like(x)
        # Two sums per image and channel: the gradients of shift and scale.
        sums = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
        if not x.is_meta:
            _backward(x, parameters, (gradient, skip), (sums, result), ctx.swish)
        shift, scale = (sums if weight.ndim == 2 else sums.sum(1)).to(weight.dtype)
        return result, scale, shift, None


def _forward(x: Tensor, parameters: Sequence[Tensor], normed: Tensor, settings: _Settings) -> None:
    """Fill mean and 1/deviation per group, and the normalised activations.

    Args:
        x: activations.
        parameters: mean and 1/deviation (B, groups), to be filled; scale and shift, (C,) or (B, C).
        normed: to be filled.
        settings: of the norm.
    """
    from ibqlab.tokenizer import group_norm_kernels as kernels  # noqa: PLC0415 - imports Triton

    mean, deviation, weight, _ = parameters
    tiling, channels, pixels, width = _Tiling.of(x), x.shape[1], x[0, 0].numel(), x.shape[1] // settings.groups
    chunks = tiling.grid[0]
    moments = x.new_empty(2, len(x), chunks, channels, dtype=torch.float32)
    with device_of(x):
        kernels.channel_moments[tiling.grid](x, *moments, channels, pixels, tiling.chunk, chunks, **tiling.constants)
        kernels.group_moments[mean.shape[::-1]](
            *(*moments, mean, deviation, channels, pixels, tiling.chunk, chunks, settings.epsilon),
            **_group_constants(width),
        )
        kernels.apply_norm[tiling.grid](
            *(x, *parameters, normed, channels, _stride(weight), pixels, tiling.chunk, width),
            SWISH=settings.swish,
            **tiling.constants,
        )


def _backward(
    x: Tensor,
    parameters: Sequence[Tensor],
    gradients: tuple[Tensor, Tensor | None],
    results: tuple[Tensor, Tensor],
    swish: bool,
) -> None:
    """Fill the gradients.

    Args:
        x: activations.
        parameters: mean and 1/deviation (B, groups); scale and shift, (C,) or (B, C).
        gradients: of the result, and of what goes around the norm.
        results: gradients of shift and scale per image (2, B, C), and of x.
        swish: whether one follows the norm.
    """
    from ibqlab.tokenizer import group_norm_kernels as kernels  # noqa: PLC0415 - imports Triton

    mean, _, weight, _ = parameters
    gradient, skip = gradients
    sums, result = results
    tiling, channels, pixels, width = _Tiling.of(x), x.shape[1], x[0, 0].numel(), x.shape[1] // mean.shape[1]
    chunks = tiling.grid[0]
    parts = x.new_empty(2, len(x), chunks, channels, dtype=torch.float32)
    of_groups = x.new_empty(2, *mean.shape, dtype=torch.float32)
    sizes = (channels, _stride(weight), pixels, tiling.chunk)
    with device_of(x):
        kernels.channel_sums[tiling.grid](
            *(x, gradient, *parameters, *parts, *sizes, chunks, width), SWISH=swish, **tiling.constants
        )
        kernels.group_sums[mean.shape[::-1]](
            *(*parts, weight, *sums, *of_groups, channels, _stride(weight), chunks), **_group_constants(width)
        )
        kernels.input_gradient[tiling.grid](
            # Without a skip connection any pointer does: it is not read.
            *(x, gradient, gradient if skip is None else skip, *parameters, *of_groups, result, *sizes, width),
            SWISH=swish,
            HAS_SKIP=skip is not None,
            **tiling.constants,
        )


def _group_constants(width: int) -> dict[str, int]:
    """Of the kernels that put a group's channels together, a program per group."""
    wide = power_of_two(width)
    return {"WIDTH": width, "BLOCK_WIDTH": wide, "BLOCK_CHUNKS": max(512 // wide, 1), "num_warps": 4}


def _stride(weight: Tensor) -> int:
    """From one image's weights to the next one's: 0 where they are all images'."""
    return weight.shape[1] if weight.ndim == 2 else 0


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least a number."""
    return 1 << (number - 1).bit_length()


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes a tensor's card the current one, which is where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
