# ruff: noqa: PLR0917 - a kernel is launched with its arguments in order
"""Kernels of LPIPS' comparison of two feature maps that lie channels-last: all channels of some pixels at once.

Features are read once per direction and nothing between them and the distance is written. Everything is float32.
"""

import triton
import triton.language as tl


@triton.jit
def _unit_vectors(features, place, inside):
    """Of a tile of features (pixels, channels) their lengths plus 10⁻¹⁰, and the features divided by them."""
    value = tl.load(features + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, 1)) + 1e-10
    return length, value / length[:, None]


@triton.jit(do_not_specialize=["pixels"])
def compare(x, y, weight, distances, channels, pixels, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Σ w·(x̂ − ŷ)² over the channels and pixels of a tile.

    Grid: (tiles of pixels, B). Results: (B, tiles).
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    _, left = _unit_vectors(x, place, inside)
    _, right = _unit_vectors(y, place, inside)
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    apart = left - right
    total = tl.sum(tl.sum(apart * apart * scale[None, :], 1))
    tl.store(distances + image * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit(do_not_specialize=["pixels"])
def compare_gradient(
    x, y, weight, slope, result, channels, pixels, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Gradient of an image's distance with respect to its y, times the image's `slope`.

    With u = 2w·(ŷ − x̂) and ŷ = y/(n + ε), n = ‖y‖:  u/(n + ε) − ŷ·(Σ u·ŷ)/n. Grid: (tiles of pixels, B).
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    _, left = _unit_vectors(x, place, inside)
    length, right = _unit_vectors(y, place, inside)
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    pull = (2.0 * tl.load(slope + image)) * scale[None, :] * (right - left)
    along = tl.sum(pull * right, 1) / tl.maximum(length - 1e-10, 1e-30)  # a vector of zeros has no direction
    gradient = pull / length[:, None] - right * along[:, None]
    tl.store(result + place, gradient.to(result.dtype.element_ty), mask=inside)
