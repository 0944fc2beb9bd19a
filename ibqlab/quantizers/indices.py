"""Indices as people have them – tensors of any integer type, NumPy arrays, lists – as int64 tensors, checked."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ibqlab.base.checks import require_memory


def to_indices(values: Any, name: str = "indices", device: torch.device | None = None) -> Int[Tensor, "*grid"]:
    """Whole numbers of any integer type as an int64 tensor.

    Args:
        values: a tensor, a NumPy array, a number, or a list of numbers, lists, arrays or tensors of one shape.
        name: what they are, for the message.
        device: where arrays and lists go; tensors stay where they are.
    Raises:
        ValueError: no whole numbers, lists of unequal length, or numbers beyond 63 bits.
    """
    if not isinstance(values, Tensor):
        values = _tensor_of(values, name).to(device)
    if values.layout != torch.strided:
        raise ValueError(f"{name} must be a plain tensor; got {values.layout}. Use {name}.to_dense()")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers; got {values.dtype}. Use {name}.long().")
    if values.dtype == torch.uint64 and values.numel() and bool((values.view(torch.int64) < 0).any()):
        raise ValueError(f"{name} must be below 2^63, the largest that an int64 holds; got a larger one.")
    return values.long()


def indices_in_memory(values: Any, name: str = "indices") -> Int[Tensor, "*grid"]:
    """As `to_indices`, for those who look at the numbers: a tensor on "meta" has none."""
    indices = to_indices(values, name, torch.device("cpu"))
    if indices.is_meta:
        raise ValueError(f"{name} must have their numbers in memory; got a tensor on meta, which has a shape alone")
    if indices.untyped_storage().nbytes() < indices.nbytes:
        # A view that repeats its numbers becomes a full copy before they are counted.
        require_memory(indices.nbytes, f"{name} of shape {tuple(indices.shape)}", "give fewer")
    return indices


def check_range(name: str, indices: Int[Tensor, "*grid"], size: int, remark: str = "") -> None:
    """Raise ValueError unless all indices lie in 0 to size − 1. Waits once for the device."""
    if indices.numel() and (bounds := value_bounds(indices)) and not 0 <= bounds[0] <= bounds[1] < size:
        raise ValueError(
            f"{name} must lie in 0 … {size - 1}{remark}, got {bounds[0]} … {bounds[1]}; were they made by another "
            "tokenizer?"
        )


def value_bounds(*tensors: Int[Tensor, "..."]) -> list[int] | None:
    """Lowest and highest number of each tensor, one after the other. Waits once for the device, for all of them.

    None for tensors without values, such as those of a cost calculation.
    """
    if any(type(values) is not Tensor or values.is_meta for values in tensors):
        return None
    return torch.stack([bound for values in tensors for bound in values.aminmax()]).tolist()


def _tensor_of(values: Any, name: str) -> Tensor:
    try:
        if isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values):
            return torch.stack([to_indices(value, name) for value in values])
        array = np.asarray(values)
        if array.dtype == object or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ValueError(f"an array of {array.dtype}")
        if not array.size and isinstance(values, list | tuple):
            return torch.zeros(array.shape, dtype=torch.int64)
        # torch takes arrays of this machine's byte order that may be written to.
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name} must be whole numbers in a tensor, an array, or lists of equal length; got "
            f"{type(values).__name__} ({str(error).splitlines()[0][:120]}). Use torch.as_tensor({name})."
        ) from None
