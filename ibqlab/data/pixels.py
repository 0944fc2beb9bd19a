"""Between stored pixels (uint8, 0 to 255) and the model's range (float32, −1 to 1)."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_model_range(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels as the model sees them: x / 127.5 − 1.

    Args:
        images: uint8, 0 to 255, any shape and device.
    Returns:
        float32 in [−1, 1], same shape and device.
    Raises:
        ValueError: the images are not uint8.
    Source: published IBQ data pipeline.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"stored pixels must be uint8, 0 to 255; got {images.dtype}. Float images need no conversion.")
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The model's output as a picture: clamped to [−1, 1] and rounded to the nearest of 256 levels.

    Args:
        images: float, nominally in [−1, 1]; a decoder's output may lie outside.
    Returns:
        uint8, 0 to 255, same shape and device; undoes `to_model_range` exactly.
    Raises:
        ValueError: NaN, which has no colour.
    """
    if torch.isnan(images).any():
        raise ValueError(
            "a picture needs numbers; got NaN. The weights or the input of the model that made it hold NaN."
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
