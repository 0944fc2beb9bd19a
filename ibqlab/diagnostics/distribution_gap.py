"""How far a codebook's distribution lies from that of the features it should serve, and how alike its codes are.

A map shows two clouds; these numbers say in the full space whether they are one. They need no projection, so they can
be compared between methods, steps and runs.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ibqlab.diagnostics.geometry import nearest_distances
from ibqlab.quantizers.vectors import to_vectors

MOST_VECTORS = 2000
"""Codes, and features, that pairs are taken of; more are thinned evenly."""


class DistributionGap(NamedTuple):
    """Codes and features of one snapshot, compared."""

    distribution_gap: float
    """Energy distance over the largest it could be: 0 for one distribution, 1 for two single points apart."""
    in_use_distance: float
    """Mean distance of a code in use to its nearest feature, over the features' spread; NaN where none is in use."""
    unused_distance: float
    """The same of codes without a hit; NaN where there is none."""
    feature_spread: float
    """Root mean square distance of a feature to the features' mean, in their units."""
    code_similarity: float
    """Mean cosine of two codes: 1 where all point one way, near 0 where directions are spread evenly."""


@torch.no_grad()
def measure_distribution_gap(
    codebook: Float[Tensor, "K D"], features: Float[Tensor, "N D"], counts: Int[Tensor, "K"]
) -> DistributionGap:
    """Compare the whole codebook with the features, and codes in use with those without a hit.

        H = (2 E‖c − z‖ − E‖c − c′‖ − E‖z − z′‖) / (2 E‖c − z‖)

    over codes c and features z. H is 0 exactly where both have one distribution. It does not depend on the unit of
    the vectors, and of codes it counts all alike, however rarely they are hit: dead codes that stay behind raise it.

    Args:
        codebook: at least two codes.
        features: encoder outputs, at least two; a thousand are enough.
        counts: hits per code, which say what is in use.
    Returns:
        All measures; distances are multiples of the features' spread.
    Raises:
        ValueError: dimensions that differ, NaN or infinity, or too few vectors.
    Cost: O(min(K, 2000) · min(N, 2000) · D) for the pairs, O(K·N·D) for nearest features.
    Source: Székely & Rizzo 2013, Energy statistics (coefficient of inhomogeneity); the paper's figure 3 draws the gap
        without measuring it.
    """
    codes, vectors = (
        to_vectors(array, name).double() for array, name in ((codebook, "codebook"), (features, "features"))
    )
    hits = torch.as_tensor(counts).to(codes.device)
    if len(codes) < 2 or len(vectors) < 2:
        raise ValueError(f"a gap needs two codes and two features; got {len(codes)} and {len(vectors)}")
    if hits.shape != (len(codes),):
        raise ValueError(f"counts must hold one entry per code, {len(codes):,}; got shape {tuple(hits.shape)}")
    distances = nearest_distances(codebook, features).double()  # refuses NaN and other dimensions
    middle = vectors.mean(0)
    spread = float((vectors - middle).square().sum(1).mean().sqrt())
    some_codes, some_features = (_thinned(array) - middle for array in (codes, vectors))
    between = _mean_distance(some_codes, some_features)
    within = _mean_distance(some_codes, some_codes) + _mean_distance(some_features, some_features)
    directions = torch.nn.functional.normalize(codes, dim=1)
    # All pairs of different codes, without their K × K products: ‖Σ u‖² holds each pair twice and each code once.
    pairs = directions.sum(0).square().sum() - directions.square().sum()
    return DistributionGap(
        distribution_gap=min(1.0, max(0.0, 1 - within / (2 * between))) if between > 0 else 0.0,
        in_use_distance=_mean(distances[hits > 0]) / spread if spread else math.nan,
        unused_distance=_mean(distances[hits == 0]) / spread if spread else math.nan,
        feature_spread=spread,
        code_similarity=float(pairs / (len(codes) * (len(codes) - 1))),
    )


def _thinned(vectors: Float[Tensor, "N D"]) -> Float[Tensor, "M D"]:
    """At most `MOST_VECTORS`, evenly chosen by their number."""
    count = min(MOST_VECTORS, len(vectors))
    return vectors[torch.linspace(0, len(vectors) - 1, count, device=vectors.device).round().long()]


def _mean_distance(one: Float[Tensor, "N D"], other: Float[Tensor, "M D"]) -> float:
    """Mean distance over all pairs, in float64, whose products round far below any distance that matters here."""
    squares = one.square().sum(1)[:, None] + other.square().sum(1) - 2 * one @ other.T  # (N, M)
    return float(squares.clamp_min(0).sqrt().mean())


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan
