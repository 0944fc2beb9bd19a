"""What tokens weigh before any generator sees them: their entropy, and the units in which a generator's loss is read.

A tokenizer is judged by its reconstruction, a generator by its loss; what the first costs the second stands between
them. Everything here is in bits and comes from the numbers of the codes alone, never from their vectors, and it stays
the same when the codes get other numbers (`index_permutation`). `ngrams.py` has what neighbours tell about a token.

Shape letters: n images · T tokens of an image · K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, Integer
from torch import Tensor

from ibqlab.base.checks import CODES, finite_number, whole_number
from ibqlab.quantizers.indices import indices_in_memory, value_bounds

Tokens = Integer[np.ndarray, "n T"] | Integer[Tensor, "n T"] | Sequence[Any]
"""Code numbers 0 to K − 1 of n images, row by row; any integer type, or lists of one length."""
HeldOutTokens = Integer[np.ndarray, "m T"] | Integer[Tensor, "m T"] | Sequence[Any]
"""Likewise, of m other images."""
Nats = TypeVar("Nats", float, np.ndarray)

UNSEEN_LIMIT = 0.1
"""Share of tokens with a code not met before at their position; above it an entropy is no more than a lower bound."""


@dataclass(frozen=True, kw_only=True)
class TokenEntropy:
    """Entropy of the tokens, position by position and altogether, with what is needed to read it."""

    position: Float[np.ndarray, "T"]
    """Bits of the token at each position, bias-corrected (Miller–Madow): 0 to log2 K, or by chance a little more."""
    position_plug_in: Float[np.ndarray, "T"]
    """The same without correction: the entropy of the observed frequencies, which reads low."""
    marginal: float
    """Bits of a token at any position, bias-corrected; what the best unigram model costs per token."""
    images: int
    """n, images counted at each position."""
    codebook_size: int
    """K, in codes."""
    unseen: float
    """Chance that the next image's token is a code not met before at its position, 0 to 1: share of codes met once
    (Good–Turing), mean over positions."""

    @property
    def cap(self) -> float:
        """log2 n bits: no entropy of observed frequencies exceeds it, whatever the tokens are."""
        return math.log2(self.images)

    @property
    def lower_bound(self) -> bool:
        """Whether so many tokens are codes not met before that the entropies by position only bound the true ones."""
        return self.unseen > UNSEEN_LIMIT

    def __str__(self) -> str:
        """The sentence for a caption: what was counted, and whether it was enough."""
        text = f"entropy by position over {self.images:,} images, K = {self.codebook_size:,}"
        if not self.lower_bound:
            return text
        return (
            f"{text}; a lower bound: {100 * self.unseen:.0f} % of tokens are codes not met before, and "
            f"uncorrected it cannot exceed log₂ {self.images:,} = {self.cap:.1f} bits"
        )


def token_entropy(indices: Tokens, codebook_size: int) -> TokenEntropy:
    """How uncertain a token is when only its position is known, and when not even that is.

    H = −Σ_k p_k log2 p_k with p_k = count_k / n, corrected for its bias (Miller–Madow): + (m − 1) / (2n ln 2) with m
    the number of codes met. A map of it shows where images differ. With far fewer images than codes it is meaningless:
    n images have at most n different tokens at a position, so the observed entropy cannot exceed log2 n, and the
    correction adds at most 0.72 bits. `lower_bound` says when.

    Args:
        indices: code numbers (n, T), at least one image.
        codebook_size: K, at least 1.
    Returns:
        Bits per position (T,) and altogether, the number of images, and the share of codes still unseen.
    Raises:
        ValueError: another shape, no token, or an index outside 0 to K − 1.
    Cost: O(n·T log n), whatever K is.
    Source: Miller 1955, "Note on the bias of information estimates"; Good 1953 for `unseen`.
    """
    array = check_tokens(indices, codebook_size)
    columns = [np.unique(column, return_counts=True)[1] for column in array.T]
    return TokenEntropy(
        position=np.array([_corrected(counts) for counts in columns]),
        position_plug_in=np.array([_plug_in(counts) for counts in columns]),
        marginal=_corrected(np.unique(array, return_counts=True)[1]),
        images=len(array),
        codebook_size=codebook_size,
        unseen=float(np.mean([(counts == 1).sum() for counts in columns])) / len(array),
    )


def bits_per_token(nats: Nats) -> Nats:
    """A generator's loss in bits: cross-entropy in nats per token, as training logs it, divided by ln 2."""
    return nats / math.log(2)


def bits_per_image(bits: float, tokens: int) -> float:
    """Bits of a whole image: `bits` per token times its T tokens; what an entropy coder would need for them."""
    return finite_number("bits", bits) * whole_number("tokens", tokens, 1)


def bits_per_pixel(bits: float, tokens: int, height: int, width: int) -> float:
    """Bits per pixel of the tokens: bits · T / (H·W), the scale on which tokenizers with other grids can be compared.

    Not the lossless bits per pixel (or per dimension) of models that give pixels a likelihood: those can restore the
    image, tokens restore the decoder's reconstruction of it. It is the rate of a lossy code, and a lower one is no gain
    where reconstruction has become worse. "Pixel" is a place with all its colours; bits per dimension are a third.

    Args:
        bits: per token.
        tokens: T, of an image.
        height: of the image, in pixels.
        width: likewise.
    Returns:
        Bits per pixel.
    Raises:
        ValueError: tokens or a size below 1.
    """
    return bits_per_image(bits, tokens) / (whole_number("height", height, 1) * whole_number("width", width, 1))


def index_permutation(codebook_size: int, seed: int) -> Int64[Tensor, "K"]:
    """New numbers of the codes, to measure what their order is worth: code k becomes entry k, each number once.

        shuffled = index_permutation(codebook_size, config.index_permutation)[indices]      # as that run saw its tokens

    Entropies and n-gram baselines do not change. A generator with one embedding per code learns them equally well
    either way; one that splits the number into parts (`factorize_indices`) uses that near codes have near numbers.

    Args:
        codebook_size: K.
        seed: of the permutation, ≥ 0; a generator's run has it in its setting `index_permutation`.
    Returns:
        int64 on the CPU, the same for the same K and seed.
    Raises:
        ValueError: K or seed out of bounds.
    """
    codebook_size = whole_number("codebook_size", codebook_size, 1, CODES)
    generator = torch.Generator("cpu").manual_seed(whole_number("seed", seed, 0))
    return torch.randperm(codebook_size, generator=generator, device="cpu")


def check_tokens(indices: Tokens, codebook_size: int, name: str = "indices") -> Int64[np.ndarray, "n T"]:
    """Tokens as int64 in NumPy; ValueError unless they are code numbers (n, T) of at least one image."""
    tokens = indices_in_memory(indices, name)
    if tokens.ndim != 2 or 0 in tokens.shape:
        remedy = f"Use {name}.reshape(n, -1) for grids (n, h, w)." if tokens.ndim == 3 else "Give images in rows."
        raise ValueError(f"{name} must be (n, T), at least one image of one token; got {tuple(tokens.shape)}. {remedy}")
    whole_number("codebook_size", codebook_size, 1, CODES)
    low, high = value_bounds(tokens)
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"{name} must lie in 0 to {codebook_size - 1} (codebook_size = {codebook_size}); got {low} to {high}: pass "
            "the codebook_size of the tokenizer that made them"
        )
    return tokens.cpu().numpy()


def check_two(name: str, values: Any, words: str) -> tuple[int, int]:
    """Rows and columns, or height and width: two whole numbers of at least 1."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) != 2:
        raise ValueError(f"{name} must be {words}, two whole numbers; got {type(values).__name__} {values!r:.40}")
    return whole_number(f"{name}[0]", values[0], 1), whole_number(f"{name}[1]", values[1], 1)


def _plug_in(counts: Integer[np.ndarray, "codes"]) -> float:
    """Entropy of observed frequencies, in bits."""
    share = counts / counts.sum()
    # A single code gives −0.
    return max(0.0, float(-(share * np.log2(share)).sum()))


def _corrected(counts: Integer[np.ndarray, "codes"]) -> float:
    """The same with Miller and Madow's correction."""
    return _plug_in(counts) + (len(counts) - 1) / (2 * int(counts.sum()) * math.log(2))
