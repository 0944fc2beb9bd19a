"""What a codebook is doing: who is used, who can learn, and where codes and features lie.

usage.py         usage under every published definition, perplexity
geometry.py      distances between codes and features, norms, softmax perplexity
gradient.py      gradient reach: share of codes that a step moves
projection.py    codes and features in one jointly fitted plane
"""

from ibqlab.diagnostics.geometry import (
    CodeFeatureDistances,
    NormStatistics,
    code_feature_distances,
    exact_neighbours,
    nearest_distances,
    norm_statistics,
    softmax_perplexity,
)
from ibqlab.diagnostics.gradient import gradient_reach
from ibqlab.diagnostics.projection import PROJECTION_METHODS, Projection, project_codes
from ibqlab.diagnostics.usage import (
    USAGE_DEFINITIONS,
    Usage,
    count_indices,
    measure_usage,
    measure_usage_of_counts,
    perplexity,
)

__all__ = [
    "PROJECTION_METHODS",
    "USAGE_DEFINITIONS",
    "CodeFeatureDistances",
    "NormStatistics",
    "Projection",
    "Usage",
    "code_feature_distances",
    "count_indices",
    "exact_neighbours",
    "gradient_reach",
    "measure_usage",
    "measure_usage_of_counts",
    "nearest_distances",
    "norm_statistics",
    "perplexity",
    "project_codes",
    "softmax_perplexity",
]
