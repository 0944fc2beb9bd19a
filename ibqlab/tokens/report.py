"""A tokenizer's tokens in one table: what they cost under counting baselines, and under generators where there are any.

Kept apart from `ngrams.py`, which needs no tables.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from ibqlab.diagnostics.usage import Usage, count_indices, measure_usage_of_counts, perplexity
from ibqlab.tokens.entropy import (
    HeldOutTokens,
    TokenEntropy,
    Tokens,
    bits_per_image,
    bits_per_pixel,
    check_tokens,
    check_two,
    token_entropy,
)
from ibqlab.tokens.ngrams import BASELINES, BothLabels, measure_ngrams

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a generator needs for tokens held out: its validation loss in bits (`bits_per_token` converts nats)."""

    bits: float | Float[np.ndarray, "T"]
    """Bits per token, ≥ 0: the mean, or one at each position."""
    given_class: bool = False
    """Whether the generator was told the class."""
    permuted: bool = False
    """Whether it was trained and measured over codes with other numbers (`index_permutation`)."""


@dataclass(frozen=True, kw_only=True)
class TokenReport:
    """Result of `report_tokens`."""

    table: "pd.DataFrame"
    """One row per baseline and generator: name, kind ("baseline" or "generator"), given_class, permuted (both False or
    True), bits_per_token, bits_per_pixel, bits_per_image, share_of_uniform (bits per token as a share of log2 K; NaN
    for K = 1), and the same in every row: codebook_size, usage (share of codes in the training tokens counted),
    usage_tokens, perplexity (codes), training_images, validation_images."""
    positions: dict[str, Float[np.ndarray, "T"]]
    """Name → bits at each position, of baselines and of those generators that gave them."""
    entropy: TokenEntropy
    """Entropy of the training tokens."""
    usage: Usage
    """Codes hit in the training tokens."""
    grid: tuple[int, int]
    """(h, w), in tokens."""
    image_size: tuple[int, int]
    """(H, W), in pixels."""

    def bits(self, name: str) -> float:
        """Bits per token of a row."""
        return float(self.table.set_index("name")["bits_per_token"][name])


def report_tokens(
    training: Tokens,
    validation: HeldOutTokens,
    codebook_size: int,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    *,
    labels: BothLabels | None = None,
    models: Mapping[str, ModelCost] | None = None,
) -> TokenReport:
    """What one tokenizer's tokens cost, from log2 K down to the best generator.

    log2 K is the price of tokens that nobody understands. What "unigram" saves, uneven use of the codes gave away; what
    "mix" saves, neighbours give away; a generator earns its computing time only below that.

    Args:
        training: code numbers (n, T) of at least two images; baselines learn from them, entropy and usage are theirs.
        validation: code numbers (m, T) of other images; bits are measured on them.
        codebook_size: K.
        grid: (h, w) with h·w = T.
        image_size: (H, W) of the images, in pixels.
        labels: classes of the training and of the validation images, −1 for none; None: no baseline given the class.
        models: name → cost, of generators measured on the same validation images.
    Returns:
        The table, bits by position, entropy and usage.
    Raises:
        ValueError: as `measure_ngrams`; a generator with the name of a baseline, another T, or bits that are negative
            or not finite.
    Cost: as `measure_ngrams`.
    """
    models = models or {}
    tokens = check_tokens(training, codebook_size, "training")
    length = tokens.shape[1]
    image_size = check_two("image_size", image_size, "(H, W) in pixels")
    for name, cost in models.items():
        _check_cost(name, cost, length)
    positions = measure_ngrams(tokens, validation, codebook_size, grid, labels=labels)
    counts = count_indices(torch.from_numpy(tokens), codebook_size)
    usage = measure_usage_of_counts(counts)
    common = {
        "codebook_size": codebook_size,
        "usage": usage.value,
        "usage_tokens": usage.tokens,
        "perplexity": perplexity(counts),
        "training_images": len(tokens),
        "validation_images": len(validation),
    }
    baselines = {name: ModelCost(bits=bits, given_class="class" in name) for name, bits in positions.items()}
    rows = [
        {"name": name, "kind": kind, **_row(cost, length, codebook_size, image_size), **common}
        for kind, costs in (("baseline", baselines), ("generator", models))
        for name, cost in costs.items()
    ]
    import pandas as pd  # noqa: PLC0415 - keeps `import ibqlab.tokens` quick

    return TokenReport(
        table=pd.DataFrame(rows),
        positions=positions | {name: np.asarray(cost.bits) for name, cost in models.items() if np.ndim(cost.bits)},
        entropy=token_entropy(tokens, codebook_size),
        usage=usage,
        grid=grid,
        image_size=image_size,
    )


def _row(cost: ModelCost, tokens: int, codebook_size: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """A cost in every unit."""
    bits = float(np.mean(cost.bits))
    return {
        "given_class": cost.given_class,
        "permuted": cost.permuted,
        "bits_per_token": bits,
        "bits_per_pixel": bits_per_pixel(bits, tokens, *image_size),
        "bits_per_image": bits_per_image(bits, tokens),
        "share_of_uniform": bits / math.log2(codebook_size) if codebook_size > 1 else math.nan,
    }


def _check_cost(name: str, cost: ModelCost, tokens: int) -> None:
    """Refuse a generator's cost that cannot stand in the table."""
    bits = np.asarray(cost.bits)
    if name in BASELINES:
        raise ValueError(f"a generator needs a name of its own; {name!r} is a baseline: call it 'generator {name}'")
    if bits.shape not in ((), (tokens,)):
        raise ValueError(f"bits of {name!r} must be one number or one per position ({tokens},); got {bits.shape}")
    if not np.isfinite(bits).all() or bits.min() < 0:
        raise ValueError(f"bits of {name!r} must be finite and ≥ 0; got {bits.min()} to {bits.max()}")
