"""One codebook among its features, from arrays alone: no run, no model."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ibqlab.monitor.inputs import refuse_one_hot, sample_rows, to_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ibqlab.diagnostics.usage import Usage

MOST_TOKENS = 4096
"""Tokens on which distances, norms and softmax are measured; hits are counted on all."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found. `print` it, show it in a notebook, or take `numbers`."""

    usage: "Usage"
    """Share of codes hit, with the tokens it was counted in."""
    numbers: dict[str, float]
    """Measure → value."""
    counts: np.ndarray
    """(K,) hits per code."""
    codebook: np.ndarray
    """(K, D) float32."""
    features: np.ndarray
    """(n, D) float32: the tokens that were looked at, at most `MOST_TOKENS`."""

    def histogram(self) -> "Figure":
        """Share of tokens against the rank of the code."""
        from ibqlab.plots import plot_usage_histogram

        return plot_usage_histogram({"codebook": self.counts})

    def map(self, method: str = "pca") -> "Figure":
        """Codes and features in one plane.

        Args:
            method: "pca" (a second) or "umap" (half a minute, keeps neighbourhoods).
        """
        from ibqlab.diagnostics import project_codes
        from ibqlab.plots import plot_code_map

        projection = project_codes([self.codebook], [self.features], method=method, counts=[self.counts])
        return plot_code_map(projection, 0, self.counts)

    @cached_property
    def lines(self) -> list[tuple[str, str, str]]:
        """Title, value with its unit, and meaning of each number."""
        from ibqlab.base.measures import measure

        rows = [("usage", str(self.usage), measure("usage").definition)]
        known = self.numbers | {"usage_tokens": self.usage.tokens}
        for key, value in self.numbers.items():
            rows.append((measure(key).title, measure(key).text(value, known), measure(key).definition))
        return rows

    def __str__(self) -> str:
        width = max(len(title) for title, _, _ in self.lines)
        return "\n".join(f"{title:{width}}  {value}" for title, value, _ in self.lines)

    def _repr_html_(self) -> str:
        import base64

        from ibqlab.base.escaping import for_html

        lines = (
            f"<tr><td>{for_html(title)}</td><td><b>{for_html(value)}</b></td><td>{for_html(meaning)}</td></tr>"
            for title, value, meaning in self.lines
        )
        pictures = {"hits per code by rank": self.histogram(), "map of codes and features": self.map()}
        images = "".join(
            f'<img alt="{text}" style="max-width: 49%" '
            f'src="data:image/png;base64,{base64.b64encode(picture._repr_png_()).decode()}">'
            for text, picture in pictures.items()
        )
        return f"<table>{''.join(lines)}</table>{images}"


@torch.no_grad()
def diagnose(features: Any, codebook: Any, indices: Any = None) -> Diagnosis:
    """Numbers, histogram and map of a codebook, from arrays alone.

    Args:
        features: encoder outputs, (N, D), (B, T, D) or (B, D, h, w), as the quantizer compares them with codes; tensor
            or array.
        codebook: (K, D), at least two codes.
        indices: the codes that were chosen, one per feature, in their order; usage wants at least 10·K. None: each
            feature's nearest code.
    Returns:
        usage, perplexity and dead codes, of all indices; on at most 4,096 features evenly chosen, both one-sided
        distances, norms, softmax perplexity, quantization error and the winner's margin.
    Raises:
        ValueError: arrays that do not fit together, NaN, infinity, or indices outside 0 to K − 1. Very large and very
            small numbers are no trouble: distances are taken of both arrays divided by one power of two.
    Cost: O(N·K·D) operations where indices are None, else O(4096·K·D); memory O(N·D).
    """
    from ibqlab.diagnostics import (
        code_feature_distances,
        count_indices,
        measure_usage_of_counts,
        norm_statistics,
        perplexity,
        softmax_perplexity,
    )
    from ibqlab.diagnostics.geometry import winner_margins
    from ibqlab.quantizers import nearest_code
    from ibqlab.quantizers.indices import indices_in_memory
    from ibqlab.quantizers.vectors import check_in_memory, to_vectors

    codes = to_vectors(codebook, "codebook").detach().float().cpu()
    if len(codes) < 2:
        raise ValueError(f"codebook must hold at least two codes; got {tuple(codes.shape)}")
    check_in_memory(features, "features")
    _check_orientation(features, tuple(codes.shape))
    tokens = to_tokens(features, codes.shape[1]).float().cpu()
    check_in_memory(indices, "indices")
    for name, vectors in (("features", tokens), ("codebook", codes)):
        broken = int((~torch.isfinite(vectors)).any(1).sum())
        if broken:
            raise ValueError(
                f"{name} must be finite; {broken:,} of {len(vectors):,} rows hold NaN or infinity. Leave them out with "
                f"{name}[isfinite({name}).all(1)], or diagnose an earlier checkpoint"
            )
    unit = _common_unit(tokens, codes)
    scaled, scaled_codes = tokens / unit, codes / unit
    if indices is None:
        chosen = nearest_code(scaled, scaled_codes)
    else:
        chosen = _checked_indices(indices_in_memory(indices).cpu(), len(tokens), len(codes))
    counts = count_indices(chosen, len(codes))
    rows = sample_rows(len(tokens), MOST_TOKENS)
    probe, scaled = tokens[rows], scaled[rows]
    distances = code_feature_distances(scaled_codes, scaled)
    code_norms, feature_norms = norm_statistics(scaled_codes), norm_statistics(scaled)
    numbers = {
        "perplexity": perplexity(counts),
        "dead_codes": int((counts == 0).sum()),
        "feature_to_code_distance": unit * distances.feature_to_code,
        "code_to_feature_distance": unit * distances.code_to_feature,
        "quantization_error": unit**2 * float((scaled - scaled_codes[chosen[rows]]).square().mean()),
        "winner_margin": winner_margins(scaled, scaled_codes).distance,
        "softmax_perplexity": float(softmax_perplexity(probe, codes).mean()),
        "feature_norm_mean": unit * feature_norms.mean,
        "feature_norm_std": unit * feature_norms.std,
        "code_norm_mean": unit * code_norms.mean,
        "code_norm_std": unit * code_norms.std,
    }
    return Diagnosis(
        usage=measure_usage_of_counts(counts),
        numbers=numbers,
        counts=counts.numpy(),
        codebook=codes.numpy(),
        features=probe.numpy(),
    )


def _common_unit(*vectors: torch.Tensor) -> float:
    """A power of two by which all are divided before they are squared: 1 unless float32 would overflow or underflow."""
    largest = max(float(v.abs().max()) for v in vectors)
    if not largest or 1e-10 < largest < 1e10:
        return 1.0
    return 2.0 ** math.frexp(largest)[1]


def _checked_indices(indices: torch.Tensor, tokens: int, codebook_size: int) -> torch.Tensor:
    """Indices (N,), one per token and each a row of the codebook.

    Raises:
        ValueError: others; the message says what to type.
    """
    if not indices.numel():
        raise ValueError("indices must hold at least one; got none. Leave them out to take each feature's nearest code")
    refuse_one_hot(indices, codebook_size)
    if indices.numel() != tokens:
        raise ValueError(
            f"indices must be one per feature; got {indices.numel():,} indices of shape {tuple(indices.shape)} and "
            f"{tokens:,} features. Pass features and indices of one forward pass, or leave the indices out"
        )
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= codebook_size:
        remedies = ["leave out the tokens without a code, in the features, too"] if low < 0 else []
        remedies += ["pass the whole codebook that they count, or start them at 0"] if high >= codebook_size else []
        raise ValueError(
            f"indices must lie in 0 to {codebook_size - 1}, the rows of the codebook; got {low} to {high}: "
            f"{'; '.join(remedies)}"
        )
    return indices.reshape(-1)


def _check_orientation(features: Any, codebook_shape: tuple[int, int]) -> None:
    """Refuse a codebook, or features, of which only the transposed ones fit; what does not fit at all passes.

    Raises:
        ValueError: the message names the array that lies on its side.
    """
    shape = tuple(getattr(features, "shape", ()))
    dims, (rows, dim) = {shape[-1], shape[1]} if len(shape) > 1 else set(), codebook_shape
    if not dims or dim in dims:
        return
    if rows in dims:
        raise ValueError(
            f"codebook must be (K, D), one row per code; got {codebook_shape}, whose second number is no axis of the "
            f"features {shape}, while its first, {rows}, is: it seems to be (D, K). Use codebook.T"
        )
    if len(shape) == 2 and shape[0] == dim:
        raise ValueError(
            f"features must be (N, D) with the codebook's dimension D = {dim}; got {shape}, which seems to be (D, N). "
            "Use features.T"
        )
    if len(shape) == 2 and shape[0] == rows:
        raise ValueError(
            f"features must be (N, D) and codebook (K, D); got {shape} and {codebook_shape}, which seem to be (D, N) "
            "and (D, K). Use features.T and codebook.T"
        )
