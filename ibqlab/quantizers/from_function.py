"""A quantizer out of one function: how tokens choose codes, and nothing else.

    @quantizer_from
    def dot_vq(features, codebook):                        # (N, D), (K, D)
        return (features @ codebook.T).argmax(dim=1)       # (N,)

The function has a codebook of free parameters, the straight-through gradient and VQ's two-sided loss; what it returns
besides indices takes their place. `base.Quantizer` is for whatever needs settings, another codebook or upkeep.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ibqlab.base.checks import require
from ibqlab.quantizers.assignments import (
    Assignment,
    QuantizerError,
    check_codes,
    check_device,
    looks_at_numbers,
)
from ibqlab.quantizers.base import Quantizer, make_quantizer, quantizer_config, register_quantizer
from ibqlab.quantizers.estimators import straight_through
from ibqlab.quantizers.registration import check_function
from ibqlab.quantizers.terms import PairLossConfig, pair_terms


def quantizer_from(
    function: Callable[[Tensor, Tensor], Any] | None = None,
    name: str | None = None,
    *,
    reaches: str = "",
    **registration: Any,
) -> Any:
    """Make a quantizer of a function and register it; usable as a decorator, with or without arguments.

    Args:
        function: features (N, D) and codebook (K, D) → indices (N,), or (quantized, indices), or (quantized, indices,
            terms). Quantized vectors (N, D) are those of training, with the gradient that they are to have; evaluation
            takes the codes themselves. Terms are named losses, of weight 1 each.
        name: that recipes write; None: the function's own.
        reaches: which codes a step moves, as `Quantizer.reaches` says it; the contract and the alarm go by it.
        **registration: label, color, marker and defaults, as `register_quantizer` takes them.
    Returns:
        The quantizer's class.
    Raises:
        ValueError: no function, or whatever `register_quantizer` refuses.
    """
    if function is None:
        return lambda decorated: quantizer_from(decorated, name, reaches=reaches, **registration)
    check_function(function)
    name = name or getattr(function, "__name__", "")
    require(
        name != "<lambda>", 'quantizer_from: a lambda has no name of its own; give one: quantizer_from(…, name="my_vq")'
    )

    class FunctionQuantizer(_FunctionQuantizer):
        choosing = staticmethod(function)

    FunctionQuantizer.reaches = reaches
    FunctionQuantizer.__name__ = getattr(function, "__name__", name)
    FunctionQuantizer.__qualname__ = getattr(function, "__qualname__", name)
    FunctionQuantizer.__module__ = getattr(function, "__module__", __name__)
    FunctionQuantizer.__doc__ = function.__doc__
    return register_quantizer(name, PairLossConfig, **registration)(FunctionQuantizer)


class _FunctionQuantizer(Quantizer):
    """What `quantizer_from` makes, without the function."""

    choosing: Callable[[Tensor, Tensor], Any]
    own_terms: tuple[str, ...] = ()
    """Names of the terms that the function returned last."""

    def loss_weights(self) -> dict[str, float]:
        """The two sides of the quantization loss by the settings; 1 for each of the function's own terms."""
        return super().loss_weights() | dict.fromkeys(self.own_terms, 1.0)

    def assign(self, features: Tensor, codebook: Tensor) -> Assignment:
        """What the function chooses; in evaluation the codes themselves."""
        result = self.choosing(features, codebook)
        quantized, terms = None, None
        if isinstance(result, tuple):
            if not 2 <= len(result) <= 3:
                raise QuantizerError(
                    f"the quantizer {self.name!r}: its function must return indices, (quantized, indices) or "
                    f"(quantized, indices, terms); got a tuple of {len(result)}"
                )
            quantized, indices, *more = result
            terms = more[0] if more else None
        else:
            indices = result
        whole = isinstance(indices, Tensor) and not (indices.dtype.is_floating_point or indices.dtype.is_complex)
        if not whole or indices.dtype == torch.bool or indices.shape != features.shape[:1]:
            kind = (
                f"{tuple(indices.shape)} of {indices.dtype}" if isinstance(indices, Tensor) else type(indices).__name__
            )
            raise QuantizerError(
                f"the quantizer {self.name!r}: its function must return whole indices of shape (N,) = "
                f"({len(features)},), an index per token; got {kind}"
            )
        check_device(f"the quantizer {self.name!r}: its function must return indices", indices, features)
        indices = indices.detach().long()
        if looks_at_numbers(self, features):  # before the codes are looked up, which ends a GPU's process
            check_codes(self.name, indices, len(codebook))
        codes = F.embedding(indices, codebook)  # (N, D); its gradient reaches the chosen codes alone
        if terms is None:
            terms = pair_terms(features, codes)
        elif isinstance(terms, dict):
            self.own_terms = tuple(terms)
        if not self.training:
            quantized = codes
        elif quantized is None:
            quantized = straight_through(features, codes)
        return Assignment(quantized, indices, terms)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its registered name: the class is made when the function is registered."""
        return _unfilled, (self.config,), self.__dict__


def _unfilled(config: Any) -> Quantizer:
    """A quantizer that is about to take over a state."""
    with torch.device("meta"):
        return make_quantizer(quantizer_config(config))
