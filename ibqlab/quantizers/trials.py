"""Small quantizers, features and steps to try the rules of `contract` on."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ibqlab.quantizers.assignments import QuantizerError
from ibqlab.quantizers.base import Quantizer, build_quantizer, quantizer_config
from ibqlab.quantizers.codebooks import CHOSEN_STARTS
from ibqlab.quantizers.composite import open_sizes

CODES, DIM = 24, 6

_typed: ContextVar[dict[str, Any]] = ContextVar("settings to try a quantizer with")


@contextmanager
def settings_tried(settings: dict[str, Any]) -> Iterator[None]:
    """Inside the block small quantizers have these settings, such as another quantizer in a composite."""
    token = _typed.set(settings)
    try:
        yield
    finally:
        _typed.reset(token)


def small_settings(name: str, codes: int = CODES, dim: int = DIM) -> dict[str, Any]:
    """About so many codes of dimension D, drawn from N(0, 1) unless the method has a start of its own alone."""
    typed = _typed.get({})
    if typed:
        sizes = open_sizes({"name": name, **typed}, codes, dim)
        config = quantizer_config({"name": name, **sizes, **typed})
        is_free = config.codebook_init in CHOSEN_STARTS and "codebook_init" not in str(typed)
        return sizes | ({"codebook_init": "normal"} if is_free else {}) | typed
    config = quantizer_config({"name": name})
    start = {"codebook_init": "normal"} if config.codebook_init in CHOSEN_STARTS else {}
    return type(config).sized(codes, dim) | start


def need(condition: bool, seen: str) -> None:
    """Raise QuantizerError with what was seen unless the condition holds."""
    if not condition:
        raise QuantizerError(seen)


def features(seed: int = 0, shape: tuple[int, ...] = (2, DIM, 3, 4)) -> Float[Tensor, "B D h w"]:
    """Features from N(0, 1), the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name: str, seed: int = 1) -> Quantizer:
    """A registered quantizer of `small_settings`, the same for the same seed."""
    torch.manual_seed(seed)
    return build_quantizer(name, **small_settings(name))


def train_step(quantizer: Quantizer, seed: int) -> tuple[Tensor, ...]:
    """One step of training by plain gradient descent; what the quantizer gave."""
    torch.manual_seed(seed)
    z = features(seed).requires_grad_()
    out = quantizer(z)
    (out.loss + out.quantized.square().mean()).backward()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    return out.quantized.detach(), out.indices, out.loss.detach()


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two state dicts hold the same, to the last bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


def size_of(name: str, codes: int, dim: int) -> int:
    """K that comes of asking for so many codes of dimension D; 0 where there is no such size."""
    try:
        return quantizer_config({"name": name, **small_settings(name, codes, dim)}).codebook_size
    except ValueError:
        return 0
