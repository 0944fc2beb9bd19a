"""PSNR and SSIM as published: both pictures cut to 8 bits, one value per image.

What is unusual: the published evaluation of IBQ truncates instead of rounding, and it does so to the original as well.
A picture that went to [−1, 1] and back then loses one grey level on 95 of the 256 levels. Both sides lose alike, so the
numbers hardly move; they are only comparable when cut in the same way. Other systems cut in other ways (`ROUNDINGS`).
"""

import math

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from ibqlab.base.checks import require, require_choice
from ibqlab.data.pixels import to_uint8
from ibqlab.metrics.weights import import_metric_package

ROUNDINGS = {
    "none": "not rounded, float in [0, 1]",
    "truncated": "to 8 bits by truncation",
    "truncated_unit": "to 8 bits by truncation within [0, 1], where images of 8 bits keep their levels",
    "rounded": "to 8 bits by rounding",
    "half_up": "to 8 bits by rounding, halves up",
}
"""How a float picture becomes what a metric sees, in words."""

LEVEL_TOLERANCE = 1e-4
"""Grey levels by which a value may lie below a level and still have it: the way to [−1, 1] and back costs 10⁻⁵."""

WINDOW = 7
"""SSIM's window, pixels."""


def published_range(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [−1, 1] exactly as the published loader computes them: u / 127.5 − 1 in float64, stored as float32.

    Differs from `ibqlab.data.to_model_range`, computed in float32, by rounding only, but truncation later turns that
    into grey levels.
    """
    return (images.double() / 127.5 - 1).float()


def truncate_to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """A picture cut to 8 bits as the published evaluation and sampling scripts do: ⌊255 · (x + 1) / 2⌋.

    Args:
        images: nominally in [−1, 1]; clamped to it.
    Returns:
        uint8, same shape and device.
    Raises:
        ValueError: NaN, or no floats: pixels of 0 to 255 would all be clamped to white.
    Source: published evaluation and sampling code of IBQ; taming-transformers.
    """
    _check_picture(images)
    return ((images.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def truncate_unit_to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """A picture cut to 8 bits as code does whose pictures lie in [0, 1]: ⌊255 · u⌋ of u = (x + 1) / 2.

    A picture of 8 bits keeps its levels, which `truncate_to_uint8` lowers in part. Arguments, what comes back and
    errors are those of `truncate_to_uint8`.

    Source: published evaluation code of MaskBit; fact sheet of the peers §6.
    """
    _check_picture(images)
    levels = (images.float().clamp(-1, 1).double() + 1) / 2 * 255
    return (levels + LEVEL_TOLERANCE).to(torch.uint8)


def round_half_up_to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """A picture rounded to 8 bits as LlamaGen does: ⌊127.5 · x + 128⌋, at most 255.

    Arguments, what comes back and errors are those of `truncate_to_uint8`.

    Source: published evaluation code of LlamaGen; fact sheet of the peers §3.1.
    """
    _check_picture(images)
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def _check_picture(images: Tensor) -> None:
    require(
        isinstance(images, Tensor)
        and images.is_floating_point()
        and images.layout == torch.strided
        and not images.is_meta,
        f"images must be a plain tensor of floats in [−1, 1]; got {_kind(images)}. uint8 needs no cutting",
    )
    require(not torch.isnan(images).any(), "a picture needs numbers; got NaN. Look at the model that made it")


_CUT = {
    "truncated": truncate_to_uint8,
    "truncated_unit": truncate_unit_to_uint8,
    "rounded": to_uint8,
    "half_up": round_half_up_to_uint8,
}
"""The functions of `ROUNDINGS`."""


def to_unit_range(images: Float[Tensor, "*shape"], rounding: str) -> Float[Tensor, "*shape"]:
    """A picture in [−1, 1] as values in [0, 1], rounded as a protocol wants it.

    Args:
        images: float, nominally in [−1, 1]; clamped to it.
        rounding: one of `ROUNDINGS`.
    Raises:
        ValueError: unknown rounding.
    """
    require_choice("rounding", rounding, ROUNDINGS)
    if rounding == "none":
        return (images.float().clamp(-1, 1) + 1) / 2
    return _CUT[rounding](images).float() / 255


def psnr(x: Shaped[Tensor, "B C H W"], y: Shaped[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each pair, 10·log10(1 / mean (x − y)²), in dB.

    Published tokenizers reach 19 to 24 dB; 1 dB is 12 % of the root mean squared error. Equal pictures: infinity.

    Args:
        x, y: uint8, or float in [0, 1]; the order does not matter.
    Returns:
        float64, one per image. Mean over images in our tables; the published script takes the mean over batches of
        their means, which is the same when all batches have one size.
    Raises:
        ValueError: different or wrong shapes, or values outside [0, 1].
    """
    x, y = _pair(x, y, smallest=1)
    # Not torchmetrics, whose constants are of the process's default type and on its default device.
    return -10 * (x - y).square().mean((1, 2, 3)).log10()


def ssim(x: Shaped[Tensor, "B C H W"], y: Shaped[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Structural similarity of each pair, −1 to 1; 1: equal. Window 7 × 7, uniform; sample covariance; range 1.

    Equals scikit-image's default, which the published evaluation uses, mean over the channels. torchmetrics divides
    covariances by n = 49 where scikit-image divides by n − 1; the ratio 48/49 cancels from the formula when it is
    moved into the constant C2 = (0.03·range)². Both leave out the border of 3 pixels, torchmetrics once it is cropped.

    Args:
        x, y: uint8, or float in [0, 1], at least 7 × 7 pixels; the order does not matter.
    Returns:
        float64, one per image.
    Raises:
        ValueError: different or wrong shapes, pictures too small, or values outside [0, 1].
    Source: Wang et al. 2004; published evaluation code.
    """
    functional = import_metric_package("torchmetrics.functional.image")
    x, y = _pair(x, y, smallest=WINDOW)
    pixels, border = WINDOW**2, WINDOW // 2
    _, at_pixels = functional.structural_similarity_index_measure(
        x,
        y,
        gaussian_kernel=False,
        kernel_size=WINDOW,
        data_range=1.0,
        k2=0.03 * math.sqrt((pixels - 1) / pixels),
        return_full_image=True,
        reduction="none",
    )
    return at_pixels[..., border:-border, border:-border].mean((1, 2, 3))


def _pair(x: Tensor, y: Tensor, smallest: int) -> tuple[Tensor, Tensor]:
    """Both pictures in float64 by way of float32, as the published evaluation divides by 255."""
    require(
        isinstance(x, Tensor) and isinstance(y, Tensor) and not x.is_meta and not y.is_meta,
        f"two batches of pixels are compared, tensors with their numbers in memory; got {_kind(x)} and {_kind(y)}",
    )
    require(
        x.shape == y.shape and x.ndim == 4 and x.numel() > 0,
        f"two batches (B, C, H, W) of one shape are compared; got {tuple(x.shape)} and {tuple(y.shape)}",
    )
    require(
        min(x.shape[2:]) >= smallest,
        f"SSIM needs images of at least {WINDOW} × {WINDOW} pixels; got {x.shape[2]} × {x.shape[3]}. Leave 'ssim' out",
    )
    return _values(x), _values(y)


def _kind(value: object) -> str:
    return (
        f"a {value.layout} tensor of {value.dtype} on {value.device}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )


def _values(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return (images.float() / 255).double()
    require(not images.is_complex(), f"images must be uint8, or float in [0, 1]; got {images.dtype}")
    require(
        images.is_floating_point() and float(images.min()) >= 0 and float(images.max()) <= 1,
        f"images must be uint8, or float in [0, 1]; got {images.dtype}, {float(images.min()):.4g} to "
        f"{float(images.max()):.4g}. Use truncate_to_uint8(images) for [−1, 1]",
    )
    return images.double()
