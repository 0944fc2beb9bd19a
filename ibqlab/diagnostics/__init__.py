"""What a codebook is doing: which codes are used, which can learn, and where codes and features lie. Every function
takes plain arrays (indices, features, a codebook) and returns numbers that carry what is needed to read them, such
as the token count of a usage. A run that trains calls them through the recorder. Start reading at `usage`.

    print(measure_usage(indices, codebook_size=1024))     # 73.1 % of 1,024 codes in 10,240 tokens

usage.py         usage under every published definition, perplexity
geometry.py      distances between codes and features, norms, softmax perplexity, gradient reach
recorder.py      all of these for a run while it trains
lab/             all of it without images: clusters in a plane, or features of yours, by several methods side by side
projection.py    codes and features in one jointly fitted plane
umap_fit.py      that plane by UMAP
"""

from ibqlab.diagnostics.geometry import (
    CodeFeatureDistances,
    NormStatistics,
    code_feature_distances,
    exact_neighbours,
    gradient_reach,
    nearest_distances,
    norm_statistics,
    softmax_perplexity,
)
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
