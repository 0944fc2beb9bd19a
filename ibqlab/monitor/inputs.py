"""Indices, features, codebooks and images as training loops have them, checked and brought to one form."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Given = Tensor | Callable[[], Any] | Any
"""A tensor, an array, or a function that gives one, which is called only where it is needed."""


class UpdateInputs(NamedTuple):
    """What an update was given."""

    indices: Any
    features: Given
    codebook: Given
    images: Given
    reconstructions: Given
    probe: Given
    numbers: dict[str, Any]

    def kept(self, most_images: int) -> "UpdateInputs":
        """The same without graphs, for a row that may be asked for when the training ends.

        Args:
            most_images: kept of images where they would hold an accelerator's memory.
        """
        pictures = {name: _first(getattr(self, name), most_images) for name in ("images", "reconstructions")}
        tensors = {name: _without_graph(getattr(self, name)) for name in ("features", "codebook", "probe")}
        numbers = {name: _without_graph(number) for name, number in self.numbers.items()}
        return self._replace(indices=None, numbers=numbers, **tensors, **pictures)


def checked_settings(settings: Any) -> dict[str, Any]:
    """Settings as a dictionary.

    Raises:
        ValueError: something else.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(
            f"settings must be a dictionary of plain values, such as {{'seed': 0}}; got {type(settings).__name__}"
        )
    return dict(settings or {})


def _without_graph(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given


def _first(given: Any, most: int) -> Any:
    given = _without_graph(given)
    return given[:most].clone() if isinstance(given, Tensor) and given.ndim and given.device.type != "cpu" else given


def value_of(given: Given, name: str) -> Any:
    """What was given, or what the given function gives.

    Args:
        given: a value or a function.
        name: of the argument, for the message.
    Raises:
        ValueError: the function raised.
    """
    return _called(given, name) if callable(given) and not isinstance(given, Tensor) else given


def _called(function: Callable[..., Any], name: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        raise ValueError(
            f"{name} must be a tensor or a function that gives one; the function that was given raised "
            f"{type(error).__name__}: {error}. It is called when a row or a snapshot is due, without gradients"
        ) from error


def flat_indices(indices: Any, codebook_size: int) -> Tensor:
    """Indices of any shape as a copy (N,), int32, where they are. Codes out of range become −2 or K, and stay wrong.

    Args:
        indices: tensor, array or list of whole numbers.
        codebook_size: K.
    Raises:
        ValueError: no whole numbers.
    """
    from ibqlab.quantizers.indices import to_indices

    values = to_indices(value_of(indices, "indices"))
    if values.is_meta:
        raise ValueError("indices must have their numbers in memory; got a tensor on meta, which has a shape alone")
    refuse_one_hot(values, codebook_size)
    # Clamped first: in 32 bits a number beyond them would become another code.
    return values.detach().reshape(-1).clamp(-2, codebook_size).to(torch.int32, copy=True)


def refuse_one_hot(indices: Tensor, codebook_size: int) -> None:
    """Refuse whole numbers (…, K) of which each row has a single 1 among zeros: K indices a token are not meant.

    Raises:
        ValueError: the message says what to type.
    """
    if indices.ndim < 2 or indices.shape[-1] != codebook_size or codebook_size < 3 or not indices.numel():
        return
    is_one = indices == 1
    if bool(((indices == 0) | is_one).all() & (is_one.sum(-1) == 1).all()):
        raise ValueError(
            f"indices must be one whole number per token; got {tuple(indices.shape)} of a single 1 among zeros in each "
            "row, which seem to be one-hot. Use indices.argmax(-1)"
        )


def codebook_of(given: Given, codebook_size: int, device: torch.device) -> Any:
    """The codebook that was given: a table, a function that gives it, a function of indices, or a module that has one.

    A module with a `codebook`, such as a quantizer, or with a single table of weights, such as nn.Embedding.

    Args:
        given: of a grid that is nowhere stored, such as FSQ's: `indices_to_codes`, from indices (K,) to codes (K, D).
        codebook_size: K.
        device: of the indices that a function of indices is called with.
    """
    if isinstance(given, torch.nn.Module):
        return codebook_of_module(given)
    if callable(given) and not isinstance(given, Tensor):
        needed = [one for one in inspect.signature(given).parameters.values() if one.default is one.empty]
        takes_indices = any(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in needed)
        arguments = (torch.arange(codebook_size, device=device),) if takes_indices else ()
        given = _called(given, "codebook", *arguments)
        return codebook_of_module(given) if isinstance(given, torch.nn.Module) else given
    return given


def codebook_of_module(module: torch.nn.Module) -> Any:
    """A module's `codebook`, else its only table of weights."""
    codebook = getattr(module, "codebook", None)
    if codebook is not None:
        return codebook_of_module(codebook) if isinstance(codebook, torch.nn.Module) else codebook
    tables = [weights for weights in module.parameters() if weights.ndim == 2]
    if len(tables) != 1:
        raise ValueError(
            f"codebook must be a tensor (K, D), a function that gives it, or a module with one table of weights; got "
            f"{type(module).__name__} with {len(tables)}. Pass the table itself, such as codebook=module.weight"
        )
    return tables[0]


def checked_codebook(codebook: Any, codebook_size: int) -> Tensor:
    """A codebook (K, D) of floats, detached, of the size that the monitor was made for.

    Raises:
        ValueError: something else; the message says what to give.
    """
    from ibqlab.quantizers.vectors import to_vectors

    vectors = to_vectors(codebook, "codebook").detach()
    if len(vectors) != codebook_size == vectors.shape[1]:
        raise ValueError(
            f"codebook must hold one row per code, ({codebook_size}, D) since codebook_size={codebook_size}; got "
            f"{tuple(vectors.shape)}, one column per code. Pass codebook.T"
        )
    if len(vectors) != codebook_size:
        raise ValueError(
            f"codebook must hold one row per code, ({codebook_size}, D) since codebook_size={codebook_size}; got "
            f"{tuple(vectors.shape)}. A codebook that changes its size needs a monitor, and a folder, for each size"
        )
    return vectors


def to_tokens(features: Any, code_dim: int | None = None, name: str = "features") -> Tensor:
    """Features in any usual layout as one row per token, in the order of indices (B, h, w): a view where possible.

    Args:
        features: (N, D), (B, T, D), (B, D, T), (B, D, h, w) or (B, h, w, D), and likewise with more axes. Which axis
            is D follows from `code_dim`; where it fits none or is None, the second of four or more axes, else the last.
        code_dim: D of the codebook.
        name: what they are, for the message.
    Returns:
        (N, D), detached, in the features' own type.
    Raises:
        ValueError: no floats, fewer than two axes, no token, or no axis of length D.
    """
    from ibqlab.quantizers.vectors import FLOATS, to_tensor

    tensor = to_tensor(features, name, kinds="fcbiu")
    shape = tuple(tensor.shape)
    if tensor.dtype not in FLOATS:
        remedy = (
            f"Use {name}.float()"
            if tensor.is_floating_point()
            else ("Whole numbers are indices: pass them as indices=…")
        )
        raise ValueError(
            f"{name} must be floating-point numbers, the encoder's output before the codebook; got {tensor.dtype}. "
            f"{remedy}"
        )
    if tensor.ndim < 2 or 0 in shape:
        raise ValueError(
            f"{name} must be (N, D), (B, T, D) or (B, D, h, w) with at least one token; got {shape}. A single vector "
            f"is {name}[None]"
        )
    axes = [1, tensor.ndim - 1] if tensor.ndim > 3 else [tensor.ndim - 1, 1]
    if code_dim is not None and not any(shape[axis] == code_dim for axis in axes):
        raise ValueError(
            f"{name} must have the codebook's dimension D = {code_dim} as their last or second axis; got {shape}. "
            "Pass what the quantizer compares with the codes, after any projection"
        )
    axis = next((axis for axis in axes if shape[axis] == code_dim), axes[0])
    return tensor.detach().movedim(axis, -1).flatten(0, -2)


def _tensor_of(values: Any, name: str) -> Tensor:
    """A tensor with its numbers in memory; arrays and lists become one."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor, an array or lists of equal length; got {type(values).__name__} "
            f"({str(error).splitlines()[0][:80]})"
        ) from None
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(
            f"{name} must be a plain tensor with its numbers in memory; got {tensor.layout} on {tensor.device}. Use "
            f"{name}.to_dense()"
        )
    return tensor


def sample_rows(total: int, most: int) -> Tensor:
    """Row numbers spread evenly over so many rows, at most `most` of them."""
    return torch.arange(0, total, max(1, total // most))[:most]


def to_pictures(images: Any, like: Any = None, name: str = "images") -> np.ndarray:
    """Images (B, C, H, W) as snapshots hold them: (B, H, W, 3), uint8.

    Args:
        images: uint8, or floats in [0, 1], or in [−1, 1] if any is negative; one channel or three.
        like: other images whose range these share: reconstructions overshoot.
        name: what they are, for the message.
    Raises:
        ValueError: another shape.
    """
    tensor = _tensor_of(images, name).detach()
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise ValueError(f"{name} must be (B, 3, H, W) or (B, 1, H, W); got {tuple(tensor.shape)}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ValueError(f"{name} must be uint8, or floats in [0, 1] or [−1, 1]; got {tensor.dtype}. Use {name}.byte()")
    if tensor.dtype != torch.uint8:
        reference = tensor if like is None else torch.as_tensor(like)
        tensor = tensor.float()
        tensor = (tensor + 1) / 2 if float(reference.min()) < 0 else tensor
        tensor = (tensor.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return tensor.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
