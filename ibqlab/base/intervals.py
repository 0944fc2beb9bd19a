"""Intervals in tables and captions: how each kind is computed, what it is called, how it is written.

    Student's 95 % interval of the mean over seeds     student_interval, name_student_interval
    lowest to highest over seeds                       seed_range
    95 % interval of an exponent                       exponent_text; `studies.scaling` fits it

`Interval.text` writes all of them.

Seeds are few: with three a 95 % interval is 4.3 standard errors to either side, with two 12.7. Student's interval takes
runs as independent draws of one distribution that is roughly normal; with three runs nothing can check that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
"""Of all intervals."""


class Interval(NamedTuple):
    """A mean over seeds, and an interval of either kind. Low and high are NaN where there is none."""

    mean: float
    low: float
    high: float
    count: int
    """Seeds behind it."""

    def text(self, decimals: int = 1, scale: float = 1.0, unit: str = "", signed: bool = False) -> str:
        """For tables: "5.3 % (4.1–6.5)"; the mean alone without an interval; "–" without a value.

        Args:
            decimals: digits after the point.
            scale: from the value to what is shown: 100 for shares.
            unit: behind the mean, such as " %".
            signed: differences and exponents: "+0.4 (+0.3 to +0.5)", and 0 without a sign.
        """
        if not self.count:
            return "–"
        mean, low, high = (_number(value * scale, decimals, signed) for value in self[:3])
        between = " to " if signed else "–"
        return f"{mean}{unit}" if np.isnan(self.low) else f"{mean}{unit} ({low}{between}{high})"


def student_interval(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """The mean over seeds and Student's 95 % interval of it. One run has none: it tells nothing about others.

        mean ± t(0.975, n − 1) · s / √n

    Args:
        values: one per seed; NaN are left out.
        bounds: what the quantity cannot leave, such as (0, 1) for shares; the interval is cut there.
    """
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    numbers = np.asarray([value for value in values if value is not None and np.isfinite(value)], dtype=float)
    if len(numbers) < 2:
        return Interval(float(numbers[0]) if len(numbers) else np.nan, np.nan, np.nan, len(numbers))
    mean = float(numbers.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers)))
    return Interval(mean, max(bounds[0], mean - half), min(bounds[1], mean + half), len(numbers))


def name_student_interval(seeds: int) -> str:
    """What `student_interval` over so many seeds is, for captions.

    Args:
        seeds: at least 1.
    """
    if seeds < 2:
        return "1 seed, so no interval"
    from scipy import stats  # noqa: PLC0415 - half a second, needed only for tables

    errors = stats.t.ppf((1 + LEVEL) / 2, seeds - 1)
    return f"Student's 95 % interval of the mean over {seeds} seeds, ± {errors:.1f} standard errors"


def seed_range(mean: float, low: float, high: float, seeds: int) -> Interval:
    """The mean over seeds, and the lowest to the highest of them; one seed has no range."""
    return Interval(mean, low, high, seeds) if seeds > 1 else Interval(mean, np.nan, np.nan, seeds)


def exponent_text(law: Mapping[str, Any]) -> str:
    """The exponent of a power law and its interval: "+0.43 (+0.38 to +0.48)"; alone where there is none.

    Args:
        law: exponent, low, high.
    """
    return Interval(law["exponent"], law["low"], law["high"], 1).text(2, signed=True)


def _number(value: float, decimals: int, signed: bool) -> str:
    if signed and round(value, decimals):
        return f"{value:+,.{decimals}f}"
    # Adding 0 takes the sign from what is rounded to −0.
    return f"{abs(value) if signed else round(value, decimals) + 0.0:,.{decimals}f}"
