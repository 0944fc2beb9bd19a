"""What a codebook is doing: who is used, who can learn, and where codes and features lie.

usage.py         usage under every published definition, perplexity, rarefaction, dead codes
geometry.py      distances between codes and features, norms, softmax perplexity
gradient.py      gradient reach: share of codes that a step moves
projection.py    codes and features in one jointly fitted plane
tokens.py        entropy of tokens by position, bits per token, pixel and image, codes numbered anew
ngrams.py        what neighbours tell about a token: the baselines of a generator
token_report.py  all that of one tokenizer in one table, generators beside it
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
from ibqlab.diagnostics.ngrams import BASELINES, measure_ngrams
from ibqlab.diagnostics.projection import PROJECTION_METHODS, Projection, project_codes
from ibqlab.diagnostics.token_report import ModelCost, TokenReport, report_tokens
from ibqlab.diagnostics.tokens import (
    TokenEntropy,
    bits_per_image,
    bits_per_pixel,
    bits_per_token,
    index_permutation,
    permute_indices,
    token_entropy,
)
from ibqlab.diagnostics.usage import (
    USAGE_DEFINITIONS,
    Usage,
    count_indices,
    dead_codes,
    measure_usage,
    measure_usage_of_counts,
    perplexity,
    rarefaction,
)

__all__ = [
    "BASELINES",
    "PROJECTION_METHODS",
    "USAGE_DEFINITIONS",
    "CodeFeatureDistances",
    "ModelCost",
    "NormStatistics",
    "Projection",
    "TokenEntropy",
    "TokenReport",
    "Usage",
    "bits_per_image",
    "bits_per_pixel",
    "bits_per_token",
    "code_feature_distances",
    "count_indices",
    "dead_codes",
    "exact_neighbours",
    "gradient_reach",
    "index_permutation",
    "measure_ngrams",
    "measure_usage",
    "measure_usage_of_counts",
    "nearest_distances",
    "norm_statistics",
    "permute_indices",
    "perplexity",
    "project_codes",
    "rarefaction",
    "report_tokens",
    "softmax_perplexity",
    "token_entropy",
]
