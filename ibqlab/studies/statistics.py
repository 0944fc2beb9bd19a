"""What a few seeds can tell: intervals of means, differences between two settings, orderings, power laws.

Seeds are few, so every interval is Student's: with three seeds a 95 % interval is 4.3 standard errors to either side,
with two 12.7.
It takes runs as independent draws of one distribution that is roughly normal; with three nothing can check that.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""Of all intervals."""


def name_interval(seeds: int) -> str:
    """What an interval over so many seeds is, for captions: with two it is 12.7 standard errors to either side, and
    with one there is none.

    Args:
        seeds: at least 1.
    """
    if seeds < 2:
        return "1 seed, so no interval"
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    errors = stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
    return f"Student's 95 % interval of the mean over {seeds} seeds, ± {errors:.1f} standard errors"


class Interval(NamedTuple):
    """A mean over seeds. Without a second seed low and high are NaN: one run tells nothing about others."""

    mean: float
    low: float
    high: float
    count: int

    def overlaps(self, other: "Interval") -> bool | None:
        """Whether two intervals have a value in common; None where one of them is none."""
        if self.count < 2 or other.count < 2:
            return None
        return self.low <= other.high and other.low <= self.high


def mean_interval(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """The mean and Student's 95 % interval of it.

        mean ± t(0.975, n − 1) · s / √n

    Args:
        values: one per seed; NaN are left out.
        bounds: what the quantity cannot leave, such as (0, 1) for shares; the interval is cut there.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    found = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if len(found) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(mean, max(bounds[0], mean - half), min(bounds[1], mean + half), len(found))


def difference_is_clear(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether Welch's test tells two settings apart at 5 %; None with fewer than two seeds of either.

    Args:
        first, second: one value per seed.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    if len(first) < 2 or len(second) < 2:
        return None
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return bool(first[0] != second[0])
    with warnings.catch_warnings():
        # Two seeds may agree to the last digit, of which the test complains.
        warnings.simplefilter("ignore", RuntimeWarning)
        return bool(stats.ttest_ind(first, second, equal_var=False).pvalue < 1 - LEVEL)


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """How rows that a paper puts in an order stand here: pairs of rows, by their printed numbers."""

    pairs: int
    """Pairs with different printed numbers whose rows were both measured."""
    same: int
    """Pairs that stand here as there."""
    clearly_same: int
    """Of these, pairs that Welch's test tells apart."""
    clearly_other: int
    """Pairs that stand the other way round and are told apart."""
    seeds: int
    """The fewest behind any row."""
    reversed_pairs: tuple[tuple[str, str], ...] = ()
    """Names of the pairs that clearly stand the other way round, the paper's better row first."""

    def verdict(self) -> str:
        """How the paper's order fares.

        "holds"; "is partly seen": some pairs clearly, none against it; "is not decided": no pair clearly; "holds in
        part and not as a whole": pairs clearly both ways; "does not hold". With one seed "is seen, untested" and so on.
        """
        if self.seeds < 2:
            seen = "seen" if self.same == self.pairs else "partly seen" if self.same else "not seen"
            return f"is {seen}, untested"
        if self.clearly_same == self.pairs:
            return "holds"
        if self.clearly_other == 0:
            return "is partly seen" if self.clearly_same else "is not decided"
        return "holds in part and not as a whole" if self.clearly_same else "does not hold"

    def describe(self, measure: str, printed: str) -> str:
        """A sentence: what was compared, how it came out, how sure that is.

        Args:
            measure: name of ours.
            printed: name of the paper's.
        """
        against = "" if measure == printed else f" against the paper's {printed}"
        if self.pairs == 0:
            return f"{measure}{against}: no two rows to compare."
        start = f"{measure}{against}: the paper's ordering {self.verdict()} here. {_of(self.same, self.pairs)} as there"
        if self.seeds < 2:
            return f"{start}; one seed cannot say how sure that is."
        open_pairs = self.pairs - self.clearly_same - self.clearly_other
        turned = "".join(f"; {better} is clearly behind {worse}" for better, worse in self.reversed_pairs[:3])
        more = f" and {len(self.reversed_pairs) - 3} more" if len(self.reversed_pairs) > 3 else ""
        return (
            f"{start}; tested one by one (Welch, 5 %, {self.seeds} seeds), {self.clearly_same} clearly so, "
            f"{self.clearly_other} clearly the other way and {open_pairs} not told apart{turned}{more}."
        )


def compare_ordering(
    printed: Mapping[str, float], measured: Mapping[str, Sequence[float]], *, printed_higher: bool, higher: bool
) -> Ordering:
    """Compare the order that a paper's numbers give to rows with the order of ours, pair by pair.

    Each pair is tested on its own at 5 %: of twenty pairs without a difference, one will look clear.

    Args:
        printed: row → the paper's number.
        measured: row → our values, one per seed; rows without values are left out.
        printed_higher: whether more is better in the paper's measure.
        higher: whether more is better in ours.
    """
    rows = [name for name in printed if len(measured.get(name, ()))]
    same = clearly_same = pairs = 0
    turned = []
    for first, second in itertools.combinations(rows, 2):
        if printed[first] == printed[second]:
            continue
        better, worse = (first, second) if (printed[first] > printed[second]) == printed_higher else (second, first)
        gain = (np.mean(measured[better]) - np.mean(measured[worse])) * (1 if higher else -1)
        clear = difference_is_clear(measured[better], measured[worse])
        pairs += 1
        same += bool(gain > 0)
        clearly_same += bool(clear and gain > 0)
        turned += [(better, worse)] if clear and gain < 0 else []
    return Ordering(
        pairs=pairs,
        same=same,
        clearly_same=clearly_same,
        clearly_other=len(turned),
        seeds=min((len(measured[name]) for name in rows), default=0),
        reversed_pairs=tuple(turned),
    )


class PowerLaw(NamedTuple):
    """y = factor · x^exponent, and how sure the exponent is."""

    factor: float
    exponent: float
    low: float
    """Lower end of the exponent's 95 % interval; NaN with fewer than three points."""
    high: float
    """Upper end."""
    points: int


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """Least squares of log y on log x over all runs, and Student's 95 % interval of the slope.

    Args:
        x: above 0; one per run, seeds of a setting repeat it.
        y: above 0, else the point is left out.
    Returns:
        The law; None with fewer than two different x.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    points = [(a, b) for a, b in zip(x, y, strict=True) if a > 0 and b is not None and np.isfinite(b) and b > 0]
    if len({a for a, _ in points}) < 2:
        return None
    logs = np.log(np.asarray(points, dtype=float))
    fit = stats.linregress(logs[:, 0], logs[:, 1])
    half = np.nan if len(points) < 3 else float(stats.t.ppf((1 + LEVEL) / 2, len(points) - 2) * fit.stderr)
    slope = float(fit.slope)
    return PowerLaw(float(np.exp(fit.intercept)), slope, slope - half, slope + half, len(points))


def _of(count: int, total: int) -> str:
    if total == 1:
        return "Its one pair stands" if count else "Its one pair does not stand"
    return f"{count} of {total} pairs stand"
