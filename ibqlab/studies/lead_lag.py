"""What changes first: lead and lag between the measures of runs, with an interval over seeds.

Curves that fall together tempt the eye to tell causes from effects. Here each measure's change is dated by the step at
which it is half done, run by run, and the difference between two dates is given with Student's interval over seeds. A
sentence claims an order only where the interval excludes 0 and the difference exceeds the steps between rows. An order
in time is still no proof of a cause.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ibqlab.base.intervals import Interval, student_interval
from ibqlab.base.measures import measure
from ibqlab.plots.norms import SOFTMAX_METHODS

EFFECT = "step_usage"
"""What the others are dated against: usage without memory, on the clock of the gradient."""
CAUSES = ("gradient_reach", "softmax_perplexity", "feature_norm_mean")
"""Measures that are said to act on usage."""
SHARE = 0.5
"""Of a measure's whole change, at which it is dated."""
LEAST_CHANGE = 0.2
"""Of a measure's largest value: a smaller change is none, and has no date."""
_LAST_ROWS = 5


def change_step(steps: Sequence[float], values: Sequence[float], share: float = SHARE) -> tuple[float, float]:
    """The step at which a measure has made a share of its change from its early extreme to its final level.

    The final level is the median of the last five rows. The extreme is the value furthest from it. The date is
    interpolated between the two rows on either side.

    Args:
        steps: ascending.
        values: one per step; NaN are left out.
        share: of the change, above 0 to below 1.
    Returns:
        The step, and the steps between the two rows around it, within which nothing is known. Both NaN where the change
        is less than a fifth of the largest value, or there are fewer than three rows.
    """
    rows = pd.DataFrame({"step": steps, "value": values}, dtype=float).dropna()
    if len(rows) < 3:
        return np.nan, np.nan
    step, value = rows["step"].to_numpy(), rows["value"].to_numpy()
    final = float(np.median(value[-_LAST_ROWS:]))
    start = int(np.argmax(np.abs(value - final)))
    change = final - value[start]
    if abs(change) < LEAST_CHANGE * np.abs(value).max():
        return np.nan, np.nan
    progress = (value[start:] - value[start]) / change  # 0 at the extreme, 1 at the final level
    after = start + int(np.argmax(progress >= share))
    if progress[after - start] < share or after == start:
        return np.nan, np.nan
    before, beyond = progress[after - start - 1], progress[after - start]
    gap = step[after] - step[after - 1]
    return float(step[after - 1] + (share - before) / (beyond - before) * gap), float(gap)


def lead_lag(metrics: pd.DataFrame, by: Sequence[str] = ("method", "init")) -> pd.DataFrame:
    """How many steps before usage each measure changes, per group of runs that differ in their seed alone.

    Args:
        metrics: rows of runs with the columns seed, step, those of `by`, step_usage and any of `CAUSES`.
        by: what tells the groups apart.
    Returns:
        One row per group and measure in which at least one seed has both dates: the columns of `by`, measure, seeds,
        usage_step and measure_step (means of the dates), lead (mean of usage's date minus the measure's, steps; above
        0: the measure changes first), low and high (Student's 95 % interval over seeds; NaN with one), resolution (the
        most steps between rows around any of the dates), told_apart (the interval excludes 0 and the lead is more than
        the resolution). Runs without step_usage have none.
    Source: half of the change as in onset times of decay curves; nothing of the paper.
    """
    columns = [*by, "measure", "seeds", "usage_step", "measure_step", "lead", "low", "high", "resolution", "told_apart"]
    lines = []
    if EFFECT not in metrics:
        return pd.DataFrame(columns=columns)
    for names, runs in metrics.groupby(list(by), sort=False):
        for key in CAUSES:
            of_softmax = "method" not in runs or runs["method"].isin(SOFTMAX_METHODS).all()
            if key not in runs or (key == "softmax_perplexity" and not of_softmax):
                continue
            dates = []
            for _, run in runs.sort_values("step").groupby("seed", sort=True):
                usage, cause = (change_step(run["step"], run[column]) for column in (EFFECT, key))
                if np.isfinite(usage[0]) and np.isfinite(cause[0]):
                    dates.append((usage[0], cause[0], max(usage[1], cause[1])))
            if not dates:
                continue
            usage_steps, measure_steps, gaps = np.array(dates).T
            lead = student_interval(usage_steps - measure_steps)
            excludes_zero = bool(lead.low > 0 or lead.high < 0)
            lines.append(
                {
                    **dict(zip(by, names, strict=True)),
                    "measure": key,
                    "seeds": lead.count,
                    "usage_step": usage_steps.mean(),
                    "measure_step": measure_steps.mean(),
                    "lead": lead.mean,
                    "low": lead.low,
                    "high": lead.high,
                    "resolution": gaps.max(),
                    "told_apart": excludes_zero and abs(lead.mean) > gaps.max(),
                }
            )
    return pd.DataFrame(lines, columns=columns)


def lead_lag_sentences(table: pd.DataFrame) -> str:
    """What `lead_lag` found, one line per group and measure; an order is claimed only where it is told apart."""
    lines, group_columns = [], table.columns[: table.columns.get_loc("measure")]
    for _, row in table.iterrows():
        group, name = ", ".join(str(row[key]) for key in group_columns), measure(row["measure"]).title
        dated = f"{name} at step {row['measure_step']:.0f}, usage at step {row['usage_step']:.0f}"
        if row["seeds"] < 2:
            lines.append(f"- {group}: {dated}; one seed cannot say how sure their order is.")
            continue
        lead = Interval(row["lead"], row["low"], row["high"], row["seeds"]).text(unit=" steps", signed=True)
        if row["told_apart"]:
            order = f"{name} changes {'before' if row['lead'] > 0 else 'after'} usage"
        else:
            order = f"{name} and usage are not told apart in time"
        lines.append(f"- {group}: {order}: {dated}, {lead}, {row['seeds']} seeds.")
    return "\n".join(lines)


def lead_lag_text(table: pd.DataFrame) -> str:
    """The sentences with what they mean, for reports; "" where no run has what they need."""
    if table.empty:
        return ""
    return (
        "Each measure is dated by the step at which half of its change is done; usage is that of each step's own "
        "tokens. Differences with Student's 95 % interval over seeds; above 0: the measure changes before usage. An "
        "order in time is no proof of a cause.\n\n" + lead_lag_sentences(table)
    )
