"""Vectors as people have them – tensors of any float type, NumPy arrays, lists – as float tensors, checked."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def to_vectors(values: Any, name: str) -> Float[Tensor, "rows D"]:
    """Codes or features as a tensor of floats.

    Args:
        values: a tensor, a NumPy array of any byte order and strides, such as a snapshot holds, or lists of one length.
        name: what they are, for the message.
    Returns:
        A tensor where it is, in its own type; arrays and lists on the CPU.
    Raises:
        ValueError: no floats, not (rows, D) with at least one number per row, or a tensor without numbers in memory.
    """
    tensor = to_tensor(values, name)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating-point numbers; got {tensor.dtype}. Use {name}.float()")
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(
            f"{name} must be (rows, D), one vector per row; got {tuple(tensor.shape)}. Features (B, D, h, w) become "
            "rows by .permute(0, 2, 3, 1).reshape(-1, D)"
        )
    return tensor


def to_tensor(values: Any, name: str, kinds: str = "f") -> Tensor:
    """Numbers as people have them as a tensor with its numbers in memory, of any shape.

    Args:
        values: a tensor, an array, or lists of one length.
        name: what they are, for the message.
        kinds: NumPy's letters of the kinds of numbers that arrays and lists may hold; a tensor's are not looked at.
    Raises:
        ValueError: something else.
    """
    check_in_memory(values, name)
    return values if isinstance(values, Tensor) else _tensor_of(values, name, kinds)


def check_in_memory(values: Any, name: str, variable: str = "") -> None:
    """Refuse tensors whose numbers cannot be read one after the other, and arrays of which some are masked.

    Args:
        values: a tensor, an array, or anything else, which passes.
        name: what they are, for the message.
        variable: what they are called in the remedy; empty: by their name.
    Raises:
        ValueError: sparse, quantized, nested or meta tensors, or masked numbers; the message says what to type.
    """
    variable = variable or name
    if isinstance(values, np.ma.MaskedArray) and (masked := int(np.ma.count_masked(values))):
        raise ValueError(
            f"{name} must have no masked numbers, which would be read like the others; {masked:,} are masked. Leave "
            f"their rows out, {variable}[~numpy.ma.getmaskarray({variable}).any(1)], or give them a value, "
            f"{variable}.filled(0)"
        )
    if not isinstance(values, Tensor):
        return
    remedies = {
        "quantized": f"Use {variable}.dequantize()" if values.is_quantized else "",
        "nested": f"Use torch.cat(list({variable}))" if values.is_nested else "",
        "on the device meta, a shape alone": "Load the weights first" if values.is_meta else "",
        str(values.layout): f"Use {variable}.to_dense()" if values.layout != torch.strided else "",
    }
    for kind, remedy in remedies.items():
        if remedy:
            raise ValueError(
                f"{name} must be a plain tensor with its numbers in memory; got one that is {kind}. {remedy}"
            )


def check_same_shape(features: Tensor, codes: Tensor) -> None:
    """Refuse features and codes that are not two floating-point tensors (N, D)."""
    both = features, codes
    good = all(isinstance(v, Tensor) and v.dtype in FLOATS and v.layout == torch.strided for v in both)
    if not good or features.shape != codes.shape or features.ndim != 2:
        shapes = [tuple(v.shape) if hasattr(v, "shape") else type(v).__name__ for v in both]
        raise ValueError(
            f"features and codes must be plain floating-point tensors (N, D), one code per token; got {shapes[0]} and "
            f"{shapes[1]}"
        )


def check_alike(features: Tensor, codebook: Tensor) -> None:
    """As `check_pair`, at least one code, and both of one number type."""
    check_pair(features, codebook, least_codes=1)
    if features.dtype != codebook.dtype:
        raise ValueError(f"features are {features.dtype}, the codebook {codebook.dtype}; convert one with .to(dtype)")


def check_plain(**values: Any) -> None:
    """Raise ValueError unless all are tensors with one number after another in memory."""
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            got = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a plain tensor; got {got}. Use torch.as_tensor({name})")


def check_pair(features: Tensor, codebook: Tensor, least_codes: int = 2) -> None:
    """Features (N, D) and codebook (K, D) that can be multiplied.

    Args:
        features, codebook: what arrived.
        least_codes: 2 for a choice.
    Raises:
        ValueError: no such tensors; the message says what does not fit.
    """
    check_plain(features=features, codebook=codebook)
    if features.ndim != 2 or codebook.ndim != 2 or features.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"features (N, D) and codebook (K, D) must share D, got {tuple(features.shape)} and "
            f"{tuple(codebook.shape)}; reshape (B, D, h, w) features with .permute(0, 2, 3, 1).reshape(-1, D)"
        )
    if not len(features) or len(codebook) < least_codes:
        codes = {1: "one code", 2: "two codes"}[least_codes]
        raise ValueError(f"at least one token and {codes} are needed, got N = {len(features)}, K = {len(codebook)}")
    if features.device != codebook.device:
        raise ValueError(
            f"features are on {features.device}, the codebook on {codebook.device}; move one with .to(device)"
        )
    if features.dtype not in FLOATS or codebook.dtype not in FLOATS:
        raise ValueError(
            f"features and codebook must be floating-point, got {features.dtype} and {codebook.dtype}; use .float()"
        )


def _tensor_of(values: Any, name: str, kinds: str) -> Tensor:
    try:
        array = np.asarray(values)
        if array.dtype.kind not in kinds:
            raise TypeError(f"an array of {array.dtype}")
        wide = array.dtype.kind == "f" and array.dtype.itemsize > 8  # a long double, which torch does not have
        # torch takes arrays of this machine's byte order, without negative strides, that may be written to.
        dtype = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = f"{name}.weight" if hasattr(values, "weight") else f"torch.as_tensor({name}).float()"
        raise ValueError(
            f"{name} must be floating-point numbers in a tensor, an array, or lists of equal length; got "
            f"{type(values).__name__} ({str(error).splitlines()[0][:120]}). Use {remedy}"
        ) from None
