"""What `Quantizer.assign` must return, checked at every step by shapes and types alone, which costs no look at values.

Whoever writes a quantizer learns here which of the rules it breaks; `contract` checks the others, on demand.
"""

import os
import traceback
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PACKAGE = f"{__name__.partition('.')[0]}."
"""Modules of this library begin so."""


class QuantizerError(ValueError):
    """A quantizer that does not do what every quantizer must; the message names it and the rule."""


class QuantizerOutput(NamedTuple):
    """What a quantizer returns."""

    quantized: Float[Tensor, "B D h w"]
    """Code vectors in place of features, float32 (float64 for float64 features), with the estimator's gradient."""
    indices: Int[Tensor, "B h w"]
    """The chosen code of each token, int64, 0 to K−1."""
    loss: Float[Tensor, ""]
    """Weighted sum of `terms`: what is added to the reconstruction loss."""
    terms: dict[str, Float[Tensor, ""]]
    """Named loss terms before weighting."""


class Assignment(NamedTuple):
    """What `Quantizer.assign` returns: the same as `QuantizerOutput`, token by token and without the weighted sum."""

    quantized: Float[Tensor, "N D"]
    """In evaluation the codes themselves, to the last bit, so that decoding the indices gives the same image: what an
    estimator adds and subtracts for its gradient rounds."""
    indices: Int[Tensor, " N"]
    terms: dict[str, Float[Tensor, ""]]


def checked(name: str, assignment: object, features: Float[Tensor, "N D"], training: bool) -> Assignment:
    """What `assign` returned, if its shapes and types are right; a lost gradient is told as a warning.

    Args:
        name: of the quantizer, as it is registered.
        assignment: what came back.
        features: what went in.
        training: whether a gradient is wanted.
    Raises:
        QuantizerError: it is no assignment, or one of other shapes or types.
    """
    rule = f"the quantizer {name!r}: assign must return"
    if not isinstance(assignment, tuple) or len(assignment) != 3:
        raise QuantizerError(f"{rule} Assignment(quantized, indices, terms); got {type(assignment).__name__}")
    quantized, indices, terms = assignment
    tokens, dim = features.shape
    if not isinstance(quantized, Tensor) or quantized.shape != features.shape:
        raise QuantizerError(f"{rule} quantized of shape (N, D) = ({tokens}, {dim}); got {_kind(quantized)}")
    if not quantized.is_floating_point():
        raise QuantizerError(f"{rule} quantized as floating-point numbers; got {_kind(quantized)}")
    if not isinstance(indices, Tensor) or indices.shape != (tokens,):
        raise QuantizerError(f"{rule} indices of shape (N,) = ({tokens},); got {_kind(indices)}")
    if indices.dtype != torch.int64:
        raise QuantizerError(f"{rule} indices as int64; got {_kind(indices)}. Use indices.long()")
    if not isinstance(terms, dict):
        raise QuantizerError(f"{rule} terms as a dictionary of named losses, {{}} for none; got {type(terms).__name__}")
    for term, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise QuantizerError(f"{rule} the loss term {term!r} as a tensor of one number; got {_kind(value)}")
    if training and features.requires_grad and not quantized.requires_grad:
        warnings.warn(
            f"the quantizer {name!r} detaches its gradient: the encoder learns nothing from the reconstruction. Return "
            "straight_through(features, codes) in training",
            stacklevel=3,
        )
    return Assignment(*assignment)


def weighted_sum(name: str, terms: dict[str, Tensor], weights: dict[str, float], like: Tensor) -> Float[Tensor, ""]:
    """A quantizer's loss, the sum of its terms by their weights.

    Args:
        name: of the quantizer.
        terms: named losses.
        weights: of each by its name.
        like: a tensor of the loss's type and device: without terms there is a loss to add, too.
    Raises:
        QuantizerError: a term has no weight.
    """
    for term in terms:
        if term not in weights:
            raise QuantizerError(
                f"the quantizer {name!r}: every loss term needs a weight, and {term!r} has none; loss_weights() names "
                f"{', '.join(map(repr, weights)) or 'no term'}"
            )
    return sum((weights[term] * value for term, value in terms.items()), like.new_zeros(()))


def raised_in(name: str, function: str, error: Exception) -> QuantizerError:
    """The error at a user's quantizer that raised: which one, where in its file, and what."""
    *_, last = traceback.extract_tb(error.__traceback__) or [None]
    place = f" ({os.path.basename(last.filename)}, line {last.lineno})" if last else ""
    return QuantizerError(
        f"the quantizer {name!r} raised in {function}{place}: {type(error).__name__}: {error}. Mend it and check it: "
        f"ibqlab check {name}"
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return f"{type(value).__name__} {value!r:.40}"
