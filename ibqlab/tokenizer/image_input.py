"""Images as people have them – PIL images, uint8 arrays, tensors of any type – as float tensors in [−1, 1], checked."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ibqlab.base.checks import require
from ibqlab.data.pixels import to_model_range

Images = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]
"""What `Tokenizer.encode` takes; see `prepare_images`."""

ValueRange = tuple[float, float]
"""Lowest and highest value of float images."""
RANGE_TOLERANCE = 1e-3
"""Share of half the range by which values may leave it."""


def prepare_images(
    images: Images, channels: int = 3, value_range: ValueRange | None = None
) -> Float[Tensor, "B C H W"]:
    """Pictures of any usual kind as a float tensor in [−1, 1].

    Args:
        images: one of
            a PIL image, or a list of them of equal size (converted to RGB);
            a uint8 array (H, W, 3) or (B, H, W, 3), as NumPy and matplotlib hold pictures;
            a uint8 tensor (B, 3, H, W), 0 to 255;
            a float tensor (B, 3, H, W) within [−1, 1], which is returned as it is, or within `value_range`.
        channels: that the model takes; pictures have 3.
        value_range: lowest and highest value that a float tensor may have, such as (0, 1). Unless given it is (−1, 1),
            and a tensor without a value below 0 is asked about, because it fits (0, 1) as well.
    Returns:
        (B, C, H, W), float32 unless a float tensor of another type came in.
    Raises:
        ValueError: another shape or type, values outside the range by more than 0.001 of its half, or NaN; a range that
            is not told and cannot be seen; the message says what to type.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        images = _stack_pictures(images)
    if isinstance(images, np.ndarray):
        images = _array_to_tensor(images)
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor, a uint8 array, or PIL images; got {type(images).__name__}.")
    _check_shape(images, channels)
    if images.dtype == torch.uint8:
        require(value_range is None, "value_range is of float images; uint8 is 0 to 255. Leave value_range out.")
        return to_model_range(images)
    return _in_model_range(images, value_range)


def _stack_pictures(pictures: Sequence[Image.Image]) -> np.ndarray:
    kinds = {type(picture).__name__ for picture in pictures if not isinstance(picture, Image.Image)}
    if kinds or not pictures:
        content = f"a list with {', '.join(sorted(kinds))}" if kinds else "an empty list"
        raise ValueError(f"a list of images must hold PIL images; got {content}. Use torch.stack(…) for tensors.")
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(
            f"images of one batch must have one size; got (width, height) {', '.join(map(str, sizes[:4]))}. "
            "Resize them, or encode them one by one."
        )
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def _array_to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(
            f"an array of images must be uint8, 0 to 255; got {array.dtype}. For floats in [−1, 1] use "
            "torch.from_numpy(images).permute(0, 3, 1, 2)."
        )
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(
            f"an array of images must be (H, W, 3) or (B, H, W, 3); got {array.shape}. "
            "Use np.moveaxis(images, -3, -1) if channels come first."
        )
    return torch.from_numpy(np.array(array[None] if array.ndim == 3 else array)).permute(0, 3, 1, 2)


def _check_shape(images: Tensor, channels: int) -> None:
    if images.ndim == 4 and images.shape[1] == channels and images.numel():
        return
    if images.ndim == 3 and images.shape[0] == channels:
        remedy = "Use images[None] for a single image."
    elif images.ndim == 4 and images.shape[-1] == channels:
        remedy = "Use images.permute(0, 3, 1, 2), because channels come second."
    else:
        remedy = f"Give at least one image, with {channels} channels."
    raise ValueError(f"images must be (B, {channels}, H, W); got {tuple(images.shape)}. {remedy}")


def _in_model_range(images: Tensor, value_range: ValueRange | None) -> Tensor:
    """Float images in [−1, 1], checked."""
    if not images.is_floating_point():
        raise ValueError(
            f"images must be uint8 (0 to 255) or float (−1 to 1); got {images.dtype}. Use images.to(torch.uint8)."
        )
    # One pass over the pixels and one wait for the device; NaN comes out as both bounds.
    low, high = (bound.item() for bound in images.detach().aminmax())
    require(not np.isnan(low), "images must be numbers; got NaN. Find it with torch.isnan(images).nonzero().")
    pair = tuple(value_range or (-1, 1))
    require(
        len(pair) == 2 and bool(np.isfinite(pair).all()) and pair[0] < pair[1],
        f"value_range must be two numbers, the lower first, such as (0, 1); got {value_range}.",
    )
    first, last = pair
    slack = RANGE_TOLERANCE * (last - first) / 2
    if low < first - slack or high > last + slack:
        raise ValueError(
            f"float images must lie in [{first:g}, {last:g}]; got {low:.4g} to {high:.4g}. ".replace("-", "−", 1)
            + "Use value_range=(0, 255) or value_range=(0, 1) for values in such a range."
        )
    # Read as [−1, 1], an image in [0, 1] would be a pale one, and every token of it a different one, without an error.
    if value_range is None and low >= 0:
        raise ValueError(
            f"float images without a value below 0 (got {low:.4g} to {high:.4g}) fit both [0, 1] and [−1, 1]; say "
            "which: value_range=(0, 1), or value_range=(-1, 1) for bright images in [−1, 1]."
        )
    if (first, last) == (-1, 1):
        return images
    return (images - first) * (2 / (last - first)) - 1
