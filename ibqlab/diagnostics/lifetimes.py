"""How long codes live, and how usage grows with the tokens looked at.

code_lives      each code's time from its first to its last hit, from a run's snapshots
survival_curve  share of codes still alive after so many steps: Kaplan–Meier with Greenwood's interval
rarefaction     usage to expect from fewer tokens than were counted
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ibqlab.base.intervals import LEVEL

RAREFACTION_POINTS = 60
"""Numbers of tokens of a rarefaction curve."""


class Lives(NamedTuple):
    """Codes that were hit at least once."""

    steps: Float[np.ndarray, "N"]
    """Training steps from the first hit to the last one, or to the last snapshot."""
    died: Bool[np.ndarray, "N"]
    """False: still in use at the last snapshot, so its life is longer than was seen (censored)."""
    never: int
    """Codes that were never seen hit, left out."""


def code_lives(steps: Sequence[int], counts: Int[np.ndarray, "S K"], last_hits: Int[np.ndarray, "S K"]) -> Lives:
    """Lives of codes, from what a run's snapshots tell of hits.

    A code is in use at a snapshot if the validation there hit it, or training did since the snapshot before. It lives
    from the first such snapshot to its last hit, and a gap between is no death. It has died if it is not in use at the
    last snapshot. A rare code may be out of use there by chance: the more tokens between snapshots, the less so.

    Args:
        steps: of the snapshots, ascending, at least two.
        counts: hits per code of the validations, one row per snapshot.
        last_hits: training step of each code's last hit, −1 if never, likewise.
    Raises:
        ValueError: fewer than two snapshots, or rows that do not fit.
    """
    times, hits, last = (np.asarray(values, np.int64) for values in (steps, counts, last_hits))
    if len(times) < 2 or hits.shape != last.shape or len(hits) != len(times) or (np.diff(times) <= 0).any():
        raise ValueError(
            f"lives of codes need hits at two snapshots or more, in ascending order; got {len(times)} steps, counts of "
            f"shape {hits.shape} and last hits of shape {last.shape}"
        )
    before = np.concatenate([[0], times[:-1]])[:, None]  # (S, 1); no step is trained before the first snapshot
    in_use = (hits > 0) | (last > before)
    ever = in_use.any(0)
    in_use, final = in_use[:, ever], last[-1, ever]
    first, died = in_use.argmax(0), ~in_use[-1]
    validated = times[len(times) - 1 - (hits[::-1, ever] > 0).argmax(0)] * (hits[:, ever] > 0).any(0)
    ends = np.where(died, np.maximum(final, validated), times[-1])
    return Lives(np.maximum(ends - times[first], 0.0), died, int((~ever).sum()))


class SurvivalPoint(NamedTuple):
    """Survival from a number of steps on, up to the next point."""

    steps: float
    """Since the first hit."""
    at_risk: int
    """Codes that had lived so long, as far as was seen."""
    deaths: int
    """Of these, how many died then."""
    survival: float
    """Share of codes that live longer, 0 to 1."""
    low: float
    """Greenwood's 95 % interval on the scale of log(−log S), which stays within 0 to 1; NaN where there is none."""
    high: float


def survival_curve(steps: Float[np.ndarray, "N"], died: Bool[np.ndarray, "N"]) -> list[SurvivalPoint]:
    """The share of codes that live longer than t, where some were still alive when the run was looked at last.

    S(t) = ∏_{t_i ≤ t} (1 − d_i / n_i) with d_i deaths among n_i at risk. Codes share their tokens, so they do not die
    independently of each other: the interval is that of independent lives, and a lower bound of the doubt.

    Args:
        steps: length of each life, ≥ 0.
        died: False: it was still going on.
    Returns:
        One point at 0 and one per distinct length.
    Raises:
        ValueError: no lives, or lengths that do not fit or are no numbers.
    Source: Kaplan and Meier (1958), Greenwood (1926); computed by scipy.stats.ecdf.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for reports

    lengths, ended = np.asarray(steps, float), np.asarray(died, bool)
    if not len(lengths) or lengths.shape != ended.shape or not np.isfinite(lengths).all() or (lengths < 0).any():
        raise ValueError(
            f"survival needs a length ≥ 0 and an end for each life, at least one; got {lengths.shape} lengths and "
            f"{ended.shape} ends"
        )
    survival = stats.ecdf(stats.CensoredData.right_censored(lengths, ~ended)).sf
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where all have died the interval is none
        bounds = survival.confidence_interval(LEVEL, method="log-log")
    points = [SurvivalPoint(0.0, len(lengths), 0, 1.0, 1.0, 1.0)]
    for time, share, *interval in zip(
        survival.quantiles, survival.probabilities, bounds.low.probabilities, bounds.high.probabilities, strict=True
    ):
        at_risk, deaths = int((lengths >= time).sum()), int((ended & (lengths == time)).sum())
        # As long as nobody has died, Greenwood's formula has no doubt.
        low, high = (1.0, 1.0) if share == 1 else map(float, interval)
        points.append(SurvivalPoint(float(time), at_risk, deaths, float(share), low, high))
    return points


def rarefaction(
    counts: Int[np.ndarray, "K"], tokens: Sequence[int] | None = None
) -> tuple[Int[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Usage to expect from n of the tokens that were counted, drawn without replacement.

    E[usage(n)] = 1/K Σ_k [1 − C(N − c_k, n) / C(N, n)], c_k hits of N. Where the curve still rises at its end, more
    tokens would find more codes, and the usage counted is a number of tokens as much as of codes.

    Args:
        counts: hits per code, at least one in all.
        tokens: numbers n, 0 to N; None: from 1 to N, evenly spaced on a logarithmic axis.
    Returns:
        The numbers of tokens, and the expected share of the K codes.
    Raises:
        ValueError: no hits, negative ones, or an n outside 0 to N.
    Cost: O(P · distinct counts).
    Source: Hurlbert (1971), rarefaction in ecology.
    """
    from scipy.special import gammaln  # noqa: PLC0415 - half a second, needed only for reports

    hits = np.asarray(counts)
    total = int(hits.sum()) if hits.ndim == 1 and hits.size and hits.min() >= 0 else 0
    if total == 0:
        raise ValueError(f"rarefaction needs hits per code ≥ 0, at least one in all; got shape {hits.shape}")
    spaced = np.unique(np.geomspace(1, total, RAREFACTION_POINTS).round().astype(np.int64))
    numbers = spaced if tokens is None else np.asarray(tokens, np.int64)
    if numbers.min() < 0 or numbers.max() > total:
        raise ValueError(f"tokens must lie in 0 to {total:,}, the hits counted; got {numbers.min()} to {numbers.max()}")
    sizes, codes = np.unique(hits, return_counts=True)  # codes with the same number of hits are alike
    left = total - sizes[:, None] - numbers[None]  # (sizes, P) tokens that may be left out
    log_missing = (
        gammaln(total - sizes + 1)[:, None]
        - gammaln(np.maximum(left, 0) + 1)
        - gammaln(total + 1)
        + gammaln(total - numbers + 1)[None]
    )
    missing = np.where(left >= 0, np.exp(np.minimum(log_missing, 0)), 0.0)
    return numbers, 1 - codes @ missing / len(hits)
