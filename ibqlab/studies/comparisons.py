"""Whether a few seeds tell settings apart: Welch's test, corrected for many comparisons, and orders of rows.

A table compares many pairs. Tested one by one at 5 %, one of twenty pairs without any difference looks clear. Holm's
method keeps the chance that any verdict of a table is wrong below 5 %.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ibqlab.base.intervals import LEVEL


def welch_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The p-value of Welch's test that two settings have the same mean; NaN with fewer than two seeds of either.

    Where the seeds of each agree, that test has no spread to go by; exchanging seeds between them still says this much.

    Args:
        first, second: one value per seed.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    if len(first) < 2 or len(second) < 2:
        return np.nan
    if all(np.allclose(values, values[0], rtol=1e-9, atol=0) for values in (first, second)):
        is_same = np.isclose(first[0], second[0], rtol=1e-9, atol=0)
        return 1.0 if is_same else 2 / math.comb(len(first) + len(second), len(first))
    with warnings.catch_warnings():
        # Two seeds may agree to the last digit, of which the test complains.
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_ind(first, second, equal_var=False).pvalue)


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for as many comparisons as there are, by Holm's step-down method.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none comes out below the one before it, and none
    above 1. A corrected value below 0.05 is clear at 5 % for all of them together.

    Args:
        p_values: 0 to 1; NaN, which is no comparison, stays and does not count.
    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    corrected = np.array(p_values, dtype=float)
    tested = np.flatnonzero(np.isfinite(corrected))
    order = tested[np.argsort(corrected[tested], kind="stable")]
    factors = len(order) - np.arange(len(order))  # m, m − 1, …, 1
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * corrected[order]))
    return corrected.tolist()


def is_clear(p_value: float) -> bool:
    """Whether a corrected p-value tells two settings apart at 5 %."""
    return bool(p_value < 1 - LEVEL)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two settings' means over seeds."""

    value: float
    """First − second, in the measure's own unit."""
    low: float
    high: float
    """Welch's interval at the level that Holm's method gives to this difference among all that were tested together;
    NaN with fewer than two seeds of either."""
    p_value: float
    """Corrected by Holm's method; NaN likewise."""

    @property
    def is_clear(self) -> bool:
        """Whether it is told from 0 at 5 % for all differences together, which is where the interval leaves 0 out."""
        return is_clear(self.p_value)


def holm_differences(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], resolutions: Sequence[float] = ()
) -> list[Difference]:
    """Differences of means with intervals, corrected for being many.

    The i-th smallest of m p-values is compared with α/(m − i + 1), and its interval is Welch's of level
    1 − α/(m − i + 1); from the first that is not told from 0 on, all have that one's. So an interval leaves out 0
    exactly where Holm's test tells the difference from 0. That all intervals hold the true differences at once is
    promised for the first of them alone.

    Args:
        pairs: of settings, one value per seed in each.
        resolutions: per pair the step in which its measure can change, such as 1/K of a usage: seeds that agree are
            known to that step only. Empty: 0 for all.
    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    steps = list(resolutions) or [0.0] * len(pairs)
    welch = [_welch(first, second, step) for (first, second), step in zip(pairs, steps, strict=True)]
    corrected = correct_holm([one.p_value() for one in welch])
    tested = sorted((number for number, p in enumerate(corrected) if np.isfinite(p)), key=lambda n: welch[n].p_value())
    levels: dict[int, float] = {}
    for place, number in enumerate(tested):
        previous = tested[place - 1] if place else None
        stopped = previous is not None and not is_clear(corrected[previous])
        levels[number] = levels[previous] if stopped else (1 - LEVEL) / (len(tested) - place)
    differences = []
    for number, (one, p_value) in enumerate(zip(welch, corrected, strict=True)):
        half = one.half_width(levels[number]) if number in levels else np.nan
        differences.append(
            Difference(value=one.value, low=one.value - half, high=one.value + half, p_value=float(p_value))
        )
    return differences


class _Welch(NamedTuple):
    """Welch's test of two means."""

    value: float
    error: float
    freedom: float

    def p_value(self) -> float:
        """Two-sided; NaN where there is no error to go by."""
        from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

        if not np.isfinite(self.error):
            return np.nan
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.value) / self.error, self.freedom))

    def half_width(self, level: float) -> float:
        """Of the interval that leaves out so much."""
        from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

        return float(stats.t.isf(level / 2, self.freedom) * self.error) if self.error else 0.0


def _welch(first: Sequence[float], second: Sequence[float], step: float) -> _Welch:
    """The test of two settings; a value that moves in steps has at least the variance of rounding, step²/12."""
    groups = [np.asarray(values, dtype=float) for values in (first, second)]
    value = float(groups[0].mean() - groups[1].mean()) if all(map(len, groups)) else np.nan
    if min(map(len, groups)) < 2:
        return _Welch(value, np.nan, np.nan)
    parts = [max(float(values.var(ddof=1)), step**2 / 12) / len(values) for values in groups]
    if not sum(parts):
        return _Welch(value, 0.0, np.inf)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, groups, strict=True))
    return _Welch(value, math.sqrt(sum(parts)), freedom)


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """How rows that a paper puts in an order stand here, pair by pair."""

    pairs: tuple[tuple[str, str], ...]
    """Rows with different printed numbers that were both measured, the paper's better one first."""
    gains: tuple[float, ...]
    """Per pair how much better the first is here, in our measure; below 0: worse."""
    p_values: tuple[float, ...]
    """Per pair Welch's; NaN with one seed."""
    seeds: int
    """The fewest behind any row."""
    comparisons: int = 0
    """That the p-values are corrected for; 0: not corrected yet."""

    @property
    def same(self) -> int:
        """Pairs that stand here as there."""
        return sum(gain > 0 for gain in self.gains)

    @property
    def clearly_same(self) -> int:
        """Of these, pairs that are told apart."""
        return sum(is_clear(p) and gain > 0 for gain, p in zip(self.gains, self.p_values, strict=True))

    @property
    def reversed_pairs(self) -> list[tuple[str, str]]:
        """Pairs that clearly stand the other way round, the paper's better row first."""
        columns = zip(self.pairs, self.gains, self.p_values, strict=True)
        return [pair for pair, gain, p in columns if is_clear(p) and gain < 0]

    def verdict(self) -> str:
        """How the paper's order fares.

        "holds"; "is partly seen": some pairs clearly, none against it; "is not decided": no pair clearly; "holds in
        part and not as a whole": pairs clearly both ways; "does not hold". With one seed "is seen, untested" and so on.
        """
        if self.seeds < 2:
            extent = "seen" if self.same == len(self.pairs) else "partly seen" if self.same else "not seen"
            return f"is {extent}, untested"
        if self.clearly_same == len(self.pairs):
            return "holds"
        if not self.reversed_pairs:
            return "is partly seen" if self.clearly_same else "is not decided"
        return "holds in part and not as a whole" if self.clearly_same else "does not hold"

    def describe(self, measure: str, printed: str) -> str:
        """A sentence: what was compared, how it came out, how sure that is.

        Args:
            measure: name of ours.
            printed: name of the paper's.
        """
        against = "" if measure == printed else f" against the paper's {printed}"
        if not self.pairs:
            return f"{measure}{against}: no two rows to compare."
        total = len(self.pairs)
        stand = f"{self.same} of {total} pairs stand"
        if total == 1:
            stand = "Its one pair stands" if self.same else "Its one pair does not stand"
        start = f"{measure}{against}: the paper's ordering {self.verdict()} here. {stand} as there"
        if self.seeds < 2:
            return f"{start}; one seed cannot say how sure that is."
        reversed_pairs = self.reversed_pairs
        undecided = total - self.clearly_same - len(reversed_pairs)
        turned = "".join(f"; {better} is clearly behind {worse}" for better, worse in reversed_pairs[:3])
        ending = f" and {len(reversed_pairs) - 3} more" if len(reversed_pairs) > 3 else ""
        return (
            f"{start}; Welch's test at 5 %, {self.seeds} seeds, {name_correction(self.comparisons)}: "
            f"{self.clearly_same} clearly so, {len(reversed_pairs)} clearly the other way and {undecided} not told "
            f"apart{turned}{ending}."
        )


def compare_ordering(
    printed: Mapping[str, float], values: Mapping[str, Sequence[float]], *, printed_higher: bool, higher: bool
) -> Ordering:
    """Compare the order that a paper's numbers give to rows with the order of ours, pair by pair.

    Args:
        printed: row → the paper's number.
        values: row → our values, one per seed; rows without values are left out.
        printed_higher: whether more is better in the paper's measure.
        higher: whether more is better in ours.
    Returns:
        The order, its p-values not corrected; `correct_orderings` does that for all of a table.
    """
    rows = [name for name in printed if len(values.get(name, ()))]
    pairs, gains, p_values = [], [], []
    for first, second in itertools.combinations(rows, 2):
        if printed[first] == printed[second]:
            continue
        better, worse = (first, second) if (printed[first] > printed[second]) == printed_higher else (second, first)
        pairs.append((better, worse))
        gains.append(float(np.mean(values[better]) - np.mean(values[worse])) * (1 if higher else -1))
        p_values.append(welch_p(values[better], values[worse]))
    seeds = min((len(values[name]) for name in rows), default=0)
    return Ordering(pairs=tuple(pairs), gains=tuple(gains), p_values=tuple(p_values), seeds=seeds)


def correct_orderings(orderings: Sequence[Ordering]) -> list[Ordering]:
    """The orderings of one table, corrected for all their pairs together."""
    corrected = correct_holm([p for ordering in orderings for p in ordering.p_values])
    comparisons = int(np.isfinite(corrected).sum())
    remaining = iter(corrected)
    return [
        replace(ordering, p_values=tuple(itertools.islice(remaining, len(ordering.p_values))), comparisons=comparisons)
        for ordering in orderings
    ]


def name_correction(comparisons: int) -> str:
    """How verdicts were corrected, for sentences below a table."""
    return f"corrected for {comparisons} comparison{'' if comparisons == 1 else 's'} (Holm)"
