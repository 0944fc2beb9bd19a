"""The number type that a generator is sampled in."""

import torch

from ibqlab.base.checks import require, require_choice
from ibqlab.base.kernels import has_bfloat16

AUTO = "auto"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""By the name that settings have."""
DTYPE_NAMES = (AUTO, *TYPES)


def sampling_dtype(dtype: torch.dtype | str | None, weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which tokens are drawn.

    Args:
        dtype: a type or its name; None or "auto" is bfloat16 for float32 weights on a CUDA device that multiplies it,
            and the weights' own type everywhere else.
        weights: type of the generator's weights.
        device: that they are on.
    Raises:
        ValueError: another type, or bfloat16 on a CUDA device that only emulates it.
    """
    if dtype in (None, AUTO):
        return torch.bfloat16 if weights == torch.float32 and has_bfloat16(device) else weights
    name = str(dtype).removeprefix("torch.")
    require_choice("dtype", name, DTYPE_NAMES)
    require(
        name != "bfloat16" or device.type != "cuda" or has_bfloat16(device),
        f"dtype bfloat16 needs a card from A100 on, and {device} only emulates it, slower than float32. Use "
        'dtype="float16" or dtype="float32".',
    )
    return TYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As settings have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
