"""What a codebook is doing: which codes are used, which can learn, and where codes and features lie. Every function
takes plain arrays (indices, features, a codebook) and returns numbers that carry what is needed to read them, such
as the token count of a usage. A run that trains calls them through the recorder. Start reading at `usage`.

    print(measure_usage(indices, codebook_size=1024))     # 73.1 % of 1,024 codes in 10,240 tokens

usage.py         usage under every published definition, perplexity
usage_stream.py  the same definitions of tokens that come batch by batch
geometry.py      distances between codes and features, norms, margins, softmax perplexity, gradient reach
recorder.py      all of these for a run while it trains
alarm.py         signs of collapse in a run's rows, told once each
alarm_base.py    what a rule of the alarm is
alarm_rules.py   what each rule of the alarm looks at, its threshold, and what it says
alarm_remedies.py  the same remedies in words, for a model that is not ours
explain.py       the band in which a softmax teaches; drift of features and codes
lifetimes.py     how long codes live, and usage to expect from fewer tokens
lab/             all of it without images: clusters in a plane, or features of yours, by several methods side by side
projection.py    codes and features in one jointly fitted plane
umap_fit.py      that plane by UMAP
"""

from ibqlab.diagnostics.alarm import Alarm, AlarmEvent, find_alarms
from ibqlab.diagnostics.alarm_rules import RULES, CodebookFacts, facts_of
from ibqlab.diagnostics.explain import logit_scale_band, measure_drift
from ibqlab.diagnostics.geometry import (
    CodeFeatureDistances,
    NormStatistics,
    WinnerMargins,
    code_feature_distances,
    exact_neighbours,
    gradient_reach,
    nearest_distances,
    norm_statistics,
    softmax_perplexity,
    winner_margins,
)
from ibqlab.diagnostics.lifetimes import code_lives, rarefaction, survival_curve
from ibqlab.diagnostics.projection import PROJECTION_METHODS, Projection, project_codes
from ibqlab.diagnostics.usage import (
    USAGE_DEFINITIONS,
    Usage,
    count_indices,
    measure_usage,
    measure_usage_of_counts,
    perplexity,
)
from ibqlab.diagnostics.usage_stream import UsageCounter

__all__ = [
    "PROJECTION_METHODS",
    "RULES",
    "USAGE_DEFINITIONS",
    "Alarm",
    "AlarmEvent",
    "CodeFeatureDistances",
    "CodebookFacts",
    "NormStatistics",
    "Projection",
    "Usage",
    "UsageCounter",
    "WinnerMargins",
    "code_feature_distances",
    "code_lives",
    "count_indices",
    "exact_neighbours",
    "facts_of",
    "find_alarms",
    "gradient_reach",
    "logit_scale_band",
    "measure_drift",
    "measure_usage",
    "measure_usage_of_counts",
    "nearest_distances",
    "norm_statistics",
    "perplexity",
    "project_codes",
    "rarefaction",
    "softmax_perplexity",
    "survival_curve",
    "winner_margins",
]
