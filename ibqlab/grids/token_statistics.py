"""What a tokenizer's tokens and features are like on the images that it is measured on, gathered batch by batch.

Features are summed and let go. Kept are hits per code, a few thousand features and the tokens of so many evenly spaced
images that their number stays below a million: memory does not grow with the images.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.base.measures import measure
from ibqlab.diagnostics.geometry import measure_probe, norm_statistics
from ibqlab.diagnostics.usage import USAGE_DEFINITIONS
from ibqlab.diagnostics.usage_stream import UsageCounter
from ibqlab.tokenizer import Tokenizer, TokenizerOutput
from ibqlab.tokens.entropy import token_entropy
from ibqlab.tokens.ngrams import LARGEST_CODEBOOK, measure_ngrams

MOST_TOKENS = 2**20
"""Tokens kept for entropies and n-grams."""
MOST_FEATURES = 4096
"""Features kept for distances to codes."""
HELD_OUT = 4
"""Every fourth of the kept images is held out from the n-grams' counts."""
BASELINES = ("unigram", "left", "mix")
"""Of the n-grams: alone, with the code before, with all neighbours."""
PROBE = ("feature_to_code_distance", "code_to_feature_distance", "winner_margin", "softmax_perplexity")
MEASURED = (
    *("quantization_error", "relative_quantization_error", "feature_norm_mean", "code_norm_mean"),
    *PROBE,
)
"""What is measured of features and codes, in units of the features where the list of measures says none."""
HEADINGS = {
    **{f"usage_{name}": f"usage, {name} (share of codes)" for name in USAGE_DEFINITIONS},
    "tokens_per_image": "tokens of an image",
    **{key: f"{measure(key).title}: {measure(key).definition}" for key in MEASURED},
    "entropy_bits": "entropy of a token (bits)",
    "entropy_position_bits": "entropy of a token, its position known (bits)",
    "unigram_bits": "held-out token, codes' frequencies known (bits)",
    "left_bits": "held-out token, the token before known (bits)",
    "mix_bits": "held-out token, its neighbours known (bits)",
    "bits_per_image": "held-out image by the cheapest of these (bits)",
}
"""Key of `TokenStatistics.row` → what it is and its unit, in the order of the table."""
COLUMNS = tuple(HEADINGS)


class TokenStatistics:
    """An observer of `evaluate_reconstruction`: give it as one of `observers`, and ask for its `row` afterwards.

    Quantization error is ‖z − e‖², mean over tokens and numbers, of what the quantizer compares: where it compares unit
    vectors, z is divided by its length. Divided by the variance of the same z about their mean it compares between
    tokenizers: 0 nothing lost, 1 as if one vector stood for all.

    Args:
        tokenizer: whose output comes.
        images: how many will come.
        grid: (h, w) of their tokens, (1, T) of tokens without a grid.
    """

    def __init__(self, tokenizer: Tokenizer, images: int, grid: tuple[int, int]) -> None:
        self.quantizer, self.grid = tokenizer.quantizer, grid
        self.usage = UsageCounter(tokenizer.config.quantizer.codebook_size)
        self.has_unit_vectors = bool(getattr(tokenizer.config.quantizer, "unit_vectors", False))
        tokens = math.prod(grid)
        self._every_image = max(1, -(-images * tokens // MOST_TOKENS))
        self._every_feature = max(1, -(-images * tokens // MOST_FEATURES))
        self._tokens: list[Int[np.ndarray, "n T"]] = []
        self._features: list[Float[Tensor, "n D"]] = []
        self._seen = 0
        self._error = 0.0
        self._mean: Tensor | float = 0.0
        self._scatter = 0.0

    def __call__(self, numbers: Int[Tensor, " B"], out: TokenizerOutput) -> None:
        """See a batch."""
        indices = out.quantizer.indices
        self.usage.update(indices)
        kept = numbers % self._every_image == 0
        self._tokens.append(indices.reshape(len(indices), -1).cpu()[kept].numpy())
        features, codes = (_rows(maps) for maps in (out.features, out.quantizer.quantized))  # (N, D) each
        if self.has_unit_vectors:
            features = F.normalize(features, dim=1)
        self._error += float((features - codes).square().sum())
        self._add_variance(features)
        first = -self._seen % self._every_feature
        self._features.append(features[first :: self._every_feature].float().cpu())
        self._seen += len(features)

    def row(self) -> dict[str, float]:
        """Everything, by the keys of `COLUMNS`; NaN where too little came for a definition.

        Usage is in shares of codes, norms and distances are in units of the features, entropies and n-grams in bits
        per token, `bits_per_image` is the tokens' cheapest n-gram times the tokens of an image.
        """
        row = dict.fromkeys(COLUMNS, math.nan)
        row |= {f"usage_{name}": usage.value for name, usage in self.usage.usages().items()}
        row["tokens_per_image"] = math.prod(self.grid)
        dim = self._features[0].shape[1]
        row["quantization_error"] = self._error / (self._seen * dim)
        if self._scatter > 0:
            row["relative_quantization_error"] = self._error / self._scatter
        return row | dict(self._geometry()) | dict(self._bits())

    def _add_variance(self, features: Float[Tensor, "N D"]) -> None:
        """Pairwise update of the sum of squares about the mean (Chan et al. 1979)."""
        total = self._seen + len(features)
        mean = features.mean(0)
        step = mean - self._mean
        self._scatter += float((features - mean).square().sum())
        self._scatter += float(step.square().sum()) * (self._seen * len(features) / total)
        self._mean = self._mean + step * (len(features) / total)

    def _geometry(self) -> Iterator[tuple[str, float]]:
        features = torch.cat(self._features)
        yield "feature_norm_mean", norm_statistics(features).mean
        with torch.no_grad():
            codebook = self.quantizer.codebook.detach().float().cpu()
        if codebook.ndim != 2 or codebook.shape[1] != features.shape[1]:
            return  # several codebooks of a composite have no common geometry
        yield "code_norm_mean", norm_statistics(codebook).mean
        if len(codebook) > 1:
            probe = measure_probe(features, codebook)
            yield from ((name, getattr(probe, name)) for name in PROBE)

    def _bits(self) -> Iterator[tuple[str, float]]:
        tokens, size = np.concatenate(self._tokens), self.usage.codebook_size
        entropy = token_entropy(tokens, size)
        yield "entropy_bits", entropy.marginal
        yield "entropy_position_bits", float(entropy.position.mean())
        held_out = np.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
        if len(tokens) < HELD_OUT or size > LARGEST_CODEBOOK:
            return
        bits = measure_ngrams(tokens[~held_out], tokens[held_out], size, self.grid)
        means = {name: float(bits[name].mean()) for name in BASELINES}
        yield from ((f"{name}_bits", value) for name, value in means.items())
        yield "bits_per_image", min(means.values()) * math.prod(self.grid)


def statistics_row(statistics: TokenStatistics) -> dict[str, Any]:
    """`TokenStatistics.row` as JSON holds it: None in place of NaN."""
    return {key: None if math.isnan(value) else float(value) for key, value in statistics.row().items()}


def _rows(maps: Float[Tensor, "B D *grid"]) -> Float[Tensor, "N D"]:
    """Feature maps as one vector per token, in float64."""
    return maps.detach().movedim(1, -1).flatten(0, -2).double()
