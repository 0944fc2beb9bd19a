"""What `Quantizer.assign` must return, checked at every step by shapes and types alone, which costs no look at values.

Whoever writes a quantizer learns here which of the rules it breaks; `contract` checks the others, on demand.
"""

import os
import traceback
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

PACKAGE = f"{__name__.partition('.')[0]}."
"""Modules of this library begin so."""
FIRST_LOOKS, LATER_LOOKS = 8, 64
"""On a GPU the numbers of a user's quantizer are looked at in its first forward passes, and then in each 64th: a look
waits for the GPU. On a CPU they are looked at in each. Quantizers of this library are looked at by the tests."""


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


def checked_assignment(quantizer: Any, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Assignment:
    """What a quantizer's `assign` returns, checked; of a user's own the numbers, too, as `FIRST_LOOKS` says.

    Raises:
        QuantizerError: a user's `assign` raised, or what it returned is not what it must be.
    """
    assignment = _called(quantizer, "assign", features, codebook)
    wants_gradient = quantizer.training and torch.is_grad_enabled()
    assignment = checked(quantizer.name, assignment, features, wants_gradient)
    if looks_at_numbers(quantizer, features):
        check_codes(quantizer.name, assignment.indices, quantizer.config.codebook_size)
        _check_finite(quantizer.name, assignment.quantized, features, codebook)
    if is_own(quantizer) and not torch.compiler.is_compiling():
        quantizer._passes = vars(quantizer).get("_passes", 0) + 1
    return assignment


def checked_choice(quantizer: Any, features: Float[Tensor, "N D"], codebook: Float[Tensor, "K D"]) -> Tensor:
    """What a quantizer's `choose` returns, (N,); of a user's own it is checked, since it is what gets stored.

    Raises:
        QuantizerError: a user's `choose` or `assign` raised, or returned no indices of codes.
    """
    indices = _called(quantizer, "choose", features, codebook)
    if is_own(quantizer):
        _check_indices(f"the quantizer {quantizer.name!r}: choose must return", indices, features)
        if _has_numbers(features):
            check_codes(quantizer.name, indices, quantizer.config.codebook_size)
    return indices


def looks_at_numbers(quantizer: Any, features: Tensor) -> bool:
    """Whether the numbers that a user's quantizer returns are looked at in this forward pass, see `FIRST_LOOKS`."""
    if not is_own(quantizer) or not _has_numbers(features):
        return False
    passes = vars(quantizer).get("_passes", 0)
    return features.device.type == "cpu" or passes < FIRST_LOOKS or passes % LATER_LOOKS == 0


def is_own(quantizer: Any) -> bool:
    """Whether a quantizer's class is a user's and not this library's."""
    return not type(quantizer).__module__.startswith(PACKAGE)


def _called(quantizer: Any, method: str, features: Tensor, codebook: Tensor) -> Any:
    """What a method returns; whatever a user's raises, sys.exit() included, says whose it is. Ctrl-C stays Ctrl-C."""
    call = getattr(quantizer, method)
    if not is_own(quantizer):
        return call(features, codebook)
    try:
        return call(features, codebook)
    except (KeyboardInterrupt, QuantizerError):
        raise
    except BaseException as error:
        raise raised_in(quantizer.name, method, error) from error


def check_codes(name: str, indices: Int[Tensor, " N"], size: int) -> None:
    """Raise QuantizerError unless all indices lie in 0 … K−1. Cost: on a GPU it waits for the numbers."""
    low, high = torch.stack(indices.aminmax()).tolist()
    if low < 0 or high >= size:
        raise QuantizerError(
            f"the quantizer {name!r}: indices must lie in 0 … {size - 1}, got {low} … {high}. Choose rows of the "
            "codebook, for instance scores.argmax(dim=1) with scores of shape (N, K)"
        )


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
    check_device(f"{rule} quantized", quantized, features)
    _check_indices(rule, indices, features)
    if not isinstance(terms, dict):
        raise QuantizerError(f"{rule} terms as a dictionary of named losses, {{}} for none; got {type(terms).__name__}")
    for term, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            raise QuantizerError(f"{rule} the loss term {term!r} as a tensor of one number; got {_kind(value)}")
        check_device(f"{rule} the loss term {term!r}", value, features)
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


def raised_in(name: str, function: str, error: BaseException) -> QuantizerError:
    """The error at a user's quantizer that raised: which one, where in its file, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    last = (theirs or frames or [None])[-1]
    place = f" ({os.path.basename(last.filename)}, line {last.lineno})" if last else ""
    return QuantizerError(
        f"the quantizer {name!r} raised in {function}{place}: {type(error).__name__}: {error}. Mend it and check it: "
        f"ibqlab check {name}"
    )


_LIBRARIES = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, os.path.dirname(__file__)))
"""Frames of files below these folders are not the user's."""


def _has_numbers(values: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at: not while costs are counted or a graph is compiled."""
    return type(values) is Tensor and not values.is_meta and not torch.compiler.is_compiling()


def _check_indices(rule: str, indices: object, features: Float[Tensor, "N D"]) -> None:
    if not isinstance(indices, Tensor) or indices.shape != features.shape[:1]:
        raise QuantizerError(f"{rule} indices of shape (N,) = ({len(features)},); got {_kind(indices)}")
    if indices.dtype != torch.int64:
        remedy = "Return the codes' numbers, not a mask" if indices.dtype == torch.bool else "Use indices.long()"
        raise QuantizerError(f"{rule} indices as int64; got {_kind(indices)}. {remedy}")
    check_device(f"{rule} indices", indices, features)


def check_device(rule: str, values: Tensor, features: Tensor) -> None:
    """Raise QuantizerError unless values lie on the features' device."""
    if values.device != features.device:
        raise QuantizerError(
            f"{rule} on the features' device, {features.device}; got {values.device}. Make new tensors with "
            "device=features.device"
        )


def _check_finite(name: str, quantized: Tensor, features: Tensor, codebook: Tensor) -> None:
    """Raise QuantizerError at NaN or infinity that came of finite features and codes."""
    wrong = ~quantized.detach().isfinite().all(1) & features.detach().isfinite().all(1)
    if wrong.any() and codebook.detach().isfinite().all():
        raise QuantizerError(
            f"the quantizer {name!r}: assign returned NaN or infinity in quantized for {int(wrong.sum())} of "
            f"{len(wrong)} tokens whose features are finite, first token {int(wrong.nonzero()[0, 0])}; look for a "
            "division by zero or the logarithm of zero"
        )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return f"{type(value).__name__} {value!r:.40}"
