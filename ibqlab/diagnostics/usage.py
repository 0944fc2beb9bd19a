"""Which codes are used: every definition of "usage" in the field, by name, and what a single number hides.

A usage without its token count means nothing: 65,536 tokens cannot hit more than a quarter of 262,144 codes, and a
codebook in which one code takes nearly everything can still be "100 % used". Therefore every `Usage` carries the
number of tokens and the name of its definition, and stands beside `perplexity`, which says how even the use is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from ibqlab.base.checks import CODES, whole_number
from ibqlab.quantizers.indices import indices_in_memory

AnyIndices = Integer[Tensor, "..."] | Integer[np.ndarray, "..."] | Sequence[Any]
"""Code numbers as people have them; nested lists of equal length, too."""
Counts = Integer[Tensor, "K"] | Integer[np.ndarray, "K"] | Sequence[int]
"""Hits per code."""

USAGE_DEFINITIONS: dict[str, str] = {
    "any_hit": "Share of codes hit at least once in all tokens given (IBQ: on 50,000 validation images).",
    "one_batch": "Share of codes hit at least once in the first batch (vector-quantize-pytorch's examples).",
    "images_256": "Share of codes hit at least once in 256 images, mean over all full groups (rotation trick).",
    "window_65536": "Share of codes hit at least once in the last 65,536 tokens (LlamaGen); at most 65,536 / K.",
    "above_uniform_8pct": "Share of codes with at least 8 % of the hits that uniform use would give them (VAR).",
}
"""The published definitions, one sentence each. Their numbers for one index stream differ by a factor of fifty."""

_COUNT_DEFINITIONS = ("any_hit", "above_uniform_8pct")
WINDOW_TOKENS = 65_536
"""Tokens of "window_65536"."""
IMAGES_OF_A_GROUP = 256
"""Images of "images_256"."""
TOKENS_PER_CODE = 10
"""Fewer tokens than this times K measure the number of tokens rather than the codebook."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """A usage with all that is needed to read it. `print` it: "73.1 % of 1,024 codes in 10,240 tokens"."""

    value: float
    """Share of codes, 0 to 1."""
    tokens: int
    """Tokens looked at; for "images_256" the tokens of one group of 256 images."""
    codebook_size: int
    """K, in codes."""
    definition: str
    """A key of `USAGE_DEFINITIONS`."""

    @property
    def enough_tokens(self) -> bool:
        """Whether at least 10·K tokens were looked at; below that even a uniformly used codebook reads under 100 %."""
        return self.tokens >= TOKENS_PER_CODE * self.codebook_size

    @property
    def cap(self) -> float:
        """The highest value so many tokens allow, min(1, tokens / K): 0.25 for 65,536 tokens and K = 262,144."""
        return min(1.0, self.tokens / self.codebook_size)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What must be said of a number that so few tokens give."""
        remarks = ()
        if not self.enough_tokens:
            remarks += (f"too few tokens: at least 10·K = {TOKENS_PER_CODE * self.codebook_size:,}",)
        if self.cap < 1:
            remarks += (f"usage cannot exceed {100 * self.cap:.1f} %",)
        return remarks

    def __str__(self) -> str:
        """The sentence for a table or a caption, with its remarks."""
        text = f"{100 * self.value:.1f} % of {self.codebook_size:,} codes in {self.tokens:,} tokens"
        if self.definition != "any_hit":
            text += f" ({self.definition})"
        return "; ".join((text, *self.remarks))


def count_indices(indices: AnyIndices, codebook_size: int) -> Int[Tensor, "K"]:
    """How often each code was chosen.

    counts[k] = number of tokens with index k. All further statistics of usage need only this.

    Args:
        indices: code numbers 0 to K − 1 in a tensor, an array or lists; any shape, any integer type, any device.
        codebook_size: K, at least 1.
    Returns:
        Hits per code, int64, on the device of the indices; they sum to the number of tokens.
    Raises:
        ValueError: an index outside 0 to K − 1, or no whole numbers.
    Cost: O(N + K); one pass for the range check, and a wait for the device.
    """
    codebook_size = whole_number("codebook_size", codebook_size, 1, CODES)
    flat = indices_in_memory(indices).reshape(-1)
    if flat.numel():
        low, high = (int(bound) for bound in torch.aminmax(flat))
        if low < 0 or high >= codebook_size:
            remedies = [f"pass codebook_size={high + 1}"] if high >= codebook_size else []
            remedies += ["drop the negative indices"] if low < 0 else []
            raise ValueError(
                f"indices must lie in 0 to {codebook_size - 1} (codebook_size = {codebook_size}); "
                f"got {low} to {high}: {' and '.join(remedies)}"
            )
    return torch.bincount(flat, minlength=codebook_size)


def measure_usage(
    indices: AnyIndices,
    codebook_size: int,
    definition: str = "any_hit",
    tokens_per_image: int | None = None,
    images_per_batch: int | None = None,
) -> Usage:
    """Usage of a stream of indices under one of the published definitions.

    Compare numbers only within one definition and one token count; `USAGE_DEFINITIONS` says what each means.

    Args:
        indices: code numbers in the order in which they were seen, image after image; as `count_indices` takes
            them. For hits per code, which have no order, use `measure_usage_of_counts`.
        codebook_size: K.
        definition: "any_hit", "one_batch", "images_256", "window_65536" or "above_uniform_8pct".
        tokens_per_image: h·w; needed by "one_batch" and "images_256".
        images_per_batch: B; needed by "one_batch".
    Returns:
        The share with its token count and its name.
    Raises:
        ValueError: unknown definition, a missing setting, an index out of range, or fewer tokens than the definition
            counts (a shorter window would be another definition).
    Cost: O(N + K), for "images_256" O(N + K·groups).
    Source: IBQ §4.1; the others as named in `USAGE_DEFINITIONS`.
    """
    _check_definition(definition)
    codebook_size = whole_number("codebook_size", codebook_size, 1, CODES)
    flat = indices_in_memory(indices).reshape(-1)
    if definition in _COUNT_DEFINITIONS:
        return measure_usage_of_counts(count_indices(flat, codebook_size), definition)
    if definition == "images_256":
        return _usage_in_image_groups(flat, codebook_size, _needed("tokens_per_image", tokens_per_image, definition))
    if definition == "window_65536":
        tokens = _enough(flat, WINDOW_TOKENS, definition)[-WINDOW_TOKENS:]
    else:
        per_image = _needed("tokens_per_image", tokens_per_image, definition)
        batch = per_image * _needed("images_per_batch", images_per_batch, definition)
        tokens = _enough(flat, batch, definition)[:batch]
    return _usage(count_indices(tokens, codebook_size) > 0, tokens.numel(), definition)


def measure_usage_of_counts(counts: Counts, definition: str = "any_hit") -> Usage:
    """Usage from hits per code, for the two definitions that do not depend on the order of the tokens.

    "any_hit": counts[k] ≥ 1. "above_uniform_8pct": counts[k] ≥ 0.08 · N / K and counts[k] ≥ 1. VAR averages the hits of
    recent steps exponentially; here the hits are those of the tokens given.

    Args:
        counts: hits per code, as `count_indices` returns or a snapshot stores; K entries, so K needs no argument.
        definition: "any_hit" or "above_uniform_8pct".
    Returns:
        The share with its token count and its name.
    Raises:
        ValueError: another definition, or negative counts.
    """
    _check_definition(definition)
    if definition not in _COUNT_DEFINITIONS:
        raise ValueError(
            f"{definition!r} needs the tokens in order, which counts have lost: "
            f"call measure_usage(indices, codebook_size, {definition!r}, …)"
        )
    hits = _as_counts(counts)
    tokens = int(hits.sum())
    threshold = max(1.0, 0.08 * tokens / len(hits)) if definition == "above_uniform_8pct" else 1.0
    return _usage(hits >= threshold, tokens, definition)


def perplexity(counts: Counts) -> float:
    """How many equally used codes would carry the same information: how even the use is.

    exp(−Σ_k p_k ln p_k) with p_k = counts[k] / N. 1: one code takes all; K: perfectly even. Usage 100 % with a
    perplexity of 1 % of K means that most codes are hit by accident.

    Args:
        counts: hits per code.
    Returns:
        Perplexity in codes, 1 to K; nan when there are no tokens, where evenness has no meaning.
    Raises:
        ValueError: negative counts.
    """
    hits = _as_counts(counts).double()
    tokens = hits.sum()
    if tokens == 0:
        return math.nan
    return float(torch.special.entr(hits / tokens).sum().exp())


def even_usage(codebook_size: int, tokens: int) -> float:
    """Usage that so many tokens would show if every code were as likely as any other.

    1 − (1 − 1/K)ⁿ. A usage over few tokens is read against it: 512 tokens of an evenly used codebook of 1,024 codes
    hit 39 % of it.

    Args:
        codebook_size: K, at least 1.
        tokens: n, at least 0.
    Returns:
        Expected share of codes hit at least once, 0 to 1.
    Raises:
        ValueError: no codes, or fewer than no tokens.
    """
    codebook_size, tokens = whole_number("codebook_size", codebook_size, 1), whole_number("tokens", tokens, 0)
    if codebook_size == 1:
        return float(tokens > 0)
    return -math.expm1(tokens * math.log1p(-1 / codebook_size))


def usage_by_age(counts: Int[Tensor, "K"], old_codes: int) -> dict[str, float | None]:
    """Usage of a grown codebook's old and new codes apart: a collapse of one of them is hidden in their mean.

    Args:
        counts: hits per code; old codes come first.
        old_codes: how many they are; 0 for a codebook that was not grown.
    Returns:
        usage_old and usage_new, shares of codes hit at least once, 0 to 1; None where no token was counted. Empty for a
        codebook that was not grown.
    """
    if not old_codes:
        return {}
    parts = {"usage_old": counts[:old_codes], "usage_new": counts[old_codes:]}
    counted = bool(counts.any())
    return {key: int((part > 0).sum()) / len(part) if counted else None for key, part in parts.items()}


def _usage(alive: Bool[Tensor, "K"], tokens: int, definition: str) -> Usage:
    """The result for one mask of codes that count as used."""
    value = int(alive.sum()) / alive.numel()
    return Usage(value=value, tokens=tokens, codebook_size=alive.numel(), definition=definition)


def _usage_in_image_groups(flat: Int[Tensor, "N"], codebook_size: int, tokens_per_image: int) -> Usage:
    """Mean usage over all full groups of 256 images."""
    size = IMAGES_OF_A_GROUP * tokens_per_image
    groups = _enough(flat, size, "images_256").split(size)
    used = [int((count_indices(group, codebook_size) > 0).sum()) for group in groups if group.numel() == size]
    value = sum(used) / len(used) / codebook_size
    return Usage(value=value, tokens=size, codebook_size=codebook_size, definition="images_256")


def _as_counts(counts: Counts) -> Int[Tensor, "K"]:
    """Counts as a tensor on the CPU, refused when they cannot be hits per code."""
    hits = indices_in_memory(counts, "counts").cpu()
    if hits.ndim != 1 or hits.numel() == 0 or int(hits.min()) < 0:
        raise ValueError(
            "counts must be hits per code, one whole number ≥ 0 each, shape (K,), and no mask of codes; got "
            f"{hits.dtype} of shape {tuple(hits.shape)}: pass count_indices(indices, codebook_size)"
        )
    return hits


def _check_definition(definition: str) -> None:
    """Refuse a name that `USAGE_DEFINITIONS` does not list."""
    if not isinstance(definition, str) or definition not in USAGE_DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(map(repr, USAGE_DEFINITIONS))}; got {definition!r:.60}")


def _needed(name: str, value: int | None, definition: str) -> int:
    """A setting that this definition cannot do without."""
    return whole_number(f"{definition!r} needs {name}: it", value, 1, hint=f": pass {name}=…")


def _enough(flat: Int[Tensor, "N"], tokens: int, definition: str) -> Int[Tensor, "N"]:
    """The stream, refused when it is shorter than what the definition counts."""
    if flat.numel() < tokens:
        raise ValueError(
            f"{definition!r} counts {tokens:,} tokens; got {flat.numel():,}: pass more indices, or use 'any_hit', "
            "which reports however many there are"
        )
    return flat
